// box_area, box_convert, clip_boxes_to_image and remove_small_boxes on a GPU: one thread per box.
#include "boxes/boxes.h"

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;

__device__ inline int64_t thread_number() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

template <BoxFormat format, class S>
__global__ void box_area_kernel(const S* boxes, int64_t count, ComputeType<S>* areas) {
  const int64_t i = thread_number();
  if (i < count) areas[i] = area_of<format, ComputeType<S>>(boxes + coordinate_count(format) * i);
}

template <BoxFormat in_format, BoxFormat out_format, class S>
__global__ void box_convert_kernel(const S* boxes, int64_t count, S* out) {
  const int64_t i = thread_number();
  if (i < count) convert_box<in_format, out_format, ComputeType<S>>(boxes + 4 * i, out + 4 * i);
}

// One thread per coordinate.
template <class S>
__global__ void clip_boxes_kernel(const S* boxes, int64_t coordinates, ComputeType<S> width, ComputeType<S> height,
                                  S* out) {
  const int64_t i = thread_number();
  if (i >= coordinates) return;
  out[i] = static_cast<S>(clip_coordinate(static_cast<ComputeType<S>>(boxes[i]), i % 2 == 0 ? width : height));
}

template <class S>
__global__ void large_boxes_kernel(const S* boxes, int64_t count, ComputeType<S> min_size, bool* large) {
  const int64_t i = thread_number();
  if (i < count) large[i] = is_large_enough(load_box<ComputeType<S>>(boxes + 4 * i), min_size);
}

}  // namespace

void box_area_cuda(const Tensor& boxes, BoxFormat format, const Tensor& out) {
  const int64_t count = out.numel();
  if (count == 0) return;
  const CudaScope scope(boxes);
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    dispatch_area_format(format, [&](auto area_format) {
      DETOPS_LAUNCH((box_area_kernel<decltype(area_format)::value, S>),
                    blocks_for("box_area", "boxes", count, kThreads), kThreads, 0, scope.stream(),
                    boxes.const_data_ptr<S>(), count, out.mutable_data_ptr<ComputeType<S>>());
    });
  });
}

void box_convert_cuda(const Tensor& boxes, BoxFormat in_format, BoxFormat out_format, const Tensor& out) {
  const int64_t count = boxes.numel() / 4;
  if (count == 0) return;
  const CudaScope scope(boxes);
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    dispatch_unrotated(in_format, [&](auto in) {
      dispatch_unrotated(out_format, [&](auto out_tag) {
        DETOPS_LAUNCH((box_convert_kernel<decltype(in)::value, decltype(out_tag)::value, S>),
                      blocks_for("box_convert", "boxes", count, kThreads), kThreads, 0, scope.stream(),
                      boxes.const_data_ptr<S>(), count, out.mutable_data_ptr<S>());
      });
    });
  });
}

void clip_boxes_to_image_cuda(const Tensor& boxes, double height, double width, const Tensor& out) {
  const int64_t coordinates = boxes.numel();
  if (coordinates == 0) return;
  const CudaScope scope(boxes);
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    DETOPS_LAUNCH((clip_boxes_kernel<S>), blocks_for("clip_boxes_to_image", "boxes", coordinates, kThreads), kThreads,
                  0, scope.stream(), boxes.const_data_ptr<S>(), coordinates, static_cast<T>(width),
                  static_cast<T>(height), out.mutable_data_ptr<S>());
  });
}

Tensor remove_small_boxes_cuda(const Tensor& boxes, double min_size) {
  const char* const op = "remove_small_boxes";
  const int64_t count = boxes.numel() / 4;
  const CudaScope scope(boxes);
  const Tensor large = allocate(op, {count}, ScalarType::Bool, boxes);
  if (count > 0) {
    dispatch_floating(boxes.scalar_type(), [&](auto tag) {
      using S = typename decltype(tag)::type;
      DETOPS_LAUNCH((large_boxes_kernel<S>), blocks_for("remove_small_boxes", "boxes", count, kThreads), kThreads, 0,
                    scope.stream(), boxes.const_data_ptr<S>(), count, static_cast<ComputeType<S>>(min_size),
                    large.mutable_data_ptr<bool>());
    });
  }
  StableIValue stack[] = {torch::stable::detail::from(large)};
  call_torch(op, "aten::nonzero", "", stack);  // [k, 1]; synchronises, for k
  return torch::stable::select(torch::stable::detail::to<Tensor>(stack[0]), 1, 0);
}

}  // namespace DETOPS_NAMESPACE
