// The serial part of greedy suppression, 64 candidates at a time.
#pragma once

#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {

constexpr int kTile = 64;  // candidates resolved together: the bits of a word

__device__ inline uint64_t bits_below(int position) { return (uint64_t(1) << position) - 1; }

// Which candidates of a tile stay, called by one whole warp. Bit i of `undecided` is set if candidate i takes part.
// `low_suppressors` holds, in lane l, the candidates before l that suppress l if they stay; `high_suppressors` those of
// l + 32. Each step decides every candidate that nothing undecided can suppress, so the number of steps is the longest
// chain of boxes that suppress each other: mostly one to three. All lanes get the result.
__device__ inline uint64_t resolve_tile(uint64_t undecided, uint64_t low_suppressors, uint64_t high_suppressors) {
  const auto vote = [](bool low, bool high) {
    return uint64_t(__ballot_sync(kFullWarp, low)) | uint64_t(__ballot_sync(kFullWarp, high)) << kWarpSize;
  };
  uint64_t kept = 0;
  while (undecided) {
    const uint64_t free = undecided & ~vote(low_suppressors & undecided, high_suppressors & undecided);
    kept |= free;
    undecided &= ~free & ~vote(low_suppressors & kept, high_suppressors & kept);
  }
  return kept;
}

}  // namespace DETOPS_NAMESPACE
