// yolo_loss on a GPU: one thread per row, as most rows hold no object; its gradient: one thread per element.
#include "losses/loss_cuda.cuh"
#include "losses/yolo_loss.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class S, class T>
__global__ void yolo_loss_kernel(const S* predictions, const T* targets, int64_t rows, int64_t columns,
                                 YoloLossWeights<T> weights, S* out, double* sums) {
  double sum = 0;
  for (int step = 0; step < kLossSteps; ++step) {
    const int64_t row = (int64_t(blockIdx.x) * kLossSteps + step) * kLossThreads + threadIdx.x;
    if (row >= rows) continue;
    const T loss = yolo_loss_row(predictions + row * columns, targets + row * columns, columns, weights);
    if (sums == nullptr) out[row] = static_cast<S>(loss);
    sum += static_cast<double>(loss);
  }
  if (sums == nullptr) return;
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class S, class T>
__global__ void yolo_loss_backward_kernel(UpstreamView<S> grad, const S* predictions, const T* targets, int64_t count,
                                          int64_t columns, YoloLossWeights<T> weights, S* out) {
  const int64_t i = int64_t(blockIdx.x) * kLossThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / columns, k = i % columns;
  const bool object = targets[row * columns] > T(0);
  T slope = 0;
  if (object || k == 0) slope = yolo_loss_slope(k, static_cast<T>(predictions[i]), targets[i]);
  out[i] = static_cast<S>(grad.at(row) * (weights.of(k, object) * slope));
}

}  // namespace

void yolo_loss_cuda(const Tensor& predictions, const Tensor& targets, double lambda_coord, double lambda_noobj,
                    Reduction reduction, const Tensor& out) {
  const CudaScope scope(predictions);
  const int64_t columns = predictions.size(predictions.dim() - 1), rows = predictions.numel() / columns;
  dispatch_floating(predictions.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const YoloLossWeights<T> weights{static_cast<T>(lambda_coord), static_cast<T>(lambda_noobj)};
    reduce_losses<S>("yolo_loss", rows, kLossThreads * kLossSteps, reduction, scope, out,
                     [&](unsigned blocks, double* sums) {
                       DETOPS_LAUNCH((yolo_loss_kernel<S, T>), blocks, kLossThreads, 0, scope.stream(),
                                     predictions.const_data_ptr<S>(), targets.const_data_ptr<T>(), rows, columns,
                                     weights, out.mutable_data_ptr<S>(), sums);
                     });
  });
}

void yolo_loss_backward_cuda(const Upstream& upstream, const Tensor& predictions, const Tensor& targets,
                             double lambda_coord, double lambda_noobj, const Tensor& out) {
  const CudaScope scope(predictions);
  const int64_t columns = predictions.size(predictions.dim() - 1), count = predictions.numel();
  const unsigned blocks = blocks_for("yolo_loss", "predictions", count, kLossThreads);
  dispatch_floating(predictions.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const YoloLossWeights<T> weights{static_cast<T>(lambda_coord), static_cast<T>(lambda_noobj)};
    DETOPS_LAUNCH((yolo_loss_backward_kernel<S, T>), blocks, kLossThreads, 0, scope.stream(), UpstreamView<S>(upstream),
                  predictions.const_data_ptr<S>(), targets.const_data_ptr<T>(), count, columns, weights,
                  out.mutable_data_ptr<S>());
  });
}

}  // namespace DETOPS_NAMESPACE
