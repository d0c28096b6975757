// linear_sum_assignment: schema, checks, and the CPU loop over problems.
#include "matching/linear_sum_assignment.h"
#include "common/register.h"

#include <memory>
#include <vector>

#include "matching/assignment_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

// The costs of the first `count` targets, as rows of the smaller side. False where one is NaN or -infinity.
template <class S>
DETOPS_CLONES bool pack_costs(const S* cost, int64_t queries, int64_t targets, int64_t count,
                              ComputeType<S>* __restrict__ rows, int64_t padded) {
  using T = ComputeType<S>;
  constexpr int64_t kTile = 16;
  bool good = true;
  if (count > queries) {
    for (int64_t query = 0; query < queries; ++query) {
      for (int64_t t = 0; t < count; ++t) {
        const T value = static_cast<T>(cost[query * targets + t]);
        good &= is_cost(value);
        rows[query * padded + t] = cost_or_forbidden(value);
      }
    }
    return good;
  }
  for (int64_t first = 0; first < queries; first += kTile) {
    const int64_t end = min_of(first + kTile, queries);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t query = first; query < end; ++query) {
        const T value = static_cast<T>(cost[query * targets + t]);
        good &= is_cost(value);
        rows[t * padded + query] = cost_or_forbidden(value);
      }
    }
  }
  return good;
}

// As linear_sum_assignment_cuda.
template <class S>
int64_t linear_sum_assignment_cpu(const char* op, const AssignmentInputs& inputs, int64_t* out) {
  const S* const cost = inputs.cost.const_data_ptr<S>();
  const int64_t* const num_targets = inputs.num_targets ? inputs.num_targets->const_data_ptr<int64_t>() : nullptr;
  for (int64_t image = 0; num_targets != nullptr && image < inputs.images; ++image) {
    if (num_targets[image] >= 0 && num_targets[image] <= inputs.targets) continue;
    fail(op, "num_targets must be from 0 to T (" + std::to_string(inputs.targets) + "), got " +
                 std::to_string(num_targets[image]));
  }
  const std::unique_ptr<bool[]> good(new bool[inputs.images]);
  parallel_items(inputs.images, [&](const auto& next) {
    AssignmentSolver<ComputeType<S>> solver;
    for (int64_t image = next(); image >= 0; image = next()) {
      const int64_t count = num_targets != nullptr ? num_targets[image] : inputs.targets;
      const int64_t rows = min_of(count, inputs.queries), columns = max_of(count, inputs.queries);
      int64_t* const result = out + image * inputs.targets;
      for (int64_t t = 0; t < inputs.targets; ++t) result[t] = -1;
      good[image] = pack_costs(cost + image * inputs.queries * inputs.targets, inputs.queries, inputs.targets, count,
                               solver.costs(rows, columns), padded_columns(columns));
      if (inputs.invalid != InvalidCosts::kRaise) good[image] = true;
      if (!good[image]) continue;
      const std::vector<int>& column_of = solver.solve(inputs.invalid == InvalidCosts::kLast);
      for (int64_t row = 0; row < rows; ++row) {
        if (column_of[row] < 0) continue;
        result[count <= inputs.queries ? row : column_of[row]] = count <= inputs.queries ? column_of[row] : row;
      }
    }
  });
  const bool* const bad = std::find(good.get(), good.get() + inputs.images, false);
  return bad < good.get() + inputs.images ? bad - good.get() : -1;
}

Tensor linear_sum_assignment(const Tensor& cost, const std::optional<Tensor>& num_targets, int64_t invalid) {
  const char* const op = "linear_sum_assignment";
  check_shape(op, "cost", cost, "[B, Q, T]", {-1, -1, -1});
  check_floating(op, "cost", cost);
  const int64_t images = cost.size(0), queries = cost.size(1), targets = cost.size(2);
  // A rank of the search, twice the number of columns at most, has 32 bits.
  if (max_of(queries, targets) > kMostRows / 2) {
    fail(op,
         "cost must have at most " + std::to_string(kMostRows / 2) + " queries and targets, got " + shape_text(cost));
  }
  const InvalidCosts invalid_costs = check_invalid(op, invalid);
  if (num_targets.has_value()) {
    check_shape(op, "num_targets", *num_targets, "[B] with the B of cost", {images});
    if (num_targets->scalar_type() != ScalarType::Long) {
      fail(op, "num_targets must be int64, got " + dtype_name(num_targets->scalar_type()));
    }
    check_same_device(op, "num_targets", *num_targets, "cost", cost);
  }
  // Before a copy of the costs, which may be vast by their strides alone: this says what has no room.
  const Tensor out = allocate(op, {images, targets}, ScalarType::Long, cost);
  if (out.numel() == 0) return out;
  AssignmentInputs inputs{as_contiguous(cost), std::nullopt, std::nullopt, images, queries, targets, false,
                          invalid_costs};
  if (num_targets.has_value()) inputs.num_targets = as_contiguous(*num_targets);
  int64_t bad = -1;
  if (on_gpu(op, cost)) {
    DETOPS_GPU_ONLY(bad = linear_sum_assignment_cuda(inputs, out));
  } else {
    dispatch_floating(cost.scalar_type(), [&](auto tag) {
      bad = linear_sum_assignment_cpu<typename decltype(tag)::type>(op, inputs, out.mutable_data_ptr<int64_t>());
    });
  }
  if (bad >= 0) fail(op, "cost must be free of NaN and -inf, got one in problem " + std::to_string(bad));
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&linear_sum_assignment>("linear_sum_assignment(Tensor cost, Tensor? num_targets, int invalid=0) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
