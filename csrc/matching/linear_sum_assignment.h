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
// A cost that is NaN or infinite is invalid. Where not all rows can have a column of a valid cost, the search runs in
// tiers: costs, lengths and duals are pairs of a number of invalid costs and a sum of valid ones, which rank by the
// number first. So as few pairs as possible are invalid, and the sum of the others is the least that is possible then,
// with no rounding by a huge number in the place of infinity. Invalid pairs are then dropped, or kept (kLast).
#pragma once

#include <limits>
#include <optional>

#include "common/allocate.h"
#include "common/dispatch.h"

namespace DETOPS_NAMESPACE {

// How invalid costs are met: +infinity in place of NaN and -infinity; an error for these two; pairs like any other once
// nothing else is left.
enum class InvalidCosts : int64_t { kForbid, kRaise, kLast };

constexpr double kForbidden = std::numeric_limits<double>::infinity();

// False for what kRaise raises for.
template <class T>
DETOPS_HD bool is_cost(T cost) {
  return cost > -std::numeric_limits<T>::infinity();
}
// All invalid costs are the same to the search.
template <class T>
DETOPS_HD T cost_or_forbidden(T cost) {
  return is_cost(cost) ? cost : std::numeric_limits<T>::infinity();
}

// The first dual of a row, given its least cost, and its tier.
DETOPS_HD double first_row_dual(double least) { return least < kForbidden ? least : 0.0; }
DETOPS_HD int first_row_tier(double least) { return least < kForbidden ? 0 : 1; }

// `base` is the length of the path up to a row less the dual of the row.
DETOPS_HD double path_length(double base, double cost, double column_dual) { return base + (cost - column_dual); }

// Of columns that the search may settle next: the nearer, the free, the lower one.
struct Nearest {
  double length;
  int rank;  // the column, or column + columns where it is taken
  int tier;  // 0 outside of the search in tiers
};
template <bool tiered>
DETOPS_HD bool comes_before(const Nearest& a, const Nearest& b) {
  if (tiered && a.tier != b.tier) return a.tier < b.tier;
  return a.length < b.length || (a.length == b.length && a.rank < b.rank);
}

// What valid costs up to this magnitude are multiplied by in the search in tiers, so that no length overflows: it is a
// sum of at most 2^32 of them.
DETOPS_HD double cost_scale(double magnitude) { return magnitude > 0x1p960 ? 0x1p-64 : 1.0; }

// Contiguous costs: [B, Q, T], or [B, T, Q] if they stand by target. Of the targets take part the first num_targets,
// or the valid ones.
struct AssignmentInputs {
  Tensor cost;
  std::optional<Tensor> num_targets, valid;
  int64_t images, queries, targets;
  bool by_target;
  InvalidCosts invalid;
};

inline InvalidCosts check_invalid(const char* op, int64_t invalid) {
  if (invalid >= 0 && invalid <= int64_t(InvalidCosts::kLast)) return static_cast<InvalidCosts>(invalid);
  fail(op, "invalid must be 0 (forbid), 1 (raise) or 2 (last), got " + std::to_string(invalid));
}

// The launch. Arguments were checked; `out` [B, T] is allocated and not empty. Returns the first problem with a cost
// that kRaise raises for, which it waits for; -1 if there is none, and for the others.
int64_t linear_sum_assignment_cuda(const AssignmentInputs& inputs, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
