// The IoU losses: schema, checks, and the CPU kernels.
#include "losses/iou_loss.h"
#include "common/register.h"

#include <tuple>
#include <type_traits>

#include "losses/loss_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

// As wide as the numbers, so that a loop over those vectorises.
template <class T>
using Flags = std::conditional_t<sizeof(T) == sizeof(int32_t), int32_t, int64_t>;

// All pairs as if they were ordinary, which has no branch, and then those that are not.
template <IouLossKind kind, class T>
DETOPS_CLONES void iou_loss_values(const T* boxes1, const T* boxes2, int64_t count, T eps, T* __restrict__ out) {
  Flags<T> unusual = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const LossParts<T> parts = loss_parts(load_box<T>(boxes1 + 4 * i), load_box<T>(boxes2 + 4 * i), eps);
    unusual |= parts.ordinary() ? 0 : 1;
    out[i] = loss_of_parts<kind>(parts, eps);
  }
  if (unusual == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    const Box<T> a = load_box<T>(boxes1 + 4 * i), b = load_box<T>(boxes2 + 4 * i);
    if (!loss_parts(a, b, eps).ordinary()) out[i] = iou_loss_value<kind>(a, b, eps);
  }
}

template <IouLossKind kind, bool first, bool second, class T>
DETOPS_CLONES void iou_loss_gradients(const T* boxes1, const T* boxes2, const UpstreamView<T>& grad, int64_t begin,
                                      int64_t end, T eps, T* __restrict__ grad1, T* __restrict__ grad2) {
  Flags<T> unusual = 0;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const Box<T> a = load_box<T>(boxes1 + 4 * i), b = load_box<T>(boxes2 + 4 * i);
    const LossParts<T> parts = loss_parts(a, b, eps);
    unusual |= parts.ordinary() ? 0 : 1;
    const PairGradient<T> gradient = gradient_of_parts<kind>(a, b, parts, eps, grad.at(i));
    if (first) store_box(gradient.a, grad1 + 4 * i);
    if (second) store_box(gradient.b, grad2 + 4 * i);
  }
  if (unusual == 0) return;
  for (int64_t i = begin; i < end; ++i) {
    const Box<T> a = load_box<T>(boxes1 + 4 * i), b = load_box<T>(boxes2 + 4 * i);
    if (loss_parts(a, b, eps).ordinary()) continue;
    const PairGradient<T> gradient = iou_loss_gradient<kind>(a, b, eps, grad.at(i));
    if (first) store_box(gradient.a, grad1 + 4 * i);
    if (second) store_box(gradient.b, grad2 + 4 * i);
  }
}

void iou_loss_cpu(const Tensor& boxes1, const Tensor& boxes2, IouLossKind loss_kind, double eps, Reduction reduction,
                  const Tensor& out) {
  dispatch_iou_loss(boxes1.scalar_type(), loss_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    const T *const data1 = boxes1.const_data_ptr<T>(), *const data2 = boxes2.const_data_ptr<T>();
    const auto fill = [&](int64_t begin, int64_t end, T* losses) {
      iou_loss_values<kind.value>(data1 + 4 * begin, data2 + 4 * begin, end - begin, loss_eps<T>(eps), losses);
    };
    write_losses(boxes1.numel() / 4, reduction, out.mutable_data_ptr<T>(), fill);
  });
}

void iou_loss_backward_cpu(const Upstream& upstream, const Tensor& boxes1, const Tensor& boxes2, IouLossKind loss_kind,
                           double eps, const Tensor* grad1, const Tensor* grad2) {
  dispatch_iou_loss(boxes1.scalar_type(), loss_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    const T *const data1 = boxes1.const_data_ptr<T>(), *const data2 = boxes2.const_data_ptr<T>();
    T *const out1 = data_if_wanted<T>(grad1), *const out2 = data_if_wanted<T>(grad2);
    const UpstreamView<T> grad(upstream);
    dispatch_wanted(grad1, grad2, [&](auto first, auto second) {
      parallel_ranges(boxes1.numel() / 4, kLossGrain * kLossBlock, [&](int64_t begin, int64_t end) {
        iou_loss_gradients<kind.value, first.value, second.value>(data1, data2, grad, begin, end, loss_eps<T>(eps),
                                                                  out1, out2);
      });
    });
  });
}

const char* iou_loss_name(int64_t kind) {
  constexpr const char* kNames[] = {"generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss",
                                    "efficient_box_iou_loss", "siou_loss"};
  if (kind < 0 || kind >= kIouLossKinds) fail("iou_loss", "kind must be from 0 to 4, got " + std::to_string(kind));
  return kNames[kind];
}

// Checks the boxes and returns the shape of the losses.
std::vector<int64_t> checked_pairs(const char* op, const Tensor& boxes1, const Tensor& boxes2) {
  if (boxes1.dim() == 0 || boxes1.size(boxes1.dim() - 1) != 4) {
    fail(op, "boxes1 must have shape [..., 4], got " + shape_text(boxes1));
  }
  check_sizes(op, "boxes2", boxes2, sizes_of(boxes1), " as boxes1");
  const ScalarType dtype = boxes1.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, "boxes1 must be float32 or float64, got " + dtype_name(dtype));
  }
  check_same_dtype(op, "boxes2", boxes2, "boxes1", boxes1);
  check_same_device(op, "boxes2", boxes2, "boxes1", boxes1);
  return leading_sizes(boxes1, boxes1.dim() - 1);
}

Tensor iou_loss(const Tensor& boxes1, const Tensor& boxes2, int64_t kind_number, double eps, int64_t reduction_number) {
  const char* const op = iou_loss_name(kind_number);
  const IouLossKind kind = static_cast<IouLossKind>(kind_number);
  const Reduction reduction = checked_reduction(op, reduction_number);
  const std::vector<int64_t> sizes = checked_pairs(op, boxes1, boxes2);
  const Tensor out = allocate_loss(op, sizes, reduction, boxes1.scalar_type(), boxes1);
  if (out.numel() == 0) return out;
  const Tensor dense1 = as_contiguous(boxes1), dense2 = as_contiguous(boxes2);
  if (on_gpu(op, boxes1)) {
    DETOPS_GPU_ONLY(iou_loss_cuda(dense1, dense2, kind, eps, reduction, out));
  } else {
    iou_loss_cpu(dense1, dense2, kind, eps, reduction, out);
  }
  return out;
}

std::tuple<Tensor, Tensor> iou_loss_backward(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                                             int64_t kind_number, double eps, int64_t reduction_number,
                                             bool boxes1_wanted, bool boxes2_wanted) {
  const char* const op = iou_loss_name(kind_number);
  const IouLossKind kind = static_cast<IouLossKind>(kind_number);
  const Reduction reduction = checked_reduction(op, reduction_number);
  const std::vector<int64_t> sizes = checked_pairs(op, boxes1, boxes2);
  const Upstream upstream = checked_upstream(op, grad, sizes, reduction, boxes1.scalar_type(), boxes1);
  const std::vector<int64_t> shape = sizes_of(boxes1), none{0};
  const Tensor grad1 = allocate(op, boxes1_wanted ? shape : none, boxes1.scalar_type(), boxes1);
  const Tensor grad2 = allocate(op, boxes2_wanted ? shape : none, boxes1.scalar_type(), boxes1);
  const Tensor *const wanted1 = boxes1_wanted ? &grad1 : nullptr, *const wanted2 = boxes2_wanted ? &grad2 : nullptr;
  if (boxes1.numel() == 0 || (!boxes1_wanted && !boxes2_wanted)) return {grad1, grad2};
  const Tensor dense1 = as_contiguous(boxes1), dense2 = as_contiguous(boxes2);
  if (on_gpu(op, boxes1)) {
    DETOPS_GPU_ONLY(iou_loss_backward_cuda(upstream, dense1, dense2, kind, eps, wanted1, wanted2));
  } else {
    iou_loss_backward_cpu(upstream, dense1, dense2, kind, eps, wanted1, wanted2);
  }
  return {grad1, grad2};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&iou_loss>("iou_loss(Tensor boxes1, Tensor boxes2, int kind, float eps, int reduction) -> Tensor");
  ops.add<&iou_loss_backward>(
      "iou_loss_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int kind, float eps, int reduction, "
      "bool boxes1_wanted=True, bool boxes2_wanted=True) -> (Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
