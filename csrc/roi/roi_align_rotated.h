// roi_align_rotated: RoIs [batch index, cx, cy, w, h, r], r in degrees, counter-clockwise as one looks at the image.
//
// The samples form the grid of an upright RoI around the origin, turned by r and moved to the centre:
//   y = v cos(r) - u sin(r) + cy,  x = v sin(r) + u cos(r) + cx,  for a sample at (v, u).
// Pixel centres are at half-integers. Samples and weights follow the rules of roi.h.
#pragma once

#include "common/math.h"
#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct RotatedRoi {
  int image;         // -1: there is none
  RoiAxis<T> v, u;   // around the origin; `size` is not used
  T y, x, cos, sin;  // of the centre
  int height, width;

  // Positions of the samples of bin (p, q) that may lie on the map: v in the first range, u in the second.
  DETOPS_HD IndexRange rows(int p) const { return near_map(v, p, cos, sin); }
  DETOPS_HD IndexRange columns(int q) const { return near_map(u, q, -sin, cos); }

  // Calls body(y, x) with the samples of bin (p, q) that lie on the map, row by row.
  template <class Body>
  DETOPS_HD void for_each_sample(int p, int q, const Body& body) const {
    const IndexRange rows_of_bin = rows(p), columns_of_bin = columns(q);
    for (int64_t i = rows_of_bin.begin; i < rows_of_bin.end; ++i) {
      const T along_v = v.position(p, i);
      for (int64_t j = columns_of_bin.begin; j < columns_of_bin.end; ++j) {
        const T along_u = u.position(q, j);
        const T at_y = along_v * cos - along_u * sin + y;
        const T at_x = along_v * sin + along_u * cos + x;
        if (!is_on_map(at_y, height) || !is_on_map(at_x, width)) continue;
        body(axis_sample(at_y, height), axis_sample(at_x, width));
      }
    }
  }

  // Each sample's share of its bin. Their number may exceed any float, their shares do not vanish early.
  DETOPS_HD T weight(T value) const { return value / v.samples / u.samples; }

 private:
  // Along an axis a point of the map lies at (y - centre) * a + (x - centre) * b. These are the samples between the
  // least and the largest of that over the map, with a margin for rounding.
  DETOPS_HD IndexRange near_map(const RoiAxis<T>& axis, int p, T a, T b) const {
    if (image < 0 || height <= 0 || width <= 0) return {0, 0};
    const T top = (T(-1) - y) * a, bottom = (static_cast<T>(height) - y) * a;
    const T left = (T(-1) - x) * b, right = (static_cast<T>(width) - x) * b;
    constexpr T rounding = T(16) * std::numeric_limits<T>::epsilon();
    const T extent = std::abs(x) + std::abs(y) + std::abs(axis.start);
    const T margin = T(1) + rounding * extent;
    const IndexRange range = axis.samples_between(p, min_of(top, bottom) + min_of(left, right) - margin,
                                                  max_of(top, bottom) + max_of(left, right) + margin);
    // The margin's samples come first. In a RoI for which these are not enough, each weighs next to nothing.
    const int64_t in_margin = static_cast<int64_t>(T(4) * min_of(rounding * extent, T(4096)));
    return {range.begin, min_of(range.end, range.begin + axis.visited + in_margin)};
  }
};

template <class T>
DETOPS_HD RoiAxis<T> rotated_axis(T side, const RoiOptions& options, int bins, int64_t map_extent) {
  RoiAxis<T> axis{RoiRule::kAlign, bins, 0, -side / T(2), side / static_cast<T>(bins), T(0), 0};
  axis.samples = options.sampling_ratio > 0 ? static_cast<T>(options.sampling_ratio) : std::ceil(axis.bin);
  if (!is_finite(side) || !(axis.samples > T(0))) axis.samples = T(0);
  axis.visited = options.sampling_ratio > 0 ? options.sampling_ratio : 2 * map_extent + 16;
  return axis;
}

template <class T>
DETOPS_HD RotatedRoi<T> place_rotated(const T* row, const RoiMaps<T>& maps, const RoiOptions& options) {
  const RoiLevel<T>& level = maps.levels[0];
  const int64_t extent = int64_t(level.height) + level.width;
  const math::SinCos<T> turn = math::sincos_degrees(row[5]);
  RotatedRoi<T> roi{image_of(row[0], maps.images),
                    rotated_axis(row[4] * level.scale, options, options.bins_y, extent),
                    rotated_axis(row[3] * level.scale, options, options.bins_x, extent),
                    row[2] * level.scale - T(0.5),
                    row[1] * level.scale - T(0.5),
                    turn.cos,
                    turn.sin,
                    level.height,
                    level.width};
  const bool finite = is_finite(roi.y) && is_finite(roi.x) && is_finite(roi.cos) && is_finite(roi.sin);
  if (!finite || !(roi.v.samples > T(0)) || !(roi.u.samples > T(0))) {
    roi.image = -1;
    roi.v.samples = T(1);
    roi.u.samples = T(1);
  }
  return roi;
}

// The launches.
template <class S>
void roi_align_rotated_cuda(const RoiTensors<ComputeType<S>, const S>& map, const Tensor& boxes,
                            const RoiOptions& options, const Tensor& out);
template <class S>
void roi_align_rotated_backward_cuda(const Tensor& grad, const Tensor& boxes, const RoiOptions& options,
                                     const RoiTensors<ComputeType<S>, S>& out);

}  // namespace DETOPS_NAMESPACE
