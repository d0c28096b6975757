// multiclass_nms: schema, checks, and the CPU kernel.
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"
#include "common/register.h"
#include "common/sort_cpu.h"
#include "nms/kept_boxes_cpu.h"
#include "nms/nms.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class Key>
using Candidates = std::vector<Keyed<Key>>;

// Appends the pairs whose score is above the threshold, of `count` scores that lie `step` apart and whose pair numbers
// are `pair_step` apart.
template <class T>
DETOPS_CLONES void collect_row(const T* scores, int64_t count, int64_t step, ComputeType<T> threshold, uint32_t pair,
                               uint32_t pair_step, Candidates<RankKey<T>>& out) {
  using Compute = ComputeType<T>;
  constexpr int64_t kBlock = 32;  // few blocks hold a candidate, and the test of a whole block vectorises
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, count);
    if (step == 1 && end - begin == kBlock) {
      int any = 0;
      for (int64_t i = 0; i < kBlock; ++i) any |= static_cast<Compute>(scores[begin + i]) > threshold;
      if (!any) continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      const Compute score = static_cast<Compute>(scores[i * step]);
      if (score > threshold) out.push_back({rank_key(score), pair + static_cast<uint32_t>(i) * pair_step});
    }
  }
}

// The candidates of each image, in any order: they are ranked later.
template <class T>
std::vector<Candidates<RankKey<T>>> collect_candidates(const T* scores, const PairLayout& layout,
                                                       ComputeType<T> threshold) {
  if (layout.pairs() == 0) return std::vector<Candidates<RankKey<T>>>(layout.images);  // whatever its other sizes
  const ScanOrder order(layout);
  // Adjoining rows whose pairs are numbered on are one long row.
  const bool one_row = order.dense && order.outer_pairs == order.inner * order.inner_pairs;

  constexpr int64_t kScoresPerPart = 1 << 15;
  const int64_t rows_per_part = max_of<int64_t>(1, kScoresPerPart / max_of<int64_t>(1, order.inner));
  const int64_t parts_per_image = ceil_div(order.outer, rows_per_part);
  std::vector<Candidates<RankKey<T>>> parts(layout.images * parts_per_image);
  parallel_items(static_cast<int64_t>(parts.size()), [&](const auto& next) {
    for (int64_t part = next(); part >= 0; part = next()) {
      const int64_t begin = part % parts_per_image * rows_per_part;
      const int64_t end = min_of(begin + rows_per_part, order.outer);
      const int64_t rows_at_once = one_row ? end - begin : 1;
      const T* const image = scores + part / parts_per_image * layout.score_image;
      for (int64_t row = begin; row < end; row += rows_at_once) {
        collect_row(image + row * order.outer_step, rows_at_once * order.inner, order.inner_step, threshold,
                    static_cast<uint32_t>(row) * order.outer_pairs, order.inner_pairs, parts[part]);
      }
    }
  });

  std::vector<Candidates<RankKey<T>>> images(layout.images);
  for (size_t part = 0; part < parts.size(); ++part) {
    auto& image = images[part / parts_per_image];
    image.insert(image.end(), parts[part].begin(), parts[part].end());
  }
  return images;
}

// The boxes of one image that were kept so far, and their pairs.
template <class T>
struct KeptOfImage {
  KeptBuckets<Box<T>> by_class;
  std::optional<KeptIndex<Box<T>>> index;  // in place of by_class, once many are kept
  Counted<uint32_t> pairs;                 // [max_detections]
  int64_t count = 0;
};

// Greedy suppression over sorted candidates, from `begin` on, until `most` are kept. Returns where it stopped.
template <class T, class Key>
DETOPS_CLONES int64_t suppress_sorted(const T* boxes, const PairLayout& layout, int64_t image,
                                      const MulticlassOptions& options, const Keyed<Key>* candidates, int64_t begin,
                                      int64_t end, int64_t most, KeptOfImage<ComputeType<T>>& kept) {
  using Compute = ComputeType<T>;
  const IouThreshold<Compute> threshold(options.iou_threshold);
  const bool decisive = decides(options.iou_threshold);
  int64_t i = begin;
  for (; i < end && kept.count < most; ++i) {
    const uint32_t pair = candidates[i].index;
    const Box<Compute> box = load_pair_box<Compute>(boxes, layout, image, pair);
    const Compute area = box_area(box);
    if (decisive && takes_part(box, area)) {
      const auto label = static_cast<uint32_t>(options.class_agnostic ? 0 : pair % layout.classes);
      if (kept.index.has_value()) {
        if (kept.index->suppresses(label, box, area, threshold)) continue;
        kept.index->add(label, box, area);
      } else {
        if (kept.by_class.suppresses(label, label, box, area, threshold)) continue;
        kept.by_class.add(label, label, box, area);
      }
    }
    kept.pairs[kept.count++] = pair;
  }
  return i;
}

// The same over the candidates of one image, in any order. Sorts only as many as are looked at.
template <class T, class Key>
void suppress_image(const T* boxes, const PairLayout& layout, int64_t image, const MulticlassOptions& options,
                    Candidates<Key>& candidates, KeptOfImage<ComputeType<T>>& kept) {
  using B = Box<ComputeType<T>>;
  const int64_t count = static_cast<int64_t>(candidates.size());
  const int64_t considered = min_of(count, options.max_candidates);
  const int64_t most = min_of(considered, options.max_detections);
  const bool indexed = most > kIndexPays && KeptIndex<B>::serves(options.iou_threshold);
  kept.count = 0;
  kept.index.reset();
  kept.by_class.reset(options.class_agnostic || count == 0 ? 1 : layout.classes, indexed ? kIndexPays : most);
  int64_t looked_at = 0, sorted = 0, step = max_of<int64_t>(256, 2 * most);
  while (looked_at < considered && kept.count < most) {
    if (looked_at == sorted) {
      sorted = min_of(looked_at + step, count);
      step *= 2;
      if (sorted < count) {
        std::nth_element(candidates.begin() + looked_at, candidates.begin() + sorted, candidates.end());
      }
      std::sort(candidates.begin() + looked_at, candidates.begin() + sorted);
    }
    const bool by_class = indexed && !kept.index.has_value();
    looked_at = suppress_sorted(boxes, layout, image, options, candidates.data(), looked_at, min_of(sorted, considered),
                                by_class ? kIndexPays : most, kept);
    if (by_class && kept.count == kIndexPays) {
      kept.index.emplace(options.iou_threshold, most);
      kept.by_class.for_each([&](uint32_t label, const B& box) { kept.index->add(label, box, box_area(box)); });
    }
  }
}

// Copies what was kept to the outputs and fills the rest of the rows.
void write_detections(const Tensor& boxes, const Tensor& scores, const PairLayout& layout, int64_t max_detections,
                      const uint32_t* kept_pairs, const int64_t* counts, const Detections& out) {
  const size_t box_size = boxes.element_size(), score_size = scores.element_size();
  const auto* const box_data = static_cast<const char*>(boxes.const_data_ptr());
  const auto* const score_data = static_cast<const char*>(scores.const_data_ptr());
  auto* box_out = static_cast<char*>(std::get<0>(out).mutable_data_ptr());
  auto* score_out = static_cast<char*>(std::get<1>(out).mutable_data_ptr());
  int64_t* label_out = std::get<2>(out).mutable_data_ptr<int64_t>();
  int64_t* index_out = std::get<3>(out).mutable_data_ptr<int64_t>();
  for (int64_t image = 0; image < layout.images; ++image) {
    for (int64_t i = 0; i < max_detections; ++i) {
      if (i < counts[image]) {
        const int64_t pair = kept_pairs[image * max_detections + i];
        for (int k = 0; k < 4; ++k) {
          const int64_t offset = layout.box_offset(image, pair) + k * layout.box_coordinate;
          memcpy(box_out + k * box_size, box_data + offset * box_size, box_size);
        }
        memcpy(score_out, score_data + layout.score_offset(image, pair) * score_size, score_size);
        *label_out = pair % layout.classes;
        *index_out = pair / layout.classes;
      } else {
        memset(box_out, 0, 4 * box_size);
        memset(score_out, 0, score_size);
        *label_out = *index_out = -1;
      }
      box_out += 4 * box_size;
      score_out += score_size;
      ++label_out;
      ++index_out;
    }
  }
}

void multiclass_nms_cpu(const Tensor& boxes, const Tensor& scores, const PairLayout& layout,
                        const MulticlassOptions& options, const Detections& out) {
  const std::unique_ptr<uint32_t[]> kept_pairs(new uint32_t[layout.images * options.max_detections]);
  int64_t* const counts = std::get<4>(out).mutable_data_ptr<int64_t>();
  const auto suppress_images = [&](auto& candidates) {
    dispatch_floating(boxes.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* const data = boxes.const_data_ptr<T>();
      parallel_items(layout.images, [&](const auto& next) {
        KeptOfImage<ComputeType<T>> kept;
        for (int64_t image = next(); image >= 0; image = next()) {
          kept.pairs = {"multiclass_nms", "kept pairs", kept_pairs.get() + image * options.max_detections,
                        options.max_detections};
          suppress_image(data, layout, image, options, candidates[image], kept);
          counts[image] = kept.count;
        }
      });
    });
  };
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    // The threshold in the dtype of the scores, as torch compares them.
    const auto threshold = static_cast<ComputeType<T>>(static_cast<T>(options.score_threshold));
    auto candidates = collect_candidates(scores.const_data_ptr<T>(), layout, threshold);
    suppress_images(candidates);
  });
  write_detections(boxes, scores, layout, options.max_detections, kept_pairs.get(), counts, out);
}

Detections multiclass_nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double score_threshold,
                          int64_t max_detections, std::optional<int64_t> max_candidates, bool class_agnostic) {
  const char* const op = "multiclass_nms";
  check_shape(op, "scores", scores, "[B, N, C]", {-1, -1, -1});
  const int64_t images = scores.size(0), rows = scores.size(1), classes = scores.size(2);
  const bool box_per_class = boxes.dim() == 4;
  const std::string sizes =
      " with B = " + std::to_string(images) + ", N = " + std::to_string(rows) + ", C = " + std::to_string(classes);
  if (box_per_class) {
    check_shape(op, "boxes", boxes, "[B, N, C, 4]" + sizes, {images, rows, classes, 4});
  } else {
    check_shape(op, "boxes", boxes, "[B, N, 4] or [B, N, C, 4]" + sizes, {images, rows, 4});
  }
  check_floating(op, "boxes", boxes);
  check_floating(op, "scores", scores);
  check_same_device(op, "scores", scores, "boxes", boxes);
  check_row_count(op, "scores", images, "images");
  check_iou_threshold(op, iou_threshold);
  if (score_threshold != score_threshold) fail(op, "score_threshold must be a number, got nan");
  if (max_detections < 0 || max_detections > kMostRows) {
    fail(op, "max_detections must be 0 to " + std::to_string(kMostRows) + ", got " + std::to_string(max_detections));
  }
  if (max_candidates && *max_candidates < 0) {
    fail(op, "max_candidates must be None or at least 0, got " + std::to_string(*max_candidates));
  }
  if (rows > 0 && classes > kMostRows / rows) {  // their product may be too large for an int64
    fail(op, "scores must have at most " + std::to_string(kMostRows) + " values per image, got " + shape_text(scores));
  }
  const PairLayout layout{images,
                          rows,
                          classes,
                          scores.stride(0),
                          scores.stride(1),
                          scores.stride(2),
                          boxes.stride(0),
                          boxes.stride(1),
                          box_per_class ? boxes.stride(2) : 0,
                          boxes.stride(box_per_class ? 3 : 2)};
  const MulticlassOptions options{iou_threshold, score_threshold, max_detections,
                                  min_of(max_candidates.value_or(layout.pairs()), layout.pairs()), class_agnostic};

  const Detections out{allocate(op, {images, max_detections, 4}, boxes.scalar_type(), boxes),
                       allocate(op, {images, max_detections}, scores.scalar_type(), boxes),
                       allocate(op, {images, max_detections}, ScalarType::Long, boxes),
                       allocate(op, {images, max_detections}, ScalarType::Long, boxes),
                       allocate(op, {images}, ScalarType::Long, boxes)};
  if (on_gpu(op, boxes)) {
    DETOPS_GPU_ONLY(multiclass_nms_cuda(boxes, scores, layout, options, out));
  } else {
    multiclass_nms_cpu(boxes, scores, layout, options, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&multiclass_nms>(
      "multiclass_nms(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, int max_detections, "
      "int? max_candidates, bool class_agnostic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
