// ps_roi_align, ps_roi_pool and their gradients on a GPU: one block per RoI and slice of the channels, a thread per
// value; the gradient tile by tile, see roi_tiles_cuda.cuh.
#include "roi/ps_roi.h"
#include "roi/roi_tiles_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

template <class S>
__global__ void ps_roi_kernel(RoiTensors<ComputeType<S>, const S> map, const ComputeType<S>* boxes, RoiOptions options,
                              int most_taps, int slice, S* out) {
  using T = ComputeType<S>;
  DETOPS_DYNAMIC_SHARED(T, memory);
  SharedTaps<T> taps(memory, options, most_taps);
  const int64_t roi = blockIdx.x;
  const RoiPlace<T> place = place_roi(boxes + 5 * roi, map.shape, options);
  const bool filled = taps.fill(place);
  __syncthreads();

  const int channels = map.shape.channels, bins = options.bins_y * options.bins_x;
  const MapStrides strides(map.channels_last, map.shape.levels[0].height, map.shape.levels[0].width, channels);
  const S* const image = map.image(0, max(place.image, 0));
  const auto pool = [&](int c) {
    const int bin = c % bins;
    const T average = taps.average(bin / options.bins_x, bin % options.bins_x, image + c * strides.channel, strides);
    out[roi * channels + bin_offset(map.channels_last, c / bins, bin, channels / bins, bins)] = static_cast<S>(average);
  };
  const int begin = static_cast<int>(blockIdx.y) * slice, end = min(begin + slice, channels);
  if (filled) {
    for (int c = begin + threadIdx.x; c < end; c += kRoiThreads) pool(c);
    return;
  }
  for (int bin = 0; bin < bins; ++bin) {
    taps.fill_one(place, bin / options.bins_x, bin % options.bins_x);
    __syncthreads();
    // The channels of this bin, from the first in the slice.
    const int first = begin + (bin - begin % bins + bins) % bins;
    for (int c = first + threadIdx.x * bins; c < end; c += kRoiThreads * bins) pool(c);
    __syncthreads();
  }
}

template <class S>
struct PositionSensitiveGrad {
  using T = ComputeType<S>;
  const S* grad;

  __device__ void pixels(const TileRois<T>& rois, TilePixel at, int channels, int channel, T (&sums)[kTile][1]) const {
    const int bins = rois.bins_y * rois.bins_x, bin = channel % bins;
    const int64_t offset = bin_offset(true, channel / bins, bin, channels / bins, bins);
    for (int g = 0; g < rois.count; ++g) {
      const T y = rois.y(g, bin / rois.bins_x, at.r);
      if (y == T(0)) continue;
      const T value = static_cast<T>(grad[int64_t(rois.rois[g]) * channels + offset]);
      const T* const x = rois.x(g, bin % rois.bins_x);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (x[i] != T(0)) sums[i][0] = fma(y * x[i], value, sums[i][0]);
      }
    }
  }

  __device__ void planes(const TileRois<T>& rois, TilePixel at, int channels, int channel, int planes,
                         T (&sums)[kTileChannels]) const {
    const int bins = rois.bins_y * rois.bins_x;
    for (int g = 0; g < rois.count; ++g) {
#pragma unroll
      for (int c = 0; c < kTileChannels; ++c) {
        if (c >= planes) break;
        const int bin = (channel + c) % bins;
        const T weight = rois.y(g, bin / rois.bins_x, at.r) * rois.x(g, bin % rois.bins_x)[at.column];
        if (weight == T(0)) continue;
        sums[c] = fma(weight, static_cast<T>(grad[int64_t(rois.rois[g]) * channels + channel + c]), sums[c]);
      }
    }
  }
};

}  // namespace

template <class S>
void ps_roi_cuda(const char* op, const RoiTensors<ComputeType<S>, const S>& map, const Tensor& boxes,
                 const RoiOptions& options, const Tensor& out) {
  using T = ComputeType<S>;
  const SharedTapsSize<T> size(op, map.shape, options);
  const int64_t count = boxes.size(0), channels = map.shape.channels;
  const int64_t slices = max_of<int64_t>(1, min_of(channels / (2 * kRoiThreads), ceil_div<int64_t>(1024, count)));
  const int64_t slice = ceil_div(channels, slices);
  const CudaScope scope(boxes);
  allow_shared_memory(ps_roi_kernel<S>, size.bytes);
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(ceil_div(channels, slice)));
  DETOPS_LAUNCH((ps_roi_kernel<S>), grid, kRoiThreads, size.bytes, scope.stream(), map, boxes.const_data_ptr<T>(),
                options, size.most, static_cast<int>(slice), out.mutable_data_ptr<S>());
}

template <class S>
void ps_roi_backward_cuda(const char* op, const Tensor& grad, const Tensor& boxes, const RoiOptions& options,
                          const RoiTensors<ComputeType<S>, S>& out) {
  const PositionSensitiveGrad<S> source{grad.const_data_ptr<S>()};
  if (out.channels_last) return launch_roi_backward<1, S>(op, source, boxes, options, out);
  launch_roi_backward<0, S>(op, source, boxes, options, out);
}

#define DETOPS_INSTANTIATE(S)                                                                          \
  template void ps_roi_cuda<S>(const char*, const RoiTensors<ComputeType<S>, const S>&, const Tensor&, \
                               const RoiOptions&, const Tensor&);                                      \
  template void ps_roi_backward_cuda<S>(const char*, const Tensor&, const Tensor&, const RoiOptions&,  \
                                        const RoiTensors<ComputeType<S>, S>&)
DETOPS_INSTANTIATE(Half);
DETOPS_INSTANTIATE(BFloat16);
DETOPS_INSTANTIATE(float);
DETOPS_INSTANTIATE(double);

}  // namespace DETOPS_NAMESPACE
