// roi_pool, roi_align in mode "max", and their gradients: schema, checks, and the CPU kernels.
#include "roi/roi_max.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "roi/eight_cpu.h"
#include "roi/roi_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kPlanes = 8;  // of contiguous maps, that are compared together

template <class S>
struct MaxResult {
  using T = ComputeType<S>;
  S* out;
  T *y, *x;  // null where no winners are wanted

  void store(int64_t i, const Winner<T>& winner) const {
    out[i] = static_cast<S>(winner.value);
    if (y == nullptr) return;
    y[i] = winner.y;
    x[i] = winner.x;
  }

  // The same from the i-th on.
  MaxResult from(int64_t i) const {
    if (y == nullptr) return {out + i, nullptr, nullptr};
    return {out + i, y + i, x + i};
  }
};

// ---- roi_pool

// The winners of eight channels.
template <class T>
struct EightWinners {
  Eight<T> value, y, x;
};

template <class T>
using EightFlags = decltype(Eight<T>{} == Eight<T>{});

// As wins().
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

// Those of all RoIs, in an order in which what lies close is read shortly after one another.
class PixelTables {
 public:
  template <class T>
  PixelTables(const T* boxes, int64_t count, const RoiMaps<T>& maps, const RoiOptions& options) {
    ranges_.reserve(count * (options.bins_y + options.bins_x));
    for (int64_t roi = 0; roi < count; ++roi) {
      const RoiPlace<T> place = place_roi(boxes + 5 * roi, maps, options);
      const IndexRange* const y = ranges_.data() + ranges_.size();
      for (int p = 0; p < options.bins_y; ++p) ranges_.push_back(place.y.pixels(p));
      const IndexRange* const x = ranges_.data() + ranges_.size();
      for (int q = 0; q < options.bins_x; ++q) ranges_.push_back(place.x.pixels(q));
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

// largest_of_rows of some times eight columns: the chains of comparisons of each eight run side by side.
template <bool kPositions, int kEights, class S, class T>
DETOPS_HD void largest_of_eights(const S* const (&left)[kPlanes], int64_t width, IndexRange range, int first,
                                 T* __restrict__ values, T* __restrict__ rows) {
  Eight<T> best[kEights][kPlanes], row[kEights][kPlanes];
  for (int plane = 0; plane < kPlanes; ++plane) {
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
    transpose_eight(best[k], values + (first + 8 * k) * kPlanes, kPlanes);
    if constexpr (kPositions) transpose_eight(row[k], rows + (first + 8 * k) * kPlanes, kPlanes);
  }
}

// Of rows begin .. end-1 the largest value in each column of eight planes, and, where wanted, the first row that has
// it: [columns, planes].
template <bool kPositions, class S, class T>
DETOPS_HD void largest_of_rows(const S* const (&left)[kPlanes], int64_t width, IndexRange range, int count,
                               T* __restrict__ values, T* __restrict__ rows) {
  int done = 0;
  for (; done + 16 <= count; done += 16) {
    largest_of_eights<kPositions, 2, S, T>(left, width, range, done, values, rows);
  }
  for (; done + 8 <= count; done += 8) {
    largest_of_eights<kPositions, 1, S, T>(left, width, range, done, values, rows);
  }
  for (int j = done; j < count; ++j) {
    for (int plane = 0; plane < kPlanes; ++plane) {
      T best = static_cast<T>(left[plane][range.begin * width + j]), row = static_cast<T>(range.begin);
      for (int64_t i = range.begin + 1; i < range.end; ++i) {
        const T value = static_cast<T>(left[plane][i * width + j]);
        if (!wins(value, best)) continue;
        best = value;
        row = static_cast<T>(i);
      }
      values[j * kPlanes + plane] = best;
      if constexpr (kPositions) rows[j * kPlanes + plane] = row;
    }
  }
}

// Of some columns of eight planes the largest, the first in reading order. Without positions another of equal values
// may be taken, which differs for zeros of both signs alone.
template <bool kPositions, class T>
DETOPS_HD void largest_of_columns(const T* values, const T* rows, int64_t begin, int64_t end, EightWinners<T>& best) {
  load_eight<T, T>(values + begin * kPlanes, best.value);
  if constexpr (kPositions) {
    load_eight<T, T>(rows + begin * kPlanes, best.y);
    best.x = Eight<T>{} + static_cast<T>(begin);
  }
  for (int64_t j = begin + 1; j < end; ++j) {
    Eight<T> value;
    load_eight<T, T>(values + j * kPlanes, value);
    EightFlags<T> better;
    eight_win<T>(value, best.value, better);
    if constexpr (kPositions) {
      Eight<T> row;
      load_eight<T, T>(rows + j * kPlanes, row);
      better |= ((value == best.value) | ((value != value) & (best.value != best.value))) & (row < best.y);
      best.y = better ? row : best.y;
      best.x = better ? Eight<T>{} + static_cast<T>(j) : best.x;
    }
    best.value = better ? value : best.value;
  }
}

// Room for what pool_planes works on: of eight planes, [columns, planes] and [bins, planes].
template <class T>
struct PlaneRoom {
  std::vector<T> values, rows;
  std::vector<T> bins;
};

// One RoI on up to eight planes of an image, [height, width] each.
template <bool kPositions, class S, class T>
DETOPS_CLONES void pool_planes(const S* planes, int64_t height, int64_t width, int64_t count, const PixelTable& table,
                               int bins_y, int bins_x, PlaneRoom<T>& room, const MaxResult<S>& result) {
  const Columns columns = table.columns;
  const int64_t bins = int64_t(bins_y) * bins_x;
  T *const values = room.values.data(), *const rows = room.rows.data();
  T *const best = room.bins.data(), *const ys = best + bins * kPlanes, *const xs = ys + bins * kPlanes;
  const S* left[kPlanes];
  for (int64_t plane = 0; plane < kPlanes; ++plane) {
    left[plane] = planes + min_of(plane, count - 1) * height * width + columns.begin;
  }
  int64_t bin = 0;
  for (int p = 0; p < bins_y; ++p) {
    const IndexRange y = table.y[p];
    if (y.count() > 0) largest_of_rows<kPositions>(left, width, y, columns.count, values, rows);
    for (int q = 0; q < bins_x; ++q, bin += kPlanes) {
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
DETOPS_CLONES void pool_bin(const S* map, int64_t width, int64_t channels, IndexRange rows, IndexRange columns,
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
            pool_bin<S, T>(image, width, channels, rows, columns, index, result);
          } else {
            for (int64_t c = 0; c < channels; ++c) result.store(index + c, {T(0), T(kNoWinner), T(kNoWinner)});
          }
        }
      }
    });
    return;
  }
  const auto pool = result.y == nullptr ? pool_planes<false, S, T> : pool_planes<true, S, T>;
  parallel_parts(ceil_div(channels, kPlanes), count, [&](int64_t part, int64_t first, int64_t last) {
    const int64_t channel = part * kPlanes;
    PlaneRoom<T> room;
    room.bins.resize(3 * bins * kPlanes);
    for (int64_t i = first; i < last; ++i) {
      const PixelTable& table = tables[i];
      room.values.resize(table.columns.count * kPlanes);
      room.rows.resize(room.values.size());
      pool(map.image(0, table.image) + channel * height * width, height, width, min_of(kPlanes, channels - channel),
           table, options.bins_y, options.bins_x, room, result.from((table.roi * channels + channel) * bins));
    }
  });
}

// ---- roi_align

template <class S>
void roi_align_max_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                       const RoiOptions& options, const MaxResult<S>& result) {
  using T = ComputeType<S>;
  const int64_t channels = map.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const MapStrides strides(map.channels_last, map.shape.levels[0].height, map.shape.levels[0].width, channels);
  const int64_t together = map.channels_last ? channels : kPlanes;
  parallel_parts(ceil_div(channels, together), count, [&](int64_t part, int64_t first, int64_t last) {
    for (int64_t roi = first; roi < last; ++roi) {
      const RoiPlace<T> place = place_roi(boxes + 5 * roi, map.shape, options);
      const int64_t channel = part * together, end = min_of(channel + together, channels);
      const S* const image = map.image(0, place.image);
      for (int64_t bin = 0; bin < bins; ++bin) {
        const BinSamples<T> ys(place.y, static_cast<int>(bin / options.bins_x));
        const BinSamples<T> xs(place.x, static_cast<int>(bin % options.bins_x));
        for (int64_t c = channel; c < end; ++c) {
          result.store(roi * channels * bins + bin_offset(map.channels_last, c, bin, channels, bins),
                       winner_of_bin<T>(image + c * strides.channel, strides, ys, xs));
        }
      }
    }
  });
}

// ---- both

// Adds the gradient of a bin to the pixels that its winner at (y, x) read, [height, width, channels].
template <class T>
DETOPS_HD void add_to_winner(T grad, T y, T x, int height, int width, int64_t channels, T* sums) {
  if (y < T(-1)) return;
  const AxisSample<T> ys = axis_sample(y, height), xs = axis_sample(x, width);
  for (int row = ys.low; row <= ys.low + (ys.fraction != T(0)); ++row) {
    for (int column = xs.low; column <= xs.low + (xs.fraction != T(0)); ++column) {
      sums[(int64_t(row) * width + column) * channels] += weight_in(ys, row) * weight_in(xs, column) * grad;
    }
  }
}

// Parts are a plane of an image, or some channels with channels_last. Each is written by one thread, all RoIs in the
// order of the list.
template <class S>
void roi_max_backward_cpu(const S* grad, const ComputeType<S>* winners, const ComputeType<S>* boxes, int64_t count,
                          const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const int64_t channels = out.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const int height = out.shape.levels[0].height, width = out.shape.levels[0].width;
  const int64_t pixels = out.pixels(0);
  const T *const ys = winners, *const xs = winners + count * channels * bins;
  const int64_t together = out.channels_last ? 16 : 1;
  const int64_t parts = ceil_div(channels, together);
  parallel_items(out.shape.images * parts, [&](const auto& next) {
    std::vector<T> sums;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int image = static_cast<int>(item / parts);
      const int64_t first = item % parts * together, used = min_of(together, channels - first);
      const auto add = [&](T* into) {  // [pixels, used]
        for (int64_t roi = 0; roi < count; ++roi) {
          if (image_of(boxes[5 * roi], out.shape.images) != image) continue;
          for (int64_t bin = 0; bin < bins; ++bin) {
            const int64_t offset = roi * channels * bins + bin_offset(out.channels_last, first, bin, channels, bins);
            for (int64_t c = 0; c < used; ++c) {
              const int64_t i = offset + c;
              add_to_winner(static_cast<T>(grad[i]), ys[i], xs[i], height, width, used, into + c);
            }
          }
        }
      };
      if (!out.channels_last) {
        store_sums(out.image(0, image) + first * pixels, pixels, sums, add);
        continue;
      }
      sums.assign(pixels * used, T(0));
      add(sums.data());
      S* const target = out.image(0, image) + first;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t c = 0; c < used; ++c) target[pixel * channels + c] = static_cast<S>(sums[pixel * used + c]);
      }
    }
  });
}

std::tuple<Tensor, Tensor> pool(const char* op, const Tensor& input, const Tensor& boxes, double spatial_scale,
                                const RoiOptions& options, bool keep_winners) {
  check_map(op, "input", input);
  check_roi_boxes(op, boxes, 5, "input", input);
  const bool channels_last = is_channels_last(input);
  const Tensor dense = in_format(input, channels_last), rows = as_contiguous(boxes);
  const int64_t count = boxes.size(0), channels = input.size(1);
  const Tensor out = allocate_in_format(op, {count, channels, options.bins_y, options.bins_x}, channels_last,
                                        input.scalar_type(), input);
  const Tensor winners = allocate(op, {keep_winners ? 2 : 0, out.numel()}, compute_dtype(input.scalar_type()), input);
  const bool gpu = on_gpu(op, input);
  dispatch_floating(input.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 5, input.size(0));
    if (out.numel() == 0) return;
    const auto map = one_map<S>({input.size(0), channels, input.size(2), input.size(3)}, spatial_scale, channels_last,
                                dense.const_data_ptr<S>());
    T* const positions = keep_winners ? winners.mutable_data_ptr<T>() : nullptr;
    if (gpu) {
      DETOPS_GPU_ONLY(roi_max_cuda<S>(map, rows, options, out, positions));
    } else {
      const MaxResult<S> result{out.mutable_data_ptr<S>(), positions, keep_winners ? positions + out.numel() : nullptr};
      if (options.rule == RoiRule::kPool) {
        roi_pool_cpu<S>(map, rows.const_data_ptr<T>(), count, options, result);
      } else {
        roi_align_max_cpu<S>(map, rows.const_data_ptr<T>(), count, options, result);
      }
    }
  });
  return {out, winners};
}

Tensor pool_backward(const char* op, const Tensor& grad, const Tensor& winners, const Tensor& boxes,
                     const std::vector<int64_t>& sizes, double spatial_scale, const RoiOptions& options,
                     bool channels_last) {
  const int64_t count = boxes.size(0);
  check_floating(op, "grad", grad);
  check_shape(op, "grad", grad, "[K, C, bins, bins]", {count, sizes[1], options.bins_y, options.bins_x});
  check_roi_boxes(op, boxes, 5, "grad", grad);
  check_shape(op, "winners", winners, "[2, elements of grad]", {2, grad.numel()});
  check_same_device(op, "winners", winners, "grad", grad);
  const Tensor dense = in_format(grad, channels_last), rows = as_contiguous(boxes), positions = as_contiguous(winners);
  const Tensor out = allocate_in_format(op, sizes, channels_last, grad.scalar_type(), grad);
  const bool gpu = on_gpu(op, grad);
  dispatch_floating(grad.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 5, sizes[0]);
    if (out.numel() == 0) return;
    const auto map = one_map<S>(sizes, spatial_scale, channels_last, out.mutable_data_ptr<S>());
    if (gpu) {
      DETOPS_GPU_ONLY(roi_max_backward_cuda<S>(op, dense, positions.const_data_ptr<T>(), rows, options, map));
    } else {
      roi_max_backward_cpu<S>(dense.const_data_ptr<S>(), positions.const_data_ptr<T>(), rows.const_data_ptr<T>(), count,
                              options, map);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> roi_pool(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y,
                                    int64_t bins_x, bool keep_winners) {
  return pool("roi_pool", input, boxes, spatial_scale, roi_options(RoiRule::kPool, bins_y, bins_x, 0, false),
              keep_winners);
}

Tensor roi_pool_backward(const Tensor& grad, const Tensor& winners, const Tensor& boxes, std::vector<int64_t> sizes,
                         double spatial_scale, int64_t bins_y, int64_t bins_x, bool channels_last) {
  return pool_backward("roi_pool", grad, winners, boxes, sizes, spatial_scale,
                       roi_options(RoiRule::kPool, bins_y, bins_x, 0, false), channels_last);
}

std::tuple<Tensor, Tensor> roi_align_max(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y,
                                         int64_t bins_x, int64_t sampling_ratio, bool aligned, bool keep_winners) {
  return pool("roi_align", input, boxes, spatial_scale,
              roi_options(RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned), keep_winners);
}

Tensor roi_align_max_backward(const Tensor& grad, const Tensor& winners, const Tensor& boxes,
                              std::vector<int64_t> sizes, double spatial_scale, int64_t bins_y, int64_t bins_x,
                              int64_t sampling_ratio, bool aligned, bool channels_last) {
  return pool_backward("roi_align", grad, winners, boxes, sizes, spatial_scale,
                       roi_options(RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned), channels_last);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(DETOPS_NAMESPACE, m) {
  m.def(
      "roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, bool keep_winners) -> "
      "(Tensor, Tensor)");
  m.def(
      "roi_pool_backward(Tensor grad, Tensor winners, Tensor boxes, SymInt[] sizes, float spatial_scale, "
      "SymInt bins_y, SymInt bins_x, bool channels_last) -> Tensor");
  m.def(
      "roi_align_max(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, "
      "int sampling_ratio, bool aligned, bool keep_winners) -> (Tensor, Tensor)");
  m.def(
      "roi_align_max_backward(Tensor grad, Tensor winners, Tensor boxes, SymInt[] sizes, float spatial_scale, "
      "SymInt bins_y, SymInt bins_x, int sampling_ratio, bool aligned, bool channels_last) -> Tensor");
}

DETOPS_REGISTER(m) {
  m.impl("roi_pool", TORCH_BOX(&roi_pool));
  m.impl("roi_pool_backward", TORCH_BOX(&roi_pool_backward));
  m.impl("roi_align_max", TORCH_BOX(&roi_align_max));
  m.impl("roi_align_max_backward", TORCH_BOX(&roi_align_max_backward));
}

}  // namespace DETOPS_NAMESPACE
