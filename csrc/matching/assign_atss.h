// Adaptive training sample selection (ATSS), Zhang et al., CVPR 2020: the decisions, written once for both devices.
//
//   assign_atss  anchors [A, 4] or [B, A, 4] in levels, gt_boxes [B, M, 4] -> indices, ious [B, A]
//
// The candidates of a box are, of each level, the `topk` anchors whose centres are nearest to its own. Those are its
// positives whose IoU is at least the mean of the candidates' IoUs plus their standard deviation, and whose centre is
// inside the box. An anchor that is a positive of several boxes goes to the one of the highest IoU, then the first.
//
// Distances are compared as squares, those that are NaN as infinite; the lower index is nearer at ties. Mean and
// deviation (n - 1 in the denominator) are summed in double over the levels, nearest candidate first, and their sum is
// rounded to the boxes' dtype.
#pragma once

#include <cmath>

#include "matching/matching.h"

namespace DETOPS_NAMESPACE {

// A centre must be farther than this inside all sides.
constexpr double kAtssMargin = 0.01;

template <class T>
struct Point {
  T x, y;
};

template <class T>
DETOPS_HD Point<T> centre_of(const Box<T>& box) {
  return {(box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2};
}

template <class T>
struct Candidate {
  T distance;
  int anchor;
};

template <class T>
DETOPS_HD bool is_nearer(const Candidate<T>& a, const Candidate<T>& b) {
  return a.distance < b.distance || (a.distance == b.distance && a.anchor < b.anchor);
}

template <class T>
DETOPS_HD T squared_distance(const Point<T>& a, const Point<T>& b) {
  const T x = a.x - b.x, y = a.y - b.y;
  const T distance = x * x + y * y;
  return distance == distance ? distance : kInfinityOf<T>;
}

template <class T>
DETOPS_HD T atss_threshold(const T* ious, int count) {
  double sum = 0.0, squares = 0.0;
  for (int i = 0; i < count; ++i) sum += static_cast<double>(ious[i]);
  const double mean = sum / count;
  for (int i = 0; i < count; ++i) {
    const double off = static_cast<double>(ious[i]) - mean;
    squares += off * off;
  }
  return static_cast<T>(mean + sqrt(squares / (count - 1)));  // NaN for one candidate, which then is no positive
}

template <class T>
DETOPS_HD bool is_atss_positive(T iou, T threshold, const Point<T>& centre, const Box<T>& gt) {
  const T margin = T(kAtssMargin);
  return iou >= threshold && centre.x - gt.x1 > margin && centre.y - gt.y1 > margin && gt.x2 - centre.x > margin &&
         gt.y2 - centre.y > margin;
}

constexpr int kMostLevels = 32;
struct AtssLevels {
  int count;
  int sizes[kMostLevels];       // anchors
  int candidates[kMostLevels];  // of a box
  int all_candidates;
};

// The launch. Arguments were checked, outputs are allocated; there is at least one anchor.
void assign_atss_cuda(const MatchInputs& inputs, const AtssLevels& levels, const Tensor& indices, const Tensor& ious);

}  // namespace DETOPS_NAMESPACE
