// IoU of rotated boxes: centre, width, height, and an angle in degrees, counter-clockwise as one looks at the image.
//
// The second box is moved into the frame of the first, from differences of the centres and of the angles alone, and
// clipped there by the four sides of the first. So huge coordinates cancel before they can round, nothing is sorted and
// no tolerance is needed: identical boxes give exactly 1, boxes far apart exactly 0. (Libraries that intersect edges in
// image coordinates give 0.33 for some identical boxes, and -1.2e7 for others.)
#pragma once

#include "common/geometry.h"
#include "common/math.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct RotatedBox {
  using Scalar = T;
  static constexpr int kCoordinates = 5;
  T centre_x, centre_y, width, height, angle;
  T cos, sin;  // of the angle
};

// Reads five coordinates of any floating dtype.
template <class T, class Source>
DETOPS_HD RotatedBox<T> load_rotated_box(const Source* coordinates) {
  const T angle = static_cast<T>(coordinates[4]);
  const auto turn = math::sincos_degrees(angle);
  return {static_cast<T>(coordinates[0]),
          static_cast<T>(coordinates[1]),
          static_cast<T>(coordinates[2]),
          static_cast<T>(coordinates[3]),
          angle,
          turn.cos,
          turn.sin};
}

template <class T, class Source>
DETOPS_HD void load(const Source* coordinates, RotatedBox<T>& box) {
  box = load_rotated_box<T>(coordinates);
}

template <class T>
DETOPS_HD T box_area(const RotatedBox<T>& box) {
  return box.width * box.height;
}

// As for upright boxes: false if the IoU with anything is 0 or NaN.
template <class T>
DETOPS_HD bool can_overlap(const RotatedBox<T>& box, T area) {
  return box.width > T(0) && area > T(0) && area - area == T(0);
}

// True if the boxes can meet: the circles around them do. False where a coordinate is NaN.
template <class T>
DETOPS_HD bool circles_meet(const RotatedBox<T>& a, const RotatedBox<T>& b) {
  const T x = b.centre_x - a.centre_x, y = b.centre_y - a.centre_y;
  // (p + q)^2 <= 2 (p^2 + q^2): no square root. For boxes of one size the two are equal.
  const T diameters = a.width * a.width + a.height * a.height + (b.width * b.width + b.height * b.height);
  return x * x + y * y <= diameters / 2;
}

// A convex polygon: a rectangle clipped by up to four half planes.
template <class T>
struct Polygon {
  T x[8], y[8];
  int size;
};

// The part of a polygon with sign * x <= limit; or y, with the coordinates swapped by the caller.
template <class T>
DETOPS_HD void clip(const T* x, const T* y, int size, T sign, T limit, T* out_x, T* out_y, int& out_size) {
  out_size = 0;
  for (int i = 0; i < size; ++i) {
    const int next = i + 1 < size ? i + 1 : 0;
    const T inside = limit - sign * x[i], next_inside = limit - sign * x[next];
    if (inside >= T(0)) {
      out_x[out_size] = x[i];
      out_y[out_size++] = y[i];
    }
    if ((inside >= T(0)) != (next_inside >= T(0))) {
      out_x[out_size] = sign * limit;
      out_y[out_size++] = y[i] + (y[next] - y[i]) * (inside / (inside - next_inside));
    }
  }
}

template <class T>
DETOPS_HD T intersection_area(const RotatedBox<T>& a, const RotatedBox<T>& b) {
  if (!(a.width > T(0) && a.height > T(0) && b.width > T(0) && b.height > T(0))) return T(0);
  // The centre and the half sides of b in the frame of a, whose x axis points along its width.
  const T away_x = b.centre_x - a.centre_x, away_y = b.centre_y - a.centre_y;
  const T x = away_x * a.cos - away_y * a.sin, y = away_x * a.sin + away_y * a.cos;
  // In double, where the difference of large angles loses nothing; the sine is computed in double anyway.
  const auto exact = math::sincos_degrees(static_cast<double>(b.angle) - static_cast<double>(a.angle));
  const math::SinCos<T> turn{static_cast<T>(exact.sin), static_cast<T>(exact.cos)};
  const T wx = b.width / 2 * turn.cos, wy = -(b.width / 2 * turn.sin);
  const T hx = b.height / 2 * turn.sin, hy = b.height / 2 * turn.cos;
  Polygon<T> polygon{
      {x - wx - hx, x + wx - hx, x + wx + hx, x - wx + hx}, {y - wy - hy, y + wy - hy, y + wy + hy, y - wy + hy}, 4};
  Polygon<T> clipped;
  const T half_width = a.width / 2, half_height = a.height / 2;
  clip(polygon.x, polygon.y, polygon.size, T(1), half_width, clipped.x, clipped.y, clipped.size);
  clip(clipped.x, clipped.y, clipped.size, T(-1), half_width, polygon.x, polygon.y, polygon.size);
  clip(polygon.y, polygon.x, polygon.size, T(1), half_height, clipped.y, clipped.x, clipped.size);
  clip(clipped.y, clipped.x, clipped.size, T(-1), half_height, polygon.y, polygon.x, polygon.size);
  T twice = T(0);
  for (int i = 0; i < polygon.size; ++i) {
    const int next = i + 1 < polygon.size ? i + 1 : 0;
    twice += polygon.x[i] * polygon.y[next] - polygon.x[next] * polygon.y[i];
  }
  const T area = twice / 2, most = min_of(box_area(a), box_area(b));
  return area < T(0) ? T(0) : area > most ? most : area;  // NaN stays
}

// 0 / 0 is NaN, and so is the IoU of a box with a NaN coordinate. `meet` is what circles_meet says.
template <class T>
DETOPS_HD T rotated_iou(const RotatedBox<T>& a, const RotatedBox<T>& b, bool meet) {
  const T differences = (b.centre_x - a.centre_x) + (b.centre_y - a.centre_y) + (b.angle - a.angle);
  const T intersection = meet ? intersection_area(a, b) : T(0);
  return intersection / (box_area(a) + box_area(b) - intersection) + T(0) * differences;
}
template <class T>
DETOPS_HD T rotated_iou(const RotatedBox<T>& a, const RotatedBox<T>& b) {
  return rotated_iou(a, b, circles_meet(a, b));
}

}  // namespace DETOPS_NAMESPACE
