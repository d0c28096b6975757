// How the kernels of detops are written and launched. A small set of spellings that nvcc and the CPU emulation
// (tests/emulation) both understand, so that the same .cu files run on machines without a GPU:
//
//     template <class T>
//     __global__ void scale_kernel(T* values, int64_t count, T factor) {
//       DETOPS_SHARED(T, tile, 128);                  // T tile[128] in shared memory
//       DETOPS_DYNAMIC_SHARED(unsigned, counters);    // the bytes asked for at the launch
//       ...
//     }
//     DETOPS_LAUNCH((scale_kernel<float>), grid, block, shared_bytes, scope.stream(), values, count, factor);
//
// Barriers are written `__syncthreads();` and `__syncwarp();`, each needed. Only they and the end of the kernel order
// memory between threads: votes and shuffles do not.
#pragma once

#include "common/check.h"

#if defined(DETOPS_EMULATED)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

#define DETOPS_SHARED(type, name, count) __shared__ type name[count]
#define DETOPS_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char detops_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(detops_dynamic_shared)
#define DETOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)          \
  do {                                                                         \
    const auto detops_kernel = kernel;                                         \
    detops_kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::DETOPS_NAMESPACE::check_cuda(cudaGetLastError(), #kernel);               \
  } while (0)

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace DETOPS_NAMESPACE {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const bool no_memory = error == cudaErrorMemoryAllocation;
  fail(what,
       (no_memory ? std::string("CUDA out of memory: ") : std::string("CUDA error: ")) + cudaGetErrorString(error));
}

#if defined(DETOPS_EMULATED)
class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
// libtorch_cuda is not linked, so that one binary loads under a CPU-only torch too: the one function that is needed
// from it is looked up in the running process.
using CurrentStreamFunction = AOTITorchError (*)(int32_t, void**);

inline CurrentStreamFunction find_current_stream_function() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStreamFunction>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// Makes the device of a tensor the current one, and its current stream known, for as long as it lives.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    static const CurrentStreamFunction current_stream = find_current_stream_function();
    if (current_stream == nullptr) fail("detops", "libtorch_cuda's aoti_torch_get_current_cuda_stream was not found");
    // torch's guard sets the device of torch's CUDA runtime. Ours is linked statically and has its own notion.
    check_cuda(cudaSetDevice(tensor.get_device_index()), "cudaSetDevice");
    void* stream = nullptr;
    if (current_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
      fail("detops", "the current CUDA stream could not be read");
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#endif

// The blocks of a launch that handles `items`, `per_block` each. `argument` is what there is too much of, if so.
inline unsigned blocks_for(const char* op, const char* argument, int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  if (blocks > INT32_MAX) {
    fail(op, std::string(argument) + " must make at most 2147483647 blocks of threads, got " + std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

// The dynamic shared memory that a kernel may use on the current device must be raised above 48 KB by hand.
template <class Kernel>
void allow_shared_memory(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "cudaFuncSetAttribute");
}

// For flags that threads of one kernel set and read without a barrier between: each access is one whole value, and
// nothing about the order of accesses is promised.
template <class T>
__device__ inline T relaxed_load(const T* address) {
#if defined(DETOPS_EMULATED)
  return __atomic_load_n(address, __ATOMIC_RELAXED);
#else
  return *const_cast<const volatile T*>(address);
#endif
}
template <class T>
__device__ inline void relaxed_store(T* address, T value) {
#if defined(DETOPS_EMULATED)
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
#else
  *const_cast<volatile T*>(address) = value;
#endif
}

// The sum over a whole warp, in the order of a fixed tree. All lanes get it.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

}  // namespace DETOPS_NAMESPACE
