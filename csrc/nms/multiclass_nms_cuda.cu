// multiclass_nms on a GPU, without a host synchronisation.
//
//   1. collect   all blocks: the pairs above the score threshold of each image, in any order
//   2. suppress  one block per image: takes the best 1024 candidates, sorts them, resolves them 64 at a time against
//                what is kept and among themselves, and goes on with the next 1024 until enough are kept
//   3. write     the outputs, padded
#include "common/allocate.h"
#include "common/counted.h"
#include "common/dispatch.h"
#include "common/sort_cuda.cuh"
#include "nms/nms.h"
#include "nms/rank_cuda.cuh"
#include "nms/resolve_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 512;
constexpr int kChunk = 1024;  // candidates that are sorted together
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kGroups = kThreads / kTile;  // threads that share a candidate of a tile

// Part 1. blockIdx.x is the image.
template <class S>
__global__ void multiclass_nms_collect_kernel(const S* scores, PairLayout layout, ScanOrder order,
                                              ComputeType<S> threshold, UniqueKey<S>* candidates, int* counts) {
  const int64_t image = blockIdx.x;
  const int64_t pairs = layout.pairs();
  const S* const image_scores = scores + image * layout.score_image;
  const auto inner = static_cast<uint32_t>(order.inner);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t step = int64_t(gridDim.y) * kThreads;
  // Each pair of the image is written once at most.
  const Counted<UniqueKey<S>> found("multiclass_nms", "candidates", candidates + image * pairs, pairs);
  // Whole warps go round together, so that every lane can vote.
  for (int64_t first = int64_t(blockIdx.y) * kThreads + threadIdx.x - lane; first < pairs; first += step) {
    const auto i = static_cast<uint32_t>(first + lane);
    ComputeType<S> score = 0;
    bool above = false;
    if (i < pairs) {
      const int64_t offset =
          order.dense ? i * order.inner_step : i / inner * order.outer_step + i % inner * order.inner_step;
      score = static_cast<ComputeType<S>>(image_scores[offset]);
      above = score > threshold;
    }
    const unsigned vote = __ballot_sync(kFullWarp, above);
    if (!vote) continue;
    int slot = 0;
    if (lane == 0) slot = atomicAdd(&counts[image], __popc(vote));
    slot = __shfl_sync(kFullWarp, slot, 0);
    if (above) {
      slot += __popc(vote & static_cast<unsigned>(bits_below(lane)));
      const uint32_t pair = i / inner * order.outer_pairs + i % inner * order.inner_pairs;
      found[slot] = unique_key(rank_key(score), pair);
    }
  }
}

// A key up to which at most kChunk, and at least one, of the keys above `after` lie; there are more than kChunk. Digit
// by digit, the highest first, stopping as soon as half a chunk is found. `histogram` is scratch; all threads get the
// result.
template <class Key>
__device__ Key find_chunk_end(const Key* keys, int count, bool any_before, Key after, const Counted<int>& histogram) {
  constexpr int kTopShift = static_cast<int>(sizeof(Key)) * 8 - kDigitBits;
  DETOPS_SHARED(int, chosen, 2);  // the digit that no longer fits the chunk, and how many keys lie before it
  Key prefix = 0;                 // the digits known so far
  int taken = 0;
  for (int shift = kTopShift;; shift -= kDigitBits) {
    const Key known = shift == kTopShift ? Key(0) : ~Key(0) << (shift + kDigitBits);
    for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) histogram[digit] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Key key = keys[i];
      if ((!any_before || after < key) && (key & known) == prefix) {
        atomicAdd(&histogram[static_cast<int>(key >> shift) & (kDigits - 1)], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 0, total = taken;
      // Ends: the keys that share the prefix, with those taken, are more than kChunk.
      for (; total + histogram[digit] <= kChunk; ++digit) total += histogram[digit];
      chosen[0] = digit;
      chosen[1] = total;
    }
    __syncthreads();
    const int digit = chosen[0];
    taken = chosen[1];
    if (taken >= kChunk / 2 || shift == 0) return (prefix | Key(digit) << shift) - 1;
    prefix |= Key(digit) << shift;
  }
}

// The boxes kept so far of one image.
template <class T>
struct Kept {
  Box<T>* boxes;
  int* labels;
  uint32_t* pairs;
};

// Part 2. blockIdx.x is the image.
template <class S, class Key>
__global__ void multiclass_nms_suppress_kernel(const S* boxes, PairLayout layout, const Key* all_candidates,
                                               const int* candidate_counts, int max_detections, int max_candidates,
                                               bool class_agnostic, bool decisive,
                                               IouThreshold<ComputeType<S>> threshold, Kept<ComputeType<S>> all_kept,
                                               int64_t* counts) {
  using T = ComputeType<S>;
  DETOPS_DYNAMIC_SHARED(Key, chunk);                                       // [kChunk], sorted
  Box<T>* const chunk_boxes = reinterpret_cast<Box<T>*>(chunk + kChunk);   // [kChunk]
  int* const chunk_labels = reinterpret_cast<int*>(chunk_boxes + kChunk);  // [kChunk]
  DETOPS_SHARED(int, digit_counts, kDigits);
  DETOPS_SHARED(int, chunk_count, 1);
  DETOPS_SHARED(int, kept_count, 1);
  DETOPS_SHARED(unsigned, suppressed, kThreads / kWarpSize);  // by warp: which of its 32 candidates are suppressed
  DETOPS_SHARED(uint64_t, suppressors, kTile);  // by candidate: which earlier ones of the tile suppress it
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int candidate = threadIdx.x % kTile, group = threadIdx.x / kTile;
  const int64_t image = blockIdx.x;
  const Key* const candidates = all_candidates + image * layout.pairs();
  const int count = candidate_counts[image];
  const int considered = min(count, max_candidates);
  const Kept<T> kept{all_kept.boxes + image * max_detections, all_kept.labels + image * max_detections,
                     all_kept.pairs + image * max_detections};
  const Counted<int> histogram("multiclass_nms", "counts of digits", digit_counts, kDigits);
  const Counted<Key> chunk_keys("multiclass_nms", "chunk of candidates", chunk, kChunk);
  const Counted<uint32_t> kept_pairs("multiclass_nms", "kept pairs", kept.pairs, max_detections);
  const auto hits = [&](const Box<T>& a, int label_a, const Box<T>& b, T area_b, int label_b) {
    const T area_a = box_area(a);
    return label_a == label_b && may_suppress(a, area_a, b, area_b, threshold) &&
           suppresses(a, area_a, b, area_b, threshold);
  };

  if (threadIdx.x == 0) kept_count[0] = 0;
  __syncthreads();
  Key last = 0;  // the last candidate looked at
  for (int looked_at = 0; looked_at < considered && kept_count[0] < max_detections;) {
    const bool any_before = looked_at > 0;
    const bool all_fit = count - looked_at <= kChunk;
    const Key end = all_fit ? ~Key(0) : find_chunk_end(candidates, count, any_before, last, histogram);
    if (threadIdx.x == 0) chunk_count[0] = 0;
    for (int i = threadIdx.x; i < kChunk; i += kThreads) chunk[i] = ~Key(0);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Key key = candidates[i];
      if ((!any_before || last < key) && !(end < key)) chunk_keys[atomicAdd(&chunk_count[0], 1)] = key;
    }
    __syncthreads();
    block_sort(chunk, kChunk);
    const int in_chunk = min(chunk_count[0], considered - looked_at);
    for (int i = threadIdx.x; i < in_chunk; i += kThreads) {
      const uint32_t pair = index_of(chunk[i]);
      chunk_boxes[i] = load_pair_box<T>(boxes, layout, image, pair);
      chunk_labels[i] = class_agnostic ? 0 : static_cast<int>(pair % static_cast<uint32_t>(layout.classes));
    }
    last = chunk[in_chunk - 1];
    looked_at += in_chunk;
    __syncthreads();

    for (int tile = 0; tile < in_chunk && kept_count[0] < max_detections; tile += kTile) {
      const int own = tile + candidate;
      const int kept_before = kept_count[0];
      bool is_suppressed = own >= in_chunk;
      unsigned char own_suppressors = 0;
      if (!is_suppressed && decisive) {
        const Box<T> box = chunk_boxes[own];
        const T area = box_area(box);
        const int label = chunk_labels[own];
        for (int i = group; i < kept_before && !is_suppressed; i += kGroups) {
          is_suppressed = hits(kept.boxes[i], kept.labels[i], box, area, label);
        }
        for (int i = 0; i < kTile / kGroups; ++i) {
          const int earlier = group * (kTile / kGroups) + i;
          if (earlier < candidate &&
              hits(chunk_boxes[tile + earlier], chunk_labels[tile + earlier], box, area, label)) {
            own_suppressors |= 1u << i;
          }
        }
      }
      reinterpret_cast<unsigned char*>(suppressors)[candidate * kGroups + group] = own_suppressors;
      const unsigned vote = __ballot_sync(kFullWarp, is_suppressed);
      if (lane == 0) suppressed[warp] = vote;
      __syncthreads();
      if (warp == 0) {
        uint64_t gone = 0;
        for (int i = 0; i < kThreads / kWarpSize; ++i) gone |= uint64_t(suppressed[i]) << (i % 2 * kWarpSize);
        const uint64_t stay = resolve_tile(~gone, suppressors[lane], suppressors[lane + kWarpSize]);
        for (int half = 0; half < 2; ++half) {
          const int offset = half * kWarpSize + lane;
          const int slot = kept_before + __popcll(stay & bits_below(offset));
          if (!(stay >> offset & 1) || slot >= max_detections) continue;
          kept.boxes[slot] = chunk_boxes[tile + offset];
          kept.labels[slot] = chunk_labels[tile + offset];
          kept_pairs[slot] = index_of(chunk[tile + offset]);
        }
        if (lane == 0) kept_count[0] = min(kept_before + __popcll(stay), max_detections);
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) counts[image] = kept_count[0];
}

__device__ inline void copy_element(void* to, const void* from, int64_t to_index, int64_t from_index, int size) {
  switch (size) {
    case 2: static_cast<uint16_t*>(to)[to_index] = static_cast<const uint16_t*>(from)[from_index]; break;
    case 4: static_cast<uint32_t*>(to)[to_index] = static_cast<const uint32_t*>(from)[from_index]; break;
    default: static_cast<uint64_t*>(to)[to_index] = static_cast<const uint64_t*>(from)[from_index]; break;
  }
}

__device__ inline void zero_element(void* to, int64_t index, int size) {
  const uint64_t zero = 0;
  copy_element(to, &zero, index, 0, size);
}

// Part 3. One thread per output row. Values are copied as they are, whatever their dtype.
__global__ void multiclass_nms_write_kernel(const void* boxes, int box_size, const void* scores, int score_size,
                                            PairLayout layout, int max_detections, const uint32_t* kept_pairs,
                                            const int64_t* counts, void* boxes_out, void* scores_out,
                                            int64_t* labels_out, int64_t* indices_out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= layout.images * max_detections) return;
  const int64_t image = row / max_detections;
  if (row % max_detections < counts[image]) {
    const int64_t pair = kept_pairs[row];
    const int64_t from = layout.box_offset(image, pair);
    for (int k = 0; k < 4; ++k) copy_element(boxes_out, boxes, 4 * row + k, from + k * layout.box_coordinate, box_size);
    copy_element(scores_out, scores, row, layout.score_offset(image, pair), score_size);
    labels_out[row] = pair % layout.classes;
    indices_out[row] = pair / layout.classes;
  } else {
    for (int k = 0; k < 4; ++k) zero_element(boxes_out, 4 * row + k, box_size);
    zero_element(scores_out, row, score_size);
    labels_out[row] = indices_out[row] = -1;
  }
}

}  // namespace

void multiclass_nms_cuda(const Tensor& boxes, const Tensor& scores, const PairLayout& layout,
                         const MulticlassOptions& options, const Detections& out) {
  if (layout.images == 0) return;
  const char* const op = "multiclass_nms";
  const CudaScope scope(boxes);
  const cudaStream_t stream = scope.stream();
  const int64_t pairs = layout.pairs();
  const int64_t rows_out = layout.images * options.max_detections;
  const auto scratch = [&](int64_t bytes) { return allocate(op, {bytes}, ScalarType::Byte, boxes); };
  const Tensor candidate_counts = allocate(op, {layout.images}, ScalarType::Int, boxes);
  const Tensor kept_labels = allocate(op, {rows_out}, ScalarType::Int, boxes);
  const Tensor kept_pairs = allocate(op, {rows_out}, ScalarType::Int, boxes);
  auto* const kept_pair_data = static_cast<uint32_t*>(kept_pairs.mutable_data_ptr());
  int64_t* const counts = std::get<4>(out).mutable_data_ptr<int64_t>();
  check_cuda(cudaMemsetAsync(candidate_counts.mutable_data_ptr(), 0, layout.images * sizeof(int), stream), op);

  dispatch_floating(scores.scalar_type(), [&](auto score_tag) {
    using S = typename decltype(score_tag)::type;
    using Key = UniqueKey<S>;
    const Tensor candidate_keys = scratch(layout.images * pairs * int64_t(sizeof(Key)));
    auto* const candidates = static_cast<Key*>(candidate_keys.mutable_data_ptr());
    if (pairs > 0) {
      // The threshold in the dtype of the scores, as torch compares them.
      const auto threshold = static_cast<ComputeType<S>>(static_cast<S>(options.score_threshold));
      constexpr int64_t kScoresPerThread = 8, kMostBlocks = 65535;
      const int64_t blocks = min_of(ceil_div(pairs, kThreads * kScoresPerThread), kMostBlocks);
      const dim3 grid(static_cast<unsigned>(layout.images), static_cast<unsigned>(blocks));
      DETOPS_LAUNCH((multiclass_nms_collect_kernel<S>), grid, kThreads, 0, stream, scores.const_data_ptr<S>(), layout,
                    ScanOrder(layout), threshold, candidates, candidate_counts.mutable_data_ptr<int>());
    }
    dispatch_floating(boxes.scalar_type(), [&](auto box_tag) {
      using B = typename decltype(box_tag)::type;
      using T = ComputeType<B>;
      const Tensor kept_boxes = scratch(rows_out * int64_t(sizeof(Box<T>)));
      const Kept<T> kept{static_cast<Box<T>*>(kept_boxes.mutable_data_ptr()), kept_labels.mutable_data_ptr<int>(),
                         kept_pair_data};
      const size_t shared_bytes = kChunk * (sizeof(Key) + sizeof(Box<T>) + sizeof(int));
      allow_shared_memory(multiclass_nms_suppress_kernel<B, Key>, shared_bytes);
      DETOPS_LAUNCH((multiclass_nms_suppress_kernel<B, Key>), static_cast<unsigned>(layout.images), kThreads,
                    shared_bytes, stream, boxes.const_data_ptr<B>(), layout, candidates,
                    candidate_counts.const_data_ptr<int>(), static_cast<int>(options.max_detections),
                    static_cast<int>(options.max_candidates), options.class_agnostic, decides(options.iou_threshold),
                    IouThreshold<T>(options.iou_threshold), kept, counts);
    });
  });
  if (rows_out == 0) return;
  DETOPS_LAUNCH(multiclass_nms_write_kernel, static_cast<unsigned>(ceil_div(rows_out, int64_t(kThreads))), kThreads, 0,
                stream, boxes.const_data_ptr(), static_cast<int>(boxes.element_size()), scores.const_data_ptr(),
                static_cast<int>(scores.element_size()), layout, static_cast<int>(options.max_detections),
                kept_pair_data, counts, std::get<0>(out).mutable_data_ptr(), std::get<1>(out).mutable_data_ptr(),
                std::get<2>(out).mutable_data_ptr<int64_t>(), std::get<3>(out).mutable_data_ptr<int64_t>());
}

}  // namespace DETOPS_NAMESPACE
