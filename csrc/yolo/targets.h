// What assigners have in common once candidates have their metrics: ranking, and the targets of every anchor.
#pragma once

#include "yolo/ground_truth.h"

namespace DETOPS_NAMESPACE {

// An anchor and its metric for some gt: the higher, the better.
template <class T>
struct RankedAnchor {
  T metric;
  int32_t anchor;
};

template <class T>
DETOPS_HD bool ranks_before(const RankedAnchor<T>& a, const RankedAnchor<T>& b) {
  return a.metric > b.metric || (a.metric == b.metric && a.anchor < b.anchor);
}

// The outputs: labels [B, A] int64, boxes [B, A, 4], scores [B, A, C] or [B, A], foreground [B, A] bool, gt_indices
// [B, A] int64. Background rows are -1, 0, 0, false, -1.
struct TargetTensors {
  Tensor labels, boxes, scores, foreground, gt_indices;
  bool dense_scores;

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {labels, boxes, scores, foreground, gt_indices};
  }
};

// Some products with the number of classes have 32 bits on a GPU, such as the scores of the anchors of a block.
constexpr int64_t kMostClasses = 1 << 24;

// For predictions [B, A, C], named `argument`.
inline TargetTensors allocate_targets(const char* op, const char* argument, const Tensor& predictions,
                                      const Tensor& gt_boxes, bool dense_scores, ScalarType dtype) {
  const int64_t images = predictions.size(0), anchors = predictions.size(1), classes = predictions.size(2);
  if (classes > kMostClasses) {
    fail(op, std::string(argument) + " must have at most " + std::to_string(kMostClasses) + " classes, got " +
                 shape_text(predictions));
  }
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return allocate(op, sizes, dtype, predictions);
  };
  return {make({images, anchors}, ScalarType::Long),
          make({images, anchors, 4}, gt_boxes.scalar_type()),
          dense_scores ? make({images, anchors, classes}, dtype) : make({images, anchors}, dtype),
          make({images, anchors}, ScalarType::Bool),
          make({images, anchors}, ScalarType::Long),
          dense_scores};
}

}  // namespace DETOPS_NAMESPACE
