// Which kept boxes can overlap a candidate enough? An index that makes NMS of N boxes take O(N log N) time, exactly.
//
// IoU > t needs, on both axes, sides a and b with ratio < a / b < 1 / ratio, and starts that differ by less than
// `shift` times the side of the box that starts first. For upright boxes the IoU is at most that of the sides taken as
// intervals, so ratio = t and shift = 1 - t. For rotated boxes sides and starts are those of the upright box around
// each: more than the share t of a rectangle's area then lies in the part that the boxes have in common, and of all
// shadows that a rectangle casts on an axis (trapezoids) the triangle keeps that part narrowest, in the middle: wider
// than 1 - sqrt(1 - t). It starts latest in the triangle too, sqrt((1 - t) / 2) from the start, or for t < 1/2 in the
// shadow of an upright box, 1 - t from it.
//
// Each kept box goes into one cell of (level of width, x cell, level of height, y cell), a cell being about twice the
// shift wide; a candidate looks into the few cells that these bounds allow. Cells are hashed into buckets: two cells in
// one bucket cost time, never correctness, as every box found is tested exactly.
#pragma once

#include "common/counted.h"
#include "nms/nms.h"
#include "nms/rotated_bound.h"

namespace DETOPS_NAMESPACE {

class ScaleIndex {
 public:
  // Below this threshold nearly everything that touches must be looked at, and few boxes are kept.
  static constexpr double kLowestThreshold = 0.2;

  // The cells along one axis that a candidate can reach. Per level these are at most (side / upper + 1) / 2 + 2, for
  // starts from upper * shift before to side * shift after its own, in cells of 2 * shift * upper or more, and one each
  // for both ends and for rounding. Uppers are above ratio * side and rise by the step of the levels, of which a factor
  // of 1 / ratio^2 meets 5 at most. The lowest ratio, 0.1, gives 19 in steps of 4; steps of less come with ratios of
  // 1/2 or more, hence with 2 + 4 * 2.5 at most.
  static constexpr int kMostCells = 32;
  struct Cells {
    int count = 0;
    CountedArray<uint64_t, kMostCells> hash{"nms", "cells along an axis"};
  };

  // Where a box lies along both axes.
  struct Place {
    double x, y, width, height;  // its least x and y, and its sides
    bool covered;                // whether the bounds hold for it
  };

  // `kind` is a null pointer that says for which boxes.
  template <class T>
  ScaleIndex(double threshold, int64_t boxes, const Box<T>*) {
    // The bounds are for exact arithmetic; a computed IoU is off by less than this.
    const double lowest = threshold * (1 - 1e-5);
    set(lowest, 1 - lowest, boxes);
  }
  template <class T>
  ScaleIndex(double threshold, int64_t boxes, const RotatedBox<T>*) {
    // As below, for boxes that place() covers: two areas' errors, of 64 diagonals squared, in a union of half their
    // sum.
    const double lowest = threshold - max_of(double(kRotatedError<T>) * 4 * kMostElongated, 1e-6);
    set(1 - std::sqrt(1 - lowest), lowest < 0.5 ? 1 - lowest : std::sqrt((1 - lowest) / 2), boxes);
  }

  int64_t buckets() const { return int64_t(1) << bucket_bits_; }
  DETOPS_HD int64_t bucket(uint64_t x_hash, uint64_t y_hash) const {
    return static_cast<int64_t>((x_hash + y_hash * 0xD6E8FEB86659FD93u) >> (64 - bucket_bits_));
  }

  // Not covered are sides so far out that areas could be subnormal, hence imprecise, and boxes so far from 0 that cells
  // could not be counted: none of float32, whose corners are at most 2^24 sides from 0.
  template <class T>
  DETOPS_HD static Place place(const Box<T>& box) {
    constexpr double kFarthest = double(int64_t(1) << 36);
    const double x = box.x1, y = box.y1, width = double(box.x2) - x, height = double(box.y2) - y;
    const bool covered = has_plain_size(width) && has_plain_size(height) && std::fabs(x) <= kFarthest * width &&
                         std::fabs(y) <= kFarthest * height;
    return {x, y, width, height, covered};
  }
  template <class T>
  DETOPS_HD static Place place(const RotatedBox<T>& box) {
    constexpr double kFarthest = double(int64_t(1) << 28);
    const double cos = std::fabs(double(box.cos)), sin = std::fabs(double(box.sin));
    const double width = box.width * cos + box.height * sin, height = box.width * sin + box.height * cos;
    const double x = box.centre_x - width / 2, y = box.centre_y - height / 2;
    const double longer = max_of(box.width, box.height), shorter = min_of(box.width, box.height);
    const bool covered = is_plain(box) && longer <= kMostElongated * shorter && std::fabs(x) <= kFarthest * width &&
                         std::fabs(y) <= kFarthest * height;
    return {x, y, width, height, covered};
  }

  // The cell of a kept box along one axis.
  DETOPS_HD uint64_t home(double start, double side) const {
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
  static constexpr double kMostElongated = 64;  // the longer side of a rotated box by the shorter
  static constexpr int kFinest = 9;

  void set(double ratio, double shift, int64_t boxes) {
    ratio_ = ratio;
    shift_ = shift;
    cell_ = max_of(2 * shift, 1.0 / (1 << kFinest));
    int halvings = 0;  // ratio is at least 1 - 2^-halvings
    while (halvings < kFinest && 1 - ratio <= 1.0 / (2 << halvings)) ++halvings;
    level_bits_ = 53 - halvings;
    bucket_bits_ = 8;
    while ((int64_t(1) << bucket_bits_) < boxes && bucket_bits_ < 31) ++bucket_bits_;
  }

  // Levels are the leading bits of the side as a double: steps of a factor 4 (53), 2 (52) or less.
  DETOPS_HD uint64_t level_of(double side) const { return bit_cast<uint64_t>(side) >> level_bits_; }
  DETOPS_HD double upper(uint64_t level) const { return bit_cast<double>((level + 1) << level_bits_); }
  DETOPS_HD double cells_per_unit(uint64_t level) const { return 1 / (upper(level) * cell_); }
  // Below 2^50, as place() sees to it: 2^36 sides from 0, cells of a side / 2^9, and levels of a tenth.
  DETOPS_HD static int64_t cell_of(double position, double scale) {
    return static_cast<int64_t>(std::floor(position * scale));
  }
  DETOPS_HD static uint64_t hash(uint64_t level, int64_t cell) {
    return (static_cast<uint64_t>(cell) + level * 0x9E3779B97F4A7C15u) * 0xBF58476D1CE4E5B9u;
  }

  double ratio_, shift_, cell_;
  int level_bits_, bucket_bits_;
};

}  // namespace DETOPS_NAMESPACE
