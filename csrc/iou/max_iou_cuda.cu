// max_iou on a GPU: one thread per first box, the second boxes in shared memory, no matrix.
#include "common/launch_cuda.cuh"
#include "iou/iou_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void max_iou_kernel(const T* boxes1, const T* boxes2, const bool* valid, IouShape shape, int row_blocks,
                               T* values, int64_t* indices) {
  DETOPS_SHARED(Box<T>, others, kThreads);
  DETOPS_SHARED(T, areas, kThreads);
  DETOPS_SHARED(bool, usable, kThreads);
  const int64_t image = blockIdx.x / row_blocks;
  const int64_t row = int64_t(blockIdx.x % row_blocks) * kThreads + threadIdx.x;
  const bool in_range = row < shape.rows;
  const Box<T> box = load_box<T>(boxes1 + image * shape.stride1 + 4 * (in_range ? row : 0));
  const T area = box_area(box);
  T best = T(0), quick = T(0);  // only an intersection of at least quick * union can be better
  int best_index = -1;
  for (int64_t first = 0; first < shape.columns; first += kThreads) {
    const int64_t column = first + threadIdx.x;
    if (column < shape.columns) {
      others[threadIdx.x] = load_box<T>(boxes2 + image * shape.stride2 + 4 * column);
      areas[threadIdx.x] = box_area(others[threadIdx.x]);
      usable[threadIdx.x] = valid == nullptr || valid[image * shape.columns + column];
    }
    __syncthreads();
    const int count = static_cast<int>(min_of<int64_t>(kThreads, shape.columns - first));
    for (int j = 0; j < count; ++j) {
      if (!usable[j]) continue;
      if (best_index < 0) best_index = static_cast<int>(first) + j;
      if (!may_exceed(box, area, others[j], areas[j], quick)) continue;
      const T iou = pair_iou(box, area, others[j], areas[j]);
      if (is_better_match(iou, best)) {
        best = iou;
        quick = iou * kSlightlyLess<T>;
        best_index = static_cast<int>(first) + j;
      }
    }
    __syncthreads();
  }
  if (!in_range) return;
  values[image * shape.rows + row] = best;
  indices[image * shape.rows + row] = best_index;
}

}  // namespace

void max_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, const Tensor* valid, const IouShape& shape,
                  const Tensor& values, const Tensor& indices) {
  const CudaScope scope(boxes1);
  dispatch_compute_type(boxes1.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int row_blocks = static_cast<int>(ceil_div<int64_t>(shape.rows, kThreads));
    const unsigned blocks = blocks_for("max_iou", "boxes1", shape.batch * row_blocks, 1);
    DETOPS_LAUNCH((max_iou_kernel<T>), blocks, kThreads, 0, scope.stream(), boxes1.const_data_ptr<T>(),
                  boxes2.const_data_ptr<T>(),
                  valid != nullptr ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr, shape, row_blocks,
                  values.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>());
  });
}

}  // namespace DETOPS_NAMESPACE
