// nms, batched_nms and nms_rotated on a GPU.
//
// Boxes are put in rank order, grouped by id: each group is a segment of its own. A segment is decided one window of
// its boxes after the other:
//   1. suppressors   all pairs inside the window, in parallel: per box a bit mask of the earlier boxes that suppress it
//   2. resolve       one block per segment walks the window 64 boxes at a time and knows then which boxes stay
//   3. propagate     all later boxes of the segment, in parallel, against those that the window kept
// The serial part, 2, does bit operations only. Memory is O(N): the masks are those of one window per segment.
//
// The number of windows is that of the longest possible segment, as the host does not know the segments: a launch that
// finds nothing to do costs about 2 us. The one host synchronisation is for the size of the result.
#include "common/allocate.h"
#include "common/counted.h"
#include "common/dispatch.h"
#include "nms/nms.h"
#include "nms/rank_cuda.cuh"
#include "nms/resolve_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kMostWords = 32;                  // words of a window's mask
constexpr int64_t kSmall = kMostWords * kTile;  // up to here one window holds all boxes
constexpr int kGroupedWindow = 8 * kTile;       // window of batched_nms: 64 bytes of masks per box
constexpr int kOwned = 128;                     // a block resolves the segments that begin in so many positions
constexpr int kSlices = 4;                      // threads that share a box in propagate

// The boxes (Box or RotatedBox) in rank order, grouped by id, and what is known about them. Positions count through
// this order.
template <class B>
struct Sorted {
  int count;
  int window;             // boxes per window
  const B* boxes;         // [count]
  const int64_t* ids;     // [count] where ids are to be compared, else null
  const int* begins;      // [count] the first position of a box's segment; null: all are one segment
  const int* ends;        // [count] its end
  uint8_t* dead;          // [count] set where a box is known to be suppressed
  uint64_t* suppressors;  // [rows, window / 64]
  B* kept_boxes;          // [count] from each window's first position on: the boxes that it kept
  int* kept_counts;       // [count] at each window's first position: how many these are

  __device__ int begin(int position) const { return begins ? begins[position] : 0; }
  __device__ int end(int position) const { return ends ? ends[position] : count; }
  // The masks of a position. One segment has the rows of one window only.
  __device__ uint64_t* mask(int position, int first) const {
    return suppressors + int64_t(begins ? position : position - first) * (window / kTile);
  }
};

// Where the result goes: one segment writes indices in order, several write flags by rank.
struct Result {
  const int64_t* order;  // [count] rank -> index of the box
  const int64_t* ranks;  // [count] position -> rank; null: the same
  int64_t* indices;      // [count]
  int64_t* indices_count;
  bool* keep;  // [count] by rank
};

// order[rank] = index, by counting for each score those that rank before it. One thread per score.
template <class S>
__global__ void nms_rank_kernel(const S* scores, int count, int64_t* order) {
  using Key = UniqueKey<S>;
  DETOPS_SHARED(Key, keys, kThreads);
  const int own = blockIdx.x * kThreads + threadIdx.x;
  const auto key_of = [&](int i) { return unique_key(rank_key(static_cast<ComputeType<S>>(scores[i])), i); };
  const Key own_key = own < count ? key_of(own) : Key(0);
  int rank = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + threadIdx.x;
    if (i < count) keys[threadIdx.x] = key_of(i);
    __syncthreads();
    const int length = min(kThreads, count - first);
    for (int k = 0; k < length; ++k) rank += keys[k] < own_key;
    __syncthreads();
  }
  if (own < count) order[rank] = own;
}

// Brings boxes, and ids where `sorted_ids` is given, into the order of positions.
template <class S, class B>
__global__ void nms_gather_kernel(const S* boxes, const int64_t* idxs, const int64_t* order, const int64_t* ranks,
                                  int count, B* sorted_boxes, int64_t* sorted_ids) {
  const int position = blockIdx.x * kThreads + threadIdx.x;
  if (position >= count) return;
  const int64_t index = order[ranks ? ranks[position] : position];
  load(boxes + B::kCoordinates * index, sorted_boxes[position]);
  if (sorted_ids) sorted_ids[position] = idxs[index];
}

// The first position whose id is not below (or, with `after`, is above) `id`.
__device__ inline int search_ids(const int64_t* ids, int count, int64_t id, bool after) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (ids[middle] < id || (after && ids[middle] == id)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void nms_segments_kernel(const int64_t* sorted_ids, int count, int* begins, int* ends) {
  const int position = blockIdx.x * kThreads + threadIdx.x;
  if (position >= count) return;
  begins[position] = search_ids(sorted_ids, count, sorted_ids[position], false);
  ends[position] = search_ids(sorted_ids, count, sorted_ids[position], true);
}

// Part 1. One thread per box and word of its mask. The windows begin `first` boxes into their segments.
template <class B>
__global__ void nms_suppressors_kernel(Sorted<B> sorted, int first, IouThreshold<typename B::Scalar> threshold) {
  using T = typename B::Scalar;
  const int position = (sorted.begins ? 0 : first) + blockIdx.x * kThreads + threadIdx.x;
  if (position >= sorted.count) return;
  const int window_begin = sorted.begin(position) + first;
  const int offset = position - window_begin;
  const int word = blockIdx.y;
  if (offset < word * kTile || offset >= sorted.window || sorted.dead[position]) return;
  const B box = sorted.boxes[position];
  const T area = box_area(box);
  const int earliest = window_begin + word * kTile;
  const int length = min(kTile, position - earliest);
  uint64_t mask = 0;
  for (int i = 0; i < length; ++i) {
    const B earlier = sorted.boxes[earliest + i];
    const T earlier_area = box_area(earlier);
    if (!may_suppress(earlier, earlier_area, box, area, threshold)) continue;
    if (sorted.ids && sorted.ids[earliest + i] != sorted.ids[position]) continue;
    if (suppresses(earlier, earlier_area, box, area, threshold)) mask |= uint64_t(1) << i;
  }
  sorted.mask(position, first)[word] = mask;
}

// Part 2. A block takes the segments that begin in its own range of positions, one after another.
template <class B>
__global__ void nms_resolve_kernel(Sorted<B> sorted, int first, Result result) {
  constexpr int kThreadsPerBox = kThreads / kTile;
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kBoxesPerWarp = kTile / kWarps;
  DETOPS_SHARED(unsigned, starts, kOwned / kWarpSize);  // bit: a segment with such a window begins here
  DETOPS_SHARED(unsigned, alive, kWarps);               // bit: box of the tile that nothing kept before suppresses
  DETOPS_SHARED(uint64_t, kept_word_data, kMostWords);
  const Counted<uint64_t> kept_words("nms", "words of a window", kept_word_data, kMostWords);  // window <= kSmall
  // A position is kept once, in its own window, so that what a segment keeps fits its positions.
  const Counted<B> kept_boxes("nms", "kept boxes", sorted.kept_boxes, sorted.count);
  const Counted<int64_t> indices("nms", "indices", result.indices, sorted.count);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  if (threadIdx.x < kOwned) {
    const int position = blockIdx.x * kOwned + threadIdx.x;
    const bool starts_here =
        position < sorted.count && sorted.begin(position) == position && position + first < sorted.end(position);
    const unsigned vote = __ballot_sync(kFullWarp, starts_here);
    if (lane == 0) starts[warp] = vote;
  }
  __syncthreads();
  for (int owned = 0; owned < kOwned; ++owned) {
    if (!(starts[owned / kWarpSize] >> (owned % kWarpSize) & 1)) continue;
    const int segment = blockIdx.x * kOwned + owned;
    const int window_begin = segment + first;
    const int window_end = min(sorted.end(segment), window_begin + sorted.window);
    const int64_t written = result.indices ? *result.indices_count : 0;
    int kept_count = 0;  // known to warp 0
    for (int tile = 0; window_begin + tile * kTile < window_end; ++tile) {
      const int tile_begin = window_begin + tile * kTile;
      // Boxes that an earlier tile suppresses: a few threads per box share the words of its mask.
      const int position = tile_begin + threadIdx.x / kThreadsPerBox;
      bool suppressed = position >= window_end || sorted.dead[position];
      if (!suppressed) {
        const uint64_t* const mask = sorted.mask(position, first);
        uint64_t hits = 0;
        for (int word = threadIdx.x % kThreadsPerBox; word < tile; word += kThreadsPerBox) {
          hits |= mask[word] & kept_words[word];
        }
        suppressed = hits != 0;
      }
      const unsigned vote = __ballot_sync(kFullWarp, suppressed);
      if (lane == 0) {
        unsigned bits = 0;
        for (int i = 0; i < kBoxesPerWarp; ++i) {
          const unsigned threads = (1u << kThreadsPerBox) - 1;
          if (!(vote >> (i * kThreadsPerBox) & threads)) bits |= 1u << i;
        }
        alive[warp] = bits;
      }
      __syncthreads();
      if (warp == 0) {
        uint64_t undecided = 0;
        for (int i = 0; i < kWarps; ++i) undecided |= uint64_t(alive[i]) << (i * kBoxesPerWarp);
        uint64_t suppressors[2];
        for (int half = 0; half < 2; ++half) {
          const int offset = half * kWarpSize + lane;
          const bool takes_part = undecided >> offset & 1;
          suppressors[half] = takes_part ? sorted.mask(tile_begin + offset, first)[tile] : 0;
        }
        const uint64_t kept = resolve_tile(undecided, suppressors[0], suppressors[1]);
        if (lane == 0) kept_words[tile] = kept;
        for (int half = 0; half < 2; ++half) {
          const int offset = half * kWarpSize + lane;
          if (!(kept >> offset & 1)) continue;
          const int slot = kept_count + __popcll(kept & bits_below(offset));
          const int kept_position = tile_begin + offset;
          kept_boxes[window_begin + slot] = sorted.boxes[kept_position];
          if (result.indices) {
            indices[written + slot] = result.order[kept_position];
          } else {
            result.keep[result.ranks[kept_position]] = true;
          }
        }
        kept_count += __popcll(kept);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      sorted.kept_counts[window_begin] = kept_count;
      if (result.indices) *result.indices_count = written + kept_count;
    }
  }
}

// Part 3. Boxes after the window of their segment; blockIdx.y counts the slices of the kept list.
template <class B>
__global__ void nms_propagate_kernel(Sorted<B> sorted, int first, IouThreshold<typename B::Scalar> threshold) {
  using T = typename B::Scalar;
  const int position = (sorted.begins ? 0 : first + sorted.window) + blockIdx.x * kThreads + threadIdx.x;
  if (position >= sorted.count) return;
  const int window_begin = sorted.begin(position) + first;
  if (position < window_begin + sorted.window || relaxed_load(&sorted.dead[position])) return;
  const B box = sorted.boxes[position];
  const T area = box_area(box);
  const int kept_count = sorted.kept_counts[window_begin];
  for (int i = blockIdx.y; i < kept_count; i += kSlices) {
    const B kept = sorted.kept_boxes[window_begin + i];
    const T kept_area = box_area(kept);
    if (may_suppress(kept, kept_area, box, area, threshold) && suppresses(kept, kept_area, box, area, threshold)) {
      relaxed_store(&sorted.dead[position], uint8_t(1));
      return;
    }
  }
}

// torch.sort(values, stable=True): the sorted values and their indices.
std::pair<Tensor, Tensor> stable_sort(const char* op, const Tensor& values, bool descending) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(values), from(std::optional<bool>(true)), from(int64_t(0)), from(descending)};
  call_torch(op, "aten::sort", "stable", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor index_select(const char* op, const Tensor& values, const Tensor& indices) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(values), from(int64_t(0)), from(indices)};
  call_torch(op, "aten::index_select", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The selected values, in order. Synchronises, for their number.
Tensor masked_select(const char* op, const Tensor& values, const Tensor& mask) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(values), from(mask)};
  call_torch(op, "aten::masked_select", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor rank_order(const char* op, const Tensor& scores, cudaStream_t stream) {
  const int count = static_cast<int>(scores.size(0));
  if (count > kSmall) return stable_sort(op, scores, true).second;
  const Tensor order = allocate(op, {count}, ScalarType::Long, scores);
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    DETOPS_LAUNCH((nms_rank_kernel<S>), ceil_div(count, kThreads), kThreads, 0, stream, scores.const_data_ptr<S>(),
                  count, order.mutable_data_ptr<int64_t>());
  });
  return order;
}

template <class B>
void suppress(const Sorted<B>& sorted, const Result& result, double iou_threshold, cudaStream_t stream) {
  const IouThreshold<typename B::Scalar> threshold(iou_threshold);
  const bool grouped = sorted.begins != nullptr;
  const auto blocks = [](int count) { return static_cast<unsigned>(ceil_div(count, kThreads)); };
  for (int64_t first = 0; first < sorted.count; first += sorted.window) {
    const int start = static_cast<int>(first);
    const int in_window = grouped ? sorted.count : min_of(sorted.window, sorted.count - start);
    const dim3 mask_grid(blocks(in_window), ceil_div(min_of(in_window, sorted.window), kTile));
    DETOPS_LAUNCH((nms_suppressors_kernel<B>), mask_grid, kThreads, 0, stream, sorted, start, threshold);
    const unsigned owners = grouped ? static_cast<unsigned>(ceil_div(sorted.count, kOwned)) : 1u;
    DETOPS_LAUNCH((nms_resolve_kernel<B>), owners, kThreads, 0, stream, sorted, start, result);
    const int64_t after = first + sorted.window;
    if (after >= sorted.count) break;
    const dim3 later_grid(blocks(grouped ? sorted.count : static_cast<int>(sorted.count - after)), kSlices);
    DETOPS_LAUNCH((nms_propagate_kernel<B>), later_grid, kThreads, 0, stream, sorted, start, threshold);
  }
}

}  // namespace

Tensor nms_cuda(const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  const int count = static_cast<int>(boxes.size(0));
  if (count == 0) return allocate(op, {0}, ScalarType::Long, boxes);
  const CudaScope scope(boxes);
  const cudaStream_t stream = scope.stream();
  const int grid = ceil_div(count, kThreads);
  const auto scratch = [&](int64_t bytes) { return allocate(op, {bytes}, ScalarType::Byte, boxes); };

  const Tensor order = rank_order(op, scores, stream);
  if (!decides(iou_threshold)) return order;
  Result result{order.const_data_ptr<int64_t>(), nullptr, nullptr, nullptr, nullptr};
  // Few boxes: one window, in which ids are compared. Many: sorted by id, each id a segment.
  const bool grouped = idxs != nullptr && count > kSmall;
  Tensor ids, ranks, bounds, keep;
  if (grouped) {
    std::tie(ids, ranks) = stable_sort(op, index_select(op, *idxs, order), false);
    bounds = allocate(op, {2, count}, ScalarType::Int, boxes);
    DETOPS_LAUNCH(nms_segments_kernel, grid, kThreads, 0, stream, ids.const_data_ptr<int64_t>(), count,
                  bounds.mutable_data_ptr<int>(), bounds.mutable_data_ptr<int>() + count);
    keep = allocate(op, {count}, ScalarType::Bool, boxes);
    check_cuda(cudaMemsetAsync(keep.mutable_data_ptr(), 0, count, stream), op);
    result.ranks = ranks.const_data_ptr<int64_t>();
    result.keep = static_cast<bool*>(keep.mutable_data_ptr());
  } else if (idxs != nullptr) {
    ids = allocate(op, {count}, ScalarType::Long, boxes);
  }
  const Tensor indices = allocate(op, {grouped ? 0 : count + 1}, ScalarType::Long, boxes);  // the last is their number
  const Tensor dead = scratch(count);
  const Tensor kept_counts = allocate(op, {count}, ScalarType::Int, boxes);
  check_cuda(cudaMemsetAsync(dead.mutable_data_ptr(), 0, count, stream), op);
  if (!grouped) {
    result.indices = indices.mutable_data_ptr<int64_t>();
    result.indices_count = result.indices + count;
    check_cuda(cudaMemsetAsync(result.indices_count, 0, sizeof(int64_t), stream), op);
  }

  const auto run = [&](auto source, auto box) {
    using S = typename decltype(source)::type;
    using B = typename decltype(box)::type;
    const int all = static_cast<int>(min_of<int64_t>(ceil_div(count, kTile) * kTile, kSmall));
    const int window = grouped ? kGroupedWindow : all;
    const Tensor sorted_boxes = scratch(count * int64_t(sizeof(B)));
    const Tensor kept_boxes = scratch(count * int64_t(sizeof(B)));
    const Tensor suppressors = scratch(int64_t(grouped ? count : window) * (window / 8));
    auto* const boxes_by_position = static_cast<B*>(sorted_boxes.mutable_data_ptr());
    int64_t* const compared_ids = idxs != nullptr && !grouped ? ids.mutable_data_ptr<int64_t>() : nullptr;
    DETOPS_LAUNCH((nms_gather_kernel<S, B>), grid, kThreads, 0, stream, boxes.const_data_ptr<S>(),
                  compared_ids ? idxs->const_data_ptr<int64_t>() : nullptr, result.order, result.ranks, count,
                  boxes_by_position, compared_ids);
    const int* const begins = grouped ? bounds.const_data_ptr<int>() : nullptr;
    const Sorted<B> sorted{count,
                           window,
                           boxes_by_position,
                           compared_ids,
                           begins,
                           grouped ? begins + count : nullptr,
                           dead.mutable_data_ptr<uint8_t>(),
                           static_cast<uint64_t*>(suppressors.mutable_data_ptr()),
                           static_cast<B*>(kept_boxes.mutable_data_ptr()),
                           kept_counts.mutable_data_ptr<int>()};
    suppress(sorted, result, iou_threshold, stream);
  };
  dispatch_floating(boxes.scalar_type(), [&](auto source) {
    using T = ComputeType<typename decltype(source)::type>;
    if (boxes.size(1) == RotatedBox<T>::kCoordinates) {
      run(source, TypeTag<RotatedBox<T>>{});
    } else {
      run(source, TypeTag<Box<T>>{});
    }
  });

  if (grouped) return masked_select(op, order, keep);
  int64_t kept = 0;
  check_cuda(cudaMemcpyAsync(&kept, result.indices_count, sizeof(kept), cudaMemcpyDeviceToHost, stream), op);
  check_cuda(cudaStreamSynchronize(stream), op);
  return first_rows(indices, kept);
}

}  // namespace DETOPS_NAMESPACE
