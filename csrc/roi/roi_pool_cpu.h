// roi_pool on the CPU.
//
// Contiguous maps are read eight planes at a time: of the rows of a bin the largest in each column, eight columns
// together, and then the largest of the columns, eight planes together. With channels_last eight channels are compared
// together.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "roi/eight_cpu.h"
#include "roi/roi_cpu.h"
#include "roi/roi_max.h"

namespace DETOPS_NAMESPACE {
namespace {

// The winners of eight channels.
template <class T>
struct EightWinners {
  Eight<T> value, y, x;
};

template <class T>
using EightFlags = decltype(Eight<T>{} == Eight<T>{});

// wins(), channel by channel.
template <class T>
DETOPS_HD void eight_win(const Eight<T>& value, const Eight<T>& best, EightFlags<T>& better) {
  better = (best == best) & ~(value <= best);
}

// The pixels of the bins of a RoI.
struct PixelTable {
  int64_t roi;
  int image;
  Columns columns;  // hold those of all bins
  const IndexRange *y, *x;
};

// The tables of all RoIs, sorted so that RoIs that lie close together are read one after another.
class PixelTables {
 public:
  template <class T>
  PixelTables(const T* boxes, int64_t count, const RoiMaps<T>& maps, const RoiOptions& options) {
    // As many as follow, so that they stay where they are.
    ranges_.reserve(count * (int64_t(options.bins_y) + options.bins_x));
    for (int64_t roi = 0; roi < count; ++roi) {
      const RoiPlace<T> place = place_roi(boxes + 5 * roi, maps, options);
      const IndexRange* const y = ranges_.data() + ranges_.size();
      for (int p = 0; p < options.bins_y; ++p) ranges_.push_back(place.y.pixels(p));
      const IndexRange* const x = ranges_.data() + ranges_.size();
      for (int q = 0; q < options.bins_x; ++q) ranges_.push_back(place.x.pixels(q));
      // Bins begin and end in ascending order, as floor and ceil of rising numbers do.
      const Columns columns =
          whole_columns(static_cast<int>(x[0].begin), static_cast<int>(x[options.bins_x - 1].end), place.x.size);
      tables_.push_back({roi, place.image, columns, y, x});
    }
    const auto key = [](const PixelTable& table) {
      constexpr int kStrip = 64;
      return std::make_tuple(table.image, table.y[0].begin / kStrip, table.columns.begin, table.roi);
    };
    std::sort(tables_.begin(), tables_.end(),
              [&](const PixelTable& a, const PixelTable& b) { return key(a) < key(b); });
  }

  const PixelTable& operator[](int64_t i) const { return tables_[i]; }

 private:
  std::vector<IndexRange> ranges_;
  std::vector<PixelTable> tables_;
};

// largest_of_rows of kEights * 8 columns. The comparisons of one eight wait for one another, those of several do not.
template <bool kPositions, int kEights, class S, class T>
DETOPS_HD void largest_of_eights(const S* const (&left)[kPlanesTogether], int64_t width, IndexRange range, int first,
                                 T* __restrict__ values, T* __restrict__ rows) {
  Eight<T> best[kEights][kPlanesTogether], row[kEights][kPlanesTogether];
  for (int plane = 0; plane < kPlanesTogether; ++plane) {
    const S* const from = left[plane] + first;
    for (int k = 0; k < kEights; ++k) {
      load_eight<S, T>(from + range.begin * width + 8 * k, best[k][plane]);
      if constexpr (kPositions) row[k][plane] = Eight<T>{} + static_cast<T>(range.begin);
    }
    for (int64_t i = range.begin + 1; i < range.end; ++i) {
      for (int k = 0; k < kEights; ++k) {
        Eight<T> value;
        load_eight<S, T>(from + i * width + 8 * k, value);
        EightFlags<T> better;
        eight_win<T>(value, best[k][plane], better);
        best[k][plane] = better ? value : best[k][plane];
        if constexpr (kPositions) row[k][plane] = better ? Eight<T>{} + static_cast<T>(i) : row[k][plane];
      }
    }
  }
  for (int k = 0; k < kEights; ++k) {
    transpose_eight(best[k], values + (first + 8 * k) * kPlanesTogether, kPlanesTogether);
    if constexpr (kPositions) transpose_eight(row[k], rows + (first + 8 * k) * kPlanesTogether, kPlanesTogether);
  }
}

// The largest value of each column in the rows begin .. end-1 of eight planes and, with kPositions, the first row that
// has it. Both are [columns, planes].
template <bool kPositions, class S, class T>
DETOPS_HD void largest_of_rows(const S* const (&left)[kPlanesTogether], int64_t width, IndexRange range, int count,
                               T* __restrict__ values, T* __restrict__ rows) {
  int done = 0;
  for (; done + 16 <= count; done += 16) {
    largest_of_eights<kPositions, 2, S, T>(left, width, range, done, values, rows);
  }
  for (; done + 8 <= count; done += 8) {
    largest_of_eights<kPositions, 1, S, T>(left, width, range, done, values, rows);
  }
  for (int j = done; j < count; ++j) {
    for (int plane = 0; plane < kPlanesTogether; ++plane) {
      T best = static_cast<T>(left[plane][range.begin * width + j]), row = static_cast<T>(range.begin);
      for (int64_t i = range.begin + 1; i < range.end; ++i) {
        const T value = static_cast<T>(left[plane][i * width + j]);
        if (!wins(value, best)) continue;
        best = value;
        row = static_cast<T>(i);
      }
      values[j * kPlanesTogether + plane] = best;
      if constexpr (kPositions) rows[j * kPlanesTogether + plane] = row;
    }
  }
}

// The largest value of the columns begin .. end-1 in each of eight planes, of equal ones the first in reading order.
// Without kPositions it may be another of the equal ones, which makes a difference for 0 and -0 alone.
template <bool kPositions, class T>
DETOPS_HD void largest_of_columns(const T* values, const T* rows, int64_t begin, int64_t end, EightWinners<T>& best) {
  load_eight<T, T>(values + begin * kPlanesTogether, best.value);
  if constexpr (kPositions) {
    load_eight<T, T>(rows + begin * kPlanesTogether, best.y);
    best.x = Eight<T>{} + static_cast<T>(begin);
  }
  for (int64_t j = begin + 1; j < end; ++j) {
    Eight<T> value;
    load_eight<T, T>(values + j * kPlanesTogether, value);
    EightFlags<T> better;
    eight_win<T>(value, best.value, better);
    if constexpr (kPositions) {
      Eight<T> row;
      load_eight<T, T>(rows + j * kPlanesTogether, row);
      better |= ((value == best.value) | ((value != value) & (best.value != best.value))) & (row < best.y);
      best.y = better ? row : best.y;
      best.x = better ? Eight<T>{} + static_cast<T>(j) : best.x;
    }
    best.value = better ? value : best.value;
  }
}

// Room for what largest_in_planes works on: of eight planes, [columns, planes] and [bins, planes].
template <class T>
struct PlaneRoom {
  std::vector<T> values, rows;
  std::vector<T> bins;
};

// One RoI on up to eight planes of an image, [height, width] each.
template <bool kPositions, class S, class T>
DETOPS_CLONES void largest_in_planes(const S* planes, int64_t height, int64_t width, int64_t count,
                                     const PixelTable& table, int bins_y, int bins_x, PlaneRoom<T>& room,
                                     const MaxResult<S>& result) {
  const Columns columns = table.columns;
  const int64_t bins = int64_t(bins_y) * bins_x;
  T *const values = room.values.data(), *const rows = room.rows.data();
  T *const best = room.bins.data(), *const ys = best + bins * kPlanesTogether, *const xs = ys + bins * kPlanesTogether;
  const S* left[kPlanesTogether];
  for (int64_t plane = 0; plane < kPlanesTogether; ++plane) {
    left[plane] = planes + min_of(plane, count - 1) * height * width + columns.begin;
  }
  int64_t bin = 0;
  for (int p = 0; p < bins_y; ++p) {
    const IndexRange y = table.y[p];
    if (y.count() > 0) largest_of_rows<kPositions>(left, width, y, columns.count, values, rows);
    for (int q = 0; q < bins_x; ++q, bin += kPlanesTogether) {
      const IndexRange x = table.x[q];
      EightWinners<T> winners{Eight<T>{}, Eight<T>{} + T(kNoWinner), Eight<T>{} + T(kNoWinner)};
      if (y.count() > 0 && x.count() > 0) {
        largest_of_columns<kPositions>(values, rows, x.begin - columns.begin, x.end - columns.begin, winners);
        if constexpr (kPositions) winners.x += static_cast<T>(columns.begin);
      }
      memcpy(best + bin, &winners.value, sizeof(winners.value));
      if constexpr (kPositions) {
        memcpy(ys + bin, &winners.y, sizeof(winners.y));
        memcpy(xs + bin, &winners.x, sizeof(winners.x));
      }
    }
  }
  store_planes(best, count, bins, result.out);
  if constexpr (kPositions) {
    store_planes(ys, count, bins, result.y);
    store_planes(xs, count, bins, result.x);
  }
}

// The winner of one bin in each of `channels` channels, with channels_last.
template <class S, class T>
DETOPS_CLONES void largest_in_bin(const S* map, int64_t width, int64_t channels, IndexRange rows, IndexRange columns,
                                  int64_t index, const MaxResult<S>& result) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    EightWinners<T> best{Eight<T>{}, Eight<T>{} + static_cast<T>(rows.begin),
                         Eight<T>{} + static_cast<T>(columns.begin)};
    load_eight<S, T>(map + (rows.begin * width + columns.begin) * channels + c, best.value);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        Eight<T> value;
        load_eight<S, T>(map + (y * width + x) * channels + c, value);
        EightFlags<T> better;
        eight_win<T>(value, best.value, better);
        best.value = better ? value : best.value;
        best.y = better ? Eight<T>{} + static_cast<T>(y) : best.y;
        best.x = better ? Eight<T>{} + static_cast<T>(x) : best.x;
      }
    }
    for (int lane = 0; lane < 8; ++lane) {
      result.store(index + c + lane, {best.value[lane], best.y[lane], best.x[lane]});
    }
  }
  for (; c < channels; ++c) {
    const S* const values = map + c;
    Winner<T> best{static_cast<T>(values[(rows.begin * width + columns.begin) * channels]), static_cast<T>(rows.begin),
                   static_cast<T>(columns.begin)};
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        const T value = static_cast<T>(values[(y * width + x) * channels]);
        if (wins(value, best.value)) best = {value, static_cast<T>(y), static_cast<T>(x)};
      }
    }
    result.store(index + c, best);
  }
}

template <class S>
void roi_pool_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                  const RoiOptions& options, const MaxResult<S>& result) {
  using T = ComputeType<S>;
  const PixelTables tables(boxes, count, map.shape, options);
  const int64_t channels = map.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const int64_t height = map.shape.levels[0].height, width = map.shape.levels[0].width;
  if (map.channels_last) {
    parallel_items(count, [&](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const PixelTable& table = tables[i];
        const S* const image = map.image(0, table.image);
        for (int64_t bin = 0; bin < bins; ++bin) {
          const IndexRange rows = table.y[bin / options.bins_x], columns = table.x[bin % options.bins_x];
          const int64_t index = (table.roi * bins + bin) * channels;
          if (rows.count() > 0 && columns.count() > 0) {
            largest_in_bin<S, T>(image, width, channels, rows, columns, index, result);
          } else {
            for (int64_t c = 0; c < channels; ++c) result.store(index + c, {T(0), T(kNoWinner), T(kNoWinner)});
          }
        }
      }
    });
    return;
  }
  const auto pool = result.y == nullptr ? largest_in_planes<false, S, T> : largest_in_planes<true, S, T>;
  parallel_parts(ceil_div(channels, kPlanesTogether), count, [&](int64_t part, int64_t first, int64_t last) {
    const int64_t channel = part * kPlanesTogether;
    PlaneRoom<T> room;
    room.bins.resize(3 * bins * kPlanesTogether);
    for (int64_t i = first; i < last; ++i) {
      const PixelTable& table = tables[i];
      room.values.resize(table.columns.count * kPlanesTogether);
      room.rows.resize(room.values.size());
      pool(map.image(0, table.image) + channel * height * width, height, width,
           min_of(kPlanesTogether, channels - channel), table, options.bins_y, options.bins_x, room,
           result.from((table.roi * channels + channel) * bins));
    }
  });
}

}  // namespace
}  // namespace DETOPS_NAMESPACE
