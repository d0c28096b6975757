// box_iou of rotated boxes on a GPU: one thread per pair.
#include "common/launch_cuda.cuh"
#include "iou/iou_ops.h"
#include "iou/rotated_iou.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void rotated_box_iou_kernel(const T* boxes1, const T* boxes2, bool aligned, IouShape shape, int64_t pairs,
                                       T* out) {
  const int64_t pair = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= pairs) return;
  int64_t first = 5 * pair, second = 5 * pair;
  if (!aligned) {
    const int64_t row = pair / shape.columns, image = row / shape.rows;
    first = image * shape.stride1 + 5 * (row - image * shape.rows);
    second = image * shape.stride2 + 5 * (pair - row * shape.columns);
  }
  out[pair] = rotated_iou(load_rotated_box<T>(boxes1 + first), load_rotated_box<T>(boxes2 + second));
}

}  // namespace

void rotated_box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, bool aligned, const IouShape& shape,
                          const Tensor& out) {
  const CudaScope scope(boxes1);
  const int64_t pairs = out.numel();
  const unsigned blocks = blocks_for("box_iou", "the boxes", pairs, kThreads);
  dispatch_compute_type(boxes1.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    DETOPS_LAUNCH((rotated_box_iou_kernel<T>), blocks, kThreads, 0, scope.stream(), boxes1.const_data_ptr<T>(),
                  boxes2.const_data_ptr<T>(), aligned, shape, pairs, out.mutable_data_ptr<T>());
  });
}

}  // namespace DETOPS_NAMESPACE
