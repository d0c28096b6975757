// The GPU parts of targets.h: ranking by a warp, claims, and the kernel that writes the targets.
#pragma once

#include "common/pack_cuda.cuh"
#include "yolo/targets.h"

namespace DETOPS_NAMESPACE {

// An anchor's owner is 0 for nobody, gt + 1, or kContested.
constexpr unsigned kContested = ~0u;

__device__ inline void claim(unsigned* owner, unsigned gt) {
  if (atomicCAS(owner, 0u, gt + 1) != 0) atomicExch(owner, kContested);
}

// The best anchors of a warp, one in each of its first `places` lanes, sorted.
template <class T>
class WarpTopList {
 public:
  // What ranks before `nothing` can come in.
  __device__ WarpTopList(int places, const RankedAnchor<T>& nothing)
      : own_(nothing), worst_(nothing), places_(places), lane_(threadIdx.x % kWarpSize) {}

  __device__ const RankedAnchor<T>& own() const { return own_; }

  // With the same item in all lanes.
  __device__ void insert(const RankedAnchor<T>& item) {
    const int place = __popc(__ballot_sync(kFullWarp, lane_ < places_ && ranks_before(own_, item)));
    const RankedAnchor<T> moved{__shfl_up_sync(kFullWarp, own_.metric, 1), __shfl_up_sync(kFullWarp, own_.anchor, 1)};
    if (lane_ == place) own_ = item;
    if (lane_ > place) own_ = moved;
    worst_ = {__shfl_sync(kFullWarp, own_.metric, places_ - 1), __shfl_sync(kFullWarp, own_.anchor, places_ - 1)};
  }

  // With an item in each lane, `nothing` where there is none.
  __device__ void offer(const RankedAnchor<T>& item) {
    unsigned better = __ballot_sync(kFullWarp, ranks_before(item, worst_));
    while (better != 0) {
      const int source = __ffs(static_cast<int>(better)) - 1;
      const RankedAnchor<T> best{__shfl_sync(kFullWarp, item.metric, source),
                                 __shfl_sync(kFullWarp, item.anchor, source)};
      if (ranks_before(best, worst_)) insert(best);
      better &= better - 1;
    }
  }

 private:
  RankedAnchor<T> own_, worst_;
  int places_, lane_;
};

// Copies a box as it is, or writes zeros where `from` is -1.
template <class Element>
__device__ void copy_elements(const void* source, int64_t from, void* target, int64_t to) {
  for (int k = 0; k < 4; ++k) {
    static_cast<Element*>(target)[4 * to + k] =
        from >= 0 ? static_cast<const Element*>(source)[4 * from + k] : Element(0);
  }
}
__device__ inline void copy_box(const void* source, int64_t from, int element_bytes, void* target, int64_t to) {
  switch (element_bytes) {
    case 2: copy_elements<uint16_t>(source, from, target, to); break;
    case 4: copy_elements<uint32_t>(source, from, target, to); break;
    default: copy_elements<uint64_t>(source, from, target, to); break;
  }
}

struct TargetPointers {
  int64_t* labels;
  void* boxes;
  void* scores;
  bool* foreground;
  int64_t* gt_indices;
  const void* gt_boxes;
  int element_bytes;  // of boxes
  bool dense_scores, packed;
};

constexpr int kWriteThreads = 256;
constexpr int kWriteAnchors = 64;  // that a block writes

// One block for kWriteAnchors anchors. score(i, row) is that of anchor i, owned by row `row` of the ground truth.
template <class S, class T, class Score>
__global__ void write_targets_kernel(const unsigned* owners, GroundTruthView<T> gts, int64_t count, int64_t anchors,
                                     Score score, TargetPointers out) {
  DETOPS_SHARED(T, values, kWriteAnchors);
  DETOPS_SHARED(int64_t, labels, kWriteAnchors);
  const int64_t first = int64_t(blockIdx.x) * kWriteAnchors;
  const auto here = static_cast<int>(min_of<int64_t>(kWriteAnchors, count - first));
  S* const scores = static_cast<S*>(out.scores);
  if (threadIdx.x < here) {
    const int64_t i = first + threadIdx.x;
    const unsigned owner = owners[i];
    const int64_t gt = int64_t(owner) - 1;
    const int64_t row = i / anchors * gts.count + gt;
    const T value = owner != 0 ? score(i, row) : T(0);
    const int64_t label = owner != 0 ? gts.labels[row] : -1;
    out.labels[i] = label;
    out.foreground[i] = owner != 0;
    out.gt_indices[i] = gt;
    copy_box(out.gt_boxes, owner != 0 ? row : -1, out.element_bytes, out.boxes, i);
    if (!out.dense_scores) scores[i] = static_cast<S>(value);
    values[threadIdx.x] = value;
    labels[threadIdx.x] = label;
  }
  if (!out.dense_scores) return;
  __syncthreads();
  const auto classes = static_cast<int>(gts.classes);
  if (out.packed) {
    constexpr int kSize = Pack<S>::kSize;
    const int packs = classes / kSize;
    auto* const target = reinterpret_cast<Pack<S>*>(scores + first * classes);
    for (int p = threadIdx.x; p < here * packs; p += kWriteThreads) {
      const int anchor = p / packs;
      const auto place = static_cast<int>(labels[anchor]) - p % packs * kSize;
      Pack<S> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) pack.values[k] = static_cast<S>(k == place ? values[anchor] : T(0));
      target[p] = pack;
    }
  } else {
    for (int p = threadIdx.x; p < here * classes; p += kWriteThreads) {
      const int anchor = p / classes;
      scores[first * classes + p] = static_cast<S>(labels[anchor] == p % classes ? values[anchor] : T(0));
    }
  }
}

template <class T, class Score>
void launch_write_targets(const unsigned* owners, const GroundTruthView<T>& gts, const Score& score,
                          const Tensor& gt_boxes, const TargetTensors& out, cudaStream_t stream) {
  dispatch_floating(out.scores.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const bool packed = gts.classes % Pack<S>::kSize == 0 && is_aligned(out.scores.const_data_ptr());
    const TargetPointers pointers{out.labels.mutable_data_ptr<int64_t>(),
                                  out.boxes.mutable_data_ptr(),
                                  out.scores.mutable_data_ptr(),
                                  static_cast<bool*>(out.foreground.mutable_data_ptr()),
                                  out.gt_indices.mutable_data_ptr<int64_t>(),
                                  gt_boxes.const_data_ptr(),
                                  static_cast<int>(gt_boxes.element_size()),
                                  out.dense_scores,
                                  packed};
    const int64_t count = out.labels.numel();
    DETOPS_LAUNCH((write_targets_kernel<S, T, Score>), static_cast<unsigned>(ceil_div<int64_t>(count, kWriteAnchors)),
                  kWriteThreads, 0, stream, owners, gts, count, out.labels.size(1), score, pointers);
  });
}

}  // namespace DETOPS_NAMESPACE
