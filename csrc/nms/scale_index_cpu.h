// Which kept boxes can overlap a candidate enough? An index that makes NMS of N boxes take O(N log N) time, exactly.
//
// Along each axis the IoU of two boxes is at most that of their sides taken as intervals. So IoU > t needs, on both
// axes, sides a and b with t < a / b < 1 / t, and starts that differ by less than (1 - t) times the side of the box
// that starts first. Each kept box goes into one cell of (level of width, x cell, level of height, y cell), a cell
// being about (1 - t) box sides wide; a candidate looks into the few cells that these bounds allow. Cells are hashed
// into buckets: two cells in one bucket cost time, never correctness, as every box found is tested exactly.
#pragma once

#include "nms/nms.h"

namespace DETOPS_NAMESPACE {

class ScaleIndex {
 public:
  // Below this threshold nearly everything that touches must be looked at, and few boxes are kept.
  static constexpr double kLowestThreshold = 0.2;
  static constexpr int kMostCells = 32;  // cells that one axis of a candidate can reach; 20 at the lowest threshold

  // The cells along one axis, hashed.
  struct Cells {
    int count = 0;
    uint64_t hash[kMostCells];
  };

  ScaleIndex(double threshold, int64_t boxes) {
    // The bounds are for exact arithmetic; a computed IoU is off by less than this.
    ratio_ = threshold * (1 - 1e-5);
    shift_ = 1 - ratio_;
    cell_ = max_of(2 * shift_, 1.0 / 32);
    level_bits_ = ratio_ < 0.5 ? 53 : ratio_ < 0.75 ? 52 : ratio_ < 0.875 ? 51 : 50;
    bucket_bits_ = 8;
    while ((int64_t(1) << bucket_bits_) < boxes && bucket_bits_ < 31) ++bucket_bits_;
  }

  int64_t buckets() const { return int64_t(1) << bucket_bits_; }
  int64_t bucket(uint64_t x_hash, uint64_t y_hash) const {
    return static_cast<int64_t>((x_hash + y_hash * 0xD6E8FEB86659FD93u) >> (64 - bucket_bits_));
  }

  // False for sides so far out that areas could be subnormal, hence imprecise, or a cell number could overflow.
  template <class T>
  static bool covers(const Box<T>& box) {
    const double width = double(box.x2) - double(box.x1), height = double(box.y2) - double(box.y1);
    return width > 1e-15 && width < 1e15 && height > 1e-15 && height < 1e15;
  }

  // The cell of a kept box along one axis.
  uint64_t home(double start, double side) const {
    const uint64_t level = level_of(side);
    return hash(level, cell_of(start, cells_per_unit(level)));
  }

  // All cells along one axis that can hold boxes with a large enough IoU.
  DETOPS_HD void reach(double start, double side, Cells& cells) const {
    cells.count = 0;
    const double longest = side / ratio_;
    const uint64_t last = level_of(longest);
    for (uint64_t level = level_of(side * ratio_); level <= last; ++level) {
      const double scale = cells_per_unit(level);
      const int64_t end = cell_of(start + side * shift_, scale);
      for (int64_t cell = cell_of(start - min_of(longest, upper(level)) * shift_, scale); cell <= end; ++cell) {
        cells.hash[cells.count++] = hash(level, cell);
      }
    }
  }

 private:
  // Levels are the leading bits of the side as a double: steps of a factor 4 (53), 2 (52) or less.
  uint64_t level_of(double side) const { return bit_cast<uint64_t>(side) >> level_bits_; }
  double upper(uint64_t level) const { return bit_cast<double>((level + 1) << level_bits_); }
  double cells_per_unit(uint64_t level) const { return 1 / (upper(level) * cell_); }
  static int64_t cell_of(double position, double scale) { return static_cast<int64_t>(std::floor(position * scale)); }
  static uint64_t hash(uint64_t level, int64_t cell) {
    return (static_cast<uint64_t>(cell) + level * 0x9E3779B97F4A7C15u) * 0xBF58476D1CE4E5B9u;
  }

  double ratio_, shift_, cell_;
  int level_bits_, bucket_bits_;
};

}  // namespace DETOPS_NAMESPACE
