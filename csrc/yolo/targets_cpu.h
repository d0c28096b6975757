// The CPU parts of targets.h: ranking, and writing the targets.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "yolo/targets.h"

namespace DETOPS_NAMESPACE {

constexpr int32_t kNobody = -1, kContested = -2;  // in the place of a gt

// The best of all anchors offered, sorted.
template <class T>
class TopList {
 public:
  // For at least one.
  TopList(const TopList&) = delete;
  explicit TopList(int64_t capacity)
      : memory_(capacity), entries_("TopList", "entries", memory_.data(), capacity), capacity_(capacity), count_(0) {}

  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  const RankedAnchor<T>& operator[](int64_t i) const { return entries_[i]; }

  void offer(const RankedAnchor<T>& item) {
    int64_t place = count_;
    if (count_ == capacity_) {
      if (!ranks_before(item, entries_[--place])) return;
    } else {
      ++count_;
    }
    for (; place > 0 && ranks_before(item, entries_[place - 1]); --place) entries_[place] = entries_[place - 1];
    entries_[place] = item;
  }

 private:
  std::vector<RankedAnchor<T>> memory_;
  const Counted<RankedAnchor<T>> entries_;
  const int64_t capacity_;
  int64_t count_;
};

// What the passes hand on: for each anchor its gt or kNobody, and its target score.
template <class T>
struct Assignment {
  std::unique_ptr<int32_t[]> owner;
  std::unique_ptr<T[]> score;
};

template <class S, class T>
void write_targets_as(const Assignment<T>& assignment, const GroundTruthView<T>& gts, int64_t anchors,
                      const Tensor& gt_boxes, const TargetTensors& out) {
  const auto box_bytes = static_cast<int64_t>(4 * gt_boxes.element_size());
  const auto* const gt_data = static_cast<const char*>(gt_boxes.const_data_ptr());
  auto* const boxes = static_cast<char*>(out.boxes.mutable_data_ptr());
  auto* const foreground = static_cast<bool*>(out.foreground.mutable_data_ptr());
  int64_t* const labels = out.labels.mutable_data_ptr<int64_t>();
  int64_t* const indices = out.gt_indices.mutable_data_ptr<int64_t>();
  // A label is below the number of classes: only such gts own anchors.
  const Counted<S> scores("write_targets", "scores", out.scores.mutable_data_ptr<S>(), out.scores.numel());
  const int64_t width = out.dense_scores ? gts.classes : 1;
  parallel_ranges(out.labels.numel(), 512, [&](int64_t begin, int64_t end) {
    // Without classes the scores are none, at null.
    if (width > 0) {
      const int64_t count = (end - begin) * width;
      std::memset(static_cast<void*>(scores.part(begin * width, count).data()), 0, count * sizeof(S));
    }
    for (int64_t i = begin; i < end; ++i) {
      const int32_t gt = assignment.owner[i];
      foreground[i] = gt >= 0;
      indices[i] = gt;
      if (gt < 0) {
        labels[i] = -1;
        std::memset(boxes + i * box_bytes, 0, box_bytes);
      } else {
        const int64_t row = i / anchors * gts.count + gt;
        labels[i] = gts.labels[row];
        std::memcpy(boxes + i * box_bytes, gt_data + row * box_bytes, box_bytes);
        scores[i * width + (out.dense_scores ? labels[i] : 0)] = static_cast<S>(assignment.score[i]);
      }
    }
  });
}

template <class T>
void write_targets(const Assignment<T>& assignment, const GroundTruthView<T>& gts, int64_t anchors,
                   const Tensor& gt_boxes, const TargetTensors& out) {
  dispatch_floating(out.scores.scalar_type(), [&](auto tag) {
    write_targets_as<typename decltype(tag)::type>(assignment, gts, anchors, gt_boxes, out);
  });
}

}  // namespace DETOPS_NAMESPACE
