// The target assignment of YOLOv3: decisions, written once for both devices.
//
//   assign_yolov3(gt_boxes [B, M, 4], gt_labels [B, M], gt_valid [B, M], anchors [L, A, 2], heights, widths, strides,
//                 iou_threshold) -> gt_indices [B, N], labels [B, N], boxes [B, N, 4]
//
// The N anchors are those of all levels, in the order (level, anchor, y, x): that of decode_yolo. Each is centred in
// its cell. For each image:
//   1. On every level the cell that holds a gt's centre, at the border where that lies outside, is responsible, with
//   all
//      its anchors.
//   2. An anchor whose best IoU is at most iou_threshold is negative, -1; others are ignored, -2.
//   3. A responsible anchor whose best IoU is above goes to that gt, ties to the lower index.
//   4. For each gt in order, the responsible anchors of highest IoU with it go to it, all that tie, if that is above 0.
// IoUs that are NaN count as 0.
#pragma once

#include <cmath>
#include <vector>

#include "iou/iou.h"
#include "yolo/ground_truth.h"

namespace DETOPS_NAMESPACE {

constexpr int kMostYolov3Levels = 8;
constexpr int kNegative = -1, kIgnored = -2;

// The levels, and where the anchors of each begin.
struct Yolov3Grid {
  int levels;
  int64_t anchors_per_cell, count;  // A, N
  int64_t height[kMostYolov3Levels], width[kMostYolov3Levels], stride[kMostYolov3Levels], first[kMostYolov3Levels];

  // Its box, from `sizes` [L, A, 2].
  template <class T>
  DETOPS_HD IouBox<T> box(int64_t i, const T* sizes) const {
    int level = 0;
    while (level + 1 < levels && i >= first[level + 1]) ++level;
    const int64_t cells = height[level] * width[level];
    const int64_t anchor = (i - first[level]) / cells, cell = (i - first[level]) % cells;
    const T* const size = sizes + 2 * (level * anchors_per_cell + anchor);
    const T x = (static_cast<T>(cell % width[level]) + T(0.5)) * static_cast<T>(stride[level]);
    const T y = (static_cast<T>(cell / width[level]) + T(0.5)) * static_cast<T>(stride[level]);
    return iou_box<IouKind::kIou>(Box<T>{x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2});
  }

  // An anchor that the gt makes responsible.
  template <class T>
  DETOPS_HD int64_t responsible(const Box<T>& gt, int level, int64_t anchor) const {
    const T step = static_cast<T>(stride[level]);
    const int64_t x = cell_at((gt.x1 + gt.x2) / 2 / step, width[level]);
    const int64_t y = cell_at((gt.y1 + gt.y2) / 2 / step, height[level]);
    return first[level] + (anchor * height[level] + y) * width[level] + x;
  }
  // An empty level has no cell that could be responsible.
  DETOPS_HD bool has_cells(int level) const { return height[level] > 0 && width[level] > 0; }
};

template <class T>
DETOPS_HD T positive_or_zero_iou(const IouBox<T>& gt, const IouBox<T>& anchor) {
  return max_of(iou_value<IouKind::kIou>(gt, anchor, T(0)), T(0));  // in this order NaN becomes 0
}

// What is known of an anchor after some of the gts, in their order.
template <class T>
struct Yolov3Choice {
  T best;          // the highest IoU
  int32_t gt;      // whose it is
  int32_t forced;  // the last gt of step 4, or -1

  DETOPS_HD void look(int32_t number, T iou, bool responsible, T best_of_gt) {
    if (iou > best) {
      best = iou;
      gt = number;
    }
    if (responsible && iou == best_of_gt && iou > T(0)) forced = number;
  }
  DETOPS_HD int32_t result(bool responsible, double iou_threshold) const {
    if (forced >= 0) return forced;
    if (!(static_cast<double>(best) > iou_threshold)) return kNegative;
    return responsible ? gt : kIgnored;
  }
};

struct Yolov3Inputs {
  Tensor gt_boxes, gt_labels, gt_valid, anchors;  // dense; boxes and anchors in the compute dtype
  Tensor gt_boxes_out;                            // in their own dtype
  Yolov3Grid grid;
  double iou_threshold;

  template <class T>
  GroundTruthView<T> ground_truth() const {
    return ground_truth_view<T>(gt_boxes, gt_labels, gt_valid, kAnyClass);
  }
};

struct Yolov3Outputs {
  Tensor gt_indices, labels, boxes;
};

// The launches. Arguments were checked; outputs are allocated and not empty.
void assign_yolov3_cuda(const Yolov3Inputs& inputs, const Yolov3Outputs& out);

}  // namespace DETOPS_NAMESPACE
