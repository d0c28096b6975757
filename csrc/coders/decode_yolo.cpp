// decode_yolo: schema, checks, and the CPU kernels.
#include "coders/decode_yolo.h"

#include <tuple>

#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kTile = 64;               // pixels of a task
constexpr int kBlock = 16;              // classes of a task that are computed together
static_assert(kBlock >= kBoxChannels);  // the channels before the classes use the same rows

// Reads one channel of `count` pixels.
template <class S, class T>
DETOPS_HD void read_channel(const S* raw, int64_t pixel_step, int64_t count, T* __restrict__ values) {
  if (pixel_step == 1) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(raw[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(raw[i * pixel_step]);
  }
}

// The cells of a task's pixels.
template <class T>
struct Cells {
  T x[kTile], y[kTile];

  Cells(const YoloLevel& level, const YoloTask& task) {
    int64_t column = task.pixel % level.width, row = task.pixel / level.width;
    for (int64_t i = 0; i < task.count; ++i) {
      x[i] = static_cast<T>(column);
      y[i] = static_cast<T>(row);
      if (++column == level.width) {
        column = 0;
        ++row;
      }
    }
  }
};

template <YoloVersion version, class S, class T>
DETOPS_CLONES void decode_task(const YoloLevel& level, const YoloTask& task, int64_t classes, const T* anchor,
                               T* __restrict__ boxes, S* __restrict__ objectness, S* __restrict__ scores) {
  const S* const raw = static_cast<const S*>(level.raw) + task.offset;
  const Cells<T> cells(level, task);
  const T stride = static_cast<T>(level.stride), width = anchor[0], height = anchor[1];
  T values[kBlock][kTile], object[kTile];
  for (int channel = 0; channel < kBoxChannels; ++channel) {
    read_channel(raw + channel * level.channel_step, level.pixel_step, task.count, values[channel]);
  }
  T corners[4][kTile];
#pragma GCC ivdep
  for (int64_t i = 0; i < task.count; ++i) {
    const Box<T> box = yolo_box<version>(values[0][i], values[1][i], values[2][i], values[3][i],
                                         YoloCell<T>{cells.x[i], cells.y[i], stride, width, height});
    corners[0][i] = box.x1;
    corners[1][i] = box.y1;
    corners[2][i] = box.x2;
    corners[3][i] = box.y2;
  }
  for (int64_t i = 0; i < task.count; ++i) {
    for (int c = 0; c < 4; ++c) boxes[4 * i + c] = corners[c][i];
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < task.count; ++i) object[i] = yolo_sigmoid(values[4][i]);
  for (int64_t i = 0; i < task.count; ++i) objectness[i] = static_cast<S>(object[i]);
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t block = min_of<int64_t>(kBlock, classes - begin);
    for (int64_t c = 0; c < block; ++c) {
      T* const row = values[c];
      read_channel(raw + (kBoxChannels + begin + c) * level.channel_step, level.pixel_step, task.count, row);
#pragma GCC ivdep
      for (int64_t i = 0; i < task.count; ++i) row[i] = object[i] * yolo_sigmoid(row[i]);
    }
    for (int64_t i = 0; i < task.count; ++i) {
      S* const row = scores + i * classes + begin;
      for (int64_t c = 0; c < block; ++c) row[c] = static_cast<S>(values[c][i]);
    }
  }
}

template <class S, class T>
DETOPS_HD void write_channel(const T* values, int64_t pixel_step, int64_t count, S* __restrict__ grad) {
  for (int64_t i = 0; i < count; ++i) grad[i * pixel_step] = static_cast<S>(values[i]);
}

template <YoloVersion version, class S, class T>
DETOPS_CLONES void decode_task_backward(const YoloLevel& level, const YoloTask& task, int64_t classes, const T* anchor,
                                        const T* of_boxes, const S* of_objectness, const S* of_scores) {
  const S* const raw = static_cast<const S*>(level.raw) + task.offset;
  S* const grad = static_cast<S*>(level.grad) + task.offset;
  const Cells<T> cells(level, task);
  const T stride = static_cast<T>(level.stride), width = anchor[0], height = anchor[1];
  T values[kBlock][kTile], upstream[kBlock][kTile], present[kTile], absent[kTile], of_object[kTile];
  for (int channel = 0; channel < kBoxChannels; ++channel) {
    read_channel(raw + channel * level.channel_step, level.pixel_step, task.count, values[channel]);
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < task.count; ++i) {
    const Box<T> of = yolo_box_gradient<version>(values[0][i], values[1][i], values[2][i], values[3][i],
                                                 YoloCell<T>{cells.x[i], cells.y[i], stride, width, height},
                                                 load_box<T>(of_boxes + 4 * i));
    const Logistic<T> object = logistic(values[4][i]);
    values[0][i] = of.x1;
    values[1][i] = of.y1;
    values[2][i] = of.x2;
    values[3][i] = of.y2;
    present[i] = object.present;
    absent[i] = object.absent;
    of_object[i] = static_cast<T>(of_objectness[i]);
  }
  for (int channel = 0; channel < 4; ++channel) {
    write_channel(values[channel], level.pixel_step, task.count, grad + channel * level.channel_step);
  }
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t block = min_of<int64_t>(kBlock, classes - begin);
    for (int64_t i = 0; i < task.count; ++i) {
      for (int64_t c = 0; c < block; ++c) upstream[c][i] = static_cast<T>(of_scores[i * classes + begin + c]);
    }
    for (int64_t c = 0; c < block; ++c) {
      const int64_t channel = (kBoxChannels + begin + c) * level.channel_step;
      T* const row = values[c];
      read_channel(raw + channel, level.pixel_step, task.count, row);
#pragma GCC ivdep
      for (int64_t i = 0; i < task.count; ++i) {
        const Logistic<T> value = logistic(row[i]);
        of_object[i] += upstream[c][i] * value.present;
        row[i] = upstream[c][i] * present[i] * (value.present * value.absent);
      }
      write_channel(row, level.pixel_step, task.count, grad + channel);
    }
  }
  for (int64_t i = 0; i < task.count; ++i) of_object[i] *= present[i] * absent[i];
  write_channel(of_object, level.pixel_step, task.count, grad + 4 * level.channel_step);
}

void decode_yolo_cpu(const YoloLevels& levels, YoloVersion yolo, ScalarType dtype, const Tensor& anchors,
                     const YoloRows& out) {
  dispatch_yolo(dtype, yolo, [&](auto tag, auto version) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const T* const sides = anchors.const_data_ptr<T>();
    T* const boxes = out.boxes.mutable_data_ptr<T>();
    S *const objectness = out.objectness.mutable_data_ptr<S>(), *const scores = out.scores.mutable_data_ptr<S>();
    parallel_ranges(levels.tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const YoloTask task = yolo_task(levels, number);
        decode_task<version.value, S, T>(levels.level[task.level], task, levels.classes,
                                         sides + 2 * (task.level * levels.anchors + task.anchor), boxes + 4 * task.row,
                                         objectness + task.row, scores + task.row * levels.classes);
      }
    });
  });
}

void decode_yolo_backward_cpu(const YoloLevels& levels, YoloVersion yolo, ScalarType dtype, const Tensor& anchors,
                              const YoloRows& grad) {
  dispatch_yolo(dtype, yolo, [&](auto tag, auto version) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const T *const sides = anchors.const_data_ptr<T>(), *const boxes = grad.boxes.const_data_ptr<T>();
    const S *const objectness = grad.objectness.const_data_ptr<S>(), *const scores = grad.scores.const_data_ptr<S>();
    parallel_ranges(levels.tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const YoloTask task = yolo_task(levels, number);
        decode_task_backward<version.value, S, T>(
            levels.level[task.level], task, levels.classes, sides + 2 * (task.level * levels.anchors + task.anchor),
            boxes + 4 * task.row, objectness + task.row, scores + task.row * levels.classes);
      }
    });
  });
}

constexpr const char* kOp = "decode_yolo";

YoloVersion checked_version(int64_t version) {
  if (version == 3 || version == 5) return static_cast<YoloVersion>(version);
  fail(kOp, "version must be 3 or 5, got " + std::to_string(version));
}

bool is_channels_last(const Tensor& map) {
  return map.stride(1) == 1 && map.stride(3) == map.size(1) && map.stride(2) == map.size(1) * map.size(3) &&
         map.stride(0) == map.size(1) * map.size(2) * map.size(3);
}

// Checks the arguments. `dense` holds the maps, contiguous or channels_last.
YoloLevels checked_levels(const std::vector<Tensor>& raw, const Tensor& anchors, const std::vector<double>& strides,
                          std::vector<Tensor>& dense) {
  const int64_t count = static_cast<int64_t>(raw.size());
  if (count < 1 || count > kMostYoloLevels) {
    fail(kOp, "raw must have 1 to " + std::to_string(kMostYoloLevels) + " levels, got " + std::to_string(count));
  }
  if (anchors.dim() != 3 || anchors.size(0) != count || anchors.size(1) < 1 || anchors.size(2) != 2) {
    fail(kOp, "anchors must have shape [levels, K, 2] with " + std::to_string(count) + " levels, got " +
                  shape_text(anchors));
  }
  if (static_cast<int64_t>(strides.size()) != count) {
    fail(kOp, "strides must be " + std::to_string(count) + " numbers, got " + std::to_string(strides.size()));
  }
  YoloLevels levels{};
  levels.count = count;
  levels.anchors = anchors.size(1);
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& map = raw[i];
    const std::string name = "raw[" + std::to_string(i) + "]";
    check_floating(kOp, name.c_str(), map);
    const int64_t least = levels.anchors * kBoxChannels;
    const bool fits = map.dim() == 4 && map.size(1) >= least && map.size(1) % levels.anchors == 0 &&
                      map.size(0) == raw[0].size(0) && map.size(1) == raw[0].size(1);
    if (!fits) {
      fail(kOp, name + " must have shape [B, " + std::to_string(levels.anchors) +
                    " (5 + C), H, W], with B and C of all levels, got " + shape_text(map));
    }
    check_same_dtype(kOp, name.c_str(), map, "raw[0]", raw[0]);
    check_same_device(kOp, name.c_str(), map, "raw[0]", raw[0]);
    dense.push_back(is_channels_last(map) ? map : as_contiguous(map));
    YoloLevel& level = levels.level[i];
    const bool last = !dense[i].is_contiguous();
    level.raw = dense[i].const_data_ptr();
    level.first_row = levels.rows;
    level.width = map.size(3);
    level.pixels = map.size(2) * map.size(3);
    level.pixel_step = last ? map.size(1) : 1;
    level.channel_step = last ? 1 : level.pixels;
    level.stride = strides[i];
    levels.rows += levels.anchors * level.pixels;
  }
  if (anchors.scalar_type() != compute_dtype(raw[0].scalar_type())) {
    fail(kOp, "anchors must be " + dtype_name(compute_dtype(raw[0].scalar_type())) + " for raw of " +
                  dtype_name(raw[0].scalar_type()) + ", got " + dtype_name(anchors.scalar_type()));
  }
  check_same_device(kOp, "anchors", anchors, "raw[0]", raw[0]);
  levels.images = raw[0].size(0);
  levels.classes = raw[0].size(1) / levels.anchors - kBoxChannels;
  levels.tile = on_gpu(kOp, raw[0]) ? kYoloTileCuda : kTile;
  for (int64_t i = 0; i < count; ++i) {
    levels.level[i].first_task = levels.tasks;
    levels.tasks += levels.images * levels.anchors * ceil_div(levels.level[i].pixels, levels.tile);
  }
  return levels;
}

std::tuple<Tensor, Tensor, Tensor> decode_yolo(std::vector<Tensor> raw, const Tensor& anchors,
                                               std::vector<double> strides, int64_t version_number) {
  const YoloVersion version = checked_version(version_number);
  std::vector<Tensor> dense;
  const YoloLevels levels = checked_levels(raw, anchors, strides, dense);
  const ScalarType dtype = raw[0].scalar_type();
  const YoloRows out{allocate(kOp, {levels.images, levels.rows, 4}, compute_dtype(dtype), raw[0]),
                     allocate(kOp, {levels.images, levels.rows}, dtype, raw[0]),
                     allocate(kOp, {levels.images, levels.rows, levels.classes}, dtype, raw[0])};
  if (levels.tasks > 0) {
    if (on_gpu(kOp, raw[0])) {
      DETOPS_GPU_ONLY(decode_yolo_cuda(levels, version, dtype, as_contiguous(anchors), out));
    } else {
      decode_yolo_cpu(levels, version, dtype, as_contiguous(anchors), out);
    }
  }
  return {out.boxes, out.objectness, out.scores};
}

void check_grad(const char* argument, const Tensor& grad, const std::vector<int64_t>& sizes, ScalarType dtype,
                const Tensor& like) {
  if (sizes_of(grad) != sizes || grad.scalar_type() != dtype) {
    fail(kOp, std::string(argument) + " must have the shape and dtype of its result, got " + shape_text(grad) + " of " +
                  dtype_name(grad.scalar_type()));
  }
  check_same_device(kOp, argument, grad, "raw[0]", like);
}

std::vector<Tensor> decode_yolo_backward(const Tensor& grad_boxes, const Tensor& grad_objectness,
                                         const Tensor& grad_scores, std::vector<Tensor> raw, const Tensor& anchors,
                                         std::vector<double> strides, int64_t version_number) {
  const YoloVersion version = checked_version(version_number);
  std::vector<Tensor> dense, grads;
  YoloLevels levels = checked_levels(raw, anchors, strides, dense);
  const ScalarType dtype = raw[0].scalar_type();
  check_grad("grad_boxes", grad_boxes, {levels.images, levels.rows, 4}, compute_dtype(dtype), raw[0]);
  check_grad("grad_objectness", grad_objectness, {levels.images, levels.rows}, dtype, raw[0]);
  check_grad("grad_scores", grad_scores, {levels.images, levels.rows, levels.classes}, dtype, raw[0]);
  const YoloRows grad{as_contiguous(grad_boxes), as_contiguous(grad_objectness), as_contiguous(grad_scores)};
  for (int64_t i = 0; i < levels.count; ++i) {
    const Tensor& map = dense[i];
    std::vector<int64_t> sizes, steps;
    for (int64_t dim = 0; dim < 4; ++dim) {
      sizes.push_back(map.size(dim));
      steps.push_back(map.stride(dim));
    }
    grads.push_back(allocate_strided(kOp, sizes, steps, dtype, map));
    levels.level[i].grad = grads[i].mutable_data_ptr();
  }
  if (levels.tasks == 0) return grads;
  if (on_gpu(kOp, raw[0])) {
    DETOPS_GPU_ONLY(decode_yolo_backward_cuda(levels, version, dtype, as_contiguous(anchors), grad));
  } else {
    decode_yolo_backward_cpu(levels, version, dtype, as_contiguous(anchors), grad);
  }
  return grads;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&decode_yolo>(
      "decode_yolo(Tensor[] raw, Tensor anchors, float[] strides, int version) -> (Tensor, Tensor, Tensor)");
  ops.add<&decode_yolo_backward>(
      "decode_yolo_backward(Tensor grad_boxes, Tensor grad_objectness, Tensor grad_scores, Tensor[] raw, "
      "Tensor anchors, float[] strides, int version) -> Tensor[]");
}

}  // namespace DETOPS_NAMESPACE
