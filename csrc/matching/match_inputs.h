// What the ops that match anchors to padded ground truth share: the tensors, and their checks.
#pragma once

#include <optional>

#include "common/allocate.h"
#include "common/dispatch.h"

namespace DETOPS_NAMESPACE {

// Checked and contiguous. `anchor_stride` lies between images, 0 where they share anchors.
struct MatchInputs {
  Tensor anchors, gt_boxes;
  std::optional<Tensor> gt_valid, ignore_boxes, ignore_valid;
  int64_t images, anchor_count, gts, regions;
  int64_t anchor_stride;
};

inline const bool* bool_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const bool*>(tensor->const_data_ptr()) : nullptr;
}

// Which rows of `boxes` [B, M, 4] are valid; contiguous.
inline std::optional<Tensor> check_valid(const char* op, const char* argument, const std::optional<Tensor>& valid,
                                         const char* boxes_argument, const Tensor& boxes) {
  if (!valid.has_value()) return std::nullopt;
  check_mask(op, argument, *valid, boxes_argument, boxes);
  return as_contiguous(*valid);
}

// Half and integer boxes were made float32 by the caller.
inline MatchInputs check_match_inputs(const char* op, const Tensor& anchors, const Tensor& gt_boxes,
                                      const std::optional<Tensor>& gt_valid, const std::optional<Tensor>& ignore_boxes,
                                      const std::optional<Tensor>& ignore_valid) {
  check_shape(op, "gt_boxes", gt_boxes, "[B, M, 4]", {-1, -1, 4});
  const int64_t images = gt_boxes.size(0);
  const bool shared = anchors.dim() == 2;
  if ((!shared && anchors.dim() != 3) || anchors.size(anchors.dim() - 1) != 4 ||
      (!shared && anchors.size(0) != images)) {
    fail(op, "anchors must have shape [A, 4] or [B, A, 4] with the B of gt_boxes (" + std::to_string(images) +
                 "), got " + shape_text(anchors));
  }
  const ScalarType dtype = anchors.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, "anchors must be float32 or float64, got " + dtype_name(dtype));
  }
  check_same_dtype(op, "gt_boxes", gt_boxes, "anchors", anchors);
  check_same_device(op, "gt_boxes", gt_boxes, "anchors", anchors);
  const int64_t anchor_count = anchors.size(anchors.dim() - 2), gts = gt_boxes.size(1);
  check_row_count(op, "anchors", anchor_count);
  check_row_count(op, "gt_boxes", gts);
  check_row_count(op, "gt_boxes", images * gts);
  MatchInputs inputs{as_contiguous(anchors),
                     as_contiguous(gt_boxes),
                     check_valid(op, "gt_valid", gt_valid, "gt_boxes", gt_boxes),
                     std::nullopt,
                     std::nullopt,
                     images,
                     anchor_count,
                     gts,
                     0,
                     shared ? 0 : 4 * anchor_count};
  if (!ignore_boxes.has_value()) return inputs;
  check_shape(op, "ignore_boxes", *ignore_boxes, "[B, I, 4] with the B of gt_boxes", {images, -1, 4});
  check_same_dtype(op, "ignore_boxes", *ignore_boxes, "anchors", anchors);
  check_same_device(op, "ignore_boxes", *ignore_boxes, "anchors", anchors);
  inputs.regions = ignore_boxes->size(1);
  check_row_count(op, "ignore_boxes", inputs.regions);
  inputs.ignore_boxes = as_contiguous(*ignore_boxes);
  inputs.ignore_valid = check_valid(op, "ignore_valid", ignore_valid, "ignore_boxes", *ignore_boxes);
  return inputs;
}

}  // namespace DETOPS_NAMESPACE
