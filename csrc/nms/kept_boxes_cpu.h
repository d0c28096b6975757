// The boxes kept so far, laid out so that the processor tests a candidate against several of them at once.
#pragma once

#include <limits>
#include <vector>

#include "nms/nms.h"

namespace DETOPS_NAMESPACE {

// Lanes boxes, coordinate by coordinate. Free lanes hold a box that overlaps nothing.
template <class T, int Lanes>
struct BoxChunk {
  T x1[Lanes], y1[Lanes], x2[Lanes], y2[Lanes], area[Lanes];

  void clear() {
    for (int lane = 0; lane < Lanes; ++lane) {
      x1[lane] = y1[lane] = std::numeric_limits<T>::max();
      x2[lane] = y2[lane] = std::numeric_limits<T>::lowest();
      area[lane] = T(1);
    }
  }
  void set(int lane, const Box<T>& box, T box_area) {
    x1[lane] = box.x1;
    y1[lane] = box.y1;
    x2[lane] = box.x2;
    y2[lane] = box.y2;
    area[lane] = box_area;
  }
  DETOPS_HD Box<T> get(int lane) const { return {x1[lane], y1[lane], x2[lane], y2[lane]}; }
};

// True if a box of the chunk suppresses `box`. The quick test decides almost always; it vectorises.
template <class T, int Lanes>
DETOPS_HD bool chunk_suppresses(const BoxChunk<T, Lanes>& chunk, const Box<T>& box, T area,
                                const IouThreshold<T>& threshold) {
  int possible = 0;
  for (int lane = 0; lane < Lanes; ++lane) {
    possible |= may_suppress(chunk.get(lane), chunk.area[lane], box, area, threshold);
  }
  if (!possible) return false;
  for (int lane = 0; lane < Lanes; ++lane) {
    if (suppresses(chunk.get(lane), chunk.area[lane], box, area, threshold)) return true;
  }
  return false;
}

// Kept boxes in one list, tested one chunk after another.
template <class T>
class KeptList {
 public:
  static constexpr int kLanes = 64 / sizeof(T) * 2;

  void reset(int64_t capacity) {
    if (static_cast<int64_t>(chunks_.size()) * kLanes < capacity) chunks_.resize(ceil_div<int64_t>(capacity, kLanes));
    count_ = 0;
  }
  DETOPS_HD bool suppresses(const Box<T>& box, T area, const IouThreshold<T>& threshold) const {
    const BoxChunk<T, kLanes>* const chunks = chunks_.data();
    const int64_t used = ceil_div<int64_t>(count_, kLanes);
    for (int64_t i = 0; i < used; ++i) {
      if (chunk_suppresses(chunks[i], box, area, threshold)) return true;
    }
    return false;
  }
  DETOPS_HD void add(const Box<T>& box, T area) {
    const int lane = static_cast<int>(count_ % kLanes);
    BoxChunk<T, kLanes>& chunk = chunks_[count_ / kLanes];
    if (lane == 0) chunk.clear();
    chunk.set(lane, box, area);
    ++count_;
  }

 private:
  std::vector<BoxChunk<T, kLanes>> chunks_;
  int64_t count_ = 0;
};

// Kept boxes in buckets, each a chain of chunks. The caller says which buckets can matter.
template <class T>
class KeptBuckets {
 public:
  void reset(int64_t buckets) {
    heads_.assign(buckets, kNone);
    nodes_.clear();
  }
  DETOPS_HD bool suppresses(int64_t bucket, const Box<T>& box, T area, const IouThreshold<T>& threshold) const {
    const Node* const nodes = nodes_.data();
    for (uint32_t i = heads_[bucket]; i != kNone; i = nodes[i].next) {
      if (chunk_suppresses(nodes[i].boxes, box, area, threshold)) return true;
    }
    return false;
  }
  void add(int64_t bucket, const Box<T>& box, T area) {
    const uint32_t head = heads_[bucket];
    if (head != kNone && nodes_[head].used < kLanes) {
      Node& node = nodes_[head];
      node.boxes.set(node.used++, box, area);
      return;
    }
    heads_[bucket] = static_cast<uint32_t>(nodes_.size());
    nodes_.emplace_back();
    Node& node = nodes_.back();
    node.boxes.clear();
    node.boxes.set(0, box, area);
    node.used = 1;
    node.next = head;
  }

 private:
  static constexpr int kLanes = 8;
  static constexpr uint32_t kNone = 0xffffffffu;
  struct Node {
    BoxChunk<T, kLanes> boxes;
    uint32_t next;
    int used;
  };
  std::vector<uint32_t> heads_;  // the newest node of each bucket
  std::vector<Node> nodes_;
};

// Rotated boxes in one list. Their circles and areas rule out most of them, many at once.
template <class T>
class KeptRotated {
 public:
  void reset(int64_t capacity) {
    boxes_.clear();
    boxes_.reserve(capacity);
  }
  DETOPS_HD bool suppresses(const RotatedBox<T>& box, T area, const IouThreshold<T>& threshold) const {
    constexpr int64_t kBlock = 32;
    const RotatedBox<T>* const boxes = boxes_.data();
    const int64_t count = static_cast<int64_t>(boxes_.size());
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t length = min_of(kBlock, count - begin);
      bool possible[kBlock];
      for (int64_t i = 0; i < length; ++i) {
        const RotatedBox<T>& kept = boxes[begin + i];
        possible[i] = may_suppress(kept, box_area(kept), box, area, threshold);
      }
      for (int64_t i = 0; i < length; ++i) {
        if (possible[i] &&
            DETOPS_NAMESPACE::suppresses(boxes[begin + i], box_area(boxes[begin + i]), box, area, threshold))
          return true;
      }
    }
    return false;
  }
  void add(const RotatedBox<T>& box) { boxes_.push_back(box); }

 private:
  std::vector<RotatedBox<T>> boxes_;
};

}  // namespace DETOPS_NAMESPACE
