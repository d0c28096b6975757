// assign_atss: schema, checks, and the CPU kernel.
#include "matching/assign_atss.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kBlock = 64;  // anchors whose centres are bounded together

// Centres of the anchors of one image, and boxes around those of each block. No block spans two levels.
template <class T>
struct Centres {
  std::vector<T> x, y;
  std::vector<Box<T>> around;

  Centres(const T* anchors, const AtssLevels& levels) {
    int64_t anchor = 0;
    for (int level = 0; level < levels.count; ++level) {
      for (int i = 0; i < levels.sizes[level]; ++i, ++anchor) {
        const Point<T> centre = centre_of(load_box<T>(anchors + 4 * anchor));
        x.push_back(centre.x);
        y.push_back(centre.y);
        if (i % kBlock == 0) around.push_back(empty_box<T>());
        if (!(centre.x == centre.x && centre.y == centre.y)) continue;
        around.back() = box_around(around.back(), Box<T>{centre.x, centre.y, centre.x, centre.y});
      }
    }
  }
};

// At most the squared distance of any centre in the box, in rounded arithmetic too. NaN if it is not known.
template <class T>
DETOPS_HD T least_distance(const Point<T>& point, const Box<T>& around) {
  const T x = max_of(max_of(around.x1 - point.x, point.x - around.x2), T(0));
  const T y = max_of(max_of(around.y1 - point.y, point.y - around.y2), T(0));
  return x * x + y * y;
}

template <class T>
DETOPS_CLONES void distances_of_block(const T* x, const T* y, int count, const Point<T>& point, T* distances) {
  for (int i = 0; i < count; ++i) distances[i] = squared_distance(Point<T>{x[i], y[i]}, point);
}

template <class T>
DETOPS_CLONES void least_distances(const Box<T>* around, int64_t count, const Point<T>& point, T* distances) {
  for (int64_t i = 0; i < count; ++i) distances[i] = least_distance(point, around[i]);
}

// The nearest candidates of a point among the anchors of a level, nearest first. There are `wanted` <= `count`: every
// anchor is nearer than a free place, NaN ones by their index, and while a place is free no block is passed over.
template <class T>
class NearestSearch {
 public:
  explicit NearestSearch(const Centres<T>& centres) : centres_(centres), bounds_(centres.around.size()) {}

  void run(const Point<T>& point, int64_t first, int64_t first_block, int count, int wanted, int* anchors) {
    if (wanted == 0) return;
    const int64_t blocks = ceil_div(count, kBlock);
    least_distances(centres_.around.data() + first_block, blocks, point, bounds_.data());
    const int64_t nearest = std::min_element(bounds_.begin(), bounds_.begin() + blocks) - bounds_.begin();
    found_.assign(wanted, {kInfinityOf<T>, INT32_MAX});
    look(point, first, nearest, count);
    for (int64_t block = 0; block < blocks; ++block) {
      if (block != nearest && !(bounds_[block] > found_.back().distance)) look(point, first, block, count);
    }
    for (int i = 0; i < wanted; ++i) anchors[i] = found_[i].anchor;
  }

 private:
  void look(const Point<T>& point, int64_t first, int64_t block, int count) {
    const int begin = static_cast<int>(block) * kBlock, used = std::min(kBlock, count - begin);
    T distances[kBlock];
    distances_of_block(centres_.x.data() + first + begin, centres_.y.data() + first + begin, used, point, distances);
    for (int i = 0; i < used; ++i) {
      const Candidate<T> candidate{distances[i], static_cast<int>(first) + begin + i};
      if (!is_nearer(candidate, found_.back())) continue;
      size_t place = found_.size() - 1;
      for (; place > 0 && is_nearer(candidate, found_[place - 1]); --place) found_[place] = found_[place - 1];
      found_[place] = candidate;
    }
  }

  const Centres<T>& centres_;
  std::vector<T> bounds_;
  std::vector<Candidate<T>> found_;
};

// The candidates of a box, -1 for those that are no positives, and their IoUs.
template <class T>
void find_positives(NearestSearch<T>& search, const Counted<const T>& anchors, const Box<T>& gt,
                    const AtssLevels& levels, int* candidates, T* ious) {
  int64_t first = 0, first_block = 0;
  int* of_level = candidates;
  for (int level = 0; level < levels.count; ++level) {
    search.run(centre_of(gt), first, first_block, levels.sizes[level], levels.candidates[level], of_level);
    of_level += levels.candidates[level];
    first += levels.sizes[level];
    first_block += ceil_div(levels.sizes[level], kBlock);
  }
  for (int i = 0; i < levels.all_candidates; ++i) {
    const Box<T> anchor = load_box<T>(anchors.part(4 * int64_t(candidates[i]), 4).data());
    ious[i] = match_iou(anchor, box_area(anchor), gt, box_area(gt));
  }
  const T threshold = atss_threshold(ious, levels.all_candidates);
  for (int i = 0; i < levels.all_candidates; ++i) {
    const Point<T> centre = centre_of(load_box<T>(anchors.part(4 * int64_t(candidates[i]), 4).data()));
    if (!is_atss_positive(ious[i], threshold, centre, gt)) candidates[i] = -1;
  }
}

template <class T>
void assign_atss_cpu(const MatchInputs& inputs, const AtssLevels& levels, int64_t* indices, T* ious) {
  const T* const anchors = inputs.anchors.const_data_ptr<T>();
  const T* const gt_boxes = inputs.gt_boxes.const_data_ptr<T>();
  const bool* const valid = bool_data(inputs.gt_valid);
  const int64_t boxes = inputs.images * inputs.gts;
  std::vector<Centres<T>> centres;
  for (int64_t image = 0; image < (inputs.anchor_stride == 0 ? 1 : inputs.images); ++image) {
    centres.emplace_back(anchors + image * inputs.anchor_stride, levels);
  }
  const std::unique_ptr<int[]> candidates(new int[boxes * levels.all_candidates]);
  const std::unique_ptr<T[]> candidate_ious(new T[boxes * levels.all_candidates]);
  parallel_ranges(boxes, 4, [&](int64_t begin, int64_t end) {
    for (int64_t box = begin; box < end; ++box) {
      if (valid != nullptr && !valid[box]) continue;
      const int64_t image = box / inputs.gts;
      NearestSearch<T> search(centres[inputs.anchor_stride == 0 ? 0 : image]);
      const Counted<const T> of_image("assign_atss", "anchors of an image", anchors + image * inputs.anchor_stride,
                                      4 * inputs.anchor_count);
      find_positives(search, of_image, load_box<T>(gt_boxes + 4 * box), levels,
                     candidates.get() + box * levels.all_candidates,
                     candidate_ious.get() + box * levels.all_candidates);
    }
  });
  parallel_ranges(inputs.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t count = inputs.anchor_count;
      const Counted<int64_t> own_indices("assign_atss", "indices of an image", indices + image * count, count);
      const Counted<T> own_ious("assign_atss", "ious of an image", ious + image * count, count);
      std::fill_n(own_indices.data(), count, int64_t(-1));
      std::fill_n(own_ious.data(), count, T(0));
      for (int64_t gt = 0; gt < inputs.gts; ++gt) {
        const int64_t box = image * inputs.gts + gt;
        if (valid != nullptr && !valid[box]) continue;
        for (int64_t i = box * levels.all_candidates; i < (box + 1) * levels.all_candidates; ++i) {
          const int anchor = candidates[i];
          if (anchor < 0 || (own_indices[anchor] >= 0 && !(candidate_ious[i] > own_ious[anchor]))) continue;
          own_indices[anchor] = gt;
          own_ious[anchor] = candidate_ious[i];
        }
      }
    }
  });
}

AtssLevels check_levels(const char* op, torch::headeronly::HeaderOnlyArrayRef<int64_t> level_sizes, int64_t topk,
                        int64_t anchors) {
  AtssLevels levels{};
  if (level_sizes.size() > kMostLevels) {
    fail(op, "level_sizes must name at most " + std::to_string(kMostLevels) + " levels, got " +
                 std::to_string(level_sizes.size()));
  }
  if (topk < 1) fail(op, "topk must be at least 1, got " + std::to_string(topk));
  int64_t sum = 0;
  for (int64_t size : level_sizes) {
    sum = size > INT64_MAX - sum ? INT64_MAX : sum + size;
    if (size < 0 || sum > anchors) break;
    levels.sizes[levels.count] = static_cast<int>(size);
    levels.candidates[levels.count] = static_cast<int>(min_of(size, topk));
    levels.all_candidates += levels.candidates[levels.count++];
  }
  if (sum != anchors || levels.count != static_cast<int>(level_sizes.size())) {
    fail(op, "level_sizes must be at least 0 and add up to the number of anchors (" + std::to_string(anchors) +
                 "), got a sum of " + std::to_string(sum));
  }
  return levels;
}

std::tuple<Tensor, Tensor> assign_atss(const Tensor& anchors, std::vector<int64_t> level_sizes, const Tensor& gt_boxes,
                                       const std::optional<Tensor>& gt_valid, int64_t topk) {
  const char* const op = "assign_atss";
  const MatchInputs inputs = check_match_inputs(op, anchors, gt_boxes, gt_valid, std::nullopt, std::nullopt);
  const AtssLevels levels = check_levels(op, level_sizes, topk, inputs.anchor_count);
  const Tensor indices = allocate(op, {inputs.images, inputs.anchor_count}, ScalarType::Long, anchors);
  const Tensor ious = allocate(op, {inputs.images, inputs.anchor_count}, anchors.scalar_type(), anchors);
  if (indices.numel() == 0) return {indices, ious};
  if (on_gpu(op, anchors)) {
    DETOPS_GPU_ONLY(assign_atss_cuda(inputs, levels, indices, ious));
  } else {
    dispatch_compute_type(anchors.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      assign_atss_cpu<T>(inputs, levels, indices.mutable_data_ptr<int64_t>(), ious.mutable_data_ptr<T>());
    });
  }
  return {indices, ious};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_atss>(
      "assign_atss(Tensor anchors, SymInt[] level_sizes, Tensor gt_boxes, Tensor? gt_valid, int topk) -> "
      "(Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
