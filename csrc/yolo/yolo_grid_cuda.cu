// assign_yolo_grid on a GPU: one thread per cell goes through the gts of its image in their order.
#include "common/launch_cuda.cuh"
#include "yolo/yolo_grid.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 128;

// A block belongs to one image.
template <class T>
__global__ void yolo_grid_kernel(YoloGridView<T> view, int blocks_per_image, T* targets) {
  DETOPS_SHARED(int, cells, kThreads);  // of the gts that are looked at together
  const int64_t image = blockIdx.x / blocks_per_image;
  const int64_t cell = int64_t(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const Counted<T> own = cell < view.cells() ? targets_of(view, targets, image, cell) : Counted<T>();
  for (int64_t first = 0; first < view.gts.count; first += kThreads) {
    const int count = static_cast<int>(min_of<int64_t>(kThreads, view.gts.count - first));
    if (threadIdx.x < count) {
      cells[threadIdx.x] = static_cast<int>(responsible_cell(view, image * view.gts.count + first + threadIdx.x));
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      if (cells[j] == cell) take_place(view, image * view.gts.count + first + j, own);
    }
    __syncthreads();
  }
}

}  // namespace

void assign_yolo_grid_cuda(const YoloGridInputs& inputs, const Tensor& out) {
  const char* const op = "assign_yolo_grid";
  const CudaScope scope(inputs.gt_boxes);
  check_cuda(cudaMemsetAsync(out.mutable_data_ptr(), 0, out.numel() * out.element_size(), scope.stream()), op);
  if (inputs.gt_labels.numel() == 0) return;
  dispatch_compute_type(inputs.gt_boxes.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const YoloGridView<T> view = inputs.view<T>();
    const auto per_image = static_cast<int>(ceil_div<int64_t>(view.cells(), kThreads));
    DETOPS_LAUNCH((yolo_grid_kernel<T>), static_cast<unsigned>(view.images * per_image), kThreads, 0, scope.stream(),
                  view, per_image, out.mutable_data_ptr<T>());
  });
}

}  // namespace DETOPS_NAMESPACE
