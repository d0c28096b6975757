// points.h for a GPU: the bounds of the blocks of points, and the search of those inside a box by the warps of a block.
#pragma once

#include "common/counted.h"
#include "common/launch_cuda.cuh"
#include "yolo/points.h"

namespace DETOPS_NAMESPACE {

static_assert(kPointBlock == kWarpSize);

// The bounds around those of all lanes, in all lanes. By whole warps.
template <class T>
__device__ Box<T> warp_bounds(Box<T> own) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const T x1 = __shfl_xor_sync(kFullWarp, own.x1, distance), y1 = __shfl_xor_sync(kFullWarp, own.y1, distance);
    const T x2 = __shfl_xor_sync(kFullWarp, own.x2, distance), y2 = __shfl_xor_sync(kFullWarp, own.y2, distance);
    own = {min_of(own.x1, x1), min_of(own.y1, y1), max_of(own.x2, x2), max_of(own.y2, y2)};
  }
  return own;
}

// The bounds of the block of points that a warp's lanes hold: `i` is the lane's point. By whole warps.
template <class T>
__device__ void store_bounds(const T* points, int64_t count, int64_t i, Box<T>* bounds) {
  Box<T> own = no_bounds<T>();
  if (i < count) extend(own, points[2 * i], points[2 * i + 1]);
  own = warp_bounds(own);
  if (i % kWarpSize == 0) bounds[i / kWarpSize] = own;
}

// Points that a warp has found and not yet looked at, in shared memory. A ring: what is written next lies where nobody
// has read since the barrier before the last.
class PointQueue {
 public:
  // A caller pops as soon as there are kWarpSize points, so that a push makes at most 2 kWarpSize - 1 of them; those of
  // the two pops before may still be read.
  static constexpr int kSize = 4 * kWarpSize;
  __device__ explicit PointQueue(int* slots)
      : slots_("PointQueue", "slots", slots, kSize), begin_(0), count_(0), lane_(threadIdx.x % kWarpSize) {}

  // With a point in each lane where `found`.
  __device__ void push(int point, bool found) {
    const unsigned vote = __ballot_sync(kFullWarp, found);
    if (found) slots_[(begin_ + count_ + __popc(vote & ((1u << lane_) - 1))) % kSize] = point;
    count_ += __popc(vote);
  }
  __device__ int count() const { return count_; }

  // The next point for each lane, -1 where there is none.
  __device__ int pop() {
    __syncwarp();
    const int point = lane_ < count_ ? slots_[(begin_ + lane_) % kSize] : -1;
    const int taken = count_ < kWarpSize ? count_ : kWarpSize;
    begin_ = (begin_ + taken) % kSize;
    count_ -= taken;
    return point;
  }

 private:
  Counted<int> slots_;
  int begin_, count_, lane_;
};

// Calls use(block), by whole warps, for all blocks of points for which may_hold(block) is true, ascending. The blocks
// are dealt out to the warps: this one is number `warp` of `warps`.
template <class MayHold, class Use>
__device__ void search_blocks(int64_t points, int warp, int warps, const MayHold& may_hold, const Use& use) {
  const int lane = threadIdx.x % kWarpSize;
  const auto blocks = static_cast<int>(ceil_div<int64_t>(points, kPointBlock));
  for (int first = 0; first < blocks; first += warps * kWarpSize) {
    const int block = first + lane * warps + warp;
    unsigned hits = __ballot_sync(kFullWarp, block < blocks && may_hold(block));
    for (; hits != 0; hits &= hits - 1) use(first + (__ffs(static_cast<int>(hits)) - 1) * warps + warp);
  }
}

}  // namespace DETOPS_NAMESPACE
