// What the entries of all losses share: the reduction, checks, and the gradient that comes in.
#pragma once

#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"

namespace DETOPS_NAMESPACE {

enum class Reduction : int64_t { kNone, kMean, kSum };

inline Reduction checked_reduction(const char* op, int64_t number) {
  if (number < 0 || number > 2) fail(op, "reduction must be 0, 1 or 2, got " + std::to_string(number));
  return static_cast<Reduction>(number);
}

// Losses of `sizes` elements, or their sum or mean.
inline Tensor allocate_loss(const char* op, const std::vector<int64_t>& sizes, Reduction reduction, ScalarType dtype,
                            const Tensor& like) {
  return allocate(op, reduction == Reduction::kNone ? sizes : std::vector<int64_t>{}, dtype, like);
}

// What a sum over `count` losses is divided by. The mean of none is 0.
inline double divisor(Reduction reduction, int64_t count) {
  return reduction == Reduction::kMean && count > 0 ? static_cast<double>(count) : 1.0;
}

// The gradient with respect to loss i is grad[i * step] * factor. One value for all, as that of a sum, has step 0.
struct Upstream {
  Tensor grad;
  int64_t step;
  double factor;
};

// The same, as loops and kernels read it.
template <class S>
struct UpstreamView {
  using T = ComputeType<S>;
  const S* grad;
  int64_t step;
  T factor;

  explicit UpstreamView(const Upstream& upstream)
      : grad(upstream.grad.const_data_ptr<S>()), step(upstream.step), factor(static_cast<T>(upstream.factor)) {}

  DETOPS_HD T at(int64_t i) const { return static_cast<T>(grad[i * step]) * factor; }
};

inline Upstream checked_upstream(const char* op, const Tensor& grad, const std::vector<int64_t>& sizes,
                                 Reduction reduction, ScalarType dtype, const Tensor& like) {
  const bool reduced = reduction != Reduction::kNone;
  check_sizes(op, "grad", grad, reduced ? std::vector<int64_t>{} : sizes, "");
  if (grad.scalar_type() != dtype) {
    fail(op, "grad must be " + dtype_name(dtype) + ", got " + dtype_name(grad.scalar_type()));
  }
  check_same_device(op, "grad", grad, "the inputs", like);
  int64_t count = 1;
  bool expanded = true;
  for (size_t i = 0; i < sizes.size(); ++i) {
    count *= sizes[i];
    // The gradient of loss.sum() is one value, expanded: it is not copied out.
    if (!reduced) expanded = expanded && (sizes[i] == 1 || grad.stride(static_cast<int64_t>(i)) == 0);
  }
  return {expanded ? grad : as_contiguous(grad), expanded ? 0 : 1, 1.0 / divisor(reduction, count)};
}

}  // namespace DETOPS_NAMESPACE
