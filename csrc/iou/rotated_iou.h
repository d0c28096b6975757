// IoU of rotated boxes: centre, width, height, and an angle in degrees, counter-clockwise as one looks at the image.
//
// The second box is moved into the frame of the first, from differences of the centres and of the angles alone, and
// clipped there by the four sides of the first. So huge coordinates cancel before they can round, nothing is sorted and
// no tolerance is needed: identical boxes give exactly 1, boxes far apart exactly 0. (Libraries that intersect edges in
// image coordinates give 0.33 for some identical boxes, and -1.2e7 for others.)
#pragma once

#include <cmath>

#include "common/counted.h"
#include "common/geometry.h"
#include "common/math.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct RotatedBox {
  using Scalar = T;
  static constexpr int kCoordinates = 5;
  T centre_x, centre_y, width, height;
  T angle;     // without full turns where it was more than one, so that differences of angles round little; NaN where
               // the centre or the angle is not finite
  T cos, sin;  // of the angle

  DETOPS_HD bool is_finite() const { return angle == angle; }  // but for the sides
};

// Reads five coordinates of any floating dtype.
template <class T, class Source>
DETOPS_HD RotatedBox<T> load_rotated_box(const Source* coordinates) {
  const T x = static_cast<T>(coordinates[0]), y = static_cast<T>(coordinates[1]);
  const T angle = static_cast<T>(coordinates[4]);
  const auto turn = math::sincos_degrees(angle);
  const T within = angle > T(360) || angle < T(-360) ? std::fmod(angle, T(360)) : angle;
  const T width = static_cast<T>(coordinates[2]), height = static_cast<T>(coordinates[3]);
  return {x, y, width, height, within + (T(0) * x + T(0) * y), turn.cos, turn.sin};
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

// A convex polygon: a rectangle clipped by up to four half planes. It has 4 vertices and gets one more at most by each
// cut (see `clip`): 8.
template <class T>
using Vertices = CountedArray<T, 8>;
template <class T>
struct Polygon {
  Vertices<T> x{"rotated IoU", "vertices"}, y{"rotated IoU", "vertices"};
  int size = 0;
};

// Bit i: whether vertex i has sign * x <= limit.
template <class T>
DETOPS_HD unsigned inside_bits(const Vertices<T>& x, int size, T sign, T limit) {
  unsigned inside = 0;
  for (int i = 0; i < size; ++i) inside |= static_cast<unsigned>(limit - sign * x[i] >= T(0)) << i;
  return inside;
}

// Bit i: bit i + 1 of `bits`, of `size` vertices in a circle.
DETOPS_HD unsigned of_next(unsigned bits, int size) { return bits >> 1 | (bits & 1u) << (size - 1); }

// Of the vertices inside, those around the one furthest inside, up to the first on either side that is not.
template <class T>
DETOPS_HD unsigned deepest_run(const Vertices<T>& x, int size, T sign, unsigned inside) {
  int deepest = -1;
  for (int i = 0; i < size; ++i) {
    if ((inside >> i & 1u) != 0 && (deepest < 0 || sign * x[i] < sign * x[deepest])) deepest = i;
  }
  unsigned run = 1u << deepest;
  for (int i = (deepest + 1) % size; (inside & ~run) >> i & 1u; i = (i + 1) % size) run |= 1u << i;
  for (int i = (deepest + size - 1) % size; (inside & ~run) >> i & 1u; i = (i + size - 1) % size) run |= 1u << i;
  return run;
}

// Makes `out` the part of a polygon with sign * x <= limit; or y, with the coordinates swapped by the caller. False
// where that is all of the polygon: then `out` is left alone.
//
// A convex polygon crosses a line twice at most. Rounding can bend a side that lies on the line into more crossings:
// then what is inside but apart from the vertex furthest inside is so by rounding alone, and counts as outside. So k
// vertices in a row stay and two crossings join them, where another was outside: size + 1 at most, whatever the data.
template <class T>
DETOPS_HD bool clip(const Vertices<T>& x, const Vertices<T>& y, int size, T sign, T limit, Vertices<T>& out_x,
                    Vertices<T>& out_y, int& out_size) {
  unsigned inside = inside_bits(x, size, sign, limit);
  if (inside == (1u << size) - 1) return false;
  out_size = 0;
  if (inside == 0) return true;
  unsigned crossed = inside ^ of_next(inside, size);
  const unsigned after_first = crossed & (crossed - 1);
  if ((after_first & (after_first - 1)) != 0) {
    inside = deepest_run(x, size, sign, inside);
    crossed = inside ^ of_next(inside, size);
  }
  for (int i = 0; i < size; ++i, inside >>= 1, crossed >>= 1) {
    if ((inside & 1u) != 0) {
      out_x[out_size] = x[i];
      out_y[out_size++] = y[i];
    }
    if ((crossed & 1u) != 0) {
      const int next = i + 1 < size ? i + 1 : 0;
      const T depth = limit - sign * x[i], next_depth = limit - sign * x[next];
      out_x[out_size] = sign * limit;
      out_y[out_size++] = y[i] + (y[next] - y[i]) * (depth / (depth - next_depth));
    }
  }
  return true;
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
  Polygon<T> polygons[2];
  Polygon<T>*polygon = &polygons[0], *clipped = &polygons[1];
  polygon->size = 4;
  polygon->x[0] = x - wx - hx, polygon->y[0] = y - wy - hy;
  polygon->x[1] = x + wx - hx, polygon->y[1] = y + wy - hy;
  polygon->x[2] = x + wx + hx, polygon->y[2] = y + wy + hy;
  polygon->x[3] = x - wx + hx, polygon->y[3] = y - wy + hy;
  const T half_width = a.width / 2, half_height = a.height / 2;
  // Most pairs whose circles meet lie on different sides of a line.
  if (inside_bits(polygon->x, 4, T(1), half_width) == 0 || inside_bits(polygon->x, 4, T(-1), half_width) == 0 ||
      inside_bits(polygon->y, 4, T(1), half_height) == 0 || inside_bits(polygon->y, 4, T(-1), half_height) == 0) {
    return T(0);
  }
  for (int side = 0; side < 4; ++side) {
    const T sign = side % 2 == 0 ? T(1) : T(-1);
    const bool cut =
        side < 2
            ? clip(polygon->x, polygon->y, polygon->size, sign, half_width, clipped->x, clipped->y, clipped->size)
            : clip(polygon->y, polygon->x, polygon->size, sign, half_height, clipped->y, clipped->x, clipped->size);
    if (!cut) continue;
    if (clipped->size == 0) return T(0);
    Polygon<T>* const other = polygon;
    polygon = clipped;
    clipped = other;
  }
  T twice = T(0);
  for (int i = 0; i < polygon->size; ++i) {
    const int next = i + 1 < polygon->size ? i + 1 : 0;
    twice += polygon->x[i] * polygon->y[next] - polygon->x[next] * polygon->y[i];
  }
  const T area = twice / 2, most = min_of(box_area(a), box_area(b));
  return area < T(0) ? T(0) : area > most ? most : area;  // NaN stays
}

// 0 / 0 is NaN, and so is the IoU of a box whose centre or angle is not finite. `meet` is what circles_meet says.
template <class T>
DETOPS_HD T rotated_iou(const RotatedBox<T>& a, const RotatedBox<T>& b, bool meet) {
  const T intersection = meet ? intersection_area(a, b) : T(0);
  return intersection / (box_area(a) + box_area(b) - intersection) + T(0) * (a.angle + b.angle);
}
template <class T>
DETOPS_HD T rotated_iou(const RotatedBox<T>& a, const RotatedBox<T>& b) {
  return rotated_iou(a, b, circles_meet(a, b));
}

}  // namespace DETOPS_NAMESPACE
