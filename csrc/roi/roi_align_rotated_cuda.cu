// roi_align_rotated and its gradient on a GPU.
//
// Forward: one block per RoI and slice of the channels, a thread for each value.
// Backward: one block per tile of 8 x 8 pixels and slice of the channels. It walks the RoIs of the list in order; for
// each that touches the tile it first writes the weight of every bin on every pixel of the tile into shared memory, one
// thread a bin, and then adds up in registers. Every pixel is stored once.
#include "roi/roi_align_rotated.h"
#include "roi/roi_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

template <class S>
__global__ void roi_align_rotated_kernel(RoiTensors<ComputeType<S>, const S> map, const ComputeType<S>* boxes,
                                         RoiOptions options, int slice, S* out) {
  using T = ComputeType<S>;
  const int64_t roi = blockIdx.x;
  const RotatedRoi<T> place = place_rotated(boxes + 6 * roi, map.shape, options);
  const int channels = map.shape.channels, bins = options.bins_y * options.bins_x;
  const MapStrides strides(map.channels_last, place.height, place.width, channels);
  const S* const image = map.image(0, max(place.image, 0));
  const int first = blockIdx.y * slice, used = min(slice, channels - first);
  for (int i = threadIdx.x; i < used * bins; i += kRoiThreads) {
    // Neighbouring threads write neighbouring values.
    const int c = map.channels_last ? i % used : i / bins;
    const int bin = map.channels_last ? i / used : i - c * bins;
    const S* const plane = image + (first + c) * strides.channel;
    T sum = T(0);
    place.for_each_sample(bin / options.bins_x, bin % options.bins_x, [&](AxisSample<T> y, AxisSample<T> x) {
      for (int row = 0; row <= (y.fraction != T(0)); ++row) {
        for (int column = 0; column <= (x.fraction != T(0)); ++column) {
          const T weight = (row ? y.fraction : T(1) - y.fraction) * (column ? x.fraction : T(1) - x.fraction);
          const S value = plane[(y.low + row) * strides.row + (x.low + column) * strides.column];
          sum = fma(weight, static_cast<T>(value), sum);
        }
      }
    });
    out[roi * channels * bins + bin_offset(map.channels_last, first + c, bin, channels, bins)] =
        static_cast<S>(place.weight(sum));
  }
}

constexpr int kTile = 8;
constexpr int kTilePixels = kTile * kTile;
constexpr int kBins = 64;      // whose weights are held at once
constexpr int kChannels = 16;  // of a thread
constexpr int kSets = kRoiThreads / kTilePixels;

// The weights of one bin on the pixels of a tile; false if there is none.
template <class T>
__device__ inline bool tile_weights(const RotatedRoi<T>& roi, int p, int q, int top, int left, T* weights) {
  bool any = false;
  for (int i = 0; i < kTilePixels; ++i) weights[i] = T(0);
  roi.for_each_sample(p, q, [&](const AxisSample<T>& y, const AxisSample<T>& x) {
    const int row = y.low - top, column = x.low - left;
    if (row < -1 || row >= kTile || column < -1 || column >= kTile) return;
    for (int down = 0; down <= (y.fraction != T(0)); ++down) {
      for (int right = 0; right <= (x.fraction != T(0)); ++right) {
        const int r = row + down, c = column + right;
        if (r < 0 || r >= kTile || c < 0 || c >= kTile) continue;
        const T weight = (down ? y.fraction : T(1) - y.fraction) * (right ? x.fraction : T(1) - x.fraction);
        weights[r * kTile + c] += roi.weight(weight);
        any = true;
      }
    }
  });
  return any;
}

// True unless the RoI lies wholly on one side of the tile: its half diagonal is its reach.
template <class T>
__device__ inline bool touches_tile(const RotatedRoi<T>& roi, int top, int left) {
  if (roi.image < 0) return false;
  const T v = std::abs(roi.v.start), u = std::abs(roi.u.start);
  // With a pixel for the neighbours of a sample, one for samples off the map, and room for rounding.
  const T reach_y = (v * std::abs(roi.cos) + u * std::abs(roi.sin)) * T(1.001) + T(3);
  const T reach_x = (v * std::abs(roi.sin) + u * std::abs(roi.cos)) * T(1.001) + T(3);
  return roi.y + reach_y >= T(top) && roi.y - reach_y <= T(top + kTile) && roi.x + reach_x >= T(left) &&
         roi.x - reach_x <= T(left + kTile);
}

template <class S>
__global__ void roi_align_rotated_backward_kernel(const S* grad, const ComputeType<S>* boxes, int count,
                                                  RoiOptions options, RoiTensors<ComputeType<S>, S> out,
                                                  int tile_columns, int tiles_per_image) {
  using T = ComputeType<S>;
  DETOPS_SHARED(T, weights, kBins * kTilePixels);
  DETOPS_SHARED(int, any, kBins);
  const int image = blockIdx.x / tiles_per_image, tile = blockIdx.x % tiles_per_image;
  const int top = tile / tile_columns * kTile, left = tile % tile_columns * kTile;
  const int height = out.shape.levels[0].height, width = out.shape.levels[0].width, channels = out.shape.channels;
  const int bins = options.bins_y * options.bins_x;
  const int pixel = threadIdx.x % kTilePixels;
  const int channel = (blockIdx.y * kSets + threadIdx.x / kTilePixels) * kChannels;
  T sums[kChannels] = {};
  for (int roi = 0; roi < count; ++roi) {
    // The same for all threads of the block.
    const T* const row = boxes + 6 * int64_t(roi);
    if (image_of(row[0], out.shape.images) != image) continue;
    const RotatedRoi<T> place = place_rotated(row, out.shape, options);
    if (!touches_tile(place, top, left)) continue;
    for (int first = 0; first < bins; first += kBins) {
      const int held = min(kBins, bins - first);
      __syncthreads();
      if (threadIdx.x < held) {
        const int bin = first + threadIdx.x;
        any[threadIdx.x] = tile_weights(place, bin / options.bins_x, bin % options.bins_x, top, left,
                                        weights + threadIdx.x * kTilePixels);
      }
      __syncthreads();
      for (int i = 0; i < held; ++i) {
        if (!any[i]) continue;
        const T weight = weights[i * kTilePixels + pixel];
        if (weight == T(0)) continue;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (channel + c >= channels) break;
          const int64_t offset = bin_offset(out.channels_last, channel + c, first + i, channels, bins);
          sums[c] = fma(weight, static_cast<T>(grad[int64_t(roi) * channels * bins + offset]), sums[c]);
        }
      }
    }
  }
  const int y = top + pixel / kTile, x = left + pixel % kTile;
  if (y >= height || x >= width) return;
  const MapStrides strides(out.channels_last, height, width, channels);
  S* const target = out.image(0, image) + y * strides.row + x * strides.column;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (channel + c >= channels) break;
    target[(channel + c) * strides.channel] = static_cast<S>(sums[c]);
  }
}

}  // namespace

template <class S>
void roi_align_rotated_cuda(const RoiTensors<ComputeType<S>, const S>& map, const Tensor& boxes,
                            const RoiOptions& options, const Tensor& out) {
  const int64_t count = boxes.size(0), channels = map.shape.channels;
  const int64_t work = channels * options.bins_y * options.bins_x / (2 * kRoiThreads);
  const int64_t slices = max_of<int64_t>(1, min_of(min_of(work, channels), ceil_div<int64_t>(1024, count)));
  const int64_t slice = ceil_div(channels, slices);
  check_slice("roi_align_rotated", slice, options);
  const CudaScope scope(boxes);
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(ceil_div(channels, slice)));
  DETOPS_LAUNCH((roi_align_rotated_kernel<S>), grid, kRoiThreads, 0, scope.stream(), map,
                boxes.const_data_ptr<ComputeType<S>>(), options, static_cast<int>(slice), out.mutable_data_ptr<S>());
}

template <class S>
void roi_align_rotated_backward_cuda(const Tensor& grad, const Tensor& boxes, const RoiOptions& options,
                                     const RoiTensors<ComputeType<S>, S>& out) {
  const int columns = ceil_div(out.shape.levels[0].width, kTile);
  const int64_t per_image = int64_t(columns) * ceil_div(out.shape.levels[0].height, kTile);
  const int64_t blocks = per_image * out.shape.images;
  if (blocks > kMostRows) {
    fail("roi_align_rotated", "input must have at most 2^31 tiles of pixels, got " + std::to_string(blocks));
  }
  const CudaScope scope(boxes);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(out.shape.channels, kSets * kChannels)));
  DETOPS_LAUNCH((roi_align_rotated_backward_kernel<S>), grid, kRoiThreads, 0, scope.stream(), grad.const_data_ptr<S>(),
                boxes.const_data_ptr<ComputeType<S>>(), static_cast<int>(boxes.size(0)), options, out, columns,
                static_cast<int>(per_image));
}

#define DETOPS_INSTANTIATE(S)                                                                        \
  template void roi_align_rotated_cuda<S>(const RoiTensors<ComputeType<S>, const S>&, const Tensor&, \
                                          const RoiOptions&, const Tensor&);                         \
  template void roi_align_rotated_backward_cuda<S>(const Tensor&, const Tensor&, const RoiOptions&,  \
                                                   const RoiTensors<ComputeType<S>, S>&)
DETOPS_INSTANTIATE(Half);
DETOPS_INSTANTIATE(BFloat16);
DETOPS_INSTANTIATE(float);
DETOPS_INSTANTIATE(double);

}  // namespace DETOPS_NAMESPACE
