// Intersection over union of two boxes and its relatives: values and gradients, written once for both devices.
//
// Ops and shapes. Boxes are xyxy; results are float32, and float64 for float64 boxes.
//   box_iou           boxes1 [..., N, 4], boxes2 [..., M, 4] -> [..., N, M], or aligned: both [..., 4] -> [...]
//   box_iou_backward  the gradient of that, with respect to both; an empty tensor for one that is not wanted
//   max_iou           boxes1 [..., N, 4], boxes2 [..., M, 4], valid [..., M] -> values, indices [..., N]
//
// With intersection I, areas A and B, union U = A + B - I, and the smallest box around both of sides ew and eh:
//   iou          I / U                                                       NaN for 0 / 0
//   generalized  iou - (ew eh - U) / (ew eh)                                 Rezatofighi et al., CVPR 2019
//   distance     iou - d / (ew^2 + eh^2 + eps), d the squared distance of the centres       Zheng et al., AAAI 2020
//   complete     distance - alpha v, v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2,        the same paper
//                alpha = v / (1 - iou + v + eps), a constant in the gradient
//   efficient    distance - (w1 - w2)^2 / (ew^2 + eps) - (h1 - h2)^2 / (eh^2 + eps)         Zhang et al., 2021
//   ioa          I / A, the share of the first box
//
// Values are rounded step by step as torchvision's formulas are. Gradients at ties of min and max split equally, and
// the clamp of an intersection side at 0 lets the gradient of 0 itself pass, both as torch's autograd.
#pragma once

#include "common/geometry.h"
#include "common/math.h"

namespace DETOPS_NAMESPACE {

enum class IouKind : int64_t { kIou, kGeneralized, kDistance, kComplete, kEfficient, kIoa };
constexpr int64_t kIouKinds = 6;

// A box and what is computed of it alone: with N x M pairs, N + M times.
template <class T>
struct IouBox {
  Box<T> box;
  T area;
  T angle;  // atan(width / height), for kComplete only
};

template <IouKind kind, class T>
DETOPS_HD IouBox<T> iou_box(const Box<T>& box) {
  T angle = T(0);
  if (kind == IouKind::kComplete) angle = math::atan((box.x2 - box.x1) / (box.y2 - box.y1));
  return {box, box_area(box), angle};
}

// The IoU that decisions are made by, of two boxes and their areas. NaN for 0 / 0.
template <class T>
DETOPS_HD T pair_iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T intersection = intersection_area(a, b);
  return intersection / (area_a + area_b - intersection);
}

// False only where pair_iou is at most some `iou`, or NaN; without the division. `quick` is iou * kSlightlyLess.
template <class T>
DETOPS_HD bool may_exceed(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T quick) {
  const T intersection = intersection_area(a, b);
  return (intersection > T(0)) & (intersection >= quick * (area_a + area_b - intersection));
}

// The decision on a best match, for boxes that are looked at by rising index: of several equal ones the first stays,
// and a NaN is never better.
template <class T>
DETOPS_HD bool is_better_match(T iou, T best) {
  return iou > best;
}

// What a pair has in common: the parts of all formulas.
template <class T>
struct IouParts {
  T width, height;  // of the intersection, before the clamp at 0
  T intersection, union_area, iou;
  T around_width, around_height;  // of the smallest box around both
  T centre_x, centre_y;           // centre of the first less that of the second
};

template <class T>
DETOPS_HD IouParts<T> iou_parts(const IouBox<T>& a, const IouBox<T>& b) {
  IouParts<T> parts;
  parts.width = min_of(a.box.x2, b.box.x2) - max_of(a.box.x1, b.box.x1);
  parts.height = min_of(a.box.y2, b.box.y2) - max_of(a.box.y1, b.box.y1);
  parts.intersection = max_of(T(0), parts.width) * max_of(T(0), parts.height);  // in this order NaN stays
  parts.union_area = a.area + b.area - parts.intersection;
  parts.iou = parts.intersection / parts.union_area;
  parts.around_width = max_of(max_of(a.box.x2, b.box.x2) - min_of(a.box.x1, b.box.x1), T(0));
  parts.around_height = max_of(max_of(a.box.y2, b.box.y2) - min_of(a.box.y1, b.box.y1), T(0));
  parts.centre_x = (a.box.x1 + a.box.x2) / 2 - (b.box.x1 + b.box.x2) / 2;
  parts.centre_y = (a.box.y1 + a.box.y2) / 2 - (b.box.y1 + b.box.y2) / 2;
  return parts;
}

template <class T>
DETOPS_HD T squared(T value) {
  return value * value;
}

// v of the complete IoU, of the angles atan(width / height) of both boxes, and its derivative by the first angle.
template <class T>
DETOPS_HD T aspect_difference(T angle1, T angle2) {
  constexpr double kFourOverPiSquared = 0.40528473456935109;
  return T(kFourOverPiSquared) * squared(angle1 - angle2);
}
template <class T>
constexpr T kAspectSlope = T(0.81056946913870217);  // 8 / pi^2, to be multiplied by the difference of the angles

template <IouKind kind, class T>
DETOPS_HD T iou_value(const IouBox<T>& a, const IouBox<T>& b, T eps) {
  const IouParts<T> parts = iou_parts(a, b);
  if (kind == IouKind::kIou) return parts.iou;
  if (kind == IouKind::kIoa) return parts.intersection / a.area;
  if (kind == IouKind::kGeneralized) {
    const T around = parts.around_width * parts.around_height;
    return parts.iou - (around - parts.union_area) / around;
  }
  const T diagonal = squared(parts.around_width) + squared(parts.around_height) + eps;
  const T distance = parts.iou - (squared(parts.centre_x) + squared(parts.centre_y)) / diagonal;
  if (kind == IouKind::kComplete) {
    const T shape = aspect_difference(a.angle, b.angle);
    return distance - shape / (T(1) - parts.iou + shape + eps) * shape;
  }
  if (kind == IouKind::kEfficient) {
    const T width_difference = (a.box.x2 - a.box.x1) - (b.box.x2 - b.box.x1);
    const T height_difference = (a.box.y2 - a.box.y1) - (b.box.y2 - b.box.y1);
    return distance - squared(width_difference) / (squared(parts.around_width) + eps) -
           squared(height_difference) / (squared(parts.around_height) + eps);
  }
  return distance;
}

// Gradients with respect to the coordinates of both boxes.
template <class T>
struct PairGradient {
  Box<T> a, b;
};

// The share of a gradient that the first argument of max (or, with the arguments swapped, of min) gets.
template <class T>
DETOPS_HD T share_of_greater(T first, T second) {
  return first > second ? T(1) : first == second ? T(0.5) : T(0);
}

// The gradients along one axis, given those with respect to the sides of the intersection, of both boxes and of the
// smallest box around them, and to the distance of the centres. A tie of min or max is split equally.
template <class T>
struct AxisGradient {
  T low1, high1, low2, high2;
};
template <class T>
DETOPS_HD AxisGradient<T> axis_gradient(T low1, T high1, T low2, T high2, T of_width, T of_width1, T of_width2,
                                        T of_around, T of_centre) {
  const T low = share_of_greater(low1, low2), high = share_of_greater(high1, high2), half = of_centre / 2;
  return {half - of_width1 - of_width * low - of_around * (1 - low),
          half + of_width1 + of_width * (1 - high) + of_around * high,
          -half - of_width2 - of_width * (1 - low) - of_around * low,
          -half + of_width2 + of_width * high + of_around * (1 - high)};
}

// grad times the derivative of iou_value.
template <IouKind kind, class T>
DETOPS_HD PairGradient<T> iou_gradient(const IouBox<T>& a, const IouBox<T>& b, T eps, T grad) {
  const IouParts<T> parts = iou_parts(a, b);
  const T width1 = a.box.x2 - a.box.x1, height1 = a.box.y2 - a.box.y1;
  const T width2 = b.box.x2 - b.box.x1, height2 = b.box.y2 - b.box.y1;

  // First the gradients of the parts.
  T of_intersection, of_area1, of_area2;
  if (kind == IouKind::kIoa) {
    of_intersection = grad / a.area;
    of_area1 = -of_intersection * (parts.intersection / a.area);
    of_area2 = T(0);
  } else {
    const T of_union = -grad * parts.iou / parts.union_area;
    of_intersection = grad / parts.union_area - of_union;
    of_area1 = of_area2 = of_union;
  }
  T of_around_width = T(0), of_around_height = T(0);
  T of_centre_x = T(0), of_centre_y = T(0);
  T of_width1 = T(0), of_height1 = T(0), of_width2 = T(0), of_height2 = T(0);
  if (kind == IouKind::kGeneralized) {
    const T around = parts.around_width * parts.around_height;
    const T of_union = grad / around;
    const T of_around = -grad * (parts.union_area / around) / around;
    of_intersection -= of_union;
    of_area1 += of_union;
    of_area2 += of_union;
    of_around_width = of_around * parts.around_height;
    of_around_height = of_around * parts.around_width;
  } else if (kind != IouKind::kIou && kind != IouKind::kIoa) {
    const T diagonal = squared(parts.around_width) + squared(parts.around_height) + eps;
    const T distance = (squared(parts.centre_x) + squared(parts.centre_y)) / diagonal;
    of_centre_x = -grad * 2 * parts.centre_x / diagonal;
    of_centre_y = -grad * 2 * parts.centre_y / diagonal;
    const T of_diagonal = grad * distance / diagonal;
    of_around_width = of_diagonal * 2 * parts.around_width;
    of_around_height = of_diagonal * 2 * parts.around_height;
  }
  if (kind == IouKind::kComplete) {
    const T shape = aspect_difference(a.angle, b.angle);
    const T alpha = shape / (T(1) - parts.iou + shape + eps);
    const T of_angle = -grad * alpha * kAspectSlope<T> * (a.angle - b.angle);
    const T scale1 = of_angle / (squared(width1) + squared(height1));
    const T scale2 = -of_angle / (squared(width2) + squared(height2));
    of_width1 = scale1 * height1;
    of_height1 = -scale1 * width1;
    of_width2 = scale2 * height2;
    of_height2 = -scale2 * width2;
  }
  if (kind == IouKind::kEfficient) {
    const T along_x = squared(parts.around_width) + eps, along_y = squared(parts.around_height) + eps;
    const T x_term = (width1 - width2) / along_x, y_term = (height1 - height2) / along_y;
    of_width1 = -grad * 2 * x_term;
    of_height1 = -grad * 2 * y_term;
    of_width2 = -of_width1;
    of_height2 = -of_height1;
    of_around_width += grad * 2 * squared(x_term) * parts.around_width;
    of_around_height += grad * 2 * squared(y_term) * parts.around_height;
  }

  // Then those of the sides, and of the coordinates.
  const T of_width = parts.width >= T(0) ? of_intersection * max_of(parts.height, T(0)) : T(0);
  const T of_height = parts.height >= T(0) ? of_intersection * max_of(parts.width, T(0)) : T(0);
  of_width1 += of_area1 * height1;
  of_height1 += of_area1 * width1;
  of_width2 += of_area2 * height2;
  of_height2 += of_area2 * width2;
  const AxisGradient<T> x = axis_gradient(a.box.x1, a.box.x2, b.box.x1, b.box.x2, of_width, of_width1, of_width2,
                                          of_around_width, of_centre_x);
  const AxisGradient<T> y = axis_gradient(a.box.y1, a.box.y2, b.box.y1, b.box.y2, of_height, of_height1, of_height2,
                                          of_around_height, of_centre_y);
  return {{x.low1, y.low1, x.high1, y.high1}, {x.low2, y.low2, x.high2, y.high2}};
}

}  // namespace DETOPS_NAMESPACE
