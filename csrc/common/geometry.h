// Boxes and their areas and intersections.
#pragma once

#include <limits>

#include "common/host_device.h"

namespace DETOPS_NAMESPACE {

// Corners (x1, y1) and (x2, y2) in continuous pixels: the width is x2 - x1, without +1.
template <class T>
struct Box {
  using Scalar = T;
  static constexpr int kCoordinates = 4;
  T x1, y1, x2, y2;
};

// Reads four coordinates of any floating dtype.
template <class T, class Source>
DETOPS_HD Box<T> load_box(const Source* coordinates) {
  return {static_cast<T>(coordinates[0]), static_cast<T>(coordinates[1]), static_cast<T>(coordinates[2]),
          static_cast<T>(coordinates[3])};
}

// The same, for code that handles boxes of several shapes.
template <class T, class Source>
DETOPS_HD void load(const Source* coordinates, Box<T>& box) {
  box = load_box<T>(coordinates);
}

template <class T, class Target>
DETOPS_HD void store_box(const Box<T>& box, Target* coordinates) {
  coordinates[0] = static_cast<Target>(box.x1);
  coordinates[1] = static_cast<Target>(box.y1);
  coordinates[2] = static_cast<Target>(box.x2);
  coordinates[3] = static_cast<Target>(box.y2);
}

// Not clamped: negative for a box that is inverted along one axis, as in torchvision.
template <class T>
DETOPS_HD T box_area(const Box<T>& box) {
  return (box.x2 - box.x1) * (box.y2 - box.y1);
}

template <class T>
DETOPS_HD T intersection_area(const Box<T>& a, const Box<T>& b) {
  const T width = max_of(min_of(a.x2, b.x2) - max_of(a.x1, b.x1), T(0));
  const T height = max_of(min_of(a.y2, b.y2) - max_of(a.y1, b.y1), T(0));
  return width * height;
}

// The smallest box around both.
template <class T>
DETOPS_HD Box<T> box_around(const Box<T>& a, const Box<T>& b) {
  return {min_of(a.x1, b.x1), min_of(a.y1, b.y1), max_of(a.x2, b.x2), max_of(a.y2, b.y2)};
}

// A quotient a / b that rounds to more than t has a >= t * kSlightlyLess * b in rounded arithmetic too: comparing so
// first saves most divisions.
template <class T>
constexpr T kSlightlyLess = T(1) - 8 * std::numeric_limits<T>::epsilon();

// True if the box can have a positive IoU with some box. False for inverted boxes, for boxes with a NaN or infinite
// coordinate and where the area under- or overflows: their IoU with anything is 0 or NaN.
template <class T>
DETOPS_HD bool can_overlap(const Box<T>& box, T area) {
  return box.x2 > box.x1 && area > T(0) && area - area == T(0);
}

}  // namespace DETOPS_NAMESPACE
