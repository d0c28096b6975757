// Rows and columns of small matrices change places. Compilers do not find the shuffles that do it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DETOPS_HAS_SHUFFLE
#endif
#endif

namespace DETOPS_NAMESPACE {

// columns[c * stride + i] = rows[4 * i + c] for four rows. Four numbers at a time and not eight: without AVX2 compilers
// take many more instructions for the shuffles of eight.
DETOPS_HD void transpose_four(const float* rows, float* columns, int64_t stride) {
#if defined(DETOPS_HAS_SHUFFLE)
  typedef float Four __attribute__((vector_size(4 * sizeof(float))));
  Four a, b, c, d;  // not an array, which GCC would keep in memory
  memcpy(&a, rows, sizeof(Four));
  memcpy(&b, rows + 4, sizeof(Four));
  memcpy(&c, rows + 8, sizeof(Four));
  memcpy(&d, rows + 12, sizeof(Four));
  const Four low_ac = __builtin_shufflevector(a, c, 0, 4, 1, 5), high_ac = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  const Four low_bd = __builtin_shufflevector(b, d, 0, 4, 1, 5), high_bd = __builtin_shufflevector(b, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(low_ac, low_bd, 0, 4, 1, 5);
  b = __builtin_shufflevector(low_ac, low_bd, 2, 6, 3, 7);
  c = __builtin_shufflevector(high_ac, high_bd, 0, 4, 1, 5);
  d = __builtin_shufflevector(high_ac, high_bd, 2, 6, 3, 7);
  memcpy(columns, &a, sizeof(Four));
  memcpy(columns + stride, &b, sizeof(Four));
  memcpy(columns + 2 * stride, &c, sizeof(Four));
  memcpy(columns + 3 * stride, &d, sizeof(Four));
#else
  for (int i = 0; i < 4; ++i) {
    for (int c = 0; c < 4; ++c) columns[c * stride + i] = rows[4 * i + c];
  }
#endif
}

template <class T>
struct EightOf {
  typedef T type __attribute__((vector_size(8 * sizeof(T))));
};
template <class T>
using Eight = typename EightOf<T>::type;

// out[j * stride + i] = in[i][j]
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

}  // namespace DETOPS_NAMESPACE
