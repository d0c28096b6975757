// match_max_iou: schema, checks, and the CPU kernel.
#include "matching/matching.h"

#include <memory>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 16;       // anchors that are looked at together
constexpr int64_t kChunk = 256;  // anchors of a chunk, or more where there are more boxes

// The boxes of one image that take part.
template <class T>
struct BoxList {
  const Box<T>* boxes;
  const T* areas;
  const int32_t* rows;
  int64_t count;
};

// The valid boxes of [images, count], packed by image without those that cannot have a part in anything.
template <class T>
class PackedBoxes {
 public:
  template <class CanMatter>
  PackedBoxes(const T* boxes, const bool* valid, int64_t images, int64_t count, const CanMatter& can_matter)
      : count_(count),
        boxes_(new Box<T>[images * count]),
        areas_(new T[images * count]),
        rows_(new int32_t[images * count]),
        lengths_(new int64_t[images]),
        first_valid_(new int32_t[images]) {
    for (int64_t image = 0; image < images; ++image) {
      int64_t length = 0;
      first_valid_[image] = -1;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t item = image * count + j;
        if (valid != nullptr && !valid[item]) continue;
        if (first_valid_[image] < 0) first_valid_[image] = static_cast<int32_t>(j);
        const Box<T> box = load_box<T>(boxes + 4 * item);
        if (!can_matter(box)) continue;
        boxes_[image * count + length] = box;
        areas_[image * count + length] = box_area(box);
        rows_[image * count + length++] = static_cast<int32_t>(j);
      }
      lengths_[image] = length;
    }
  }
  BoxList<T> of(int64_t image) const {
    return {boxes_.get() + image * count_, areas_.get() + image * count_, rows_.get() + image * count_,
            lengths_[image]};
  }
  int first_valid(int64_t image) const { return first_valid_[image]; }  // -1 if none

 private:
  int64_t count_;
  std::unique_ptr<Box<T>[]> boxes_;
  std::unique_ptr<T[]> areas_;
  std::unique_ptr<int32_t[]> rows_;
  std::unique_ptr<int64_t[]> lengths_;
  std::unique_ptr<int32_t[]> first_valid_;
};

// What a thread needs to work on a chunk.
template <class T>
struct Scratch {
  std::unique_ptr<int32_t[]> near;          // the boxes that may meet the chunk: all may
  std::unique_ptr<T[][kLanes]> best_lanes;  // their best IoUs, lane by lane

  explicit Scratch(int64_t gts) : near(new int32_t[gts]), best_lanes(new T[gts][kLanes]) {}
};

// One chunk of anchors.
template <class T>
struct Chunk {
  const T* anchors;
  int64_t count;
  int64_t* indices;
  T* ious;
  int32_t* own;  // the box of the best IoU, -1 for an ignored anchor; null without low-quality matches
  T* gt_best;    // by packed box, the best IoU with an anchor that is not ignored; null likewise
};

template <class T>
DETOPS_CLONES void match_chunk(const Chunk<T>& chunk, const BoxList<T>& gts, int first_valid, const BoxList<T>& regions,
                               const MatchOptions<T>& options, Scratch<T>& scratch) {
  Box<T> around = empty_box<T>();
  for (int64_t i = 0; i < chunk.count; ++i) {
    const Box<T> anchor = load_box<T>(chunk.anchors + 4 * i);
    if (can_overlap(anchor, box_area(anchor))) around = box_around(around, anchor);
  }
  const Counted<int32_t> near("match_max_iou", "boxes near a chunk", scratch.near.get(), gts.count);
  int near_count = 0;
  for (int64_t j = 0; j < gts.count; ++j) {
    near[near_count] = static_cast<int32_t>(j);
    near_count += may_meet(gts.boxes[j], around);
  }
  const bool low_quality = chunk.gt_best != nullptr;
  if (low_quality) {
    for (int k = 0; k < near_count; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) scratch.best_lanes[k][lane] = T(0);
    }
  }
  for (int64_t first = 0; first < chunk.count; first += kLanes) {
    const int used = static_cast<int>(min_of<int64_t>(kLanes, chunk.count - first));
    T lanes[4][kLanes] = {}, area[kLanes], best[kLanes], counts[kLanes];
    int32_t row[kLanes];
    Box<T> group = empty_box<T>();
    for (int lane = 0; lane < used; ++lane) {
      const Box<T> anchor = load_box<T>(chunk.anchors + 4 * (first + lane));
      lanes[0][lane] = anchor.x1;
      lanes[1][lane] = anchor.y1;
      lanes[2][lane] = anchor.x2;
      lanes[3][lane] = anchor.y2;
      if (can_overlap(anchor, box_area(anchor))) group = box_around(group, anchor);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const Box<T> anchor{lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane]};
      area[lane] = box_area(anchor);
      best[lane] = T(0);
      row[lane] = first_valid;
      counts[lane] = T(1);
    }
    for (int64_t j = 0; j < regions.count; ++j) {
      if (!may_meet(regions.boxes[j], group)) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        const Box<T> anchor{lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane]};
        if (is_ignored(anchor, area[lane], regions.boxes[j], options.ignore_threshold)) counts[lane] = T(0);
      }
    }
    for (int k = 0; k < near_count; ++k) {
      const Box<T> gt = gts.boxes[near[k]];
      if (!may_meet(gt, group)) continue;
      const T gt_area = gts.areas[near[k]];
      const int32_t gt_row = gts.rows[near[k]];
      T iou[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const Box<T> anchor{lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane]};
        iou[lane] = match_iou(anchor, area[lane], gt, gt_area);
        const bool better = is_better_match(iou[lane], best[lane]);
        best[lane] = better ? iou[lane] : best[lane];
        row[lane] = better ? gt_row : row[lane];
      }
      if (!low_quality) continue;
      T* const best_lanes = scratch.best_lanes[k];
      for (int lane = 0; lane < kLanes; ++lane) {
        best_lanes[lane] = max_of(best_lanes[lane], iou[lane] * counts[lane]);
      }
    }
    for (int lane = 0; lane < used; ++lane) {
      const bool ignored = counts[lane] == T(0);
      chunk.indices[first + lane] = ignored ? kBetween : match_of(best[lane], row[lane], options.thresholds);
      chunk.ious[first + lane] = best[lane];
      if (low_quality) chunk.own[first + lane] = ignored ? -1 : row[lane];
    }
  }
  if (!low_quality) return;
  for (int64_t j = 0; j < gts.count; ++j) chunk.gt_best[j] = T(0);
  for (int k = 0; k < near_count; ++k) {
    T best = T(0);
    for (int lane = 0; lane < kLanes; ++lane) best = max_of(scratch.best_lanes[k][lane], best);
    chunk.gt_best[near[k]] = best;
  }
}

// The low-quality rule for one chunk, where all ties count. `gt_best` is over all chunks; `last_at_zero` is the last
// box whose best IoU is 0, or -1.
template <class T>
DETOPS_CLONES void match_ties(const Chunk<T>& chunk, const BoxList<T>& gts, const T* gt_best, int last_at_zero,
                              const MatchOptions<T>& options) {
  for (int64_t i = 0; last_at_zero >= 0 && i < chunk.count; ++i) {
    if (chunk.own[i] >= 0) chunk.indices[i] = options.this_gt ? last_at_zero : chunk.own[i];
  }
  for (int64_t j = 0; j < gts.count; ++j) {
    const T best = gt_best[j];
    const bool served = best > T(0) && chunk.gt_best[j] == best && wants_low_quality(best, options);
    if (!served || (options.this_gt && gts.rows[j] < last_at_zero)) continue;
    for (int64_t i = 0; i < chunk.count; ++i) {
      const Box<T> anchor = load_box<T>(chunk.anchors + 4 * i);
      if (match_iou(anchor, box_area(anchor), gts.boxes[j], gts.areas[j]) != best || chunk.own[i] < 0) continue;
      chunk.indices[i] = options.this_gt ? gts.rows[j] : chunk.own[i];
    }
  }
}

template <class T>
class MaxIouMatching {
 public:
  MaxIouMatching(const MatchInputs& inputs, const MatchOptions<T>& options, int64_t* indices, T* ious)
      : inputs_(inputs),
        options_(options),
        indices_(indices),
        ious_(ious),
        gts_(inputs.gt_boxes.const_data_ptr<T>(), bool_data(inputs.gt_valid), inputs.images, inputs.gts,
             [](const Box<T>& gt) { return can_overlap(gt, box_area(gt)); }),
        regions_(inputs.ignore_boxes ? inputs.ignore_boxes->const_data_ptr<T>() : nullptr,
                 bool_data(inputs.ignore_valid), inputs.images, inputs.regions,
                 [](const Box<T>& region) { return can_cover(region); }),
        length_(chunk_length(inputs.gts, kChunk)),
        chunks_(ceil_div(inputs.anchor_count, length_)) {
    if (!options.allow_low_quality) return;
    own_.reset(new int32_t[inputs.images * inputs.anchor_count]);
    chunk_best_.reset(new T[inputs.images * chunks_ * inputs.gts]);
  }

  void run() {
    // A chunk has at least as many anchors as there are boxes, so that chunk_best_ is no larger than the anchors and
    // one chunk more.
    const int64_t grain = max_of<int64_t>(1, (1 << 14) / (length_ * max_of<int64_t>(1, inputs_.gts)));
    parallel_ranges(inputs_.images * chunks_, grain, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(inputs_.gts + 1);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / chunks_;
        match_chunk(chunk(item), gts_.of(image), gts_.first_valid(image), regions_.of(image), options_, scratch);
      }
    });
    if (!options_.allow_low_quality) return;
    parallel_ranges(inputs_.images, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> gt_best(new T[inputs_.gts]);
      for (int64_t image = begin; image < end; ++image) {
        if (gts_.first_valid(image) < 0) continue;
        find_gt_best(image, gt_best.get());
        options_.all_ties ? serve_ties(image, gt_best.get()) : serve_first(image, gt_best.get());
      }
    });
  }

 private:
  Chunk<T> chunk(int64_t item) {
    const int64_t image = item / chunks_, first = item % chunks_ * length_;
    const int64_t out = image * inputs_.anchor_count + first;
    return {inputs_.anchors.const_data_ptr<T>() + image * inputs_.anchor_stride + 4 * first,
            min_of(length_, inputs_.anchor_count - first),
            indices_ + out,
            ious_ + out,
            own_ ? own_.get() + out : nullptr,
            chunk_best_ ? chunk_best_.get() + item * inputs_.gts : nullptr};
  }

  void find_gt_best(int64_t image, T* gt_best) {
    const BoxList<T> gts = gts_.of(image);
    for (int64_t j = 0; j < gts.count; ++j) gt_best[j] = T(0);
    for (int64_t c = 0; c < chunks_; ++c) {
      const T* const of_chunk = chunk(image * chunks_ + c).gt_best;
      for (int64_t j = 0; j < gts.count; ++j) gt_best[j] = max_of(of_chunk[j], gt_best[j]);
    }
  }

  bool is_valid(int64_t image, int64_t row) const {
    const bool* const valid = bool_data(inputs_.gt_valid);
    return valid == nullptr || valid[image * inputs_.gts + row];
  }

  void serve_ties(int64_t image, const T* gt_best) {
    const BoxList<T> gts = gts_.of(image);
    int last_at_zero = -1;
    int64_t j = gts.count - 1;  // the last packed box up to the row
    for (int64_t row = inputs_.gts - 1; row >= 0 && last_at_zero < 0 && wants_low_quality(T(0), options_); --row) {
      const bool packed = j >= 0 && gts.rows[j] == row;
      const bool at_zero = packed ? gt_best[j] == T(0) : is_valid(image, row);
      if (at_zero) last_at_zero = static_cast<int>(row);
      j -= packed;
    }
    for (int64_t c = 0; c < chunks_; ++c) {
      match_ties(chunk(image * chunks_ + c), gts, gt_best, last_at_zero, options_);
    }
  }

  void serve_first(int64_t image, const T* gt_best) {
    const BoxList<T> gts = gts_.of(image);
    const Counted<int64_t> indices("match_max_iou", "indices of an image", indices_ + image * inputs_.anchor_count,
                                   inputs_.anchor_count);
    const int32_t* const own = own_.get() + image * inputs_.anchor_count;
    int64_t first_counted = 0;
    while (first_counted < inputs_.anchor_count && own[first_counted] < 0) ++first_counted;
    if (first_counted == inputs_.anchor_count) return;
    for (int64_t row = 0, j = 0; row < inputs_.gts; ++row) {
      const bool packed = j < gts.count && gts.rows[j] == row;
      const int64_t at = packed ? j++ : -1;
      const T best = packed ? gt_best[at] : T(0);
      if (!is_valid(image, row) || !wants_low_quality(best, options_)) continue;
      const int64_t anchor = best > T(0) ? first_with(image, gts.boxes[at], gts.areas[at], at, best) : first_counted;
      indices[anchor] = options_.this_gt ? row : own[anchor];
    }
  }

  // The first anchor that has the best IoU of a box. IoUs are computed again: should one come out otherwise, it is the
  // first of the highest in the chunk, so that the search ends in any case.
  int64_t first_with(int64_t image, const Box<T>& gt, T gt_area, int64_t packed, T best) {
    int64_t item = image * chunks_;
    while (item + 1 < (image + 1) * chunks_ && chunk(item).gt_best[packed] != best) ++item;
    const Chunk<T> found = chunk(item);
    int64_t first = 0;
    T highest = T(-1);
    for (int64_t i = 0; i < found.count && highest != best; ++i) {
      if (found.own[i] < 0) continue;
      const Box<T> anchor = load_box<T>(found.anchors + 4 * i);
      const T iou = match_iou(anchor, box_area(anchor), gt, gt_area);
      if (!(iou > highest)) continue;
      highest = iou;
      first = i;
    }
    return item % chunks_ * length_ + first;
  }

  const MatchInputs& inputs_;
  const MatchOptions<T> options_;
  int64_t* const indices_;
  T* const ious_;
  const PackedBoxes<T> gts_, regions_;
  const int64_t length_, chunks_;
  std::unique_ptr<int32_t[]> own_;
  std::unique_ptr<T[]> chunk_best_;
};

std::tuple<Tensor, Tensor> match_max_iou(const Tensor& anchors, const Tensor& gt_boxes,
                                         const std::optional<Tensor>& gt_valid, double high_threshold,
                                         double low_threshold, bool allow_low_quality_matches, bool this_gt,
                                         double low_quality_min_iou, bool low_quality_all_ties,
                                         const std::optional<Tensor>& ignore_boxes,
                                         const std::optional<Tensor>& ignore_valid, double ignore_threshold) {
  const char* const op = "match_max_iou";
  const MatchInputs inputs = check_match_inputs(op, anchors, gt_boxes, gt_valid, ignore_boxes, ignore_valid);
  const MatchNumbers numbers{high_threshold,
                             low_threshold,
                             low_quality_min_iou,
                             ignore_threshold,
                             allow_low_quality_matches && inputs.gts > 0,
                             this_gt,
                             low_quality_all_ties};
  const Tensor indices = allocate(op, {inputs.images, inputs.anchor_count}, ScalarType::Long, anchors);
  const Tensor ious = allocate(op, {inputs.images, inputs.anchor_count}, anchors.scalar_type(), anchors);
  if (indices.numel() == 0) return {indices, ious};
  if (on_gpu(op, anchors)) {
    DETOPS_GPU_ONLY(match_max_iou_cuda(inputs, numbers, indices, ious));
  } else {
    dispatch_compute_type(anchors.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      MaxIouMatching<T>(inputs, numbers.rounded<T>(), indices.mutable_data_ptr<int64_t>(), ious.mutable_data_ptr<T>())
          .run();
    });
  }
  return {indices, ious};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&match_max_iou>(
      "match_max_iou(Tensor anchors, Tensor gt_boxes, Tensor? gt_valid, float high_threshold, float low_threshold, "
      "bool allow_low_quality_matches, bool this_gt, float low_quality_min_iou, bool low_quality_all_ties, "
      "Tensor? ignore_boxes, Tensor? ignore_valid, float ignore_threshold) -> (Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
