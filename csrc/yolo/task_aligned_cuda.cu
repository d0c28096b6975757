// assign_task_aligned on a GPU, without a host synchronisation and without a [B, M, A] matrix.
//
//   1. prepare   bounds of the blocks of points; the angles of all predicted boxes
//   2. claim     one block per gt: its warps search the blocks of points that may lie inside, keep their best anchors
//   in
//                the lanes of a warp, and merge them; anchors note who claims them
//   3. resolve   one thread per anchor: contested anchors find their best gt; each gt learns its highest metric and
//                overlap
//   4. limit     where topk2 < topk: one thread per anchor, which drops out if enough anchors of its gt rank before it
//   5. write     the outputs
#include "common/launch_cuda.cuh"
#include "yolo/points_cuda.cuh"
#include "yolo/task_aligned.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kClaimWarps = 4;
constexpr int kTile = 64;          // gts, or anchors, that a block looks at together
constexpr int kWriteAnchors = 64;  // that a block writes

// What the passes hand on. An anchor's owner is 0 for nobody, gt + 1, or kContested.
constexpr unsigned kContested = ~0u;

// The bits of a number that is not negative: they rank as the numbers do, so that an integer atomic finds the largest.
template <class T>
struct BitsOf {
  using type = unsigned;
};
template <>
struct BitsOf<double> {
  using type = unsigned long long;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
struct Workspace {
  Box<T>* bounds;         // [blocks of points]
  Bits<T>* best_metric;   // [B, M], zeroed
  Bits<T>* best_overlap;  // [B, M], zeroed
  unsigned* owner;        // [B, A], zeroed
  unsigned* kept_owner;   // [B, A]: the owner in the end; the same as owner where all are kept
  T* metric;              // [B, A]
};

template <class T>
__global__ void task_aligned_prepare_kernel(const T* boxes, int64_t count, T* angles, const T* points, int64_t anchors,
                                            Box<T>* bounds) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (angles != nullptr && i < count) angles[i] = iou_box<IouKind::kComplete>(load_box<T>(boxes + 4 * i)).angle;
  if (i / kWarpSize * kWarpSize >= anchors) return;
  store_bounds(points, anchors, i, bounds);
}

// The best anchors of a warp, one in each of its first `places` lanes, sorted.
template <class T>
class WarpTopList {
 public:
  __device__ explicit WarpTopList(int places)
      : own_{T(0), INT32_MAX}, worst_(own_), places_(places), lane_(threadIdx.x % kWarpSize) {}

  __device__ const RankedAnchor<T>& own() const { return own_; }

  // With the same item in all lanes.
  __device__ void insert(const RankedAnchor<T>& item) {
    const int place = __popc(__ballot_sync(kFullWarp, lane_ < places_ && ranks_before(own_, item)));
    const RankedAnchor<T> moved{__shfl_up_sync(kFullWarp, own_.metric, 1), __shfl_up_sync(kFullWarp, own_.anchor, 1)};
    if (lane_ == place) own_ = item;
    if (lane_ > place) own_ = moved;
    worst_ = {__shfl_sync(kFullWarp, own_.metric, places_ - 1), __shfl_sync(kFullWarp, own_.anchor, places_ - 1)};
  }

  // With an item in each lane, of metric 0 where there is none.
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

template <bool complete, class S, class T>
__device__ T metric_and_overlap(const TaskAlignedView<T>& view, const TaskAlignedOptions& options, int64_t image,
                                int64_t anchor, const IouBox<T>& gt, int64_t label, T& overlap) {
  overlap = overlap_of<complete>(gt, predicted_box<complete>(view.boxes, view.angles, image * view.anchors + anchor));
  if (!(overlap > T(0))) return T(0);
  return metric_of(view.template score<S>(image, anchor, label), overlap, options.alpha, options.beta);
}

template <bool complete, class T>
__device__ IouBox<T> gt_box(const TaskAlignedView<T>& view, int64_t row) {
  constexpr IouKind kind = complete ? IouKind::kComplete : IouKind::kIou;
  return iou_box<kind>(load_box<T>(view.gts.boxes + 4 * row));
}

__device__ inline void claim(unsigned* owner, unsigned gt) {
  if (atomicCAS(owner, 0u, gt + 1) != 0) atomicExch(owner, kContested);
}

// One block per gt.
template <bool complete, class S, class T>
__global__ void task_aligned_claim_kernel(TaskAlignedView<T> view, TaskAlignedOptions options, Workspace<T> work) {
  DETOPS_SHARED(int, queues, kClaimWarps* PointQueue::kSize);
  DETOPS_SHARED(T, metrics, kClaimWarps * kWarpSize);
  DETOPS_SHARED(int, anchors, kClaimWarps* kWarpSize);
  const int64_t row = blockIdx.x;
  if (!view.gts.usable(row)) return;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = row / view.gts.count;
  const auto number = static_cast<unsigned>(row % view.gts.count);
  const int64_t label = view.gts.labels[row];
  const IouBox<T> gt = gt_box<complete>(view, row);
  const Box<T> region = candidate_region(gt.box, static_cast<T>(options.min_size));
  unsigned* const owner = work.owner + image * view.anchors;

  RankedAnchor<T> last{std::numeric_limits<T>::infinity(), -1};  // the last one found; nothing ranks before this
  for (int64_t found = 0; found < options.topk; found += kWarpSize) {
    const auto places = static_cast<int>(min_of<int64_t>(kWarpSize, options.topk - found));
    WarpTopList<T> best(places);
    PointQueue queue(queues + warp * PointQueue::kSize);
    search_points<kClaimWarps>(view.points, view.anchors, work.bounds, region, queue, [&](int anchor) {
      RankedAnchor<T> item{T(0), INT32_MAX};
      if (anchor >= 0) {
        T overlap;
        item = {metric_and_overlap<complete, S>(view, options, image, anchor, gt, label, overlap), anchor};
        if (!ranks_before(last, item)) item = {T(0), INT32_MAX};
      }
      best.offer(item);
    });
    metrics[threadIdx.x] = best.own().metric;
    anchors[threadIdx.x] = best.own().anchor;
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kClaimWarps; ++other) {
        const int place = other * kWarpSize + lane;
        best.offer(lane < places ? RankedAnchor<T>{metrics[place], anchors[place]} : RankedAnchor<T>{T(0), INT32_MAX});
      }
      const bool positive = lane < places && best.own().metric > T(0);
      if (positive) claim(owner + best.own().anchor, number);
      const int positives = __popc(__ballot_sync(kFullWarp, positive));
      if (positives < places) {
        // The other places go to the first anchors of metric 0.
        int64_t zeros = options.topk - found - positives;
        for (int64_t first = 0; zeros > 0 && first < view.anchors; first += kWarpSize) {
          const int64_t anchor = first + lane;
          bool candidate = false, zero = false;
          if (anchor < view.anchors) {
            candidate = is_inside(region, view.points[2 * anchor], view.points[2 * anchor + 1]);
            T overlap;
            zero = !candidate ||
                   !(metric_and_overlap<complete, S>(view, options, image, anchor, gt, label, overlap) > T(0));
          }
          const unsigned vote = __ballot_sync(kFullWarp, zero);
          if (zero && candidate && __popc(vote & ((1u << lane) - 1)) < zeros) claim(owner + anchor, number);
          zeros -= __popc(vote);
        }
      }
    }
    if (found + places == options.topk) return;
    if (warp == 0) {
      if (lane == places - 1) {
        metrics[0] = best.own().metric;
        anchors[0] = best.own().anchor;
      }
    }
    __syncthreads();
    last = {metrics[0], anchors[0]};
    if (!(last.metric > T(0))) return;
    __syncthreads();
  }
}

// Gives the gt of an anchor its metric and overlap.
template <class T>
__device__ void raise_best(const Workspace<T>& work, int64_t row, T metric, T overlap) {
  atomicMax(work.best_metric + row, bit_cast<Bits<T>>(metric));
  atomicMax(work.best_overlap + row, bit_cast<Bits<T>>(overlap));
}

// One thread per anchor; a block belongs to one image.
template <bool complete, class S, class T>
__global__ void task_aligned_resolve_kernel(TaskAlignedView<T> view, TaskAlignedOptions options, int blocks_per_image,
                                            Workspace<T> work) {
  DETOPS_SHARED(IouBox<T>, gts, kTile);
  DETOPS_SHARED(Box<T>, regions, kTile);
  const int64_t image = blockIdx.x / blocks_per_image;
  const int64_t anchor = int64_t(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const int64_t i = image * view.anchors + anchor;
  const unsigned claimed = anchor < view.anchors ? work.owner[i] : 0;
  const bool contested = claimed == kContested;
  int64_t gt = int64_t(claimed) - 1;
  if (__syncthreads_or(contested)) {
    T x = 0, y = 0, best_overlap = 0;
    IouBox<T> predicted{};
    if (contested) {
      x = view.points[2 * anchor];
      y = view.points[2 * anchor + 1];
      predicted = predicted_box<complete>(view.boxes, view.angles, i);
      gt = -1;
    }
    for (int64_t first = 0; first < view.gts.count; first += kTile) {
      const int count = static_cast<int>(min_of<int64_t>(kTile, view.gts.count - first));
      if (threadIdx.x < count) {
        const int64_t row = image * view.gts.count + first + threadIdx.x;
        gts[threadIdx.x] = gt_box<complete>(view, row);
        regions[threadIdx.x] = view.gts.usable(row)
                                   ? candidate_region(gts[threadIdx.x].box, static_cast<T>(options.min_size))
                                   : no_bounds<T>();
      }
      __syncthreads();
      for (int j = 0; contested && j < count; ++j) {
        if (!is_inside(regions[j], x, y)) continue;
        const T overlap = overlap_of<complete>(gts[j], predicted);
        if (gt >= 0 && !(overlap > best_overlap)) continue;
        gt = first + j;
        best_overlap = overlap;
      }
      __syncthreads();
    }
  }
  if (claimed == 0) return;
  const int64_t row = image * view.gts.count + gt;
  T overlap;
  const T metric = metric_and_overlap<complete, S>(view, options, image, anchor, gt_box<complete>(view, row),
                                                   view.gts.labels[row], overlap);
  work.owner[i] = static_cast<unsigned>(gt) + 1;
  work.metric[i] = metric;
  if (options.topk2 >= options.topk) raise_best(work, row, metric, overlap);
}

// One thread per anchor; a block belongs to one image.
template <bool complete, class T>
__global__ void task_aligned_limit_kernel(TaskAlignedView<T> view, TaskAlignedOptions options, int blocks_per_image,
                                          Workspace<T> work) {
  DETOPS_SHARED(unsigned, owners, kThreads);
  DETOPS_SHARED(T, metrics, kThreads);
  const int64_t image = blockIdx.x / blocks_per_image;
  const auto anchor = static_cast<int>(blockIdx.x % blocks_per_image * kThreads + threadIdx.x);
  const bool in_range = anchor < view.anchors;
  const int64_t i = image * view.anchors + anchor;
  const unsigned owner = in_range ? work.owner[i] : 0;
  const RankedAnchor<T> own{owner != 0 ? work.metric[i] : T(0), anchor};
  int64_t before = 0;  // anchors that rank before this one: of the same gt, or of metric 0
  if (__syncthreads_or(owner != 0)) {
    for (int64_t first = 0; first < view.anchors; first += kThreads) {
      const int count = static_cast<int>(min_of<int64_t>(kThreads, view.anchors - first));
      if (threadIdx.x < count) {
        owners[threadIdx.x] = work.owner[image * view.anchors + first + threadIdx.x];
        metrics[threadIdx.x] =
            owners[threadIdx.x] != 0 ? work.metric[image * view.anchors + first + threadIdx.x] : T(0);
      }
      __syncthreads();
      for (int j = 0; owner != 0 && j < count; ++j) {
        before += ranks_before({owners[j] == owner ? metrics[j] : T(0), static_cast<int32_t>(first) + j}, own);
      }
      __syncthreads();
    }
  }
  const bool kept = owner != 0 && before < options.topk2;
  if (in_range) work.kept_owner[i] = kept ? owner : 0;
  if (!kept) return;
  const int64_t row = image * view.gts.count + owner - 1;
  raise_best(work, row, own.metric,
             overlap_of<complete>(gt_box<complete>(view, row), predicted_box<complete>(view.boxes, view.angles, i)));
}

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

template <class S>
struct alignas(16) ScorePack {
  static constexpr int kSize = 16 / sizeof(S);
  S values[kSize];
};

struct OutputPointers {
  int64_t* labels;
  void* boxes;
  void* scores;
  bool* foreground;
  int64_t* gt_indices;
};

// One block for kWriteAnchors anchors.
template <class S, class T>
__global__ void task_aligned_write_kernel(TaskAlignedView<T> view, TaskAlignedOptions options, Workspace<T> work,
                                          const void* gt_boxes, int element_bytes, bool packed, OutputPointers out) {
  DETOPS_SHARED(T, values, kWriteAnchors);
  DETOPS_SHARED(int64_t, labels, kWriteAnchors);
  const int64_t first = int64_t(blockIdx.x) * kWriteAnchors;
  const auto count = static_cast<int>(min_of<int64_t>(kWriteAnchors, view.images * view.anchors - first));
  S* const scores = static_cast<S*>(out.scores);
  if (threadIdx.x < count) {
    const int64_t i = first + threadIdx.x;
    const unsigned owner = work.kept_owner[i];
    const int64_t gt = int64_t(owner) - 1;
    const int64_t row = i / view.anchors * view.gts.count + gt;
    T value = T(0);
    int64_t label = -1;
    if (owner != 0) {
      label = view.gts.labels[row];
      value = target_score(work.metric[i], bit_cast<T>(work.best_overlap[row]), bit_cast<T>(work.best_metric[row]),
                           static_cast<T>(options.eps));
    }
    out.labels[i] = label;
    out.foreground[i] = owner != 0;
    out.gt_indices[i] = gt;
    copy_box(gt_boxes, owner != 0 ? row : -1, element_bytes, out.boxes, i);
    if (!options.dense_scores) scores[i] = static_cast<S>(value);
    values[threadIdx.x] = value;
    labels[threadIdx.x] = label;
  }
  if (!options.dense_scores) return;
  __syncthreads();
  const auto classes = static_cast<int>(view.gts.classes);
  if (packed) {
    constexpr int kSize = ScorePack<S>::kSize;
    const int packs = classes / kSize;
    auto* const target = reinterpret_cast<ScorePack<S>*>(scores + first * classes);
    for (int p = threadIdx.x; p < count * packs; p += kThreads) {
      const int anchor = p / packs;
      const auto place = static_cast<int>(labels[anchor]) - p % packs * kSize;
      ScorePack<S> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) pack.values[k] = static_cast<S>(k == place ? values[anchor] : T(0));
      target[p] = pack;
    }
  } else {
    for (int p = threadIdx.x; p < count * classes; p += kThreads) {
      const int anchor = p / classes;
      scores[first * classes + p] = static_cast<S>(labels[anchor] == p % classes ? values[anchor] : T(0));
    }
  }
}

template <bool complete, class S, class T>
void launch_all(const TaskAlignedInputs& inputs, const TaskAlignedOptions& asked, const TaskAlignedOutputs& out) {
  const char* const op = "assign_task_aligned";
  const CudaScope scope(inputs.scores);
  const cudaStream_t stream = scope.stream();
  TaskAlignedOptions options = asked;
  const int64_t images = inputs.scores.size(0), anchors = inputs.scores.size(1), gts = inputs.gt_boxes.size(1);
  options.topk = min_of(asked.topk, anchors);
  options.topk2 = min_of(asked.topk2, options.topk);
  const bool limited = options.topk2 < options.topk;
  const int64_t rows = images * gts, all_anchors = images * anchors;
  const auto blocks_for = [](int64_t items, int64_t per_block) {
    return static_cast<unsigned>(ceil_div(items, per_block));
  };

  const auto scratch = [&](int64_t bytes) { return allocate(op, {bytes}, ScalarType::Byte, inputs.scores); };
  const int64_t zeroed = 2 * rows * int64_t(sizeof(T)) + all_anchors * int64_t(sizeof(unsigned));
  const Tensor noted = scratch(zeroed);
  const Tensor kept_owner = scratch(limited ? all_anchors * int64_t(sizeof(unsigned)) : 0);
  const Tensor metric = allocate(op, {all_anchors}, inputs.dtype(), inputs.scores);
  const Tensor angles = allocate(op, {complete ? all_anchors : 0}, inputs.dtype(), inputs.scores);
  const Tensor bounds = scratch(ceil_div<int64_t>(anchors, kPointBlock) * int64_t(sizeof(Box<T>)));
  const TaskAlignedView<T> view = inputs.view<T>(&angles);
  Workspace<T> work;
  work.bounds = static_cast<Box<T>*>(bounds.mutable_data_ptr());
  work.best_metric = static_cast<Bits<T>*>(noted.mutable_data_ptr());
  work.best_overlap = work.best_metric + rows;
  work.owner = reinterpret_cast<unsigned*>(work.best_overlap + rows);
  work.kept_owner = limited ? static_cast<unsigned*>(kept_owner.mutable_data_ptr()) : work.owner;
  work.metric = metric.mutable_data_ptr<T>();
  check_cuda(cudaMemsetAsync(noted.mutable_data_ptr(), 0, zeroed, stream), op);

  if (rows > 0) {
    T* const angle_data = complete ? angles.mutable_data_ptr<T>() : nullptr;
    DETOPS_LAUNCH((task_aligned_prepare_kernel<T>), blocks_for(complete ? all_anchors : anchors, kThreads), kThreads, 0,
                  stream, view.boxes, all_anchors, angle_data, view.points, anchors, work.bounds);
    DETOPS_LAUNCH((task_aligned_claim_kernel<complete, S, T>), static_cast<unsigned>(rows), kClaimWarps * kWarpSize, 0,
                  stream, view, options, work);
    const auto per_image = static_cast<int>(ceil_div<int64_t>(anchors, kThreads));
    const auto blocks = static_cast<unsigned>(images * per_image);
    DETOPS_LAUNCH((task_aligned_resolve_kernel<complete, S, T>), blocks, kThreads, 0, stream, view, options, per_image,
                  work);
    if (limited) {
      DETOPS_LAUNCH((task_aligned_limit_kernel<complete, T>), blocks, kThreads, 0, stream, view, options, per_image,
                    work);
    }
  } else if (limited) {
    work.kept_owner = work.owner;
  }
  const bool packed = inputs.scores.size(2) % ScorePack<S>::kSize == 0 &&
                      reinterpret_cast<uintptr_t>(out.scores.const_data_ptr()) % sizeof(ScorePack<S>) == 0;
  const OutputPointers pointers{out.labels.mutable_data_ptr<int64_t>(), out.boxes.mutable_data_ptr(),
                                out.scores.mutable_data_ptr(), static_cast<bool*>(out.foreground.mutable_data_ptr()),
                                out.gt_indices.mutable_data_ptr<int64_t>()};
  DETOPS_LAUNCH((task_aligned_write_kernel<S, T>), blocks_for(all_anchors, kWriteAnchors), kThreads, 0, stream, view,
                options, work, inputs.gt_boxes_out.const_data_ptr(),
                static_cast<int>(inputs.gt_boxes_out.element_size()), packed, pointers);
}

}  // namespace

void assign_task_aligned_cuda(const TaskAlignedInputs& inputs, const TaskAlignedOptions& options,
                              const TaskAlignedOutputs& out) {
  dispatch_floating(inputs.scores.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const auto launch = [&](auto type_tag) {
      using T = typename decltype(type_tag)::type;
      options.complete ? launch_all<true, S, T>(inputs, options, out) : launch_all<false, S, T>(inputs, options, out);
    };
    if constexpr (std::is_same_v<S, double>) {
      launch(TypeTag<double>{});
    } else if (inputs.dtype() == ScalarType::Double) {
      launch(TypeTag<double>{});
    } else {
      launch(TypeTag<float>{});
    }
  });
}

}  // namespace DETOPS_NAMESPACE
