// The softmax over the bins of a row, by a few neighbouring lanes of a warp or by one thread.
#pragma once

#include "common/launch_cuda.cuh"
#include "common/logistic.h"

namespace DETOPS_NAMESPACE {

// One row, whose bins lie `step` apart. Each of its lanes, a power of two of them, has every so many of the bins.
template <class S, int lanes>
struct RowBins {
  const S* first;
  int64_t bins, step;

  // Calls body(bin) for the bins of this lane.
  template <class Body>
  __device__ void each(const Body& body) const {
    for (int64_t bin = threadIdx.x % lanes; bin < bins; bin += lanes) body(bin);
  }
  __device__ ComputeType<S> at(int64_t bin) const { return static_cast<ComputeType<S>>(first[bin * step]); }
};

// The maximum, the sum of exp(x - max), and with `with_mean` the mean bin, each weighted by its exponential. The same
// bits on all lanes of a row. All lanes of the warp take part.
template <class T>
struct RowSoftmax {
  T max, sum, mean;
};
template <bool with_mean, class S, int lanes, class T = ComputeType<S>>
__device__ inline RowSoftmax<T> row_softmax(const RowBins<S, lanes>& row) {
  T max = row.at(0), sum = 0, moment = 0;
  row.each([&](int64_t bin) { max = max_of(max, row.at(bin)); });
  for (int offset = 1; offset < lanes; offset *= 2) max = max_of(max, __shfl_xor_sync(kFullWarp, max, offset));
  row.each([&](int64_t bin) {
    const T e = fast_exp_of_nonpositive(row.at(bin) - max);
    sum += e;
    if (with_mean) moment += static_cast<T>(bin) * e;
  });
  for (int offset = 1; offset < lanes; offset *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
    if (with_mean) moment += __shfl_xor_sync(kFullWarp, moment, offset);
  }
  return {max, sum, with_mean ? moment / sum : T(0)};
}

}  // namespace DETOPS_NAMESPACE
