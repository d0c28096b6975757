// Targets on a grid of cells, the textbook form of YOLOv1 and v2: decisions, written once for both devices.
//
//   assign_yolo_grid(gt_boxes [B, M, 4], gt_labels [B, M], gt_valid [B, M], anchors [A, 2] or none, rows, columns,
//                    height, width, classes) -> [B, rows, columns, A, 5 + C], A = 1 without anchors
//
// A target is (objectness 1, bx, by, bw, bh, one-hot class), or zeros where no gt is responsible.
//   1. The cell that holds a gt's centre is responsible; on the far border the last one. A centre outside of the image
//   is
//      nobody's. bx and by, in [0, 1), are the centre within the cell.
//   2. Without anchors bw and bh are the sides in cells. With anchors the gt takes, of those of the cell that are free,
//      the one of highest shape IoU, ties to the lower index, and bw, bh are the sides in sides of the anchor.
//   All in float64, rounded once.
//   3. Gts take their places in order. One that finds its cell full gets none.
#pragma once

#include <cmath>

#include "common/counted.h"
#include "yolo/ground_truth.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct YoloGridView {
  GroundTruthView<T> gts;
  const T* anchors;  // [A, 2], null without
  int64_t images, anchor_count, rows, columns;
  double height, width;  // of the image

  DETOPS_HD int64_t cells() const { return rows * columns; }
  DETOPS_HD int64_t stride() const { return 5 + gts.classes; }  // of a target
};

// Where a centre lies along one axis: in which cell of `count`, and where in it. Cell -1 outside of the image.
struct GridPlace {
  int64_t cell;
  double within;
};

DETOPS_HD GridPlace grid_place(double low, double high, double size, int64_t count) {
  const double centre = (low + high) / 2;
  if (!(centre >= 0 && centre <= size)) return {-1, 0};
  const double position = centre * static_cast<double>(count) / size;
  const double cell = min_of(std::floor(position), static_cast<double>(count - 1));
  return {static_cast<int64_t>(cell), position - cell};
}

// Below 1 after rounding too.
template <class T>
DETOPS_HD T rounded_within(double within) {
  return min_of(static_cast<T>(within), T(1) - std::numeric_limits<T>::epsilon() / 2);
}

// The cell of a gt, -1 for one that takes no part.
template <class T>
DETOPS_HD int64_t responsible_cell(const YoloGridView<T>& view, int64_t row) {
  if (!view.gts.usable(row)) return -1;
  const Box<double> box = load_box<double>(view.gts.boxes + 4 * row);
  const int64_t x = grid_place(box.x1, box.x2, view.width, view.columns).cell;
  const int64_t y = grid_place(box.y1, box.y2, view.height, view.rows).cell;
  return x < 0 || y < 0 ? -1 : y * view.columns + x;
}

// IoU of two boxes about one centre; NaN counts as -1.
DETOPS_HD double shape_iou(double width1, double height1, double width2, double height2) {
  const double intersection = min_of(width1, width2) * min_of(height1, height2);
  const double iou = intersection / (width1 * height1 + width2 * height2 - intersection);
  return iou == iou ? iou : -1.0;
}

// The targets of a cell: 5 + C numbers for each of A anchors. A label that is used is a class, below C.
template <class T>
DETOPS_HD Counted<T> targets_of(const YoloGridView<T>& view, T* targets, int64_t image, int64_t cell) {
  const int64_t count = view.anchor_count * view.stride();
  return {"assign_yolo_grid", "targets of a cell", targets + (image * view.cells() + cell) * count, count};
}

// Gives a gt its place among the targets of its cell, which are zero where they are free.
template <class T>
DETOPS_HD void take_place(const YoloGridView<T>& view, int64_t row, const Counted<T>& targets) {
  const Box<double> box = load_box<double>(view.gts.boxes + 4 * row);
  const double width = box.x2 - box.x1, height = box.y2 - box.y1;
  int64_t chosen = -1;
  double best = 0, unit_width = view.width / static_cast<double>(view.columns);
  double unit_height = view.height / static_cast<double>(view.rows);
  for (int64_t anchor = 0; anchor < view.anchor_count; ++anchor) {
    if (targets[anchor * view.stride()] != T(0)) continue;
    double iou = 0, anchor_width = unit_width, anchor_height = unit_height;
    if (view.anchors != nullptr) {
      anchor_width = static_cast<double>(view.anchors[2 * anchor]);
      anchor_height = static_cast<double>(view.anchors[2 * anchor + 1]);
      iou = shape_iou(width, height, anchor_width, anchor_height);
    }
    if (chosen >= 0 && !(iou > best)) continue;
    chosen = anchor;
    best = iou;
    unit_width = anchor_width;
    unit_height = anchor_height;
  }
  if (chosen < 0) return;
  const Counted<T> target = targets.part(chosen * view.stride(), view.stride());
  target[0] = T(1);
  target[1] = rounded_within<T>(grid_place(box.x1, box.x2, view.width, view.columns).within);
  target[2] = rounded_within<T>(grid_place(box.y1, box.y2, view.height, view.rows).within);
  target[3] = static_cast<T>(width / unit_width);
  target[4] = static_cast<T>(height / unit_height);
  target[5 + view.gts.labels[row]] = T(1);
}

struct YoloGridInputs {
  Tensor gt_boxes, gt_labels, gt_valid;  // dense, boxes in the compute dtype
  const Tensor* anchors;                 // dense, in the compute dtype; null without
  int64_t rows, columns, height, width, classes;

  template <class T>
  YoloGridView<T> view() const {
    return {ground_truth_view<T>(gt_boxes, gt_labels, gt_valid, classes),
            anchors != nullptr ? anchors->const_data_ptr<T>() : nullptr,
            gt_boxes.size(0),
            anchors != nullptr ? anchors->size(0) : 1,
            rows,
            columns,
            static_cast<double>(height),
            static_cast<double>(width)};
  }
};

// The launch. Arguments were checked; `out` is allocated and not empty.
void assign_yolo_grid_cuda(const YoloGridInputs& inputs, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
