// assign_atss on a GPU, without a host synchronisation.
//
//   1. candidates  a block per box: the nearest anchors of each level, one a round; then the threshold. Positives raise
//                  the best IoU of their anchor.
//   2. resolve     one thread a candidate: of the boxes with the best IoU of an anchor the first gets it
//   3. write       one thread an anchor
#include <type_traits>

#include "common/counted.h"
#include "common/launch_cuda.cuh"
#include "matching/assign_atss.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kNobody = 0x7f7f7f7f;  // more than any row, and four equal bytes

// The bits of an IoU plus 1; 0 stands for none.
template <class T>
using Mark = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;
template <class T>
__device__ inline Mark<T> mark_of(T iou) {
  return bit_cast<Mark<T>>(iou) + 1;
}

template <class T>
struct AtssTensors {
  const T *anchors, *gt_boxes;
  const bool* gt_valid;
  int anchor_count, gts;
  int64_t anchor_stride;
  int* candidates;    // [B, M, candidates], -1 for those that are no positives
  T* candidate_ious;  // the same
  Mark<T>* best;      // [B, A]
  int* winner;        // [B, A]

  // A candidate is an anchor of the image: there are no more of a level than it has anchors, each round finds another
  // one, and none is as far as the place that stands for no anchor.
  __device__ Counted<Mark<T>> best_of(int64_t image) const {
    return {"assign_atss", "best IoUs of an image", best + image * anchor_count, anchor_count};
  }
};

// The nearest of the anchors of this thread that are farther than `after`.
template <class T>
__device__ inline Candidate<T> nearest_after(const T* anchors, int first, int count, const Point<T>& point,
                                             const Candidate<T>& after) {
  Candidate<T> best{kInfinityOf<T>, INT32_MAX};
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Box<T> anchor = load_box<T>(anchors + 4 * int64_t(first + i));
    const Candidate<T> candidate{squared_distance(centre_of(anchor), point), first + i};
    if (is_nearer(after, candidate) && is_nearer(candidate, best)) best = candidate;
  }
  return best;
}

// blockIdx.x is the box, of all images.
template <class T>
__global__ void atss_candidates_kernel(AtssTensors<T> tensors, AtssLevels levels) {
  DETOPS_SHARED(Candidate<T>, warp_best, 2 * kWarps);
  DETOPS_SHARED(T, threshold, 1);
  const int64_t box = blockIdx.x, image = box / tensors.gts;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int* const candidates = tensors.candidates + box * levels.all_candidates;
  T* const ious = tensors.candidate_ious + box * levels.all_candidates;
  if (tensors.gt_valid != nullptr && !tensors.gt_valid[box]) {
    for (int i = threadIdx.x; i < levels.all_candidates; i += kThreads) candidates[i] = -1;
    return;
  }
  const T* const anchors = tensors.anchors + image * tensors.anchor_stride;
  const Box<T> gt = load_box<T>(tensors.gt_boxes + 4 * box);
  const Point<T> point = centre_of(gt);
  int first = 0, found = 0, round = 0;
  for (int level = 0; level < levels.count; ++level) {
    const int count = levels.sizes[level];
    Candidate<T> own = nearest_after(anchors, first, count, point, Candidate<T>{T(-1), -1});
    for (int i = 0; i < levels.candidates[level]; ++i) {
      Candidate<T> best = own;
      for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        const Candidate<T> other{__shfl_xor_sync(kFullWarp, best.distance, distance),
                                 __shfl_xor_sync(kFullWarp, best.anchor, distance)};
        if (is_nearer(other, best)) best = other;
      }
      // Two sets, in turn: nobody writes to a set before all have read it.
      Candidate<T>* const of_round = warp_best + (round++ & 1) * kWarps;
      if (lane == 0) of_round[warp] = best;
      __syncthreads();
      best = of_round[0];
      for (int k = 1; k < kWarps; ++k) {
        if (is_nearer(of_round[k], best)) best = of_round[k];
      }
      if (best.anchor == own.anchor) {
        candidates[found + i] = best.anchor;
        own = nearest_after(anchors, first, count, point, best);
      }
    }
    first += count;
    found += levels.candidates[level];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < found; i += kThreads) {
    const Box<T> anchor = load_box<T>(anchors + 4 * int64_t(candidates[i]));
    ious[i] = match_iou(anchor, box_area(anchor), gt, box_area(gt));
  }
  __syncthreads();
  if (threadIdx.x == 0) threshold[0] = atss_threshold(ious, found);
  __syncthreads();
  for (int i = threadIdx.x; i < found; i += kThreads) {
    const int anchor = candidates[i];
    const Point<T> centre = centre_of(load_box<T>(anchors + 4 * int64_t(anchor)));
    if (is_atss_positive(ious[i], threshold[0], centre, gt)) {
      atomicMax(&tensors.best_of(image)[anchor], mark_of(ious[i]));
    } else {
      candidates[i] = -1;
    }
  }
}

template <class T>
__global__ void atss_resolve_kernel(AtssTensors<T> tensors, int all_candidates, int64_t items) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items || tensors.candidates[item] < 0) return;
  const int64_t box = item / all_candidates;
  const int64_t at = box / tensors.gts * tensors.anchor_count + tensors.candidates[item];
  if (mark_of(tensors.candidate_ious[item]) != tensors.best[at]) return;
  atomicMin(tensors.winner + at, static_cast<int>(box % tensors.gts));
}

template <class T>
__global__ void atss_write_kernel(AtssTensors<T> tensors, int64_t items, int64_t* indices, T* ious) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const Mark<T> best = tensors.best[item];
  indices[item] = best == 0 ? -1 : tensors.winner[item];
  ious[item] = best == 0 ? T(0) : bit_cast<T>(best - 1);
}

}  // namespace

void assign_atss_cuda(const MatchInputs& inputs, const AtssLevels& levels, const Tensor& indices, const Tensor& ious) {
  const char* const op = "assign_atss";
  const CudaScope scope(inputs.anchors);
  const cudaStream_t stream = scope.stream();
  const int64_t boxes = inputs.images * inputs.gts, items = boxes * levels.all_candidates, anchors = indices.numel();
  dispatch_compute_type(inputs.anchors.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto scratch = [&](int64_t count, size_t size) {
      return allocate(op, {count * int64_t(size)}, ScalarType::Byte, inputs.anchors);
    };
    const Tensor candidates = scratch(items, sizeof(int)), candidate_ious = scratch(items, sizeof(T));
    const Tensor best = scratch(anchors, sizeof(T)), winner = scratch(anchors, sizeof(int));
    const AtssTensors<T> tensors{inputs.anchors.const_data_ptr<T>(),
                                 inputs.gt_boxes.const_data_ptr<T>(),
                                 bool_data(inputs.gt_valid),
                                 static_cast<int>(inputs.anchor_count),
                                 static_cast<int>(inputs.gts),
                                 inputs.anchor_stride,
                                 static_cast<int*>(candidates.mutable_data_ptr()),
                                 static_cast<T*>(candidate_ious.mutable_data_ptr()),
                                 static_cast<Mark<T>*>(best.mutable_data_ptr()),
                                 static_cast<int*>(winner.mutable_data_ptr())};
    check_cuda(cudaMemsetAsync(tensors.best, 0, anchors * sizeof(T), stream), op);
    check_cuda(cudaMemsetAsync(tensors.winner, kNobody & 0xff, anchors * sizeof(int), stream), op);
    if (boxes > 0) {
      DETOPS_LAUNCH((atss_candidates_kernel<T>), blocks_for(op, "gt_boxes", boxes, 1), kThreads, 0, stream, tensors,
                    levels);
      DETOPS_LAUNCH((atss_resolve_kernel<T>), blocks_for(op, "gt_boxes", items, kThreads), kThreads, 0, stream, tensors,
                    levels.all_candidates, items);
    }
    DETOPS_LAUNCH((atss_write_kernel<T>), blocks_for(op, "anchors", anchors, kThreads), kThreads, 0, stream, tensors,
                  anchors, indices.mutable_data_ptr<int64_t>(), ious.mutable_data_ptr<T>());
  });
}

}  // namespace DETOPS_NAMESPACE
