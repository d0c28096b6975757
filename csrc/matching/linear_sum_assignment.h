// Linear sum assignment: which query goes to which target, so that the sum of the costs is least.
//
//   linear_sum_assignment  cost [B, Q, T], num_targets [B] -> queries [B, T]
//
// The shortest augmenting path method of Jonker and Volgenant (1987), in double. The rows are the targets, or the
// queries where there are fewer of these; each row gets a column:
//   1. The dual of a row is its least cost, the duals of columns are 0. In order, each row takes the first column of
//      its least cost, if that is still free.
//   2. In order, each row without a column searches the cheapest alternating path to a free column in reduced costs
//      (Dijkstra), updates the duals of what the search settled, and augments along the path.
// At ties the search settles free columns before taken ones, then lower indices. Both devices do the same operations in
// the same order, so that they find the same assignment also where several cost the same.
//
// A cost of infinity forbids a pair. Where not all rows can have a column, infinities count as a finite cost that is
// too high for any other sum to make up for, so that as many rows as possible have one, at the least cost.
#pragma once

#include <limits>
#include <optional>

#include "common/allocate.h"
#include "common/dispatch.h"

namespace DETOPS_NAMESPACE {

constexpr double kForbidden = std::numeric_limits<double>::infinity();
constexpr double kMostCost = std::numeric_limits<double>::max() / 16;

// NaN and -infinity are no costs. Only the GPU gets to see them: the CPU refuses them.
DETOPS_HD double cost_or_forbidden(double cost) { return cost > -kForbidden ? cost : kForbidden; }

// The first dual of a row, given its least cost. `substitute` stands for infinite costs.
DETOPS_HD double first_row_dual(double least, double substitute) {
  if (least < kForbidden) return least;
  return substitute < kForbidden ? substitute : 0.0;
}

// `base` is the length of the path up to a row less the dual of the row.
DETOPS_HD double path_length(double base, double cost, double column_dual) { return base + (cost - column_dual); }

// Of columns that the search may settle next: the nearer, the free, the lower one.
struct Nearest {
  double length;
  int rank;  // the column, or column + columns where it is taken
};
DETOPS_HD bool comes_before(const Nearest& a, const Nearest& b) {
  return a.length < b.length || (a.length == b.length && a.rank < b.rank);
}

// What infinities count as where some row must do without a column, given the range of the finite costs. Infinite
// `least` says that there are none.
DETOPS_HD double prohibitive_cost(double least, double most, int rows) {
  if (least > most) return 1.0;
  const double magnitude = max_of(max_of(most, -least), 1.0);
  const double spread = most > least ? most - least : magnitude;
  return min_of(most + (rows + 1.0) * spread, kMostCost);
}

// Contiguous costs: [B, Q, T], or [B, T, Q] if they stand by target. Of the targets take part the first num_targets,
// or the valid ones.
struct AssignmentInputs {
  Tensor cost;
  std::optional<Tensor> num_targets, valid;
  int64_t images, queries, targets;
  bool by_target;
};

// The launch. Arguments were checked; `out` [B, T] is allocated and not empty.
void linear_sum_assignment_cuda(const AssignmentInputs& inputs, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
