// decode_yolo on a GPU. A block has a tile of 32 pixels of one image, level and anchor. Scores lie class by class in
// the result: those of contiguous maps, which lie pixel by pixel, turn in shared memory.
#include "coders/decode_yolo.h"

#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBackwardThreads = 128;

template <class T>
__device__ inline YoloCell<T> cell_of(const YoloLevel& level, int64_t pixel, const T* anchor) {
  const uint32_t width = static_cast<uint32_t>(level.width), number = static_cast<uint32_t>(pixel);
  return {static_cast<T>(number % width), static_cast<T>(number / width), static_cast<T>(level.stride), anchor[0],
          anchor[1]};
}

template <YoloVersion version, class S, class T>
__global__ void decode_yolo_kernel(YoloLevels levels, const T* anchors, T* boxes, S* objectness, S* scores) {
  DETOPS_SHARED(T, turned, 2 * kWarpSize * (kWarpSize + 1));
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const YoloTask task = yolo_task(levels, blockIdx.x);
  const YoloLevel& level = levels.level[task.level];
  const S* const raw = static_cast<const S*>(level.raw) + task.offset;
  const auto at = [&](int64_t pixel, int64_t channel) {
    return static_cast<T>(raw[pixel * level.pixel_step + channel * level.channel_step]);
  };
  const bool inside = lane < task.count;
  const T object = inside ? yolo_sigmoid(at(lane, 4)) : T(0);
  if (warp == 0 && inside) {
    const YoloCell<T> cell =
        cell_of(level, task.pixel + lane, anchors + 2 * (task.level * levels.anchors + task.anchor));
    store_box(yolo_box<version>(at(lane, 0), at(lane, 1), at(lane, 2), at(lane, 3), cell),
              boxes + 4 * (task.row + lane));
    objectness[task.row + lane] = static_cast<S>(object);
  }
  S* const out = scores + task.row * levels.classes;
  if (level.channel_step == 1) {
    for (int pixel = warp; pixel < task.count; pixel += kWarps) {
      const T of_pixel = __shfl_sync(kFullWarp, object, pixel);
      for (int64_t c = lane; c < levels.classes; c += kWarpSize) {
        out[pixel * levels.classes + c] = static_cast<S>(of_pixel * yolo_sigmoid(at(pixel, kBoxChannels + c)));
      }
    }
    return;
  }
  // Two buffers in turn: one barrier for each.
  int buffer = 0;
  for (int64_t begin = 0; begin < levels.classes; begin += kWarpSize, buffer ^= 1) {
    T* const tile = turned + buffer * kWarpSize * (kWarpSize + 1);
    for (int c = warp; c < kWarpSize && begin + c < levels.classes; c += kWarps) {
      if (inside) tile[c * (kWarpSize + 1) + lane] = object * yolo_sigmoid(at(lane, kBoxChannels + begin + c));
    }
    __syncthreads();
    for (int pixel = warp; pixel < task.count; pixel += kWarps) {
      if (begin + lane >= levels.classes) continue;
      out[pixel * levels.classes + begin + lane] = static_cast<S>(tile[lane * (kWarpSize + 1) + pixel]);
    }
  }
}

// One thread per row: it adds up over the classes.
template <YoloVersion version, class S, class T>
__global__ void decode_yolo_backward_kernel(YoloLevels levels, const T* anchors, const T* of_boxes,
                                            const S* of_objectness, const S* of_scores) {
  const int64_t number = int64_t(blockIdx.x) * (kBackwardThreads / kYoloTileCuda) + threadIdx.x / kYoloTileCuda;
  if (number >= levels.tasks) return;
  const YoloTask task = yolo_task(levels, number);
  const int64_t pixel = threadIdx.x % kYoloTileCuda;
  if (pixel >= task.count) return;
  const YoloLevel& level = levels.level[task.level];
  const S* const raw = static_cast<const S*>(level.raw) + task.offset + pixel * level.pixel_step;
  S* const grad = static_cast<S*>(level.grad) + task.offset + pixel * level.pixel_step;
  const auto at = [&](int64_t channel) { return static_cast<T>(raw[channel * level.channel_step]); };
  const int64_t row = task.row + pixel;
  const YoloCell<T> cell =
      cell_of(level, task.pixel + pixel, anchors + 2 * (task.level * levels.anchors + task.anchor));
  const Box<T> of = yolo_box_gradient<version>(at(0), at(1), at(2), at(3), cell, load_box<T>(of_boxes + 4 * row));
  grad[0] = static_cast<S>(of.x1);
  grad[level.channel_step] = static_cast<S>(of.y1);
  grad[2 * level.channel_step] = static_cast<S>(of.x2);
  grad[3 * level.channel_step] = static_cast<S>(of.y2);
  const Logistic<T> object = logistic(at(4));
  T of_object = static_cast<T>(of_objectness[row]);
  for (int64_t c = 0; c < levels.classes; ++c) {
    const Logistic<T> value = logistic(at(kBoxChannels + c));
    const T upstream = static_cast<T>(of_scores[row * levels.classes + c]);
    of_object += upstream * value.present;
    grad[(kBoxChannels + c) * level.channel_step] =
        static_cast<S>(upstream * object.present * (value.present * value.absent));
  }
  grad[4 * level.channel_step] = static_cast<S>(of_object * (object.present * object.absent));
}

}  // namespace

void decode_yolo_cuda(const YoloLevels& levels, YoloVersion yolo, ScalarType dtype, const Tensor& anchors,
                      const YoloRows& out) {
  const CudaScope scope(anchors);
  dispatch_yolo(dtype, yolo, [&](auto tag, auto version) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    DETOPS_LAUNCH((decode_yolo_kernel<decltype(version)::value, S, T>),
                  blocks_for("decode_yolo", "raw", levels.tasks, 1), kThreads, 0, scope.stream(), levels,
                  anchors.const_data_ptr<T>(), out.boxes.mutable_data_ptr<T>(), out.objectness.mutable_data_ptr<S>(),
                  out.scores.mutable_data_ptr<S>());
  });
}

void decode_yolo_backward_cuda(const YoloLevels& levels, YoloVersion yolo, ScalarType dtype, const Tensor& anchors,
                               const YoloRows& grad) {
  const CudaScope scope(anchors);
  const unsigned blocks = blocks_for("decode_yolo", "raw", levels.tasks, kBackwardThreads / kYoloTileCuda);
  dispatch_yolo(dtype, yolo, [&](auto tag, auto version) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    DETOPS_LAUNCH((decode_yolo_backward_kernel<decltype(version)::value, S, T>), blocks, kBackwardThreads, 0,
                  scope.stream(), levels, anchors.const_data_ptr<T>(), grad.boxes.const_data_ptr<T>(),
                  grad.objectness.const_data_ptr<S>(), grad.scores.const_data_ptr<S>());
  });
}

}  // namespace DETOPS_NAMESPACE
