// What the entries of the RoI ops share: checks, memory formats, and the maps as the kernels want them.
#pragma once

#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "roi/roi.h"

namespace DETOPS_NAMESPACE {

// A tensor that is contiguous in both senses, as with one channel or maps of one pixel, counts as contiguous.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t stride = 1;
  for (int64_t i : {1, 3, 2, 0}) {
    if (tensor.size(i) != 1 && tensor.stride(i) != stride) return false;
    stride *= tensor.size(i);
  }
  return true;
}

// The tensor itself, or a copy in the memory format.
inline Tensor in_format(const Tensor& tensor, bool channels_last) {
  if (!channels_last) return as_contiguous(tensor);
  if (is_channels_last(tensor)) return tensor;
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

// An uninitialised tensor [N, C, H, W] in the memory format.
inline Tensor allocate_in_format(const char* op, const std::vector<int64_t>& sizes, bool channels_last,
                                 ScalarType dtype, const Tensor& like) {
  constexpr double kMostElements = double(int64_t(1) << 60);  // so that products of sizes do not overflow
  double elements = 1.0;
  for (int64_t size : sizes) elements *= static_cast<double>(max_of<int64_t>(size, 1));
  if (elements > kMostElements) fail(op, "the result must have at most 2^60 elements, got shape " + shape_text(sizes));
  if (!channels_last) return allocate(op, sizes, dtype, like);
  const int64_t channels = max_of<int64_t>(sizes[1], 1), row = channels * max_of<int64_t>(sizes[3], 1);
  return allocate_strided(op, sizes, {row * max_of<int64_t>(sizes[2], 1), 1, row, channels}, dtype, like);
}

inline void check_map(const char* op, const char* argument, const Tensor& map) {
  check_shape(op, argument, map, "[N, C, H, W]", {-1, -1, -1, -1});
  check_floating(op, argument, map);
  for (int64_t i = 0; i < 4; ++i) check_row_count(op, argument, map.size(i));
}

// `sizes` are those of `maps` maps that gradients are made of: N, C, and H and W of each.
inline void check_map_sizes(const char* op, const std::vector<int64_t>& sizes, size_t maps = 1) {
  bool fit = sizes.size() == 2 + 2 * maps;
  for (int64_t size : sizes) fit = fit && size >= 0 && size <= kMostRows;
  if (fit) return;
  fail(op, "sizes must be N, C, and H and W of " +
               (maps == 1 ? "the map" : "each of the " + std::to_string(maps) + " maps") + ", from 0 to " +
               std::to_string(kMostRows) + ", got " + shape_text(sizes));
}

// `boxes` is [K, columns], the batch index first.
inline void check_roi_boxes(const char* op, const Tensor& boxes, int64_t columns, const char* argument,
                            const Tensor& map) {
  check_shape(op, "boxes", boxes, "[K, " + std::to_string(columns) + "]", {-1, columns});
  const ScalarType dtype = compute_dtype(map.scalar_type());
  if (boxes.scalar_type() != dtype) {
    fail(op, "boxes must be " + dtype_name(dtype) + " for " + argument + " of " + dtype_name(map.scalar_type()) +
                 ", got " + dtype_name(boxes.scalar_type()));
  }
  check_same_device(op, "boxes", boxes, argument, map);
  check_row_count(op, "boxes", boxes.size(0));
}

// On the CPU. On a GPU this would need a synchronisation: RoIs of images that do not exist give zeros there.
template <class T>
void check_images(const char* op, const T* boxes, int64_t count, int64_t columns, int64_t images) {
  if (count > 0 && images == 0) {
    fail(op, "boxes must be empty for an input of 0 images, got " + std::to_string(count));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (image_of(boxes[i * columns], static_cast<int>(images)) >= 0) continue;
    fail(op, "boxes must have batch indices from 0 to " + std::to_string(images - 1) + " in the first column, got " +
                 std::to_string(static_cast<double>(boxes[i * columns])) + " in row " + std::to_string(i));
  }
}

// The bins of a RoI are counted in 32 bits, and there is one at least.
inline RoiOptions roi_options(const char* op, RoiRule rule, int64_t bins_y, int64_t bins_x, int64_t sampling_ratio,
                              bool aligned) {
  if (bins_y < 1 || bins_x < 1 || bins_y > kMostRows / bins_x) {
    fail(op, "output_size must be positive and make at most " + std::to_string(kMostRows) + " bins, got " +
                 std::to_string(bins_y) + " x " + std::to_string(bins_x));
  }
  const int64_t samples = max_of<int64_t>(0, min_of(sampling_ratio, kMostRows));
  return {rule, static_cast<int>(bins_y), static_cast<int>(bins_x), static_cast<int>(samples), aligned};
}

// Maps of elements V (const or not), computed in T.
template <class T, class V>
struct RoiTensors {
  RoiMaps<T> shape;
  bool channels_last;
  V* data[kMostLevels];

  DETOPS_HD int64_t pixels(int level) const { return int64_t(shape.levels[level].height) * shape.levels[level].width; }
  DETOPS_HD V* image(int level, int64_t image) const { return data[level] + image * shape.channels * pixels(level); }
};

// One map of sizes [N, C, H, W].
template <class S, class V>
RoiTensors<ComputeType<S>, V> one_map(const std::vector<int64_t>& sizes, double scale, bool channels_last, V* data) {
  RoiTensors<ComputeType<S>, V> map{};
  map.shape.count = 1;
  map.shape.images = static_cast<int>(sizes[0]);
  map.shape.channels = static_cast<int>(sizes[1]);
  map.shape.levels[0] = {static_cast<int>(sizes[2]), static_cast<int>(sizes[3]), static_cast<ComputeType<S>>(scale)};
  map.channels_last = channels_last;
  map.data[0] = data;
  return map;
}

// Distances between the elements of an image's map.
struct MapStrides {
  int64_t row, column, channel;

  DETOPS_HD MapStrides(bool channels_last, int64_t height, int64_t width, int64_t channels)
      : row(channels_last ? width * channels : width),
        column(channels_last ? channels : 1),
        channel(channels_last ? 1 : height * width) {}
};

// Where a bin of a channel stands in what is pooled from one RoI.
DETOPS_HD int64_t bin_offset(bool channels_last, int64_t channel, int64_t bin, int64_t channels, int64_t bins) {
  return channels_last ? bin * channels + channel : channel * bins + bin;
}

}  // namespace DETOPS_NAMESPACE
