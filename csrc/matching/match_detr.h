// DETR's matching: the cost of each query for each ground-truth box, written once for both devices, and who solves it.
//
//   match_detr  logits [B, Q, C], boxes [B, Q, 4], gt_boxes [B, M, 4], gt_labels [B, M] -> queries [B, M]
//
//   cost = l1_weight L1 + class_weight class + giou_weight (-GIoU)
// with the L1 distance of (cx, cy, w, h), and for the label's logit x
//   softmax  class = -exp(x - max) / sum(exp(x_k - max))                                       Carion et al., 2020
//   focal    class = alpha (1 - p)^gamma (-log(p + eps)) - (1 - alpha) p^gamma (-log(1 - p + eps)),  p = sigmoid(x),
//            eps = 1e-8                                                                         Zhu et al., 2021
// Two boxes without area have IoU 0, and a smallest box around both without area takes nothing from it.
// The class term is computed in double and rounded once, the rest step by step in the boxes' dtype. The sum of the
// softmax runs over 32 lanes, class k in lane k % 32, then over the lanes in a tree.
#pragma once

#include <optional>

#include "common/math.h"
#include "iou/iou.h"
#include "matching/linear_sum_assignment.h"
#include "matching/match_inputs.h"

namespace DETOPS_NAMESPACE {

constexpr int kSoftmaxLanes = 32;

struct DetrOptions {
  bool focal, xyxy;
  double class_weight, l1_weight, giou_weight;
  double alpha, gamma;
  InvalidCosts invalid;
};

// Of one query over its classes.
struct Softmax {
  double most, sum;
};

DETOPS_HD double softmax_cost(double logit, double most, double sum) { return -(math::exp(logit - most) / sum); }

template <bool square>
DETOPS_HD double focal_cost(double logit, double alpha, double gamma) {
  constexpr double kEps = 1e-8;
  const double present = math::sigmoid(logit), absent = 1.0 - present;
  const double positive = alpha * (square ? absent * absent : math::pow(absent, gamma)) * -math::log(present + kEps);
  const double negative =
      (1.0 - alpha) * (square ? present * present : math::pow(present, gamma)) * -math::log(absent + kEps);
  return positive - negative;
}

// A box in both forms.
template <class T>
struct DetrBox {
  T centre_x, centre_y, width, height;
  IouBox<T> corners;
};

template <class T>
DETOPS_HD DetrBox<T> detr_box(const Box<T>& box, bool xyxy) {
  if (xyxy) {
    return {(box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2, box.x2 - box.x1, box.y2 - box.y1,
            iou_box<IouKind::kGeneralized>(box)};
  }
  const T half_width = box.x2 / 2, half_height = box.y2 / 2;
  const Box<T> corners{box.x1 - half_width, box.y1 - half_height, box.x1 + half_width, box.y1 + half_height};
  return {box.x1, box.y1, box.x2, box.y2, iou_box<IouKind::kGeneralized>(corners)};
}

template <class T>
DETOPS_HD T distance_of(T a, T b) {
  return a < b ? b - a : a - b;
}

// The generalized IoU, but for 0 / 0: where the union is 0 so is the intersection.
template <class T>
DETOPS_HD T detr_giou(const IouBox<T>& query, const IouBox<T>& gt) {
  const IouParts<T> parts = iou_parts(query, gt);
  const T around = parts.around_width * parts.around_height;
  const bool without_area = parts.union_area == T(0);
  const T iou = parts.intersection / (without_area ? T(1) : parts.union_area);
  return iou - (around - parts.union_area) / (without_area & (around == T(0)) ? T(1) : around);
}

template <class T>
DETOPS_HD T detr_cost(const DetrBox<T>& query, const DetrBox<T>& gt, T class_cost, T class_weight, T l1_weight,
                      T giou_weight) {
  const T l1 = distance_of(query.centre_x, gt.centre_x) + distance_of(query.centre_y, gt.centre_y) +
               distance_of(query.width, gt.width) + distance_of(query.height, gt.height);
  return l1_weight * l1 + class_weight * class_cost + giou_weight * -detr_giou(query.corners, gt.corners);
}

// Checked and contiguous; logits and boxes of one dtype, float32 or float64.
struct DetrInputs {
  Tensor logits, boxes, gt_boxes, gt_labels;
  std::optional<Tensor> gt_valid;
  int64_t images, queries, classes, gts;
};

// The launch. Arguments were checked; `out` [B, M] is allocated and not empty. Returns what linear_sum_assignment_cuda
// does.
int64_t match_detr_cuda(const DetrInputs& inputs, const DetrOptions& options, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
