// decode_yolo: from the maps of an anchor-based YOLO head to boxes and scores, values and gradients, written once for
// both devices.
//
// Ops and shapes. For each of L levels a map raw[l] [B, K (5 + C), H_l, W_l], whose channels are, for each of K
// anchors, tx, ty, tw, th, the objectness and C classes; N = sum_l K H_l W_l rows, in the order (level, anchor, y, x).
//   decode_yolo           raw, anchors [L, K, 2], strides -> boxes [B, N, 4] xyxy, objectness [B, N], scores [B, N, C]
//   decode_yolo_backward  the three gradients and the same -> gradients of raw
//
// With s(t) = 1 / (1 + exp(-t)), the cell (i, j) and the stride d of a level and the sides (aw, ah) of an anchor:
//   v3   centre d (i + s(tx)), d (j + s(ty)), sides aw exp(tw), ah exp(th)             Redmon and Farhadi, 2018
//   v5   centre d (i + 2 s(tx) - 1/2), ..., sides aw (2 s(tw))^2, ah (2 s(th))^2
//   objectness s(to), scores s(to) s(tc)
//
// Types. Maps of one dtype; boxes and anchors are in the type in which they are computed, the rest in that of the maps.
// A float stays a float, see common/logistic.h: the same bits on every device, sums over classes in their order.
#pragma once

#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/geometry.h"
#include "common/logistic.h"

namespace DETOPS_NAMESPACE {

enum class YoloVersion : int64_t { kV3 = 3, kV5 = 5 };

constexpr int64_t kMostYoloLevels = 8;
constexpr int kBoxChannels = 5;  // before the classes

// One level. A map is contiguous or channels_last: pixels lie `pixel_step` apart, channels `channel_step`.
struct YoloLevel {
  const void* raw;
  void* grad;  // of the backward, laid out as `raw`
  int64_t first_row;
  int64_t width, pixels;
  int64_t pixel_step, channel_step;
  double stride;
  int64_t first_task;  // of those of all levels: one for each image, anchor and tile of pixels
};

struct YoloLevels {
  int64_t count;
  YoloLevel level[kMostYoloLevels];
  int64_t images, anchors, classes, rows;
  int64_t tile, tasks;  // pixels of a task, tasks of all levels

  DETOPS_HD int64_t channels() const { return kBoxChannels + classes; }
};

// What a task works on.
struct YoloTask {
  int64_t level, image, anchor, pixel, count;
  int64_t offset;  // of its first pixel's first channel in the map
  int64_t row;     // of its first pixel among all rows of all images
};

DETOPS_HD YoloTask yolo_task(const YoloLevels& levels, int64_t number) {
  YoloTask task;
  task.level = 0;
  while (task.level + 1 < levels.count && number >= levels.level[task.level + 1].first_task) ++task.level;
  const YoloLevel& level = levels.level[task.level];
  const int64_t tiles = ceil_div(level.pixels, levels.tile), local = number - level.first_task, plane = local / tiles;
  task.image = plane / levels.anchors;
  task.anchor = plane % levels.anchors;
  task.pixel = local % tiles * levels.tile;
  task.count = min_of(levels.tile, level.pixels - task.pixel);
  task.offset = (task.image * levels.anchors * level.pixels) * levels.channels() +
                task.anchor * levels.channels() * level.channel_step + task.pixel * level.pixel_step;
  task.row = task.image * levels.rows + level.first_row + task.anchor * level.pixels + task.pixel;
  return task;
}

template <class T>
DETOPS_HD T yolo_sigmoid(T x) {
  return logistic(x).present;
}

// A cell's corner in cells, and its anchor's sides.
template <class T>
struct YoloCell {
  T x, y, stride, width, height;
};

template <YoloVersion version, class T>
DETOPS_HD Box<T> yolo_box(T tx, T ty, T tw, T th, const YoloCell<T>& cell) {
  T cx = yolo_sigmoid(tx), cy = yolo_sigmoid(ty), half_w, half_h;
  if (version == YoloVersion::kV3) {
    half_w = T(0.5) * (fast_exp(tw) * cell.width);
    half_h = T(0.5) * (fast_exp(th) * cell.height);
  } else {
    cx = T(2) * cx - T(0.5);
    cy = T(2) * cy - T(0.5);
    const T w = yolo_sigmoid(tw), h = yolo_sigmoid(th);
    half_w = T(2) * (w * w) * cell.width;
    half_h = T(2) * (h * h) * cell.height;
  }
  cx = (cx + cell.x) * cell.stride;
  cy = (cy + cell.y) * cell.stride;
  return {cx - half_w, cy - half_h, cx + half_w, cy + half_h};
}

// The gradient with respect to (tx, ty, tw, th).
template <YoloVersion version, class T>
DETOPS_HD Box<T> yolo_box_gradient(T tx, T ty, T tw, T th, const YoloCell<T>& cell, const Box<T>& grad) {
  const Logistic<T> x = logistic(tx), y = logistic(ty);
  const T scale = version == YoloVersion::kV3 ? cell.stride : T(2) * cell.stride;
  const T of_cx = (grad.x1 + grad.x2) * scale, of_cy = (grad.y1 + grad.y2) * scale;
  T of_w = (grad.x2 - grad.x1) * cell.width, of_h = (grad.y2 - grad.y1) * cell.height;
  if (version == YoloVersion::kV3) {
    of_w *= T(0.5) * fast_exp(tw);
    of_h *= T(0.5) * fast_exp(th);
  } else {
    const Logistic<T> w = logistic(tw), h = logistic(th);
    of_w *= T(4) * (w.present * w.present) * w.absent;
    of_h *= T(4) * (h.present * h.present) * h.absent;
  }
  return {of_cx * (x.present * x.absent), of_cy * (y.present * y.absent), of_w, of_h};
}

// Calls body(TypeTag of the maps' type, integral constant of the version).
template <class Body>
void dispatch_yolo(ScalarType dtype, YoloVersion version, const Body& body) {
  dispatch_floating(dtype, [&](auto tag) {
    if (version == YoloVersion::kV3) return body(tag, std::integral_constant<YoloVersion, YoloVersion::kV3>{});
    body(tag, std::integral_constant<YoloVersion, YoloVersion::kV5>{});
  });
}

// The tensors of a result, or their gradients.
struct YoloRows {
  Tensor boxes, objectness, scores;
};

constexpr int64_t kYoloTileCuda = 32;  // pixels of a task on a GPU

// The launches. Arguments were checked, outputs are allocated, there is at least one task.
void decode_yolo_cuda(const YoloLevels& levels, YoloVersion version, ScalarType dtype, const Tensor& anchors,
                      const YoloRows& out);
void decode_yolo_backward_cuda(const YoloLevels& levels, YoloVersion version, ScalarType dtype, const Tensor& anchors,
                               const YoloRows& grad);

}  // namespace DETOPS_NAMESPACE
