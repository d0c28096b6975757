// masks_to_boxes: masks [..., H, W] -> boxes [..., 4], the smallest that hold all set pixels, ends inclusive.
//
// A pixel is set where it is not zero, whatever the dtype, so masks are read as bytes. An element of a row begins at a
// multiple of its size, and of the 1, 2, 4 or 8 bytes of an element all bits count but the sign of a floating zero.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/geometry.h"

namespace DETOPS_NAMESPACE {

// Contiguous masks as bytes, little-endian.
struct MaskLayout {
  int64_t masks, rows, row_bytes;
  int size_log2;         // of an element, in bytes
  uint64_t significant;  // the bits that count, of 8 bytes that begin with an element

  DETOPS_HD int64_t mask_bytes() const { return rows * row_bytes; }
  DETOPS_HD int64_t column(int64_t byte) const { return byte >> size_log2; }
};

// Corners are pixel numbers. What holds no pixel is so far inside out that it leaves any other unchanged.
using PixelBox = Box<int>;

DETOPS_HD PixelBox empty_pixel_box() { return {INT32_MAX, INT32_MAX, -1, -1}; }

// The result for a mask: zeros where no pixel is set.
DETOPS_HD void store_pixel_box(const PixelBox& box, float* out) {
  store_box(box.x2 < 0 ? PixelBox{0, 0, 0, 0} : box, out);
}

// The launch, in masks_to_boxes_cuda.cu. `masks` is contiguous, `out` is float32 with room for 4 * layout.masks.
void masks_to_boxes_cuda(const torch::stable::Tensor& masks, const MaskLayout& layout,
                         const torch::stable::Tensor& out);

}  // namespace DETOPS_NAMESPACE
