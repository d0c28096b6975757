// The target assignment of YOLOv5 (and v7): decisions, written once for both devices.
//
//   assign_yolov5(gt_boxes [B, M, 4], gt_labels [B, M], gt_valid [B, M], anchors [L, A, 2], heights [L],
//   widths [L], ratio_threshold)
//     -> indices [L, K, 4], gt_indices [L, K], labels [L, K], boxes [L, K, 4], counts [L],   K = 3 A B M
//
// gt_boxes are cxcywh divided by the image's width and height, anchors width and height in cells. On a level of H x W
// cells:
//   1. A gt matches an anchor if max(r, 1 / r) < ratio_threshold for r = gt side / anchor side of both axes.
//   2. It goes to the cell of its centre, to the left (top) one if the centre lies in the left (upper) half of its cell
//      and further than 1 from the border, and to the right (bottom) one likewise: at most three cells.
//   3. A row is (image, anchor, cell y, cell x), its box the centre relative to the cell's corner, and the size, in
//      cells. Rows are ordered by cell (own, left, top, right, bottom), then anchor, then gt: YOLOv5's own order.
// Rows from counts on are -1, their boxes 0.
#pragma once

#include <cmath>
#include <vector>

#include "yolo/ground_truth.h"

namespace DETOPS_NAMESPACE {

constexpr int kYolov5Cells = 5;  // own, left, top, right, bottom; at most kMostYolov5Cells of them at once
constexpr int64_t kMostYolov5Cells = 3;

template <class T>
struct Yolov5Level {
  T width, height;  // in cells
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

template <class T>
DETOPS_HD bool fits_side(T side, T anchor, T ratio_threshold) {
  const T ratio = side / anchor;
  return (ratio < ratio_threshold) & (T(1) / ratio < ratio_threshold);
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

// The cell of a position, moved by half a cell; at the border where it lies outside.
template <class T>
DETOPS_HD int64_t cell_of(T position, T offset, T size) {
  return static_cast<int64_t>(min_of(size - 1, max_of(position - offset, T(0))));  // NaN becomes 0
}

// Everything that the loops read.
template <class T>
struct Yolov5View {
  const T* boxes;    // [B, M, 4]
  const T* anchors;  // [L, A, 2]
  const int64_t* labels;
  const bool* valid;
  int64_t gts_per_image, gts, anchor_count, capacity;  // M, B M, A, K
  T ratio_threshold;

  // The cells of `row` for an anchor of level `number`, one bit each.
  DETOPS_HD unsigned cells(const Yolov5Level<T>& level, int64_t number, int64_t anchor, int64_t row) const {
    const GridBox<T> box = grid_box(boxes + 4 * row, level);
    const T* const size = anchors + 2 * (number * anchor_count + anchor);
    const bool matches =
        valid[row] & fits_side(box.width, size[0], ratio_threshold) & fits_side(box.height, size[1], ratio_threshold);
    return matches ? cells_taken(box, level) : 0;
  }
};

struct Yolov5Rows {
  int64_t *indices, *gt_indices, *labels;
};

template <class T>
DETOPS_HD void write_row(const Yolov5View<T>& view, const Yolov5Level<T>& level, int cell, int64_t anchor, int64_t row,
                         int64_t place, const Yolov5Rows& out, T* boxes) {
  const GridBox<T> box = grid_box(view.boxes + 4 * row, level);
  const T half = T(0.5);
  const int64_t x = cell_of(box.x, cell == 1 ? half : cell == 3 ? -half : T(0), level.width);
  const int64_t y = cell_of(box.y, cell == 2 ? half : cell == 4 ? -half : T(0), level.height);
  out.indices[4 * place] = row / view.gts_per_image;
  out.indices[4 * place + 1] = anchor;
  out.indices[4 * place + 2] = y;
  out.indices[4 * place + 3] = x;
  out.gt_indices[place] = row % view.gts_per_image;
  out.labels[place] = view.labels[row];
  boxes[4 * place] = box.x - static_cast<T>(x);
  boxes[4 * place + 1] = box.y - static_cast<T>(y);
  boxes[4 * place + 2] = box.width;
  boxes[4 * place + 3] = box.height;
}

struct Yolov5Inputs {
  Tensor boxes, labels, valid, anchors;  // dense, boxes and anchors of one dtype
  std::vector<int64_t> heights, widths;
  double ratio_threshold;

  template <class T>
  Yolov5View<T> view() const {
    const int64_t rows = labels.numel();
    return {boxes.const_data_ptr<T>(),
            anchors.const_data_ptr<T>(),
            labels.const_data_ptr<int64_t>(),
            static_cast<const bool*>(valid.const_data_ptr()),
            boxes.size(1),
            rows,
            anchors.size(1),
            kMostYolov5Cells * anchors.size(1) * rows,
            static_cast<T>(ratio_threshold)};
  }
  template <class T>
  Yolov5Level<T> level(int64_t number) const {
    return {static_cast<T>(widths[number]), static_cast<T>(heights[number])};
  }
};

struct Yolov5Outputs {
  Tensor indices, gt_indices, labels, boxes, counts;
};

// The launches. Arguments were checked; outputs are allocated.
void assign_yolov5_cuda(const Yolov5Inputs& inputs, const Yolov5Outputs& out);

}  // namespace DETOPS_NAMESPACE
