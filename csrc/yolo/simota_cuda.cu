// assign_simota on a GPU, without a host synchronisation and without a matrix of gts and anchors.
//
//   1. prepare   bounds of the blocks of points, and their largest stride
//   2. mark      one warp per gt: which anchors are candidates by it, as bits
//   3. absence   one warp per candidate: S, its class cost were it background
//   4. claim     one block per gt: its warps go through the candidates, keep the largest IoUs and the cheapest anchors
//                in the lanes of a warp, and merge them; anchors note who claims them
//   5. resolve   one thread per anchor: contested anchors find their cheapest gt
//   6. write     the outputs
#include "common/launch_cuda.cuh"
#include "yolo/points_cuda.cuh"
#include "yolo/simota.h"
#include "yolo/targets_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kClaimWarps = 4;
constexpr int kTile = 64;  // gts that a block looks at together

template <class T>
struct Workspace {
  Box<T>* bounds;        // [blocks of points]
  T* reach;              // [blocks of points]
  unsigned* candidates;  // [B, blocks of points], a bit per anchor, zeroed
  unsigned* owner;       // [B, A], zeroed
  double* absent;        // [B, A], of candidates
  T* iou;                // [B, A], of anchors with an owner
};

template <class T>
__global__ void simota_prepare_kernel(const T* points, const T* strides, int64_t anchors, Box<T>* bounds, T* reach) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i / kWarpSize * kWarpSize >= anchors) return;
  store_bounds(points, anchors, i, bounds);
  T largest = i < anchors ? max_of(strides[i], T(0)) : T(0);
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max_of(largest, __shfl_xor_sync(kFullWarp, largest, distance));
  }
  if (i % kWarpSize == 0) reach[i / kWarpSize] = largest;
}

template <class T>
__global__ void simota_mark_kernel(SimotaView<T> view, T radius, Workspace<T> work) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= view.images * view.gts.count || !view.gts.usable(row)) return;
  const Box<T> gt = load_box<T>(view.gts.boxes + 4 * row);
  const T x = (gt.x1 + gt.x2) / 2, y = (gt.y1 + gt.y2) / 2;
  unsigned* const words = work.candidates + row / view.gts.count * ceil_div<int64_t>(view.anchors, kPointBlock);
  search_blocks(
      view.anchors, 0, 1,
      [&](int block) {
        return may_hold(square_around(x, y, radius * work.reach[block]), work.bounds[block], T(0)) ||
               (view.mmdet && may_hold(gt, work.bounds[block], T(0)));
      },
      [&](int block) {
        const int64_t anchor = int64_t(block) * kPointBlock + lane;
        const unsigned found = __ballot_sync(kFullWarp, anchor < view.anchors && view.is_candidate(gt, anchor, radius));
        if (lane == 0 && found != 0) atomicOr(words + block, found);
      });
}

// The word of candidates that an anchor's bit stands in.
template <class T>
__device__ int64_t word_of(const SimotaView<T>& view, int64_t image, int64_t anchor) {
  return image * ceil_div<int64_t>(view.anchors, kPointBlock) + anchor / kPointBlock;
}

template <bool mmdet, class S, class T>
__global__ void simota_absence_kernel(SimotaView<T> view, Workspace<T> work) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (i >= view.images * view.anchors) return;
  const int64_t image = i / view.anchors, anchor = i % view.anchors;
  if (!(work.candidates[word_of(view, image, anchor)] >> anchor % kPointBlock & 1)) return;
  const double object = view.template object<S>(image, anchor);
  const int64_t groups = ceil_div<int64_t>(view.gts.classes, kClassGroup);
  double sum = 0.0;
  for (int64_t first = 0; first < groups; first += kWarpSize) {
    double own = 0.0;
    if (first + lane < groups) {
      const int64_t begin = (first + lane) * kClassGroup;
      double product = 1.0;
      for (int64_t c = begin; c < min_of(begin + kClassGroup, view.gts.classes); ++c) {
        product *= absence<mmdet>(view.template logit<S>(image, anchor, c), object);
      }
      own = -math::log(product);
    }
    // In the order of the groups, as on the CPU.
    for (int source = 0; source < min_of<int64_t>(kWarpSize, groups - first); ++source) {
      sum += __shfl_sync(kFullWarp, own, source);
    }
  }
  if (lane == 0) work.absent[i] = sum;
}

template <class S, class T>
__device__ T metric_of_anchor(const SimotaView<T>& view, const Workspace<T>& work, int64_t image, int64_t anchor,
                              int64_t label, T iou, const SimotaCosts<T>& costs, bool favoured) {
  const double cost =
      class_cost(work.absent[image * view.anchors + anchor], view.template logit<S>(image, anchor, label),
                 view.template object<S>(image, anchor), view.mmdet);
  return negative_cost(cost, iou, costs, favoured);
}

// One block per gt.
template <class S, class T>
__global__ void simota_claim_kernel(SimotaView<T> view, SimotaOptions options, SimotaCosts<T> prices,
                                    Workspace<T> work) {
  DETOPS_SHARED(int, queues, kClaimWarps* PointQueue::kSize);
  DETOPS_SHARED(T, values, kClaimWarps * kWarpSize);
  DETOPS_SHARED(int, positions, kClaimWarps* kWarpSize);
  DETOPS_SHARED(T, costs, kClaimWarps * kWarpSize);
  DETOPS_SHARED(int, anchors, kClaimWarps* kWarpSize);
  const int64_t row = blockIdx.x;
  if (!view.gts.usable(row)) return;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = row / view.gts.count, label = view.gts.labels[row];
  const IouBox<T> gt = view.gt_box(row);
  const T radius = static_cast<T>(options.center_radius);
  const auto places = static_cast<int>(options.topk);
  const Counted<unsigned> owner("assign_simota", "owners", work.owner + image * view.anchors, view.anchors);
  const unsigned* const words = work.candidates + word_of(view, image, 0);
  const RankedAnchor<T> no_iou{T(0), INT32_MAX}, no_cost{-std::numeric_limits<T>::infinity(), INT32_MAX};

  // First the favoured anchors, and in a second round all, where those are too few or not cheap.
  int k = 0;
  for (const bool first_round : {true, false}) {
    WarpTopList<T> ious(places, no_iou), cheapest(places, no_cost);
    PointQueue queue(queues + warp * PointQueue::kSize);
    const auto look = [&](int anchor) {
      RankedAnchor<T> item = no_iou, cost = no_cost;
      if (anchor >= 0) {
        const T iou = positive_iou(gt, view.predicted(image, anchor));
        const bool favoured = view.is_favoured(gt.box, anchor, radius);
        if (iou > T(0)) item = {iou, anchor};
        if (favoured || !first_round) {
          cost = {metric_of_anchor<S>(view, work, image, anchor, label, iou, prices, favoured), anchor};
        }
      }
      if (first_round) ious.offer(item);
      cheapest.offer(cost);
    };
    search_blocks(
        view.anchors, warp, kClaimWarps, [&](int block) { return words[block] != 0; },
        [&](int block) {
          queue.push(block * kPointBlock + lane, words[block] >> lane & 1);
          if (queue.count() >= kWarpSize) look(queue.pop());
        });
    if (queue.count() > 0) look(queue.pop());
    values[threadIdx.x] = ious.own().metric;
    positions[threadIdx.x] = ious.own().anchor;
    costs[threadIdx.x] = cheapest.own().metric;
    anchors[threadIdx.x] = cheapest.own().anchor;
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kClaimWarps; ++other) {
        const int place = other * kWarpSize + lane;
        const bool used = lane < places;
        if (first_round) ious.offer(used ? RankedAnchor<T>{values[place], positions[place]} : no_iou);
        cheapest.offer(used ? RankedAnchor<T>{costs[place], anchors[place]} : no_cost);
      }
      if (first_round) {
        double sum = 0.0;
        for (int place = 0; place < places; ++place) {
          sum += static_cast<double>(__shfl_sync(kFullWarp, ious.own().metric, place));
        }
        k = dynamic_k(sum, options.topk);
      }
      const bool enough = __shfl_sync(kFullWarp, cheapest.own().metric, k - 1) > -prices.surely_favoured;
      const bool done = enough || !first_round;
      if (done && lane < k && cheapest.own().anchor != INT32_MAX) {
        claim(&owner[cheapest.own().anchor], static_cast<unsigned>(row % view.gts.count));
      }
      if (lane == 0) anchors[0] = done;
    }
    __syncthreads();
    if (anchors[0]) return;
    __syncthreads();
  }
}

// One thread per anchor; a block belongs to one image.
template <class S, class T>
__global__ void simota_resolve_kernel(SimotaView<T> view, SimotaOptions options, SimotaCosts<T> prices,
                                      int blocks_per_image, Workspace<T> work) {
  DETOPS_SHARED(IouBox<T>, gts, kTile);
  DETOPS_SHARED(int64_t, labels, kTile);  // -1 where the row takes no part
  const int64_t image = blockIdx.x / blocks_per_image;
  const int64_t anchor = int64_t(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const int64_t i = image * view.anchors + anchor;
  const unsigned claimed = anchor < view.anchors ? work.owner[i] : 0;
  const bool contested = claimed == kContested;
  const T radius = static_cast<T>(options.center_radius);
  IouBox<T> predicted{};
  if (claimed != 0) predicted = view.predicted(image, anchor);
  RankedAnchor<T> best{-std::numeric_limits<T>::infinity(), INT32_MAX};  // ranks gts in the place of anchors
  for (const bool favoured : {true, false}) {
    const bool searching = contested && !(best.metric > -prices.surely_favoured);
    if (!__syncthreads_or(searching)) break;
    for (int64_t first = 0; first < view.gts.count; first += kTile) {
      const int count = static_cast<int>(min_of<int64_t>(kTile, view.gts.count - first));
      if (threadIdx.x < count) {
        const int64_t row = image * view.gts.count + first + threadIdx.x;
        gts[threadIdx.x] = view.gt_box(row);
        labels[threadIdx.x] = view.gts.usable(row) ? view.gts.labels[row] : -1;
      }
      __syncthreads();
      for (int j = 0; searching && j < count; ++j) {
        if (labels[j] < 0 || view.is_favoured(gts[j].box, anchor, radius) != favoured) continue;
        const RankedAnchor<T> item{metric_of_anchor<S>(view, work, image, anchor, labels[j],
                                                       positive_iou(gts[j], predicted), prices, favoured),
                                   static_cast<int32_t>(first) + j};
        if (ranks_before(item, best)) best = item;
      }
      __syncthreads();
    }
  }
  if (claimed == 0) return;
  const int64_t gt = contested ? best.anchor : int64_t(claimed) - 1;
  work.owner[i] = static_cast<unsigned>(gt) + 1;
  work.iou[i] = positive_iou(view.gt_box(image * view.gts.count + gt), predicted);
}

template <class T>
struct SimotaScore {
  const T* iou;
  __device__ T operator()(int64_t i, int64_t) const { return iou[i]; }
};

template <class S, class T>
void launch_all(const SimotaInputs& inputs, const SimotaOptions& options, const TargetTensors& out) {
  const char* const op = "assign_simota";
  const CudaScope scope(inputs.logits);
  const cudaStream_t stream = scope.stream();
  const SimotaView<T> view = inputs.view<T>(options);
  const SimotaCosts<T> costs(options);
  const int64_t rows = view.images * view.gts.count, all_anchors = view.images * view.anchors;
  const int64_t point_blocks = ceil_div<int64_t>(view.anchors, kPointBlock);
  const auto scratch = [&](int64_t bytes) { return allocate(op, {bytes}, ScalarType::Byte, inputs.logits); };
  const int64_t zeroed = (view.images * point_blocks + all_anchors) * int64_t(sizeof(unsigned));
  const Tensor bits = scratch(zeroed);
  const Tensor bounds = scratch(point_blocks * int64_t(sizeof(Box<T>)));
  const Tensor reach = allocate(op, {point_blocks}, inputs.dtype(), inputs.logits);
  const Tensor absent = allocate(op, {all_anchors}, ScalarType::Double, inputs.logits);
  const Tensor iou = allocate(op, {all_anchors}, inputs.dtype(), inputs.logits);
  Workspace<T> work;
  work.bounds = static_cast<Box<T>*>(bounds.mutable_data_ptr());
  work.reach = reach.mutable_data_ptr<T>();
  work.candidates = static_cast<unsigned*>(bits.mutable_data_ptr());
  work.owner = work.candidates + view.images * point_blocks;
  work.absent = absent.mutable_data_ptr<double>();
  work.iou = iou.mutable_data_ptr<T>();
  check_cuda(cudaMemsetAsync(bits.mutable_data_ptr(), 0, zeroed, stream), op);

  if (rows > 0) {
    DETOPS_LAUNCH((simota_prepare_kernel<T>), blocks_for(op, "pred_logits", view.anchors, kThreads), kThreads, 0,
                  stream, view.points, view.strides, view.anchors, work.bounds, work.reach);
    DETOPS_LAUNCH((simota_mark_kernel<T>), blocks_for(op, "pred_logits", rows, kWarps), kThreads, 0, stream, view,
                  static_cast<T>(options.center_radius), work);
    const unsigned absence_blocks = blocks_for(op, "pred_logits", all_anchors, kWarps);
    if (options.mmdet()) {
      DETOPS_LAUNCH((simota_absence_kernel<true, S, T>), absence_blocks, kThreads, 0, stream, view, work);
    } else {
      DETOPS_LAUNCH((simota_absence_kernel<false, S, T>), absence_blocks, kThreads, 0, stream, view, work);
    }
    DETOPS_LAUNCH((simota_claim_kernel<S, T>), static_cast<unsigned>(rows), kClaimWarps * kWarpSize, 0, stream, view,
                  options, costs, work);
    const auto per_image = static_cast<int>(ceil_div<int64_t>(view.anchors, kThreads));
    DETOPS_LAUNCH((simota_resolve_kernel<S, T>), static_cast<unsigned>(view.images * per_image), kThreads, 0, stream,
                  view, options, costs, per_image, work);
  }
  launch_write_targets(work.owner, view.gts, SimotaScore<T>{work.iou}, inputs.gt_boxes_out, out, stream);
}

}  // namespace

void assign_simota_cuda(const SimotaInputs& inputs, const SimotaOptions& options, const TargetTensors& out) {
  dispatch_floating(inputs.logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    if constexpr (std::is_same_v<S, double>) {
      launch_all<S, double>(inputs, options, out);
    } else if (inputs.dtype() == ScalarType::Double) {
      launch_all<S, double>(inputs, options, out);
    } else {
      launch_all<S, float>(inputs, options, out);
    }
  });
}

}  // namespace DETOPS_NAMESPACE
