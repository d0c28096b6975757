// Non-maximum suppression: the decisions, written once for both devices.
//
// Of a set of boxes the best-scored is kept, and every box that overlaps it by more than a threshold is dropped; then
// the best of the rest, and so on. Three questions decide the result to the last box: which box comes first
// (rank_key), which box it drops (suppresses), and what separates classes (equal ids, never shifted coordinates).
//
// Ops and shapes. T is float for float16, bfloat16 and float32 boxes, double for float64.
//   nms             boxes [N, 4], scores [N] -> indices [K], best first
//   batched_nms     boxes [N, 4], scores [N], idxs [N] -> indices [K], best first over all ids
//   nms_rotated     boxes [N, 5], scores [N], idxs [N] or none -> indices [K], best first over all ids
//   multiclass_nms  boxes [B, N, 4] or [B, N, C, 4], scores [B, N, C]
//                   -> boxes [B, K, 4], scores, labels, indices [B, K], counts [B]
#pragma once

#include <cmath>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "iou/iou.h"
#include "iou/rotated_iou.h"

namespace DETOPS_NAMESPACE {

// An IoU threshold in the type of the boxes.
template <class T>
struct IouThreshold {
  T exact;  // the largest T not above the double threshold: iou > exact exactly where double(iou) > threshold
  T quick;  // a little below: intersection < quick * union only where iou <= exact, whatever the rounding

  explicit IouThreshold(double threshold) : exact(static_cast<T>(threshold)) {
    if (static_cast<double>(exact) > threshold) exact = std::nextafter(exact, T(-1));
    quick = exact * kSlightlyLess<T>;
  }
};

// So that NaN fails too. The Python layer says the same, as a ValueError.
inline void check_iou_threshold(const char* op, double iou_threshold) {
  if (iou_threshold >= 0) return;
  fail(op, "iou_threshold must be at least 0, got " + std::to_string(iou_threshold));
}

// Whether boxes can suppress each other at all: no IoU exceeds 1, computed or exact. The computed intersection i is
// at most each of the areas a and b, so that fl(fl(a + b) - i) >= i.
inline bool decides(double iou_threshold) { return iou_threshold < 1; }

// The decision: the box that ranks first drops the other. Strict, and false where the IoU is NaN.
template <class T>
DETOPS_HD bool suppresses(const Box<T>& a, T area_a, const Box<T>& b, T area_b, const IouThreshold<T>& threshold) {
  return pair_iou(a, area_a, b, area_b) > threshold.exact;
}

// False only where `suppresses` is false; without the division. May be true where `suppresses` is false.
template <class T>
DETOPS_HD bool may_suppress(const Box<T>& a, T area_a, const Box<T>& b, T area_b, const IouThreshold<T>& threshold) {
  return may_exceed(a, area_a, b, area_b, threshold.quick);
}

// The same for rotated boxes.
template <class T>
DETOPS_HD bool suppresses(const RotatedBox<T>& a, T, const RotatedBox<T>& b, T, const IouThreshold<T>& threshold) {
  return rotated_iou(a, b) > threshold.exact;
}

// The IoU is at most the ratio of the areas. Its computed value is off by far less than the factor here.
template <class T>
DETOPS_HD bool may_suppress(const RotatedBox<T>& a, T area_a, const RotatedBox<T>& b, T area_b,
                            const IouThreshold<T>& threshold) {
  const T bound = T(0.9999) * threshold.exact;
  return circles_meet(a, b) & (min_of(area_a, area_b) >= bound * max_of(area_a, area_b));
}

// False if the IoU with anything is 0 or NaN: such a box stays, and suppresses nothing.
template <class T>
DETOPS_HD bool takes_part(const Box<T>& box, T area) {
  return can_overlap(box, area);
}
template <class T>
DETOPS_HD bool takes_part(const RotatedBox<T>& box, T area) {
  return can_overlap(box, area) & box.is_finite();
}

// Boxes in ascending order of (rank_key of the score, index) are in descending order of score, NaN first, -0 equal to
// 0, ties to the lower index: the order of torch.sort(descending=True, stable=True).
DETOPS_HD uint32_t rank_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = bit_cast<uint32_t>(score == 0.0f ? 0.0f : score);
  const uint32_t sign = 0x80000000u;
  return ~((bits & sign) ? ~bits : (bits | sign));
}
DETOPS_HD uint64_t rank_key(double score) {
  if (score != score) return 0;
  const uint64_t bits = bit_cast<uint64_t>(score == 0.0 ? 0.0 : score);
  const uint64_t sign = 0x8000000000000000u;
  return ~((bits & sign) ? ~bits : (bits | sign));
}
template <class T>
using RankKey = decltype(rank_key(ComputeType<T>()));

// Where multiclass_nms finds its inputs: element offsets per step along each dimension, so that views of a head's
// output are read as they lie. A candidate is a (box, class) pair, numbered index * classes + class.
struct PairLayout {
  int64_t images, rows, classes;
  int64_t score_image, score_row, score_class;
  int64_t box_image, box_row, box_class, box_coordinate;  // box_class is 0 where the classes share a box

  DETOPS_HD int64_t pairs() const { return rows * classes; }
  DETOPS_HD int64_t score_offset(int64_t image, int64_t pair) const {
    return image * score_image + pair / classes * score_row + pair % classes * score_class;
  }
  DETOPS_HD int64_t box_offset(int64_t image, int64_t pair) const {
    return image * box_image + pair / classes * box_row + pair % classes * box_class;
  }
};

// The order in which the scores of an image lie in memory: `outer` runs of `inner` scores.
struct ScanOrder {
  int64_t outer, inner;
  int64_t outer_step, inner_step;     // element offsets
  uint32_t outer_pairs, inner_pairs;  // steps of the pair number
  bool dense;                         // the runs adjoin: score i of the image lies at i * inner_step

  explicit ScanOrder(const PairLayout& layout) {
    const bool along_classes = std::abs(layout.score_class) <= std::abs(layout.score_row) || layout.rows == 1;
    outer = along_classes ? layout.rows : layout.classes;
    inner = along_classes ? layout.classes : layout.rows;
    outer_step = along_classes ? layout.score_row : layout.score_class;
    inner_step = along_classes ? layout.score_class : layout.score_row;
    outer_pairs = static_cast<uint32_t>(along_classes ? layout.classes : 1);
    inner_pairs = static_cast<uint32_t>(along_classes ? 1 : layout.classes);
    dense = outer_step == inner * inner_step;
  }
};

// Reads the box of a pair from boxes of any floating dtype.
template <class T, class Source>
DETOPS_HD Box<T> load_pair_box(const Source* boxes, const PairLayout& layout, int64_t image, int64_t pair) {
  const Source* const first = boxes + layout.box_offset(image, pair);
  const int64_t step = layout.box_coordinate;
  return {static_cast<T>(first[0]), static_cast<T>(first[step]), static_cast<T>(first[2 * step]),
          static_cast<T>(first[3 * step])};
}

// Options of multiclass_nms, checked.
struct MulticlassOptions {
  double iou_threshold;
  double score_threshold;
  int64_t max_detections;
  int64_t max_candidates;  // at most all pairs of an image
  bool class_agnostic;
};

// boxes [B, K, 4], scores [B, K], labels [B, K], indices [B, K], counts [B]
using Detections = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                              torch::stable::Tensor, torch::stable::Tensor>;

// The launches, in nms_cuda.cu and multiclass_nms_cuda.cu. Arguments were checked; `idxs` is int64.
// `boxes` is [N, 4], or [N, 5] of rotated boxes.
torch::stable::Tensor nms_cuda(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                               const torch::stable::Tensor* idxs, double iou_threshold);
void multiclass_nms_cuda(const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                         const PairLayout& layout, const MulticlassOptions& options, const Detections& out);

}  // namespace DETOPS_NAMESPACE
