// assign_task_aligned on a GPU, without a host synchronisation and without a [B, M, A] matrix.
//
//   1. prepare   bounds of the blocks of points, or of the predicted boxes; the angles of all predicted boxes
//   2. claim     one block per gt: its warps search the blocks of points that may lie inside, or of boxes that may
//                overlap, keep their best anchors in the lanes of a warp, and merge them; anchors note who claims them
//   3. resolve   one thread per anchor: contested anchors find their best gt; each gt learns its highest metric and
//                overlap
//   4. limit     where topk2 < topk: one thread per anchor, which drops out if enough anchors of its gt rank before it
//   5. write     the outputs
#include "common/launch_cuda.cuh"
#include "yolo/points_cuda.cuh"
#include "yolo/targets_cuda.cuh"
#include "yolo/task_aligned.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kClaimWarps = 4;
constexpr int kTile = 64;  // gts, or anchors, that a block looks at together

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
  Box<T>* bounds;         // [blocks of points], or of all images' predicted boxes for Candidates::kAll
  RankedAnchor<T>* last;  // [B, M], for Candidates::kAll: what ranks after this a gt has not claimed
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

// For Candidates::kAll: one warp per block of anchors of an image.
template <class T>
__global__ void task_aligned_box_bounds_kernel(const T* boxes, int64_t blocks, int64_t blocks_per_image,
                                               int64_t anchors, Box<T>* bounds) {
  const int64_t block = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (block >= blocks) return;
  const int64_t anchor = block % blocks_per_image * kPointBlock + threadIdx.x % kWarpSize;
  Box<T> own = no_bounds<T>();
  if (anchor < anchors) {
    const Box<T> box = load_box<T>(boxes + 4 * (block / blocks_per_image * anchors + anchor));
    extend(own, box.x1, box.y1);
    extend(own, box.x2, box.y2);
  }
  own = warp_bounds(own);
  if (threadIdx.x % kWarpSize == 0) bounds[block] = own;
}

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
  const T margin = T(options.margin());
  const bool all = options.all();
  const Counted<unsigned> owner("assign_task_aligned", "owners", work.owner + image * view.anchors, view.anchors);
  const T* const boxes = view.boxes + 4 * image * view.anchors;
  const Box<T>* const bounds = all ? work.bounds + image * ceil_div<int64_t>(view.anchors, kPointBlock) : work.bounds;

  const RankedAnchor<T> nothing{T(0), INT32_MAX};
  RankedAnchor<T> last{std::numeric_limits<T>::infinity(), -1};  // the last one found; nothing ranks before this
  for (int64_t found = 0; found < options.topk; found += kWarpSize) {
    const auto places = static_cast<int>(min_of<int64_t>(kWarpSize, options.topk - found));
    WarpTopList<T> best(places, nothing);
    PointQueue queue(queues + warp * PointQueue::kSize);
    const auto look = [&](int anchor) {
      RankedAnchor<T> item = nothing;
      if (anchor >= 0) {
        T overlap;
        item = {metric_and_overlap<complete, S>(view, options, image, anchor, gt, label, overlap), anchor};
        if (!ranks_before(last, item)) item = nothing;
      }
      best.offer(item);
    };
    search_blocks(
        view.anchors, warp, kClaimWarps,
        [&](int block) { return all ? may_overlap(gt.box, bounds[block]) : may_hold(region, bounds[block], margin); },
        [&](int block) {
          const int64_t anchor = int64_t(block) * kPointBlock + lane;
          bool found = false;
          if (anchor < view.anchors) {
            found = all ? may_overlap(gt.box, load_box<T>(boxes + 4 * anchor))
                        : is_inside(region, view.points[2 * anchor], view.points[2 * anchor + 1], margin);
          }
          queue.push(static_cast<int>(anchor), found);
          if (queue.count() >= kWarpSize) look(queue.pop());
        });
    if (queue.count() > 0) look(queue.pop());
    metrics[threadIdx.x] = best.own().metric;
    anchors[threadIdx.x] = best.own().anchor;
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kClaimWarps; ++other) {
        const int place = other * kWarpSize + lane;
        best.offer(lane < places ? RankedAnchor<T>{metrics[place], anchors[place]} : nothing);
      }
      const bool positive = lane < places && best.own().metric > T(0);
      if (positive) {
        const int64_t anchor = best.own().anchor;
        if (!all || is_inside(region, view.points[2 * anchor], view.points[2 * anchor + 1], margin)) {
          claim(&owner[anchor], number);
        }
      }
      if (all && lane == places - 1) work.last[row] = best.own();
      const int positives = __popc(__ballot_sync(kFullWarp, positive));
      if (!all && positives < places) {
        // The other places go to the first anchors of metric 0.
        int64_t zeros = options.topk - found - positives;
        for (int64_t first = 0; zeros > 0 && first < view.anchors; first += kWarpSize) {
          const int64_t anchor = first + lane;
          bool candidate = false, zero = false;
          if (anchor < view.anchors) {
            candidate = is_inside(region, view.points[2 * anchor], view.points[2 * anchor + 1], margin);
            T overlap;
            zero = !candidate ||
                   !(metric_and_overlap<complete, S>(view, options, image, anchor, gt, label, overlap) > T(0));
          }
          const unsigned vote = __ballot_sync(kFullWarp, zero);
          if (zero && candidate && __popc(vote & ((1u << lane) - 1)) < zeros) claim(&owner[anchor], number);
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
        if (!is_inside(regions[j], x, y, T(options.margin()))) continue;
        const T overlap = overlap_of<complete>(gts[j], predicted);
        if (gt >= 0 && !(overlap > best_overlap)) continue;
        if (options.all()) {  // only if it has claimed the anchor
          const int64_t row = image * view.gts.count + first + j;
          if (!(overlap > T(0))) continue;
          const T metric = metric_of(view.template score<S>(image, anchor, view.gts.labels[row]), overlap,
                                     options.alpha, options.beta);
          if (!(metric > T(0)) || ranks_before(work.last[row], {metric, static_cast<int32_t>(anchor)})) continue;
        }
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

template <class T>
struct TaskAlignedScore {
  const T* metric;
  const Bits<T>*best_metric, *best_overlap;
  T eps;

  __device__ T operator()(int64_t i, int64_t row) const {
    return target_score(metric[i], bit_cast<T>(best_overlap[row]), bit_cast<T>(best_metric[row]), eps);
  }
};

template <bool complete, class S, class T>
void launch_all(const TaskAlignedInputs& inputs, const TaskAlignedOptions& asked, const TargetTensors& out) {
  const char* const op = "assign_task_aligned";
  const CudaScope scope(inputs.scores);
  const cudaStream_t stream = scope.stream();
  TaskAlignedOptions options = asked;
  const int64_t images = inputs.scores.size(0), anchors = inputs.scores.size(1), gts = inputs.gt_boxes.size(1);
  options.topk = min_of(asked.topk, anchors);
  options.topk2 = min_of(asked.topk2, options.topk);
  const bool limited = options.topk2 < options.topk;
  const int64_t rows = images * gts, all_anchors = images * anchors;

  const auto scratch = [&](int64_t bytes) { return allocate(op, {bytes}, ScalarType::Byte, inputs.scores); };
  const int64_t zeroed = 2 * rows * int64_t(sizeof(T)) + all_anchors * int64_t(sizeof(unsigned));
  const Tensor noted = scratch(zeroed);
  const Tensor kept_owner = scratch(limited ? all_anchors * int64_t(sizeof(unsigned)) : 0);
  const Tensor metric = allocate(op, {all_anchors}, inputs.dtype(), inputs.scores);
  const Tensor angles = allocate(op, {complete ? all_anchors : 0}, inputs.dtype(), inputs.scores);
  const int64_t point_blocks = ceil_div<int64_t>(anchors, kPointBlock), box_blocks = images * point_blocks;
  const Tensor bounds = scratch((options.all() ? box_blocks : point_blocks) * int64_t(sizeof(Box<T>)));
  const Tensor last = scratch(options.all() ? rows * int64_t(sizeof(RankedAnchor<T>)) : 0);
  const TaskAlignedView<T> view = inputs.view<T>(&angles);
  Workspace<T> work;
  work.bounds = static_cast<Box<T>*>(bounds.mutable_data_ptr());
  work.last = static_cast<RankedAnchor<T>*>(last.mutable_data_ptr());
  work.best_metric = static_cast<Bits<T>*>(noted.mutable_data_ptr());
  work.best_overlap = work.best_metric + rows;
  work.owner = reinterpret_cast<unsigned*>(work.best_overlap + rows);
  work.kept_owner = limited ? static_cast<unsigned*>(kept_owner.mutable_data_ptr()) : work.owner;
  work.metric = metric.mutable_data_ptr<T>();
  check_cuda(cudaMemsetAsync(noted.mutable_data_ptr(), 0, zeroed, stream), op);

  if (rows > 0) {
    T* const angle_data = complete ? angles.mutable_data_ptr<T>() : nullptr;
    DETOPS_LAUNCH((task_aligned_prepare_kernel<T>),
                  blocks_for(op, "pred_scores", complete ? all_anchors : anchors, kThreads), kThreads, 0, stream,
                  view.boxes, all_anchors, angle_data, view.points, options.all() ? 0 : anchors, work.bounds);
    if (options.all()) {
      DETOPS_LAUNCH((task_aligned_box_bounds_kernel<T>),
                    blocks_for(op, "pred_scores", box_blocks, kThreads / kWarpSize), kThreads, 0, stream, view.boxes,
                    box_blocks, point_blocks, anchors, work.bounds);
    }
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
  const TaskAlignedScore<T> score{work.metric, work.best_metric, work.best_overlap, static_cast<T>(options.eps)};
  launch_write_targets(work.kept_owner, view.gts, score, inputs.gt_boxes_out, out, stream);
}

}  // namespace

void assign_task_aligned_cuda(const TaskAlignedInputs& inputs, const TaskAlignedOptions& options,
                              const TargetTensors& out) {
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
