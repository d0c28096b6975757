// assign_yolo_grid: schema, checks, and the CPU kernel.
#include "yolo/yolo_grid.h"

#include <algorithm>
#include <optional>

#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class T>
void assign_yolo_grid_cpu(const YoloGridInputs& inputs, const Tensor& out) {
  const YoloGridView<T> view = inputs.view<T>();
  check_labels("assign_yolo_grid", view.gts, view.images);
  T* const targets = out.mutable_data_ptr<T>();
  const int64_t per_image = view.cells() * view.anchor_count * view.stride();
  parallel_ranges(view.images, ceil_div<int64_t>(1 << 14, per_image), [&](int64_t begin, int64_t end) {
    std::fill(targets + begin * per_image, targets + end * per_image, T(0));
    for (int64_t row = begin * view.gts.count; row < end * view.gts.count; ++row) {
      const int64_t cell = responsible_cell(view, row);
      if (cell >= 0) take_place(view, row, targets_of(view, targets, row / view.gts.count, cell));
    }
  });
}

Tensor assign_yolo_grid(const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& gt_valid,
                        const std::optional<Tensor>& anchors, int64_t rows, int64_t columns, int64_t height,
                        int64_t width, int64_t classes) {
  const char* const op = "assign_yolo_grid";
  check_shape(op, "gt_boxes", gt_boxes, "[B, M, 4]", {-1, -1, 4});
  check_ground_truth(op, gt_boxes, gt_labels, gt_valid, "gt_boxes", gt_boxes);
  check_cells(op, "grid_size", {rows, columns});
  if (height < 1 || width < 1) {
    fail(op, "image_size must be positive, got " + std::to_string(height) + " x " + std::to_string(width));
  }
  if (classes < 0 || classes > kMostRows) {
    fail(op, "num_classes must be from 0 to " + std::to_string(kMostRows) + ", got " + std::to_string(classes));
  }
  const ScalarType dtype = compute_dtype({&gt_boxes});
  std::optional<Tensor> dense_anchors;
  if (anchors.has_value()) {
    check_shape(op, "anchors", *anchors, "[A, 2]", {-1, 2});
    check_floating(op, "anchors", *anchors);
    check_same_device(op, "anchors", *anchors, "gt_boxes", gt_boxes);
    dense_anchors = as_dense(*anchors, dtype);
  }
  const YoloGridInputs inputs{as_dense(gt_boxes, dtype),
                              as_contiguous(gt_labels),
                              as_contiguous(gt_valid),
                              dense_anchors ? &*dense_anchors : nullptr,
                              rows,
                              columns,
                              height,
                              width,
                              classes};
  const int64_t anchor_count = anchors.has_value() ? anchors->size(0) : 1;
  checked_rows(op, "gt_boxes", {gt_boxes.size(0), rows, columns, anchor_count});
  const Tensor out = anchors.has_value()
                         ? allocate(op, {gt_boxes.size(0), rows, columns, anchor_count, 5 + classes}, dtype, gt_boxes)
                         : allocate(op, {gt_boxes.size(0), rows, columns, 5 + classes}, dtype, gt_boxes);
  if (out.numel() == 0) return out;
  if (on_gpu(op, gt_boxes)) {
    DETOPS_GPU_ONLY(assign_yolo_grid_cuda(inputs, out));
  } else if (dtype == ScalarType::Double) {
    assign_yolo_grid_cpu<double>(inputs, out);
  } else {
    assign_yolo_grid_cpu<float>(inputs, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_yolo_grid>(
      "assign_yolo_grid(Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, Tensor? anchors, int rows, int columns, "
      "int height, int width, int classes) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
