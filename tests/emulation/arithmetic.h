// Atomics, bit counting, casts, and the overloads of min and max that CUDA puts into the global namespace.
//
// Atomics order nothing else (memory_order_relaxed, as in CUDA), which ThreadSanitizer takes at their word.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

// ---- atomics: they return the old value

namespace cuda_on_cpu {

// Makes a function parameter follow the type of another, as in CUDA's overloads: atomicAdd(&count, 1) on unsigned.
template <class T>
struct Same {
  using type = T;
};
template <class T>
using SameAs = typename Same<T>::type;

template <class T>
constexpr bool is_atomic_integer =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

// Replaces the value by update(value).
template <class T, class Update>
T atomic_update(T* address, Update update) {
  static_assert(is_atomic_integer<T> || std::is_floating_point_v<T>, "CUDA has no such atomic");
  before_atomic(address, sizeof(T));
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// A rounded sum depends on the order of the threads; an exact one does not.
template <class T>
T exact_sum(T a, T b) {
  const T sum = a + b, b_in_sum = sum - a;
  const T lost = (a - (sum - b_in_sum)) + (b - b_in_sum);
  if (std::isfinite(a) && std::isfinite(b) && lost != T(0)) {
    fail("atomicAdd of floating-point numbers rounds (%.9g + %.9g): the result depends on the schedule",
         static_cast<double>(a), static_cast<double>(b));
  }
  return sum;
}

}  // namespace cuda_on_cpu

template <class T>
T atomicAdd(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T old) -> T {
    if constexpr (std::is_floating_point_v<T>) {
      return cuda_on_cpu::exact_sum(old, value);
    } else {
      using Unsigned = std::make_unsigned_t<T>;  // wraps
      return static_cast<T>(static_cast<Unsigned>(old) + static_cast<Unsigned>(value));
    }
  });
}
template <class T>
T atomicSub(T* address, cuda_on_cpu::SameAs<T> value) {
  using Unsigned = std::make_unsigned_t<T>;
  return cuda_on_cpu::atomic_update(
      address, [value](T old) { return static_cast<T>(static_cast<Unsigned>(old) - static_cast<Unsigned>(value)); });
}
template <class T>
T atomicMin(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T old) { return value > old ? value : old; });
}
template <class T>
T atomicAnd(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T old) { return old | value; });
}
template <class T>
T atomicXor(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* address, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, cuda_on_cpu::SameAs<T> expected, cuda_on_cpu::SameAs<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

// ---- bits

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (v >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long v) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(v))) << 32 |
         __brev(static_cast<unsigned>(v >> 32));
}

// ---- casts and loads

namespace cuda_on_cpu {

template <class To, class From>
To reinterpret_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace cuda_on_cpu

inline int __float_as_int(float v) { return cuda_on_cpu::reinterpret_bits<int>(v); }
inline float __int_as_float(int v) { return cuda_on_cpu::reinterpret_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return cuda_on_cpu::reinterpret_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_cpu::reinterpret_bits<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_cpu::reinterpret_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_cpu::reinterpret_bits<double>(v); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- min and max: unsigned wins over signed, and a number over NaN

#define DETOPS_MIN_MAX(result, a_type, b_type)                                                                \
  inline result min(a_type a, b_type b) {                                                                     \
    return static_cast<result>(a) < static_cast<result>(b) ? static_cast<result>(a) : static_cast<result>(b); \
  }                                                                                                           \
  inline result max(a_type a, b_type b) {                                                                     \
    return static_cast<result>(a) > static_cast<result>(b) ? static_cast<result>(a) : static_cast<result>(b); \
  }

DETOPS_MIN_MAX(int, int, int)
DETOPS_MIN_MAX(unsigned, unsigned, unsigned)
DETOPS_MIN_MAX(unsigned, int, unsigned)
DETOPS_MIN_MAX(unsigned, unsigned, int)
DETOPS_MIN_MAX(long, long, long)
DETOPS_MIN_MAX(unsigned long, unsigned long, unsigned long)
DETOPS_MIN_MAX(unsigned long, long, unsigned long)
DETOPS_MIN_MAX(unsigned long, unsigned long, long)
DETOPS_MIN_MAX(long long, long long, long long)
DETOPS_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
DETOPS_MIN_MAX(unsigned long long, long long, unsigned long long)
DETOPS_MIN_MAX(unsigned long long, unsigned long long, long long)

#undef DETOPS_MIN_MAX

inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(float a, double b) { return std::fmin(static_cast<double>(a), b); }
inline double max(float a, double b) { return std::fmax(static_cast<double>(a), b); }
inline double min(double a, float b) { return std::fmin(a, static_cast<double>(b)); }
inline double max(double a, float b) { return std::fmax(a, static_cast<double>(b)); }

using std::isfinite;
using std::isinf;
using std::isnan;
