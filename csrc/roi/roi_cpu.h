// The taps of all RoIs, computed once, for the CPU kernels of what averages along both axes.
#pragma once

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "roi/roi.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct Taps {
  const Tap<T>*first, *last;
  DETOPS_HD const Tap<T>* begin() const { return first; }
  DETOPS_HD const Tap<T>* end() const { return last; }
  DETOPS_HD int count() const { return static_cast<int>(last - first); }
};

// A RoI that reads something.
template <class T>
struct RoiTable {
  int64_t roi;
  int image, level;
  int row_begin, row_end, column_begin, column_end;  // holds all that it reads
  int bins_y;
  const Tap<T>* taps;
  const int64_t* ends;  // where the taps of each bin end: bins along y, then along x

  DETOPS_HD Taps<T> y(int p) const { return {taps + (p > 0 ? ends[p - 1] : 0), taps + ends[p]}; }
  DETOPS_HD Taps<T> x(int p) const { return y(bins_y + p); }
};

// The taps of many RoIs, sorted by map, by strip of rows and from left to right, so that RoIs that lie close together
// are read one after another. The order depends on nothing but the boxes.
template <class T>
class RoiTables {
 public:
  RoiTables(const T* boxes, int64_t count, const RoiMaps<T>& maps, const RoiOptions& options) : images_(maps.images) {
    constexpr int64_t kGroup = 64;  // RoIs whose taps stand in one array
    const int64_t bins = int64_t(options.bins_y) + options.bins_x;
    const int64_t groups = ceil_div(count, kGroup);
    taps_.resize(groups);
    ends_.resize(count * bins);  // bins of both axes, each of which table_of visits once
    const Counted<int64_t> ends("roi", "ends of the taps", ends_.data(), count * bins);
    std::vector<RoiTable<T>> all(count);
    parallel_ranges(groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) {
        const int64_t begin = group * kGroup, end = min_of(begin + kGroup, count);
        std::vector<size_t> offsets;
        for (int64_t roi = begin; roi < end; ++roi) {
          offsets.push_back(taps_[group].size());
          all[roi] = table_of(boxes + 5 * roi, roi, maps, options, ends.part(roi * bins, bins), taps_[group]);
        }
        for (int64_t roi = begin; roi < end; ++roi) all[roi].taps = taps_[group].data() + offsets[roi - begin];
      }
    });
    for (const RoiTable<T>& table : all) {
      if (table.row_begin < table.row_end && table.column_begin < table.column_end) {
        tables_.push_back(table);
      } else {
        blank_.push_back(table.roi);
      }
    }
    const auto key = [](const RoiTable<T>& table) {
      constexpr int kStrip = 64;
      return std::make_tuple(table.level, table.image, table.row_begin / kStrip, table.column_begin, table.roi);
    };
    std::sort(tables_.begin(), tables_.end(),
              [&](const RoiTable<T>& a, const RoiTable<T>& b) { return key(a) < key(b); });
    map_begins_.assign(size_t(maps.count) * images_ + 1, 0);
    const Counted<int64_t> counts("roi", "RoIs of the maps", map_begins_.data(), map_begins_.size());
    for (const RoiTable<T>& table : tables_) ++counts[int64_t(table.level) * images_ + table.image + 1];
    for (size_t i = 1; i < map_begins_.size(); ++i) map_begins_[i] += map_begins_[i - 1];
  }

  const std::vector<RoiTable<T>>& all() const { return tables_; }
  // The RoIs that read nothing.
  const std::vector<int64_t>& blank() const { return blank_; }
  // Where the tables of one image's map stand in all().
  IndexRange of_map(int level, int image) const {
    const size_t i = size_t(level) * images_ + image;
    return {map_begins_[i], map_begins_[i + 1]};
  }

 private:
  static RoiTable<T> table_of(const T* box, int64_t roi, const RoiMaps<T>& maps, const RoiOptions& options,
                              const Counted<int64_t>& ends, std::vector<Tap<T>>& taps) {
    const size_t offset = taps.size();
    const RoiPlace<T> place = place_roi(box, maps, options);
    const auto add = [&](const RoiAxis<T>& axis, int64_t first_bin, int& begin, int& end) {
      begin = axis.size;
      end = 0;
      for (int p = 0; p < axis.bins; ++p) {
        for_each_tap(axis, p, [&](int pixel, T weight) {
          taps.push_back({pixel, weight});
          begin = min_of(begin, pixel);
          end = max_of(end, pixel + 1);
        });
        ends[first_bin + p] = static_cast<int64_t>(taps.size() - offset);
      }
    };
    RoiTable<T> table{roi, place.image, place.level, 0, 0, 0, 0, options.bins_y, nullptr, ends.data()};
    add(place.y, 0, table.row_begin, table.row_end);
    add(place.x, options.bins_y, table.column_begin, table.column_end);
    return table;
  }

  int images_;
  std::vector<std::vector<Tap<T>>> taps_;
  std::vector<int64_t> ends_;
  std::vector<RoiTable<T>> tables_;
  std::vector<int64_t> blank_;
  std::vector<int64_t> map_begins_;
};

// Calls body(part, first, last) on torch's threads for `parts` parts of the work and, where these are too few to keep
// all threads busy, for ranges of the `items` of each part.
template <class Body>
void parallel_parts(int64_t parts, int64_t items, const Body& body) {
  if (parts <= 0 || items <= 0) return;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t step = max_of<int64_t>(1, items / ceil_div(wanted, parts));
  const int64_t ranges = ceil_div(items, step);
  parallel_items(parts * ranges, [&](const auto& next) {
    for (int64_t i = next(); i >= 0; i = next()) {
      const int64_t first = i % ranges * step;
      body(i / ranges, first, min_of(first + step, items));
    }
  });
}

// Calls add(sums) on `count` zeros and stores the sums: in place, or through a buffer for half precision.
template <class S, class T, class Add>
void store_sums(S* out, int64_t count, std::vector<T>& buffer, const Add& add) {
  if constexpr (std::is_same_v<S, T>) {
    std::fill_n(out, count, T(0));
    add(out);
  } else {
    buffer.assign(count, T(0));
    add(buffer.data());
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<S>(buffer[i]);
  }
}

}  // namespace DETOPS_NAMESPACE
