// Sorting inside a block.
#pragma once

#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {

// Sorts `count` keys in shared memory, ascending, with all threads of the block: a bitonic network. `count` is a power
// of two and at least 64. The caller puts a barrier before; the result is visible after it returns.
template <class Key>
__device__ void block_sort(Key* keys, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
        const int low = 2 * pair - (pair & (stride - 1));
        const int high = low + stride;
        const bool ascending = (low & size) == 0;
        const Key a = keys[low], b = keys[high];
        if ((b < a) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      // Up to stride 32 a warp works on 64 keys of its own, in this step and the next.
      const bool last = stride == 1 && size == count;
      const int next_stride = stride > 1 ? stride / 2 : size;
      if (stride > kWarpSize || next_stride > kWarpSize || last) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

}  // namespace DETOPS_NAMESPACE
