// The solver of linear_sum_assignment on the CPU.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

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
  std::vector<double> settled;  // 0, or infinity where the search is done with the column, and for padding
};

// Looks at a row of the search: shortens paths, and returns the column to be settled next.
template <class T>
DETOPS_CLONES Nearest look_at_row(const T* costs, int64_t columns, double base, double row, double substitute,
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
      const double cost = static_cast<double>(costs[j]);
      const double finite = cost < kForbidden ? cost : substitute;
      const double through = path_length(base, finite, dual[j]) + settled[j];
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
  Nearest best{nearest[0], static_cast<int>(nearest_rank[0])};
  for (int lane = 1; lane < kAssignmentLanes; ++lane) {
    const Nearest other{nearest[lane], static_cast<int>(nearest_rank[lane])};
    if (comes_before(other, best)) best = other;
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

  // The column of each row, or -1. The costs are neither NaN nor -infinity.
  const std::vector<int>& solve() {
    if (rows_ == 0) {
      column_of_.clear();
    } else if (!solve(kForbidden)) {
      T least = T(kForbidden), most = T(-kForbidden);
      for (T cost : costs_) {
        if (cost == T(kForbidden)) continue;
        least = min_of(cost, least);
        most = max_of(cost, most);
      }
      solve(prohibitive_cost(least, most, static_cast<int>(rows_)));
      for (int64_t row = 0; row < rows_; ++row) {
        const int column = column_of_[row];
        if (column >= 0 && costs_[row * padded_ + column] == T(kForbidden)) column_of_[row] = -1;
      }
    }
    return column_of_;
  }

 private:
  // False if some row finds no column. `substitute` stands for infinite costs.
  bool solve(double substitute) {
    column_of_.assign(rows_, -1);
    row_of_.assign(padded_, -1);
    row_dual_.resize(rows_);
    columns_data_.dual.assign(padded_, 0.0);
    columns_data_.from_row.resize(padded_);
    columns_data_.rank.resize(padded_);
    for (int64_t j = 0; j < padded_; ++j) columns_data_.rank[j] = static_cast<double>(j < columns_ ? j : j + padded_);
    for (int64_t row = 0; row < rows_; ++row) {
      const T* const costs = costs_.data() + row * padded_;
      const T least = least_of_row(costs, padded_);
      row_dual_[row] = first_row_dual(static_cast<double>(least), substitute);
      const int64_t column = std::find(costs, costs + padded_, least) - costs;
      if (least < T(kForbidden) && row_of_[column] < 0) take(static_cast<int>(row), static_cast<int>(column));
    }
    for (int64_t row = 0; row < rows_; ++row) {
      if (column_of_[row] < 0 && !augment(static_cast<int>(row), substitute)) return false;
    }
    return true;
  }

  void take(int row, int column) {
    row_of_[column] = row;
    column_of_[row] = column;
    columns_data_.rank[column] = static_cast<double>(column + padded_);
  }

  bool augment(int start, double substitute) {
    AssignmentColumns& data = columns_data_;
    data.length.assign(padded_, kForbidden);
    data.settled.assign(padded_, kForbidden);
    std::fill(data.settled.begin(), data.settled.begin() + columns_, 0.0);
    settled_.clear();
    int row = start, column = -1;
    double length = 0.0;
    while (column < 0 || row_of_[column] >= 0) {
      if (column >= 0) row = row_of_[column];
      const Nearest next = look_at_row(costs_.data() + row * padded_, padded_, length - row_dual_[row],
                                       static_cast<double>(row), substitute, data.dual.data(), data.settled.data(),
                                       data.rank.data(), data.length.data(), data.from_row.data());
      if (!(next.length < kForbidden)) return false;
      length = next.length;
      column = next.rank < padded_ ? next.rank : static_cast<int>(next.rank - padded_);
      data.settled[column] = kForbidden;
      if (row_of_[column] >= 0) settled_.push_back(column);
    }
    row_dual_[start] += length;
    for (int each : settled_) {
      const double change = length - data.length[each];
      row_dual_[row_of_[each]] += change;
      data.dual[each] -= change;
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
  std::vector<int> row_of_, column_of_, settled_;
  AssignmentColumns columns_data_;
};

}  // namespace DETOPS_NAMESPACE
