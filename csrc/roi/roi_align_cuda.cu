// roi_align and its gradient on a GPU, from one map or several in one launch.
//
// Forward: one block per RoI and slice of the channels. It puts the taps of both axes into shared memory. With
// channels_last a thread makes some neighbouring channels of a bin; else a warp takes a plane, adds up the rows of a
// bin for all columns, one column a lane, and then the columns.
//
// Backward: tile by tile, see roi_tiles_cuda.cuh.
#include "roi/roi_tiles_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

// ---- forward

// Neighbouring channels of a thread.
template <class S>
constexpr int kPackSize = 16 / sizeof(S);

template <int pack, class S, class T>
__device__ inline void pool_pixels(const S* map, int64_t row, int channels, int first, int count,
                                   const SharedTaps<T>& taps, S* out) {
  const int packs = count / pack;
  for (int i = threadIdx.x; i < taps.bins_y * taps.bins_x * packs; i += kRoiThreads) {
    const int bin = i / packs;
    const int channel = first + (i - bin * packs) * pack;
    const int p = bin / taps.bins_x, q = bin - p * taps.bins_x;
    T sums[pack] = {};
    const Tap<T>* const columns = taps.x(q);
    for (int r = 0; r < taps.y_count(p); ++r) {
      const Tap<T> y = taps.y(p)[r];
      const S* const pixels = map + y.pixel * row + channel;
      for (int s = 0; s < taps.x_count(q); ++s) {
        add_pack(pixels + int64_t(columns[s].pixel) * channels, y.weight * columns[s].weight, sums);
      }
    }
    store_pack(sums, out + int64_t(bin) * channels + channel);
  }
}

constexpr int kRowSums = 512;  // values of a warp's sums of rows

// One plane by a warp.
template <class S, class T>
__device__ inline void pool_plane(const S* plane, int64_t width, const SharedTaps<T>& taps, int column, int columns,
                                  T* row_sums, S* out) {
  const int lane = threadIdx.x % kWarpSize;
  const int bins_at_once = kRowSums / columns;  // along y
  for (int first = 0; first < taps.bins_y; first += bins_at_once) {
    const int count = min(bins_at_once, taps.bins_y - first);
    for (int p = 0; p < count; ++p) {
      const Tap<T>* const rows = taps.y(first + p);
      for (int j = lane; j < columns; j += kWarpSize) {
        T sum = T(0);
        for (int r = 0; r < taps.y_count(first + p); ++r) {
          sum = fma(rows[r].weight, static_cast<T>(plane[rows[r].pixel * width + column + j]), sum);
        }
        row_sums[p * columns + j] = sum;
      }
    }
    __syncwarp();
    for (int i = lane; i < count * taps.bins_x; i += kWarpSize) {
      const int p = i / taps.bins_x, q = i - p * taps.bins_x;
      const Tap<T>* const tap = taps.x(q);
      T sum = T(0);
      // A bin without rows may have columns all the same.
      for (int s = 0; s < taps.x_count(q); ++s) {
        sum = fma(tap[s].weight, row_sums[p * columns + tap[s].pixel - column], sum);
      }
      out[first * taps.bins_x + i] = static_cast<S>(sum);
    }
    __syncwarp();
  }
}

template <int pack, class S>
__global__ void roi_align_kernel(RoiTensors<ComputeType<S>, const S> maps, const ComputeType<S>* boxes,
                                 RoiOptions options, int most_taps, int slice, S* out) {
  using T = ComputeType<S>;
  DETOPS_DYNAMIC_SHARED(T, memory);
  constexpr int kAllRowSums = pack > 0 ? 0 : kRowSums * kRoiWarps;
  SharedTaps<T> taps(memory + kAllRowSums, options, most_taps);
  const int64_t roi = blockIdx.x;
  const RoiPlace<T> place = place_roi(boxes + 5 * roi, maps.shape, options);
  const bool filled = taps.fill(place);
  __syncthreads();

  const int channels = maps.shape.channels, bins = options.bins_y * options.bins_x;
  const int first = blockIdx.y * slice;
  const int count = min(slice, channels - first);
  const int64_t width = maps.shape.levels[place.level].width;
  const S* const map = maps.image(place.level, max(place.image, 0));
  S* const result = out + roi * channels * bins;
  if (!filled) {
    const MapStrides strides(maps.channels_last, maps.shape.levels[place.level].height, width, channels);
    for (int bin = 0; bin < bins; ++bin) {
      const int p = bin / options.bins_x, q = bin % options.bins_x;
      taps.fill_one(place, p, q);
      __syncthreads();
      for (int c = first + threadIdx.x; c < first + count; c += kRoiThreads) {
        result[bin_offset(maps.channels_last, c, bin, channels, bins)] =
            static_cast<S>(taps.average(p, q, map + c * strides.channel, strides));
      }
      __syncthreads();
    }
    return;
  }
  if constexpr (pack > 0) {
    pool_pixels<pack>(map, width * channels, channels, first, count, taps, result);
  } else {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const IndexRange read = pixels_read(place.x);
    const int columns = static_cast<int>(read.count());
    for (int c = first + warp; c < first + count; c += kRoiWarps) {
      const S* const plane = map + c * maps.pixels(place.level);
      S* const values = result + int64_t(c) * bins;
      if (columns > 0 && columns <= kRowSums) {
        pool_plane(plane, width, taps, static_cast<int>(read.begin), columns, memory + warp * kRowSums, values);
        continue;
      }
      for (int bin = lane; bin < bins; bin += kWarpSize) {
        const int p = bin / options.bins_x, q = bin - p * options.bins_x;
        T sum = T(0);
        for (int r = 0; r < taps.y_count(p); ++r) {
          const Tap<T> y = taps.y(p)[r];
          for (int s = 0; s < taps.x_count(q); ++s) {
            const Tap<T> x = taps.x(q)[s];
            sum = fma(y.weight * x.weight, static_cast<T>(plane[y.pixel * width + x.pixel]), sum);
          }
        }
        values[bin] = static_cast<S>(sum);
      }
    }
  }
}

template <int pack, class S>
void launch_roi_align(const RoiTensors<ComputeType<S>, const S>& maps, const Tensor& boxes, const RoiOptions& options,
                      const Tensor& out) {
  using T = ComputeType<S>;
  const SharedTapsSize<T> size("roi_align", maps.shape, options);
  const int64_t count = boxes.size(0), channels = maps.shape.channels;
  // Blocks for a few waves, and some work for each thread.
  const int64_t unit = pack > 0 ? pack : kRoiWarps;
  const int64_t work =
      pack > 0 ? channels / pack * options.bins_y * options.bins_x / (2 * kRoiThreads) : channels / (2 * kRoiWarps);
  const int64_t slices = max_of<int64_t>(1, min_of(min_of(work, ceil_div<int64_t>(1024, count)), int64_t(64)));
  const int64_t slice = ceil_div(ceil_div(channels, slices), unit) * unit;
  check_slice("roi_align", slice, options);
  const size_t bytes = size.bytes + (pack > 0 ? 0 : sizeof(T) * kRowSums * kRoiWarps);
  const CudaScope scope(boxes);
  allow_shared_memory(roi_align_kernel<pack, S>, bytes);
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(ceil_div(channels, slice)));
  DETOPS_LAUNCH((roi_align_kernel<pack, S>), grid, kRoiThreads, bytes, scope.stream(), maps, boxes.const_data_ptr<T>(),
                options, size.most, static_cast<int>(slice), out.mutable_data_ptr<S>());
}

// ---- backward

template <class S>
struct AverageGrad {
  using T = ComputeType<S>;
  const S* grad;

  template <int pack>
  __device__ void pixels(const TileRois<T>& rois, TilePixel at, int channels, int channel,
                         T (&sums)[kTile][pack]) const {
    for (int g = 0; g < rois.count; ++g) {
      const S* const values = grad + int64_t(rois.rois[g]) * rois.bins_y * rois.bins_x * channels + channel;
      for (int p = rois.weights.first_y[g]; p < rois.weights.end_y[g]; ++p) {
        const T y = rois.y(g, p, at.r);
        if (y == T(0)) continue;
        for (int q = rois.weights.first_x[g]; q < rois.weights.end_x[g]; ++q) {
          const T* const x = rois.x(g, q);
          const auto of_bin =
              *reinterpret_cast<const RoiPack<S, pack>*>(values + (int64_t(p) * rois.bins_x + q) * channels);
#pragma unroll
          for (int i = 0; i < kTile; ++i) {
            if (x[i] == T(0)) continue;
            const T weight = y * x[i];
#pragma unroll
            for (int c = 0; c < pack; ++c) sums[i][c] = fma(weight, static_cast<T>(of_bin.values[c]), sums[i][c]);
          }
        }
      }
    }
  }

  __device__ void planes(const TileRois<T>& rois, TilePixel at, int channels, int channel, int planes,
                         T (&sums)[kTileChannels]) const {
    const int bins = rois.bins_y * rois.bins_x;
    for (int g = 0; g < rois.count; ++g) {
      const S* const values = grad + (int64_t(rois.rois[g]) * channels + channel) * bins;
      for (int p = rois.weights.first_y[g]; p < rois.weights.end_y[g]; ++p) {
        const T y = rois.y(g, p, at.r);
        if (y == T(0)) continue;
        for (int q = rois.weights.first_x[g]; q < rois.weights.end_x[g]; ++q) {
          const T x = rois.x(g, q)[at.column];
          if (x == T(0)) continue;
          const T weight = y * x;
#pragma unroll
          for (int c = 0; c < kTileChannels; ++c) {
            if (c < planes) {
              sums[c] = fma(weight, static_cast<T>(values[int64_t(c) * bins + p * rois.bins_x + q]), sums[c]);
            }
          }
        }
      }
    }
  }
};

}  // namespace

template <class S>
void roi_align_cuda(const RoiTensors<ComputeType<S>, const S>& maps, const Tensor& boxes, const RoiOptions& options,
                    const Tensor& out) {
  if (!maps.channels_last) return launch_roi_align<0, S>(maps, boxes, options, out);
  bool packed = packs_fit<S>(out.const_data_ptr(), maps.shape.channels, kPackSize<S>);
  for (int i = 0; i < maps.shape.count; ++i) {
    packed = packed && packs_fit<S>(maps.data[i], maps.shape.channels, kPackSize<S>);
  }
  if (packed) return launch_roi_align<kPackSize<S>, S>(maps, boxes, options, out);
  launch_roi_align<1, S>(maps, boxes, options, out);
}

template <class S>
void roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes, const RoiOptions& options,
                             const RoiTensors<ComputeType<S>, S>& out) {
  constexpr int kPack = sizeof(S) == 8 ? 2 : 4;
  const AverageGrad<S> source{grad.const_data_ptr<S>()};
  if (!out.channels_last) return launch_roi_backward<0, S>("roi_align", source, boxes, options, out);
  bool packed = packs_fit<S>(grad.const_data_ptr(), out.shape.channels, kPack);
  for (int i = 0; i < out.shape.count; ++i) {
    packed = packed && packs_fit<S>(out.data[i], out.shape.channels, kPack);
  }
  if (packed) return launch_roi_backward<kPack, S>("roi_align", source, boxes, options, out);
  launch_roi_backward<1, S>("roi_align", source, boxes, options, out);
}

#define DETOPS_INSTANTIATE(S)                                                                                   \
  template void roi_align_cuda<S>(const RoiTensors<ComputeType<S>, const S>&, const Tensor&, const RoiOptions&, \
                                  const Tensor&);                                                               \
  template void roi_align_backward_cuda<S>(const Tensor&, const Tensor&, const RoiOptions&,                     \
                                           const RoiTensors<ComputeType<S>, S>&)
DETOPS_INSTANTIATE(Half);
DETOPS_INSTANTIATE(BFloat16);
DETOPS_INSTANTIATE(float);
DETOPS_INSTANTIATE(double);

}  // namespace DETOPS_NAMESPACE
