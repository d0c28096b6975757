// decode_dfl on a GPU. Bins that lie side by side: eight neighbouring lanes share a row, so that they read whole
// sectors of memory. Else neighbouring threads have neighbouring rows, and each loops over the bins of its own.
#include "coders/decode_dfl.h"

#include "common/softmax_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kSharedRowLanes = 8;

// Where the logits of a row begin.
__device__ inline int64_t offset_of(int64_t row, const BinShape& shape) {
  if (shape.inner == 1) return row * shape.bins;
  return row / shape.inner * shape.bins * shape.inner + row % shape.inner;
}

template <int lanes, class S>
__global__ void decode_dfl_kernel(const S* logits, BinShape shape, int64_t rows, S* out) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  // All lanes of a warp take part in its shuffles: those beyond the end with the last row.
  const RowBins<S, lanes> bins{logits + offset_of(min_of(row, rows - 1), shape), shape.bins, shape.inner};
  const auto softmax = row_softmax<true>(bins);
  if (row < rows && threadIdx.x % lanes == 0) out[row] = static_cast<S>(softmax.mean);
}

template <int lanes, class S>
__global__ void decode_dfl_backward_kernel(const S* grad, const S* logits, BinShape shape, int64_t rows, S* out) {
  using T = ComputeType<S>;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t offset = offset_of(min_of(row, rows - 1), shape);
  const RowBins<S, lanes> bins{logits + offset, shape.bins, shape.inner};
  const auto softmax = row_softmax<true>(bins);
  if (row >= rows) return;
  const T scale = static_cast<T>(grad[row]) / softmax.sum;
  bins.each([&](int64_t bin) {
    const T e = fast_exp_of_nonpositive(bins.at(bin) - softmax.max);
    out[offset + bin * shape.inner] = static_cast<S>(scale * e * (static_cast<T>(bin) - softmax.mean));
  });
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
      DETOPS_LAUNCH((decode_dfl_kernel<decltype(lanes)::value, S>),
                    blocks_for("decode_dfl", "logits", shape.rows(), kThreads / lanes.value), kThreads, 0,
                    scope.stream(), logits.const_data_ptr<S>(), shape, shape.rows(), out.mutable_data_ptr<S>());
    });
  });
}

void decode_dfl_backward_cuda(const Tensor& grad, const Tensor& logits, const BinShape& shape, const Tensor& out) {
  const CudaScope scope(logits);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    dispatch_lanes(shape, [&](auto lanes) {
      DETOPS_LAUNCH((decode_dfl_backward_kernel<decltype(lanes)::value, S>),
                    blocks_for("decode_dfl", "logits", shape.rows(), kThreads / lanes.value), kThreads, 0,
                    scope.stream(), grad.const_data_ptr<S>(), logits.const_data_ptr<S>(), shape, shape.rows(),
                    out.mutable_data_ptr<S>());
    });
  });
}

}  // namespace DETOPS_NAMESPACE
