// Planted faults, chosen by name: test_emulation.py says for each how it must be found. "fine" runs all these kernels
// without their faults, which must pass everywhere.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 64;

// ---- memory order

template <bool kBug>
__global__ void missing_syncthreads_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads);
  cells[threadIdx.x] = threadIdx.x;
  if (!kBug) __syncthreads();
  out[threadIdx.x] = cells[kThreads - 1 - threadIdx.x];
}

// The loop's second barrier: without it a fast thread overwrites what a slow one still reads.
template <bool kBug>
__global__ void missing_second_syncthreads_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads);
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    cells[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    sum += cells[kThreads - 1 - threadIdx.x];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void missing_syncwarp_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads);
  cells[threadIdx.x] = threadIdx.x;
  if (!kBug) __syncwarp();
  out[threadIdx.x] = cells[threadIdx.x ^ 1];
}

// A vote waits for all lanes, but orders no memory.
template <bool kBug>
__global__ void vote_for_a_barrier_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads);
  cells[threadIdx.x] = threadIdx.x;
  __any_sync(kFull, true);
  if (!kBug) __syncwarp();
  out[threadIdx.x] = cells[threadIdx.x ^ 1];
}

// __syncwarp on half a warp does not order the other half.
template <bool kBug>
__global__ void syncwarp_of_half_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads);
  cells[threadIdx.x] = threadIdx.x;
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = cells[threadIdx.x ^ (kBug ? 16 : 1)];
}

// Every block writes the same cell.
template <bool kBug>
__global__ void race_between_blocks_kernel(int* out) {
  if (threadIdx.x == 0) out[kBug ? 0 : blockIdx.x] = blockIdx.x;
}

template <bool kBug>
__global__ void plain_beside_atomic_kernel(int* out) {
  if (!kBug || threadIdx.x > 0) {
    atomicAdd(&out[0], 1);
  } else {
    out[0] += 1;
  }
}

// ---- addresses

template <bool kBug>
__global__ void read_past_the_end_kernel(const int* values, int count, int* out) {
  const int i = threadIdx.x;
  if (kBug ? i <= count : i < count) out[i % kThreads] = values[i];
}

template <bool kBug>
__global__ void shared_overrun_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads);
  DETOPS_SHARED(int, other, kThreads);
  int* const begin = cells;
  begin[threadIdx.x + (kBug ? 1 : 0)] = threadIdx.x;
  other[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = begin[threadIdx.x + (kBug ? 1 : 0)] + other[threadIdx.x];
}

template <bool kBug>
__global__ void dynamic_shared_overrun_kernel(int* out) {
  DETOPS_DYNAMIC_SHARED(int, cells);
  cells[threadIdx.x + (kBug ? 1 : 0)] = threadIdx.x;
  out[threadIdx.x] = cells[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void misaligned_kernel(const int* values, int* out) {
  const int4 four = *reinterpret_cast<const int4*>(values + (kBug ? 1 : 0));
  out[threadIdx.x] = four.x;
}

template <bool kBug>
__global__ void signed_overflow_kernel(int* out) {
  int value = 0x7fffffff - (kBug ? 0 : kThreads);
  value += static_cast<int>(threadIdx.x) + 1;
  out[threadIdx.x] = value;
}

// ---- values

template <bool kBug>
__global__ void uninitialised_shared_kernel(int* out) {
  DETOPS_SHARED(int, cells, kThreads + 1);
  cells[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void uninitialised_counter_kernel(int* out) {
  DETOPS_SHARED(int, counter, 1);
  if (!kBug && threadIdx.x == 0) counter[0] = 0;
  __syncthreads();
  atomicAdd(&counter[0], 1);
  __syncthreads();
  out[threadIdx.x] = counter[0];
}

template <bool kBug>
__global__ void float_atomics_kernel(float* sum) {
  atomicAdd(sum, kBug ? 0.1f * static_cast<float>(threadIdx.x) : 0.5f);
}

// ---- control flow

template <bool kBug>
__global__ void divergent_barrier_kernel(int* out) {
  if (!kBug || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void two_barriers_kernel(int* out) {
  if (kBug && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void exit_before_barrier_kernel(int* out) {
  if (kBug && threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void barrier_and_warp_kernel(int* out) {
  if (kBug && threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void deadlock_kernel(int* out) {
  if (!kBug || threadIdx.x % 32 < 16) out[threadIdx.x] = __any_sync(kFull, 1);
  __syncthreads();
}

template <bool kBug>
__global__ void endless_kernel(int* out) {
  int left = kBug ? -1 : 5;
  while (__any_sync(kFull, left != 0)) left = kBug ? 1 : left - 1;
  out[threadIdx.x] = left;
}

template <bool kBug>
__global__ void mismatched_collectives_kernel(int* out) {
  if (kBug && threadIdx.x % 32 == 3) {
    out[threadIdx.x] = __any_sync(kFull, 1);
  } else {
    out[threadIdx.x] = __all_sync(kFull, 1);
  }
}

template <bool kBug>
__global__ void different_masks_kernel(int* out) {
  const unsigned mask = kBug && threadIdx.x % 32 < 16 ? 0x0001ffffu : kFull;
  out[threadIdx.x] = __any_sync(mask, 1);
}

template <bool kBug>
__global__ void absent_lane_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  if (lane < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, lane, kBug ? 20 : 3);
}

template <bool kBug>
__global__ void ended_lane_kernel(int* out) {
  if (kBug && threadIdx.x == 5) return;
  __syncwarp();
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void not_in_own_mask_kernel(int* out) {
  out[threadIdx.x] = __any_sync(kBug ? 0x0000ffffu : kFull, 1);
}

// ---- launches

__global__ void nothing_kernel() {}

template <bool kBug>
__global__ void static_shared_limit_kernel(int* out) {
  DETOPS_SHARED(int, cells, kBug ? 12 * 1024 + 1 : 12 * 1024);
  cells[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = cells[threadIdx.x];
}

// One fault by name, or all kernels without their faults.
template <bool kBug>
void run(const std::string& name) {
  const auto chosen = [&](const char* bug) { return !kBug || name == bug; };
  // Exactly as long as they must be, and each in an allocation of its own.
  std::vector<int> values(kThreads - 1, 1), out(kThreads, 0);
  float sum = 0;
  void* aligned = nullptr;
  if (posix_memalign(&aligned, 16, 5 * sizeof(int)) != 0) abort();
  memset(aligned, 0, 5 * sizeof(int));

#define RUN(bug, grid, block, shared_bytes, ...) \
  if (chosen(#bug)) DETOPS_LAUNCH((bug##_kernel<kBug>), grid, block, shared_bytes, nullptr, __VA_ARGS__)
#define RUN_ONE_BLOCK(bug) RUN(bug, 1, kThreads, 0, out.data())
  RUN_ONE_BLOCK(missing_syncthreads);
  RUN_ONE_BLOCK(missing_second_syncthreads);
  RUN_ONE_BLOCK(missing_syncwarp);
  RUN_ONE_BLOCK(vote_for_a_barrier);
  RUN_ONE_BLOCK(syncwarp_of_half);
  RUN_ONE_BLOCK(plain_beside_atomic);
  RUN_ONE_BLOCK(shared_overrun);
  RUN_ONE_BLOCK(signed_overflow);
  RUN_ONE_BLOCK(uninitialised_shared);
  RUN_ONE_BLOCK(uninitialised_counter);
  RUN_ONE_BLOCK(divergent_barrier);
  RUN_ONE_BLOCK(two_barriers);
  RUN_ONE_BLOCK(exit_before_barrier);
  RUN_ONE_BLOCK(barrier_and_warp);
  RUN_ONE_BLOCK(deadlock);
  RUN_ONE_BLOCK(endless);
  RUN_ONE_BLOCK(mismatched_collectives);
  RUN_ONE_BLOCK(different_masks);
  RUN_ONE_BLOCK(absent_lane);
  RUN_ONE_BLOCK(ended_lane);
  RUN_ONE_BLOCK(not_in_own_mask);
  RUN_ONE_BLOCK(static_shared_limit);
  RUN(race_between_blocks, 8, kThreads, 0, out.data());
  RUN(dynamic_shared_overrun, 1, kThreads, kThreads * sizeof(int), out.data());
  RUN(read_past_the_end, 1, kThreads, 0, values.data(), kThreads - 1, out.data());
  RUN(misaligned, 1, 1, 0, static_cast<int*>(aligned), out.data());
  RUN(float_atomics, 1, kThreads, 0, &sum);
  if (chosen("large_block")) DETOPS_LAUNCH(nothing_kernel, 1, kBug ? 1025 : 1024, 0, nullptr);
  if (chosen("empty_grid")) DETOPS_LAUNCH(nothing_kernel, kBug ? 0 : 1, 32, 0, nullptr);
  if (chosen("dynamic_shared_limit")) DETOPS_LAUNCH(nothing_kernel, 1, 32, 48 * 1024 + (kBug ? 1 : 0), nullptr);
  if (chosen("late_copy")) {
    cudaMemcpyAsync(out.data(), values.data(), sizeof(int), cudaMemcpyDeviceToHost, nullptr);
    if (!kBug) cudaStreamSynchronize(nullptr);
  }
  long total = 0;
  for (int value : out) total += value;
  printf("%ld\n", total);
  free(aligned);
}

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  name == "fine" ? run<false>(name) : run<true>(name);
}
