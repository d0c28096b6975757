// match_max_iou on a GPU, without a matrix and without a host synchronisation.
//
//   1. match   one thread an anchor. A warp looks only at the boxes that meet the smallest box around its anchors. With
//              low-quality matches also the best IoU of each box, by chunk of anchors and over all.
//   2. ties    a block a chunk: looks again at the boxes whose best of all is in the chunk; or, where only the first
//              anchor counts: first, one warp a box, and force, one thread a box
#include <type_traits>

#include "common/launch_cuda.cuh"
#include "matching/matching.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The bits of an IoU, which is not negative: integers that compare as the IoUs do.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;

// The smallest box around those of all lanes.
template <class T>
__device__ inline Box<T> warp_box_around(Box<T> box) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    box = box_around(
        box, Box<T>{__shfl_xor_sync(kFullWarp, box.x1, distance), __shfl_xor_sync(kFullWarp, box.y1, distance),
                    __shfl_xor_sync(kFullWarp, box.x2, distance), __shfl_xor_sync(kFullWarp, box.y2, distance)});
  }
  return box;
}

// The arguments of all kernels. Chunks are numbered through all images.
template <class T>
struct MatchTensors {
  const T *anchors, *gt_boxes, *ignore_boxes;
  const bool *gt_valid, *ignore_valid;
  int anchor_count, gts, regions;
  int64_t anchor_stride;
  int chunks, chunk_length;
  int64_t* indices;
  T* ious;
  // With low-quality matches, else null:
  int* own;             // [B, A] the box of the best IoU, -1 for an ignored anchor
  Bits<T>* chunk_best;  // [B, chunks, M]
  Bits<T>* gt_best;     // [B, M]
  int* first;           // [B, M] the first anchor that has the best IoU of the box, or -1

  __device__ bool is_valid(int64_t image, int gt) const { return gt_valid == nullptr || gt_valid[image * gts + gt]; }
};

// Step 1. blockIdx.x is the chunk.
template <class T>
__global__ void match_max_iou_kernel(MatchTensors<T> tensors, MatchOptions<T> options) {
  DETOPS_SHARED(Box<T>, tile, kThreads);
  DETOPS_SHARED(T, areas, kThreads);
  DETOPS_SHARED(unsigned, usable, kWarps);  // by warp that loaded them: which boxes of the tile can overlap something
  DETOPS_SHARED(unsigned, valid, kWarps);
  DETOPS_SHARED(Bits<T>, tile_best, kThreads);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = blockIdx.x / tensors.chunks;
  const int start = static_cast<int>(blockIdx.x % tensors.chunks) * tensors.chunk_length;
  const int end = start + min(tensors.chunk_length, tensors.anchor_count - start);
  const bool low_quality = tensors.own != nullptr;

  for (int base = start; base < end; base += kThreads) {
    const int row = base + static_cast<int>(threadIdx.x);
    Box<T> anchor{};
    if (row < end) anchor = load_box<T>(tensors.anchors + image * tensors.anchor_stride + 4 * int64_t(row));
    const T area = box_area(anchor);
    const Box<T> around = warp_box_around(can_overlap(anchor, area) ? anchor : empty_box<T>());

    bool ignored = false;
    for (int first = 0; first < tensors.regions; first += kThreads) {
      const int own_region = first + static_cast<int>(threadIdx.x);
      bool can = false;
      if (own_region < tensors.regions) {
        const int64_t item = image * tensors.regions + own_region;
        tile[threadIdx.x] = load_box<T>(tensors.ignore_boxes + 4 * item);
        can = can_cover(tile[threadIdx.x]) && (tensors.ignore_valid == nullptr || tensors.ignore_valid[item]);
      }
      const unsigned vote = __ballot_sync(kFullWarp, can);
      if (lane == 0) usable[warp] = vote;
      __syncthreads();
      for (int group = 0; group < kWarps; ++group) {
        const int candidate = group * kWarpSize + lane;
        const bool may = (usable[group] >> lane & 1) != 0 && may_meet(tile[candidate], around);
        for (unsigned hits = __ballot_sync(kFullWarp, may); hits != 0; hits &= hits - 1) {
          const Box<T> region = tile[group * kWarpSize + __ffs(static_cast<int>(hits)) - 1];
          ignored = ignored || is_ignored(anchor, area, region, options.ignore_threshold);
        }
      }
      __syncthreads();
    }

    const bool counts = row < end && !ignored;
    T best = T(0);
    int best_gt = -1;
    for (int first = 0; first < tensors.gts; first += kThreads) {
      const int own_gt = first + static_cast<int>(threadIdx.x);
      bool is_valid = false, can = false;
      if (own_gt < tensors.gts) {
        const Box<T> gt = load_box<T>(tensors.gt_boxes + 4 * (image * tensors.gts + own_gt));
        tile[threadIdx.x] = gt;
        areas[threadIdx.x] = box_area(gt);
        is_valid = tensors.is_valid(image, own_gt);
        can = is_valid && can_overlap(gt, areas[threadIdx.x]);
      }
      tile_best[threadIdx.x] = 0;
      const unsigned valid_vote = __ballot_sync(kFullWarp, is_valid), vote = __ballot_sync(kFullWarp, can);
      if (lane == 0) {
        valid[warp] = valid_vote;
        usable[warp] = vote;
      }
      __syncthreads();
      for (int group = 0; group < kWarps; ++group) {
        if (best_gt < 0 && valid[group] != 0) {
          best_gt = first + group * kWarpSize + __ffs(static_cast<int>(valid[group])) - 1;
        }
        const int candidate = group * kWarpSize + lane;
        const bool may = (usable[group] >> lane & 1) != 0 && may_meet(tile[candidate], around);
        for (unsigned hits = __ballot_sync(kFullWarp, may); hits != 0; hits &= hits - 1) {
          const int j = group * kWarpSize + __ffs(static_cast<int>(hits)) - 1;
          const T iou = match_iou(anchor, area, tile[j], areas[j]);
          if (is_better_match(iou, best)) {
            best = iou;
            best_gt = first + j;
          }
          if (low_quality && counts && iou > T(0)) {
            const auto bits = bit_cast<Bits<T>>(iou);
            if (bits > relaxed_load(&tile_best[j])) atomicMax(&tile_best[j], bits);
          }
        }
      }
      __syncthreads();
      if (low_quality && own_gt < tensors.gts) {
        // The same thread has this box in every round.
        Bits<T>* const of_chunk = tensors.chunk_best + int64_t(blockIdx.x) * tensors.gts + own_gt;
        const Bits<T> before = base == start ? 0 : *of_chunk;
        const Bits<T> now = max(before, tile_best[threadIdx.x]);
        *of_chunk = now;
        if (now > before) atomicMax(tensors.gt_best + image * tensors.gts + own_gt, now);
      }
    }
    if (row < end) {
      const int64_t out = image * tensors.anchor_count + row;
      tensors.indices[out] = ignored ? kBetween : match_of(best, best_gt, options.thresholds);
      tensors.ious[out] = best;
      if (low_quality) tensors.own[out] = ignored ? -1 : best_gt;
    }
  }
}

// Step 2, where all anchors with the best IoU of a box count. blockIdx.x is the chunk.
template <class T>
__global__ void match_ties_kernel(MatchTensors<T> tensors, MatchOptions<T> options) {
  DETOPS_SHARED(unsigned, tied, kWarps);     // by warp that looked: boxes whose best IoU is in this chunk
  DETOPS_SHARED(unsigned, at_zero, kWarps);  // boxes whose best IoU is 0: all anchors have it
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = blockIdx.x / tensors.chunks;
  const int start = static_cast<int>(blockIdx.x % tensors.chunks) * tensors.chunk_length;
  const int end = start + min(tensors.chunk_length, tensors.anchor_count - start);
  for (int base = start; base < end; base += kThreads) {
    const int row = base + static_cast<int>(threadIdx.x);
    const int64_t out = image * tensors.anchor_count + row;
    int chosen = -1;  // the last box that this anchor serves
    for (int first = 0; first < tensors.gts; first += kThreads) {
      const int gt = first + static_cast<int>(threadIdx.x);
      bool is_tied = false, is_at_zero = false;
      if (gt < tensors.gts && tensors.is_valid(image, gt)) {
        const Bits<T> best = tensors.gt_best[image * tensors.gts + gt];
        const bool wants = wants_low_quality(bit_cast<T>(best), options);
        is_at_zero = wants && best == 0;
        is_tied = wants && best != 0 && tensors.chunk_best[int64_t(blockIdx.x) * tensors.gts + gt] == best;
      }
      const unsigned tied_vote = __ballot_sync(kFullWarp, is_tied), zero_vote = __ballot_sync(kFullWarp, is_at_zero);
      if (lane == 0) {
        tied[warp] = tied_vote;
        at_zero[warp] = zero_vote;
      }
      __syncthreads();
      for (int group = 0; group < kWarps; ++group) {
        const int group_first = first + group * kWarpSize;
        if (at_zero[group] != 0) chosen = max(chosen, group_first + 31 - __clz(static_cast<int>(at_zero[group])));
        if (row >= end) continue;
        for (unsigned hits = tied[group]; hits != 0; hits &= hits - 1) {
          const int j = group_first + __ffs(static_cast<int>(hits)) - 1;
          const Box<T> other = load_box<T>(tensors.gt_boxes + 4 * (image * tensors.gts + j));
          const Box<T> anchor = load_box<T>(tensors.anchors + image * tensors.anchor_stride + 4 * int64_t(row));
          const T iou = match_iou(anchor, box_area(anchor), other, box_area(other));
          if (bit_cast<Bits<T>>(iou) == tensors.gt_best[image * tensors.gts + j]) chosen = max(chosen, j);
        }
      }
      __syncthreads();
    }
    if (row >= end || chosen < 0) continue;
    const int own = tensors.own[out];
    if (own >= 0) tensors.indices[out] = options.this_gt ? chosen : own;
  }
}

// Step 2 where only the first anchor with the best IoU counts. One warp a box.
template <class T>
__global__ void match_first_kernel(MatchTensors<T> tensors, MatchOptions<T> options, int64_t boxes) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (item >= boxes) return;
  const int64_t image = item / tensors.gts;
  const int gt = static_cast<int>(item % tensors.gts);
  const Bits<T> best = tensors.gt_best[item];
  int found = -1;
  if (tensors.is_valid(image, gt) && wants_low_quality(bit_cast<T>(best), options)) {
    int begin = 0;
    if (best != 0) {
      for (int chunk = 0; chunk < tensors.chunks; chunk += kWarpSize) {  // one of them has it, to the bit
        const bool has = chunk + lane < tensors.chunks &&
                         tensors.chunk_best[(image * tensors.chunks + chunk + lane) * tensors.gts + gt] == best;
        const unsigned vote = __ballot_sync(kFullWarp, has);
        if (vote == 0) continue;
        begin = (chunk + __ffs(static_cast<int>(vote)) - 1) * tensors.chunk_length;
        break;
      }
    }
    const Box<T> other = load_box<T>(tensors.gt_boxes + 4 * item);
    const T other_area = box_area(other);
    for (int row = begin; row < tensors.anchor_count && found < 0; row += kWarpSize) {
      bool has = row + lane < tensors.anchor_count && tensors.own[image * tensors.anchor_count + row + lane] >= 0;
      if (has && best != 0) {
        const Box<T> anchor = load_box<T>(tensors.anchors + image * tensors.anchor_stride + 4 * int64_t(row + lane));
        has = bit_cast<Bits<T>>(match_iou(anchor, box_area(anchor), other, other_area)) == best;
      }
      const unsigned vote = __ballot_sync(kFullWarp, has);
      if (vote != 0) found = row + __ffs(static_cast<int>(vote)) - 1;
    }
  }
  if (lane == 0) tensors.first[item] = found;
}

// Gives the anchors found to their boxes, the later box where boxes share one. One thread a box.
template <class T>
__global__ void match_force_kernel(MatchTensors<T> tensors, MatchOptions<T> options, int64_t boxes) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= boxes) return;
  const int64_t image = item / tensors.gts;
  const int found = tensors.first[item];
  if (found < 0) return;
  for (int64_t later = item + 1; later < (image + 1) * tensors.gts; ++later) {
    if (tensors.first[later] == found) return;
  }
  const int64_t out = image * tensors.anchor_count + found;
  tensors.indices[out] = options.this_gt ? item % tensors.gts : tensors.own[out];
}

}  // namespace

void match_max_iou_cuda(const MatchInputs& inputs, const MatchNumbers& numbers, const Tensor& indices,
                        const Tensor& ious) {
  const char* const op = "match_max_iou";
  const CudaScope scope(inputs.anchors);
  const cudaStream_t stream = scope.stream();
  dispatch_compute_type(inputs.anchors.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool low_quality = numbers.allow_low_quality;
    const int64_t length = low_quality ? chunk_length(inputs.gts, kThreads) : kThreads;
    const int64_t chunks = ceil_div(inputs.anchor_count, length), boxes = inputs.images * inputs.gts;
    const unsigned blocks = blocks_for(op, "anchors", inputs.images * chunks, 1);
    const auto scratch = [&](bool wanted, int64_t count, size_t size) {
      return allocate(op, {wanted ? count * int64_t(size) : 0}, ScalarType::Byte, inputs.anchors);
    };
    const Tensor own = scratch(low_quality, indices.numel(), sizeof(int));
    const Tensor chunk_best = scratch(low_quality, inputs.images * chunks * inputs.gts, sizeof(T));
    const Tensor gt_best = scratch(low_quality, boxes, sizeof(T));
    const Tensor first = scratch(low_quality && !numbers.all_ties, boxes, sizeof(int));
    const auto data = [&](const Tensor& tensor) { return low_quality ? tensor.mutable_data_ptr() : nullptr; };
    const MatchTensors<T> tensors{inputs.anchors.const_data_ptr<T>(),
                                  inputs.gt_boxes.const_data_ptr<T>(),
                                  inputs.ignore_boxes ? inputs.ignore_boxes->const_data_ptr<T>() : nullptr,
                                  bool_data(inputs.gt_valid),
                                  bool_data(inputs.ignore_valid),
                                  static_cast<int>(inputs.anchor_count),
                                  static_cast<int>(inputs.gts),
                                  static_cast<int>(inputs.regions),
                                  inputs.anchor_stride,
                                  static_cast<int>(chunks),
                                  static_cast<int>(length),
                                  indices.mutable_data_ptr<int64_t>(),
                                  ious.mutable_data_ptr<T>(),
                                  static_cast<int*>(data(own)),
                                  static_cast<Bits<T>*>(data(chunk_best)),
                                  static_cast<Bits<T>*>(data(gt_best)),
                                  static_cast<int*>(data(first))};
    const MatchOptions<T> options = numbers.rounded<T>();
    if (low_quality) check_cuda(cudaMemsetAsync(gt_best.mutable_data_ptr(), 0, boxes * sizeof(T), stream), op);
    DETOPS_LAUNCH((match_max_iou_kernel<T>), blocks, kThreads, 0, stream, tensors, options);
    if (!low_quality) return;
    if (numbers.all_ties) {
      DETOPS_LAUNCH((match_ties_kernel<T>), blocks, kThreads, 0, stream, tensors, options);
      return;
    }
    DETOPS_LAUNCH((match_first_kernel<T>), blocks_for(op, "gt_boxes", boxes, kWarps), kThreads, 0, stream, tensors,
                  options, boxes);
    DETOPS_LAUNCH((match_force_kernel<T>), blocks_for(op, "gt_boxes", boxes, kThreads), kThreads, 0, stream, tensors,
                  options, boxes);
  });
}

}  // namespace DETOPS_NAMESPACE
