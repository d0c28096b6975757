// Eight numbers that are computed with together, and how they reach memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/transpose_cpu.h"

namespace DETOPS_NAMESPACE {

constexpr int64_t kPlanesTogether = 8;     // contiguous maps that are pooled together
constexpr int64_t kChannelsTogether = 64;  // neighbouring channels whose sums are kept in registers

template <class S, class T>
DETOPS_HD void load_eight(const S* from, Eight<T>& to) {
  if constexpr (std::is_same_v<S, T>) {
    memcpy(&to, from, sizeof(to));
  } else {
    for (int lane = 0; lane < 8; ++lane) to[lane] = static_cast<T>(from[lane]);
  }
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
