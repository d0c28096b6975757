// assign_simota: schema, checks, and the CPU kernel.
#include "yolo/simota.h"
#include "common/register.h"

#include <algorithm>
#include <vector>

#include "yolo/points_cpu.h"
#include "yolo/targets_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 16;

// S of an anchor. `groups` is scratch for one value per group of classes; they are added in order.
template <bool mmdet, class S>
DETOPS_CLONES double all_absent(const S* logits, int64_t step, int64_t classes, double object, double* groups) {
  const int64_t whole = classes / kClassGroup, count = ceil_div<int64_t>(classes, kClassGroup);
  if (step == 1) {
    for (int64_t group = 0; group < whole; ++group) {
      double product = 1.0;
      for (int k = 0; k < kClassGroup; ++k) {
        product *= absence<mmdet>(static_cast<double>(logits[group * kClassGroup + k]), object);
      }
      groups[group] = -math::log(product);
    }
  }
  for (int64_t group = step == 1 ? whole : 0; group < count; ++group) {
    double product = 1.0;
    for (int64_t c = group * kClassGroup; c < min_of((group + 1) * kClassGroup, classes); ++c) {
      product *= absence<mmdet>(static_cast<double>(logits[c * step]), object);
    }
    groups[group] = -math::log(product);
  }
  double sum = 0.0;
  for (int64_t group = 0; group < count; ++group) sum += groups[group];
  return sum;
}

// Candidates of an image, coordinate by coordinate, in whole lanes.
template <class T>
struct CandidateColumns {
  std::vector<int32_t> anchors;
  std::vector<T> columns;  // x1, y1, x2, y2, area
  int64_t count = 0, padded = 0;

  void set(const SimotaView<T>& view, int64_t image, std::vector<int32_t> list) {
    anchors = std::move(list);
    count = static_cast<int64_t>(anchors.size());
    padded = ceil_div<int64_t>(count, kLanes) * kLanes;
    columns.assign(5 * padded, T(0));
    for (int64_t i = 0; i < count; ++i) {
      const IouBox<T> box = view.predicted(image, anchors[i]);
      const T values[5] = {box.box.x1, box.box.y1, box.box.x2, box.box.y2, box.area};
      for (int k = 0; k < 5; ++k) columns[k * padded + i] = values[k];
    }
  }
};

template <class T>
DETOPS_CLONES bool lanes_above(const IouBox<T>& gt, const T* columns, int64_t padded, int64_t first, T least,
                               T* __restrict__ ious) {
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    const T* const at = columns + first + lane;
    const IouBox<T> box{{at[0], at[padded], at[2 * padded], at[3 * padded]}, at[4 * padded], T(0)};
    ious[lane] = positive_iou(gt, box);
    any |= ious[lane] > least;
  }
  return any;
}

template <class S, class T>
class SimotaCpu {
 public:
  SimotaCpu(const SimotaView<T>& view, const SimotaOptions& options)
      : view_(view),
        options_(options),
        radius_(static_cast<T>(options.center_radius)),
        costs_(options),
        index_(view.points, view.anchors) {
    const int64_t blocks = index_.columns().blocks;
    strides_.assign(blocks * kPointBlock, T(0));
    std::copy(view.strides, view.strides + view.anchors, strides_.begin());
    reach_.assign(blocks, T(0));
    for (int64_t i = 0; i < view.anchors; ++i) {
      reach_[i / kPointBlock] = max_of(view.strides[i], reach_[i / kPointBlock]);
    }
  }

  Assignment<T> assign() {
    candidates_.resize(view_.images);
    parallel_items(view_.images, [&](const auto& next) {
      for (int64_t image = next(); image >= 0; image = next()) collect(image);
    });
    add_absences();
    const int64_t rows = view_.images * view_.gts.count;
    claims_.assign(rows * options_.topk, kNobody);  // dynamic_k is topk at most
    parallel_items(rows, [&](const auto& next) {
      TopList<T> ious(options_.topk), cheapest(options_.topk);
      std::vector<int32_t> memory(view_.anchors + 1);
      for (int64_t row = next(); row >= 0; row = next()) {
        if (view_.gts.usable(row)) claim(row, ious, cheapest, found_anchors(memory));
      }
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
  // All anchors, and the one more that the search needs.
  static Counted<int32_t> found_anchors(std::vector<int32_t>& memory) {
    return {"assign_simota", "found anchors", memory.data(), static_cast<int64_t>(memory.size())};
  }

  int64_t near_anchors(const Box<T>& gt, const Counted<int32_t>& found) const {
    return find_near(index_.columns(), strides_.data(), reach_.data(), (gt.x1 + gt.x2) / 2, (gt.y1 + gt.y2) / 2,
                     radius_, found);
  }

  // Those of the anchors near a gt that are favoured; ascending.
  int64_t favoured_anchors(const Box<T>& gt, const Counted<int32_t>& found) const {
    const int64_t near = near_anchors(gt, found);
    if (!view_.mmdet) return near;
    int64_t count = 0;
    for (int64_t i = 0; i < near; ++i) {
      if (view_.is_within(gt, found[i])) found[count++] = found[i];
    }
    return count;
  }

  // The candidates of an image.
  void collect(int64_t image) {
    std::vector<bool> marked(view_.anchors);
    std::vector<int32_t> memory(view_.anchors + 1), list;
    const Counted<int32_t> found = found_anchors(memory);
    for (int64_t row = image * view_.gts.count; row < (image + 1) * view_.gts.count; ++row) {
      if (!view_.gts.usable(row)) continue;
      const Box<T> gt = view_.gt_box(row).box;
      const int64_t count = near_anchors(gt, found);
      for (int64_t i = 0; i < count; ++i) marked[found[i]] = true;
      if (!view_.mmdet) continue;
      const int64_t within = find_inside(index_.columns(), gt, T(0), found);
      for (int64_t i = 0; i < within; ++i) marked[found[i]] = true;
    }
    for (int64_t anchor = 0; anchor < view_.anchors; ++anchor) {
      if (marked[anchor]) list.push_back(static_cast<int32_t>(anchor));
    }
    candidates_[image].set(view_, image, std::move(list));
  }

  // S of all candidates.
  void add_absences() {
    absent_.reset(new double[view_.images * view_.anchors]);
    const int64_t groups = ceil_div<int64_t>(view_.gts.classes, kClassGroup);
    for (int64_t image = 0; image < view_.images; ++image) {
      const CandidateColumns<T>& candidates = candidates_[image];
      parallel_ranges(candidates.count, 64, [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(groups);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t anchor = candidates.anchors[i];
          const S* const logits =
              static_cast<const S*>(view_.logits) + image * view_.logit_image + anchor * view_.logit_anchor;
          const double object = view_.template object<S>(image, anchor);
          absent_[image * view_.anchors + anchor] =
              view_.mmdet ? all_absent<true>(logits, view_.logit_class, view_.gts.classes, object, scratch.data())
                          : all_absent<false>(logits, view_.logit_class, view_.gts.classes, object, scratch.data());
        }
      });
    }
  }

  T metric(int64_t image, int64_t anchor, int64_t label, T iou, bool favoured) const {
    const double cost =
        class_cost(absent_[image * view_.anchors + anchor], view_.template logit<S>(image, anchor, label),
                   view_.template object<S>(image, anchor), view_.mmdet);
    return negative_cost(cost, iou, costs_, favoured);
  }

  void claim(int64_t row, TopList<T>& ious, TopList<T>& cheapest, const Counted<int32_t>& found) {
    const int64_t image = row / view_.gts.count, label = view_.gts.labels[row];
    const IouBox<T> gt = view_.gt_box(row);
    const CandidateColumns<T>& candidates = candidates_[image];
    T values[kLanes];
    ious.clear();
    for (int64_t first = 0; first < candidates.count; first += kLanes) {
      const T least = ious.count() == options_.topk ? ious[options_.topk - 1].metric : T(0);
      if (!lanes_above(gt, candidates.columns.data(), candidates.padded, first, least, values)) continue;
      for (int lane = 0; lane < kLanes && first + lane < candidates.count; ++lane) {
        if (values[lane] > T(0)) ious.offer({values[lane], static_cast<int32_t>(first + lane)});
      }
    }
    double sum = 0.0;
    for (int64_t i = 0; i < ious.count(); ++i) sum += static_cast<double>(ious[i].metric);
    const int k = dynamic_k(sum, options_.topk);

    cheapest.clear();
    const int64_t favoured = favoured_anchors(gt.box, found);
    for (int64_t i = 0; i < favoured; ++i) {
      const T iou = positive_iou(gt, view_.predicted(image, found[i]));
      cheapest.offer({metric(image, found[i], label, iou, true), found[i]});
    }
    if (cheapest.count() < k || !(cheapest[k - 1].metric > -costs_.surely_favoured)) {
      for (int64_t i = 0, passed = 0; i < candidates.count; ++i) {
        const int32_t anchor = candidates.anchors[i];
        if (passed < favoured && found[passed] == anchor) {
          ++passed;
          continue;
        }
        const T iou = positive_iou(gt, view_.predicted(image, anchor));
        cheapest.offer({metric(image, anchor, label, iou, false), anchor});
      }
    }
    for (int64_t i = 0; i < min_of<int64_t>(k, cheapest.count()); ++i) {
      claims_[row * options_.topk + i] = cheapest[i].anchor;
    }
  }

  void resolve(int64_t image, int32_t* owner, T* score) const {
    std::fill(owner, owner + view_.anchors, kNobody);
    const int64_t gts = view_.gts.count;
    for (int64_t gt = 0; gt < gts; ++gt) {
      const int32_t* const claims = claims_.data() + (image * gts + gt) * options_.topk;
      for (int64_t i = 0; i < options_.topk && claims[i] != kNobody; ++i) {
        int32_t& claimed = owner[claims[i]];
        claimed = claimed == kNobody ? static_cast<int32_t>(gt) : kContested;
      }
    }
    const CandidateColumns<T>& candidates = candidates_[image];
    parallel_ranges(candidates.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t anchor = candidates.anchors[i];
        if (owner[anchor] == kNobody) continue;
        if (owner[anchor] == kContested) owner[anchor] = cheapest_gt(image, anchor);
        score[anchor] = positive_iou(view_.gt_box(image * gts + owner[anchor]), view_.predicted(image, anchor));
      }
    });
  }

  // The gt of lowest cost for a contested anchor. Where a favoured one is cheap enough, the others need no look.
  int32_t cheapest_gt(int64_t image, int32_t anchor) const {
    const IouBox<T> predicted = view_.predicted(image, anchor);
    RankedAnchor<T> best{-std::numeric_limits<T>::infinity(), INT32_MAX};  // ranks gts in the place of anchors
    for (const bool favoured : {true, false}) {
      for (int64_t gt = 0; gt < view_.gts.count; ++gt) {
        const int64_t row = image * view_.gts.count + gt;
        if (!view_.gts.usable(row)) continue;
        const IouBox<T> box = view_.gt_box(row);
        if (view_.is_favoured(box.box, anchor, radius_) != favoured) continue;
        const RankedAnchor<T> item{metric(image, anchor, view_.gts.labels[row], positive_iou(box, predicted), favoured),
                                   static_cast<int32_t>(gt)};
        if (ranks_before(item, best)) best = item;
      }
      if (best.metric > -costs_.surely_favoured) break;
    }
    return best.anchor;
  }

  const SimotaView<T> view_;
  const SimotaOptions options_;
  const T radius_;
  const SimotaCosts<T> costs_;
  const PointIndex<T> index_;
  std::vector<T> strides_, reach_;
  std::vector<CandidateColumns<T>> candidates_;
  std::unique_ptr<double[]> absent_;
  std::vector<int32_t> claims_;
};

template <class T>
void assign_simota_cpu(const SimotaInputs& inputs, const SimotaOptions& options, const TargetTensors& out) {
  const SimotaView<T> view = inputs.view<T>(options);
  check_labels("assign_simota", view.gts, view.images);
  dispatch_floating(inputs.logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    write_targets(SimotaCpu<S, T>(view, options).assign(), view.gts, view.anchors, inputs.gt_boxes_out, out);
  });
}

SimotaInputs checked_inputs(const char* op, const Tensor& pred_logits, const Tensor& pred_objectness,
                            const Tensor& pred_boxes, const Tensor& anchor_points, const Tensor& anchor_strides,
                            const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& gt_valid) {
  check_shape(op, "pred_logits", pred_logits, "[B, A, C]", {-1, -1, -1});
  const int64_t images = pred_logits.size(0), anchors = pred_logits.size(1);
  check_prediction(op, "pred_objectness", pred_objectness, {images, anchors}, "pred_logits", pred_logits);
  check_prediction(op, "pred_boxes", pred_boxes, {images, anchors, 4}, "pred_logits", pred_logits);
  check_prediction(op, "anchor_points", anchor_points, {anchors, 2}, "pred_logits", pred_logits);
  check_prediction(op, "anchor_strides", anchor_strides, {anchors}, "pred_logits", pred_logits);
  check_floating(op, "pred_logits", pred_logits);
  if (pred_objectness.scalar_type() != pred_logits.scalar_type()) {
    fail(op, "pred_objectness must have the dtype of pred_logits (" + dtype_name(pred_logits.scalar_type()) +
                 "), got " + dtype_name(pred_objectness.scalar_type()));
  }
  check_ground_truth(op, gt_boxes, gt_labels, gt_valid, "pred_logits", pred_logits);
  check_row_count(op, "pred_boxes", images * anchors);
  const ScalarType dtype = compute_dtype({&pred_logits, &pred_boxes, &anchor_points, &anchor_strides, &gt_boxes});
  return {pred_logits,
          pred_objectness,
          as_dense(pred_boxes, dtype),
          as_dense(anchor_points, dtype),
          as_dense(anchor_strides, dtype),
          as_dense(gt_boxes, dtype),
          as_contiguous(gt_labels),
          as_contiguous(gt_valid),
          as_contiguous(gt_boxes)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_simota(
    const Tensor& pred_logits, const Tensor& pred_objectness, const Tensor& pred_boxes, const Tensor& anchor_points,
    const Tensor& anchor_strides, const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& gt_valid,
    double center_radius, int64_t topk, double iou_weight, bool dense_scores, int64_t rule) {
  const char* const op = "assign_simota";
  const SimotaInputs inputs = checked_inputs(op, pred_logits, pred_objectness, pred_boxes, anchor_points,
                                             anchor_strides, gt_boxes, gt_labels, gt_valid);
  if (topk < 1 || topk > kMostSimotaTopk) {
    fail(op, "topk must be from 1 to " + std::to_string(kMostSimotaTopk) + ", got " + std::to_string(topk));
  }
  if (rule != int64_t(SimotaRule::kYolox) && rule != int64_t(SimotaRule::kMmdet)) {
    fail(op, "rule must be 0 (yolox) or 1 (mmdet), got " + std::to_string(rule));
  }
  const SimotaOptions options{center_radius, iou_weight, topk, static_cast<SimotaRule>(rule)};
  const TargetTensors out =
      allocate_targets(op, "pred_logits", pred_logits, gt_boxes, dense_scores, pred_logits.scalar_type());
  if (out.labels.numel() > 0) {
    if (on_gpu(op, pred_logits)) {
      DETOPS_GPU_ONLY(assign_simota_cuda(inputs, options, out));
    } else if (inputs.dtype() == ScalarType::Double) {
      assign_simota_cpu<double>(inputs, options, out);
    } else {
      assign_simota_cpu<float>(inputs, options, out);
    }
  }
  return out.tuple();
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_simota>(
      "assign_simota(Tensor pred_logits, Tensor pred_objectness, Tensor pred_boxes, Tensor anchor_points, "
      "Tensor anchor_strides, Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, float center_radius, int topk, "
      "float iou_weight, bool dense_scores, int rule=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
