// The solver of linear_sum_assignment on the CPU.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "matching/linear_sum_assignment.h"

namespace DETOPS_NAMESPACE {

// Rows are padded with kForbidden to a multiple of so many columns, which are looked at together.
constexpr int kAssignmentLanes = 8;
inline int64_t padded_columns(int64_t columns) {
  return ceil_div<int64_t>(columns, kAssignmentLanes) * kAssignmentLanes;
}

// Per column, all doubles so that one vector instruction handles as many of each.
struct AssignmentColumns {
  std::vector<double> dual, length, from_row, rank;
  std::vector<double> settled;          // 0, or infinity where the search is done with the column, and for padding
  std::vector<double> dual_tier, tier;  // of the search in tiers; tier is that of length
};

// Looks at a row of the search: shortens paths, and returns the column to be settled next.
template <class T>
DETOPS_CLONES Nearest look_at_row(const T* costs, int64_t columns, double base, double row,
                                  const double* __restrict__ dual, const double* __restrict__ settled,
                                  const double* __restrict__ rank, double* __restrict__ length,
                                  double* __restrict__ from_row) {
  double nearest[kAssignmentLanes], nearest_rank[kAssignmentLanes];
  for (int lane = 0; lane < kAssignmentLanes; ++lane) {
    nearest[lane] = kForbidden;
    nearest_rank[lane] = rank[lane];
  }
  for (int64_t first = 0; first < columns; first += kAssignmentLanes) {
    for (int lane = 0; lane < kAssignmentLanes; ++lane) {
      const int64_t j = first + lane;
      const double through = path_length(base, static_cast<double>(costs[j]), dual[j]) + settled[j];
      const bool shorter = through < length[j];
      const double now = shorter ? through : length[j];
      length[j] = now;
      from_row[j] = shorter ? row : from_row[j];
      const double open = now + settled[j];
      const bool nearer = (open < nearest[lane]) | ((open == nearest[lane]) & (rank[j] < nearest_rank[lane]));
      nearest[lane] = nearer ? open : nearest[lane];
      nearest_rank[lane] = nearer ? rank[j] : nearest_rank[lane];
    }
  }
  Nearest best{nearest[0], static_cast<int>(nearest_rank[0]), 0};
  for (int lane = 1; lane < kAssignmentLanes; ++lane) {
    const Nearest other{nearest[lane], static_cast<int>(nearest_rank[lane]), 0};
    if (comes_before<false>(other, best)) best = other;
  }
  return best;
}

// The same for the search in tiers.
template <class T>
DETOPS_CLONES Nearest look_at_row_in_tiers(const T* costs, int64_t columns, double base, double base_tier, double row,
                                           double scale, const double* __restrict__ dual,
                                           const double* __restrict__ dual_tier, const double* __restrict__ settled,
                                           const double* __restrict__ rank, double* __restrict__ length,
                                           double* __restrict__ tier, double* __restrict__ from_row) {
  double nearest[kAssignmentLanes], nearest_tier[kAssignmentLanes], nearest_rank[kAssignmentLanes];
  for (int lane = 0; lane < kAssignmentLanes; ++lane) {
    nearest[lane] = nearest_tier[lane] = kForbidden;
    nearest_rank[lane] = rank[lane];
  }
  for (int64_t first = 0; first < columns; first += kAssignmentLanes) {
    for (int lane = 0; lane < kAssignmentLanes; ++lane) {
      const int64_t j = first + lane;
      const double cost = static_cast<double>(costs[j]);
      const bool valid = cost < kForbidden;
      const double through = path_length(base, valid ? cost * scale : 0.0, dual[j]);
      const double through_tier = base_tier + (valid ? 0.0 : 1.0) - dual_tier[j] + settled[j];
      const bool shorter = (through_tier < tier[j]) | ((through_tier == tier[j]) & (through < length[j]));
      const double now = shorter ? through : length[j], now_tier = shorter ? through_tier : tier[j];
      length[j] = now;
      tier[j] = now_tier;
      from_row[j] = shorter ? row : from_row[j];
      const double open = now_tier + settled[j];
      const bool nearer = (open < nearest_tier[lane]) |
                          ((open == nearest_tier[lane]) &
                           ((now < nearest[lane]) | ((now == nearest[lane]) & (rank[j] < nearest_rank[lane]))));
      nearest[lane] = nearer ? now : nearest[lane];
      nearest_tier[lane] = nearer ? open : nearest_tier[lane];
      nearest_rank[lane] = nearer ? rank[j] : nearest_rank[lane];
    }
  }
  Nearest best{kForbidden, 0, 0};
  for (int lane = 0; lane < kAssignmentLanes; ++lane) {
    if (!(nearest_tier[lane] < kForbidden)) continue;  // nothing open
    const Nearest other{nearest[lane], static_cast<int>(nearest_rank[lane]), static_cast<int>(nearest_tier[lane])};
    if (!(best.length < kForbidden) || comes_before<true>(other, best)) best = other;
  }
  return best;
}

template <class T>
DETOPS_CLONES T least_of_row(const T* costs, int64_t padded) {
  T least[kAssignmentLanes];
  for (int lane = 0; lane < kAssignmentLanes; ++lane) least[lane] = costs[lane];
  for (int64_t first = kAssignmentLanes; first < padded; first += kAssignmentLanes) {
    for (int lane = 0; lane < kAssignmentLanes; ++lane) least[lane] = min_of(costs[first + lane], least[lane]);
  }
  return *std::min_element(least, least + kAssignmentLanes);
}

// One problem after another; keeps its memory.
template <class T>
class AssignmentSolver {
 public:
  // Memory for the costs of a problem, to be filled before solve(): [rows][padded_columns], rows <= columns.
  T* costs(int64_t rows, int64_t columns) {
    rows_ = rows;
    columns_ = columns;
    padded_ = padded_columns(columns);
    costs_.resize(rows * padded_);
    for (int64_t row = 0; row < rows; ++row) {
      std::fill(costs_.begin() + row * padded_ + columns, costs_.begin() + (row + 1) * padded_, T(kForbidden));
    }
    return costs_.data();
  }

  // The column of each row, or -1. Invalid costs are infinite; `keep_invalid` says that their pairs count.
  const std::vector<int>& solve(bool keep_invalid) {
    if (rows_ == 0) {
      column_of_.clear();
    } else if (!solve<false>()) {
      T magnitude = T(0);
      for (T cost : costs_) magnitude = cost < T(kForbidden) ? max_of(max_of(cost, -cost), magnitude) : magnitude;
      scale_ = cost_scale(static_cast<double>(magnitude));
      solve<true>();
      for (int64_t row = 0; row < rows_ && !keep_invalid; ++row) {
        const int column = column_of_[row];
        if (column >= 0 && costs_[row * padded_ + column] == T(kForbidden)) column_of_[row] = -1;
      }
    }
    return column_of_;
  }

 private:
  // False if some row finds no column, which in tiers does not happen.
  template <bool tiered>
  bool solve() {
    column_of_.assign(rows_, -1);
    row_of_.assign(padded_, -1);
    row_dual_.resize(rows_);
    columns_data_.dual.assign(padded_, 0.0);
    columns_data_.from_row.resize(padded_);
    columns_data_.rank.resize(padded_);
    if (tiered) {
      row_tier_.resize(rows_);
      columns_data_.dual_tier.assign(padded_, 0.0);
    }
    for (int64_t j = 0; j < padded_; ++j) columns_data_.rank[j] = static_cast<double>(j < columns_ ? j : j + padded_);
    for (int64_t row = 0; row < rows_; ++row) {
      const T* const costs = costs_.data() + row * padded_;
      const T least = least_of_row(costs, padded_);
      row_dual_[row] = first_row_dual(static_cast<double>(least)) * (tiered ? scale_ : 1.0);
      if (tiered) row_tier_[row] = first_row_tier(static_cast<double>(least));
      if (!(least < T(kForbidden))) continue;
      const int64_t column = std::find(costs, costs + columns_, least) - costs;
      if (column < columns_ && row_of_[column] < 0) take(static_cast<int>(row), static_cast<int>(column));
    }
    for (int64_t row = 0; row < rows_; ++row) {
      if (column_of_[row] < 0 && !augment<tiered>(static_cast<int>(row))) return false;
    }
    return true;
  }

  // Rows and columns are those of the problem: padding is settled, so that no search ends there.
  void take(int row, int column) {
    const char* const op = "linear_sum_assignment";
    Counted<int>(op, "rows of columns", row_of_.data(), columns_)[column] = row;
    Counted<int>(op, "columns of rows", column_of_.data(), rows_)[row] = column;
    columns_data_.rank[column] = static_cast<double>(column + padded_);
  }

  template <bool tiered>
  Nearest look_at(int row, double length, int tier) {
    AssignmentColumns& data = columns_data_;
    const T* const costs = costs_.data() + row * padded_;
    if (tiered) {
      return look_at_row_in_tiers(costs, padded_, length - row_dual_[row], static_cast<double>(tier - row_tier_[row]),
                                  static_cast<double>(row), scale_, data.dual.data(), data.dual_tier.data(),
                                  data.settled.data(), data.rank.data(), data.length.data(), data.tier.data(),
                                  data.from_row.data());
    }
    return look_at_row(costs, padded_, length - row_dual_[row], static_cast<double>(row), data.dual.data(),
                       data.settled.data(), data.rank.data(), data.length.data(), data.from_row.data());
  }

  template <bool tiered>
  bool augment(int start) {
    AssignmentColumns& data = columns_data_;
    data.length.assign(padded_, kForbidden);
    if (tiered) data.tier.assign(padded_, kForbidden);
    data.settled.assign(padded_, kForbidden);
    std::fill(data.settled.begin(), data.settled.begin() + columns_, 0.0);
    settled_.clear();
    int row = start, column = -1, tier = 0;
    double length = 0.0;
    while (column < 0 || row_of_[column] >= 0) {
      if (column >= 0) row = row_of_[column];
      const Nearest next = look_at<tiered>(row, length, tier);
      if (!(next.length < kForbidden)) return false;
      length = next.length;
      tier = next.tier;
      column = next.rank < padded_ ? next.rank : static_cast<int>(next.rank - padded_);
      data.settled[column] = kForbidden;
      if (row_of_[column] >= 0) settled_.push_back(column);
    }
    row_dual_[start] += length;
    if (tiered) row_tier_[start] += tier;
    for (int each : settled_) {
      const double change = length - data.length[each];
      row_dual_[row_of_[each]] += change;
      data.dual[each] -= change;
      if (!tiered) continue;
      const int tier_change = tier - static_cast<int>(data.tier[each]);
      row_tier_[row_of_[each]] += tier_change;
      data.dual_tier[each] -= tier_change;
    }
    while (true) {
      const int from = static_cast<int>(data.from_row[column]);
      const int before = column_of_[from];
      take(from, column);
      if (from == start) return true;
      column = before;
    }
  }

  int64_t rows_ = 0, columns_ = 0, padded_ = 0;
  std::vector<T> costs_;
  std::vector<double> row_dual_;
  std::vector<int> row_tier_;
  double scale_ = 1.0;
  std::vector<int> row_of_, column_of_, settled_;
  AssignmentColumns columns_data_;
};

}  // namespace DETOPS_NAMESPACE
