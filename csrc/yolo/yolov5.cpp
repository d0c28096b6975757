// assign_yolov5: schema, checks, and the CPU kernel.
#include "yolo/yolov5.h"

#include <algorithm>

#include "common/parallel_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class T>
void assign_yolov5_cpu(const Yolov5Inputs& inputs, const Yolov5Outputs& out) {
  const Yolov5View<T> view = inputs.view<T>();
  int64_t* const counts = out.counts.mutable_data_ptr<int64_t>();
  // A thread takes 2^15 pairs at least.
  const int64_t pairs = max_of<int64_t>(1, view.anchor_count * view.rows);
  parallel_ranges(inputs.anchors.size(0), ceil_div<int64_t>(1 << 15, pairs), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> matching;
    for (int64_t number = begin; number < end; ++number) {
      const Yolov5Level<T> level = inputs.level<T>(number);
      const int64_t first = number * view.capacity;
      const Yolov5Rows to{out.indices.mutable_data_ptr<int64_t>() + 4 * first,
                          out.rows.mutable_data_ptr<int64_t>() + first, out.labels.mutable_data_ptr<int64_t>() + first};
      T* const boxes = out.boxes.mutable_data_ptr<T>() + 4 * first;
      // (anchor, gt) by (anchor, gt) for the own cell; the other cells choose among these.
      matching.clear();
      for (int64_t i = 0; i < view.anchor_count * view.rows; ++i) {
        if (view.takes(level, number, 0, i / view.rows, i % view.rows)) matching.push_back(static_cast<int32_t>(i));
      }
      int64_t count = 0;
      for (int cell = 0; cell < kYolov5Cells; ++cell) {
        for (const int32_t i : matching) {
          const int64_t anchor = i / view.rows, row = i % view.rows;
          if (takes_cell(grid_box(view.boxes + 4 * row, level), level, cell)) {
            write_row(view, level, cell, anchor, row, count++, to, boxes);
          }
        }
      }
      counts[number] = count;
      std::fill(to.indices + 4 * count, to.indices + 4 * view.capacity, -1);
      std::fill(to.rows + count, to.rows + view.capacity, -1);
      std::fill(to.labels + count, to.labels + view.capacity, -1);
      std::fill(boxes + 4 * count, boxes + 4 * view.capacity, T(0));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_yolov5(const Tensor& gt_boxes, const Tensor& gt_labels,
                                                                 const Tensor& gt_valid, const Tensor& anchors,
                                                                 std::vector<int64_t> heights,
                                                                 std::vector<int64_t> widths, double ratio_threshold) {
  const char* const op = "assign_yolov5";
  check_shape(op, "gt_boxes", gt_boxes, "[B, M, 4]", {-1, -1, 4});
  check_ground_truth(op, gt_boxes, gt_labels, gt_valid, "gt_boxes", gt_boxes);
  check_shape(op, "anchors", anchors, "[L, A, 2]", {-1, -1, 2});
  check_floating(op, "anchors", anchors);
  check_same_device(op, "anchors", anchors, "gt_boxes", gt_boxes);
  const int64_t levels = anchors.size(0);
  if (static_cast<int64_t>(heights.size()) != levels || heights.size() != widths.size()) {
    fail(op, "grid_sizes must have one entry per level of anchors (" + std::to_string(levels) + "), got " +
                 std::to_string(heights.size()));
  }
  const ScalarType dtype = compute_dtype({&gt_boxes});
  const Yolov5Inputs inputs{
      as_dense(gt_boxes, dtype), as_contiguous(gt_labels), as_contiguous(gt_valid), as_dense(anchors, dtype),
      std::move(heights),        std::move(widths),        ratio_threshold};
  const int64_t capacity = kMostYolov5Cells * anchors.size(1) * gt_labels.numel();
  check_row_count(op, "gt_boxes", capacity * max_of<int64_t>(levels, 1));
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return allocate(op, sizes, type, gt_boxes);
  };
  const Yolov5Outputs out{make({levels, capacity, 4}, ScalarType::Long), make({levels, capacity}, ScalarType::Long),
                          make({levels, capacity}, ScalarType::Long), make({levels, capacity, 4}, dtype),
                          make({levels}, ScalarType::Long)};
  if (levels > 0) {
    if (on_gpu(op, gt_boxes)) {
      DETOPS_GPU_ONLY(assign_yolov5_cuda(inputs, out));
    } else if (dtype == ScalarType::Double) {
      assign_yolov5_cpu<double>(inputs, out);
    } else {
      assign_yolov5_cpu<float>(inputs, out);
    }
  }
  return {out.indices, out.rows, out.labels, out.boxes, out.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(DETOPS_NAMESPACE, m) {
  m.def(
      "assign_yolov5(Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, Tensor anchors, int[] heights, int[] widths, "
      "float ratio_threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

DETOPS_REGISTER(m) { m.impl("assign_yolov5", TORCH_BOX(&assign_yolov5)); }

}  // namespace DETOPS_NAMESPACE
