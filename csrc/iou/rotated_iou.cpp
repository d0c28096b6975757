// box_iou of rotated boxes: schema, checks, and the CPU kernel.
#include "iou/rotated_iou.h"

#include <memory>

#include "common/parallel_cpu.h"
#include "common/register.h"
#include "iou/iou_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class T>
std::unique_ptr<RotatedBox<T>[]> load_rotated_boxes(const T* boxes, int64_t count) {
  std::unique_ptr<RotatedBox<T>[]> loaded(new RotatedBox<T>[count]);
  for (int64_t i = 0; i < count; ++i) loaded[i] = load_rotated_box<T>(boxes + 5 * i);
  return loaded;
}

// Pairs whose circles do not meet are most, and decided together; the rest one by one.
template <class T>
DETOPS_CLONES void rotated_row(const RotatedBox<T>& box, const RotatedBox<T>* others, int64_t count, T* out) {
  constexpr int64_t kBlock = 64;
  bool meets[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = min_of(kBlock, count - begin);
    for (int64_t j = 0; j < length; ++j) meets[j] = circles_meet(box, others[begin + j]);
    for (int64_t j = 0; j < length; ++j) {
      out[begin + j] = rotated_iou(box, others[begin + j], meets[j]);
    }
  }
}

template <class T>
void rotated_box_iou_cpu(const T* boxes1, const T* boxes2, bool aligned, const IouShape& shape, T* out) {
  if (aligned) {
    parallel_ranges(shape.rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        out[i] = rotated_iou(load_rotated_box<T>(boxes1 + 5 * i), load_rotated_box<T>(boxes2 + 5 * i));
      }
    });
    return;
  }
  for (int64_t image = 0; image < shape.batch; ++image) {
    const auto others = load_rotated_boxes(boxes2 + image * shape.stride2, shape.columns);
    const int64_t grain = ceil_div<int64_t>(512, max_of<int64_t>(1, shape.columns));
    parallel_ranges(shape.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        rotated_row(load_rotated_box<T>(boxes1 + image * shape.stride1 + 5 * row), others.get(), shape.columns,
                    out + (image * shape.rows + row) * shape.columns);
      }
    });
  }
}

Tensor rotated_box_iou(const Tensor& boxes1, const Tensor& boxes2, bool aligned) {
  const char* const op = "box_iou";
  IouShape shape = check_iou_boxes(op, boxes1, boxes2, aligned, 5);
  const IouBoxes dense1(boxes1, aligned), dense2(boxes2, aligned);
  shape.stride1 = dense1.stride;
  shape.stride2 = dense2.stride;
  const Tensor out = allocate(op, pair_sizes(boxes1, shape, aligned), boxes1.scalar_type(), boxes1);
  if (out.numel() == 0) return out;
  if (on_gpu(op, boxes1)) {
    DETOPS_GPU_ONLY(rotated_box_iou_cuda(dense1.tensor, dense2.tensor, aligned, shape, out));
  } else {
    dispatch_compute_type(boxes1.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      rotated_box_iou_cpu(dense1.tensor.const_data_ptr<T>(), dense2.tensor.const_data_ptr<T>(), aligned, shape,
                          out.mutable_data_ptr<T>());
    });
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) { ops.add<&rotated_box_iou>("rotated_box_iou(Tensor boxes1, Tensor boxes2, bool aligned) -> Tensor"); }

}  // namespace DETOPS_NAMESPACE
