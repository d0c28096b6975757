// distribution_focal_loss on a GPU: eight neighbouring lanes share a row, so that they read it in whole sectors of
// memory, and meet it again in the first-level cache.
#include "losses/distribution_focal_loss.h"

#include "common/softmax_cuda.cuh"
#include "losses/loss_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kRowLanes = 8;
constexpr int kBlockRows = kLossThreads / kRowLanes;

template <class S, class T>
__global__ void distribution_focal_loss_kernel(const S* inputs, const T* targets, int64_t rows, int64_t bins, S* out,
                                               double* sums) {
  double sum = 0;
  for (int step = 0; step < kLossSteps; ++step) {
    const int64_t row = (int64_t(blockIdx.x) * kLossSteps + step) * kBlockRows + threadIdx.x / kRowLanes;
    // All lanes of a warp take part in its shuffles: those beyond the end with the last row.
    const RowBins<S, kRowLanes> input{inputs + min_of(row, rows - 1) * bins, bins, 1};
    const RowSoftmax<T> softmax = row_softmax<false>(input);
    if (row >= rows || threadIdx.x % kRowLanes != 0) continue;
    const BinPair<T> pair = bins_around(targets[row], bins);
    const T left = input.at(pair.left) - softmax.max, right = input.at(pair.left + 1) - softmax.max;
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
  const RowBins<S, kRowLanes> input{inputs + min_of(row, rows - 1) * bins, bins, 1};
  const RowSoftmax<T> softmax = row_softmax<false>(input);
  if (row >= rows) return;
  const T upstream = outside_bins(targets[row], bins) ? T(0) : grad.at(row), scale = upstream / softmax.sum;
  const BinPair<T> pair = bins_around(targets[row], bins);
  input.each([&](int64_t bin) {
    const T value = fast_exp_of_nonpositive(input.at(bin) - softmax.max) * scale;
    out[row * bins + bin] = static_cast<S>(value - upstream * pair.of(bin));
  });
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
  const unsigned blocks = blocks_for("distribution_focal_loss", "the inputs", rows, kBlockRows);
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    DETOPS_LAUNCH((distribution_focal_loss_backward_kernel<S, T>), blocks, kLossThreads, 0, scope.stream(),
                  UpstreamView<S>(upstream), inputs.const_data_ptr<S>(), targets.const_data_ptr<T>(), rows, bins,
                  out.mutable_data_ptr<S>());
  });
}

}  // namespace DETOPS_NAMESPACE
