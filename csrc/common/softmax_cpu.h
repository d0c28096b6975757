// The softmax over bins of a few rows at once, so that the loops over the rows vectorise.
#pragma once

#include <vector>

#include "common/logistic.h"
#include "common/parallel_cpu.h"

namespace DETOPS_NAMESPACE {

constexpr int kSoftmaxRows = 32;

template <class T>
struct SoftmaxTile {
  std::vector<T> values;  // [bins][kSoftmaxRows]: the logits x, and then exp(x - max)
  T max[kSoftmaxRows], sum[kSoftmaxRows], mean[kSoftmaxRows];

  explicit SoftmaxTile(int64_t bins) : values(bins * kSoftmaxRows) {}
};

// Reads `count` rows of contiguous logits [outer, bins, inner], of which `first` is the first of the first row: rows
// lie `bins` apart, or side by side where inner is not 1. The rest of the rows is 0.
template <class S, class T>
DETOPS_CLONES void read_softmax_rows(const S* first, int64_t bins, int64_t inner, int64_t count,
                                     T* __restrict__ values) {
  if (inner == 1) {
    if (count < kSoftmaxRows) {
      for (int64_t i = 0; i < bins * kSoftmaxRows; ++i) values[i] = T(0);
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      const S* const row = first + lane * bins;
      for (int64_t bin = 0; bin < bins; ++bin) values[bin * kSoftmaxRows + lane] = static_cast<T>(row[bin]);
    }
    return;
  }
  for (int64_t bin = 0; bin < bins; ++bin) {
    const S* const row = first + bin * inner;
    T* const target = values + bin * kSoftmaxRows;
    for (int64_t lane = 0; lane < count; ++lane) target[lane] = static_cast<T>(row[lane]);
    for (int64_t lane = count; lane < kSoftmaxRows; ++lane) target[lane] = T(0);
  }
}

// Turns logits into exponentials. With `with_mean` it also finds the mean bin, each weighted by its exponential.
template <bool with_mean, class T>
DETOPS_CLONES void compute_softmax(int64_t bins, SoftmaxTile<T>& tile) {
  T* const values = tile.values.data();
  // Of its own, as what `tile` holds could be among the values for all that the compiler knows.
  T max[kSoftmaxRows], sum[kSoftmaxRows] = {}, moment[kSoftmaxRows] = {};
  for (int lane = 0; lane < kSoftmaxRows; ++lane) max[lane] = values[lane];
  for (int64_t bin = 1; bin < bins; ++bin) {
    const T* const row = values + bin * kSoftmaxRows;
    for (int lane = 0; lane < kSoftmaxRows; ++lane) max[lane] = max_of(max[lane], row[lane]);
  }
  for (int64_t bin = 0; bin < bins; ++bin) {
    T* const row = values + bin * kSoftmaxRows;
    const T number = static_cast<T>(bin);
#pragma GCC ivdep
    for (int lane = 0; lane < kSoftmaxRows; ++lane) {
      const T e = fast_exp_of_nonpositive(row[lane] - max[lane]);
      row[lane] = e;
      sum[lane] += e;
      if (with_mean) moment[lane] += number * e;
    }
  }
  for (int lane = 0; lane < kSoftmaxRows; ++lane) {
    tile.max[lane] = max[lane];
    tile.sum[lane] = sum[lane];
    if (with_mean) tile.mean[lane] = moment[lane] / sum[lane];
  }
}

}  // namespace DETOPS_NAMESPACE
