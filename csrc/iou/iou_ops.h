// What the entries of the iou ops share: shapes, checks, dispatch, and the declarations of the launches.
#pragma once

#include <type_traits>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "iou/iou.h"

namespace DETOPS_NAMESPACE {

// boxes1 [..., N, 4] and boxes2 [..., M, 4] as batch x rows and batch x columns; aligned boxes are rows only. The
// strides between the images of a batch are 0 where all images share boxes.
struct IouShape {
  int64_t batch, rows, columns;
  int64_t stride1, stride2;

  // How many different sets of second boxes there are, and which one belongs to an image.
  int64_t sets2() const { return stride2 == 0 ? min_of<int64_t>(1, batch) : batch; }
  int64_t set2_of(int64_t image) const { return stride2 == 0 ? 0 : image; }
};

// Dense boxes, whatever the stride between images, and that stride.
struct IouBoxes {
  Tensor tensor;
  int64_t stride;

  explicit IouBoxes(const Tensor& boxes, bool aligned) : tensor(boxes), stride(0) {
    const int64_t last = boxes.dim() - 1;
    const int64_t coordinates = boxes.size(last);
    const int64_t per_image = aligned ? 0 : coordinates * boxes.size(last - 1);
    bool shared = !aligned && boxes.stride(last) == 1 && boxes.stride(last - 1) == coordinates;
    for (int64_t i = 0; shared && i < last - 1; ++i) shared = boxes.stride(i) == 0;
    if (shared && last > 1) return;
    tensor = as_contiguous(boxes);
    stride = per_image;
  }
};

// The caller has made half and integer boxes float32: they are few compared with the pairs.
inline IouShape check_iou_boxes(const char* op, const Tensor& boxes1, const Tensor& boxes2, bool aligned,
                                int64_t coordinates = 4) {
  const auto check_last = [&](const char* argument, const Tensor& boxes, const char* rows) {
    if (boxes.dim() >= (aligned ? 1 : 2) && boxes.size(boxes.dim() - 1) == coordinates) return;
    fail(op, std::string(argument) + " must have shape [..., " + (aligned ? "" : rows) + std::to_string(coordinates) +
                 "], got " + shape_text(boxes));
  };
  const auto check_leading = [&](int64_t dims) {
    bool same = boxes1.dim() == boxes2.dim();
    for (int64_t i = 0; same && i < dims; ++i) same = boxes1.size(i) == boxes2.size(i);
    if (same) return;
    fail(op, std::string("boxes2 must have the ") + (aligned ? "shape" : "batch dimensions") + " of boxes1 (" +
                 shape_text(boxes1) + "), got " + shape_text(boxes2));
  };
  check_last("boxes1", boxes1, "N, ");
  check_last("boxes2", boxes2, "M, ");
  const int64_t leading = boxes1.dim() - (aligned ? 1 : 2);
  check_leading(leading);
  IouShape shape{1, 0, 0, 0, 0};
  for (int64_t i = 0; i < leading; ++i) shape.batch *= boxes1.size(i);
  if (aligned) {
    shape.rows = shape.batch;
    shape.batch = 1;
  } else {
    shape.rows = boxes1.size(leading);
    shape.columns = boxes2.size(leading);
  }
  check_row_count(op, "boxes1", shape.rows);
  check_row_count(op, "boxes2", shape.columns);
  const ScalarType dtype = boxes1.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, "boxes1 must be float32 or float64, got " + dtype_name(dtype));
  }
  check_same_dtype(op, "boxes2", boxes2, "boxes1", boxes1);
  check_same_device(op, "boxes2", boxes2, "boxes1", boxes1);
  return shape;
}

// The sizes of the result for pairs: [..., N, M], or [...] of aligned boxes [..., 4].
inline std::vector<int64_t> pair_sizes(const Tensor& boxes1, const IouShape& shape, bool aligned) {
  if (aligned) return leading_sizes(boxes1, boxes1.dim() - 1);
  return leading_sizes(boxes1, boxes1.dim() - 2, {shape.rows, shape.columns});
}

// Calls body(TypeTag of float or double, integral constant of the kind).
template <class Body>
void dispatch_iou(ScalarType dtype, IouKind kind, Body&& body) {
  dispatch_compute_type(dtype, [&](auto tag) {
    switch (kind) {
      case IouKind::kIou: return body(tag, std::integral_constant<IouKind, IouKind::kIou>{});
      case IouKind::kGeneralized: return body(tag, std::integral_constant<IouKind, IouKind::kGeneralized>{});
      case IouKind::kDistance: return body(tag, std::integral_constant<IouKind, IouKind::kDistance>{});
      case IouKind::kComplete: return body(tag, std::integral_constant<IouKind, IouKind::kComplete>{});
      case IouKind::kEfficient: return body(tag, std::integral_constant<IouKind, IouKind::kEfficient>{});
      case IouKind::kIoa: return body(tag, std::integral_constant<IouKind, IouKind::kIoa>{});
    }
  });
}

// The launches. Arguments were checked; outputs are allocated. One of two gradients may be null: not wanted.
void box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, IouKind kind, bool aligned, const IouShape& shape,
                  double eps, const Tensor& out);
void box_iou_backward_cuda(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2, IouKind kind, bool aligned,
                           const IouShape& shape, double eps, const Tensor* grad1, const Tensor* grad2);
void rotated_box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, bool aligned, const IouShape& shape,
                          const Tensor& out);
void max_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, const Tensor* valid, const IouShape& shape,
                  const Tensor& values, const Tensor& indices);

}  // namespace DETOPS_NAMESPACE
