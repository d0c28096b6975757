// What the kernels of all losses share: 16-byte accesses, and sums in an order that depends on nothing but the number
// of losses: each block sums up those that it computes, and one more block adds the blocks' sums.
#pragma once

#include "common/launch_cuda.cuh"
#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

constexpr int kLossThreads = 256;
constexpr int kLossSteps = 4;  // of each thread of a block

template <class S>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(S);
  S values[kSize];
};

// True for what may be read and written in packs.
inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(Pack<float>) == 0; }

// The first `count` of kSize values, 0 for the rest; in one access where all are there and `packed` says so.
template <class S, class T>
__device__ inline void load_pack(const S* source, int count, bool packed, T* values) {
  constexpr int kSize = Pack<S>::kSize;
  if (packed && count == kSize) {
    const Pack<S> pack = *reinterpret_cast<const Pack<S>*>(source);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = static_cast<T>(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = i < count ? static_cast<T>(source[i]) : T(0);
  }
}

template <class S, class T>
__device__ inline void store_pack(const T* values, int count, bool packed, S* target) {
  constexpr int kSize = Pack<S>::kSize;
  if (packed && count == kSize) {
    Pack<S> pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = static_cast<S>(values[i]);
    *reinterpret_cast<Pack<S>*>(target) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) target[i] = static_cast<S>(values[i]);
    }
  }
}

// The gradient that comes in.
template <class S>
struct UpstreamView {
  using T = ComputeType<S>;
  const S* grad;
  int64_t step;
  T factor;

  explicit UpstreamView(const Upstream& upstream)
      : grad(upstream.grad.const_data_ptr<S>()), step(upstream.step), factor(static_cast<T>(upstream.factor)) {}

  __device__ T at(int64_t i) const { return static_cast<T>(grad[i * step]) * factor; }
};

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
  const int64_t blocks = ceil_div(count, per_block);
  if (blocks > INT32_MAX) fail(op, "the inputs must make at most 2^31 blocks, got " + std::to_string(blocks));
  if (reduction == Reduction::kNone) return launch(static_cast<unsigned>(blocks), static_cast<double*>(nullptr));
  const Tensor sums = allocate(op, {blocks}, ScalarType::Double, out);
  double* const data = sums.mutable_data_ptr<double>();
  if (blocks > 0) launch(static_cast<unsigned>(blocks), data);
  DETOPS_LAUNCH((loss_total_kernel<S>), 1, kLossThreads, 0, scope.stream(), data, blocks, divisor(reduction, count),
                out.mutable_data_ptr<S>());
}

}  // namespace DETOPS_NAMESPACE
