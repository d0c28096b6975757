// Areas, conversion between formats, clipping and size tests of boxes: the math, written once for both devices.
//
// Ops and shapes. K is 4, 5 or 8 by the format; T is float for float16, bfloat16 and float32 boxes, double for float64.
//   box_area             boxes [..., K] -> [...], in T
//   box_convert          boxes [..., 4] -> [..., 4], between the three formats without rotation
//   clip_boxes_to_image  boxes [..., 4] -> [..., 4]
//   remove_small_boxes   boxes [..., 4] -> indices [k]
//
// Values are rounded step by step as torchvision's formulas are. None of these ops has a gradient: where one is wanted,
// detops/boxes.py composes them from torch's own.
#pragma once

#include <type_traits>

#include <torch/csrc/stable/tensor.h>

#include "common/geometry.h"

namespace DETOPS_NAMESPACE {

enum class BoxFormat : int64_t { kXyxy, kXywh, kCxcywh, kXywhr, kCxcywhr, kXyxyxyxy };
constexpr int64_t kBoxFormats = 6;
constexpr int64_t kUnrotatedFormats = 3;

DETOPS_HD constexpr int64_t coordinate_count(BoxFormat format) {
  return format == BoxFormat::kXyxyxyxy ? 8 : format == BoxFormat::kXywhr || format == BoxFormat::kCxcywhr ? 5 : 4;
}

template <BoxFormat format>
using FormatTag = std::integral_constant<BoxFormat, format>;

// Calls `body` with the FormatTag of a format without rotation.
template <class Body>
void dispatch_unrotated(BoxFormat format, Body&& body) {
  switch (format) {
    case BoxFormat::kXyxy: return body(FormatTag<BoxFormat::kXyxy>{});
    case BoxFormat::kXywh: return body(FormatTag<BoxFormat::kXywh>{});
    default: return body(FormatTag<BoxFormat::kCxcywh>{});
  }
}

// Calls `body` with the FormatTag of a format whose area is computed alike.
template <class Body>
void dispatch_area_format(BoxFormat format, Body&& body) {
  switch (format) {
    case BoxFormat::kXyxy: return body(FormatTag<BoxFormat::kXyxy>{});
    case BoxFormat::kXywhr:
    case BoxFormat::kCxcywhr: return body(FormatTag<BoxFormat::kXywhr>{});
    case BoxFormat::kXyxyxyxy: return body(FormatTag<BoxFormat::kXyxyxyxy>{});
    default: return body(FormatTag<BoxFormat::kXywh>{});
  }
}

// Where a format has corners, the area is that of the parallelogram of the first two sides, whichever way they turn.
template <BoxFormat format, class T, class S>
DETOPS_HD T area_of(const S* box) {
  if constexpr (format == BoxFormat::kXyxy) {
    return box_area(load_box<T>(box));
  } else if constexpr (format == BoxFormat::kXyxyxyxy) {
    const Box<T> first = load_box<T>(box);
    const T x3 = static_cast<T>(box[4]), y3 = static_cast<T>(box[5]);
    const T area = (first.x2 - first.x1) * (y3 - first.y2) - (first.y2 - first.y1) * (x3 - first.x2);
    return area < T(0) ? -area : area;
  } else {
    return static_cast<T>(box[2]) * static_cast<T>(box[3]);
  }
}

// What a format says of one axis: both ends, or one end and the length, or the middle and the length.
template <class T>
struct Span {
  T first, second;
};

template <BoxFormat format, class T>
DETOPS_HD Span<T> to_ends(Span<T> span) {
  if constexpr (format == BoxFormat::kXywh) return {span.first, span.first + span.second};
  if constexpr (format == BoxFormat::kCxcywh) {
    return {span.first - T(0.5) * span.second, span.first + T(0.5) * span.second};
  }
  return span;
}

template <BoxFormat format, class T>
DETOPS_HD Span<T> from_ends(Span<T> ends) {
  if constexpr (format == BoxFormat::kXywh) return {ends.first, ends.second - ends.first};
  if constexpr (format == BoxFormat::kCxcywh) return {(ends.first + ends.second) / 2, ends.second - ends.first};
  return ends;
}

template <BoxFormat in_format, BoxFormat out_format, class T, class S>
DETOPS_HD void convert_box(const S* in, S* out) {
  for (int axis = 0; axis < 2; ++axis) {
    const Span<T> span{static_cast<T>(in[axis]), static_cast<T>(in[axis + 2])};
    const Span<T> result = from_ends<out_format>(to_ends<in_format>(span));
    out[axis] = static_cast<S>(result.first);
    out[axis + 2] = static_cast<S>(result.second);
  }
}

// NaN stays NaN; a negative limit wins over 0. Both as torch.clamp.
template <class T>
DETOPS_HD T clip_coordinate(T coordinate, T limit) {
  const T positive = coordinate < T(0) ? T(0) : coordinate;
  return positive > limit ? limit : positive;
}

// The decision of remove_small_boxes. NaN is not large enough.
template <class T>
DETOPS_HD bool is_large_enough(const Box<T>& box, T min_size) {
  return (box.x2 - box.x1 >= min_size) & (box.y2 - box.y1 >= min_size);
}

// The launches, in boxes_cuda.cu. Arguments were checked; boxes are contiguous.
void box_area_cuda(const torch::stable::Tensor& boxes, BoxFormat format, const torch::stable::Tensor& out);
void box_convert_cuda(const torch::stable::Tensor& boxes, BoxFormat in_format, BoxFormat out_format,
                      const torch::stable::Tensor& out);
void clip_boxes_to_image_cuda(const torch::stable::Tensor& boxes, double height, double width,
                              const torch::stable::Tensor& out);
torch::stable::Tensor remove_small_boxes_cuda(const torch::stable::Tensor& boxes, double min_size);

}  // namespace DETOPS_NAMESPACE
