// The warp collectives. Each lane brings one value; when all lanes of the mask have come, each takes from the others'
// values what it needs. Only __syncwarp orders memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

namespace cuda_on_cpu {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "CUDA exchanges integers, float and double");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The lanes of the mask whose value is `bits`.
inline unsigned lanes_with(const WarpMeeting& meeting, unsigned mask, uint64_t bits) {
  unsigned lanes = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
    if (meeting.value_of(lane) == bits) lanes |= 1u << lane;
  }
  return lanes;
}

inline unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  const WarpMeeting meeting(name, mask, predicate, site);
  return lanes_with(meeting, mask, 1);
}

// The last lane of the segment of `width` lanes (a power of two) that holds `lane` is `lane | width - 1`.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int width, Site site, unsigned source, bool in_segment) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s at %s:%d: width must be a power of two up to 32, got %d", name, site.file, site.line, width);
  }
  const WarpMeeting meeting(name, mask, to_bits(value), site);
  return in_segment ? from_bits<T>(meeting.value_of(source)) : value;
}

template <class Combine>
unsigned reduce(const char* name, unsigned mask, unsigned value, Site site, Combine combine) {
  const WarpMeeting meeting(name, mask, value, site);
  unsigned result = static_cast<unsigned>(meeting.value_of(static_cast<unsigned>(__builtin_ctz(mask))));
  for (unsigned rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = combine(result, static_cast<unsigned>(meeting.value_of(static_cast<unsigned>(__builtin_ctz(rest)))));
  }
  return result;
}

}  // namespace cuda_on_cpu

#define DETOPS_SITE ::cuda_on_cpu::Site site = ::cuda_on_cpu::Site::here()

inline void __syncwarp(unsigned mask = 0xffffffffu, DETOPS_SITE) {
  cuda_on_cpu::WarpMeeting("__syncwarp", mask, 0, site, true);
}

// ---- votes and matches

inline unsigned __ballot_sync(unsigned mask, int predicate, DETOPS_SITE) {
  return cuda_on_cpu::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, DETOPS_SITE) {
  return cuda_on_cpu::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, DETOPS_SITE) {
  return cuda_on_cpu::vote("__all_sync", mask, predicate != 0, site) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, DETOPS_SITE) {
  const uint64_t bits = cuda_on_cpu::to_bits(value);
  const cuda_on_cpu::WarpMeeting meeting("__match_any_sync", mask, bits, site);
  return cuda_on_cpu::lanes_with(meeting, mask, bits);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal, DETOPS_SITE) {
  const uint64_t bits = cuda_on_cpu::to_bits(value);
  const cuda_on_cpu::WarpMeeting meeting("__match_all_sync", mask, bits, site);
  *all_equal = cuda_on_cpu::lanes_with(meeting, mask, bits) == mask;
  return *all_equal ? mask : 0;
}

// ---- shuffles, within segments of `width` lanes: a lane whose source is beyond its segment gets its own value

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, DETOPS_SITE) {
  const unsigned lane = cuda_on_cpu::lane_index(), inside = static_cast<unsigned>(width - 1);
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, width, site,
                              (lane & ~inside) | (static_cast<unsigned>(source) & inside), true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, DETOPS_SITE) {
  const unsigned lane = cuda_on_cpu::lane_index(), inside = static_cast<unsigned>(width - 1);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, width, site, lane - delta, (lane & inside) >= delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, DETOPS_SITE) {
  const unsigned lane = cuda_on_cpu::lane_index(), inside = static_cast<unsigned>(width - 1);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, width, site, lane + delta,
                              delta <= inside && (lane & inside) + delta <= inside);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, DETOPS_SITE) {
  const unsigned lane = cuda_on_cpu::lane_index(), inside = static_cast<unsigned>(width - 1);
  const unsigned source = (lane ^ static_cast<unsigned>(lane_mask)) & 31;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, width, site, source, source <= (lane | inside));
}

// ---- reductions of 32-bit integers (sm_80 and later)

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, DETOPS_SITE) {
  return cuda_on_cpu::reduce("__reduce_add_sync", mask, value, site, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, DETOPS_SITE) {
  return cuda_on_cpu::reduce("__reduce_min_sync", mask, value, site,
                             [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, DETOPS_SITE) {
  return cuda_on_cpu::reduce("__reduce_max_sync", mask, value, site,
                             [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, DETOPS_SITE) {
  return cuda_on_cpu::reduce("__reduce_or_sync", mask, value, site, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, DETOPS_SITE) {
  return cuda_on_cpu::reduce("__reduce_and_sync", mask, value, site, [](unsigned a, unsigned b) { return a & b; });
}

#undef DETOPS_SITE
