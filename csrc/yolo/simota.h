// SimOTA, the assignment of YOLOX (Ge et al., 2021): decisions, written once for both devices.
//
//   assign_simota(pred_logits [B, A, C], pred_objectness [B, A], pred_boxes [B, A, 4], anchor_points [A, 2],
//                 anchor_strides [A], gt_boxes [B, M, 4], gt_labels [B, M], gt_valid [B, M], ...)
//     -> labels, boxes, scores, foreground, gt_indices
//
// For each image:
//   1. An anchor is near a gt if its point is less than center_radius strides from the gt's centre along both axes.
//      Candidates are the anchors that are near some gt.
//   2. cost = class cost + iou_weight * -log(IoU + 1e-8) + 1e6 where the anchor is not near. The class cost is the
//      binary cross-entropy of p = sqrt(sigmoid(logit) sigmoid(objectness)) over all classes, logarithms not below
//      -100, in float64 and rounded once. With S = sum -log(1 - p) of all classes, that of a gt with label c is
//      S + log(1 - p_c) - log(p_c): no [gt, anchor, class] tensor. NaN IoUs count as 0, NaN costs as infinite.
//   3. k = max(1, floor(sum of the topk largest IoUs of the gt with candidates)), summed in float64, largest first.
//      The gt claims its k cheapest candidates, ties to the lower index.
//   4. An anchor that several gts claim goes to the one of lowest cost among all gts, ties to the lower index.
//   5. The score of an anchor is its IoU with its gt.
//
// MMDetection's rule differs in
//   1. Candidates are the anchors that are near some gt or whose point is inside of one.
//   2. p is the product of class score and objectness, which are probabilities already; 1e-7 in place of 1e-8; 1e5 in
//      place of 1e6, where the anchor is not both near and inside.
// A pair that costs no such penalty is called favoured.
#pragma once

#include <cmath>

#include "iou/iou.h"
#include "yolo/points.h"
#include "yolo/targets.h"

namespace DETOPS_NAMESPACE {

enum class SimotaRule : int64_t { kYolox, kMmdet };

struct SimotaOptions {
  double center_radius, iou_weight;
  int64_t topk;
  SimotaRule rule;

  bool mmdet() const { return rule == SimotaRule::kMmdet; }
};

constexpr int64_t kMostSimotaTopk = 32;

// What costs are made of besides probabilities and IoUs.
template <class T>
struct SimotaCosts {
  T iou_weight, iou_eps, penalty;
  T surely_favoured;  // a cost below it is less than all costs with the penalty

  // An IoU is 1 and a few roundings at most, so that its cost is -2e-6 iou_weight at least; no class cost is negative.
  explicit SimotaCosts(const SimotaOptions& options)
      : iou_weight(static_cast<T>(options.iou_weight)),
        iou_eps(static_cast<T>(options.mmdet() ? 1e-7 : 1e-8)),
        penalty(static_cast<T>(options.mmdet() ? 1e5 : 1e6)),
        surely_favoured(static_cast<T>(0.999 * (options.mmdet() ? 1e5 : 1e6) - 2e-6 * options.iou_weight)) {}
};

// A probability whose logarithm is at least -100, as torch's binary cross-entropy clamps it. NaN stays.
DETOPS_HD double clamped_probability(double p) {
  constexpr double kLeast = 3.7200759760208361e-44;  // e^-100
  return max_of(kLeast, p);
}

// From 0 to 1. NaN stays.
DETOPS_HD double as_probability(double p) { return min_of(1.0, max_of(0.0, p)); }

// p of a class; `object` is the probability of an object.
template <bool mmdet>
DETOPS_HD double class_probability(double logit, double object) {
  return mmdet ? as_probability(logit) * object : std::sqrt(math::sigmoid(logit) * object);
}

// S is summed group by group; -log of the product of a group of factors 1 - p costs one logarithm and cannot underflow.
constexpr int kClassGroup = 4;
template <bool mmdet>
DETOPS_HD double absence(double logit, double object) {
  return clamped_probability(1.0 - class_probability<mmdet>(logit, object));
}

// The class cost of a gt with a label of this logit.
DETOPS_HD double class_cost(double all_absent, double logit, double object, bool mmdet) {
  const double p = mmdet ? class_probability<true>(logit, object) : class_probability<false>(logit, object);
  return all_absent + (math::log(clamped_probability(1.0 - p)) - math::log(clamped_probability(p)));
}

// What ranks the anchors of a gt, the higher the better: the cost, negated. NaN is the worst.
template <class T>
DETOPS_HD T negative_cost(double class_cost, T iou, const SimotaCosts<T>& costs, bool favoured) {
  T cost = static_cast<T>(class_cost) + costs.iou_weight * -math::log(iou + costs.iou_eps);
  if (!favoured) cost += costs.penalty;
  return cost == cost ? -cost : -std::numeric_limits<T>::infinity();
}

template <class T>
DETOPS_HD T positive_iou(const IouBox<T>& gt, const IouBox<T>& predicted) {
  return max_of(iou_value<IouKind::kIou>(gt, predicted, T(0)), T(0));  // in this order NaN becomes 0
}

// How many anchors a gt claims.
DETOPS_HD int dynamic_k(double sum_of_ious, int64_t topk) {
  if (!(sum_of_ious >= 2.0)) return 1;
  return static_cast<int>(min_of(sum_of_ious, static_cast<double>(topk)));
}

// What the kernels read, in the compute type T; logits stay as they are.
template <class T>
struct SimotaView {
  const T *boxes, *points, *strides;
  const void *logits, *objectness;
  int64_t logit_image, logit_anchor, logit_class, object_image, object_anchor;  // strides, in elements
  GroundTruthView<T> gts;
  int64_t images, anchors;
  bool mmdet;

  template <class S>
  DETOPS_HD double logit(int64_t image, int64_t anchor, int64_t label) const {
    const int64_t offset = image * logit_image + anchor * logit_anchor + label * logit_class;
    return static_cast<double>(static_cast<const S*>(logits)[offset]);
  }
  template <class S>
  DETOPS_HD double object(int64_t image, int64_t anchor) const {
    const int64_t offset = image * object_image + anchor * object_anchor;
    const auto value = static_cast<double>(static_cast<const S*>(objectness)[offset]);
    return mmdet ? as_probability(value) : math::sigmoid(value);
  }
  DETOPS_HD IouBox<T> gt_box(int64_t row) const { return iou_box<IouKind::kIou>(load_box<T>(gts.boxes + 4 * row)); }
  DETOPS_HD IouBox<T> predicted(int64_t image, int64_t anchor) const {
    return iou_box<IouKind::kIou>(load_box<T>(boxes + 4 * (image * anchors + anchor)));
  }
  DETOPS_HD bool is_near(const Box<T>& gt, int64_t anchor, T radius) const {
    const Box<T> square = square_around((gt.x1 + gt.x2) / 2, (gt.y1 + gt.y2) / 2, radius * strides[anchor]);
    return is_inside(square, points[2 * anchor], points[2 * anchor + 1], T(0));
  }
  DETOPS_HD bool is_within(const Box<T>& gt, int64_t anchor) const {
    return is_inside(gt, points[2 * anchor], points[2 * anchor + 1], T(0));
  }
  DETOPS_HD bool is_candidate(const Box<T>& gt, int64_t anchor, T radius) const {
    return is_near(gt, anchor, radius) || (mmdet && is_within(gt, anchor));
  }
  DETOPS_HD bool is_favoured(const Box<T>& gt, int64_t anchor, T radius) const {
    return is_near(gt, anchor, radius) && (!mmdet || is_within(gt, anchor));
  }
};

// The inputs after checks: dense but for the logits and the objectness.
struct SimotaInputs {
  Tensor logits, objectness;             // of one dtype
  Tensor boxes, points, strides;         // in the compute dtype
  Tensor gt_boxes, gt_labels, gt_valid;  // gt_boxes in the compute dtype
  Tensor gt_boxes_out;                   // in their own dtype, that of the output

  ScalarType dtype() const { return boxes.scalar_type(); }

  template <class T>
  SimotaView<T> view(const SimotaOptions& options) const {
    return {boxes.const_data_ptr<T>(),
            points.const_data_ptr<T>(),
            strides.const_data_ptr<T>(),
            logits.const_data_ptr(),
            objectness.const_data_ptr(),
            logits.stride(0),
            logits.stride(1),
            logits.stride(2),
            objectness.stride(0),
            objectness.stride(1),
            ground_truth_view<T>(gt_boxes, gt_labels, gt_valid, logits.size(2)),
            logits.size(0),
            logits.size(1),
            options.mmdet()};
  }
};

// The launches. Arguments were checked; outputs are allocated and not empty.
void assign_simota_cuda(const SimotaInputs& inputs, const SimotaOptions& options, const TargetTensors& out);

}  // namespace DETOPS_NAMESPACE
