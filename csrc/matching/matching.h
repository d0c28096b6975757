// Matching of anchors to ground-truth boxes by their best IoU: the decisions, written once for both devices.
//
// Ops and shapes.
//   match_max_iou  anchors [A, 4] or [B, A, 4], gt_boxes [B, M, 4] -> indices, ious [B, A]
//   matcher        a given matrix of qualities [M, N] -> indices [N]
//
// An anchor goes to the valid box of its best IoU, the first of several; IoUs that are NaN count as 0. Then
//   index  the box where IoU >= high, -1 where IoU < low or there is no box, -2 between
// An anchor that an ignore region covers, intersection / anchor > ignore_threshold, gets -2, whatever its IoU.
// With low-quality matches each box whose best IoU over the anchors that are not ignored is at least a minimum gets
// those anchors that have just this IoU with it, or the first of them: either they go to their own best box, or to
// this box, where later boxes overrule earlier ones.
//
// IoUs are those of max_iou to the bit, thresholds are rounded to their dtype: as in torchvision, where a tensor meets
// a Python number. No IoU is negative, so a best IoU of 0 is shared by all anchors, and positive ones compare as the
// integers of their bits do.
#pragma once

#include "iou/iou.h"
#include "matching/match_inputs.h"

namespace DETOPS_NAMESPACE {

constexpr int64_t kBelowLow = -1, kBetween = -2;

template <class T>
constexpr T kInfinityOf = std::numeric_limits<T>::infinity();

template <class T>
struct MatchThresholds {
  T high, low;
};

// Rounded to a dtype, as torch compares a tensor of it with a Python number.
template <class S>
MatchThresholds<ComputeType<S>> thresholds_in(double high, double low) {
  return {static_cast<ComputeType<S>>(static_cast<S>(high)), static_cast<ComputeType<S>>(static_cast<S>(low))};
}

template <class T>
DETOPS_HD T number_or_zero(T value) {
  return value == value ? value : T(0);
}

template <class T>
struct MatchOptions {
  MatchThresholds<T> thresholds;
  T low_quality_min_iou;
  T ignore_threshold;
  bool allow_low_quality, this_gt, all_ties;
};

template <class T>
DETOPS_HD T match_iou(const Box<T>& anchor, T anchor_area, const Box<T>& gt, T gt_area) {
  const T iou = pair_iou(anchor, anchor_area, gt, gt_area);
  return iou > T(0) ? iou : T(0);
}

// True if the region can cover some part of a box. It may be infinite.
template <class T>
DETOPS_HD bool can_cover(const Box<T>& region) {
  return region.x2 > region.x1 && region.y2 > region.y1;
}

template <class T>
DETOPS_HD bool is_ignored(const Box<T>& anchor, T anchor_area, const Box<T>& region, T threshold) {
  return intersection_area(anchor, region) / anchor_area > threshold;
}

// `best` is the box of the best IoU, negative where there is none.
template <class T>
DETOPS_HD int64_t match_of(T iou, int best, const MatchThresholds<T>& thresholds) {
  if (best < 0 || iou < thresholds.low) return kBelowLow;
  return iou < thresholds.high ? kBetween : best;
}

// True if the low-quality rule serves a box with this best IoU.
template <class T>
DETOPS_HD bool wants_low_quality(T best_iou, const MatchOptions<T>& options) {
  return best_iou >= options.low_quality_min_iou;
}

// True if the box can have a positive IoU with a box inside `around`: exact, as rounding keeps the order of numbers.
template <class T>
DETOPS_HD bool may_meet(const Box<T>& box, const Box<T>& around) {
  return box.x1 < around.x2 && box.x2 > around.x1 && box.y1 < around.y2 && box.y2 > around.y1;
}

// Encloses nothing, and meets nothing.
template <class T>
DETOPS_HD Box<T> empty_box() {
  return {kInfinityOf<T>, kInfinityOf<T>, -kInfinityOf<T>, -kInfinityOf<T>};
}

// The anchors of an image are dealt into chunks of at least as many anchors as there are boxes. The best IoU of each
// box is kept by chunk, in no more memory than the anchors take: only a chunk that holds the best of all is searched
// for the anchors that have it.
inline int64_t chunk_length(int64_t gts, int64_t step) { return ceil_div(max_of<int64_t>(gts, 1), step) * step; }

// The launches. Arguments were checked, outputs are allocated; there is at least one anchor.
struct MatchNumbers {
  double high_threshold, low_threshold, low_quality_min_iou, ignore_threshold;
  bool allow_low_quality, this_gt, all_ties;

  template <class T>
  MatchOptions<T> rounded() const {
    return {thresholds_in<T>(high_threshold, low_threshold),
            T(low_quality_min_iou),
            T(ignore_threshold),
            allow_low_quality,
            this_gt,
            all_ties};
  }
};
void match_max_iou_cuda(const MatchInputs& inputs, const MatchNumbers& numbers, const Tensor& indices,
                        const Tensor& ious);
void matcher_cuda(const Tensor& quality, double high_threshold, double low_threshold, bool allow_low_quality,
                  const Tensor& indices);

}  // namespace DETOPS_NAMESPACE
