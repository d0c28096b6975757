// Kernels without faults that use every part of the emulation and compare with a plain loop. They must pass in every
// build, with every seed and every poison.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "cuda_on_cpu.h"

#define CHECK(condition)                                                    \
  if (!(condition)) {                                                       \
    fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    exit(1);                                                                \
  }

constexpr unsigned kFull = 0xffffffffu;

template <class T>
std::vector<T> counting(int count) {
  std::vector<T> values(count);
  std::iota(values.begin(), values.end(), T(1));
  return values;
}

// ---- indices

__global__ void index_kernel(unsigned* seen) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  seen[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

void test_indices() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  std::vector<unsigned> seen(12 * 60, 0);
  DETOPS_LAUNCH(index_kernel, grid, block, 0, nullptr, seen.data());
  for (unsigned i = 0; i < seen.size(); ++i) CHECK(seen[i] == i / 60 * 1000 + i % 60);
}

// ---- shared memory and the barriers of a block

template <class T>
__global__ void block_sum_kernel(const T* values, int count, T* sums) {
  DETOPS_SHARED(T, partial, 256);
  DETOPS_DYNAMIC_SHARED(T, copy);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  copy[threadIdx.x] = i < count ? values[i] : T(0);
  __syncthreads();
  partial[threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

template <class T>
void test_block_sum() {
  const std::vector<T> values = counting<T>(1000);
  std::vector<T> sums(4);
  DETOPS_LAUNCH((block_sum_kernel<T>), 4, 256, 256 * sizeof(T), nullptr, values.data(), 1000, sums.data());
  for (int block = 0; block < 4; ++block) {
    T expected = 0;
    for (int i = block * 256; i < std::min(1000, block * 256 + 256); ++i) expected += values[i];
    CHECK(sums[block] == expected);
  }
}

__global__ void predicate_barriers_kernel(int threshold, int* out) {
  const int above = static_cast<int>(threadIdx.x) >= threshold;
  const int any = __syncthreads_or(above), all = __syncthreads_and(above), count = __syncthreads_count(above);
  out[threadIdx.x] = any + 10 * all + 100 * count;
}

void test_predicate_barriers() {
  std::vector<int> out(96);
  const auto run = [&](int threshold, int expected) {
    DETOPS_LAUNCH(predicate_barriers_kernel, 1, 96, 0, nullptr, threshold, out.data());
    for (int value : out) CHECK(value == expected);
  };
  run(0, 9611);
  run(90, 601);
  run(96, 0);
}

// ---- warps

struct WarpResults {
  unsigned ballot, match;
  int any, all, index, up, down, exclusive_or, segment;
  float real;
  long long wide;
};

__global__ void warp_kernel(WarpResults* out) {
  const int lane = threadIdx.x % 32, value = static_cast<int>(threadIdx.x) * 3;
  WarpResults r;
  r.ballot = __ballot_sync(kFull, lane % 3 == 0);
  r.any = __any_sync(kFull, lane == 31);
  r.all = __all_sync(kFull, lane == 31);
  r.match = __match_any_sync(kFull, lane % 5);
  r.index = __shfl_sync(kFull, value, lane + 1);
  r.up = __shfl_up_sync(kFull, value, 2);
  r.down = __shfl_down_sync(kFull, value, 2, 8);
  r.exclusive_or = __shfl_xor_sync(kFull, value, 5);
  r.segment = __shfl_sync(kFull, value, 1, 4);
  r.real = __shfl_sync(kFull, value * 0.5f, 7);
  r.wide = __shfl_xor_sync(kFull, 1ll << lane, 1);
  // Half a warp on its own.
  if (lane < 16) r.any += static_cast<int>(10 * __reduce_max_sync(0xffffu, lane));
  out[threadIdx.x] = r;
}

void test_warps() {
  std::vector<WarpResults> out(64);
  DETOPS_LAUNCH(warp_kernel, 1, 64, 0, nullptr, out.data());
  for (int thread = 0; thread < 64; ++thread) {
    const WarpResults& r = out[thread];
    const int lane = thread % 32, base = thread - lane;
    unsigned ballot = 0, match = 0;
    for (int i = 0; i < 32; ++i) {
      ballot |= static_cast<unsigned>(i % 3 == 0) << i;
      match |= static_cast<unsigned>(i % 5 == lane % 5) << i;
    }
    CHECK(r.ballot == ballot && r.match == match && r.any == (lane < 16 ? 151 : 1) && r.all == 0);
    CHECK(r.index == 3 * (base + (lane + 1) % 32));
    CHECK(r.up == 3 * (lane >= 2 ? thread - 2 : thread));
    CHECK(r.down == 3 * (lane % 8 + 2 < 8 ? thread + 2 : thread));
    CHECK(r.exclusive_or == 3 * (base + (lane ^ 5)));
    CHECK(r.segment == 3 * (base + lane / 4 * 4 + 1));
    CHECK(r.real == 1.5f * static_cast<float>(base + 7) && r.wide == 1ll << (lane ^ 1));
  }
}

// Lanes pass values on through shared memory, ordered by __syncwarp alone: the whole warp first, then halves of it.
__global__ void warp_order_kernel(const int* values, int* out) {
  DETOPS_SHARED(int, cells, 64);
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  cells[threadIdx.x] = values[threadIdx.x];
  __syncwarp();
  int sum = cells[threadIdx.x ^ 31];
  __syncwarp();
  cells[threadIdx.x] = sum;
  __syncwarp(mask);
  sum += cells[threadIdx.x ^ 15];
  out[threadIdx.x] = sum;
}

void test_warp_order() {
  const std::vector<int> values = counting<int>(64);
  std::vector<int> out(64);
  DETOPS_LAUNCH(warp_order_kernel, 1, 64, 0, nullptr, values.data(), out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[i] == values[i ^ 31] + values[i ^ 31 ^ 15]);
}

// ---- atomics, between the threads of all blocks

struct Totals {
  unsigned count, bits;
  int smallest, largest;
  unsigned long long sum;
  float exact;
};

__global__ void atomics_kernel(Totals* totals) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&totals->count, 1);
  atomicOr(&totals->bits, 1u << i % 32);
  atomicMin(&totals->smallest, -i);
  atomicMax(&totals->largest, i);
  atomicAdd(&totals->sum, static_cast<unsigned long long>(i));
  atomicAdd(&totals->exact, 0.5f);  // exact, and so of one result
}

void test_atomics() {
  Totals totals{};
  DETOPS_LAUNCH(atomics_kernel, 8, 64, 0, nullptr, &totals);
  CHECK(totals.count == 512 && totals.bits == kFull && totals.smallest == -511 && totals.largest == 511);
  CHECK(totals.sum == 511 * 512 / 2 && totals.exact == 256.0f);
}

// Whole warps that have nothing to do may end early where no barrier follows.
__global__ void early_exit_kernel(int count, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  out[i] = i;
}

void test_early_exit() {
  std::vector<int> out(100, -1);
  DETOPS_LAUNCH(early_exit_kernel, 1, 128, 0, nullptr, 100, out.data());
  for (int i = 0; i < 100; ++i) CHECK(out[i] == i);
}

// ---- large shared memory, vectors, a block of the largest size

__global__ void vectors_kernel(const float4* in, float4* out) {
  DETOPS_DYNAMIC_SHARED(float4, cells);
  cells[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float4 v = cells[blockDim.x - 1 - threadIdx.x];
  out[threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
}

void test_vectors() {
  std::vector<float4> in(1024), out(1024);
  for (int i = 0; i < 1024; ++i) in[i] = make_float4(i, i + 0.25f, i + 0.5f, i + 0.75f);
  cudaFuncSetAttribute(reinterpret_cast<const void*>(vectors_kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                       100 * 1024);
  DETOPS_LAUNCH(vectors_kernel, 1, 1024, 100 * 1024, nullptr, in.data(), out.data());
  for (int i = 0; i < 1024; ++i) CHECK(out[i].x == in[1023 - i].w && out[i].w == in[1023 - i].x);
}

// ---- arithmetic and the runtime, on the host

void test_arithmetic() {
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __ffs(8) == 4 && __ffs(0) == 0 && __ffsll(1ll << 40) == 41);
  CHECK(__clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63 && __brev(1u) == 1u << 31 && __brevll(2) == 1ull << 62);
  CHECK(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f);
  CHECK(min(-1, 1u) == 1u && max(-1, 1) == 1 && max(NAN, 2.0f) == 2.0f && min(3.0, 2.0f) == 2.0);
}

void test_runtime() {
  int device = -1, multiprocessors = 0, host = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  CHECK(device == 0 && multiprocessors > 1);
  int cell = 7;
  cudaMemcpyAsync(&host, &cell, sizeof(cell), cudaMemcpyDeviceToHost, nullptr);
  CHECK(host != 7);
  cudaMemsetAsync(&cell, 0, sizeof(cell), nullptr);
  cudaStreamSynchronize(nullptr);
  CHECK(host == 7 && cell == 0 && cudaGetLastError() == cudaSuccess);
}

int main() {
  test_indices();
  test_block_sum<int>();
  test_block_sum<double>();
  test_predicate_barriers();
  test_warps();
  test_warp_order();
  test_atomics();
  test_early_exit();
  test_vectors();
  test_arithmetic();
  test_runtime();
  fputs(detops_emulated_kernels(), stdout);
}
