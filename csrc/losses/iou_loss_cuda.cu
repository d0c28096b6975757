// The IoU losses on a GPU: one thread for each pair of boxes.
#include "losses/iou_loss.h"
#include "losses/loss_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

// The four coordinates of box i, 16 bytes an access where `packed` says so.
template <class T>
__device__ inline Box<T> load_box_packed(const T* boxes, int64_t i, bool packed) {
  T values[4];
  for (int k = 0; k < 4; k += Pack<T>::kSize) load_pack(boxes + 4 * i + k, Pack<T>::kSize, packed, values + k);
  return {values[0], values[1], values[2], values[3]};
}
template <class T>
__device__ inline void store_box_packed(const Box<T>& box, int64_t i, bool packed, T* boxes) {
  const T values[4] = {box.x1, box.y1, box.x2, box.y2};
  for (int k = 0; k < 4; k += Pack<T>::kSize) store_pack(values + k, Pack<T>::kSize, packed, boxes + 4 * i + k);
}

template <IouLossKind kind, class T>
__global__ void iou_loss_kernel(const T* boxes1, const T* boxes2, int64_t count, T eps, bool packed, T* out,
                                double* sums) {
  double sum = 0;
  for (int step = 0; step < kLossSteps; ++step) {
    const int64_t i = (int64_t(blockIdx.x) * kLossSteps + step) * kLossThreads + threadIdx.x;
    if (i >= count) break;
    const T loss = iou_loss_value<kind>(load_box_packed(boxes1, i, packed), load_box_packed(boxes2, i, packed), eps);
    if (sums == nullptr) out[i] = loss;
    sum += static_cast<double>(loss);
  }
  if (sums == nullptr) return;
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <IouLossKind kind, class T>
__global__ void iou_loss_backward_kernel(UpstreamView<T> grad, const T* boxes1, const T* boxes2, int64_t count, T eps,
                                         bool packed, T* grad1, T* grad2) {
  const int64_t i = int64_t(blockIdx.x) * kLossThreads + threadIdx.x;
  if (i >= count) return;
  const PairGradient<T> gradient =
      iou_loss_gradient<kind>(load_box_packed(boxes1, i, packed), load_box_packed(boxes2, i, packed), eps, grad.at(i));
  if (grad1 != nullptr) store_box_packed(gradient.a, i, packed, grad1);
  if (grad2 != nullptr) store_box_packed(gradient.b, i, packed, grad2);
}

bool are_packed(const Tensor& boxes1, const Tensor& boxes2) {
  return is_aligned(boxes1.const_data_ptr()) && is_aligned(boxes2.const_data_ptr());
}

}  // namespace

void iou_loss_cuda(const Tensor& boxes1, const Tensor& boxes2, IouLossKind loss_kind, double eps, Reduction reduction,
                   const Tensor& out) {
  const CudaScope scope(boxes1);
  const int64_t count = boxes1.numel() / 4;
  dispatch_iou_loss(boxes1.scalar_type(), loss_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    reduce_losses<T>("iou_loss", count, kLossThreads * kLossSteps, reduction, scope, out,
                     [&](unsigned blocks, double* sums) {
                       DETOPS_LAUNCH((iou_loss_kernel<decltype(kind)::value, T>), blocks, kLossThreads, 0,
                                     scope.stream(), boxes1.const_data_ptr<T>(), boxes2.const_data_ptr<T>(), count,
                                     loss_eps<T>(eps), are_packed(boxes1, boxes2), out.mutable_data_ptr<T>(), sums);
                     });
  });
}

void iou_loss_backward_cuda(const Upstream& upstream, const Tensor& boxes1, const Tensor& boxes2, IouLossKind loss_kind,
                            double eps, const Tensor* grad1, const Tensor* grad2) {
  const CudaScope scope(boxes1);
  const int64_t count = boxes1.numel() / 4;
  const unsigned blocks = blocks_for("iou_loss", "the inputs", count, kLossThreads);
  dispatch_iou_loss(boxes1.scalar_type(), loss_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    DETOPS_LAUNCH((iou_loss_backward_kernel<decltype(kind)::value, T>), blocks, kLossThreads, 0, scope.stream(),
                  UpstreamView<T>(upstream), boxes1.const_data_ptr<T>(), boxes2.const_data_ptr<T>(), count,
                  loss_eps<T>(eps), are_packed(boxes1, boxes2), data_if_wanted<T>(grad1), data_if_wanted<T>(grad2));
  });
}

}  // namespace DETOPS_NAMESPACE
