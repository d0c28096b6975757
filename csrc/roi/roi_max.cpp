// roi_pool, roi_align in mode "max", and their gradients: schema, checks, and the CPU kernels.
#include "roi/roi_max.h"

#include <memory>

#include "roi/roi_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kPlanes = 8;     // contiguous maps of an image that are read together
constexpr int64_t kChannels = 64;  // channels of a pixel that are compared together

// ---- roi_pool

// The largest of the rows begin .. end-1 of each of `count` columns, and which row that is.
template <class S, class T>
DETOPS_CLONES void largest_of_rows(const S* columns, int64_t width, int64_t begin, int64_t end, int64_t count,
                                   T* __restrict__ values, int* __restrict__ rows) {
  const S* const first = columns + begin * width;
  for (int64_t j = 0; j < count; ++j) {
    values[j] = static_cast<T>(first[j]);
    rows[j] = static_cast<int>(begin);
  }
  for (int64_t row = begin + 1; row < end; ++row) {
    const S* const source = columns + row * width;
    for (int64_t j = 0; j < count; ++j) {
      const T value = static_cast<T>(source[j]), best = values[j];
      const bool better = (best == best) & !(value <= best);
      values[j] = better ? value : best;
      rows[j] = better ? static_cast<int>(row) : rows[j];
    }
  }
}

// The first in reading order of the largest of some columns.
template <class T>
DETOPS_HD Winner<T> largest_of_columns(const T* values, const int* rows, int64_t begin, int64_t end) {
  int64_t best = begin;
  for (int64_t j = begin + 1; j < end; ++j) {
    const bool same = values[j] == values[best] || (values[j] != values[j] && values[best] != values[best]);
    if (wins(values[j], values[best]) || (same && rows[j] < rows[best])) best = j;
  }
  return {values[best], static_cast<T>(rows[best]), static_cast<T>(best)};
}

// Compares `count` channels of a pixel with the best so far.
template <class S, class T>
DETOPS_CLONES void compare_pixel(const S* pixel, int64_t count, T y, T x, T* __restrict__ values, T* __restrict__ ys,
                                 T* __restrict__ xs) {
  for (int64_t c = 0; c < count; ++c) {
    const T value = static_cast<T>(pixel[c]), best = values[c];
    const bool better = (best == best) & !(value <= best);
    values[c] = better ? value : best;
    ys[c] = better ? y : ys[c];
    xs[c] = better ? x : xs[c];
  }
}

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
};

// One RoI on some planes of an image.
template <class S, class T>
void pool_planes(const S* planes, int64_t count, const RoiPlace<T>& place, std::vector<T>& values,
                 std::vector<int>& rows, int64_t index, const MaxResult<S>& result) {
  const int64_t width = place.x.size, height = place.y.size;
  const IndexRange columns = pixels_read(place.x);
  values.resize(columns.count());
  rows.resize(columns.count());
  for (int64_t plane = 0; plane < count; ++plane) {
    const S* const left = planes + plane * height * width + columns.begin;
    for (int p = 0; p < place.y.bins; ++p) {
      const IndexRange y = place.y.pixels(p);
      if (y.count() > 0) {
        largest_of_rows(left, width, y.begin, y.end, columns.count(), values.data(), rows.data());
      }
      for (int q = 0; q < place.x.bins; ++q, ++index) {
        const IndexRange x = place.x.pixels(q);
        Winner<T> winner{T(0), T(kNoWinner), T(kNoWinner)};
        if (y.count() > 0 && x.count() > 0) {
          winner = largest_of_columns(values.data(), rows.data(), x.begin - columns.begin, x.end - columns.begin);
          winner.x += static_cast<T>(columns.begin);
        }
        result.store(index, winner);
      }
    }
  }
}

// One RoI with channels_last.
template <class S, class T>
void pool_pixels(const S* map, int64_t channels, const RoiPlace<T>& place, int64_t index, const MaxResult<S>& result) {
  T values[kChannels], ys[kChannels], xs[kChannels];
  for (int p = 0; p < place.y.bins; ++p) {
    const IndexRange rows = place.y.pixels(p);
    for (int q = 0; q < place.x.bins; ++q, index += channels) {
      const IndexRange columns = place.x.pixels(q);
      for (int64_t first = 0; first < channels; first += kChannels) {
        const int64_t count = min_of(kChannels, channels - first);
        const bool empty = rows.count() == 0 || columns.count() == 0;
        for (int64_t c = 0; c < count; ++c) {
          const S* const start = map + (rows.begin * place.x.size + columns.begin) * channels + first;
          values[c] = empty ? T(0) : static_cast<T>(start[c]);
          ys[c] = empty ? T(kNoWinner) : static_cast<T>(rows.begin);
          xs[c] = empty ? T(kNoWinner) : static_cast<T>(columns.begin);
        }
        for (int64_t y = rows.begin; y < rows.end; ++y) {
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            compare_pixel(map + (y * place.x.size + x) * channels + first, count, static_cast<T>(y), static_cast<T>(x),
                          values, ys, xs);
          }
        }
        for (int64_t c = 0; c < count; ++c) result.store(index + first + c, {values[c], ys[c], xs[c]});
      }
    }
  }
}

// ---- both

template <class S>
void roi_max_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                 const RoiOptions& options, const MaxResult<S>& result) {
  using T = ComputeType<S>;
  const int64_t channels = map.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const int64_t height = map.shape.levels[0].height, width = map.shape.levels[0].width;
  const MapStrides strides(map.channels_last, height, width, channels);
  const int64_t together = map.channels_last ? channels : kPlanes;
  parallel_parts(ceil_div(channels, together), count, [&](int64_t part, int64_t first, int64_t last) {
    std::vector<T> values;
    std::vector<int> rows;
    for (int64_t roi = first; roi < last; ++roi) {
      const RoiPlace<T> place = place_roi(boxes + 5 * roi, map.shape, options);
      const int64_t channel = part * together, end = min_of(channel + together, channels);
      const S* const image = map.image(0, place.image);
      if (options.rule == RoiRule::kPool && map.channels_last) {
        pool_pixels(image, channels, place, roi * channels * bins, result);
      } else if (options.rule == RoiRule::kPool) {
        pool_planes(image + channel * strides.channel, end - channel, place, values, rows,
                    (roi * channels + channel) * bins, result);
      } else {
        for (int64_t bin = 0; bin < bins; ++bin) {
          const BinSamples<T> ys(place.y, static_cast<int>(bin / options.bins_x));
          const BinSamples<T> xs(place.x, static_cast<int>(bin % options.bins_x));
          for (int64_t c = channel; c < end; ++c) {
            result.store(roi * channels * bins + bin_offset(map.channels_last, c, bin, channels, bins),
                         winner_of_bin<T>(image + c * strides.channel, strides, ys, xs));
          }
        }
      }
    }
  });
}

// Parts are some channels of an image, each written by one thread, all RoIs in the order of the list.
template <class S>
void roi_max_backward_cpu(const S* grad, const ComputeType<S>* winners, const ComputeType<S>* boxes, int64_t count,
                          const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const int64_t channels = out.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const int64_t height = out.shape.levels[0].height, width = out.shape.levels[0].width;
  const MapStrides strides(out.channels_last, height, width, channels);
  const T *const ys = winners, *const xs = winners + count * channels * bins;
  const int64_t together = out.channels_last ? 16 : 1;
  const int64_t parts = ceil_div(channels, together);
  parallel_items(out.shape.images * parts, [&](const auto& next) {
    std::vector<T> sums;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int image = static_cast<int>(item / parts);
      const int64_t first = item % parts * together, used = min_of(together, channels - first);
      sums.assign(height * width * used, T(0));  // [height, width, used]
      for (int64_t roi = 0; roi < count; ++roi) {
        if (image_of(boxes[5 * roi], out.shape.images) != image) continue;
        for (int64_t i = 0; i < bins * used; ++i) {
          const int64_t c = i % used;
          const int64_t offset =
              roi * channels * bins + bin_offset(out.channels_last, first + c, i / used, channels, bins);
          if (ys[offset] < T(-1)) continue;
          const T value = static_cast<T>(grad[offset]);
          const AxisSample<T> y = axis_sample(ys[offset], static_cast<int>(height));
          const AxisSample<T> x = axis_sample(xs[offset], static_cast<int>(width));
          for (int row = y.low; row <= y.low + (y.fraction != T(0)); ++row) {
            for (int column = x.low; column <= x.low + (x.fraction != T(0)); ++column) {
              sums[(row * width + column) * used + c] += weight_in(y, row) * weight_in(x, column) * value;
            }
          }
        }
      }
      S* const target = out.image(0, image) + first * strides.channel;
      for (int64_t pixel = 0; pixel < height * width; ++pixel) {
        for (int64_t c = 0; c < used; ++c) {
          target[pixel * strides.column + c * strides.channel] = static_cast<S>(sums[pixel * used + c]);
        }
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
      roi_max_cpu<S>(map, rows.const_data_ptr<T>(), count, options,
                     {out.mutable_data_ptr<S>(), positions, keep_winners ? positions + out.numel() : nullptr});
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
