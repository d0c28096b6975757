// Regions of interest on feature maps: where their bins lie and which pixels with which weights make up a bin.
//
// The two axes of an upright RoI are independent. A bin of an axis is a set of samples, each of which reads one or two
// neighbouring pixels, so that with Wy [bins, H] and Wx [bins, W] an average is  out = Wy * input * Wx^T.  The rows of
// both are a few taps each.
//
// Decisions, the same on every device:
//   Positions are computed in float32 (float64 for float64 features), in the order of operations of torchvision.
//   A sample reads pixels if -1 <= position <= size; up to 0 it reads pixel 0 alone, from size - 1 on the last alone.
//   Pixels of weight 0 are not read: what they hold, NaN too, does not matter.
//   A RoI counts if its coordinates and sides are finite; others have no samples. Samples off the map are counted but
//   never visited, so that the time is bounded by the map, however large the RoI.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.h"

namespace DETOPS_NAMESPACE {

enum class RoiRule {
  kAlign,   // samples at equal distances, between pixels
  kPool,    // whole pixels; corners rounded, both ends inclusive (roi_pool)
  kPsPool,  // whole pixels; corners rounded, the last row and column never read (ps_roi_pool)
};

template <class T>
DETOPS_HD bool is_finite(T value) {
  return value - value == T(0);
}

// As round(): halves away from 0.
template <class T>
DETOPS_HD T round_half_away(T value) {
  const T whole = std::trunc(value);
  const T rest = value - whole;
  return rest >= T(0.5) ? whole + T(1) : (rest <= T(-0.5) ? whole - T(1) : whole);
}

// What a sample reads: pixel `low`, and also `low + 1` where `fraction` is not 0.
template <class T>
struct AxisSample {
  int low;
  T fraction;
};

// `position` is in [-1, size].
template <class T>
DETOPS_HD AxisSample<T> axis_sample(T position, int size) {
  const T from_zero = position > T(0) ? position : T(0);
  const int low = static_cast<int>(from_zero);
  if (low >= size - 1) return {size - 1, T(0)};
  return {low, from_zero - static_cast<T>(low)};
}

template <class T>
DETOPS_HD bool is_on_map(T position, int size) {
  return position >= T(-1) && position <= static_cast<T>(size) && size > 0;
}

struct IndexRange {
  int64_t begin, end;
  DETOPS_HD int64_t count() const { return end - begin; }
};

// One axis of a RoI: `bins` bins of `bin` pixels from `start` on, over a map of `size` pixels.
template <class T>
struct RoiAxis {
  RoiRule rule;
  int bins, size;
  T start, bin;     // bins may be negative
  T samples;        // of each bin: a whole number, possibly beyond any integer type; 0: the RoI does not count
  int64_t visited;  // at least as many as any bin has samples on the map

  // Every step is monotone, rounded or not, and none is inf - inf: never NaN, and rising with p and with i, or falling
  // where `bin` is negative. Only within a bin: bins of more than 10^6 pixels may overlap by rounding.
  DETOPS_HD T position(int p, int64_t i) const {
    return start + static_cast<T>(p) * bin + (static_cast<T>(i) + T(0.5)) * bin / samples;
  }

  // `samples` as an integer, at most 2^62.
  DETOPS_HD int64_t sample_count() const {
    const int64_t most = int64_t(1) << 62;
    return samples < static_cast<T>(most) ? static_cast<int64_t>(samples) : most;
  }

  // The samples of bin p with low <= position <= high, for kAlign. Positions rise or fall with i.
  DETOPS_HD IndexRange samples_between(int p, T low, T high) const {
    const int64_t count = sample_count();
    if (count <= 0) return {0, 0};
    const auto before = [&](int64_t i) { return bin >= T(0) ? position(p, i) < low : position(p, i) > high; };
    const auto after = [&](int64_t i) { return bin >= T(0) ? position(p, i) > high : position(p, i) < low; };
    const int64_t begin = before(0) ? first_index(count, [&](int64_t i) { return !before(i); }) : 0;
    const int64_t end = after(count - 1) ? first_index(count, after) : count;
    return {begin, max_of(begin, end)};
  }

  // Those on the map.
  DETOPS_HD IndexRange samples_on_map(int p) const {
    if (size <= 0) return {0, 0};
    const IndexRange range = samples_between(p, T(-1), static_cast<T>(size));
    return {range.begin, min_of(range.end, range.begin + visited)};
  }

  // The k-th sample of a range in the order of rising positions, which is from the end where `bin` is negative.
  DETOPS_HD int64_t ascending(const IndexRange& range, int64_t k) const {
    return bin >= T(0) ? range.begin + k : range.end - 1 - k;
  }

  // The pixels of bin p, for kPool and kPsPool.
  DETOPS_HD IndexRange pixels(int p) const {
    if (samples <= T(0)) return {0, 0};
    // Sums of whole numbers, which double holds without rounding.
    const double last = rule == RoiRule::kPool ? size : size - 1;
    const double from = static_cast<double>(start) + static_cast<double>(std::floor(static_cast<T>(p) * bin));
    const double to = static_cast<double>(start) + static_cast<double>(std::ceil(static_cast<T>(p + 1) * bin));
    const int64_t begin = static_cast<int64_t>(max_of(0.0, min_of(last, from)));
    const int64_t end = static_cast<int64_t>(max_of(0.0, min_of(last, to)));
    return {begin, max_of(begin, end)};
  }

 private:
  // The first of 0 .. count-1 for which the condition holds, and holds from then on; `count` if there is none.
  template <class Condition>
  DETOPS_HD static int64_t first_index(int64_t count, const Condition& condition) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (condition(middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// How RoIs are laid on a map.
struct RoiOptions {
  RoiRule rule;
  int bins_y, bins_x;
  int sampling_ratio;  // samples of a bin along each axis; 0: as many as the bin is pixels long, rounded up
  bool aligned;        // pixel centres are at half-integers, and RoIs may be smaller than a pixel
};

// From the corners of a RoI on one axis, in the image.
template <class T>
DETOPS_HD RoiAxis<T> roi_axis(T low, T high, T scale, const RoiOptions& options, int bins, int size) {
  RoiAxis<T> axis{options.rule, bins, size, T(0), T(0), T(0), 0};
  T extent;
  if (options.rule == RoiRule::kAlign) {
    const T offset = options.aligned ? T(0.5) : T(0);
    axis.start = low * scale - offset;
    extent = high * scale - offset - axis.start;
    if (!options.aligned && extent < T(1)) extent = T(1);
    axis.bin = extent / static_cast<T>(bins);
    axis.samples = options.sampling_ratio > 0 ? static_cast<T>(options.sampling_ratio) : std::ceil(axis.bin);
    // Adaptive samples are at least half a pixel apart. Where rounding lumps more of them together on the map, a bin is
    // longer than 1 / (8 epsilon), and those left out weigh less than 10 epsilon in it.
    axis.visited = options.sampling_ratio > 0 ? options.sampling_ratio : 2 * int64_t(size) + 4;
  } else {
    axis.start = round_half_away(low * scale);
    const double inclusive = options.rule == RoiRule::kPool ? 1.0 : 0.0;
    const double whole = static_cast<double>(round_half_away(high * scale)) - static_cast<double>(axis.start);
    extent = static_cast<T>(whole + inclusive < 1.0 ? 1.0 : whole + inclusive);
    axis.bin = extent / static_cast<T>(bins);
    axis.samples = T(1);
  }
  if (!is_finite(low) || !is_finite(high) || !is_finite(axis.start) || !is_finite(extent) || !(axis.samples > T(0))) {
    axis.samples = T(0);
  }
  return axis;
}

template <class T>
struct Tap {
  int pixel;
  T weight;
};

// Calls tap(pixel, weight) for the pixels that bin p averages, in ascending order, each once. The weights of a bin
// whose samples all lie on the map add up to 1.
template <class T, class Tap>
DETOPS_HD void for_each_tap(const RoiAxis<T>& axis, int p, const Tap& tap) {
  if (axis.rule != RoiRule::kAlign) {
    const IndexRange pixels = axis.pixels(p);
    const T weight = T(1) / static_cast<T>(pixels.count());
    for (int64_t i = pixels.begin; i < pixels.end; ++i) tap(static_cast<int>(i), weight);
    return;
  }
  const IndexRange range = axis.samples_on_map(p);
  int pixel = -2;
  T here = T(0), next = T(0);  // weights of `pixel` and of the one behind it
  for (int64_t k = 0; k < range.count(); ++k) {
    const AxisSample<T> sample = axis_sample(axis.position(p, axis.ascending(range, k)), axis.size);
    if (sample.low != pixel) {
      if (here != T(0)) tap(pixel, here / axis.samples);
      const bool follows = sample.low == pixel + 1;
      if (!follows && next != T(0)) tap(pixel + 1, next / axis.samples);
      here = follows ? next : T(0);
      next = T(0);
      pixel = sample.low;
    }
    here += T(1) - sample.fraction;
    next += sample.fraction;
  }
  if (here != T(0)) tap(pixel, here / axis.samples);
  if (next != T(0)) tap(pixel + 1, next / axis.samples);
}

// An upper bound of the taps of bin p: two for each sample, and no more than there are pixels from the first to the
// last, since positions are monotone. At most `size` + 1.
template <class T>
DETOPS_HD int64_t most_taps_of_bin(const RoiAxis<T>& axis, int p) {
  if (axis.rule != RoiRule::kAlign) return axis.pixels(p).count();
  const IndexRange range = axis.samples_on_map(p);
  if (range.count() == 0) return 0;
  const int low = axis_sample(axis.position(p, axis.ascending(range, 0)), axis.size).low;
  const int high = axis_sample(axis.position(p, axis.ascending(range, range.count() - 1)), axis.size).low;
  return min_of(2 * range.count(), int64_t(high) - low + 2);
}

// Their sum over all bins, as long as neighbouring bins share two pixels at most. Bins of whole pixels share one, and
// so do samples but for rounding: RoIs beyond 10^6 pixels may have more taps, and are handled without a table of them.
inline int64_t most_taps(const RoiOptions& options, int bins, int size) {
  const int64_t of_map = int64_t(size) + 2 * int64_t(bins);
  if (options.rule != RoiRule::kAlign || options.sampling_ratio == 0) return of_map;
  return min_of(of_map, 2 * int64_t(options.sampling_ratio) * bins);
}

// The pixels begin .. end-1 hold all that the axis reads: the first sample of the first bin and the last of the last
// are the extremes, see position().
template <class T>
DETOPS_HD IndexRange pixels_read(const RoiAxis<T>& axis) {
  if (!(axis.samples > T(0)) || axis.size <= 0) return {0, 0};
  const int last_bin = axis.bins - 1;
  if (axis.rule != RoiRule::kAlign) return {axis.pixels(0).begin, axis.pixels(last_bin).end};
  const T first = axis.position(0, 0), last = axis.position(last_bin, axis.sample_count() - 1);
  const T low = min_of(first, last), high = max_of(first, last), size = static_cast<T>(axis.size);
  if (!(high >= T(-1)) || !(low <= size)) return {0, 0};
  const int64_t end = axis_sample(min_of(high, size), axis.size).low + int64_t(2);
  return {axis_sample(max_of(low, T(-1)), axis.size).low, min_of(end, int64_t(axis.size))};
}

// ---- several maps

constexpr int kMostLevels = 8;

template <class T>
struct RoiLevel {
  int height, width;
  T scale;  // pixels of this map per pixel of the image
};

// The maps of a pyramid, all with the same images and channels.
template <class T>
struct RoiMaps {
  int count;
  int images, channels;
  RoiLevel<T> levels[kMostLevels];
  // The area from which on a box belongs to level i or a coarser one, for i of 1 .. count-1. NaN: no box does.
  double least_area[kMostLevels];

  // The FPN paper's floor(canonical_level + log2(sqrt(area) / canonical_scale)), as a comparison of areas.
  DETOPS_HD int level_of(T area) const {
    int level = 0;
    for (int i = 1; i < count; ++i) level += static_cast<double>(area) >= least_area[i] ? 1 : 0;
    return level;
  }
};

// A RoI on its map.
template <class T>
struct RoiPlace {
  int image, level;  // image -1: there is none
  RoiAxis<T> y, x;
};

// The image that a batch index names, or -1. Fractions are cut off, as in torchvision: -0.5 names image 0, if there is
// one. Below images rounded up to T lies no number of T that is not below `images`.
template <class T>
DETOPS_HD int image_of(T index, int images) {
  return images > 0 && index > T(-1) && index < static_cast<T>(images) ? static_cast<int>(index) : -1;
}

// Of a row [batch index, x1, y1, x2, y2].
template <class T>
DETOPS_HD RoiPlace<T> place_roi(const T* row, const RoiMaps<T>& maps, const RoiOptions& options) {
  RoiPlace<T> place;
  place.image = image_of(row[0], maps.images);
  place.level = maps.level_of((row[3] - row[1]) * (row[4] - row[2]));
  const RoiLevel<T>& level = maps.levels[place.level];
  place.y = roi_axis(row[2], row[4], level.scale, options, options.bins_y, level.height);
  place.x = roi_axis(row[1], row[3], level.scale, options, options.bins_x, level.width);
  if (place.image < 0 || !(place.y.samples > T(0)) || !(place.x.samples > T(0))) {
    place.y.samples = T(0);
    place.x.samples = T(0);
  }
  return place;
}

}  // namespace DETOPS_NAMESPACE
