// What host and device code share: namespace, function qualifier, small arithmetic, compute types.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// The CUDA sources are compiled a second time for the CPU (tests/emulation). That library registers its ops in a
// torch namespace of its own, so that both can be loaded in one process.
#if defined(DETOPS_EMULATED)
#define DETOPS_NAMESPACE detops_emulated
#else
#define DETOPS_NAMESPACE detops
#endif

// Marks a function for host and device. Always inlined on the host too: the CPU loops are cloned per instruction set,
// and only what is inlined into a clone is compiled for it.
#if defined(__CUDACC__)
#define DETOPS_HD __host__ __device__ __forceinline__
#else
#define DETOPS_HD __attribute__((always_inline)) inline
#endif

namespace DETOPS_NAMESPACE {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The type in which values of type T are computed: float for everything but double.
template <class T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class T>
using ComputeType = typename ComputeTypeOf<T>::type;

// The second argument wins when one is NaN, as in the host's max instruction.
template <class T>
DETOPS_HD T max_of(T a, T b) {
  return a > b ? a : b;
}
template <class T>
DETOPS_HD T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
DETOPS_HD T ceil_div(T numerator, T denominator) {
  return (numerator + denominator - 1) / denominator;
}

template <class To, class From>
DETOPS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace DETOPS_NAMESPACE
