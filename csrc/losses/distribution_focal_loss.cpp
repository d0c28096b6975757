// distribution_focal_loss: schema, checks, and the CPU kernels.
#include "losses/distribution_focal_loss.h"

#include "common/register.h"
#include "common/softmax_cpu.h"
#include "losses/loss_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class S, class T>
void loss_rows(const S* inputs, const T* targets, int64_t rows, int64_t bins, SoftmaxTile<T>& tile, T* losses) {
  read_softmax_rows(inputs, bins, 1, rows, tile.values.data());
  compute_softmax<false>(bins, tile);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const BinPair<T> pair = bins_around(targets[lane], bins);
    const S* const left = inputs + lane * bins + pair.left;
    const T target = pair.left_weight * (static_cast<T>(left[0]) - tile.max[lane]) +
                     pair.right_weight * (static_cast<T>(left[1]) - tile.max[lane]);
    losses[lane] = math::log(tile.sum[lane]) - target;
  }
}

template <class S, class T>
void gradient_rows(const S* inputs, const T* targets, int64_t rows, int64_t bins, const UpstreamView<S>& grad,
                   int64_t first, SoftmaxTile<T>& tile, S* out) {
  read_softmax_rows(inputs, bins, 1, rows, tile.values.data());
  compute_softmax<false>(bins, tile);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const T upstream = grad.at(first + lane), scale = upstream / tile.sum[lane];
    const T* const values = tile.values.data() + lane;
    S* const row = out + lane * bins;
    for (int64_t bin = 0; bin < bins; ++bin) row[bin] = static_cast<S>(values[bin * kSoftmaxRows] * scale);
    const BinPair<T> pair = bins_around(targets[lane], bins);
    const T* const left = values + pair.left * kSoftmaxRows;
    row[pair.left] = static_cast<S>(left[0] * scale - upstream * pair.left_weight);
    row[pair.left + 1] = static_cast<S>(left[kSoftmaxRows] * scale - upstream * pair.right_weight);
  }
}

// Calls body(first row, rows, tile) for [begin, end).
template <class T, class Body>
void each_tile(int64_t begin, int64_t end, int64_t bins, const Body& body) {
  SoftmaxTile<T> tile(bins);
  for (int64_t row = begin; row < end; row += kSoftmaxRows) body(row, min_of<int64_t>(kSoftmaxRows, end - row), tile);
}

void distribution_focal_loss_cpu(const Tensor& inputs, const Tensor& targets, Reduction reduction, const Tensor& out) {
  const int64_t bins = inputs.size(inputs.dim() - 1);
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const S* const input_data = inputs.const_data_ptr<S>();
    const T* const target_data = targets.const_data_ptr<T>();
    const auto fill = [&](int64_t begin, int64_t end, T* losses) {
      each_tile<T>(begin, end, bins, [&](int64_t row, int64_t rows, SoftmaxTile<T>& tile) {
        loss_rows(input_data + row * bins, target_data + row, rows, bins, tile, losses + (row - begin));
      });
    };
    write_losses(targets.numel(), reduction, out.mutable_data_ptr<S>(), fill);
  });
}

void distribution_focal_loss_backward_cpu(const Upstream& upstream, const Tensor& inputs, const Tensor& targets,
                                          const Tensor& out) {
  const int64_t bins = inputs.size(inputs.dim() - 1);
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const S* const input_data = inputs.const_data_ptr<S>();
    const T* const target_data = targets.const_data_ptr<T>();
    const UpstreamView<S> grad(upstream);
    S* const result = out.mutable_data_ptr<S>();
    parallel_ranges(targets.numel(), kLossBlock, [&](int64_t begin, int64_t end) {
      each_tile<T>(begin, end, bins, [&](int64_t row, int64_t rows, SoftmaxTile<T>& tile) {
        gradient_rows(input_data + row * bins, target_data + row, rows, bins, grad, row, tile, result + row * bins);
      });
    });
  });
}

// Checks the tensors and returns the targets, contiguous and in the compute type of the inputs.
Tensor checked_targets(const char* op, const Tensor& inputs, const Tensor& targets) {
  check_floating(op, "inputs", inputs);
  check_floating(op, "targets", targets);
  check_same_device(op, "targets", targets, "inputs", inputs);
  if (inputs.dim() == 0 || inputs.size(inputs.dim() - 1) < 2) {
    fail(op, "inputs must have shape [..., bins] with at least 2 bins, got " + shape_text(inputs));
  }
  const int64_t dims = inputs.dim() - 1, bins = inputs.size(dims);
  check_sizes(op, "targets", targets, leading_sizes(inputs, dims), " as inputs without the last dimension");
  const Tensor dense = as_dense(targets, compute_dtype(inputs.scalar_type()));
  if (!on_gpu(op, inputs)) {
    dispatch_compute_type(inputs.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* const data = dense.const_data_ptr<T>();
      for (int64_t i = 0; i < dense.numel(); ++i) {
        if (!outside_bins(data[i], bins)) continue;
        char target[32];  // with enough digits to tell it from the bound that it passes
        snprintf(target, sizeof(target), "%.17g", static_cast<double>(data[i]));
        fail(op, "targets must be from 0 to " + std::to_string(bins - 1) + ", got " + target);
      }
    });
  }
  return dense;
}

constexpr const char* kOp = "distribution_focal_loss";

Tensor distribution_focal_loss(const Tensor& inputs, const Tensor& targets, int64_t reduction_number) {
  const Reduction reduction = checked_reduction(kOp, reduction_number);
  const Tensor dense_targets = checked_targets(kOp, inputs, targets);
  const Tensor out = allocate_loss(kOp, sizes_of(targets), reduction, inputs.scalar_type(), inputs);
  if (out.numel() == 0) return out;
  if (on_gpu(kOp, inputs)) {
    DETOPS_GPU_ONLY(distribution_focal_loss_cuda(as_contiguous(inputs), dense_targets, reduction, out));
  } else {
    distribution_focal_loss_cpu(as_contiguous(inputs), dense_targets, reduction, out);
  }
  return out;
}

Tensor distribution_focal_loss_backward(const Tensor& grad, const Tensor& inputs, const Tensor& targets,
                                        int64_t reduction_number) {
  const Reduction reduction = checked_reduction(kOp, reduction_number);
  const Tensor dense_targets = checked_targets(kOp, inputs, targets);
  const Upstream upstream = checked_upstream(kOp, grad, sizes_of(targets), reduction, inputs.scalar_type(), inputs);
  const Tensor out = allocate(kOp, sizes_of(inputs), inputs.scalar_type(), inputs);
  if (out.numel() == 0) return out;
  if (on_gpu(kOp, inputs)) {
    DETOPS_GPU_ONLY(distribution_focal_loss_backward_cuda(upstream, as_contiguous(inputs), dense_targets, out));
  } else {
    distribution_focal_loss_backward_cpu(upstream, as_contiguous(inputs), dense_targets, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&distribution_focal_loss>("distribution_focal_loss(Tensor inputs, Tensor targets, int reduction) -> Tensor");
  ops.add<&distribution_focal_loss_backward>(
      "distribution_focal_loss_backward(Tensor grad, Tensor inputs, Tensor targets, int reduction) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
