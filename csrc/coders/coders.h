// Box coders: from boxes to what a head learns and back, values and gradients, written once for both devices.
//
// Ops and shapes. Boxes are xyxy. All tensors of an op have the same leading dimensions: where a caller broadcasts,
// they come expanded, with strides of 0, and are read as they lie.
//   encode_boxes           boxes [..., 4], anchors [..., 4] -> deltas [..., 4]
//   decode_boxes           deltas [..., 4], anchors [..., 4] -> boxes [..., 4]
//   encode_ltrb            boxes [..., 4], points [..., 2], strides [...] or none -> distances [..., 4]
//   decode_ltrb            distances [..., 4], points [..., 2], strides [...] or none -> boxes [..., 4]
//   <op>_backward          grad [..., 4] and the same -> gradients of the first and, if asked for, the second tensor
//
// With centre and sides (cx, cy, w, h) of a box, (ax, ay, aw, ah) of its anchor and weights v:
//   deltas     v0 (cx - ax) / aw, v1 (cy - ay) / ah, v2 log(w / aw), v3 log(h / ah)         Girshick et al., 2014
//   distances  (x - x1) / s, (y - y1) / s, (x2 - x) / s, (y2 - y) / s                        Tian et al., FCOS, 2019
// decode_boxes takes what goes into exp as at most `clip`; encode_ltrb clamps distances to [0, max_distance].
//
// Values are rounded step by step as torchvision's formulas are, and are the same bits on every device; so are exp and
// log, which for float32 are within one unit in the last place.
//
// Types. The first tensor has the dtype of the second, which is that of the result, or is a half where the second is
// float32, as boxes often are.
#pragma once

#include <type_traits>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/geometry.h"
#include "common/logistic.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct Point {
  using Scalar = T;
  static constexpr int kCoordinates = 2;
  T x, y;
};

// Reads and writes rows of any floating dtype; `load` of boxes is in geometry.h.
template <class T, class Source>
DETOPS_HD void load(const Source* row, Point<T>& point) {
  point = {static_cast<T>(row[0]), static_cast<T>(row[1])};
}
template <class T, class Target>
DETOPS_HD void store(const Point<T>& point, Target* row) {
  row[0] = static_cast<Target>(point.x);
  row[1] = static_cast<Target>(point.y);
}
template <class T, class Target>
DETOPS_HD void store(const Box<T>& box, Target* row) {
  store_box(box, row);
}

// How a row of the result finds its row in the second tensor, which may be repeated as a whole and row by row.
struct RowMap {
  int64_t repeats;  // of each row
  int64_t rows;     // of the second tensor, before it begins anew

  template <class Index>
  DETOPS_HD Index row_of(Index i) const {
    return i / static_cast<Index>(repeats) % static_cast<Index>(rows);
  }
};

// Centre and sides.
template <class T>
struct CentreSides {
  T cx, cy, width, height;
};
template <class T>
DETOPS_HD CentreSides<T> centre_sides(const Box<T>& box) {
  const T width = box.x2 - box.x1, height = box.y2 - box.y1;
  return {box.x1 + T(0.5) * width, box.y1 + T(0.5) * height, width, height};
}

// The gradient of the corners, given those of the centre and the sides.
template <class T>
DETOPS_HD Box<T> corner_gradient(const CentreSides<T>& of) {
  const T half_x = T(0.5) * of.cx, half_y = T(0.5) * of.cy;
  return {half_x - of.width, half_y - of.height, half_x + of.width, half_y + of.height};
}

// ---- The coders. `forward` makes a row of the result, `backward` the gradients of the first and the second row. A Box
// is used for any four numbers that belong to a box.

template <class T>
struct EncodeBoxes {
  using Second = Box<T>;
  T weight_x, weight_y, weight_w, weight_h;

  DETOPS_HD Box<T> forward(const Box<T>& box, const Box<T>& anchor, T) const {
    const CentreSides<T> b = centre_sides(box), a = centre_sides(anchor);
    return {weight_x * (b.cx - a.cx) / a.width, weight_y * (b.cy - a.cy) / a.height,
            weight_w * fast_log(b.width / a.width), weight_h * fast_log(b.height / a.height)};
  }

  DETOPS_HD void backward(const Box<T>& grad, const Box<T>& box, const Box<T>& anchor, T, Box<T>& of_box,
                          Box<T>& of_anchor) const {
    const CentreSides<T> b = centre_sides(box), a = centre_sides(anchor);
    const T along_x = grad.x1 * weight_x / a.width, along_y = grad.y1 * weight_y / a.height;
    const T of_width = grad.x2 * weight_w, of_height = grad.y2 * weight_h;
    of_box = corner_gradient<T>({along_x, along_y, of_width / b.width, of_height / b.height});
    of_anchor = corner_gradient<T>({-along_x, -along_y, -(along_x * (b.cx - a.cx) + of_width) / a.width,
                                    -(along_y * (b.cy - a.cy) + of_height) / a.height});
  }
};

// NaN stays NaN, as in torch.clamp.
template <class T>
DETOPS_HD T at_most(T value, T limit) {
  return value > limit ? limit : value;
}

template <class T>
struct DecodeBoxes {
  using Second = Box<T>;
  T weight_x, weight_y, weight_w, weight_h, clip;

  DETOPS_HD Box<T> forward(const Box<T>& deltas, const Box<T>& anchor, T) const {
    const CentreSides<T> a = centre_sides(anchor);
    const T cx = deltas.x1 / weight_x * a.width + a.cx, cy = deltas.y1 / weight_y * a.height + a.cy;
    const T half_w = T(0.5) * (fast_exp(at_most(deltas.x2 / weight_w, clip)) * a.width);
    const T half_h = T(0.5) * (fast_exp(at_most(deltas.y2 / weight_h, clip)) * a.height);
    return {cx - half_w, cy - half_h, cx + half_w, cy + half_h};
  }

  // Beyond the clip there is no gradient; on it there is.
  DETOPS_HD void backward(const Box<T>& grad, const Box<T>& deltas, const Box<T>& anchor, T, Box<T>& of_deltas,
                          Box<T>& of_anchor) const {
    const CentreSides<T> a = centre_sides(anchor);
    const T dw = deltas.x2 / weight_w, dh = deltas.y2 / weight_h;
    const T growth_w = fast_exp(at_most(dw, clip)), growth_h = fast_exp(at_most(dh, clip));
    const T of_cx = grad.x1 + grad.x2, of_cy = grad.y1 + grad.y2;
    const T of_growth_w = T(0.5) * (grad.x2 - grad.x1) * growth_w,
            of_growth_h = T(0.5) * (grad.y2 - grad.y1) * growth_h;
    of_deltas = {of_cx * a.width / weight_x, of_cy * a.height / weight_y,
                 dw <= clip ? of_growth_w * a.width / weight_w : T(0),
                 dh <= clip ? of_growth_h * a.height / weight_h : T(0)};
    of_anchor = corner_gradient<T>(
        {of_cx, of_cy, of_cx * (deltas.x1 / weight_x) + of_growth_w, of_cy * (deltas.y1 / weight_y) + of_growth_h});
  }
};

template <class T>
struct EncodeLtrb {
  using Second = Point<T>;
  bool clamped;
  T max_distance;

  DETOPS_HD T clamp(T distance) const {
    const T positive = distance < T(0) ? T(0) : distance;
    return clamped ? at_most(positive, max_distance) : distance;
  }
  DETOPS_HD Box<T> forward(const Box<T>& box, const Point<T>& point, T stride) const {
    return {clamp((point.x - box.x1) / stride), clamp((point.y - box.y1) / stride), clamp((box.x2 - point.x) / stride),
            clamp((box.y2 - point.y) / stride)};
  }

  DETOPS_HD T passed(T grad, T distance) const {
    return !clamped || (distance >= T(0) && distance <= max_distance) ? grad : T(0);
  }
  DETOPS_HD void backward(const Box<T>& grad, const Box<T>& box, const Point<T>& point, T stride, Box<T>& of_box,
                          Point<T>& of_point) const {
    const T left = passed(grad.x1, (point.x - box.x1) / stride) / stride;
    const T top = passed(grad.y1, (point.y - box.y1) / stride) / stride;
    const T right = passed(grad.x2, (box.x2 - point.x) / stride) / stride;
    const T bottom = passed(grad.y2, (box.y2 - point.y) / stride) / stride;
    of_box = {-left, -top, right, bottom};
    of_point = {left - right, top - bottom};
  }
};

template <class T>
struct DecodeLtrb {
  using Second = Point<T>;

  DETOPS_HD Box<T> forward(const Box<T>& distances, const Point<T>& point, T stride) const {
    return {point.x - distances.x1 * stride, point.y - distances.y1 * stride, point.x + distances.x2 * stride,
            point.y + distances.y2 * stride};
  }
  DETOPS_HD void backward(const Box<T>& grad, const Box<T>&, const Point<T>&, T stride, Box<T>& of_distances,
                          Point<T>& of_point) const {
    of_distances = {-grad.x1 * stride, -grad.y1 * stride, grad.x2 * stride, grad.y2 * stride};
    of_point = {grad.x1 + grad.x2, grad.y1 + grad.y2};
  }
};

enum class CoderKind { kEncodeBoxes, kDecodeBoxes, kEncodeLtrb, kDecodeLtrb };

// An op and its options.
struct CoderCall {
  const char* op;
  CoderKind kind;
  double weights[4];    // of the box coders
  double clip;          // of decode_boxes
  bool clamped;         // of encode_ltrb
  double max_distance;  // of encode_ltrb, if clamped
};

// The tensors of a call, checked: `first` and `grad` contiguous, `second` and `strides` contiguous or to be read
// through `map`. `strides` may be undefined.
struct CoderRows {
  Tensor first, second, strides;
  RowMap map;
  int64_t count;
};

// Calls body(coder).
template <class T, class Body>
void dispatch_coder(const CoderCall& call, Body&& body) {
  const T x = T(call.weights[0]), y = T(call.weights[1]), w = T(call.weights[2]), h = T(call.weights[3]);
  switch (call.kind) {
    case CoderKind::kEncodeBoxes: return body(EncodeBoxes<T>{x, y, w, h});
    case CoderKind::kDecodeBoxes: return body(DecodeBoxes<T>{x, y, w, h, T(call.clip)});
    case CoderKind::kEncodeLtrb: return body(EncodeLtrb<T>{call.clamped, T(call.max_distance)});
    case CoderKind::kDecodeLtrb: return body(DecodeLtrb<T>{});
  }
}

// Calls body(TypeTag of the first tensor's type, TypeTag of the second's).
template <class Body>
void dispatch_row_types(ScalarType first, ScalarType second, Body&& body) {
  dispatch_floating(first, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (first == second) return body(tag, tag);
    if constexpr (!std::is_same_v<S, double>) body(tag, TypeTag<float>{});
  });
}

// The launches. Arguments were checked, outputs are allocated, there is at least one row. `grad_second` may be null.
void code_rows_cuda(const CoderCall& call, const CoderRows& rows, const Tensor& out);
void code_rows_backward_cuda(const CoderCall& call, const CoderRows& rows, const Tensor& grad, const Tensor& grad_first,
                             const Tensor* grad_second);

}  // namespace DETOPS_NAMESPACE
