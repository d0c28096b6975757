// roi_align (average) and its gradient on the CPU.
//
// Contiguous maps are read eight planes at a time: the rows of a bin are added up, eight columns together, and then
// the columns, eight planes together. With channels_last a pixel's channels are the vector, and each
// bin adds up its pixels.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "roi/eight_cpu.h"
#include "roi/roi_cpu.h"
#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 8;  // columns or channels that are handled together

// ---- forward, contiguous

// Room for what average_planes works on. `columns` holds those from the first to the last pixel that a tap of the RoI
// reads, which is how RoiTable finds them.
template <class T>
struct PlaneSums {
  std::vector<T> columns;  // [columns, kPlanesTogether]
  std::vector<T> bins;     // [bins, kPlanesTogether]

  void reserve(int count, int64_t bins_of_plane) {
    if (columns.size() < size_t(count) * kPlanesTogether) columns.resize(size_t(count) * kPlanesTogether);
    bins.resize(bins_of_plane * kPlanesTogether);
  }
};

// sums[j][plane] = the weighted sum of rows in column j.
template <int planes, class S, class T>
DETOPS_HD void add_rows(const S* const (&left)[planes], int64_t width, Taps<T> rows, int count, T* __restrict__ sums) {
  int done = 0;
  if constexpr (planes == 8) {
    for (; done + 8 <= count; done += 8) {
      Eight<T> added[8] = {};
      for (const Tap<T>& tap : rows) {
        const int64_t offset = tap.pixel * width + done;
        for (int plane = 0; plane < 8; ++plane) {
          Eight<T> values;
          load_eight<S, T>(left[plane] + offset, values);
          added[plane] += tap.weight * values;
        }
      }
      transpose_eight(added, sums + done * planes, planes);
    }
  }
  for (int plane = 0; plane < planes; ++plane) {
    for (int j = done; j < count; ++j) {
      T sum = 0;
      for (const Tap<T>& tap : rows) sum += tap.weight * static_cast<T>(left[plane][tap.pixel * width + j]);
      sums[j * planes + plane] = sum;
    }
  }
}

// One RoI on `planes` planes: the rows of a bin are added up for all columns, and then these, for all planes at once.
template <int planes, class S, class T>
DETOPS_HD void average_few_planes(const S* const (&left)[planes], int64_t width, const RoiTable<T>& table, int bins_x,
                                  Columns columns, T* __restrict__ column_sums, T* __restrict__ bins) {
  for (int p = 0; p < table.bins_y; ++p) {
    const Taps<T> rows = table.y(p);
    if (rows.count() > 0) add_rows(left, width, rows, columns.count, column_sums);
    for (int q = 0; q < bins_x; ++q) {
      T sums[planes] = {};
      if (rows.count() > 0) {
        for (const Tap<T>& tap : table.x(q)) {
          const T* const values = column_sums + (tap.pixel - columns.begin) * planes;
          for (int plane = 0; plane < planes; ++plane) sums[plane] += tap.weight * values[plane];
        }
      }
      for (int plane = 0; plane < planes; ++plane) *bins++ = sums[plane];
    }
  }
}

// One RoI on up to kPlanesTogether planes.
template <class S, class T>
DETOPS_CLONES void average_planes(const S* planes, int64_t height, int64_t width, int count, const RoiTable<T>& table,
                                  int bins_x, Columns columns, PlaneSums<T>& room, S* __restrict__ out) {
  const int64_t bins_of_plane = int64_t(table.bins_y) * bins_x;
  T* const bins = room.bins.data();
  if (count == 1) {
    const S* const left[1] = {planes + columns.begin};
    average_few_planes(left, width, table, bins_x, columns, room.columns.data(), bins);
    for (int64_t i = 0; i < bins_of_plane; ++i) out[i] = static_cast<S>(bins[i]);
    return;
  }
  const S* left[kPlanesTogether];
  for (int plane = 0; plane < kPlanesTogether; ++plane) {
    left[plane] = planes + min_of(plane, count - 1) * height * width + columns.begin;
  }
  average_few_planes(left, width, table, bins_x, columns, room.columns.data(), bins);
  store_planes(bins, count, bins_of_plane, out);
}

// ---- forward, channels_last

template <int channels, class S, class T>
DETOPS_HD void average_bin(const S* map, int64_t row, int64_t pixel, Taps<T> rows, Taps<T> columns,
                           S* __restrict__ out) {
  T sums[channels] = {};
  for (const Tap<T>& y : rows) {
    for (const Tap<T>& x : columns) {
      const S* const values = map + y.pixel * row + x.pixel * pixel;
      const T weight = y.weight * x.weight;
      for (int c = 0; c < channels; ++c) sums[c] += weight * static_cast<T>(values[c]);
    }
  }
  for (int c = 0; c < channels; ++c) out[c] = static_cast<S>(sums[c]);
}

// One RoI on an image's map: [bins_y, bins_x, channels].
template <class S, class T>
DETOPS_CLONES void average_pixels(const S* map, int64_t width, int64_t channels, const RoiTable<T>& table, int bins_x,
                                  S* out) {
  const int64_t row = width * channels;
  for (int p = 0; p < table.bins_y; ++p) {
    for (int q = 0; q < bins_x; ++q, out += channels) {
      int64_t c = 0;
      for (; c + kChannelsTogether <= channels; c += kChannelsTogether) {
        average_bin<kChannelsTogether>(map + c, row, channels, table.y(p), table.x(q), out + c);
      }
      for (; c + kLanes <= channels; c += kLanes) {
        average_bin<kLanes>(map + c, row, channels, table.y(p), table.x(q), out + c);
      }
      for (; c < channels; ++c) average_bin<1>(map + c, row, channels, table.y(p), table.x(q), out + c);
    }
  }
}

template <class S>
void roi_align_cpu(const RoiTensors<ComputeType<S>, const S>& maps, const ComputeType<S>* boxes, int64_t count,
                   const RoiOptions& options, S* out) {
  using T = ComputeType<S>;
  const RoiTables<T> tables(boxes, count, maps.shape, options);
  const int64_t channels = maps.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const int64_t used = static_cast<int64_t>(tables.all().size());
  for (int64_t roi : tables.blank()) std::fill_n(out + roi * channels * bins, channels * bins, S(0));
  if (maps.channels_last) {
    parallel_items(used, [&](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const RoiTable<T>& table = tables.all()[i];
        average_pixels(maps.image(table.level, table.image), maps.shape.levels[table.level].width, channels, table,
                       options.bins_x, out + table.roi * channels * bins);
      }
    });
    return;
  }
  parallel_parts(ceil_div<int64_t>(channels, kPlanesTogether), used, [&](int64_t part, int64_t first, int64_t last) {
    const int64_t channel = part * kPlanesTogether;
    PlaneSums<T> sums;
    for (int64_t i = first; i < last; ++i) {
      const RoiTable<T>& table = tables.all()[i];
      const RoiLevel<T>& level = maps.shape.levels[table.level];
      const Columns columns = whole_columns(table.column_begin, table.column_end, level.width);
      sums.reserve(columns.count, bins);
      const S* const planes = maps.image(table.level, table.image) + channel * level.height * level.width;
      average_planes(planes, level.height, level.width,
                     static_cast<int>(min_of<int64_t>(kPlanesTogether, channels - channel)), table, options.bins_x,
                     columns, sums, out + (table.roi * channels + channel) * bins);
    }
  });
}

// ---- backward

// Adds the gradient of one RoI to the rows row_begin .. row_end-1 of a plane; `sums` has room for `columns.count`.
template <class S, class T>
DETOPS_CLONES void spread_plane(const S* grad, const RoiTable<T>& table, int bins_x, Columns columns, int row_begin,
                                int row_end, int64_t width, T* __restrict__ sums, T* __restrict__ plane) {
  const Counted<T> of_columns("roi_align", "sums of the columns", sums, columns.count);
  for (int p = 0; p < table.bins_y; ++p, grad += bins_x) {
    const Taps<T> rows = table.y(p);
    if (rows.count() == 0 || rows.first->pixel >= row_end || rows.last[-1].pixel < row_begin) continue;
    for (int j = 0; j < columns.count; ++j) sums[j] = T(0);
    for (int q = 0; q < bins_x; ++q) {
      const T value = static_cast<T>(grad[q]);
      for (const Tap<T>& tap : table.x(q)) of_columns[tap.pixel - columns.begin] += tap.weight * value;
    }
    for (const Tap<T>& tap : rows) {
      if (tap.pixel < row_begin || tap.pixel >= row_end) continue;
      T* const row = plane + tap.pixel * width + columns.begin;
      const int whole = columns.count / kLanes * kLanes;
      for (int j = 0; j < whole; j += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) row[j + lane] += tap.weight * sums[j + lane];
      }
      for (int j = whole; j < columns.count; ++j) row[j] += tap.weight * sums[j];
    }
  }
}

// Adds the gradient of one RoI to one row of a map, [width, channels].
template <class S, class T>
DETOPS_CLONES void spread_row(const S* grad, const RoiTable<T>& table, int bins_x, int row, int64_t width,
                              int64_t channels, T* pixels) {
  const Counted<T> of_row("roi_align", "gradients of a row", pixels, width * channels);
  for (int p = 0; p < table.bins_y; ++p) {
    for (const Tap<T>& y : table.y(p)) {
      if (y.pixel != row) continue;
      for (int q = 0; q < bins_x; ++q) {
        const S* const values = grad + (int64_t(p) * bins_x + q) * channels;
        for (const Tap<T>& x : table.x(q)) {
          const T weight = y.weight * x.weight;
          T* const __restrict__ pixel = of_row.part(x.pixel * channels, channels).data();
          for (int64_t c = 0; c < channels; ++c) pixel[c] += weight * static_cast<T>(values[c]);
        }
      }
    }
  }
}

template <class S>
void roi_align_backward_cpu(const S* grad, const ComputeType<S>* boxes, int64_t count, const RoiOptions& options,
                            const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const RoiTables<T> tables(boxes, count, out.shape, options);
  const int64_t channels = out.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  for (int level = 0; level < out.shape.count; ++level) {
    const int64_t height = out.shape.levels[level].height, width = out.shape.levels[level].width;
    // A part is written by one thread, all RoIs in one order.
    const int64_t parts = out.channels_last ? out.shape.images : out.shape.images * channels;
    parallel_parts(parts, height, [&](int64_t part, int64_t row_begin, int64_t row_end) {
      const int image = static_cast<int>(out.channels_last ? part : part / channels);
      const IndexRange range = tables.of_map(level, image);
      std::vector<T> buffer, sums;
      if (out.channels_last) {
        for (int64_t row = row_begin; row < row_end; ++row) {
          store_sums(out.image(level, image) + row * width * channels, width * channels, buffer, [&](T* pixels) {
            for (int64_t i = range.begin; i < range.end; ++i) {
              const RoiTable<T>& table = tables.all()[i];
              if (row < table.row_begin || row >= table.row_end) continue;
              spread_row(grad + table.roi * channels * bins, table, options.bins_x, static_cast<int>(row), width,
                         channels, pixels);
            }
          });
        }
        return;
      }
      const int64_t channel = part % channels;
      S* const rows = out.image(level, image) + (channel * height + row_begin) * width;
      store_sums(rows, (row_end - row_begin) * width, buffer, [&](T* target) {
        for (int64_t i = range.begin; i < range.end; ++i) {
          const RoiTable<T>& table = tables.all()[i];
          if (row_end <= table.row_begin || row_begin >= table.row_end) continue;
          const Columns columns = whole_columns(table.column_begin, table.column_end, static_cast<int>(width));
          if (sums.size() < size_t(columns.count)) sums.resize(columns.count);
          spread_plane(grad + (table.roi * channels + channel) * bins, table, options.bins_x, columns,
                       static_cast<int>(row_begin), static_cast<int>(row_end), width, sums.data(),
                       target - row_begin * width);
        }
      });
    });
  }
}

}  // namespace
}  // namespace DETOPS_NAMESPACE
