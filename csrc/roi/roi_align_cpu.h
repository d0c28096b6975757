// roi_align (average) and its gradient on the CPU.
//
// Contiguous maps go plane by plane, eight at a time: the rows of a bin are added up for all columns of the RoI at
// once, and then the columns, for all planes at once. With channels_last a pixel's channels are the vector, and each
// bin adds up its pixels.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "roi/roi_cpu.h"
#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 8;      // columns that are handled together
constexpr int kPlanes = 8;     // contiguous maps of an image that are read together
constexpr int kChannels = 64;  // channels whose sums are kept in registers

// ---- forward, contiguous

// The columns that are added up together: those of the RoI, extended to whole vectors where the map is wide enough.
struct Columns {
  int begin, count;
};
template <class T>
Columns columns_of(const RoiTable<T>& table, int width) {
  const int count = table.column_end - table.column_begin;
  const int whole = ceil_div(count, kLanes) * kLanes;
  if (whole > width) return {table.column_begin, count};
  return {min_of(table.column_begin, width - whole), whole};
}

// sums[j] (+)= the weighted sum of `rows` rows.
template <int rows, bool first, class S, class T>
DETOPS_HD void add_rows(const S* columns, int64_t width, const Tap<T>* taps, int count, T* __restrict__ sums) {
  const S* row[rows];
  T weight[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = columns + taps[r].pixel * width;
    weight[r] = taps[r].weight;
  }
  const auto whole = count / kLanes * kLanes;
  for (int j = 0; j < whole; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      T sum = first ? T(0) : sums[j + lane];
      for (int r = 0; r < rows; ++r) sum += weight[r] * static_cast<T>(row[r][j + lane]);
      sums[j + lane] = sum;
    }
  }
  for (int j = whole; j < count; ++j) {
    T sum = first ? T(0) : sums[j];
    for (int r = 0; r < rows; ++r) sum += weight[r] * static_cast<T>(row[r][j]);
    sums[j] = sum;
  }
}

template <bool first, class S, class T>
DETOPS_HD void add_few_rows(const S* columns, int64_t width, const Tap<T>* taps, int rows, int count, T* sums) {
  switch (rows) {
    case 1: return add_rows<1, first>(columns, width, taps, count, sums);
    case 2: return add_rows<2, first>(columns, width, taps, count, sums);
    case 3: return add_rows<3, first>(columns, width, taps, count, sums);
    default: return add_rows<4, first>(columns, width, taps, count, sums);
  }
}

// Room for what pool_planes works on.
template <class T>
struct PlaneSums {
  std::vector<T> rows;         // [kPlanes, columns]
  std::vector<T> interleaved;  // [columns, kPlanes]
  std::vector<T> bins;         // [bins, kPlanes]

  void reserve(int columns, int64_t bins_of_plane) {
    if (rows.size() < size_t(columns) * kPlanes) rows.resize(size_t(columns) * kPlanes);
    interleaved.resize(rows.size());
    bins.resize(bins_of_plane * kPlanes);
  }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DETOPS_HAS_SHUFFLE
#endif
#endif

// out[j][i] = in[i][j] for 4 x 4 values. Compilers do not find the shuffles that do it.
#if defined(DETOPS_HAS_SHUFFLE)
DETOPS_HD void transpose_four(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  typedef float Four __attribute__((vector_size(16)));
  Four row[4];
  for (int i = 0; i < 4; ++i) memcpy(&row[i], in + i * in_stride, sizeof(Four));
  const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5),
             b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5),
             d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four turned[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                          __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) memcpy(out + j * out_stride, &turned[j], sizeof(Four));
}
#endif

// out[j][i] = in[i][j] for i < rows, j < columns.
template <class S, class T>
DETOPS_HD void transpose(const T* __restrict__ in, int64_t in_stride, int64_t rows, int64_t columns,
                         S* __restrict__ out, int64_t out_stride) {
  int64_t done_rows = 0, done_columns = 0;
#if defined(DETOPS_HAS_SHUFFLE)
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
    done_rows = rows / 4 * 4;
    done_columns = columns / 4 * 4;
    for (int64_t i = 0; i < done_rows; i += 4) {
      for (int64_t j = 0; j < done_columns; j += 4) {
        transpose_four(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
      }
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < done_rows ? done_columns : 0; j < columns; ++j) {
      out[j * out_stride + i] = static_cast<S>(in[i * in_stride + j]);
    }
  }
}

// One RoI on `planes` planes. The rows of a bin are added up plane by plane, the columns of all planes at once.
template <int planes, class S, class T>
DETOPS_HD void pool_few_planes(const S* const (&left)[planes], int64_t width, const RoiTable<T>& table, int bins_x,
                               Columns columns, T* __restrict__ row_sums, T* __restrict__ interleaved,
                               T* __restrict__ bins) {
  for (int p = 0; p < table.bins_y; ++p) {
    const Taps<T> rows = table.y(p);
    const int count = columns.count;
    for (int plane = 0; plane < planes && rows.count() > 0; ++plane) {
      T* const sums = row_sums + plane * count;
      int done = min_of(rows.count(), 4);
      add_few_rows<true>(left[plane], width, rows.begin(), done, count, sums);
      for (; done < rows.count(); done += 4) {
        add_few_rows<false>(left[plane], width, rows.begin() + done, min_of(rows.count() - done, 4), count, sums);
      }
    }
    if (rows.count() > 0) {
      transpose(row_sums, count, planes, count, interleaved, planes);
    }
    for (int q = 0; q < bins_x; ++q) {
      T sums[planes] = {};
      if (rows.count() > 0) {
        for (const Tap<T>& tap : table.x(q)) {
          const T* const values = interleaved + (tap.pixel - columns.begin) * planes;
          for (int plane = 0; plane < planes; ++plane) sums[plane] += tap.weight * values[plane];
        }
      }
      for (int plane = 0; plane < planes; ++plane) *bins++ = sums[plane];
    }
  }
}

// One RoI on up to kPlanes planes.
template <class S, class T>
DETOPS_CLONES void pool_planes(const S* planes, int64_t height, int64_t width, int count, const RoiTable<T>& table,
                               int bins_x, Columns columns, T* row_sums, T* interleaved, T* bins, S* __restrict__ out) {
  const int64_t bins_of_plane = int64_t(table.bins_y) * bins_x;
  if (count == 1) {
    const S* const left[1] = {planes + columns.begin};
    pool_few_planes(left, width, table, bins_x, columns, row_sums, interleaved, bins);
    for (int64_t i = 0; i < bins_of_plane; ++i) out[i] = static_cast<S>(bins[i]);
    return;
  }
  const S* left[kPlanes];
  for (int plane = 0; plane < kPlanes; ++plane) {
    left[plane] = planes + min_of(plane, count - 1) * height * width + columns.begin;
  }
  pool_few_planes(left, width, table, bins_x, columns, row_sums, interleaved, bins);
  transpose(bins, kPlanes, bins_of_plane, count, out, bins_of_plane);
}

// ---- forward, channels_last

template <int channels, class S, class T>
DETOPS_HD void pool_bin(const S* map, int64_t row, int64_t pixel, Taps<T> rows, Taps<T> columns, S* __restrict__ out) {
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
DETOPS_CLONES void pool_pixels(const S* map, int64_t width, int64_t channels, const RoiTable<T>& table, int bins_x,
                               S* out) {
  const int64_t row = width * channels;
  for (int p = 0; p < table.bins_y; ++p) {
    for (int q = 0; q < bins_x; ++q, out += channels) {
      int64_t c = 0;
      for (; c + kChannels <= channels; c += kChannels) {
        pool_bin<kChannels>(map + c, row, channels, table.y(p), table.x(q), out + c);
      }
      for (; c + kLanes <= channels; c += kLanes) {
        pool_bin<kLanes>(map + c, row, channels, table.y(p), table.x(q), out + c);
      }
      for (; c < channels; ++c) pool_bin<1>(map + c, row, channels, table.y(p), table.x(q), out + c);
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
        pool_pixels(maps.image(table.level, table.image), maps.shape.levels[table.level].width, channels, table,
                    options.bins_x, out + table.roi * channels * bins);
      }
    });
    return;
  }
  parallel_parts(ceil_div<int64_t>(channels, kPlanes), used, [&](int64_t part, int64_t first, int64_t last) {
    const int64_t channel = part * kPlanes;
    PlaneSums<T> sums;
    for (int64_t i = first; i < last; ++i) {
      const RoiTable<T>& table = tables.all()[i];
      const RoiLevel<T>& level = maps.shape.levels[table.level];
      const Columns columns = columns_of(table, level.width);
      sums.reserve(columns.count, bins);
      const S* const planes = maps.image(table.level, table.image) + channel * level.height * level.width;
      pool_planes(planes, level.height, level.width, static_cast<int>(min_of<int64_t>(kPlanes, channels - channel)),
                  table, options.bins_x, columns, sums.rows.data(), sums.interleaved.data(), sums.bins.data(),
                  out + (table.roi * channels + channel) * bins);
    }
  });
}

// ---- backward

// Adds the gradient of one RoI to the rows row_begin .. row_end-1 of a plane; `sums` has room for `columns.count`.
template <class S, class T>
DETOPS_CLONES void spread_plane(const S* grad, const RoiTable<T>& table, int bins_x, Columns columns, int row_begin,
                                int row_end, int64_t width, T* __restrict__ sums, T* __restrict__ plane) {
  for (int p = 0; p < table.bins_y; ++p, grad += bins_x) {
    const Taps<T> rows = table.y(p);
    if (rows.count() == 0 || rows.first->pixel >= row_end || rows.last[-1].pixel < row_begin) continue;
    for (int j = 0; j < columns.count; ++j) sums[j] = T(0);
    for (int q = 0; q < bins_x; ++q) {
      const T value = static_cast<T>(grad[q]);
      for (const Tap<T>& tap : table.x(q)) sums[tap.pixel - columns.begin] += tap.weight * value;
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
DETOPS_CLONES void spread_row(const S* grad, const RoiTable<T>& table, int bins_x, int row, int64_t channels,
                              T* __restrict__ pixels) {
  for (int p = 0; p < table.bins_y; ++p) {
    for (const Tap<T>& y : table.y(p)) {
      if (y.pixel != row) continue;
      for (int q = 0; q < bins_x; ++q) {
        const S* const values = grad + (int64_t(p) * bins_x + q) * channels;
        for (const Tap<T>& x : table.x(q)) {
          const T weight = y.weight * x.weight;
          T* const pixel = pixels + x.pixel * channels;
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
              spread_row(grad + table.roi * channels * bins, table, options.bins_x, static_cast<int>(row), channels,
                         pixels);
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
          const Columns columns = columns_of(table, static_cast<int>(width));
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
