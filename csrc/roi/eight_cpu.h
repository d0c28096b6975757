// Eight numbers that are computed with together, and how eight times eight change places.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/host_device.h"

namespace DETOPS_NAMESPACE {

constexpr int64_t kPlanesTogether = 8;     // contiguous maps that are pooled together
constexpr int64_t kChannelsTogether = 64;  // neighbouring channels whose sums are kept in registers

template <class T>
struct EightOf {
  typedef T type __attribute__((vector_size(8 * sizeof(T))));
};
template <class T>
using Eight = typename EightOf<T>::type;

template <class S, class T>
DETOPS_HD void load_eight(const S* from, Eight<T>& to) {
  if constexpr (std::is_same_v<S, T>) {
    memcpy(&to, from, sizeof(to));
  } else {
    for (int lane = 0; lane < 8; ++lane) to[lane] = static_cast<T>(from[lane]);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DETOPS_HAS_SHUFFLE
#endif
#endif

// out[j * stride + i] = in[i][j]. Compilers do not find the shuffles that do it.
template <class T>
DETOPS_HD void transpose_eight(const Eight<T> (&in)[8], T* out, int64_t stride) {
#if defined(DETOPS_HAS_SHUFFLE)
  Eight<T> pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(in[i], in[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(in[i], in[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = __builtin_shufflevector(pairs[i], pairs[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 1] = __builtin_shufflevector(pairs[i], pairs[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    fours[i + 2] = __builtin_shufflevector(pairs[i + 1], pairs[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 3] = __builtin_shufflevector(pairs[i + 1], pairs[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int j = 0; j < 4; ++j) {
    const Eight<T> low = __builtin_shufflevector(fours[j], fours[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight<T> high = __builtin_shufflevector(fours[j], fours[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(out + j * stride, &low, sizeof(low));
    memcpy(out + (j + 4) * stride, &high, sizeof(high));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) out[j * stride + i] = in[i][j];
  }
#endif
}

// What was computed for the bins of `count` planes, eight planes next to each other, goes where it belongs.
template <class S, class T>
DETOPS_HD void store_planes(const T* bins, int64_t count, int64_t bins_of_plane, S* __restrict__ out) {
  int64_t done = 0;
  if constexpr (std::is_same_v<S, T>) {
    for (; count == 8 && done + 8 <= bins_of_plane; done += 8) {
      Eight<T> rows[8];
      memcpy(rows, bins + done * 8, sizeof(rows));
      transpose_eight(rows, out + done, bins_of_plane);
    }
  }
  for (int64_t plane = 0; plane < count; ++plane) {
    for (int64_t i = done; i < bins_of_plane; ++i) out[plane * bins_of_plane + i] = static_cast<S>(bins[i * 8 + plane]);
  }
}

// The columns begin .. begin+count-1 of a map's rows.
struct Columns {
  int begin, count;
};

// The columns begin .. end-1, extended to whole vectors where the map is wide enough.
inline Columns whole_columns(int begin, int end, int width) {
  const int whole = (end - begin + 7) / 8 * 8;
  if (whole > width) return {begin, end - begin};
  return {begin < width - whole ? begin : width - whole, whole};
}

}  // namespace DETOPS_NAMESPACE
