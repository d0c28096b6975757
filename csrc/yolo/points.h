// Anchor points, and which of them lie inside a box, found without looking at all of them.
//
// Points come in runs that lie close to each other, as the rows of a feature map do. A box is compared with the bounds
// of each kPointBlock points first, and with the points of those blocks only that may have one inside. That is exact
// for points in any order.
#pragma once

#include "common/geometry.h"

namespace DETOPS_NAMESPACE {

constexpr int kPointBlock = 32;

// Inside means further than `margin` from all sides. NaN is inside of nothing, and nothing is inside of NaN.
template <class T>
DETOPS_HD bool is_inside(const Box<T>& box, T x, T y, T margin) {
  return (x - box.x1 > margin) & (y - box.y1 > margin) & (box.x2 - x > margin) & (box.y2 - y > margin);
}

// False if no point within the bounds can be inside of the box: differences are monotonous, rounded ones too.
template <class T>
DETOPS_HD bool may_hold(const Box<T>& box, const Box<T>& bounds, T margin) {
  return (bounds.x2 - box.x1 > margin) & (bounds.y2 - box.y1 > margin) & (box.x2 - bounds.x1 > margin) &
         (box.y2 - bounds.y1 > margin);
}

template <class T>
DETOPS_HD Box<T> square_around(T x, T y, T radius) {
  return {x - radius, y - radius, x + radius, y + radius};
}

// Bounds that hold nothing, to start from.
template <class T>
DETOPS_HD Box<T> no_bounds() {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  return {infinity, infinity, -infinity, -infinity};
}

// Points with a NaN, which are inside of nothing, do not count.
template <class T>
DETOPS_HD void extend(Box<T>& bounds, T x, T y) {
  bounds.x1 = min_of(x, bounds.x1);
  bounds.y1 = min_of(y, bounds.y1);
  bounds.x2 = max_of(x, bounds.x2);
  bounds.y2 = max_of(y, bounds.y2);
}

}  // namespace DETOPS_NAMESPACE
