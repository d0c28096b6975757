// assign_yolov3 on a GPU: marks the responsible anchors, finds each gt's best among them (one block per gt), and then
// decides for each anchor (one thread, with the gts in shared memory).
#include "common/counted.h"
#include "common/launch_cuda.cuh"
#include "yolo/targets_cuda.cuh"
#include "yolo/yolov3.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kGtThreads = 128;  // of the block of a gt
constexpr int kTile = 64;        // gts that a block looks at together

template <class T>
struct Yolov3View {
  GroundTruthView<T> ground_truth;
  const T* anchors;
  int64_t images, gts;
  int64_t words;  // of bits, for the anchors of an image: a responsible one is below N, as its cell is in its map
  Counted<unsigned> bits;  // [B, words]: responsible anchors, zeroed
  T* best;                 // [B, M]
};

template <class T>
__global__ void yolov3_mark_kernel(Yolov3View<T> view, Yolov3Grid grid) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t per_gt = grid.levels * grid.anchors_per_cell;
  if (i >= view.images * view.gts * per_gt || !view.ground_truth.usable(i / per_gt)) return;
  const int64_t row = i / per_gt;
  const auto level = static_cast<int>(i % per_gt / grid.anchors_per_cell);
  if (!grid.has_cells(level)) return;
  const Box<T> gt = load_box<T>(view.ground_truth.boxes + 4 * row);
  const int64_t anchor = grid.responsible(gt, level, i % grid.anchors_per_cell);
  const Counted<unsigned> of_image = view.bits.part(row / view.gts * view.words, view.words);
  atomicOr(&of_image[anchor / 32], 1u << anchor % 32);
}

template <class T>
__global__ void yolov3_best_kernel(Yolov3View<T> view, Yolov3Grid grid) {
  DETOPS_SHARED(T, best_of_warps, kGtThreads / kWarpSize);
  const int64_t row = blockIdx.x;
  if (!view.ground_truth.usable(row)) return;
  const IouBox<T> gt = iou_box<IouKind::kIou>(load_box<T>(view.ground_truth.boxes + 4 * row));
  const unsigned* const bits = view.bits.data() + row / view.gts * view.words;
  T best = 0;
  for (int64_t word = threadIdx.x; word < view.words; word += kGtThreads) {
    for (unsigned rest = bits[word]; rest != 0; rest &= rest - 1) {
      const int64_t anchor = word * 32 + __ffs(static_cast<int>(rest)) - 1;
      best = max_of(positive_or_zero_iou(gt, grid.box(anchor, view.anchors)), best);
    }
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    best = max_of(best, __shfl_xor_sync(kFullWarp, best, distance));
  }
  if (threadIdx.x % kWarpSize == 0) best_of_warps[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kGtThreads / kWarpSize; ++warp) best = max_of(best, best_of_warps[warp]);
  view.best[row] = best;
}

// A block belongs to one image.
template <class T>
__global__ void yolov3_assign_kernel(Yolov3View<T> view, Yolov3Grid grid, double iou_threshold, int blocks_per_image,
                                     const void* gt_boxes, int element_bytes, int64_t* indices, int64_t* labels,
                                     void* boxes) {
  DETOPS_SHARED(IouBox<T>, gts, kTile);
  DETOPS_SHARED(T, best, kTile);  // -1 where the row takes no part
  const int64_t image = blockIdx.x / blocks_per_image;
  const int64_t anchor = int64_t(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const bool in_range = anchor < grid.count;
  const bool responsible = in_range && (view.bits[image * view.words + anchor / 32] >> anchor % 32 & 1);
  const IouBox<T> box = grid.box(in_range ? anchor : 0, view.anchors);
  Yolov3Choice<T> choice{T(0), -1, -1};
  for (int64_t first = 0; first < view.gts; first += kTile) {
    const int count = static_cast<int>(min_of<int64_t>(kTile, view.gts - first));
    if (threadIdx.x < count) {
      const int64_t row = image * view.gts + first + threadIdx.x;
      gts[threadIdx.x] = iou_box<IouKind::kIou>(load_box<T>(view.ground_truth.boxes + 4 * row));
      best[threadIdx.x] = view.ground_truth.usable(row) ? view.best[row] : T(-1);
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      if (best[j] < T(0)) continue;
      choice.look(static_cast<int32_t>(first) + j, positive_or_zero_iou(gts[j], box), responsible, best[j]);
    }
    __syncthreads();
  }
  if (!in_range) return;
  const int32_t gt = choice.result(responsible, iou_threshold);
  const int64_t to = image * grid.count + anchor, row = image * view.gts + gt;
  indices[to] = gt;
  labels[to] = gt >= 0 ? view.ground_truth.labels[row] : gt;
  copy_box(gt_boxes, gt >= 0 ? row : -1, element_bytes, boxes, to);
}

template <class T>
void launch_all(const Yolov3Inputs& inputs, const Yolov3Outputs& out) {
  const char* const op = "assign_yolov3";
  const CudaScope scope(inputs.gt_boxes);
  const cudaStream_t stream = scope.stream();
  const Yolov3Grid& grid = inputs.grid;
  const int64_t images = inputs.gt_boxes.size(0), gts = inputs.gt_boxes.size(1);
  const int64_t words = ceil_div<int64_t>(grid.count, 32);
  const int64_t bytes = images * words * int64_t(sizeof(unsigned));
  const Tensor bits = allocate(op, {bytes}, ScalarType::Byte, inputs.gt_boxes);
  const Tensor best = allocate(op, {images * gts}, inputs.gt_boxes.scalar_type(), inputs.gt_boxes);
  const Counted<unsigned> counted_bits(op, "bits", static_cast<unsigned*>(bits.mutable_data_ptr()), images * words);
  const Yolov3View<T> view{
      inputs.ground_truth<T>(),  inputs.anchors.const_data_ptr<T>(), images, gts, words, counted_bits,
      best.mutable_data_ptr<T>()};
  check_cuda(cudaMemsetAsync(bits.mutable_data_ptr(), 0, bytes, stream), op);
  if (gts > 0) {
    const int64_t marks = checked_rows(op, "gt_boxes", {images * gts, grid.levels, grid.anchors_per_cell});
    DETOPS_LAUNCH((yolov3_mark_kernel<T>), blocks_for(op, "gt_boxes", marks, kThreads), kThreads, 0, stream, view,
                  grid);
    DETOPS_LAUNCH((yolov3_best_kernel<T>), static_cast<unsigned>(images * gts), kGtThreads, 0, stream, view, grid);
  }
  const auto per_image = static_cast<int>(ceil_div<int64_t>(grid.count, kThreads));
  DETOPS_LAUNCH((yolov3_assign_kernel<T>), static_cast<unsigned>(images * per_image), kThreads, 0, stream, view, grid,
                inputs.iou_threshold, per_image, inputs.gt_boxes_out.const_data_ptr(),
                static_cast<int>(inputs.gt_boxes_out.element_size()), out.gt_indices.mutable_data_ptr<int64_t>(),
                out.labels.mutable_data_ptr<int64_t>(), out.boxes.mutable_data_ptr());
}

}  // namespace

void assign_yolov3_cuda(const Yolov3Inputs& inputs, const Yolov3Outputs& out) {
  dispatch_compute_type(inputs.gt_boxes.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_all<T>(inputs, out);
  });
}

}  // namespace DETOPS_NAMESPACE
