// assign_yolov5: schema, checks, and the CPU kernel.
#include "yolo/yolov5.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

// The cells of all gts for one anchor, one bit each.
template <class T>
DETOPS_CLONES void choose_cells(const Yolov5View<T>& view, const Yolov5Level<T>& level, int64_t number, int64_t anchor,
                                uint8_t* __restrict__ cells) {
  for (int64_t row = 0; row < view.gts; ++row) {
    cells[row] = static_cast<uint8_t>(view.cells(level, number, anchor, row));
  }
}

// Once over all (level, anchor) to choose and count, and once to write each row to its place.
template <class T>
void assign_yolov5_cpu(const Yolov5Inputs& inputs, const Yolov5Outputs& out) {
  const Yolov5View<T> view = inputs.view<T>();
  check_labels("assign_yolov5", view.ground_truth, inputs.boxes.size(0));
  const int64_t levels = inputs.anchors.size(0), anchors = view.anchor_count, pairs = levels * anchors;
  int64_t* const counts = out.counts.mutable_data_ptr<int64_t>();
  std::vector<uint8_t> cells(pairs * view.gts);
  std::vector<std::array<int64_t, kYolov5Cells>> places(pairs);  // counts, and then where the next row goes
  const auto for_pairs = [&](const auto& body) {
    if (pairs * view.gts < (1 << 14)) {
      for (int64_t pair = 0; pair < pairs; ++pair) body(pair);
      return;
    }
    parallel_items(pairs, [&](const auto& next) {
      for (int64_t pair; (pair = next()) >= 0;) body(pair);
    });
  };
  for_pairs([&](int64_t pair) {
    const int64_t number = pair / anchors;
    uint8_t* const of_pair = cells.data() + pair * view.gts;
    choose_cells(view, inputs.level<T>(number), number, pair % anchors, of_pair);
    std::array<int64_t, kYolov5Cells> count{};
    for (int64_t row = 0; row < view.gts; ++row) {
      for (int cell = 0; cell < kYolov5Cells; ++cell) count[cell] += of_pair[row] >> cell & 1;
    }
    places[pair] = count;
  });
  for (int64_t number = 0; number < levels; ++number) {
    int64_t place = 0;
    for (int cell = 0; cell < kYolov5Cells; ++cell) {
      for (int64_t anchor = 0; anchor < anchors; ++anchor) {
        int64_t& count = places[number * anchors + anchor][cell];
        place += std::exchange(count, place);
      }
    }
    counts[number] = place;
  }
  for_pairs([&](int64_t pair) {
    const int64_t number = pair / anchors, anchor = pair % anchors;
    const Yolov5Level<T> level = inputs.level<T>(number);
    const Yolov5Rows<T> to = out.level<T>(number, view.capacity);
    const uint8_t* const of_pair = cells.data() + pair * view.gts;
    std::array<int64_t, kYolov5Cells> place = places[pair];
    for (int64_t image = 0, row = 0; row < view.gts; ++image) {
      for (int64_t gt = 0; gt < view.ground_truth.count; ++gt, ++row) {
        for (int cell = 0; of_pair[row] >> cell != 0; ++cell) {
          if (of_pair[row] >> cell & 1) write_row(view, level, cell, anchor, image, gt, place[cell]++, to);
        }
      }
    }
    // Its share of the unused rows.
    const int64_t unused = view.capacity - counts[number];
    const int64_t begin = counts[number] + unused * anchor / anchors;
    const int64_t end = counts[number] + unused * (anchor + 1) / anchors;
    std::fill(to.indices.data() + 4 * begin, to.indices.data() + 4 * end, -1);
    std::fill(to.gt_indices.data() + begin, to.gt_indices.data() + end, -1);
    std::fill(to.labels.data() + begin, to.labels.data() + end, -1);
    std::fill(to.boxes.data() + 4 * begin, to.boxes.data() + 4 * end, T(0));
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
    fail(op, "heights and widths must have one entry per level of anchors (" + std::to_string(levels) + "), got " +
                 std::to_string(heights.size()));
  }
  check_cells(op, "heights", heights);
  check_cells(op, "widths", widths);
  const int64_t capacity = checked_rows(op, "gt_boxes", {kYolov5Cells, anchors.size(1), gt_labels.numel()});
  checked_rows(op, "gt_boxes", {levels, kYolov5Cells, anchors.size(1), gt_labels.numel()});
  const ScalarType dtype = compute_dtype({&gt_boxes});
  const Yolov5Inputs inputs{
      as_dense(gt_boxes, dtype), as_contiguous(gt_labels), as_contiguous(gt_valid), as_dense(anchors, dtype),
      std::move(heights),        std::move(widths),        ratio_threshold};
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
  return {out.indices, out.gt_indices, out.labels, out.boxes, out.counts};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_yolov5>(
      "assign_yolov5(Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, Tensor anchors, int[] heights, int[] widths, "
      "float ratio_threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
