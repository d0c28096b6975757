// The padded ground truth that all assigners take: checks, and how kernels see it.
#pragma once

#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/geometry.h"

namespace DETOPS_NAMESPACE {

// The product of these sizes, which are not negative. Neither it nor, where one size is 0, that of the others passes
// kMostRows: so no product of it with a few numbers of the kind overflows.
inline int64_t checked_rows(const char* op, const char* argument, std::initializer_list<int64_t> sizes) {
  int64_t rows = 1, positive = 1;
  std::string text;
  for (int64_t size : sizes) {
    text += (text.empty() ? "" : " x ") + std::to_string(size);
    if (size == 0) {
      rows = 0;
    } else if (size > kMostRows / positive) {
      positive = kMostRows + 1;
    } else {
      positive *= size;
    }
  }
  if (positive > kMostRows) {
    fail(op, std::string(argument) + " must make at most " + std::to_string(kMostRows) + " rows, got " + text);
  }
  return rows * positive;
}

// Heights or widths of grids, in cells.
inline void check_cells(const char* op, const char* argument, const std::vector<int64_t>& cells) {
  for (int64_t count : cells) {
    if (count < 0 || count > kMostRows) {
      fail(op, std::string(argument) + " must be from 0 to " + std::to_string(kMostRows) + ", got " +
                   std::to_string(count));
    }
  }
}

// The cell of an axis, of `count` > 0, that holds a position; at the border where that lies outside, the first for NaN.
// Clamped as an integer too: as a float32 the last of more than 2^24 cells may round up.
template <class T>
DETOPS_HD int64_t cell_at(T position, int64_t count) {
  const int64_t cell = static_cast<int64_t>(min_of(static_cast<T>(count - 1), max_of(position, T(0))));
  return min_of(cell, count - 1);
}

// gt_boxes [B, M, 4], gt_labels [B, M] and gt_valid [B, M] of the B images of `reference`.
inline void check_ground_truth(const char* op, const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& gt_valid,
                               const char* reference, const Tensor& of_reference) {
  const int64_t images = of_reference.size(0);
  const auto check = [&](const char* argument, const Tensor& tensor, const char* rule, bool same) {
    if (!same) fail(op, std::string(argument) + " must have shape " + rule + ", got " + shape_text(tensor));
    check_same_device(op, argument, tensor, reference, of_reference);
  };
  const std::string batch = std::to_string(images);
  check("gt_boxes", gt_boxes, ("[B, M, 4] with B = " + batch + " as of " + reference).c_str(),
        gt_boxes.dim() == 3 && gt_boxes.size(0) == images && gt_boxes.size(2) == 4);
  const int64_t gts = gt_boxes.size(1);
  const std::string rule = "[" + batch + ", " + std::to_string(gts) + "] as of gt_boxes";
  const auto fits = [&](const Tensor& tensor) {
    return tensor.dim() == 2 && tensor.size(0) == images && tensor.size(1) == gts;
  };
  check("gt_labels", gt_labels, rule.c_str(), fits(gt_labels));
  check("gt_valid", gt_valid, rule.c_str(), fits(gt_valid));
  check_floating(op, "gt_boxes", gt_boxes);
  if (gt_labels.scalar_type() != ScalarType::Long) {
    fail(op, "gt_labels must be int64, got " + dtype_name(gt_labels.scalar_type()));
  }
  if (gt_valid.scalar_type() != ScalarType::Bool) {
    fail(op, "gt_valid must be bool, got " + dtype_name(gt_valid.scalar_type()));
  }
  check_row_count(op, "gt_boxes", images * gts);
}

// A floating tensor of these sizes, which `reference` gives.
inline void check_prediction(const char* op, const char* argument, const Tensor& tensor,
                             std::initializer_list<int64_t> sizes, const char* reference, const Tensor& of_reference) {
  std::string rule;
  for (int64_t size : sizes) rule += (rule.empty() ? "[" : ", ") + std::to_string(size);
  check_shape(op, argument, tensor, rule + "] as of " + reference, sizes);
  check_floating(op, argument, tensor);
  check_same_device(op, argument, tensor, reference, of_reference);
}

// The dtype that a computation on several tensors is done in: float64 if one of them is.
inline ScalarType compute_dtype(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->scalar_type() == ScalarType::Double) return ScalarType::Double;
  }
  return ScalarType::Float;
}

// For assigners that know no number of classes: any label of at least 0 is one.
constexpr int64_t kAnyClass = INT64_MAX;

// Ground truth as kernels see it: dense, boxes in the compute type.
template <class T>
struct GroundTruthView {
  const T* boxes;
  const int64_t* labels;
  const bool* valid;
  int64_t count;    // M, of each image
  int64_t classes;  // labels are below

  // True if the row takes part. A label that is no class cannot raise on a GPU without a synchronisation; there it
  // counts as not valid.
  DETOPS_HD bool usable(int64_t row) const {
    return valid[row] & (labels[row] >= 0) & (labels[row] < classes);  // no branch, for vector loops
  }
};

template <class T>
GroundTruthView<T> ground_truth_view(const Tensor& boxes, const Tensor& labels, const Tensor& valid, int64_t classes) {
  return {boxes.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(), static_cast<const bool*>(valid.const_data_ptr()),
          boxes.size(1), classes};
}

// For the CPU, where a wrong label raises.
template <class T>
void check_labels(const char* op, const GroundTruthView<T>& gts, int64_t images) {
  for (int64_t row = 0; row < images * gts.count; ++row) {
    if (gts.valid[row] && !gts.usable(row)) {
      const std::string rule = gts.classes == kAnyClass ? "at least 0" : "from 0 to " + std::to_string(gts.classes - 1);
      fail(op, "gt_labels must be " + rule + " where gt_valid, got " + std::to_string(gts.labels[row]));
    }
  }
}

}  // namespace DETOPS_NAMESPACE
