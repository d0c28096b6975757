// points.h for the CPU: points coordinate by coordinate, and the search of those inside a box.
#pragma once

#include <memory>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "yolo/points.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct PointColumns {
  const T *x, *y;                        // padded to whole blocks with NaN
  const T *left, *top, *right, *bottom;  // of each block, padded to a multiple of kPointBlock with bounds of nothing
  int64_t blocks;                        // with the padding
};

// Writes the points inside of the box to `found`, ascending, and returns how many they are. `found` has room for one
// more than there are points: each lane writes, those that are not inside to the place of the next one. The padding is
// NaN, which is inside of nothing.
template <class T>
DETOPS_CLONES int64_t find_inside(const PointColumns<T>& points, const Box<T>& box, T margin, Counted<int32_t> found) {
  int64_t count = 0;
  bool hit[kPointBlock], inside[kPointBlock];
  for (int64_t first = 0; first < points.blocks; first += kPointBlock) {
    bool any = false;
    for (int i = 0; i < kPointBlock; ++i) {
      const int64_t block = first + i;
      hit[i] = may_hold(box, Box<T>{points.left[block], points.top[block], points.right[block], points.bottom[block]},
                        margin);
      any |= hit[i];
    }
    if (!any) continue;
    for (int i = 0; i < kPointBlock; ++i) {
      if (!hit[i]) continue;
      const int64_t begin = (first + i) * kPointBlock;
      for (int lane = 0; lane < kPointBlock; ++lane) {
        inside[lane] = is_inside(box, points.x[begin + lane], points.y[begin + lane], margin);
      }
      for (int lane = 0; lane < kPointBlock; ++lane) {
        found[count] = static_cast<int32_t>(begin + lane);
        count += inside[lane];
      }
    }
  }
  return count;
}

// The same for the points whose distance from (x, y), along both axes, is less than radius times their own stride.
// `reach` is the largest stride of each block.
template <class T>
DETOPS_CLONES int64_t find_near(const PointColumns<T>& points, const T* strides, const T* reach, T x, T y, T radius,
                                Counted<int32_t> found) {
  int64_t count = 0;
  bool hit[kPointBlock], near[kPointBlock];
  for (int64_t first = 0; first < points.blocks; first += kPointBlock) {
    bool any = false;
    for (int i = 0; i < kPointBlock; ++i) {
      const int64_t block = first + i;
      hit[i] = may_hold(square_around(x, y, radius * reach[block]),
                        Box<T>{points.left[block], points.top[block], points.right[block], points.bottom[block]}, T(0));
      any |= hit[i];
    }
    if (!any) continue;
    for (int i = 0; i < kPointBlock; ++i) {
      if (!hit[i]) continue;
      const int64_t begin = (first + i) * kPointBlock;
      for (int lane = 0; lane < kPointBlock; ++lane) {
        near[lane] = is_inside(square_around(x, y, radius * strides[begin + lane]), points.x[begin + lane],
                               points.y[begin + lane], T(0));
      }
      for (int lane = 0; lane < kPointBlock; ++lane) {
        found[count] = static_cast<int32_t>(begin + lane);
        count += near[lane];
      }
    }
  }
  return count;
}

template <class T>
class PointIndex {
 public:
  PointIndex(const T* points, int64_t count) : blocks_(ceil_div<int64_t>(count, kPointBlock)) {
    padded_ = ceil_div<int64_t>(blocks_, kPointBlock) * kPointBlock;
    coordinates_.reset(new T[2 * blocks_ * kPointBlock]);
    bounds_.reset(new T[4 * padded_]);
    const int64_t row = blocks_ * kPointBlock;
    for (int64_t block = 0; block < padded_; ++block) {
      Box<T> bounds = no_bounds<T>();
      for (int64_t i = block * kPointBlock; block < blocks_ && i < (block + 1) * kPointBlock; ++i) {
        const bool real = i < count;
        coordinates_[i] = real ? points[2 * i] : std::numeric_limits<T>::quiet_NaN();
        coordinates_[row + i] = real ? points[2 * i + 1] : std::numeric_limits<T>::quiet_NaN();
        extend(bounds, coordinates_[i], coordinates_[row + i]);
      }
      bounds_[block] = bounds.x1;
      bounds_[padded_ + block] = bounds.y1;
      bounds_[2 * padded_ + block] = bounds.x2;
      bounds_[3 * padded_ + block] = bounds.y2;
    }
  }

  PointColumns<T> columns() const {
    const T *x = coordinates_.get(), *bounds = bounds_.get();
    return {x,      x + blocks_ * kPointBlock, bounds, bounds + padded_, bounds + 2 * padded_, bounds + 3 * padded_,
            padded_};
  }

 private:
  int64_t blocks_, padded_;
  std::unique_ptr<T[]> coordinates_, bounds_;
};

}  // namespace DETOPS_NAMESPACE
