// roi_pool, roi_align in mode "max", and their gradients: schema, checks, and the CPU kernels other than roi_pool's.
#include "roi/roi_max.h"
#include "common/register.h"

#include <tuple>
#include <vector>

#include "roi/roi_pool_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

template <class S>
void roi_align_max_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                       const RoiOptions& options, const MaxResult<S>& result) {
  using T = ComputeType<S>;
  const int64_t channels = map.shape.channels, bins = int64_t(options.bins_y) * options.bins_x;
  const MapStrides strides(map.channels_last, map.shape.levels[0].height, map.shape.levels[0].width, channels);
  const int64_t together = map.channels_last ? channels : kPlanesTogether;
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

// Adds the gradient of a bin to the pixels that its winner at (y, x) read: of [height, width, channels] the sums of
// channel c.
template <class T>
DETOPS_HD void add_to_winner(T grad, T y, T x, int height, int width, int64_t channels, int64_t c,
                             const Counted<T>& sums) {
  // As is_on_map, in one branch.
  const bool on_map = (y >= T(-1)) & (y <= static_cast<T>(height)) & (x >= T(-1)) & (x <= static_cast<T>(width));
  if (!on_map) return;
  const AxisSample<T> ys = axis_sample(y, height), xs = axis_sample(x, width);
  for (int row = ys.low; row <= ys.low + (ys.fraction != T(0)); ++row) {
    for (int column = xs.low; column <= xs.low + (xs.fraction != T(0)); ++column) {
      sums[(int64_t(row) * width + column) * channels + c] += weight_in(ys, row) * weight_in(xs, column) * grad;
    }
  }
}

// Parts are a plane of an image, or some channels with channels_last. Each is written by one thread, all RoIs in the
// order of the list.
template <class S>
void roi_max_backward_cpu(const char* op, const S* grad, const ComputeType<S>* winners, const ComputeType<S>* boxes,
                          int64_t count, const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
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
      const auto add = [&](T* room) {  // [pixels, used]
        const Counted<T> into(op, "gradients of the map", room, pixels * used);
        for (int64_t roi = 0; roi < count; ++roi) {
          if (image_of(boxes[5 * roi], out.shape.images) != image) continue;
          for (int64_t bin = 0; bin < bins; ++bin) {
            const int64_t offset = roi * channels * bins + bin_offset(out.channels_last, first, bin, channels, bins);
            for (int64_t c = 0; c < used; ++c) {
              const int64_t i = offset + c;
              add_to_winner(static_cast<T>(grad[i]), ys[i], xs[i], height, width, used, c, into);
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
  check_map_sizes(op, sizes);
  check_floating(op, "grad", grad);
  check_roi_boxes(op, boxes, 5, "grad", grad);
  const int64_t count = boxes.size(0);
  check_shape(op, "grad", grad, "[K, C, bins, bins]", {count, sizes[1], options.bins_y, options.bins_x});
  check_shape(op, "winners", winners, "[2, elements of grad]", {2, grad.numel()});
  check_same_dtype(op, "winners", winners, "boxes", boxes);
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
      roi_max_backward_cpu<S>(op, dense.const_data_ptr<S>(), positions.const_data_ptr<T>(), rows.const_data_ptr<T>(),
                              count, options, map);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> roi_pool(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y,
                                    int64_t bins_x, bool keep_winners) {
  return pool("roi_pool", input, boxes, spatial_scale,
              roi_options("roi_pool", RoiRule::kPool, bins_y, bins_x, 0, false), keep_winners);
}

Tensor roi_pool_backward(const Tensor& grad, const Tensor& winners, const Tensor& boxes, std::vector<int64_t> sizes,
                         double spatial_scale, int64_t bins_y, int64_t bins_x, bool channels_last) {
  return pool_backward("roi_pool", grad, winners, boxes, sizes, spatial_scale,
                       roi_options("roi_pool", RoiRule::kPool, bins_y, bins_x, 0, false), channels_last);
}

std::tuple<Tensor, Tensor> roi_align_max(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y,
                                         int64_t bins_x, int64_t sampling_ratio, bool aligned, bool keep_winners) {
  return pool("roi_align", input, boxes, spatial_scale,
              roi_options("roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned), keep_winners);
}

Tensor roi_align_max_backward(const Tensor& grad, const Tensor& winners, const Tensor& boxes,
                              std::vector<int64_t> sizes, double spatial_scale, int64_t bins_y, int64_t bins_x,
                              int64_t sampling_ratio, bool aligned, bool channels_last) {
  return pool_backward("roi_align", grad, winners, boxes, sizes, spatial_scale,
                       roi_options("roi_align", RoiRule::kAlign, bins_y, bins_x, sampling_ratio, aligned),
                       channels_last);
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&roi_pool>(
      "roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, bool keep_winners) -> "
      "(Tensor, Tensor)");
  ops.add<&roi_pool_backward>(
      "roi_pool_backward(Tensor grad, Tensor winners, Tensor boxes, SymInt[] sizes, float spatial_scale, "
      "SymInt bins_y, SymInt bins_x, bool channels_last) -> Tensor");
  ops.add<&roi_align_max>(
      "roi_align_max(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, "
      "int sampling_ratio, bool aligned, bool keep_winners) -> (Tensor, Tensor)");
  ops.add<&roi_align_max_backward>(
      "roi_align_max_backward(Tensor grad, Tensor winners, Tensor boxes, SymInt[] sizes, float spatial_scale, "
      "SymInt bins_y, SymInt bins_x, int sampling_ratio, bool aligned, bool channels_last) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
