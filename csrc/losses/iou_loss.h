// Losses of matching boxes from their IoU and relatives: values and gradients, written once for both devices.
//
// Ops and shapes. Boxes are xyxy, float32 or float64.
//   iou_loss           boxes1, boxes2 [..., 4] -> losses [...] or a scalar
//   iou_loss_backward  its gradient with respect to both; an empty tensor for one that is not wanted
//
// With intersection I, union U, iou = I / (U + eps), the smallest box around both of sides ew and eh, and the squared
// distance d of the centres (dx, dy):
//   generalized  1 - iou + (ew eh - U) / (ew eh + eps)                            Rezatofighi et al., CVPR 2019
//   distance     1 - iou + d / (ew^2 + eh^2 + eps)                                Zheng et al., AAAI 2020
//   complete     distance + alpha v, v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2, alpha = v / (1 - iou + v + eps),
//                a constant in the gradient                                       the same paper
//   efficient    distance + (w1 - w2)^2 / (ew^2 + eps) + (h1 - h2)^2 / (eh^2 + eps)       Zhang et al., 2021
//   scylla       1 - iou + (distance cost + shape cost) / 2, see scylla_costs     Gevorgyan, 2022 (SIoU)
//
// Unlike the measures of iou/iou.h these keep away from 0 / 0 by eps, and have gradient 0 with respect to an
// intersection that is empty, as torchvision's. Two boxes without area (a side of length 0 each) have loss 1 and
// gradient 0. Losses and gradients of finite boxes with x1 <= x2 and y1 <= y2 are finite:
//   - overflow: what lies beyond kMostSide is scaled down, see loss_scale;
//   - division: 0 <= I <= U in rounded arithmetic too, so that all divisors are at least eps > 0;
//   - the aspect ratio of a point is undefined: v is 0; of sides whose squares vanish it has no gradient.
#pragma once

#include <limits>

#include "common/math.h"
#include "iou/iou.h"
#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

enum class IouLossKind : int64_t { kGeneralized, kDistance, kComplete, kEfficient, kScylla };
constexpr int64_t kIouLossKinds = 5;

// Sides up to this, of which the sum of two squares is finite.
template <class T>
constexpr T kMostSide = static_cast<T>(sizeof(T) == sizeof(float) ? 0x1.6ap63 : 0x1.6ap511);

// What all of these losses are made of.
template <class T>
struct LossParts {
  T width1, height1, width2, height2;
  T width, height;  // of the intersection, both 0 where it is empty
  T union_area, iou;
  T around_width, around_height;
  T centre_x, centre_y;  // centre of the first less that of the second

  // True for two boxes without area. False where a coordinate is NaN or infinite: then the centres are not finite.
  DETOPS_HD bool flat() const {
    const T centres = T(0) * (centre_x + centre_y);
    return ((width1 == T(0)) | (height1 == T(0))) & ((width2 == T(0)) | (height2 == T(0))) & (centres == T(0));
  }

  // True where the formulas serve as they stand: some area, and nothing that overflows. Few pairs are not ordinary.
  DETOPS_HD bool ordinary() const {
    const T centres = centre_x + centre_y;
    const bool small = max_of(around_width, around_height) < kMostSide<T>;
    return (union_area > T(0)) & small & (centres == centres);
  }
};

template <class T>
DETOPS_HD LossParts<T> loss_parts(const Box<T>& a, const Box<T>& b, T eps) {
  LossParts<T> parts;
  parts.width1 = a.x2 - a.x1;
  parts.height1 = a.y2 - a.y1;
  parts.width2 = b.x2 - b.x1;
  parts.height2 = b.y2 - b.y1;
  const T width = min_of(a.x2, b.x2) - max_of(a.x1, b.x1);
  const T height = min_of(a.y2, b.y2) - max_of(a.y1, b.y1);
  const bool overlap = (width > T(0)) & (height > T(0));
  parts.width = overlap ? width : T(0);
  parts.height = overlap ? height : T(0);
  const T intersection = parts.width * parts.height;
  parts.union_area = parts.width1 * parts.height1 + parts.width2 * parts.height2 - intersection;
  parts.iou = intersection / (parts.union_area + eps);
  parts.around_width = max_of(a.x2, b.x2) - min_of(a.x1, b.x1);
  parts.around_height = max_of(a.y2, b.y2) - min_of(a.y1, b.y1);
  parts.centre_x = (a.x2 + a.x1) / 2 - (b.x1 + b.x2) / 2;
  parts.centre_y = (a.y2 + a.y1) / 2 - (b.y1 + b.y2) / 2;
  return parts;
}

template <class T>
DETOPS_HD T absolute(T value) {
  return value < T(0) ? -value : value;
}
template <class T>
DETOPS_HD T sign_of(T value) {
  return value > T(0) ? T(1) : value < T(0) ? T(-1) : T(0);
}

// The costs of SIoU, theta = 4. The angle cost sin(2 asin(|dy| / sqrt(d))) is 2 |dx| |dy| / d.
//   distance  sum over both axes of 1 - exp(-(2 - angle cost) rho), rho_x = dx^2 / ew^2
//   shape     sum over both sides of (1 - exp(-omega))^4, omega_w = |w1 - w2| / max(w1, w2)
template <class T>
struct ScyllaCosts {
  T angle, rho_x, rho_y, near_x, near_y;   // near = exp(-(2 - angle) rho)
  T omega_w, omega_h, unlike_w, unlike_h;  // unlike = 1 - exp(-omega)

  DETOPS_HD T distance() const { return (1 - near_x) + (1 - near_y); }
  DETOPS_HD T shape() const { return squared(squared(unlike_w)) + squared(squared(unlike_h)); }
};

template <class T>
DETOPS_HD ScyllaCosts<T> scylla_costs(const LossParts<T>& parts, T eps) {
  ScyllaCosts<T> costs;
  const T squared_distance = squared(parts.centre_x) + squared(parts.centre_y) + eps;
  costs.angle = 2 * absolute(parts.centre_x) * absolute(parts.centre_y) / squared_distance;
  costs.rho_x = squared(parts.centre_x) / (squared(parts.around_width) + eps);
  costs.rho_y = squared(parts.centre_y) / (squared(parts.around_height) + eps);
  costs.near_x = math::exp((costs.angle - 2) * costs.rho_x);
  costs.near_y = math::exp((costs.angle - 2) * costs.rho_y);
  costs.omega_w = absolute(parts.width1 - parts.width2) / (max_of(parts.width1, parts.width2) + eps);
  costs.omega_h = absolute(parts.height1 - parts.height2) / (max_of(parts.height1, parts.height2) + eps);
  costs.unlike_w = 1 - math::exp(-costs.omega_w);
  costs.unlike_h = 1 - math::exp(-costs.omega_h);
  return costs;
}

// What separates the complete loss from the distance loss.
template <class T>
struct AspectTerm {
  T angle_difference, v, alpha;
};
template <class T>
DETOPS_HD AspectTerm<T> aspect_term(const LossParts<T>& parts, T eps) {
  const T angle1 = math::atan(parts.width1 / parts.height1), angle2 = math::atan(parts.width2 / parts.height2);
  const bool points =
      ((parts.width1 == T(0)) & (parts.height1 == T(0))) | ((parts.width2 == T(0)) & (parts.height2 == T(0)));
  const T difference = points ? T(0) : angle1 - angle2;
  const T v = aspect_difference(difference, T(0));
  return {difference, v, v / (1 - parts.iou + v + eps)};
}

// Of an ordinary pair.
template <IouLossKind kind, class T>
DETOPS_HD T loss_of_parts(const LossParts<T>& parts, T eps) {
  if (kind == IouLossKind::kGeneralized) {
    const T around = parts.around_width * parts.around_height;
    return 1 - (parts.iou - (around - parts.union_area) / (around + eps));
  }
  if (kind == IouLossKind::kScylla) {
    const ScyllaCosts<T> costs = scylla_costs(parts, eps);
    return 1 - parts.iou + (costs.distance() + costs.shape()) / 2;
  }
  const T diagonal = squared(parts.around_width) + squared(parts.around_height) + eps;
  const T distance = 1 - parts.iou + (squared(parts.centre_x) + squared(parts.centre_y)) / diagonal;
  if (kind == IouLossKind::kComplete) {
    const AspectTerm<T> aspect = aspect_term(parts, eps);
    return distance + aspect.alpha * aspect.v;
  }
  if (kind == IouLossKind::kEfficient) {
    return distance + squared(parts.width1 - parts.width2) / (squared(parts.around_width) + eps) +
           squared(parts.height1 - parts.height2) / (squared(parts.around_height) + eps);
  }
  return distance;
}

// The unit of length in which a pair is computed, and eps. Where a finite coordinate is beyond kMostSide / 2, so that a
// side may be beyond kMostSide, the unit is a power of two that brings all sides below. Losses do not depend on the
// unit. Next to such boxes eps is negligible; the scaled one is as large as keeps quotients by it finite.
template <class T>
struct LossScale {
  T unit, eps;
};

template <class T>
DETOPS_HD LossScale<T> loss_scale(const Box<T>& a, const Box<T>& b, T eps) {
  constexpr bool single = sizeof(T) == sizeof(float);
  const T high = max_of(max_of(max_of(a.x1, a.x2), max_of(a.y1, a.y2)), max_of(max_of(b.x1, b.x2), max_of(b.y1, b.y2)));
  const T low = min_of(min_of(min_of(a.x1, a.x2), min_of(a.y1, a.y2)), min_of(min_of(b.x1, b.x2), min_of(b.y1, b.y2)));
  const T largest = max_of(high, -low);
  if (!(largest > kMostSide<T> / 2 && largest <= std::numeric_limits<T>::max())) return {T(1), eps};
  return {static_cast<T>(single ? 0x1p-68 : 0x1p-524), static_cast<T>(single ? 0x1p-64 : 0x1p-510)};
}

template <class T>
DETOPS_HD Box<T> scaled(const Box<T>& box, T unit) {
  return {box.x1 * unit, box.y1 * unit, box.x2 * unit, box.y2 * unit};
}

// Of any pair.
template <IouLossKind kind, class T>
DETOPS_HD T iou_loss_value(const Box<T>& a, const Box<T>& b, T eps) {
  const LossParts<T> parts = loss_parts(a, b, eps);
  if (parts.ordinary()) return loss_of_parts<kind>(parts, eps);
  const LossScale<T> scale = loss_scale(a, b, eps);
  const LossParts<T> scaled_parts = loss_parts(scaled(a, scale.unit), scaled(b, scale.unit), scale.eps);
  return scaled_parts.flat() ? T(1) : loss_of_parts<kind>(scaled_parts, scale.eps);
}

// Gradients with respect to the parts.
template <class T>
struct PartGradients {
  T of_intersection, of_union;
  T of_width1 = 0, of_height1 = 0, of_width2 = 0, of_height2 = 0;
  T of_around_width = 0, of_around_height = 0;
  T of_centre_x = 0, of_centre_y = 0;
};

// Adds the gradient of cost / 2, for one side of the boxes in the shape cost of SIoU.
template <class T>
DETOPS_HD void add_shape_gradient(T side1, T side2, T omega, T unlike, T eps, T& of_side1, T& of_side2) {
  const T of_omega = 2 * unlike * squared(unlike) * (1 - unlike) / (max_of(side1, side2) + eps);
  const T of_difference = of_omega * sign_of(side1 - side2);
  const T of_greater = -of_omega * omega, share = share_of_greater(side1, side2);
  of_side1 += of_difference + of_greater * share;
  of_side2 += of_greater * (1 - share) - of_difference;
}

template <class T>
DETOPS_HD void add_scylla_gradient(const LossParts<T>& parts, T eps, PartGradients<T>& gradients) {
  const ScyllaCosts<T> costs = scylla_costs(parts, eps);
  const T squared_distance = squared(parts.centre_x) + squared(parts.centre_y) + eps;
  const T of_angle = -(costs.rho_x * costs.near_x + costs.rho_y * costs.near_y) / 2 / squared_distance;
  const T of_rho_x = (1 - costs.angle / 2) * costs.near_x / (squared(parts.around_width) + eps);
  const T of_rho_y = (1 - costs.angle / 2) * costs.near_y / (squared(parts.around_height) + eps);
  gradients.of_centre_x =
      2 * (of_rho_x * parts.centre_x +
           of_angle * (sign_of(parts.centre_x) * absolute(parts.centre_y) - costs.angle * parts.centre_x));
  gradients.of_centre_y =
      2 * (of_rho_y * parts.centre_y +
           of_angle * (sign_of(parts.centre_y) * absolute(parts.centre_x) - costs.angle * parts.centre_y));
  gradients.of_around_width = -2 * of_rho_x * costs.rho_x * parts.around_width;
  gradients.of_around_height = -2 * of_rho_y * costs.rho_y * parts.around_height;
  add_shape_gradient(parts.width1, parts.width2, costs.omega_w, costs.unlike_w, eps, gradients.of_width1,
                     gradients.of_width2);
  add_shape_gradient(parts.height1, parts.height2, costs.omega_h, costs.unlike_h, eps, gradients.of_height1,
                     gradients.of_height2);
}

template <IouLossKind kind, class T>
DETOPS_HD PartGradients<T> part_gradients(const LossParts<T>& parts, T eps) {
  PartGradients<T> gradients;
  gradients.of_union = parts.iou / (parts.union_area + eps);
  gradients.of_intersection = -1 / (parts.union_area + eps);
  if (kind == IouLossKind::kScylla) {
    add_scylla_gradient(parts, eps, gradients);
    return gradients;
  }
  if (kind == IouLossKind::kGeneralized) {
    const T around = parts.around_width * parts.around_height + eps;
    const T of_around = (parts.union_area + eps) / around / around;
    gradients.of_union -= 1 / around;
    gradients.of_around_width = of_around * parts.around_height;
    gradients.of_around_height = of_around * parts.around_width;
    return gradients;
  }
  const T diagonal = squared(parts.around_width) + squared(parts.around_height) + eps;
  const T distance = (squared(parts.centre_x) + squared(parts.centre_y)) / diagonal;
  gradients.of_centre_x = 2 * parts.centre_x / diagonal;
  gradients.of_centre_y = 2 * parts.centre_y / diagonal;
  gradients.of_around_width = -2 * distance / diagonal * parts.around_width;
  gradients.of_around_height = -2 * distance / diagonal * parts.around_height;
  if (kind == IouLossKind::kComplete) {
    const AspectTerm<T> aspect = aspect_term(parts, eps);
    const T of_angle = aspect.alpha * kAspectSlope<T> * aspect.angle_difference;
    const T squares1 = squared(parts.width1) + squared(parts.height1);
    const T squares2 = squared(parts.width2) + squared(parts.height2);
    const T scale1 = squares1 < std::numeric_limits<T>::min() ? T(0) : of_angle / squares1;
    const T scale2 = squares2 < std::numeric_limits<T>::min() ? T(0) : -of_angle / squares2;
    gradients.of_width1 = scale1 * parts.height1;
    gradients.of_height1 = -scale1 * parts.width1;
    gradients.of_width2 = scale2 * parts.height2;
    gradients.of_height2 = -scale2 * parts.width2;
  }
  if (kind == IouLossKind::kEfficient) {
    const T along_x = squared(parts.around_width) + eps, along_y = squared(parts.around_height) + eps;
    const T x_term = (parts.width1 - parts.width2) / along_x, y_term = (parts.height1 - parts.height2) / along_y;
    gradients.of_width1 = 2 * x_term;
    gradients.of_height1 = 2 * y_term;
    gradients.of_width2 = -2 * x_term;
    gradients.of_height2 = -2 * y_term;
    gradients.of_around_width -= 2 * squared(x_term) * parts.around_width;
    gradients.of_around_height -= 2 * squared(y_term) * parts.around_height;
  }
  return gradients;
}

// grad times the derivative of loss_of_parts, for an ordinary pair.
template <IouLossKind kind, class T>
DETOPS_HD PairGradient<T> gradient_of_parts(const Box<T>& a, const Box<T>& b, const LossParts<T>& parts, T eps,
                                            T grad) {
  const PartGradients<T> of = part_gradients<kind>(parts, eps);
  const T of_overlap = of.of_intersection - of.of_union;  // the union is the areas less the intersection
  const AxisGradient<T> x =
      axis_gradient(a.x1, a.x2, b.x1, b.x2, of_overlap * parts.height, of.of_width1 + of.of_union * parts.height1,
                    of.of_width2 + of.of_union * parts.height2, of.of_around_width, of.of_centre_x);
  const AxisGradient<T> y =
      axis_gradient(a.y1, a.y2, b.y1, b.y2, of_overlap * parts.width, of.of_height1 + of.of_union * parts.width1,
                    of.of_height2 + of.of_union * parts.width2, of.of_around_height, of.of_centre_y);
  return {{grad * x.low1, grad * y.low1, grad * x.high1, grad * y.high1},
          {grad * x.low2, grad * y.low2, grad * x.high2, grad * y.high2}};
}

// grad times the derivative of iou_loss_value, of any pair.
template <IouLossKind kind, class T>
DETOPS_HD PairGradient<T> iou_loss_gradient(const Box<T>& a, const Box<T>& b, T eps, T grad) {
  const LossParts<T> parts = loss_parts(a, b, eps);
  if (parts.ordinary()) return gradient_of_parts<kind>(a, b, parts, eps, grad);
  const LossScale<T> scale = loss_scale(a, b, eps);
  const Box<T> scaled_a = scaled(a, scale.unit), scaled_b = scaled(b, scale.unit);
  const LossParts<T> scaled_parts = loss_parts(scaled_a, scaled_b, scale.eps);
  if (scaled_parts.flat()) return {};
  return gradient_of_parts<kind>(scaled_a, scaled_b, scaled_parts, scale.eps, grad * scale.unit);
}

// What keeps divisors from 0 where the caller's eps is 0, and changes no other sum.
template <class T>
T loss_eps(double eps) {
  return max_of(static_cast<T>(eps), std::numeric_limits<T>::min());
}

// Calls body(TypeTag of float or double, integral constant of the kind).
template <class Body>
void dispatch_iou_loss(ScalarType dtype, IouLossKind kind, Body&& body) {
  dispatch_compute_type(dtype, [&](auto tag) {
    switch (kind) {
      case IouLossKind::kGeneralized:
        return body(tag, std::integral_constant<IouLossKind, IouLossKind::kGeneralized>{});
      case IouLossKind::kDistance: return body(tag, std::integral_constant<IouLossKind, IouLossKind::kDistance>{});
      case IouLossKind::kComplete: return body(tag, std::integral_constant<IouLossKind, IouLossKind::kComplete>{});
      case IouLossKind::kEfficient: return body(tag, std::integral_constant<IouLossKind, IouLossKind::kEfficient>{});
      case IouLossKind::kScylla: return body(tag, std::integral_constant<IouLossKind, IouLossKind::kScylla>{});
    }
  });
}

// The launches. Arguments were checked, outputs are allocated; there is at least one pair for a gradient. One of the
// gradients may be null: not wanted.
void iou_loss_cuda(const Tensor& boxes1, const Tensor& boxes2, IouLossKind kind, double eps, Reduction reduction,
                   const Tensor& out);
void iou_loss_backward_cuda(const Upstream& upstream, const Tensor& boxes1, const Tensor& boxes2, IouLossKind kind,
                            double eps, const Tensor* grad1, const Tensor* grad2);

}  // namespace DETOPS_NAMESPACE
