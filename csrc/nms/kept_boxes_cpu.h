// The boxes kept so far, laid out so that the processor tests a candidate against several of them at once.
#pragma once

#include <limits>
#include <vector>

#include "common/counted.h"
#include "nms/nms.h"
#include "nms/rotated_bound.h"
#include "nms/scale_index_cpu.h"

namespace DETOPS_NAMESPACE {

// Lists are tested faster than cells are found while few boxes are kept.
constexpr int64_t kIndexPays = 512;

// Lanes boxes, coordinate by coordinate. Free lanes hold a box that overlaps nothing.
template <class B, int Lanes>
struct Chunk;

template <class T, int Lanes>
struct Chunk<Box<T>, Lanes> {
  T x1[Lanes], y1[Lanes], x2[Lanes], y2[Lanes], area[Lanes];

  DETOPS_HD void clear() {
    for (int lane = 0; lane < Lanes; ++lane) {
      x1[lane] = y1[lane] = std::numeric_limits<T>::max();
      x2[lane] = y2[lane] = std::numeric_limits<T>::lowest();
      area[lane] = T(1);
    }
  }
  DETOPS_HD void set(int lane, const Box<T>& box, T box_area) {
    x1[lane] = box.x1;
    y1[lane] = box.y1;
    x2[lane] = box.x2;
    y2[lane] = box.y2;
    area[lane] = box_area;
  }
  DETOPS_HD Box<T> get(int lane) const { return {x1[lane], y1[lane], x2[lane], y2[lane]}; }

  // True if a box of the chunk suppresses `box`. The quick test decides almost always; it vectorises.
  DETOPS_HD bool suppresses(const Box<T>& box, T box_area, const IouThreshold<T>& threshold) const {
    int possible = 0;
    for (int lane = 0; lane < Lanes; ++lane) {
      possible |= may_suppress(get(lane), area[lane], box, box_area, threshold);
    }
    if (!possible) return false;
    for (int lane = 0; lane < Lanes; ++lane) {
      if (DETOPS_NAMESPACE::suppresses(get(lane), area[lane], box, box_area, threshold)) return true;
    }
    return false;
  }
};

template <class T, int Lanes>
struct Chunk<RotatedBox<T>, Lanes> {
  T centre_x[Lanes], centre_y[Lanes], width[Lanes], height[Lanes], angle[Lanes], cos[Lanes], sin[Lanes], error[Lanes];

  DETOPS_HD void clear() {
    for (int lane = 0; lane < Lanes; ++lane) {
      centre_x[lane] = centre_y[lane] = std::numeric_limits<T>::quiet_NaN();  // no circle meets it
      width[lane] = height[lane] = angle[lane] = cos[lane] = sin[lane] = error[lane] = T(0);
    }
  }
  DETOPS_HD void set(int lane, const RotatedBox<T>& box, T) {
    centre_x[lane] = box.centre_x;
    centre_y[lane] = box.centre_y;
    width[lane] = box.width;
    height[lane] = box.height;
    angle[lane] = box.angle;
    cos[lane] = box.cos;
    sin[lane] = box.sin;
    error[lane] = area_error(box);
  }
  DETOPS_HD RotatedBox<T> get(int lane) const {
    return {centre_x[lane], centre_y[lane], width[lane], height[lane], angle[lane], cos[lane], sin[lane]};
  }

  // As above. Circles and areas rule out most boxes, the bound on the IoU most of the others.
  DETOPS_HD bool suppresses(const RotatedBox<T>& box, T area, const IouThreshold<T>& threshold) const {
    int possible[Lanes], any = 0;
    for (int lane = 0; lane < Lanes; ++lane) {
      const RotatedBox<T> kept = get(lane);
      any |= possible[lane] = may_suppress(kept, box_area(kept), box, area, threshold);
    }
    if (!any) return false;
    const T box_error = area_error(box);
    any = 0;
    for (int lane = 0; lane < Lanes; ++lane) {
      any |= possible[lane] &= may_exceed(get(lane), error[lane], box, box_error, threshold.quick);
    }
    if (!any) return false;
    for (int lane = 0; lane < Lanes; ++lane) {
      const RotatedBox<T> kept = get(lane);
      if (possible[lane] && DETOPS_NAMESPACE::suppresses(kept, box_area(kept), box, area, threshold)) return true;
    }
    return false;
  }
};

// Kept boxes in one list, tested one chunk after another.
template <class B>
class KeptList {
  using T = typename B::Scalar;

 public:
  // Room for `capacity` boxes.
  void reset(int64_t capacity) {
    if (static_cast<int64_t>(chunks_.size()) * kLanes < capacity) chunks_.resize(ceil_div<int64_t>(capacity, kLanes));
    count_ = 0;
  }
  DETOPS_HD bool suppresses(const B& box, T area, const IouThreshold<T>& threshold) const {
    const Chunk<B, kLanes>* const chunks = chunks_.data();
    const int64_t used = ceil_div<int64_t>(count_, kLanes);
    for (int64_t i = 0; i < used; ++i) {
      if (chunks[i].suppresses(box, area, threshold)) return true;
    }
    return false;
  }
  DETOPS_HD void add(const B& box, T area) {
    const Counted<Chunk<B, kLanes>> chunks("nms", "list of kept boxes", chunks_.data(), chunks_.size());
    const int lane = static_cast<int>(count_ % kLanes);
    Chunk<B, kLanes>& chunk = chunks[count_ / kLanes];
    if (lane == 0) chunk.clear();
    chunk.set(lane, box, area);
    ++count_;
  }

 private:
  static constexpr int kLanes = 64 / sizeof(T) * 2;
  std::vector<Chunk<B, kLanes>> chunks_;
  int64_t count_ = 0;
};

// Kept boxes in buckets, each a chain of chunks. The caller says which buckets can matter. Boxes of several groups, of
// which none suppresses one of another, may share a bucket.
template <class B>
class KeptBuckets {
  using T = typename B::Scalar;

 public:
  // `capacity` boxes at most will be added.
  void reset(int64_t buckets, int64_t capacity) {
    constexpr int64_t kMostReserved = 1 << 20;
    heads_.assign(buckets, kNone);
    nodes_.clear();
    nodes_.reserve(min_of(capacity, kMostReserved));
  }
  DETOPS_HD bool suppresses(int64_t bucket, uint32_t group, const B& box, T area,
                            const IouThreshold<T>& threshold) const {
    const Node* const nodes = nodes_.data();
    for (uint32_t i = heads_[bucket]; i != kNone; i = nodes[i].next) {
      if (nodes[i].group == group && nodes[i].boxes.suppresses(box, area, threshold)) return true;
    }
    return false;
  }
  // Of all buckets.
  DETOPS_HD bool suppresses(uint32_t group, const B& box, T area, const IouThreshold<T>& threshold) const {
    for (const Node& node : nodes_) {
      if (node.group == group && node.boxes.suppresses(box, area, threshold)) return true;
    }
    return false;
  }
  void add(int64_t bucket, uint32_t group, const B& box, T area) {
    const Counted<uint32_t> heads("nms", "buckets of kept boxes", heads_.data(), heads_.size());
    const uint32_t head = heads[bucket];
    if (head != kNone && nodes_[head].group == group && nodes_[head].used < kLanes) {
      Node& node = nodes_[head];
      node.boxes.set(node.used++, box, area);
      return;
    }
    heads[bucket] = static_cast<uint32_t>(nodes_.size());
    nodes_.emplace_back();
    Node& node = nodes_.back();
    node.boxes.clear();
    node.boxes.set(0, box, area);
    node.used = 1;
    node.next = head;
    node.group = group;
  }
  // Calls body(group, box) for all of them.
  template <class Body>
  void for_each(const Body& body) const {
    for (const Node& node : nodes_) {
      for (int lane = 0; lane < node.used; ++lane) body(node.group, node.boxes.get(lane));
    }
  }

 private:
  static constexpr int kLanes = 8;
  static constexpr uint32_t kNone = 0xffffffffu;
  struct Node {
    Chunk<B, kLanes> boxes;
    uint32_t next, group;
    int used;
  };
  std::vector<uint32_t> heads_;  // the newest node of each bucket
  std::vector<Node> nodes_;
};

// Kept boxes by scale and place: a candidate is tested against the few that can suppress it.
template <class B>
class KeptIndex {
  using T = typename B::Scalar;

 public:
  static bool serves(double iou_threshold) { return iou_threshold >= ScaleIndex::kLowestThreshold; }

  KeptIndex(double iou_threshold, int64_t capacity)
      : index_(iou_threshold, capacity, static_cast<const B*>(nullptr)), others_(index_.buckets()) {
    kept_.reset(index_.buckets() + 1, capacity);
  }
  DETOPS_HD bool suppresses(uint32_t group, const B& box, T area, const IouThreshold<T>& threshold) {
    const auto place = ScaleIndex::place(box);
    if (!place.covered) return kept_.suppresses(group, box, area, threshold);
    index_.reach(place.x, place.width, x_);
    index_.reach(place.y, place.height, y_);
    for (int iy = 0; iy < y_.count; ++iy) {
      for (int ix = 0; ix < x_.count; ++ix) {
        const int64_t bucket = index_.bucket(x_.hash[ix], y_.hash[iy]);
        if (kept_.suppresses(bucket, group, box, area, threshold)) return true;
      }
    }
    return kept_.suppresses(others_, group, box, area, threshold);
  }
  DETOPS_HD void add(uint32_t group, const B& box, T area) {
    const auto place = ScaleIndex::place(box);
    int64_t bucket = others_;
    if (place.covered) bucket = index_.bucket(index_.home(place.x, place.width), index_.home(place.y, place.height));
    kept_.add(bucket, group, box, area);
  }

 private:
  ScaleIndex index_;
  int64_t others_;  // the bucket of boxes that the index does not cover
  KeptBuckets<B> kept_;
  ScaleIndex::Cells x_, y_;
};

}  // namespace DETOPS_NAMESPACE
