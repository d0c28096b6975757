// assign_task_aligned: schema, checks, and the CPU kernel.
#include "yolo/task_aligned.h"
#include "common/register.h"

#include <algorithm>
#include <vector>

#include "yolo/points_cpu.h"
#include "yolo/targets_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 16;  // pairs that are looked at together

template <class T>
DETOPS_CLONES void fill_angles(const T* boxes, int64_t begin, int64_t end, T* angles) {
  for (int64_t i = begin; i < end; ++i) {
    angles[i] = iou_box<IouKind::kComplete>(load_box<T>(boxes + 4 * i)).angle;
  }
}

// Overlaps of a gt with the predicted boxes of kLanes anchors.
template <bool complete, class T>
DETOPS_CLONES void overlaps_of_anchors(const IouBox<T>& gt, const T* boxes, const T* angles, const int32_t* anchors,
                                       T* __restrict__ overlaps) {
  for (int lane = 0; lane < kLanes; ++lane) {
    overlaps[lane] = overlap_of<complete>(gt, predicted_box<complete>(boxes, angles, anchors[lane]));
  }
}

template <class T>
DETOPS_CLONES void raise_lanes(const Power& power, T* values) {
  if (power.kind == Power::kRoot) {
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = std::sqrt(values[lane]);
  } else if (power.kind == Power::kGeneral) {
    for (int lane = 0; lane < kLanes; ++lane) {
      values[lane] = static_cast<T>(math::pow(static_cast<double>(values[lane]), power.exponent));
    }
  } else {
    double square[kLanes], value[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      square[lane] = static_cast<double>(values[lane]);
      value[lane] = 1.0;
    }
    for (unsigned rest = power.whole; rest != 0; rest >>= 1) {
      if (rest & 1) {
        for (int lane = 0; lane < kLanes; ++lane) value[lane] *= square[lane];
      }
      for (int lane = 0; lane < kLanes; ++lane) square[lane] *= square[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = static_cast<T>(value[lane]);
  }
}

// The gts of one image, coordinate by coordinate; rows that take no part hold nothing.
template <class T>
struct GtColumns {
  std::vector<T> columns;
  int64_t padded;

  explicit GtColumns(int64_t count)
      : columns(10 * ceil_div<int64_t>(count, kLanes) * kLanes), padded(ceil_div<int64_t>(count, kLanes) * kLanes) {}

  T* column(int k) { return columns.data() + k * padded; }
  void set(int64_t row, const IouBox<T>& gt, const Box<T>& region) {
    const T values[10] = {region.x1, region.y1, region.x2, region.y2, gt.box.x1,
                          gt.box.y1, gt.box.x2, gt.box.y2, gt.area,   gt.angle};
    for (int k = 0; k < 10; ++k) columns[k * padded + row] = values[k];
  }
};

// The gt of highest overlap among those whose region holds the point, ties to the lower index; -1 if none does.
template <bool complete, class T>
DETOPS_CLONES int32_t best_gt(const T* columns, int64_t padded, T x, T y, T margin, const IouBox<T>& predicted) {
  const auto at = [&](int k, int64_t row) __attribute__((always_inline)) { return columns[k * padded + row]; };
  int32_t best = kNobody;
  T best_overlap = T(0);
  bool inside[kLanes];
  T overlaps[kLanes];
  for (int64_t first = 0; first < padded; first += kLanes) {
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = first + lane;
      inside[lane] = is_inside(Box<T>{at(0, row), at(1, row), at(2, row), at(3, row)}, x, y, margin);
      any |= inside[lane];
    }
    if (!any) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = first + lane;
      const IouBox<T> gt{{at(4, row), at(5, row), at(6, row), at(7, row)}, at(8, row), at(9, row)};
      overlaps[lane] = overlap_of<complete>(gt, predicted);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!inside[lane] || !(best == kNobody || overlaps[lane] > best_overlap)) continue;
      best = static_cast<int32_t>(first + lane);
      best_overlap = overlaps[lane];
    }
  }
  return best;
}

// The bounds of the predicted boxes of each kPointBlock anchors, image by image.
template <class T>
std::vector<Box<T>> bounds_of_boxes(const T* boxes, int64_t images, int64_t anchors) {
  const int64_t blocks = ceil_div<int64_t>(anchors, kPointBlock);
  std::vector<Box<T>> bounds(images * blocks, no_bounds<T>());
  parallel_ranges(images * blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / blocks * anchors, from = i % blocks * kPointBlock;
      for (int64_t anchor = from; anchor < min_of(from + kPointBlock, anchors); ++anchor) {
        const Box<T> box = load_box<T>(boxes + 4 * (first + anchor));
        extend(bounds[i], box.x1, box.y1);
        extend(bounds[i], box.x2, box.y2);
      }
    }
  });
  return bounds;
}

// Writes the anchors of an image whose predicted box may overlap `box` to `found`, ascending, and returns how many they
// are. `found` has room for one more than there are anchors: each anchor is written, and passed over if it may not.
template <class T>
DETOPS_CLONES int64_t find_overlapping(const T* boxes, const Box<T>* bounds, int64_t anchors, const Box<T>& box,
                                       Counted<int32_t> found) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < anchors; begin += kPointBlock) {
    if (!may_overlap(box, bounds[begin / kPointBlock])) continue;
    for (int64_t anchor = begin; anchor < min_of(begin + kPointBlock, anchors); ++anchor) {
      found[count] = static_cast<int32_t>(anchor);
      count += may_overlap(box, load_box<T>(boxes + 4 * anchor));
    }
  }
  return count;
}

// An anchor with an owner.
template <class T>
struct Positive {
  int32_t gt, anchor;
  T metric, overlap;
};

template <bool complete, class S, class T>
class TaskAlignedCpu {
 public:
  TaskAlignedCpu(const TaskAlignedView<T>& view, const TaskAlignedOptions& options)
      : view_(view),
        options_(options),
        topk_(min_of(options.topk, view.anchors)),
        topk2_(min_of(options.topk2, view.anchors)),
        margin_(static_cast<T>(options.margin())),
        index_(view.points, view.anchors) {
    if (options.all()) box_bounds_ = bounds_of_boxes(view.boxes, view.images, view.anchors);
  }

  Assignment<T> assign() {
    const int64_t rows = view_.images * view_.gts.count;
    claims_.reset(new int32_t[rows * topk_]);
    parallel_items(rows, [&](const auto& next) {
      TopList<T> best(topk_);
      // All anchors, and then up to whole lanes: more than the one that the search needs.
      const int64_t room = view_.anchors + kLanes;
      const std::unique_ptr<int32_t[]> memory(new int32_t[room]);
      const Counted<int32_t> found("assign_task_aligned", "found anchors", memory.get(), room);
      for (int64_t row = next(); row >= 0; row = next()) claim(row, best, found);
    });
    Assignment<T> result{std::unique_ptr<int32_t[]>(new int32_t[view_.images * view_.anchors]),
                         std::unique_ptr<T[]>(new T[view_.images * view_.anchors])};
    parallel_items(view_.images, [&](const auto& next) {
      for (int64_t image = next(); image >= 0; image = next()) {
        resolve(image, result.owner.get() + image * view_.anchors, result.score.get() + image * view_.anchors);
      }
    });
    return result;
  }

 private:
  IouBox<T> gt_box(int64_t row) const {
    constexpr IouKind kind = complete ? IouKind::kComplete : IouKind::kIou;
    return iou_box<kind>(load_box<T>(view_.gts.boxes + 4 * row));
  }

  Box<T> region(int64_t row) const {
    return candidate_region(load_box<T>(view_.gts.boxes + 4 * row), static_cast<T>(options_.min_size));
  }

  IouBox<T> predicted(int64_t image, int64_t anchor) const {
    return predicted_box<complete>(view_.boxes, view_.angles, image * view_.anchors + anchor);
  }

  bool is_candidate(const Box<T>& where, int64_t anchor) const {
    return is_inside(where, view_.points[2 * anchor], view_.points[2 * anchor + 1], margin_);
  }

  int64_t find(int64_t image, const Box<T>& gt, const Box<T>& where, const Counted<int32_t>& found) const {
    if (!options_.all()) return find_inside(index_.columns(), where, margin_, found);
    const int64_t blocks = ceil_div<int64_t>(view_.anchors, kPointBlock);
    return find_overlapping(view_.boxes + 4 * image * view_.anchors, box_bounds_.data() + image * blocks, view_.anchors,
                            gt, found);
  }

  // The claims of a gt: topk places, of which the best positive ones and the first zeros take one each, not more.
  Counted<int32_t> claims_of(int64_t row) const {
    return {"assign_task_aligned", "claims of a gt", claims_.get() + row * topk_, topk_};
  }

  // Writes the anchors that a gt claims to its topk places, the rest being kNobody.
  void claim(int64_t row, TopList<T>& best, const Counted<int32_t>& found) const {
    const Counted<int32_t> claims = claims_of(row);
    std::fill(claims.data(), claims.data() + topk_, kNobody);
    if (!view_.gts.usable(row)) return;
    const int64_t image = row / view_.gts.count;
    const int64_t label = view_.gts.labels[row];
    const Box<T> where = region(row);
    const IouBox<T> gt = gt_box(row);
    const T* const boxes = view_.boxes + 4 * image * view_.anchors;
    const T* const angles = complete ? view_.angles + image * view_.anchors : nullptr;
    const int64_t count = find(image, gt.box, where, found);
    for (int64_t i = count; i < ceil_div<int64_t>(count, kLanes) * kLanes; ++i) found[i] = found[count - 1];
    best.clear();
    T overlaps[kLanes], metrics[kLanes];
    for (int64_t first = 0; first < count; first += kLanes) {
      const int32_t* const anchors = found.part(first, kLanes).data();
      const auto used = static_cast<int>(min_of<int64_t>(kLanes, count - first));
      overlaps_of_anchors<complete>(gt, boxes, angles, anchors, overlaps);
      bool any = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool overlapping = lane < used && overlaps[lane] > T(0);  // else the metric is 0 whatever the score
        metrics[lane] = overlapping ? view_.template score<S>(image, anchors[lane], label) : T(0);
        any |= overlapping;
      }
      if (!any) continue;
      raise_lanes(options_.alpha, metrics);
      raise_lanes(options_.beta, overlaps);
      for (int lane = 0; lane < kLanes; ++lane) metrics[lane] *= overlaps[lane];
      for (int lane = 0; lane < used; ++lane) {
        if (metrics[lane] > T(0)) best.offer({metrics[lane], anchors[lane]});
      }
    }
    const int64_t positives = best.count();
    if (options_.all()) {
      int64_t filled = 0;
      for (int64_t i = 0; i < positives; ++i) {
        if (is_candidate(where, best[i].anchor)) claims[filled++] = best[i].anchor;
      }
      return;
    }
    for (int64_t i = 0; i < positives; ++i) claims[i] = best[i].anchor;
    if (positives == topk_) return;
    // The other places go to the first anchors of metric 0.
    std::sort(claims.data(), claims.data() + positives);
    int64_t places = topk_ - positives, filled = positives, passed = 0;
    for (int64_t anchor = 0; places > 0 && anchor < view_.anchors; ++anchor) {
      if (passed < positives && claims[passed] == anchor) {
        ++passed;
        continue;
      }
      --places;
      if (is_candidate(where, anchor)) claims[filled++] = static_cast<int32_t>(anchor);
    }
  }

  // From claims to owners and scores, for one image.
  void resolve(int64_t image, int32_t* owner, T* score) const {
    const int64_t gts = view_.gts.count;
    std::fill(owner, owner + view_.anchors, kNobody);
    int64_t contested = 0;
    for (int64_t gt = 0; gt < gts; ++gt) {
      const Counted<int32_t> claims = claims_of(image * gts + gt);
      for (int64_t i = 0; i < topk_ && claims[i] != kNobody; ++i) {
        int32_t& claimed = owner[claims[i]];
        if (claimed == kNobody) {
          claimed = static_cast<int32_t>(gt);
        } else if (options_.all()) {
          const IouBox<T> box = predicted(image, claims[i]);
          const T before = overlap_of<complete>(gt_box(image * gts + claimed), box);
          if (overlap_of<complete>(gt_box(image * gts + gt), box) > before) claimed = static_cast<int32_t>(gt);
        } else {
          contested += claimed >= 0;
          claimed = kContested;
        }
      }
    }
    if (contested > 0) settle(image, owner);

    std::vector<Positive<T>> positives;
    for (int64_t anchor = 0; anchor < view_.anchors; ++anchor) {
      if (owner[anchor] != kNobody) positives.push_back({owner[anchor], static_cast<int32_t>(anchor), T(0), T(0)});
    }
    parallel_ranges(static_cast<int64_t>(positives.size()), 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) measure(image, positives[i]);
    });
    if (topk2_ < topk_) limit(positives, owner);
    std::vector<T> best_overlap(gts), best_metric(gts);
    for (const Positive<T>& each : positives) {
      best_overlap[each.gt] = max_of(each.overlap, best_overlap[each.gt]);
      best_metric[each.gt] = max_of(each.metric, best_metric[each.gt]);
    }
    for (const Positive<T>& each : positives) {
      score[each.anchor] = target_score(each.metric, best_overlap[each.gt], best_metric[each.gt], T(options_.eps));
    }
  }

  // Gives each contested anchor to the best of all gts that hold it.
  void settle(int64_t image, int32_t* owner) const {
    const int64_t gts = view_.gts.count;
    GtColumns<T> columns(gts);
    const Box<T> nothing = no_bounds<T>();
    for (int64_t gt = 0; gt < columns.padded; ++gt) {
      const int64_t row = image * gts + gt;
      if (gt < gts && view_.gts.usable(row)) {
        columns.set(gt, gt_box(row), region(row));
      } else {
        columns.set(gt, {nothing, T(0), T(0)}, nothing);
      }
    }
    parallel_ranges(view_.anchors, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t anchor = begin; anchor < end; ++anchor) {
        if (owner[anchor] != kContested) continue;
        owner[anchor] = best_gt<complete>(columns.column(0), columns.padded, view_.points[2 * anchor],
                                          view_.points[2 * anchor + 1], margin_, predicted(image, anchor));
      }
    });
  }

  void measure(int64_t image, Positive<T>& positive) const {
    const int64_t row = image * view_.gts.count + positive.gt;
    positive.overlap = overlap_of<complete>(gt_box(row), predicted(image, positive.anchor));
    const T score = view_.template score<S>(image, positive.anchor, view_.gts.labels[row]);
    positive.metric = metric_of(score, positive.overlap, options_.alpha, options_.beta);
  }

  // Keeps the topk2 anchors of each gt.
  void limit(std::vector<Positive<T>>& positives, int32_t* owner) const {
    std::sort(positives.begin(), positives.end(), [](const Positive<T>& a, const Positive<T>& b) {
      return a.gt != b.gt ? a.gt < b.gt : ranks_before<T>({a.metric, a.anchor}, {b.metric, b.anchor});
    });
    std::vector<Positive<T>> kept;
    for (size_t begin = 0, end; begin < positives.size(); begin = end) {
      for (end = begin; end < positives.size() && positives[end].gt == positives[begin].gt;) ++end;
      size_t nonzero = begin;
      while (nonzero < end && positives[nonzero].metric > T(0)) ++nonzero;
      for (size_t i = begin; i < end; ++i) {
        auto rank = static_cast<int64_t>(i - begin);
        if (i >= nonzero) {  // after the others, and after the anchors of metric 0 and lower index
          const auto before = std::count_if(positives.begin() + begin, positives.begin() + nonzero,
                                            [&](const auto& other) { return other.anchor < positives[i].anchor; });
          rank = static_cast<int64_t>(nonzero - begin) + positives[i].anchor - before;
        }
        if (rank < topk2_) {
          kept.push_back(positives[i]);
        } else {
          owner[positives[i].anchor] = kNobody;
        }
      }
    }
    positives = std::move(kept);
  }

  const TaskAlignedView<T> view_;
  const TaskAlignedOptions options_;
  const int64_t topk_, topk2_;
  const T margin_;
  const PointIndex<T> index_;
  std::vector<Box<T>> box_bounds_;  // for Candidates::kAll
  std::unique_ptr<int32_t[]> claims_;
};

template <class T>
void assign_task_aligned_cpu(const TaskAlignedInputs& inputs, const TaskAlignedOptions& options,
                             const TargetTensors& out) {
  TaskAlignedView<T> view = inputs.view<T>(nullptr);
  check_labels("assign_task_aligned", view.gts, view.images);
  std::unique_ptr<T[]> angles;
  if (options.complete && view.gts.count > 0) {
    angles.reset(new T[view.images * view.anchors]);
    parallel_ranges(view.images * view.anchors, 4096,
                    [&](int64_t begin, int64_t end) { fill_angles(view.boxes, begin, end, angles.get()); });
    view.angles = angles.get();
  }
  dispatch_floating(inputs.scores.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const auto assignment = options.complete ? TaskAlignedCpu<true, S, T>(view, options).assign()
                                             : TaskAlignedCpu<false, S, T>(view, options).assign();
    write_targets(assignment, view.gts, view.anchors, inputs.gt_boxes_out, out);
  });
}

TaskAlignedInputs checked_inputs(const char* op, const Tensor& pred_scores, const Tensor& pred_boxes,
                                 const Tensor& anchor_points, const Tensor& gt_labels, const Tensor& gt_boxes,
                                 const Tensor& gt_valid) {
  check_shape(op, "pred_scores", pred_scores, "[B, A, C]", {-1, -1, -1});
  const int64_t images = pred_scores.size(0), anchors = pred_scores.size(1);
  check_floating(op, "pred_scores", pred_scores);
  check_prediction(op, "pred_boxes", pred_boxes, {images, anchors, 4}, "pred_scores", pred_scores);
  check_prediction(op, "anchor_points", anchor_points, {anchors, 2}, "pred_scores", pred_scores);
  check_ground_truth(op, gt_boxes, gt_labels, gt_valid, "pred_scores", pred_scores);
  check_row_count(op, "pred_boxes", images * anchors);
  const ScalarType dtype = compute_dtype({&pred_scores, &pred_boxes, &anchor_points, &gt_boxes});
  return {pred_scores,
          as_dense(pred_boxes, dtype),
          as_dense(anchor_points, dtype),
          as_contiguous(gt_labels),
          as_dense(gt_boxes, dtype),
          as_contiguous(gt_valid),
          as_contiguous(gt_boxes)};
}

// What PyTorch's arithmetic makes of two floating dtypes.
ScalarType promoted_dtype(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_task_aligned(
    const Tensor& pred_scores, const Tensor& pred_boxes, const Tensor& anchor_points, const Tensor& gt_labels,
    const Tensor& gt_boxes, const Tensor& gt_valid, int64_t topk, int64_t topk2, double alpha, double beta,
    bool complete, double min_size, double eps, bool dense_scores, int64_t candidates, bool promote_scores) {
  const char* const op = "assign_task_aligned";
  const TaskAlignedInputs inputs =
      checked_inputs(op, pred_scores, pred_boxes, anchor_points, gt_labels, gt_boxes, gt_valid);
  for (const int64_t count : {topk, topk2}) {
    if (count < 1)
      fail(op, std::string(count == topk ? "topk" : "topk2") + " must be at least 1, got " + std::to_string(count));
  }
  if (candidates != int64_t(Candidates::kInside) && candidates != int64_t(Candidates::kAll)) {
    fail(op, "candidates must be 0 (inside) or 1 (all), got " + std::to_string(candidates));
  }
  const TaskAlignedOptions options{topk,         min_of(topk, topk2),
                                   Power(alpha), Power(beta),
                                   complete,     min_size,
                                   eps,          static_cast<Candidates>(candidates)};
  const ScalarType scores_dtype =
      promote_scores ? promoted_dtype(pred_scores.scalar_type(), pred_boxes.scalar_type()) : pred_scores.scalar_type();
  const TargetTensors out = allocate_targets(op, "pred_scores", pred_scores, gt_boxes, dense_scores, scores_dtype);
  if (out.labels.numel() > 0) {
    if (on_gpu(op, pred_scores)) {
      DETOPS_GPU_ONLY(assign_task_aligned_cuda(inputs, options, out));
    } else if (inputs.dtype() == ScalarType::Double) {
      assign_task_aligned_cpu<double>(inputs, options, out);
    } else {
      assign_task_aligned_cpu<float>(inputs, options, out);
    }
  }
  return out.tuple();
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_task_aligned>(
      "assign_task_aligned(Tensor pred_scores, Tensor pred_boxes, Tensor anchor_points, Tensor gt_labels, "
      "Tensor gt_boxes, Tensor gt_valid, int topk, int topk2, float alpha, float beta, bool complete, float min_size, "
      "float eps, bool dense_scores, int candidates=0, bool promote_scores=False) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}

}  // namespace DETOPS_NAMESPACE
