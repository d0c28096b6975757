// Accesses of 16 bytes, the most that a thread reads or writes at once.
#pragma once

#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {

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

}  // namespace DETOPS_NAMESPACE
