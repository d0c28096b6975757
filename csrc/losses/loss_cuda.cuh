// What the kernels of all losses share: sums in an order that depends on nothing but the number of losses. Each block
// sums up those that it computes, and one more block adds the blocks' sums.
#pragma once

#include "common/pack_cuda.cuh"
#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

constexpr int kLossThreads = 256;
constexpr int kLossSteps = 4;  // of each thread of a block

// The sum over a block of kLossThreads threads, for thread 0. Once in a kernel.
__device__ inline double sum_of_block(double value) {
  DETOPS_SHARED(double, sums, kLossThreads / kWarpSize);
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kFullWarp, value, offset);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kLossThreads / kWarpSize; ++warp) total += sums[warp];
  return total;
}

template <class S>
__global__ void loss_total_kernel(const double* sums, int64_t count, double divisor, S* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kLossThreads) sum += sums[i];
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *out = static_cast<S>(static_cast<ComputeType<S>>(sum / divisor));
}

// Calls launch(blocks, sums), which computes `count` losses, `per_block` by each block: into `out`, where `sums` is
// null, or else one sum a block, which are then reduced to `out`.
template <class S, class Launch>
void reduce_losses(const char* op, int64_t count, int64_t per_block, Reduction reduction, const CudaScope& scope,
                   const Tensor& out, const Launch& launch) {
  const unsigned blocks = blocks_for(op, "the inputs", count, per_block);
  if (reduction == Reduction::kNone) return launch(blocks, static_cast<double*>(nullptr));
  const Tensor sums = allocate(op, {blocks}, ScalarType::Double, out);
  double* const data = sums.mutable_data_ptr<double>();
  if (blocks > 0) launch(blocks, data);
  DETOPS_LAUNCH((loss_total_kernel<S>), 1, kLossThreads, 0, scope.stream(), data, int64_t(blocks),
                divisor(reduction, count), out.mutable_data_ptr<S>());
}

}  // namespace DETOPS_NAMESPACE
