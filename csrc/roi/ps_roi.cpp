// ps_roi_align, ps_roi_pool and their gradients: schema, checks, and the CPU kernels.
#include "roi/ps_roi.h"
#include "common/register.h"

#include "roi/roi_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

// Channels of a bin that are read together, from planes far apart. Each is a chain of additions: five hide the latency
// of one another, and were faster than ten.
constexpr int kChannelsAtOnce = 5;

// A bin of a RoI in `lanes` channels that are `apart` from each other.
template <int lanes, class S, class T>
DETOPS_HD void average_some(const S* map, const MapStrides& strides, int64_t apart, Taps<T> rows, Taps<T> columns,
                            S* out, int64_t out_apart) {
  T sums[lanes] = {};
  for (const Tap<T>& y : rows) {
    T of_row[lanes] = {};
    for (const Tap<T>& x : columns) {
      const S* const pixel = map + y.pixel * strides.row + x.pixel * strides.column;
      for (int lane = 0; lane < lanes; ++lane) of_row[lane] += x.weight * static_cast<T>(pixel[lane * apart]);
    }
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += y.weight * of_row[lane];
  }
  for (int lane = 0; lane < lanes; ++lane) out[lane * out_apart] = static_cast<S>(sums[lane]);
}

// A bin of a RoI in all of its channels.
template <class S, class T>
DETOPS_CLONES void average_bin(const S* map, const MapStrides& strides, int64_t apart, Taps<T> rows, Taps<T> columns,
                               int64_t channels, S* out, int64_t out_apart) {
  int64_t c = 0;
  const auto take = [&](auto lanes) __attribute__((always_inline)) {
    average_some<lanes>(map + c * apart, strides, apart, rows, columns, out + c * out_apart, out_apart);
    c += lanes;
  };
  while (c + kChannelsAtOnce <= channels) take(std::integral_constant<int, kChannelsAtOnce>{});
  switch (channels - c) {  // fewer than that
    case 4: return take(std::integral_constant<int, 4>{});
    case 3: return take(std::integral_constant<int, 3>{});
    case 2: return take(std::integral_constant<int, 2>{});
    case 1: return take(std::integral_constant<int, 1>{});
    default: return;
  }
}

template <class S>
void ps_roi_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                const RoiOptions& options, S* out) {
  using T = ComputeType<S>;
  const RoiTables<T> tables(boxes, count, map.shape, options);
  const int bins = options.bins_y * options.bins_x;
  const int64_t channels = map.shape.channels, used = static_cast<int64_t>(tables.all().size());
  const MapStrides strides(map.channels_last, map.shape.levels[0].height, map.shape.levels[0].width, channels);
  const int64_t out_apart = map.channels_last ? 1 : bins;
  const auto pool = [&](const RoiTable<T>& table, int bin) {
    average_bin<S, T>(map.image(0, table.image) + bin * strides.channel, strides, bins * strides.channel,
                      table.y(bin / options.bins_x), table.x(bin % options.bins_x), channels / bins,
                      out + table.roi * channels + bin_offset(map.channels_last, 0, bin, channels / bins, bins),
                      out_apart);
  };
  for (int64_t roi : tables.blank()) std::fill_n(out + roi * channels, channels, S(0));
  // What a thread reads should lie together: the channels of a bin, or the pixels of a RoI.
  const int64_t parts = map.channels_last ? used : bins;
  parallel_items(parts, [&](const auto& next) {
    for (int64_t part = next(); part >= 0; part = next()) {
      if (map.channels_last) {
        for (int bin = 0; bin < bins; ++bin) pool(tables.all()[part], bin);
      } else {
        for (const RoiTable<T>& table : tables.all()) pool(table, static_cast<int>(part));
      }
    }
  });
}

// Parts are channels of an image, or rows of it with channels_last. Each is written by one thread, all RoIs in one
// order.
template <class S>
void ps_roi_backward_cpu(const char* op, const S* grad, const ComputeType<S>* boxes, int64_t count,
                         const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const RoiTables<T> tables(boxes, count, out.shape, options);
  const int64_t bins = int64_t(options.bins_y) * options.bins_x, channels = out.shape.channels;
  const int64_t height = out.shape.levels[0].height, width = out.shape.levels[0].width;
  const int64_t parts = out.channels_last ? height : channels;
  parallel_items(out.shape.images * parts, [&](const auto& next) {
    std::vector<T> buffer;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int image = static_cast<int>(item / parts);
      const int64_t part = item % parts;
      const int bin_of_part = static_cast<int>(part % bins);
      const IndexRange range = tables.of_map(0, image);
      const int64_t size = out.channels_last ? width * channels : height * width;
      store_sums(out.image(0, image) + part * size, size, buffer, [&](T* room) {
        const Counted<T> target(op, "gradients of the map", room, size);
        for (int64_t i = range.begin; i < range.end; ++i) {
          const RoiTable<T>& table = tables.all()[i];
          const S* const values = grad + table.roi * channels;
          if (!out.channels_last) {
            const T value = static_cast<T>(values[part]);
            for (const Tap<T>& y : table.y(bin_of_part / options.bins_x)) {
              for (const Tap<T>& x : table.x(bin_of_part % options.bins_x)) {
                target[y.pixel * width + x.pixel] += y.weight * x.weight * value;
              }
            }
            continue;
          }
          if (part < table.row_begin || part >= table.row_end) continue;
          for (int bin = 0; bin < bins; ++bin) {
            for (const Tap<T>& y : table.y(bin / options.bins_x)) {
              if (y.pixel != part) continue;
              for (const Tap<T>& x : table.x(bin % options.bins_x)) {
                const T weight = y.weight * x.weight;
                for (int64_t c = 0; c < channels / bins; ++c) {
                  target[x.pixel * channels + c * bins + bin] +=
                      weight * static_cast<T>(values[bin * (channels / bins) + c]);
                }
              }
            }
          }
        }
      });
    }
  });
}

void check_channels(const char* op, int64_t channels, const RoiOptions& options) {
  const int64_t bins = int64_t(options.bins_y) * options.bins_x;
  if (channels % bins == 0) return;
  fail(op, "input must have a multiple of " + std::to_string(bins) + " channels, one for each bin, got " +
               std::to_string(channels));
}

Tensor pool(const char* op, const Tensor& input, const Tensor& boxes, double spatial_scale, const RoiOptions& options) {
  check_map(op, "input", input);
  check_roi_boxes(op, boxes, 5, "input", input);
  check_channels(op, input.size(1), options);
  const bool channels_last = is_channels_last(input);
  const Tensor dense = in_format(input, channels_last), rows = as_contiguous(boxes);
  const int64_t count = boxes.size(0), bins = int64_t(options.bins_y) * options.bins_x;
  const Tensor out = allocate_in_format(op, {count, input.size(1) / bins, options.bins_y, options.bins_x},
                                        channels_last, input.scalar_type(), input);
  const bool gpu = on_gpu(op, input);
  dispatch_floating(input.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 5, input.size(0));
    if (out.numel() == 0) return;
    const auto map = one_map<S>({input.size(0), input.size(1), input.size(2), input.size(3)}, spatial_scale,
                                channels_last, dense.const_data_ptr<S>());
    if (gpu) {
      DETOPS_GPU_ONLY(ps_roi_cuda<S>(op, map, rows, options, out));
    } else {
      ps_roi_cpu<S>(map, rows.const_data_ptr<T>(), count, options, out.mutable_data_ptr<S>());
    }
  });
  return out;
}

Tensor pool_backward(const char* op, const Tensor& grad, const Tensor& boxes, const std::vector<int64_t>& sizes,
                     double spatial_scale, const RoiOptions& options, bool channels_last) {
  check_map_sizes(op, sizes);
  check_floating(op, "grad", grad);
  check_channels(op, sizes[1], options);
  check_roi_boxes(op, boxes, 5, "grad", grad);
  const int64_t count = boxes.size(0), bins = int64_t(options.bins_y) * options.bins_x;
  check_shape(op, "grad", grad, "[K, C / bins, bins, bins]", {count, sizes[1] / bins, options.bins_y, options.bins_x});
  const Tensor dense = in_format(grad, channels_last), rows = as_contiguous(boxes);
  const Tensor out = allocate_in_format(op, sizes, channels_last, grad.scalar_type(), grad);
  const bool gpu = on_gpu(op, grad);
  dispatch_floating(grad.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 5, sizes[0]);
    if (out.numel() == 0) return;
    const auto map = one_map<S>(sizes, spatial_scale, channels_last, out.mutable_data_ptr<S>());
    if (gpu) {
      DETOPS_GPU_ONLY(ps_roi_backward_cuda<S>(op, dense, rows, options, map));
    } else {
      ps_roi_backward_cpu<S>(op, dense.const_data_ptr<S>(), rows.const_data_ptr<T>(), count, options, map);
    }
  });
  return out;
}

Tensor ps_roi_align(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y, int64_t bins_x,
                    int64_t sampling_ratio) {
  return pool("ps_roi_align", input, boxes, spatial_scale,
              roi_options("ps_roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, true));
}

Tensor ps_roi_align_backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes, double spatial_scale,
                             int64_t bins_y, int64_t bins_x, int64_t sampling_ratio, bool channels_last) {
  return pool_backward("ps_roi_align", grad, boxes, sizes, spatial_scale,
                       roi_options("ps_roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, true),
                       channels_last);
}

Tensor ps_roi_pool(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y, int64_t bins_x) {
  return pool("ps_roi_pool", input, boxes, spatial_scale,
              roi_options("ps_roi_pool", RoiRule::kPsPool, bins_y, bins_x, 0, false));
}

Tensor ps_roi_pool_backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes, double spatial_scale,
                            int64_t bins_y, int64_t bins_x, bool channels_last) {
  return pool_backward("ps_roi_pool", grad, boxes, sizes, spatial_scale,
                       roi_options("ps_roi_pool", RoiRule::kPsPool, bins_y, bins_x, 0, false), channels_last);
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&ps_roi_align>(
      "ps_roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, "
      "int sampling_ratio) -> Tensor");
  ops.add<&ps_roi_align_backward>(
      "ps_roi_align_backward(Tensor grad, Tensor boxes, SymInt[] sizes, float spatial_scale, SymInt bins_y, "
      "SymInt bins_x, int sampling_ratio, bool channels_last) -> Tensor");
  ops.add<&ps_roi_pool>(
      "ps_roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x) -> Tensor");
  ops.add<&ps_roi_pool_backward>(
      "ps_roi_pool_backward(Tensor grad, Tensor boxes, SymInt[] sizes, float spatial_scale, SymInt bins_y, "
      "SymInt bins_x, bool channels_last) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
