// roi_align (average), multi_scale_roi_align and their gradients: schema and checks.
#include "roi/roi_align.h"
#include "common/register.h"

#include <cmath>
#include <limits>

#include "roi/roi_align_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

struct Pyramid {
  std::vector<double> scales;  // of the maps
  double canonical_scale;
  int64_t canonical_level;
};

using Sizes = std::vector<int64_t>;  // N, C, and H and W of each map

template <class T, class V>
RoiTensors<T, V> roi_align_tensors(const Sizes& sizes, const Pyramid& pyramid, bool channels_last) {
  RoiTensors<T, V> maps{};
  maps.channels_last = channels_last;
  maps.shape.count = static_cast<int>(pyramid.scales.size());
  maps.shape.images = static_cast<int>(sizes[0]);
  maps.shape.channels = static_cast<int>(sizes[1]);
  const int first = static_cast<int>(-std::log2(pyramid.scales.front()));
  const int last = static_cast<int>(-std::log2(pyramid.scales.back()));
  for (int i = 0; i < maps.shape.count; ++i) {
    maps.shape.levels[i] = {static_cast<int>(sizes[2 + 2 * i]), static_cast<int>(sizes[3 + 2 * i]),
                            static_cast<T>(pyramid.scales[i])};
    // log2(side / canonical_scale) + 1e-6 reaches the level: with torchvision's margin for rounding.
    const double octaves = static_cast<double>(first + i) - static_cast<double>(pyramid.canonical_level) - 1e-6;
    const double side = pyramid.canonical_scale * std::exp2(octaves);
    maps.shape.least_area[i] = first + i <= last ? side * side : std::numeric_limits<double>::quiet_NaN();
  }
  return maps;
}

// As many scales as maps, whose number there is room for, and all of them the scale of something.
void check_scales(const char* op, const Pyramid& pyramid) {
  const size_t maps = pyramid.scales.size();
  if (maps == 0 || maps > kMostLevels) {
    fail(op, "spatial_scales must be those of 1 to 8 maps, got " + std::to_string(maps));
  }
  for (double scale : pyramid.scales) {
    if (scale > 0.0 && is_finite(scale)) continue;
    fail(op, "spatial_scales must be positive and finite, got " + std::to_string(scale));
  }
}

// The sizes of maps that fit together.
Sizes check_maps(const char* op, const char* argument, const std::vector<Tensor>& input, const Pyramid& pyramid) {
  if (input.empty() || input.size() > kMostLevels) {
    fail(op, std::string(argument) + " must be 1 to 8 maps, got " + std::to_string(input.size()));
  }
  if (pyramid.scales.size() != input.size()) {
    fail(op, "spatial_scales must have one value for each of the " + std::to_string(input.size()) + " maps, got " +
                 std::to_string(pyramid.scales.size()));
  }
  check_scales(op, pyramid);
  const Tensor& first = input[0];
  Sizes sizes;
  for (const Tensor& map : input) {
    check_map(op, argument, map);
    check_same_device(op, argument, map, "the first map", first);
    if (map.size(0) != first.size(0) || map.size(1) != first.size(1)) {
      fail(op, std::string(argument) + " must agree in N and C, got " + shape_text(first) + " and " + shape_text(map));
    }
    if (map.scalar_type() != first.scalar_type()) {
      fail(op, std::string(argument) + " must have one dtype, got " + dtype_name(first.scalar_type()) + " and " +
                   dtype_name(map.scalar_type()));
    }
    if (sizes.empty()) sizes = {map.size(0), map.size(1)};
    sizes.insert(sizes.end(), {map.size(2), map.size(3)});
  }
  return sizes;
}

Tensor pool_maps(const char* op, const char* argument, const std::vector<Tensor>& input, const Tensor& boxes,
                 const Pyramid& pyramid, const RoiOptions& options) {
  const Sizes sizes = check_maps(op, argument, input, pyramid);
  const Tensor& first = input[0];
  check_roi_boxes(op, boxes, 5, argument, first);
  const bool channels_last = is_channels_last(first);
  std::vector<Tensor> dense;
  for (const Tensor& map : input) dense.push_back(in_format(map, channels_last));
  const Tensor rows = as_contiguous(boxes);
  const int64_t count = boxes.size(0);
  const Tensor out = allocate_in_format(op, {count, first.size(1), options.bins_y, options.bins_x}, channels_last,
                                        first.scalar_type(), first);
  const bool gpu = on_gpu(op, first);
  dispatch_floating(first.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 5, first.size(0));
    if (out.numel() == 0) return;
    auto maps = roi_align_tensors<T, const S>(sizes, pyramid, channels_last);
    for (size_t i = 0; i < dense.size(); ++i) maps.data[i] = dense[i].const_data_ptr<S>();
    if (gpu) {
      DETOPS_GPU_ONLY(roi_align_cuda<S>(maps, rows, options, out));
    } else {
      roi_align_cpu<S>(maps, rows.const_data_ptr<T>(), count, options, out.mutable_data_ptr<S>());
    }
  });
  return out;
}

std::vector<Tensor> pool_maps_backward(const char* op, const Tensor& grad, const Tensor& boxes, const Sizes& sizes,
                                       const Pyramid& pyramid, const RoiOptions& options, bool channels_last) {
  check_scales(op, pyramid);
  check_map_sizes(op, sizes, pyramid.scales.size());
  check_floating(op, "grad", grad);
  check_roi_boxes(op, boxes, 5, "grad", grad);
  const int64_t count = boxes.size(0);
  check_shape(op, "grad", grad, "[K, C, bins, bins]", {count, sizes[1], options.bins_y, options.bins_x});
  const Tensor dense = in_format(grad, channels_last);
  const Tensor rows = as_contiguous(boxes);
  std::vector<Tensor> out;
  for (size_t i = 2; i < sizes.size(); i += 2) {
    out.push_back(
        allocate_in_format(op, {sizes[0], sizes[1], sizes[i], sizes[i + 1]}, channels_last, grad.scalar_type(), grad));
  }
  const bool gpu = on_gpu(op, grad);
  dispatch_floating(grad.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 5, sizes[0]);
    if (sizes[0] * sizes[1] == 0) return;
    auto maps = roi_align_tensors<T, S>(sizes, pyramid, channels_last);
    for (size_t i = 0; i < out.size(); ++i) maps.data[i] = out[i].mutable_data_ptr<S>();
    if (gpu) {
      DETOPS_GPU_ONLY(roi_align_backward_cuda<S>(dense, rows, options, maps));
    } else {
      roi_align_backward_cpu<S>(dense.const_data_ptr<S>(), rows.const_data_ptr<T>(), count, options, maps);
    }
  });
  return out;
}

Tensor roi_align(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y, int64_t bins_x,
                 int64_t sampling_ratio, bool aligned) {
  return pool_maps("roi_align", "input", {input}, boxes, {{spatial_scale}, 1.0, 0},
                   roi_options("roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned));
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes, double spatial_scale,
                          int64_t bins_y, int64_t bins_x, int64_t sampling_ratio, bool aligned, bool channels_last) {
  return pool_maps_backward("roi_align", grad, boxes, sizes, {{spatial_scale}, 1.0, 0},
                            roi_options("roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned),
                            channels_last)[0];
}

Tensor multi_scale_roi_align(std::vector<Tensor> features, const Tensor& boxes, std::vector<double> spatial_scales,
                             int64_t bins_y, int64_t bins_x, int64_t sampling_ratio, bool aligned,
                             double canonical_scale, int64_t canonical_level) {
  return pool_maps("multi_scale_roi_align", "features", features, boxes,
                   {spatial_scales, canonical_scale, canonical_level},
                   roi_options("multi_scale_roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned));
}

std::vector<Tensor> multi_scale_roi_align_backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes,
                                                   std::vector<double> spatial_scales, int64_t bins_y, int64_t bins_x,
                                                   int64_t sampling_ratio, bool aligned, double canonical_scale,
                                                   int64_t canonical_level, bool channels_last) {
  return pool_maps_backward(
      "multi_scale_roi_align", grad, boxes, sizes, {spatial_scales, canonical_scale, canonical_level},
      roi_options("multi_scale_roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned), channels_last);
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&roi_align>(
      "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, int sampling_ratio, "
      "bool aligned) -> Tensor");
  ops.add<&roi_align_backward>(
      "roi_align_backward(Tensor grad, Tensor boxes, SymInt[] sizes, float spatial_scale, SymInt bins_y, "
      "SymInt bins_x, int sampling_ratio, bool aligned, bool channels_last) -> Tensor");
  ops.add<&multi_scale_roi_align>(
      "multi_scale_roi_align(Tensor[] features, Tensor boxes, float[] spatial_scales, SymInt bins_y, SymInt bins_x, "
      "int sampling_ratio, bool aligned, float canonical_scale, int canonical_level) -> Tensor");
  ops.add<&multi_scale_roi_align_backward>(
      "multi_scale_roi_align_backward(Tensor grad, Tensor boxes, SymInt[] sizes, float[] spatial_scales, "
      "SymInt bins_y, SymInt bins_x, int sampling_ratio, bool aligned, float canonical_scale, int canonical_level, "
      "bool channels_last) -> Tensor[]");
}

}  // namespace DETOPS_NAMESPACE
