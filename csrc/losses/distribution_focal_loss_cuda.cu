// distribution_focal_loss on a GPU: eight neighbouring lanes share a row, so that they read it in whole sectors of
// memory, and meet it again in the first-level cache.
#include "losses/distribution_focal_loss.h"
#include "losses/loss_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kRowLanes = 8;
constexpr int kBlockRows = kLossThreads / kRowLanes;

// The maximum of a row and the sum of exp(x - maximum): the same bits on all of its lanes.
template <class T>
struct RowSoftmax {
  T max, sum;
};
template <class S, class T = ComputeType<S>>
__device__ inline RowSoftmax<T> row_softmax(const S* row, int64_t bins) {
  T max = static_cast<T>(row[0]);
  for (int64_t bin = threadIdx.x % kRowLanes; bin < bins; bin += kRowLanes) max = max_of(max, static_cast<T>(row[bin]));
  for (int offset = 1; offset < kRowLanes; offset *= 2) max = max_of(max, __shfl_xor_sync(kFullWarp, max, offset));
  T sum = 0;
  for (int64_t bin = threadIdx.x % kRowLanes; bin < bins; bin += kRowLanes) {
    sum += exp_of_nonpositive(static_cast<T>(row[bin]) - max);
  }
  for (int offset = 1; offset < kRowLanes; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  return {max, sum};
}

template <class S, class T>
__global__ void distribution_focal_loss_kernel(const S* inputs, const T* targets, int64_t rows, int64_t bins, S* out,
                                               double* sums) {
  double sum = 0;
  for (int step = 0; step < kLossSteps; ++step) {
    const int64_t row = (int64_t(blockIdx.x) * kLossSteps + step) * kBlockRows + threadIdx.x / kRowLanes;
    // All lanes of a warp take part in its shuffles: those beyond the end with the last row.
    const S* const input = inputs + min_of(row, rows - 1) * bins;
    const RowSoftmax<T> softmax = row_softmax(input, bins);
    if (row >= rows || threadIdx.x % kRowLanes != 0) continue;
    const BinPair<T> pair = bins_around(targets[row], bins);
    const T left = static_cast<T>(input[pair.left]) - softmax.max;
    const T right = static_cast<T>(input[pair.left + 1]) - softmax.max;
    const T value = math::log(softmax.sum) - (pair.left_weight * left + pair.right_weight * right);
    const T loss = outside_bins(targets[row], bins) ? T(0) : value;
    if (sums == nullptr) out[row] = static_cast<S>(loss);
    sum += static_cast<double>(loss);
  }
  if (sums == nullptr) return;
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class S, class T>
__global__ void distribution_focal_loss_backward_kernel(UpstreamView<S> grad, const S* inputs, const T* targets,
                                                        int64_t rows, int64_t bins, S* out) {
  const int64_t row = int64_t(blockIdx.x) * kBlockRows + threadIdx.x / kRowLanes;
  const S* const input = inputs + min_of(row, rows - 1) * bins;
  const RowSoftmax<T> softmax = row_softmax(input, bins);
  if (row >= rows) return;
  const T upstream = outside_bins(targets[row], bins) ? T(0) : grad.at(row), scale = upstream / softmax.sum;
  const BinPair<T> pair = bins_around(targets[row], bins);
  for (int64_t bin = threadIdx.x % kRowLanes; bin < bins; bin += kRowLanes) {
    const T value = exp_of_nonpositive(static_cast<T>(input[bin]) - softmax.max) * scale;
    out[row * bins + bin] = static_cast<S>(value - upstream * pair.of(bin));
  }
}

}  // namespace

void distribution_focal_loss_cuda(const Tensor& inputs, const Tensor& targets, Reduction reduction, const Tensor& out) {
  const CudaScope scope(inputs);
  const int64_t rows = targets.numel(), bins = inputs.size(inputs.dim() - 1);
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    reduce_losses<S>("distribution_focal_loss", rows, kBlockRows * kLossSteps, reduction, scope, out,
                     [&](unsigned blocks, double* sums) {
                       DETOPS_LAUNCH((distribution_focal_loss_kernel<S, T>), blocks, kLossThreads, 0, scope.stream(),
                                     inputs.const_data_ptr<S>(), targets.const_data_ptr<T>(), rows, bins,
                                     out.mutable_data_ptr<S>(), sums);
                     });
  });
}

void distribution_focal_loss_backward_cuda(const Upstream& upstream, const Tensor& inputs, const Tensor& targets,
                                           const Tensor& out) {
  const CudaScope scope(inputs);
  const int64_t rows = targets.numel(), bins = inputs.size(inputs.dim() - 1);
  const int64_t blocks = ceil_div<int64_t>(rows, kBlockRows);
  if (blocks > INT32_MAX) fail("distribution_focal_loss", "inputs must have fewer rows, got " + std::to_string(rows));
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    DETOPS_LAUNCH((distribution_focal_loss_backward_kernel<S, T>), static_cast<unsigned>(blocks), kLossThreads, 0,
                  scope.stream(), UpstreamView<S>(upstream), inputs.const_data_ptr<S>(), targets.const_data_ptr<T>(),
                  rows, bins, out.mutable_data_ptr<S>());
  });
}

}  // namespace DETOPS_NAMESPACE
