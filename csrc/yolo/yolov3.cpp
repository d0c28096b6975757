// assign_yolov3: schema, checks, and the CPU kernel.
#include "yolo/yolov3.h"

#include <algorithm>
#include <cstring>

#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 16;

// The gts of an image that take part.
template <class T>
struct UsableGts {
  std::vector<IouBox<T>> boxes;
  std::vector<int32_t> numbers;
  std::vector<T> best;  // highest IoU with a responsible anchor
};

// The anchors coordinate by coordinate, in whole lanes.
template <class T>
struct AnchorColumns {
  std::vector<T> columns;
  int64_t padded;

  AnchorColumns(const Yolov3Grid& grid, const T* sizes) : padded(ceil_div<int64_t>(grid.count, kLanes) * kLanes) {
    columns.assign(5 * padded, T(0));
    for (int64_t i = 0; i < grid.count; ++i) {
      const IouBox<T> box = grid.box(i, sizes);
      const T values[5] = {box.box.x1, box.box.y1, box.box.x2, box.box.y2, box.area};
      for (int k = 0; k < 5; ++k) columns[k * padded + i] = values[k];
    }
  }
};

template <class T>
DETOPS_CLONES void best_of_lanes(const T* columns, int64_t padded, int64_t first, const UsableGts<T>& gts,
                                 Yolov3Choice<T>* choices) {
  T best[kLanes];
  int32_t which[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    best[lane] = T(0);
    which[lane] = -1;
  }
  const auto count = static_cast<int32_t>(gts.boxes.size());
  const IouBox<T>* const boxes = gts.boxes.data();
  for (int32_t j = 0; j < count; ++j) {
    const IouBox<T> gt = boxes[j];
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* const at = columns + first + lane;
      const IouBox<T> box{{at[0], at[padded], at[2 * padded], at[3 * padded]}, at[4 * padded], T(0)};
      const T iou = positive_or_zero_iou(gt, box);
      const bool better = iou > best[lane];
      best[lane] = better ? iou : best[lane];
      which[lane] = better ? j : which[lane];
    }
  }
  const int32_t* const numbers = gts.numbers.data();
  for (int lane = 0; lane < kLanes; ++lane) {
    choices[lane] = {best[lane], which[lane] < 0 ? -1 : numbers[which[lane]], -1};
  }
}

template <class T>
void assign_yolov3_cpu(const Yolov3Inputs& inputs, const Yolov3Outputs& out) {
  const Yolov3Grid& grid = inputs.grid;
  const T* const sizes = inputs.anchors.const_data_ptr<T>();
  const GroundTruthView<T> ground_truth = inputs.ground_truth<T>();
  int64_t* const indices = out.gt_indices.mutable_data_ptr<int64_t>();
  int64_t* const labels = out.labels.mutable_data_ptr<int64_t>();
  auto* const boxes = static_cast<char*>(out.boxes.mutable_data_ptr());
  const auto* const boxes_in = static_cast<const char*>(inputs.gt_boxes_out.const_data_ptr());
  const auto box_bytes = static_cast<int64_t>(4 * inputs.gt_boxes_out.element_size());
  const int64_t images = inputs.gt_boxes.size(0), count = ground_truth.count;
  check_labels("assign_yolov3", ground_truth, images);
  const AnchorColumns<T> columns(grid, sizes);
  parallel_items(images, [&](const auto& next) {
    for (int64_t image = next(); image >= 0; image = next()) {
      UsableGts<T> gts;
      std::vector<int64_t> responsible;
      for (int64_t gt = 0; gt < count; ++gt) {
        const int64_t row = image * count + gt;
        if (!ground_truth.usable(row)) continue;
        gts.boxes.push_back(iou_box<IouKind::kIou>(load_box<T>(ground_truth.boxes + 4 * row)));
        gts.numbers.push_back(static_cast<int32_t>(gt));
        for (int level = 0; level < grid.levels; ++level) {
          if (!grid.has_cells(level)) continue;
          for (int64_t anchor = 0; anchor < grid.anchors_per_cell; ++anchor) {
            responsible.push_back(grid.responsible(gts.boxes.back().box, level, anchor));
          }
        }
      }
      std::sort(responsible.begin(), responsible.end());
      responsible.erase(std::unique(responsible.begin(), responsible.end()), responsible.end());
      const auto usable = static_cast<int64_t>(gts.boxes.size());
      std::vector<IouBox<T>> of_responsible;
      for (const int64_t i : responsible) of_responsible.push_back(grid.box(i, sizes));
      gts.best.assign(usable, T(0));
      parallel_ranges(usable, 16, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          for (const IouBox<T>& box : of_responsible) {
            gts.best[j] = max_of(positive_or_zero_iou(gts.boxes[j], box), gts.best[j]);
          }
        }
      });
      parallel_ranges(columns.padded / kLanes, 64, [&](int64_t begin, int64_t end) {
        Yolov3Choice<T> choices[kLanes];
        auto next_responsible = std::lower_bound(responsible.begin(), responsible.end(), begin * kLanes);
        for (int64_t group = begin; group < end; ++group) {
          best_of_lanes(columns.columns.data(), columns.padded, group * kLanes, gts, choices);
          for (int64_t i = group * kLanes; i < min_of((group + 1) * kLanes, grid.count); ++i) {
            Yolov3Choice<T>& choice = choices[i % kLanes];
            const bool is_responsible = next_responsible != responsible.end() && *next_responsible == i;
            if (is_responsible) {
              const IouBox<T>& box = of_responsible[next_responsible - responsible.begin()];
              for (int64_t j = 0; j < usable; ++j) {
                choice.look(gts.numbers[j], positive_or_zero_iou(gts.boxes[j], box), true, gts.best[j]);
              }
              ++next_responsible;
            }
            const int32_t gt = choice.result(is_responsible, inputs.iou_threshold);
            const int64_t to = image * grid.count + i, row = image * count + gt;
            indices[to] = gt;
            labels[to] = gt >= 0 ? ground_truth.labels[row] : gt;
            if (gt >= 0) {
              std::memcpy(boxes + to * box_bytes, boxes_in + row * box_bytes, box_bytes);
            } else {
              std::memset(boxes + to * box_bytes, 0, box_bytes);
            }
          }
        }
      });
    }
  });
}

Yolov3Grid checked_grid(const char* op, const Tensor& anchors, const std::vector<int64_t>& heights,
                        const std::vector<int64_t>& widths, const std::vector<int64_t>& strides) {
  check_shape(op, "anchors", anchors, "[L, A, 2]", {-1, -1, 2});
  check_floating(op, "anchors", anchors);
  const auto levels = static_cast<size_t>(anchors.size(0));
  if (levels < 1 || levels > kMostYolov3Levels) {
    fail(op,
         "anchors must have from 1 to " + std::to_string(kMostYolov3Levels) + " levels, got " + std::to_string(levels));
  }
  if (heights.size() != levels || widths.size() != levels || strides.size() != levels) {
    fail(op, "strides must have one entry per level of anchors (" + std::to_string(levels) + "), got " +
                 std::to_string(strides.size()));
  }
  check_cells(op, "heights", heights);
  check_cells(op, "widths", widths);
  Yolov3Grid grid{};
  grid.levels = static_cast<int>(levels);
  grid.anchors_per_cell = anchors.size(1);
  for (size_t level = 0; level < levels; ++level) {
    grid.height[level] = heights[level];
    grid.width[level] = widths[level];
    grid.stride[level] = strides[level];
    grid.first[level] = grid.count;
    grid.count += checked_rows(op, "anchors", {grid.anchors_per_cell, heights[level], widths[level]});
  }
  return grid;
}

std::tuple<Tensor, Tensor, Tensor> assign_yolov3(const Tensor& gt_boxes, const Tensor& gt_labels,
                                                 const Tensor& gt_valid, const Tensor& anchors,
                                                 std::vector<int64_t> heights, std::vector<int64_t> widths,
                                                 std::vector<int64_t> strides, double iou_threshold) {
  const char* const op = "assign_yolov3";
  check_shape(op, "gt_boxes", gt_boxes, "[B, M, 4]", {-1, -1, 4});
  check_ground_truth(op, gt_boxes, gt_labels, gt_valid, "gt_boxes", gt_boxes);
  const Yolov3Grid grid = checked_grid(op, anchors, heights, widths, strides);
  check_same_device(op, "anchors", anchors, "gt_boxes", gt_boxes);
  const int64_t images = gt_boxes.size(0);
  checked_rows(op, "anchors", {images, grid.count});
  const ScalarType dtype = compute_dtype({&gt_boxes});
  const Yolov3Inputs inputs{as_dense(gt_boxes, dtype),
                            as_contiguous(gt_labels),
                            as_contiguous(gt_valid),
                            as_dense(anchors, dtype),
                            as_contiguous(gt_boxes),
                            grid,
                            iou_threshold};
  const Yolov3Outputs out{allocate(op, {images, grid.count}, ScalarType::Long, gt_boxes),
                          allocate(op, {images, grid.count}, ScalarType::Long, gt_boxes),
                          allocate(op, {images, grid.count, 4}, gt_boxes.scalar_type(), gt_boxes)};
  if (images * grid.count > 0) {
    if (on_gpu(op, gt_boxes)) {
      DETOPS_GPU_ONLY(assign_yolov3_cuda(inputs, out));
    } else if (dtype == ScalarType::Double) {
      assign_yolov3_cpu<double>(inputs, out);
    } else {
      assign_yolov3_cpu<float>(inputs, out);
    }
  }
  return {out.gt_indices, out.labels, out.boxes};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_yolov3>(
      "assign_yolov3(Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, Tensor anchors, int[] heights, int[] widths, "
      "int[] strides, float iou_threshold) -> (Tensor, Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
