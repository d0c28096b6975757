// sample_matches on a GPU: a block per image, fixed shapes, no host synchronisation. It finds the last key of each
// draw digit by digit from histograms; then each warp counts, and writes, whom it draws of its own stretch of anchors.
#include "common/counted.h"
#include "common/launch_cuda.cuh"
#include "matching/sample_matches.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBinsPerLane = kSampleBins / kWarpSize;

// Where the `wanted`-th item of a histogram lies: its bin, and how many of that bin are wanted. One warp.
struct Place {
  int bin, rest;
};
__device__ inline Place find_place(const int* bins, int wanted) {
  const int lane = threadIdx.x % kWarpSize;
  int own = 0;
  for (int i = 0; i < kBinsPerLane; ++i) own += bins[lane * kBinsPerLane + i];
  int up_to = own;  // of this lane and those before
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  const unsigned vote = __ballot_sync(kFullWarp, up_to >= wanted);
  const int holder = __ffs(static_cast<int>(vote)) - 1;
  Place place{holder * kBinsPerLane, wanted - (up_to - own)};
  if (lane == holder) {
    while (place.rest > bins[place.bin]) place.rest -= bins[place.bin++];
  }
  return {__shfl_sync(kFullWarp, place.bin, holder), __shfl_sync(kFullWarp, place.rest, holder)};
}

__global__ void sample_matches_kernel(const int64_t* all_matches, const int32_t* all_keys, int anchors, int samples,
                                      int most_positives, int64_t* all_indices, int64_t* positive_counts,
                                      int64_t* counts) {
  DETOPS_SHARED(int, bins, 2 * kSampleBins);
  DETOPS_SHARED(int, totals, 2);
  DETOPS_SHARED(int, wanted, 2);  // still to be found among the keys with the prefix
  DETOPS_SHARED(int, drawn, 2);   // to be drawn in all
  DETOPS_SHARED(unsigned, prefix, 2);
  DETOPS_SHARED(int, below, 2 * kWarps);  // by class and warp: keys below the last of the draw
  DETOPS_SHARED(int, tied, 2 * kWarps);   // and keys equal to it
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = blockIdx.x;
  const int64_t* const matches = all_matches + image * anchors;
  const int32_t* const keys = all_keys + image * anchors;
  // Of each class exactly as many are written as were wanted, together no more than there are samples.
  const Counted<int64_t> indices("sample_matches", "indices of an image", all_indices + image * samples, samples);

  if (threadIdx.x < 2) {
    totals[threadIdx.x] = 0;
    prefix[threadIdx.x] = 0;
  }
  __syncthreads();
  int own[2] = {0, 0};
  for (int a = threadIdx.x; a < anchors; a += kThreads) {
    const int kind = sample_class(matches[a]);
    own[kPositive] += kind == kPositive;
    own[kNegative] += kind == kNegative;
  }
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    const int of_warp = warp_sum(own[kind]);
    if (lane == 0) atomicAdd(&totals[kind], of_warp);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    drawn[kPositive] = wanted[kPositive] = min(most_positives, totals[kPositive]);
    drawn[kNegative] = wanted[kNegative] = min(samples - drawn[kPositive], totals[kNegative]);
    positive_counts[image] = drawn[kPositive];
    counts[image] = drawn[kPositive] + drawn[kNegative];
  }

  for (int digit = 0; digit < kSampleDigits; ++digit) {
    for (int i = threadIdx.x; i < 2 * kSampleBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int a = threadIdx.x; a < anchors; a += kThreads) {
      const int kind = sample_class(matches[a]);
      if (kind == kNoSample) continue;
      const uint32_t key = sample_key(keys[a]);
      if (sample_prefix(key, digit) == prefix[kind]) {
        atomicAdd(&bins[kind * kSampleBins + sample_bin(key, digit)], 1);
      }
    }
    __syncthreads();
    if (warp < 2 && wanted[warp] > 0) {
      const Place place = find_place(bins + warp * kSampleBins, wanted[warp]);
      __syncwarp();  // all lanes have read what the first one is to write
      if (lane == 0) {
        prefix[warp] = prefix[warp] << (digit == kSampleDigits - 1 ? kSampleBits - 1 : kSampleBits) | place.bin;
        wanted[warp] = place.rest;
      }
    }
    __syncthreads();
  }

  // Each warp has a stretch of anchors. Where a class has none to draw, none is below or tied.
  const Draw draws[2] = {{prefix[kPositive], wanted[kPositive]}, {prefix[kNegative], wanted[kNegative]}};
  const bool any[2] = {drawn[kPositive] > 0, drawn[kNegative] > 0};
  const int stretch = (anchors / kThreads + 1) * kWarpSize;
  const int begin = min(int64_t(warp) * stretch, int64_t(anchors)), end = begin + min(stretch, anchors - begin);
  for (int round = 0; round < 2; ++round) {
    int below_before[2] = {0, 0}, tied_before[2] = {0, 0};  // of the image, before the anchor that is looked at
    if (round == 1) {
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        for (int i = 0; i < warp; ++i) {
          below_before[kind] += below[kind * kWarps + i];
          tied_before[kind] += tied[kind * kWarps + i];
        }
      }
    }
    for (int first = begin; first < end; first += kWarpSize) {
      const int a = first + lane;
      const int kind = a < end ? sample_class(matches[a]) : kNoSample;
      const uint32_t key = kind != kNoSample ? sample_key(keys[a]) : 0;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const bool is_below = kind == k && any[k] && key < draws[k].key;
        const bool is_tied = kind == k && any[k] && key == draws[k].key;
        const unsigned below_vote = __ballot_sync(kFullWarp, is_below), tied_vote = __ballot_sync(kFullWarp, is_tied);
        if (round == 1) {
          const unsigned before = (1u << lane) - 1;
          const int ties = tied_before[k] + __popc(tied_vote & before);
          if (is_below || (is_tied && ties < draws[k].ties)) {
            const int place = below_before[k] + __popc(below_vote & before) + min(ties, draws[k].ties);
            indices[(k == kNegative ? drawn[kPositive] : 0) + place] = a;
          }
        }
        below_before[k] += __popc(below_vote);
        tied_before[k] += __popc(tied_vote);
      }
    }
    if (round == 1) break;
    if (lane == 0) {
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        below[kind * kWarps + warp] = below_before[kind];
        tied[kind * kWarps + warp] = tied_before[kind];
      }
    }
    __syncthreads();
  }
  for (int i = drawn[kPositive] + drawn[kNegative] + threadIdx.x; i < samples; i += kThreads) indices[i] = -1;
}

}  // namespace

void sample_matches_cuda(const Tensor& matches, const Tensor& keys, const SampleSizes& sizes, const Tensor& indices,
                         const Tensor& positive_counts, const Tensor& counts) {
  const char* const op = "sample_matches";
  const CudaScope scope(matches);
  if (max_of(sizes.images, sizes.samples) > kMostRows) {
    fail(op, "batch_size_per_image must be at most " + std::to_string(kMostRows) + ", got " +
                 std::to_string(sizes.samples));
  }
  DETOPS_LAUNCH(sample_matches_kernel, static_cast<unsigned>(sizes.images), kThreads, 0, scope.stream(),
                matches.const_data_ptr<int64_t>(), keys.const_data_ptr<int32_t>(), static_cast<int>(sizes.anchors),
                static_cast<int>(sizes.samples), static_cast<int>(sizes.most_positives),
                indices.mutable_data_ptr<int64_t>(), positive_counts.mutable_data_ptr<int64_t>(),
                counts.mutable_data_ptr<int64_t>());
}

}  // namespace DETOPS_NAMESPACE
