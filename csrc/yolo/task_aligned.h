// Task-aligned assignment (Feng et al., "TOOD", ICCV 2021; YOLOv8 and later): decisions, written once for both devices.
//
//   assign_task_aligned(pred_scores [B, A, C], pred_boxes [B, A, 4], anchor_points [A, 2], gt_labels [B, M],
//                       gt_boxes [B, M, 4], gt_valid [B, M], ...) -> labels, boxes, scores, foreground, gt_indices
//
// For each image:
//   1. An anchor is a candidate of a gt if its point is inside of the gt's box; sides below min_size are first enlarged
//      to it about their middle.
//   2. overlap = max(IoU, 0) of predicted box and gt, metric = score^alpha overlap^beta with the score of the gt's
//      class; NaN and less than 0 count as 0. All other anchors have metric 0.
//   3. A gt claims its topk anchors of highest metric, ties to the lower index, those that are candidates. (Among the
//      zeros, anchors that are no candidates use up places: what a dense matrix with a stable sort gives.)
//   4. An anchor that several gts claim goes to the one of highest overlap among all gts whose candidate it is, ties to
//      the lower index.
//   5. With topk2 < topk, a gt keeps the topk2 of its anchors as in 3; the metric is 0 for anchors that it does not
//   own.
//   6. The score of an anchor is metric * (highest overlap of the gt's anchors) / (their highest metric + eps).
//
// With Candidates::kAll, as TOOD's own code has it:
//   1-3. Every anchor has a metric. A gt claims its topk anchors of highest metric, ties to the lower index, those that
//      have a metric above 0 and whose point is inside by more than 0.01.
//   4. What several gts claim goes to the one of highest overlap among those that claim it, ties to the lower index.
#pragma once

#include <cmath>

#include "iou/iou.h"
#include "yolo/ground_truth.h"
#include "yolo/points.h"
#include "yolo/targets.h"

namespace DETOPS_NAMESPACE {

// x^exponent, rounded once from double; without a logarithm for the exponents that are used most.
struct Power {
  static constexpr int kMostWhole = 16;
  enum Kind { kGeneral, kRoot, kWhole };
  double exponent;
  Kind kind;
  unsigned whole;

  explicit Power(double power) : exponent(power), kind(kGeneral), whole(0) {
    if (power == 0.5) {
      kind = kRoot;
    } else if (power >= 0 && power <= kMostWhole && power == std::floor(power)) {
      kind = kWhole;
      whole = static_cast<unsigned>(power);
    }
  }

  template <class T>
  DETOPS_HD T of(T x) const {
    if (kind == kRoot) return std::sqrt(x);
    if (kind == kGeneral) return static_cast<T>(math::pow(static_cast<double>(x), exponent));
    double square = static_cast<double>(x), value = 1.0;
    for (unsigned rest = whole; rest != 0; rest >>= 1) {
      if (rest & 1) value *= square;
      square *= square;
    }
    return static_cast<T>(value);
  }
};

enum class Candidates : int64_t { kInside, kAll };

// Candidates are further than this from all sides: as in Ultralytics' assigner, as in TOOD's.
constexpr double kInsideMargin = 1e-9, kAllMargin = 0.01;

struct TaskAlignedOptions {
  int64_t topk, topk2;  // at least 1
  Power alpha, beta;
  bool complete;  // complete IoU, or plain
  double min_size, eps;
  Candidates candidates;

  DETOPS_HD bool all() const { return candidates == Candidates::kAll; }
  DETOPS_HD double margin() const { return all() ? kAllMargin : kInsideMargin; }
};

// Of step 2, in the type T.
template <class T>
DETOPS_HD T metric_of(T score, T overlap, const Power& alpha, const Power& beta) {
  return max_of(alpha.of(score) * beta.of(overlap), T(0));  // in this order NaN becomes 0
}

constexpr double kCompleteIouEps = 1e-7;

template <bool complete, class T>
DETOPS_HD T overlap_of(const IouBox<T>& gt, const IouBox<T>& predicted) {
  constexpr IouKind kind = complete ? IouKind::kComplete : IouKind::kIou;
  return max_of(iou_value<kind>(gt, predicted, T(kCompleteIouEps)), T(0));  // in this order NaN becomes 0
}

// The predicted box, whose angle was computed before: an anchor is the candidate of many gts.
template <bool complete, class T>
DETOPS_HD IouBox<T> predicted_box(const T* boxes, const T* angles, int64_t i) {
  const Box<T> box = load_box<T>(boxes + 4 * i);
  return {box, box_area(box), complete ? angles[i] : T(0)};
}

template <class T>
DETOPS_HD void enlarge(T& low, T& high, T min_size) {
  if (!(high - low < min_size)) return;
  const T centre = (low + high) / 2;
  low = centre - min_size / 2;
  high = centre + min_size / 2;
}

// Where the points of a gt's candidates lie.
template <class T>
DETOPS_HD Box<T> candidate_region(Box<T> box, T min_size) {
  enlarge(box.x1, box.x2, min_size);
  enlarge(box.y1, box.y2, min_size);
  return box;
}

// False only where the overlap of the boxes, or of one with any box within `bounds`, is not above 0: boxes overlap by a
// positive width and height, and one with a NaN has no area.
template <class T>
DETOPS_HD bool may_overlap(const Box<T>& box, const Box<T>& bounds) {
  return (box.x1 < bounds.x2) & (bounds.x1 < box.x2) & (box.y1 < bounds.y2) & (bounds.y1 < box.y2);
}

// The target score of step 6.
template <class T>
DETOPS_HD T target_score(T metric, T best_overlap, T best_metric, T eps) {
  return metric * best_overlap / (best_metric + eps);
}

// What the kernels read, in the compute type T; scores stay as they are.
template <class T>
struct TaskAlignedView {
  const T* boxes;   // [B, A, 4]
  const T* angles;  // [B, A], for complete IoU
  const T* points;  // [A, 2]
  const void* scores;
  int64_t score_image, score_anchor, score_class;  // strides, in elements
  GroundTruthView<T> gts;
  int64_t images, anchors;

  template <class S>
  DETOPS_HD T score(int64_t image, int64_t anchor, int64_t label) const {
    const int64_t offset = image * score_image + anchor * score_anchor + label * score_class;
    return static_cast<T>(static_cast<const S*>(scores)[offset]);
  }
};

// The inputs after checks: dense but for the scores.
struct TaskAlignedInputs {
  Tensor scores;
  Tensor boxes, points;                  // in the compute dtype
  Tensor gt_labels, gt_boxes, gt_valid;  // gt_boxes in the compute dtype
  Tensor gt_boxes_out;                   // in their own dtype, that of the output

  ScalarType dtype() const { return boxes.scalar_type(); }

  template <class T>
  TaskAlignedView<T> view(const Tensor* angles) const {
    return {boxes.const_data_ptr<T>(),
            angles != nullptr ? angles->const_data_ptr<T>() : nullptr,
            points.const_data_ptr<T>(),
            scores.const_data_ptr(),
            scores.stride(0),
            scores.stride(1),
            scores.stride(2),
            ground_truth_view<T>(gt_boxes, gt_labels, gt_valid, scores.size(2)),
            scores.size(0),
            scores.size(1)};
  }
};

// The launches. Arguments were checked; outputs are allocated and not empty.
void assign_task_aligned_cuda(const TaskAlignedInputs& inputs, const TaskAlignedOptions& options,
                              const TargetTensors& out);

}  // namespace DETOPS_NAMESPACE
