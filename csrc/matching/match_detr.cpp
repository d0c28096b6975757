// match_detr: schema, checks, and the CPU kernel.
#include "matching/match_detr.h"
#include "common/register.h"

#include <memory>
#include <vector>

#include "matching/assignment_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class T>
DETOPS_CLONES Softmax softmax_of(const T* logits, int64_t classes) {
  double most[kSoftmaxLanes], sum[kSoftmaxLanes];
  for (int lane = 0; lane < kSoftmaxLanes; ++lane) {
    most[lane] = -kForbidden;
    sum[lane] = 0.0;
  }
  const int64_t whole = classes / kSoftmaxLanes * kSoftmaxLanes;
  for (int64_t first = 0; first < whole; first += kSoftmaxLanes) {
    for (int lane = 0; lane < kSoftmaxLanes; ++lane) {
      most[lane] = max_of(static_cast<double>(logits[first + lane]), most[lane]);
    }
  }
  for (int64_t k = whole; k < classes; ++k) most[k - whole] = max_of(static_cast<double>(logits[k]), most[k - whole]);
  for (int distance = kSoftmaxLanes / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) most[lane] = max_of(most[lane + distance], most[lane]);
  }
  for (int64_t first = 0; first < whole; first += kSoftmaxLanes) {
    for (int lane = 0; lane < kSoftmaxLanes; ++lane) {
      sum[lane] += math::exp(static_cast<double>(logits[first + lane]) - most[0]);
    }
  }
  for (int64_t k = whole; k < classes; ++k) sum[k - whole] += math::exp(static_cast<double>(logits[k]) - most[0]);
  for (int distance = kSoftmaxLanes / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) sum[lane] += sum[lane + distance];
  }
  return {most[0], sum[0]};
}

template <class T>
DETOPS_CLONES void softmax_costs(const T* logits, int64_t queries, int64_t classes, const double* most,
                                 const double* sum, T* __restrict__ costs) {
  for (int64_t q = 0; q < queries; ++q) {
    costs[q] = static_cast<T>(softmax_cost(static_cast<double>(logits[q * classes]), most[q], sum[q]));
  }
}

template <bool square, class T>
DETOPS_CLONES void focal_costs(const T* logits, int64_t queries, int64_t classes, double alpha, double gamma,
                               T* __restrict__ costs) {
  for (int64_t q = 0; q < queries; ++q) {
    costs[q] = static_cast<T>(focal_cost<square>(static_cast<double>(logits[q * classes]), alpha, gamma));
  }
}

// Replaces the class costs of a box by the whole costs. False where one is NaN or -infinity.
template <class T>
DETOPS_CLONES bool add_box_costs(const DetrBox<T>* boxes, int64_t queries, const DetrBox<T>& gt, T class_weight,
                                 T l1_weight, T giou_weight, T* __restrict__ costs, int64_t step) {
  bool good = true;
  for (int64_t q = 0; q < queries; ++q) {
    const T cost = detr_cost(boxes[q], gt, costs[q * step], class_weight, l1_weight, giou_weight);
    good &= is_cost(cost);
    costs[q * step] = cost_or_forbidden(cost);
  }
  return good;
}

template <class T>
class DetrMatching {
 public:
  DetrMatching(const DetrInputs& inputs, const DetrOptions& options)
      : inputs_(inputs),
        options_(options),
        boxes_(inputs.queries),
        most_(inputs.queries),
        sum_(inputs.queries),
        class_costs_(inputs.queries) {}

  // False if a cost is what InvalidCosts::kRaise raises for.
  bool run(int64_t image, int64_t* out) {
    const T* const logits = inputs_.logits.template const_data_ptr<T>() + image * inputs_.queries * inputs_.classes;
    const T* const boxes = inputs_.boxes.template const_data_ptr<T>() + image * inputs_.queries * 4;
    const T* const gt_boxes = inputs_.gt_boxes.template const_data_ptr<T>() + image * inputs_.gts * 4;
    const int64_t* const labels = inputs_.gt_labels.template const_data_ptr<int64_t>() + image * inputs_.gts;
    const bool* const valid = bool_data(inputs_.gt_valid);
    used_.clear();
    for (int64_t j = 0; j < inputs_.gts; ++j) {
      out[j] = -1;
      if (valid == nullptr || valid[image * inputs_.gts + j]) used_.push_back(static_cast<int>(j));
    }
    const int64_t queries = inputs_.queries, count = static_cast<int64_t>(used_.size());
    const bool by_gt = count <= queries;
    const int64_t rows = min_of(count, queries), columns = max_of(count, queries);
    if (rows == 0) return true;
    for (int64_t q = 0; q < queries; ++q) {
      boxes_[q] = detr_box(load_box<T>(boxes + 4 * q), options_.xyxy);
      if (options_.focal) continue;
      const Softmax softmax = softmax_of(logits + q * inputs_.classes, inputs_.classes);
      most_[q] = softmax.most;
      sum_[q] = softmax.sum;
    }
    T* const costs = solver_.costs(rows, columns);
    const int64_t padded = padded_columns(columns);
    bool good = true;
    for (int64_t t = 0; t < count; ++t) {
      T* const to = costs + (by_gt ? t * padded : t);
      const int64_t step = by_gt ? 1 : padded;
      find_class_costs(logits + labels[used_[t]]);
      for (int64_t q = 0; q < queries; ++q) to[q * step] = class_costs_[q];
      good &= add_box_costs(boxes_.data(), queries, detr_box(load_box<T>(gt_boxes + 4 * used_[t]), options_.xyxy),
                            T(options_.class_weight), T(options_.l1_weight), T(options_.giou_weight), to, step);
    }
    if (!good && options_.invalid == InvalidCosts::kRaise) return false;
    const std::vector<int>& column_of = solver_.solve(options_.invalid == InvalidCosts::kLast);
    for (int64_t row = 0; row < rows; ++row) {
      if (column_of[row] < 0) continue;
      out[used_[by_gt ? row : column_of[row]]] = by_gt ? column_of[row] : row;
    }
    return true;
  }

 private:
  // Of all queries for a class, the first of whose logits is given.
  void find_class_costs(const T* logits) {
    const int64_t queries = inputs_.queries, classes = inputs_.classes;
    if (!options_.focal) return softmax_costs(logits, queries, classes, most_.data(), sum_.data(), class_costs_.data());
    if (options_.gamma == 2.0) {
      focal_costs<true>(logits, queries, classes, options_.alpha, options_.gamma, class_costs_.data());
    } else {
      focal_costs<false>(logits, queries, classes, options_.alpha, options_.gamma, class_costs_.data());
    }
  }

  const DetrInputs& inputs_;
  const DetrOptions& options_;
  std::vector<DetrBox<T>> boxes_;
  std::vector<double> most_, sum_;
  std::vector<T> class_costs_;
  std::vector<int> used_;
  AssignmentSolver<T> solver_;
};

void check_labels(const char* op, const DetrInputs& inputs) {
  const int64_t* const labels = inputs.gt_labels.const_data_ptr<int64_t>();
  const bool* const valid = bool_data(inputs.gt_valid);
  for (int64_t i = 0; i < inputs.images * inputs.gts; ++i) {
    if ((valid != nullptr && !valid[i]) || (labels[i] >= 0 && labels[i] < inputs.classes)) continue;
    fail(op, "gt_labels must be from 0 to C - 1 (" + std::to_string(inputs.classes - 1) + ") where valid, got " +
                 std::to_string(labels[i]));
  }
}

// As match_detr_cuda.
int64_t match_detr_cpu(const char* op, const DetrInputs& inputs, const DetrOptions& options, int64_t* out) {
  check_labels(op, inputs);
  const std::unique_ptr<bool[]> good(new bool[inputs.images]);
  dispatch_compute_type(inputs.logits.scalar_type(), [&](auto tag) {
    parallel_items(inputs.images, [&](const auto& next) {
      DetrMatching<typename decltype(tag)::type> matching(inputs, options);
      for (int64_t image = next(); image >= 0; image = next()) {
        good[image] = matching.run(image, out + image * inputs.gts);
      }
    });
  });
  const bool* const bad = std::find(good.get(), good.get() + inputs.images, false);
  return bad < good.get() + inputs.images ? bad - good.get() : -1;
}

DetrInputs check_inputs(const char* op, const Tensor& logits, const Tensor& boxes, const Tensor& gt_boxes,
                        const Tensor& gt_labels, const std::optional<Tensor>& gt_valid) {
  check_shape(op, "logits", logits, "[B, Q, C]", {-1, -1, -1});
  const int64_t images = logits.size(0), queries = logits.size(1), classes = logits.size(2);
  check_shape(op, "boxes", boxes, "[B, Q, 4] with the B and Q of logits", {images, queries, 4});
  check_shape(op, "gt_boxes", gt_boxes, "[B, M, 4] with the B of logits", {images, -1, 4});
  const int64_t gts = gt_boxes.size(1);
  check_shape(op, "gt_labels", gt_labels, "[B, M] with the B and M of gt_boxes", {images, gts});
  if (max_of(queries, gts) > kMostRows / 2) {
    fail(op, "boxes and gt_boxes must have at most " + std::to_string(kMostRows / 2) + " rows, got " +
                 shape_text(boxes) + " and " + shape_text(gt_boxes));
  }
  check_row_count(op, "logits", classes, "classes");
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, "logits must be float32 or float64, got " + dtype_name(dtype));
  }
  check_same_dtype(op, "boxes", boxes, "logits", logits);
  check_same_dtype(op, "gt_boxes", gt_boxes, "logits", logits);
  if (gt_labels.scalar_type() != ScalarType::Long) {
    fail(op, "gt_labels must be int64, got " + dtype_name(gt_labels.scalar_type()));
  }
  check_same_device(op, "boxes", boxes, "logits", logits);
  check_same_device(op, "gt_boxes", gt_boxes, "logits", logits);
  check_same_device(op, "gt_labels", gt_labels, "logits", logits);
  return {as_contiguous(logits),
          as_contiguous(boxes),
          as_contiguous(gt_boxes),
          as_contiguous(gt_labels),
          check_valid(op, "gt_valid", gt_valid, "gt_boxes", gt_boxes),
          images,
          queries,
          classes,
          gts};
}

Tensor match_detr(const Tensor& logits, const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_labels,
                  const std::optional<Tensor>& gt_valid, bool focal, double class_weight, double l1_weight,
                  double giou_weight, double alpha, double gamma, bool xyxy, int64_t invalid) {
  const char* const op = "match_detr";
  const DetrInputs inputs = check_inputs(op, logits, boxes, gt_boxes, gt_labels, gt_valid);
  const DetrOptions options{focal,       xyxy,  class_weight, l1_weight,
                            giou_weight, alpha, gamma,        check_invalid(op, invalid)};
  const Tensor out = allocate(op, {inputs.images, inputs.gts}, ScalarType::Long, logits);
  if (out.numel() == 0) return out;
  int64_t bad = -1;
  if (on_gpu(op, logits)) {
    DETOPS_GPU_ONLY(bad = match_detr_cuda(inputs, options, out));
  } else {
    bad = match_detr_cpu(op, inputs, options, out.mutable_data_ptr<int64_t>());
  }
  if (bad < 0) return out;
  fail(op, "costs must be numbers, got NaN or -inf in image " + std::to_string(bad) +
               ", as of a NaN or infinite logit or box");
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&match_detr>(
      "match_detr(Tensor logits, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor? gt_valid, bool focal, "
      "float class_weight, float l1_weight, float giou_weight, float alpha, float gamma, bool xyxy, int invalid=0) "
      "-> Tensor");
}

}  // namespace DETOPS_NAMESPACE
