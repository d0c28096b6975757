// The target assignment of YOLOv5 (and v7): decisions, written once for both devices.
//
//   assign_yolov5(gt_boxes [B, M, 4], gt_labels [B, M], gt_valid [B, M], anchors [L, A, 2], heights [L],
//   widths [L], ratio_threshold)
//     -> indices [L, K, 4], gt_indices [L, K], labels [L, K], boxes [L, K, 4], counts [L],   K = 5 A B M
//
// gt_boxes are cxcywh divided by the image's width and height, anchors width and height in cells. On a level of H x W
// cells:
//   1. A gt matches an anchor if max(r, 1 / r) < ratio_threshold for r = gt side / anchor side of both axes, which are
//      positive, and its centre is finite.
//   2. It goes to the cell of its centre, to the left (top) one if the centre lies in the left (upper) half of its cell
//      and further than 1 from the border, and to the right (bottom) one likewise. On the line between two cells both
//      neighbours hold: from one to five cells.
//   3. A row is (image, anchor, cell y, cell x), its box the centre relative to the cell's corner, and the size, in
//      cells. Rows are ordered by cell (own, left, top, right, bottom), then anchor, then gt: YOLOv5's own order.
// Rows from counts on are -1, their boxes 0.
#pragma once

#include <cmath>
#include <vector>

#include "common/counted.h"
#include "yolo/ground_truth.h"

namespace DETOPS_NAMESPACE {

constexpr int kYolov5Cells = 5;  // own, left, top, right, bottom

// In cells.
template <class T>
struct Yolov5Level {
  int64_t columns, rows;
  T width, height;  // the same, rounded
};

// A gt in cells.
template <class T>
struct GridBox {
  T x, y, width, height;
};

template <class T>
DETOPS_HD GridBox<T> grid_box(const T* box, const Yolov5Level<T>& level) {
  return {box[0] * level.width, box[1] * level.height, box[2] * level.width, box[3] * level.height};
}

// A ratio that is negative or NaN is none, even of two negative sides.
template <class T>
DETOPS_HD bool fits_side(T side, T anchor, T ratio_threshold) {
  const T ratio = side / anchor;
  return (side > T(0)) & (ratio > T(0)) & (ratio < ratio_threshold) & (T(1) / ratio < ratio_threshold);
}

// Whether the centre is nearer to the neighbour on the low side, at `position` of an axis, that is inside of the grid.
template <class T>
DETOPS_HD bool reaches(T position) {
  return (position > T(1)) & (position - std::floor(position) < T(0.5));
}

// The cells that a gt goes to, one bit each. All are computed, without a branch, so that a loop over gts is a vector
// loop.
template <class T>
DETOPS_HD unsigned cells_taken(const GridBox<T>& box, const Yolov5Level<T>& level) {
  return 1u | unsigned(reaches(box.x)) << 1 | unsigned(reaches(box.y)) << 2 |
         unsigned(reaches(level.width - box.x)) << 3 | unsigned(reaches(level.height - box.y)) << 4;
}

// Everything that the loops read.
template <class T>
struct Yolov5View {
  GroundTruthView<T> ground_truth;
  const T* anchors;                     // [L, A, 2]
  int64_t gts, anchor_count, capacity;  // B M, A, K
  T ratio_threshold;

  // The cells of `row` for an anchor of level `number`, one bit each.
  DETOPS_HD unsigned cells(const Yolov5Level<T>& level, int64_t number, int64_t anchor, int64_t row) const {
    const GridBox<T> box = grid_box(ground_truth.boxes + 4 * row, level);
    const T* const size = anchors + 2 * (number * anchor_count + anchor);
    const bool matches = ground_truth.usable(row) & (box.x - box.x == T(0)) & (box.y - box.y == T(0)) &
                         fits_side(box.width, size[0], ratio_threshold) &
                         fits_side(box.height, size[1], ratio_threshold);
    return matches ? cells_taken(box, level) : 0;
  }
};

// Of one level. There is room for capacity = 5 A B M rows: all five cells of all (anchor, gt). A centre on a corner of
// four cells takes them all.
template <class T>
struct Yolov5Rows {
  Counted<int64_t> indices, gt_indices, labels;
  Counted<T> boxes;
};

template <class T>
DETOPS_HD void write_row(const Yolov5View<T>& view, const Yolov5Level<T>& level, int cell, int64_t anchor,
                         int64_t image, int64_t gt, int64_t place, const Yolov5Rows<T>& out) {
  const int64_t row = image * view.ground_truth.count + gt;
  const GridBox<T> box = grid_box(view.ground_truth.boxes + 4 * row, level);
  const T half = T(0.5);
  const int64_t x = cell_at(box.x - (cell == 1 ? half : cell == 3 ? -half : T(0)), level.columns);
  const int64_t y = cell_at(box.y - (cell == 2 ? half : cell == 4 ? -half : T(0)), level.rows);
  out.indices[4 * place] = image;
  out.indices[4 * place + 1] = anchor;
  out.indices[4 * place + 2] = y;
  out.indices[4 * place + 3] = x;
  out.gt_indices[place] = gt;
  out.labels[place] = view.ground_truth.labels[row];
  out.boxes[4 * place] = box.x - static_cast<T>(x);
  out.boxes[4 * place + 1] = box.y - static_cast<T>(y);
  out.boxes[4 * place + 2] = box.width;
  out.boxes[4 * place + 3] = box.height;
}

struct Yolov5Inputs {
  Tensor boxes, labels, valid, anchors;  // dense, boxes and anchors of one dtype
  std::vector<int64_t> heights, widths;
  double ratio_threshold;

  template <class T>
  Yolov5View<T> view() const {
    const int64_t rows = labels.numel();
    return {ground_truth_view<T>(boxes, labels, valid, kAnyClass),
            anchors.const_data_ptr<T>(),
            rows,
            anchors.size(1),
            kYolov5Cells * anchors.size(1) * rows,
            static_cast<T>(ratio_threshold)};
  }
  template <class T>
  Yolov5Level<T> level(int64_t number) const {
    return {widths[number], heights[number], static_cast<T>(widths[number]), static_cast<T>(heights[number])};
  }
};

struct Yolov5Outputs {
  Tensor indices, gt_indices, labels, boxes, counts;

  template <class T>
  Yolov5Rows<T> level(int64_t number, int64_t capacity) const {
    const char* const op = "assign_yolov5";
    const int64_t first = number * capacity;
    return {{op, "indices of a level", indices.mutable_data_ptr<int64_t>() + 4 * first, 4 * capacity},
            {op, "gt_indices of a level", gt_indices.mutable_data_ptr<int64_t>() + first, capacity},
            {op, "labels of a level", labels.mutable_data_ptr<int64_t>() + first, capacity},
            {op, "boxes of a level", boxes.mutable_data_ptr<T>() + 4 * first, 4 * capacity}};
  }
};

// The launches. Arguments were checked; outputs are allocated.
void assign_yolov5_cuda(const Yolov5Inputs& inputs, const Yolov5Outputs& out);

}  // namespace DETOPS_NAMESPACE
