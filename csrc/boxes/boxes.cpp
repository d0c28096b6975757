// box_area, box_convert, clip_boxes_to_image and remove_small_boxes: schemas, checks, and the CPU loops.
#include "boxes/boxes.h"

#include <memory>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kGrain = 1 << 14;  // boxes that are worth a thread

template <BoxFormat format, class S>
DETOPS_CLONES void area_range(const S* boxes, int64_t count, ComputeType<S>* areas) {
  constexpr int64_t kStep = coordinate_count(format);
  for (int64_t i = 0; i < count; ++i) areas[i] = area_of<format, ComputeType<S>>(boxes + kStep * i);
}

template <BoxFormat in_format, BoxFormat out_format, class S>
DETOPS_CLONES void convert_range(const S* __restrict boxes, int64_t count, S* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    convert_box<in_format, out_format, ComputeType<S>>(boxes + 4 * i, out + 4 * i);
  }
}

template <class S>
DETOPS_CLONES void clip_range(const S* boxes, int64_t count, ComputeType<S> width, ComputeType<S> height, S* out) {
  using T = ComputeType<S>;
  for (int64_t i = 0; i < 2 * count; ++i) {
    out[2 * i] = static_cast<S>(clip_coordinate(static_cast<T>(boxes[2 * i]), width));
    out[2 * i + 1] = static_cast<S>(clip_coordinate(static_cast<T>(boxes[2 * i + 1]), height));
  }
}

// Notes for each box whether it is large enough, and returns how many are.
template <class S>
DETOPS_CLONES int64_t flag_large(const S* boxes, int64_t count, ComputeType<S> min_size, uint8_t* large) {
  for (int64_t i = 0; i < count; ++i) large[i] = is_large_enough(load_box<ComputeType<S>>(boxes + 4 * i), min_size);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += large[i];
  return total;
}

// Writes the indices of `total` flagged boxes from `begin` on.
void write_flagged(const uint8_t* flags, int64_t begin, int64_t total, int64_t* indices) {
  for (int64_t i = begin, found = 0; found < total; ++i) {
    indices[found] = i;  // overwritten until the flag is set: cheaper than a branch
    found += flags[i];
  }
}

template <class S>
Tensor remove_small_boxes_cpu(const char* op, const Tensor& boxes, ComputeType<S> min_size) {
  const S* const data = boxes.const_data_ptr<S>();
  const int64_t count = boxes.numel() / 4, parts = ceil_div(count, kGrain);
  const std::unique_ptr<uint8_t[]> large(new uint8_t[count]);
  std::vector<int64_t> starts(parts + 1);  // where a part writes its first index
  parallel_ranges(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kGrain;
      starts[part + 1] = flag_large(data + 4 * first, min_of(kGrain, count - first), min_size, large.get() + first);
    }
  });
  for (int64_t part = 0; part < parts; ++part) starts[part + 1] += starts[part];
  const Tensor out = allocate(op, {starts[parts]}, ScalarType::Long, boxes);
  int64_t* const indices = out.mutable_data_ptr<int64_t>();
  parallel_ranges(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      write_flagged(large.get(), part * kGrain, starts[part + 1] - starts[part], indices + starts[part]);
    }
  });
  return out;
}

void check_boxes(const char* op, const Tensor& boxes, int64_t coordinates) {
  if (boxes.dim() == 0 || boxes.size(boxes.dim() - 1) != coordinates) {
    fail(op, "boxes must have shape [..., " + std::to_string(coordinates) + "], got " + shape_text(boxes));
  }
  check_floating(op, "boxes", boxes);
}

// The first `formats` formats are allowed.
BoxFormat check_format(const char* op, const char* argument, int64_t format, int64_t formats) {
  if (format >= 0 && format < formats) return static_cast<BoxFormat>(format);
  fail(op, std::string(argument) + " must be in 0.." + std::to_string(formats - 1) + ", got " + std::to_string(format));
}

Tensor box_areas(const Tensor& boxes, int64_t fmt) {
  const char* const op = "box_area";
  const BoxFormat format = check_format(op, "fmt", fmt, kBoxFormats);
  check_boxes(op, boxes, coordinate_count(format));
  const Tensor out = allocate(op, leading_sizes(boxes, boxes.dim() - 1), compute_dtype(boxes.scalar_type()), boxes);
  const Tensor dense = as_contiguous(boxes);
  if (on_gpu(op, boxes)) {
    DETOPS_GPU_ONLY(box_area_cuda(dense, format, out));
    return out;
  }
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* const data = dense.const_data_ptr<S>();
    auto* const areas = out.mutable_data_ptr<ComputeType<S>>();
    dispatch_area_format(format, [&](auto area_format) {
      constexpr BoxFormat kFormat = decltype(area_format)::value;
      parallel_ranges(out.numel(), kGrain, [&](int64_t begin, int64_t end) {
        area_range<kFormat>(data + coordinate_count(kFormat) * begin, end - begin, areas + begin);
      });
    });
  });
  return out;
}

Tensor box_convert(const Tensor& boxes, int64_t in_fmt, int64_t out_fmt) {
  const char* const op = "box_convert";
  const BoxFormat in_format = check_format(op, "in_fmt", in_fmt, kUnrotatedFormats);
  const BoxFormat out_format = check_format(op, "out_fmt", out_fmt, kUnrotatedFormats);
  check_boxes(op, boxes, 4);
  const Tensor out = allocate(op, sizes_of(boxes), boxes.scalar_type(), boxes);
  const Tensor dense = as_contiguous(boxes);
  if (on_gpu(op, boxes)) {
    DETOPS_GPU_ONLY(box_convert_cuda(dense, in_format, out_format, out));
    return out;
  }
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* const data = dense.const_data_ptr<S>();
    S* const result = out.mutable_data_ptr<S>();
    dispatch_unrotated(in_format, [&](auto in) {
      dispatch_unrotated(out_format, [&](auto out_tag) {
        parallel_ranges(out.numel() / 4, kGrain, [&](int64_t begin, int64_t end) {
          convert_range<decltype(in)::value, decltype(out_tag)::value>(data + 4 * begin, end - begin,
                                                                       result + 4 * begin);
        });
      });
    });
  });
  return out;
}

Tensor clip_boxes_to_image(const Tensor& boxes, double height, double width) {
  const char* const op = "clip_boxes_to_image";
  check_boxes(op, boxes, 4);
  const Tensor out = allocate(op, sizes_of(boxes), boxes.scalar_type(), boxes);
  const Tensor dense = as_contiguous(boxes);
  if (on_gpu(op, boxes)) {
    DETOPS_GPU_ONLY(clip_boxes_to_image_cuda(dense, height, width, out));
    return out;
  }
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const S* const data = dense.const_data_ptr<S>();
    S* const result = out.mutable_data_ptr<S>();
    parallel_ranges(out.numel() / 4, kGrain, [&](int64_t begin, int64_t end) {
      clip_range(data + 4 * begin, end - begin, static_cast<T>(width), static_cast<T>(height), result + 4 * begin);
    });
  });
  return out;
}

Tensor remove_small_boxes(const Tensor& boxes, double min_size) {
  const char* const op = "remove_small_boxes";
  check_boxes(op, boxes, 4);
  const Tensor dense = as_contiguous(boxes);
  if (on_gpu(op, boxes)) {
    DETOPS_GPU_ONLY(return remove_small_boxes_cuda(dense, min_size));
  }
  Tensor out;
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    out = remove_small_boxes_cpu<S>(op, dense, static_cast<ComputeType<S>>(min_size));
  });
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&box_areas>("box_area(Tensor boxes, int fmt) -> Tensor");
  ops.add<&box_convert>("box_convert(Tensor boxes, int in_fmt, int out_fmt) -> Tensor");
  ops.add<&clip_boxes_to_image>("clip_boxes_to_image(Tensor boxes, float height, float width) -> Tensor");
  ops.add<&remove_small_boxes>("remove_small_boxes(Tensor boxes, float min_size) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
