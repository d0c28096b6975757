// decode_dfl on a GPU. Bins that lie side by side: eight neighbouring lanes share a row, so that they read whole
// sectors of memory. Else neighbouring threads have neighbouring rows, and each loops over the bins of its own.
#include "coders/decode_dfl.h"

#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kSharedRowLanes = 8;

// One row: the bins of this lane.
template <class S, int lanes>
struct RowBins {
  const S* first;
  int64_t bins, step;

  template <class Body>
  __device__ void each(const Body& body) const {
    for (int64_t bin = threadIdx.x % lanes; bin < bins; bin += lanes) body(bin);
  }
  __device__ ComputeType<S> at(int64_t bin) const { return static_cast<ComputeType<S>>(first[bin * step]); }
};

// Where the logits of a row begin.
__device__ inline int64_t offset_of(int64_t row, const BinShape& shape) {
  if (shape.inner == 1) return row * shape.bins;
  return row / shape.inner * shape.bins * shape.inner + row % shape.inner;
}

// The same bits on all lanes of a row.
template <class T>
struct RowSoftmax {
  T max, sum, mean;
};
template <class S, int lanes, class T = ComputeType<S>>
__device__ inline RowSoftmax<T> row_softmax(const RowBins<S, lanes>& row) {
  T max = row.at(0), sum = 0, moment = 0;
  row.each([&](int64_t bin) { max = max_of(max, row.at(bin)); });
  for (int offset = 1; offset < lanes; offset *= 2) max = max_of(max, __shfl_xor_sync(kFullWarp, max, offset));
  row.each([&](int64_t bin) {
    const T e = exp_of_nonpositive(row.at(bin) - max);
    sum += e;
    moment += static_cast<T>(bin) * e;
  });
  for (int offset = 1; offset < lanes; offset *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
    moment += __shfl_xor_sync(kFullWarp, moment, offset);
  }
  return {max, sum, moment / sum};
}

template <int lanes, class S>
__global__ void decode_dfl_kernel(const S* logits, BinShape shape, int64_t rows, S* out) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  // All lanes of a warp take part in its shuffles: those beyond the end with the last row.
  const RowBins<S, lanes> bins{logits + offset_of(min_of(row, rows - 1), shape), shape.bins, shape.inner};
  const auto softmax = row_softmax(bins);
  if (row < rows && threadIdx.x % lanes == 0) out[row] = static_cast<S>(softmax.mean);
}

template <int lanes, class S>
__global__ void decode_dfl_backward_kernel(const S* grad, const S* logits, BinShape shape, int64_t rows, S* out) {
  using T = ComputeType<S>;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t offset = offset_of(min_of(row, rows - 1), shape);
  const RowBins<S, lanes> bins{logits + offset, shape.bins, shape.inner};
  const auto softmax = row_softmax(bins);
  if (row >= rows) return;
  const T scale = static_cast<T>(grad[row]) / softmax.sum;
  bins.each([&](int64_t bin) {
    const T e = exp_of_nonpositive(bins.at(bin) - softmax.max);
    out[offset + bin * shape.inner] = static_cast<S>(scale * e * (static_cast<T>(bin) - softmax.mean));
  });
}

unsigned blocks_for(const BinShape& shape, int lanes) {
  const int64_t blocks = ceil_div<int64_t>(shape.rows(), kThreads / lanes);
  if (blocks > INT32_MAX) fail("decode_dfl", "logits must have fewer rows, got " + std::to_string(shape.rows()));
  return static_cast<unsigned>(blocks);
}

// Calls body(integral constant of the lanes of a row).
template <class Body>
void dispatch_lanes(const BinShape& shape, const Body& body) {
  if (shape.inner == 1) return body(std::integral_constant<int, kSharedRowLanes>{});
  body(std::integral_constant<int, 1>{});
}

}  // namespace

void decode_dfl_cuda(const Tensor& logits, const BinShape& shape, const Tensor& out) {
  const CudaScope scope(logits);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    dispatch_lanes(shape, [&](auto lanes) {
      DETOPS_LAUNCH((decode_dfl_kernel<decltype(lanes)::value, S>), blocks_for(shape, lanes.value), kThreads, 0,
                    scope.stream(), logits.const_data_ptr<S>(), shape, shape.rows(), out.mutable_data_ptr<S>());
    });
  });
}

void decode_dfl_backward_cuda(const Tensor& grad, const Tensor& logits, const BinShape& shape, const Tensor& out) {
  const CudaScope scope(logits);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    dispatch_lanes(shape, [&](auto lanes) {
      DETOPS_LAUNCH((decode_dfl_backward_kernel<decltype(lanes)::value, S>), blocks_for(shape, lanes.value), kThreads,
                    0, scope.stream(), grad.const_data_ptr<S>(), logits.const_data_ptr<S>(), shape, shape.rows(),
                    out.mutable_data_ptr<S>());
    });
  });
}

}  // namespace DETOPS_NAMESPACE
