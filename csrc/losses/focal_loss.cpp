// sigmoid, quality and varifocal loss: schema, checks, and the CPU kernels.
#include "losses/focal_loss.h"
#include "common/register.h"

#include <algorithm>
#include <optional>

#include "losses/loss_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

template <FocalKind kind, bool square, class T>
DETOPS_CLONES void focal_values(const T* inputs, const T* targets, int64_t count, FocalOptions<T> options,
                                T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) out[i] = focal_value<kind, square>(inputs[i], targets[i], options);
}

template <FocalKind kind, bool square, class T>
DETOPS_CLONES void focal_gradients(const T* inputs, const T* targets, int64_t count, FocalOptions<T> options,
                                   T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) out[i] = focal_gradient<kind, square>(inputs[i], targets[i], options);
}

// The targets of some inputs, as a dense block.
template <class S>
class FocalTargets {
 public:
  using T = ComputeType<S>;

  explicit FocalTargets(const FocalTensors& tensors)
      : classes_(tensors.classes),
        dense_(classes_ ? nullptr : tensors.targets.const_data_ptr<S>()),
        labels_(classes_ ? tensors.targets.const_data_ptr<int64_t>() : nullptr),
        scores_(tensors.scores.defined() ? tensors.scores.const_data_ptr<T>() : nullptr) {}

  // For inputs [begin, end); `buffer` may be used.
  const T* block(int64_t begin, int64_t end, T* buffer) const {
    if (dense_) return widened(dense_ + begin, end - begin, buffer);
    std::fill(buffer, buffer + (end - begin), T(0));
    for (int64_t row = begin / classes_; row * classes_ < end; ++row) {
      const int64_t label = labels_[row], i = row * classes_ + label;
      if (label >= 0 && label < classes_ && i >= begin && i < end) buffer[i - begin] = scores_ ? scores_[row] : T(1);
    }
    return buffer;
  }

  // Puts 0 where the results [begin, end) belong to an ignored row.
  template <class Result>
  void ignore(int64_t begin, int64_t end, Result* results) const {
    if (dense_) return;
    for (int64_t row = begin / classes_; row * classes_ < end; ++row) {
      if (class_counts(labels_[row], classes_)) continue;
      const int64_t first = max_of(row * classes_, begin), last = min_of((row + 1) * classes_, end);
      std::fill(results + (first - begin), results + (last - begin), static_cast<Result>(0.0f));
    }
  }

 private:
  int64_t classes_;
  const S* dense_;
  const int64_t* labels_;
  const T* scores_;
};

void focal_loss_cpu(const FocalTensors& tensors, FocalKind focal_kind, double alpha, double exponent,
                    Reduction reduction, const Tensor& out) {
  dispatch_floating(tensors.inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const auto options = focal_options<T>(focal_kind, alpha, exponent);
    const S* const inputs = tensors.inputs.const_data_ptr<S>();
    const FocalTargets<S> targets(tensors);
    dispatch_focal(focal_kind, [&](auto kind) {
      const auto values = options.square ? focal_values<kind.value, true, T> : focal_values<kind.value, false, T>;
      const auto fill = [&](int64_t begin, int64_t end, T* losses) {
        T wide_inputs[kLossBlock], block_targets[kLossBlock];
        values(widened(inputs + begin, end - begin, wide_inputs), targets.block(begin, end, block_targets), end - begin,
               options, losses);
        targets.ignore(begin, end, losses);
      };
      write_losses(tensors.inputs.numel(), reduction, out.mutable_data_ptr<S>(), fill);
    });
  });
}

void focal_loss_backward_cpu(const Upstream& upstream, const FocalTensors& tensors, FocalKind focal_kind, double alpha,
                             double exponent, const Tensor& out) {
  dispatch_floating(tensors.inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const auto options = focal_options<T>(focal_kind, alpha, exponent);
    const S* const inputs = tensors.inputs.const_data_ptr<S>();
    const FocalTargets<S> targets(tensors);
    const UpstreamView<S> grad(upstream);
    S* const result = out.mutable_data_ptr<S>();
    dispatch_focal(focal_kind, [&](auto kind) {
      const auto gradients =
          options.square ? focal_gradients<kind.value, true, T> : focal_gradients<kind.value, false, T>;
      const int64_t count = tensors.inputs.numel();
      parallel_ranges(ceil_div(count, kLossBlock), kLossGrain, [&](int64_t first, int64_t last) {
        T wide_inputs[kLossBlock], block_targets[kLossBlock], slopes[kLossBlock];
        for (int64_t block = first; block < last; ++block) {
          const int64_t begin = block * kLossBlock, end = min_of(begin + kLossBlock, count);
          gradients(widened(inputs + begin, end - begin, wide_inputs), targets.block(begin, end, block_targets),
                    end - begin, options, slopes);
          multiply(slopes, grad, begin, end, result);
          targets.ignore(begin, end, result + begin);
        }
      });
    });
  });
}

const char* focal_name(int64_t kind) {
  constexpr const char* kNames[] = {"sigmoid_focal_loss", "quality_focal_loss", "varifocal_loss"};
  if (kind < 0 || kind > 2) fail("focal_loss", "kind must be 0, 1 or 2, got " + std::to_string(kind));
  return kNames[kind];
}

FocalTensors checked_tensors(const char* op, FocalKind kind, const Tensor& inputs, const Tensor& targets,
                             const std::optional<Tensor>& scores) {
  check_floating(op, "inputs", inputs);
  check_same_device(op, "targets", targets, "inputs", inputs);
  const bool dense = is_floating(targets.scalar_type());
  if (dense && kind != FocalKind::kQuality) {
    check_sizes(op, "targets", targets, sizes_of(inputs), " as inputs");
    check_same_dtype(op, "targets", targets, "inputs", inputs);
    return {as_contiguous(inputs), as_contiguous(targets), Tensor(), 0};
  }
  if (kind == FocalKind::kVarifocal) check_floating(op, "targets", targets);
  check_integer(op, "targets", targets);
  if (inputs.dim() == 0) fail(op, "inputs must have shape [..., C] for class targets, got []");
  const int64_t dims = inputs.dim() - 1, classes = inputs.size(dims);
  const std::vector<int64_t> rows = leading_sizes(inputs, dims);
  check_sizes(op, "targets", targets, rows, " as inputs without the last dimension");
  const Tensor labels = as_dense(targets, ScalarType::Long);
  if (!on_gpu(op, inputs)) {
    const int64_t* const data = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < labels.numel(); ++i) {
      if (data[i] == -1 || class_counts(data[i], classes)) continue;
      fail(op,
           "targets must be from -1 to " + std::to_string(classes) + " (the classes), got " + std::to_string(data[i]));
    }
  }
  const int64_t row_length = max_of<int64_t>(1, classes);  // 0 would say that the targets are dense
  if (kind != FocalKind::kQuality) return {as_contiguous(inputs), labels, Tensor(), row_length};
  if (!scores.has_value()) fail(op, "scores must be given, got None");
  check_floating(op, "scores", *scores);
  check_same_device(op, "scores", *scores, "inputs", inputs);
  check_sizes(op, "scores", *scores, rows, " as targets");
  return {as_contiguous(inputs), labels, as_dense(*scores, compute_dtype(inputs.scalar_type())), row_length};
}

Tensor focal_loss(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& scores, int64_t kind_number,
                  double alpha, double exponent, int64_t reduction_number) {
  const char* const op = focal_name(kind_number);
  const FocalKind kind = static_cast<FocalKind>(kind_number);
  const Reduction reduction = checked_reduction(op, reduction_number);
  const FocalTensors tensors = checked_tensors(op, kind, inputs, targets, scores);
  const Tensor out = allocate_loss(op, sizes_of(inputs), reduction, inputs.scalar_type(), inputs);
  if (out.numel() == 0) return out;
  if (on_gpu(op, inputs)) {
    DETOPS_GPU_ONLY(focal_loss_cuda(tensors, kind, alpha, exponent, reduction, out));
  } else {
    focal_loss_cpu(tensors, kind, alpha, exponent, reduction, out);
  }
  return out;
}

Tensor focal_loss_backward(const Tensor& grad, const Tensor& inputs, const Tensor& targets,
                           const std::optional<Tensor>& scores, int64_t kind_number, double alpha, double exponent,
                           int64_t reduction_number) {
  const char* const op = focal_name(kind_number);
  const FocalKind kind = static_cast<FocalKind>(kind_number);
  const Reduction reduction = checked_reduction(op, reduction_number);
  const FocalTensors tensors = checked_tensors(op, kind, inputs, targets, scores);
  const std::vector<int64_t> sizes = sizes_of(inputs);
  const Upstream upstream = checked_upstream(op, grad, sizes, reduction, inputs.scalar_type(), inputs);
  const Tensor out = allocate(op, sizes, inputs.scalar_type(), inputs);
  if (inputs.numel() == 0) return out;
  if (on_gpu(op, inputs)) {
    DETOPS_GPU_ONLY(focal_loss_backward_cuda(upstream, tensors, kind, alpha, exponent, out));
  } else {
    focal_loss_backward_cpu(upstream, tensors, kind, alpha, exponent, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&focal_loss>(
      "focal_loss(Tensor inputs, Tensor targets, Tensor? scores, int kind, float alpha, float exponent, "
      "int reduction) -> Tensor");
  ops.add<&focal_loss_backward>(
      "focal_loss_backward(Tensor grad, Tensor inputs, Tensor targets, Tensor? scores, int kind, float alpha, "
      "float exponent, int reduction) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
