// A bound on the IoU of two rotated boxes that costs a tenth of the IoU and vectorises.
#pragma once

#include <cmath>
#include <limits>

#include "iou/rotated_iou.h"

namespace DETOPS_NAMESPACE {

// A side whose square is neither subnormal, hence imprecise, nor infinite, nor are sums of a few of them.
template <class T>
DETOPS_HD bool has_plain_size(T side) {
  return side > T(1e-15) && side < T(1e15);
}

// Whether bounds of exact arithmetic say something about the computed IoUs of this box.
template <class T>
DETOPS_HD bool is_plain(const RotatedBox<T>& box) {
  return has_plain_size(box.width) & has_plain_size(box.height) & box.is_finite();
}

// Of boxes whose circles meet, the computed area of the intersection, and that of the bound, is off by less than this
// times the squares of both diagonals: sines, cosines, vertices and products are off by a few units in the last place.
template <class T>
constexpr T kRotatedError = 32 * std::numeric_limits<T>::epsilon();

// How far off the areas of intersections with this box can be; infinite where nothing is known.
template <class T>
DETOPS_HD T area_error(const RotatedBox<T>& box) {
  const T error = kRotatedError<T> * (box.width * box.width + box.height * box.height);
  return is_plain(box) ? error : std::numeric_limits<T>::infinity();
}

// The part of [-a / 2, a / 2] that an interval of length b whose middle is `away` from 0 can cover.
template <class T>
DETOPS_HD T common_length(T a, T b, T away) {
  return max_of(min_of(min_of(a, b), (a + b) / 2 - away), T(0));
}

// What two opposite corners of a box lose to a strip whose edges lie `depth` inside them, or to a narrower part of
// that: triangles whose legs are at most half of the sides, so that those of all four corners are disjoint. The sides
// make angles with the strip; `along` and `across` are their lengths times the sine or cosine. `product` is sine x
// cosine.
template <class T>
DETOPS_HD T lost_corners(T depth, T along, T across, T product) {
  const T cut = max_of(min_of(depth, min_of(along, across) / 2), T(0));
  return cut * cut / max_of(product, T(1e-30));
}

// False only where the computed rotated_iou is at most some `iou`, or NaN, for boxes whose circles meet. `quick` is
// iou * kSlightlyLess, the errors are those of area_error.
//
// The intersection fits into the strips of each box along the axes of the other, wherever that lies. And it is largest
// where the centres are one (Brunn and Minkowski), where each box loses four corners to the strips of the other.
template <class T>
DETOPS_HD bool may_exceed(const RotatedBox<T>& a, T error_a, const RotatedBox<T>& b, T error_b, T quick) {
  const T cos = std::fabs(a.cos * b.cos + a.sin * b.sin), sin = std::fabs(a.sin * b.cos - a.cos * b.sin);
  const T aw_cos = a.width * cos, aw_sin = a.width * sin, ah_cos = a.height * cos, ah_sin = a.height * sin;
  const T bw_cos = b.width * cos, bw_sin = b.width * sin, bh_cos = b.height * cos, bh_sin = b.height * sin;
  // The extents of each along the axes of the other.
  const T ax = aw_cos + ah_sin, ay = aw_sin + ah_cos, bx = bw_cos + bh_sin, by = bw_sin + bh_cos;
  const T x = b.centre_x - a.centre_x, y = b.centre_y - a.centre_y;
  const T in_a = common_length(a.width, bx, std::fabs(x * a.cos - y * a.sin)) *
                 common_length(a.height, by, std::fabs(x * a.sin + y * a.cos));
  const T in_b = common_length(b.width, ax, std::fabs(x * b.cos - y * b.sin)) *
                 common_length(b.height, ay, std::fabs(x * b.sin + y * b.cos));
  const T area_a = box_area(a), area_b = box_area(b), product = cos * sin;
  const T left_of_a = area_a - lost_corners((ax - b.width) / 2, aw_cos, ah_sin, product) -
                      lost_corners((ay - b.height) / 2, aw_sin, ah_cos, product);
  const T left_of_b = area_b - lost_corners((bx - a.width) / 2, bw_cos, bh_sin, product) -
                      lost_corners((by - a.height) / 2, bw_sin, bh_cos, product);
  const T most = min_of(min_of(in_a, in_b), min_of(left_of_a, left_of_b)) + (error_a + error_b);
  return !(most < quick * (area_a + area_b - most));
}

}  // namespace DETOPS_NAMESPACE
