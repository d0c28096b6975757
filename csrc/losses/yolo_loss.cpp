// yolo_loss: schema, checks, and the CPU kernels.
#include "losses/yolo_loss.h"
#include "common/register.h"

#include "losses/loss_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

void yolo_loss_cpu(const Tensor& predictions, const Tensor& targets, double lambda_coord, double lambda_noobj,
                   Reduction reduction, const Tensor& out) {
  const int64_t columns = predictions.size(predictions.dim() - 1);
  dispatch_floating(predictions.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const YoloLossWeights<T> weights{static_cast<T>(lambda_coord), static_cast<T>(lambda_noobj)};
    const S* const prediction = predictions.const_data_ptr<S>();
    const T* const target = targets.const_data_ptr<T>();
    write_losses(predictions.numel() / columns, reduction, out.mutable_data_ptr<S>(),
                 [&](int64_t begin, int64_t end, T* losses) {
                   for (int64_t row = begin; row < end; ++row) {
                     losses[row - begin] =
                         yolo_loss_row(prediction + row * columns, target + row * columns, columns, weights);
                   }
                 });
  });
}

void yolo_loss_backward_cpu(const Upstream& upstream, const Tensor& predictions, const Tensor& targets,
                            double lambda_coord, double lambda_noobj, const Tensor& out) {
  const int64_t columns = predictions.size(predictions.dim() - 1);
  dispatch_floating(predictions.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const YoloLossWeights<T> weights{static_cast<T>(lambda_coord), static_cast<T>(lambda_noobj)};
    const S* const prediction = predictions.const_data_ptr<S>();
    const T* const target = targets.const_data_ptr<T>();
    const UpstreamView<S> grad(upstream);
    S* const result = out.mutable_data_ptr<S>();
    parallel_ranges(predictions.numel() / columns, kLossBlock, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const bool object = target[row * columns] > T(0);
        const T above = grad.at(row);
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t i = row * columns + k;
          const bool counts = object || k == 0;
          const T slope = counts ? yolo_loss_slope(k, static_cast<T>(prediction[i]), target[i]) : T(0);
          result[i] = static_cast<S>(above * (weights.of(k, object) * slope));
        }
      }
    });
  });
}

constexpr const char* kOp = "yolo_loss";

// Checks the tensors and returns the targets, contiguous and in the compute type of the predictions.
Tensor checked_targets(const Tensor& predictions, const Tensor& targets) {
  check_floating(kOp, "predictions", predictions);
  check_floating(kOp, "targets", targets);
  check_same_device(kOp, "targets", targets, "predictions", predictions);
  if (predictions.dim() == 0 || predictions.size(predictions.dim() - 1) < 5) {
    fail(kOp, "predictions must have shape [..., 5 + C], got " + shape_text(predictions));
  }
  check_sizes(kOp, "targets", targets, sizes_of(predictions), " as predictions");
  return as_dense(targets, compute_dtype(predictions.scalar_type()));
}

Tensor yolo_loss(const Tensor& predictions, const Tensor& targets, double lambda_coord, double lambda_noobj,
                 int64_t reduction_number) {
  const Reduction reduction = checked_reduction(kOp, reduction_number);
  const Tensor dense_targets = checked_targets(predictions, targets);
  const Tensor out = allocate_loss(kOp, leading_sizes(predictions, predictions.dim() - 1), reduction,
                                   predictions.scalar_type(), predictions);
  if (out.numel() == 0) return out;
  if (on_gpu(kOp, predictions)) {
    DETOPS_GPU_ONLY(
        yolo_loss_cuda(as_contiguous(predictions), dense_targets, lambda_coord, lambda_noobj, reduction, out));
  } else {
    yolo_loss_cpu(as_contiguous(predictions), dense_targets, lambda_coord, lambda_noobj, reduction, out);
  }
  return out;
}

Tensor yolo_loss_backward(const Tensor& grad, const Tensor& predictions, const Tensor& targets, double lambda_coord,
                          double lambda_noobj, int64_t reduction_number) {
  const Reduction reduction = checked_reduction(kOp, reduction_number);
  const Tensor dense_targets = checked_targets(predictions, targets);
  const Upstream upstream = checked_upstream(kOp, grad, leading_sizes(predictions, predictions.dim() - 1), reduction,
                                             predictions.scalar_type(), predictions);
  const Tensor out = allocate(kOp, sizes_of(predictions), predictions.scalar_type(), predictions);
  if (out.numel() == 0) return out;
  if (on_gpu(kOp, predictions)) {
    DETOPS_GPU_ONLY(
        yolo_loss_backward_cuda(upstream, as_contiguous(predictions), dense_targets, lambda_coord, lambda_noobj, out));
  } else {
    yolo_loss_backward_cpu(upstream, as_contiguous(predictions), dense_targets, lambda_coord, lambda_noobj, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&yolo_loss>(
      "yolo_loss(Tensor predictions, Tensor targets, float lambda_coord, float lambda_noobj, int reduction) -> Tensor");
  ops.add<&yolo_loss_backward>(
      "yolo_loss_backward(Tensor grad, Tensor predictions, Tensor targets, float lambda_coord, float lambda_noobj, "
      "int reduction) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
