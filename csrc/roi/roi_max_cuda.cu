// roi_pool, roi_align in mode "max", and their gradients on a GPU: one block per RoI and slice of the channels, a
// thread per value; the gradient tile by tile, see roi_tiles_cuda.cuh.
#include "roi/roi_max.h"
#include "roi/roi_tiles_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

template <class S>
__global__ void roi_max_kernel(RoiTensors<ComputeType<S>, const S> map, const ComputeType<S>* boxes, RoiOptions options,
                               int slice, S* out, ComputeType<S>* ys, ComputeType<S>* xs) {
  using T = ComputeType<S>;
  const int64_t roi = blockIdx.x;
  const RoiPlace<T> place = place_roi(boxes + 5 * roi, map.shape, options);
  const int channels = map.shape.channels, bins = options.bins_y * options.bins_x;
  const MapStrides strides(map.channels_last, place.y.size, place.x.size, channels);
  const S* const image = map.image(0, max(place.image, 0));
  const int first = blockIdx.y * slice, used = min(slice, channels - first);
  for (int i = threadIdx.x; i < used * bins; i += kRoiThreads) {
    // Neighbouring threads write neighbouring values.
    const int c = map.channels_last ? i % used : i / bins;
    const int bin = map.channels_last ? i / used : i - c * bins;
    const int p = bin / options.bins_x, q = bin - p * options.bins_x;
    const Winner<T> winner = winner_of_bin<T>(image + (first + c) * strides.channel, strides, BinSamples<T>(place.y, p),
                                              BinSamples<T>(place.x, q));
    const int64_t offset = roi * channels * bins + bin_offset(map.channels_last, first + c, bin, channels, bins);
    out[offset] = static_cast<S>(winner.value);
    if (ys) {
      ys[offset] = winner.y;
      xs[offset] = winner.x;
    }
  }
}

// Each value goes to the pixels that its bin's winner read.
template <class S>
struct WinnerGrad {
  using T = ComputeType<S>;
  const S* grad;
  const T *ys, *xs;
  int height, width;

  __device__ T weight(int64_t offset, int row, int column) const {
    if (!is_on_map(ys[offset], height) || !is_on_map(xs[offset], width)) return T(0);
    return weight_in(axis_sample(ys[offset], height), row) * weight_in(axis_sample(xs[offset], width), column);
  }

  __device__ void pixels(const TileRois<T>& rois, TilePixel at, int channels, int channel, T (&sums)[kTile][1]) const {
    for (int g = 0; g < rois.count; ++g) {
      const int64_t first = int64_t(rois.rois[g]) * rois.bins_y * rois.bins_x * channels + channel;
      for (int p = rois.weights.first_y[g]; p < rois.weights.end_y[g]; ++p) {
        if (rois.y(g, p, at.r) == T(0)) continue;
        for (int q = rois.weights.first_x[g]; q < rois.weights.end_x[g]; ++q) {
          const int64_t offset = first + (int64_t(p) * rois.bins_x + q) * channels;
#pragma unroll
          for (int i = 0; i < kTile; ++i) {
            const T share = weight(offset, at.top + at.r, at.left + i);
            if (share != T(0)) sums[i][0] = fma(share, static_cast<T>(grad[offset]), sums[i][0]);
          }
        }
      }
    }
  }

  __device__ void planes(const TileRois<T>& rois, TilePixel at, int channels, int channel, int planes,
                         T (&sums)[kTileChannels]) const {
    const int bins = rois.bins_y * rois.bins_x;
    for (int g = 0; g < rois.count; ++g) {
      const int64_t first = (int64_t(rois.rois[g]) * channels + channel) * bins;
      for (int p = rois.weights.first_y[g]; p < rois.weights.end_y[g]; ++p) {
        if (rois.y(g, p, at.r) == T(0)) continue;
        for (int q = rois.weights.first_x[g]; q < rois.weights.end_x[g]; ++q) {
          if (rois.x(g, q)[at.column] == T(0)) continue;
#pragma unroll
          for (int c = 0; c < kTileChannels; ++c) {
            if (c >= planes) break;
            const int64_t offset = first + int64_t(c) * bins + p * rois.bins_x + q;
            const T share = weight(offset, at.top + at.r, at.left + at.column);
            if (share != T(0)) sums[c] = fma(share, static_cast<T>(grad[offset]), sums[c]);
          }
        }
      }
    }
  }
};

}  // namespace

template <class S>
void roi_max_cuda(const RoiTensors<ComputeType<S>, const S>& map, const Tensor& boxes, const RoiOptions& options,
                  const Tensor& out, ComputeType<S>* winners) {
  using T = ComputeType<S>;
  const int64_t count = boxes.size(0), channels = map.shape.channels;
  const int64_t work = channels * options.bins_y * options.bins_x / (2 * kRoiThreads);
  const int64_t slices = max_of<int64_t>(1, min_of(min_of(work, channels), ceil_div<int64_t>(1024, count)));
  const int64_t slice = ceil_div(channels, slices);
  check_slice(options.rule == RoiRule::kPool ? "roi_pool" : "roi_align", slice, options);
  const CudaScope scope(boxes);
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(ceil_div(channels, slice)));
  DETOPS_LAUNCH((roi_max_kernel<S>), grid, kRoiThreads, 0, scope.stream(), map, boxes.const_data_ptr<T>(), options,
                static_cast<int>(slice), out.mutable_data_ptr<S>(), winners, winners ? winners + out.numel() : nullptr);
}

template <class S>
void roi_max_backward_cuda(const char* op, const Tensor& grad, const ComputeType<S>* winners, const Tensor& boxes,
                           const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
  const WinnerGrad<S> source{grad.const_data_ptr<S>(), winners, winners + grad.numel(), out.shape.levels[0].height,
                             out.shape.levels[0].width};
  if (out.channels_last) return launch_roi_backward<1, S>(op, source, boxes, options, out);
  launch_roi_backward<0, S>(op, source, boxes, options, out);
}

#define DETOPS_INSTANTIATE(S)                                                                                 \
  template void roi_max_cuda<S>(const RoiTensors<ComputeType<S>, const S>&, const Tensor&, const RoiOptions&, \
                                const Tensor&, ComputeType<S>*);                                              \
  template void roi_max_backward_cuda<S>(const char*, const Tensor&, const ComputeType<S>*, const Tensor&,    \
                                         const RoiOptions&, const RoiTensors<ComputeType<S>, S>&)
DETOPS_INSTANTIATE(Half);
DETOPS_INSTANTIATE(BFloat16);
DETOPS_INSTANTIATE(float);
DETOPS_INSTANTIATE(double);

}  // namespace DETOPS_NAMESPACE
