// What the RoI kernels share: several values in one access, and the taps of a RoI in shared memory.
#pragma once

#include <algorithm>

#include "common/counted.h"
#include "common/launch_cuda.cuh"
#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {

constexpr int kRoiThreads = 256;
constexpr int kRoiWarps = kRoiThreads / kWarpSize;
constexpr size_t kMostSharedBytes = 220 * 1024;  // of a block, of what an H100 or H200 has

template <class S, int count>
struct alignas(sizeof(S) * count) RoiPack {
  S values[count];
};

// True if `address`, and every one that is a multiple of `stride` elements behind it, is aligned to packs of
// `elements`.
template <class S>
bool packs_fit(const void* address, int64_t stride, int elements) {
  return reinterpret_cast<uintptr_t>(address) % (sizeof(S) * elements) == 0 && stride % elements == 0;
}

// The values of a slice of channels that a block makes of a RoI are counted in 32 bits.
inline void check_slice(const char* op, int64_t slice, const RoiOptions& options) {
  const int64_t values = slice * options.bins_y * options.bins_x;
  if (values <= kMostRows) return;
  fail(op, "output_size must make at most " + std::to_string(kMostRows) + " values of " + std::to_string(slice) +
               " channels, got " + std::to_string(values));
}

// sums += weight * the pack at `source`
template <int count, class S, class T>
__device__ inline void add_pack(const S* source, T weight, T (&sums)[count]) {
  const RoiPack<S, count> pack = *reinterpret_cast<const RoiPack<S, count>*>(source);
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = fma(weight, static_cast<T>(pack.values[i]), sums[i]);
}

template <int count, class S, class T>
__device__ inline void store_pack(const T (&values)[count], S* target) {
  RoiPack<S, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack.values[i] = static_cast<S>(values[i]);
  *reinterpret_cast<RoiPack<S, count>*>(target) = pack;
}

// The taps of all bins of a RoI: those along y, then those along x. In dynamic shared memory.
template <class T>
struct SharedTaps {
  Tap<T>* taps;
  int* begins;  // of each bin, and the end of the last
  int* counts;
  int most, bins_y, bins_x;

  __device__ SharedTaps(void* memory, const RoiOptions& options, int most)
      : taps(static_cast<Tap<T>*>(memory)),
        begins(reinterpret_cast<int*>(taps + most)),
        counts(begins + options.bins_y + options.bins_x + 1),
        most(most),
        bins_y(options.bins_y),
        bins_x(options.bins_x) {}

  // By all threads of the block, which must not use the taps before a barrier. False, for all of them, where there is
  // no room for the taps of this RoI.
  __device__ bool fill(const RoiPlace<T>& place) {
    const int bins = bins_y + bins_x;
    for (int i = threadIdx.x; i < bins; i += kRoiThreads) {
      counts[i] = static_cast<int>(i < bins_y ? most_taps_of_bin(place.y, i) : most_taps_of_bin(place.x, i - bins_y));
    }
    __syncthreads();
    // No sum passes 2^31: what fits into shared memory has fewer than 2^14 bins, and 2^15 pixels of a side or samples.
    for (int i = threadIdx.x; i <= bins; i += kRoiThreads) {
      int begin = 0;
      for (int before = 0; before < i; ++before) begin += counts[before];
      begins[i] = begin;
    }
    __syncthreads();
    if (begins[bins] > most) return false;
    for (int i = threadIdx.x; i < bins; i += kRoiThreads) list(place, i, begins[i], counts[i]);
    return true;
  }

  // The taps of bins p and q alone, for which there is room in any case: most_taps is at least the bound of one bin. By
  // all threads of the block, between two barriers.
  __device__ void fill_one(const RoiPlace<T>& place, int p, int q) {
    if (threadIdx.x >= 2) return;
    const int y_taps = static_cast<int>(most_taps_of_bin(place.y, p));
    const int bin = threadIdx.x == 0 ? p : bins_y + q, begin = threadIdx.x == 0 ? 0 : y_taps;
    begins[bin] = begin;
    list(place, bin, begin, most - begin);
  }

  __device__ const Tap<T>* y(int p) const { return taps + begins[p]; }
  __device__ const Tap<T>* x(int p) const { return taps + begins[bins_y + p]; }
  __device__ int y_count(int p) const { return counts[p]; }
  __device__ int x_count(int p) const { return counts[bins_y + p]; }

  // What bin (p, q) averages in one plane.
  template <class S>
  __device__ T average(int p, int q, const S* plane, const MapStrides& strides) const {
    T sum = T(0);
    for (int r = 0; r < y_count(p); ++r) {
      const Tap<T> row = y(p)[r];
      for (int s = 0; s < x_count(q); ++s) {
        const Tap<T> column = x(q)[s];
        const S value = plane[row.pixel * strides.row + column.pixel * strides.column];
        sum = fma(row.weight * column.weight, static_cast<T>(value), sum);
      }
    }
    return sum;
  }

 private:
  // Writes the taps of a bin, of which there are `room` at most, and counts them.
  __device__ void list(const RoiPlace<T>& place, int bin, int begin, int room) {
    const Counted<Tap<T>> of_bin("roi", "taps of a bin", taps + begin, room);
    int count = 0;
    const auto add = [&](int pixel, T weight) { of_bin[count++] = {pixel, weight}; };
    if (bin < bins_y) {
      for_each_tap(place.y, bin, add);
    } else {
      for_each_tap(place.x, bin - bins_y, add);
    }
    counts[bin] = count;
  }
};

// The room that SharedTaps needs on these maps, but for huge RoIs: see most_taps.
template <class T>
struct SharedTapsSize {
  int most = 0;
  size_t bytes = 0;

  SharedTapsSize(const char* op, const RoiMaps<T>& maps, const RoiOptions& options) {
    int64_t taps = 0;
    for (int i = 0; i < maps.count; ++i) {
      taps = std::max(taps, most_taps(options, options.bins_y, maps.levels[i].height) +
                                most_taps(options, options.bins_x, maps.levels[i].width));
    }
    bytes = taps * sizeof(Tap<T>) + sizeof(int) * (2 * (size_t(options.bins_y) + options.bins_x) + 1);
    most = static_cast<int>(min_of(taps, kMostRows));
    if (bytes <= kMostSharedBytes - 32 * 1024) return;
    fail(op, "maps and output_size must be small enough for a GPU's shared memory (188 KB), got a need of " +
                 std::to_string(bytes / 1024) + " KB");
  }
};

}  // namespace DETOPS_NAMESPACE
