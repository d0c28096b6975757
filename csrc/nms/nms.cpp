// nms, batched_nms and nms_rotated: schema, checks, and the CPU kernels.
#include "nms/nms.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"
#include "common/register.h"
#include "common/sort_cpu.h"
#include "nms/kept_boxes_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

// Greedy suppression over boxes in rank order, from the first on, against a list of the kept ones. Stops where the list
// has grown to `most_kept`. Returns the position where it stopped.
template <class B, class T>
DETOPS_CLONES int64_t suppress_by_list(const B* boxes, int64_t count, int64_t most_kept,
                                       const IouThreshold<T>& threshold, KeptList<B>& kept, uint8_t* keep) {
  int64_t added = 0, i = 0;
  for (; i < count && added < most_kept; ++i) {
    const T area = box_area(boxes[i]);
    keep[i] = 1;
    if (!takes_part(boxes[i], area)) continue;
    if (kept.suppresses(boxes[i], area, threshold)) {
      keep[i] = 0;
    } else {
      kept.add(boxes[i], area);
      ++added;
    }
  }
  return i;
}

// The same for boxes [decided, count), through an index of the kept ones. keep[0, decided) is known.
template <class B, class T>
DETOPS_CLONES void suppress_by_index(const B* boxes, int64_t decided, int64_t count, const IouThreshold<T>& threshold,
                                     KeptIndex<B>& kept, uint8_t* keep) {
  for (int64_t i = 0; i < count; ++i) {
    const T area = box_area(boxes[i]);
    if (i >= decided) keep[i] = 1;
    if (!keep[i] || !takes_part(boxes[i], area)) continue;
    if (i >= decided && kept.suppresses(0, boxes[i], area, threshold)) {
      keep[i] = 0;
    } else {
      kept.add(0, boxes[i], area);
    }
  }
}

// One segment: boxes in rank order, none separated by class. keep[i] becomes 1 where the box stays.
template <class B>
void suppress_segment(const B* boxes, int64_t count, double iou_threshold, KeptList<B>& list, uint8_t* keep) {
  const IouThreshold<typename B::Scalar> threshold(iou_threshold);
  const bool indexed = count > kIndexPays && KeptIndex<B>::serves(iou_threshold);
  const int64_t most_kept = indexed ? kIndexPays : count;
  list.reset(most_kept);
  const int64_t decided = suppress_by_list(boxes, count, most_kept, threshold, list, keep);
  if (decided == count) return;
  KeptIndex<B> index(iou_threshold, count - decided + most_kept);
  suppress_by_index(boxes, decided, count, threshold, index, keep);
}

// Ranks of the scores: item r holds the key and the index of the r-th best.
template <class T>
std::unique_ptr<Keyed<RankKey<T>>[]> rank_scores(const T* scores, int64_t count) {
  std::unique_ptr<Keyed<RankKey<T>>[]> ranks(new Keyed<RankKey<T>>[count]);
  for (int64_t i = 0; i < count; ++i) {
    ranks[i] = {rank_key(static_cast<ComputeType<T>>(scores[i])), static_cast<uint32_t>(i)};
  }
  sort_keyed(ranks.get(), count);
  return ranks;
}

// The indices of `scores` in rank order.
std::unique_ptr<uint32_t[]> rank_order(const Tensor& scores) {
  const int64_t count = scores.size(0);
  std::unique_ptr<uint32_t[]> order(new uint32_t[count]);
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto ranks = rank_scores(scores.const_data_ptr<T>(), count);
    for (int64_t i = 0; i < count; ++i) order[i] = ranks[i].index;
  });
  return order;
}

// Positions in rank order, regrouped by id, and where each group begins (and the last ends).
struct Segments {
  std::unique_ptr<uint32_t[]> ranks;
  std::vector<int64_t> begins;
};

Segments group_by_id(const int64_t* idxs, const uint32_t* order, int64_t count) {
  const std::unique_ptr<Keyed<uint64_t>[]> items(new Keyed<uint64_t>[count]);
  // Unsigned and from zero, so that the radix sort sees few digits. The order of the groups does not matter.
  int64_t lowest = idxs[0];
  for (int64_t i = 1; i < count; ++i) lowest = min_of(lowest, idxs[i]);
  for (int64_t rank = 0; rank < count; ++rank) {
    const uint64_t id = static_cast<uint64_t>(idxs[order[rank]]) - static_cast<uint64_t>(lowest);
    items[rank] = {id, static_cast<uint32_t>(rank)};
  }
  sort_keyed(items.get(), count);
  Segments segments{std::unique_ptr<uint32_t[]>(new uint32_t[count]), {}};
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || items[i].key != items[i - 1].key) segments.begins.push_back(i);
    segments.ranks[i] = items[i].index;
  }
  segments.begins.push_back(count);
  return segments;
}

constexpr int64_t kBoxesPerThread = 4096;  // that loading pays a thread for

// keep[r] becomes 1 where the r-th best box stays.
template <class B, class Source>
void suppress_segments(const Source* boxes, const uint32_t* order, const Segments& segments, int64_t count,
                       double iou_threshold, uint8_t* keep) {
  const std::unique_ptr<B[]> sorted(new B[count]);
  const bool grouped = segments.ranks != nullptr;
  const auto rank_of = [&](int64_t i) { return grouped ? segments.ranks[i] : i; };
  parallel_ranges(count, kBoxesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) load(boxes + B::kCoordinates * int64_t(order[rank_of(i)]), sorted[i]);
  });
  const std::unique_ptr<uint8_t[]> keep_grouped(grouped ? new uint8_t[count] : nullptr);
  uint8_t* const result = grouped ? keep_grouped.get() : keep;

  const auto& begins = segments.begins;
  parallel_items(static_cast<int64_t>(begins.size()) - 1, [&](const auto& next) {
    KeptList<B> list;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t begin = begins[item];
      suppress_segment(sorted.get() + begin, begins[item + 1] - begin, iou_threshold, list, result + begin);
    }
  });
  if (grouped) {
    for (int64_t i = 0; i < count; ++i) keep[segments.ranks[i]] = result[i];
  }
}

Tensor nms_cpu(const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  const int64_t count = boxes.size(0);
  if (count == 0) return allocate(op, {0}, ScalarType::Long, boxes);
  const auto order = rank_order(scores);
  if (!decides(iou_threshold)) {
    const Tensor all = allocate(op, {count}, ScalarType::Long, boxes);
    std::copy(order.get(), order.get() + count, all.mutable_data_ptr<int64_t>());
    return all;
  }
  const Segments segments =
      idxs ? group_by_id(idxs->const_data_ptr<int64_t>(), order.get(), count) : Segments{nullptr, {0, count}};
  const std::unique_ptr<uint8_t[]> keep(new uint8_t[count]);
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using Source = typename decltype(tag)::type;
    using T = ComputeType<Source>;
    const Source* const data = boxes.const_data_ptr<Source>();
    if (boxes.size(1) == RotatedBox<T>::kCoordinates) {
      suppress_segments<RotatedBox<T>>(data, order.get(), segments, count, iou_threshold, keep.get());
    } else {
      suppress_segments<Box<T>>(data, order.get(), segments, count, iou_threshold, keep.get());
    }
  });

  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) kept += keep[i];
  const Tensor out = allocate(op, {kept}, ScalarType::Long, boxes);
  int64_t* next = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    if (keep[i]) *next++ = order[i];
  }
  return out;
}

// The entry of all three ops; idxs is null where all boxes are one group.
Tensor checked_nms(const char* op, int64_t coordinates, const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                   double iou_threshold) {
  check_shape(op, "boxes", boxes, coordinates == 4 ? "[N, 4]" : "[N, 5]", {-1, coordinates});
  const int64_t count = boxes.size(0);
  const std::string per_box = "[N] with N = " + std::to_string(count);
  check_row_count(op, "boxes", count);
  check_iou_threshold(op, iou_threshold);
  check_floating(op, "boxes", boxes);
  check_shape(op, "scores", scores, per_box, {count});
  check_floating(op, "scores", scores);
  check_same_device(op, "scores", scores, "boxes", boxes);
  Tensor ids;
  if (idxs != nullptr) {
    check_shape(op, "idxs", *idxs, per_box, {count});
    check_integer(op, "idxs", *idxs);
    check_same_device(op, "idxs", *idxs, "boxes", boxes);
    ids = as_dense(*idxs, ScalarType::Long);
  }
  const Tensor* const ids_or_null = idxs != nullptr ? &ids : nullptr;
  const Tensor dense_boxes = as_contiguous(boxes), dense_scores = as_contiguous(scores);
  if (on_gpu(op, boxes)) {
    DETOPS_GPU_ONLY(return nms_cuda(op, dense_boxes, dense_scores, ids_or_null, iou_threshold));
  }
  return nms_cpu(op, dense_boxes, dense_scores, ids_or_null, iou_threshold);
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return checked_nms("nms", 4, boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  return checked_nms("batched_nms", 4, boxes, scores, &idxs, iou_threshold);
}

Tensor nms_rotated(const Tensor& boxes, const Tensor& scores, double iou_threshold, const std::optional<Tensor>& idxs) {
  return checked_nms("nms_rotated", 5, boxes, scores, idxs.has_value() ? &*idxs : nullptr, iou_threshold);
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&nms>("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  ops.add<&batched_nms>("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");
  ops.add<&nms_rotated>("nms_rotated(Tensor boxes, Tensor scores, float iou_threshold, Tensor? idxs) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
