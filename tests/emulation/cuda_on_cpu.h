// CUDA's names for what machine.h does, so that a .cu file compiles with a plain C++ compiler and runs on the CPU.
//
//   __global__, __device__, ...        attributes of the host compiler, or nothing
//   threadIdx, blockDim, ...           what the running fiber says
//   DETOPS_SHARED, _DYNAMIC_SHARED     memory of the block, poisoned when the block begins
//   __syncthreads and its forms        machine.h's block_barrier             (this file)
//   votes, shuffles, matches           machine.h's WarpMeeting               (warp.h)
//   atomics, bit counting, min, max    compiler built-ins                    (arithmetic.h)
//   DETOPS_LAUNCH, cudaMemcpyAsync...  at once: a stream has no life of its own (this file, runtime_api.h)
//
// Only what csrc uses is here. What is missing on purpose: __shared__ (write DETOPS_SHARED), __activemask (its value
// means nothing), __threadfence, PTX.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "arithmetic.h"
#include "machine.h"
#include "runtime_api.h"
#include "vector_types.h"
#include "warp.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())
#define blockDim (::cuda_on_cpu::block_dimensions())
#define gridDim (::cuda_on_cpu::grid_dimensions())
constexpr int warpSize = ::cuda_on_cpu::kWarp;

// The address of the static constant identifies the array: one for each declaration and template instantiation, as in
// CUDA. A reference to an array rather than a pointer, so that UndefinedBehaviorSanitizer knows its bound.
#define DETOPS_SHARED(type, name, count)                                                               \
  using name##_type = type[count];                                                                     \
  static constexpr ::cuda_on_cpu::SharedArray name##_array{#name, sizeof(name##_type), alignof(type)}; \
  name##_type& name = *static_cast<name##_type*>(::cuda_on_cpu::shared_array(name##_array))

#define DETOPS_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::cuda_on_cpu::dynamic_shared_array(alignof(type)))

#define DETOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_on_cpu::KernelLaunch(#kernel, kernel, grid, block, shared_bytes, stream)(__VA_ARGS__)

// ---- barriers of the block

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::block_barrier("__syncthreads", 0, site);
}
inline int __syncthreads_or(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::block_barrier("__syncthreads_or", predicate, site).any;
}
inline int __syncthreads_and(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::block_barrier("__syncthreads_and", predicate, site).all;
}
inline int __syncthreads_count(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::block_barrier("__syncthreads_count", predicate, site).count;
}

// ---- launch

namespace cuda_on_cpu {

// A kernel with its launch configuration, to be called with the kernel's arguments: what <<< >>> makes. The arguments
// are converted and copied once, and each thread gets its own copy.
template <class... Parameters>
class KernelLaunch {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied bytewise");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA allows 4 KB of kernel parameters");

 public:
  using Kernel = void (*)(Parameters...);

  KernelLaunch(const char* text, Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t)
      : kernel_(kernel),
        launch_{text, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, &call_kernel, nullptr} {}

  void operator()(Parameters... parameters) {
    const Call call{kernel_, {parameters...}};
    launch_.arguments = &call;
    launch(launch_);
  }

 private:
  struct Call {
    Kernel kernel;
    std::tuple<Parameters...> parameters;
  };

  static void call_kernel(const void* arguments) {
    const Call& call = *static_cast<const Call*>(arguments);
    std::apply(call.kernel, call.parameters);
  }

  Kernel kernel_;
  Launch launch_;
};

}  // namespace cuda_on_cpu
