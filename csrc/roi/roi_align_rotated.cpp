// roi_align_rotated and its gradient: schema, checks, and the CPU kernels. The pixels and weights of a RoI are listed
// once and used for all channels.
#include "roi/roi_align_rotated.h"

#include "roi/roi_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kChannels = 64;  // that are added up together with channels_last
constexpr int64_t kPlanes = 8;     // contiguous maps that are read together

// The pixels that the bins of a RoI read, those of the samples of a bin one after another.
template <class T>
struct RotatedTaps {
  struct Tap {
    int64_t pixel;
    T weight;
  };
  std::vector<Tap> taps;
  std::vector<int64_t> ends;  // of each bin

  void fill(const RotatedRoi<T>& roi) {
    taps.clear();
    ends.clear();
    for (int p = 0; p < roi.v.bins; ++p) {
      for (int q = 0; q < roi.u.bins; ++q) {
        roi.for_each_sample(p, q, [&](const AxisSample<T>& y, const AxisSample<T>& x) {
          for (int row = 0; row <= (y.fraction != T(0)); ++row) {
            for (int column = 0; column <= (x.fraction != T(0)); ++column) {
              const T y_weight = row ? y.fraction : T(1) - y.fraction;
              const T x_weight = column ? x.fraction : T(1) - x.fraction;
              taps.push_back({int64_t(y.low + row) * roi.width + x.low + column, roi.weight(y_weight * x_weight)});
            }
          }
        });
        ends.push_back(static_cast<int64_t>(taps.size()));
      }
    }
  }

  int64_t begin(int64_t bin) const { return bin > 0 ? ends[bin - 1] : 0; }
};

// sums[c] += weight * values[c]
template <class S, class T>
DETOPS_CLONES void add_channels(const S* values, T weight, int64_t count, T* __restrict__ sums) {
  for (int64_t c = 0; c < count; ++c) sums[c] += weight * static_cast<T>(values[c]);
}

template <class S>
void roi_align_rotated_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                           const RoiOptions& options, S* out) {
  using T = ComputeType<S>;
  const int64_t bins = int64_t(options.bins_y) * options.bins_x, channels = map.shape.channels;
  const MapStrides strides(map.channels_last, map.shape.levels[0].height, map.shape.levels[0].width, channels);
  parallel_items(count, [&](const auto& next) {
    RotatedTaps<T> taps;
    T sums[kChannels];
    for (int64_t roi = next(); roi >= 0; roi = next()) {
      const RotatedRoi<T> place = place_rotated(boxes + 6 * roi, map.shape, options);
      taps.fill(place);
      const S* const image = map.image(0, max_of(place.image, 0));
      S* const result = out + roi * channels * bins;
      const int64_t together = map.channels_last ? kChannels : kPlanes;
      for (int64_t first = 0; first < channels; first += together) {
        const int64_t used = min_of(together, channels - first);
        for (int64_t bin = 0; bin < bins; ++bin) {
          std::fill_n(sums, used, T(0));
          for (int64_t i = taps.begin(bin); i < taps.ends[bin]; ++i) {
            const auto& tap = taps.taps[i];
            const S* const pixel = image + tap.pixel * strides.column + first * strides.channel;
            if (map.channels_last) {
              add_channels(pixel, tap.weight, used, sums);
            } else {
              for (int64_t c = 0; c < used; ++c) {
                sums[c] += tap.weight * static_cast<T>(pixel[c * strides.channel]);
              }
            }
          }
          for (int64_t c = 0; c < used; ++c) {
            result[bin_offset(map.channels_last, first + c, bin, channels, bins)] = static_cast<S>(sums[c]);
          }
        }
      }
    }
  });
}

// Parts are some channels of an image, each written by one thread, all RoIs in the order of the list.
template <class S>
void roi_align_rotated_backward_cpu(const S* grad, const ComputeType<S>* boxes, int64_t count,
                                    const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const int64_t bins = int64_t(options.bins_y) * options.bins_x, channels = out.shape.channels;
  const int64_t pixels = out.pixels(0);
  const MapStrides strides(out.channels_last, out.shape.levels[0].height, out.shape.levels[0].width, channels);
  std::vector<RotatedTaps<T>> taps(count);
  parallel_items(count, [&](const auto& next) {
    for (int64_t roi = next(); roi >= 0; roi = next()) {
      taps[roi].fill(place_rotated(boxes + 6 * roi, out.shape, options));
    }
  });
  const int64_t together = min_of<int64_t>(16, channels);
  const int64_t parts = ceil_div(channels, together);
  parallel_items(out.shape.images * parts, [&](const auto& next) {
    std::vector<T> sums;
    std::vector<T> values(together);
    for (int64_t item = next(); item >= 0; item = next()) {
      const int image = static_cast<int>(item / parts);
      const int64_t first = item % parts * together, used = min_of(together, channels - first);
      sums.assign(pixels * used, T(0));  // [pixels, used]
      for (int64_t roi = 0; roi < count; ++roi) {
        if (taps[roi].taps.empty() || image_of(boxes[6 * roi], out.shape.images) != image) continue;
        const S* const of_roi = grad + roi * channels * bins;
        for (int64_t bin = 0; bin < bins; ++bin) {
          for (int64_t c = 0; c < used; ++c) {
            values[c] = static_cast<T>(of_roi[bin_offset(out.channels_last, first + c, bin, channels, bins)]);
          }
          for (int64_t i = taps[roi].begin(bin); i < taps[roi].ends[bin]; ++i) {
            add_channels(values.data(), taps[roi].taps[i].weight, used, sums.data() + taps[roi].taps[i].pixel * used);
          }
        }
      }
      S* const target = out.image(0, image) + first * strides.channel;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t c = 0; c < used; ++c) {
          target[pixel * strides.column + c * strides.channel] = static_cast<S>(sums[pixel * used + c]);
        }
      }
    }
  });
}

Tensor roi_align_rotated(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t bins_y, int64_t bins_x,
                         int64_t sampling_ratio) {
  const char* const op = "roi_align_rotated";
  const RoiOptions options = roi_options(RoiRule::kAlign, bins_y, bins_x, sampling_ratio, true);
  check_map(op, "input", input);
  check_roi_boxes(op, boxes, 6, "input", input);
  const bool channels_last = is_channels_last(input);
  const Tensor dense = in_format(input, channels_last), rows = as_contiguous(boxes);
  const int64_t count = boxes.size(0);
  const Tensor out = allocate_in_format(op, {count, input.size(1), options.bins_y, options.bins_x}, channels_last,
                                        input.scalar_type(), input);
  const bool gpu = on_gpu(op, input);
  dispatch_floating(input.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 6, input.size(0));
    if (out.numel() == 0) return;
    const auto map = one_map<S>({input.size(0), input.size(1), input.size(2), input.size(3)}, spatial_scale,
                                channels_last, dense.const_data_ptr<S>());
    if (gpu) {
      DETOPS_GPU_ONLY(roi_align_rotated_cuda<S>(map, rows, options, out));
    } else {
      roi_align_rotated_cpu<S>(map, rows.const_data_ptr<T>(), count, options, out.mutable_data_ptr<S>());
    }
  });
  return out;
}

Tensor roi_align_rotated_backward(const Tensor& grad, const Tensor& boxes, std::vector<int64_t> sizes,
                                  double spatial_scale, int64_t bins_y, int64_t bins_x, int64_t sampling_ratio,
                                  bool channels_last) {
  const char* const op = "roi_align_rotated";
  const RoiOptions options = roi_options(RoiRule::kAlign, bins_y, bins_x, sampling_ratio, true);
  const int64_t count = boxes.size(0);
  check_floating(op, "grad", grad);
  check_shape(op, "grad", grad, "[K, C, bins, bins]", {count, sizes[1], options.bins_y, options.bins_x});
  check_roi_boxes(op, boxes, 6, "grad", grad);
  const Tensor dense = in_format(grad, channels_last), rows = as_contiguous(boxes);
  const Tensor out = allocate_in_format(op, sizes, channels_last, grad.scalar_type(), grad);
  const bool gpu = on_gpu(op, grad);
  dispatch_floating(grad.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    if (!gpu) check_images(op, rows.const_data_ptr<T>(), count, 6, sizes[0]);
    if (out.numel() == 0) return;
    const auto map = one_map<S>(sizes, spatial_scale, channels_last, out.mutable_data_ptr<S>());
    if (gpu) {
      DETOPS_GPU_ONLY(roi_align_rotated_backward_cuda<S>(dense, rows, options, map));
    } else {
      roi_align_rotated_backward_cpu<S>(dense.const_data_ptr<S>(), rows.const_data_ptr<T>(), count, options, map);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(DETOPS_NAMESPACE, m) {
  m.def(
      "roi_align_rotated(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, "
      "int sampling_ratio) -> Tensor");
  m.def(
      "roi_align_rotated_backward(Tensor grad, Tensor boxes, SymInt[] sizes, float spatial_scale, SymInt bins_y, "
      "SymInt bins_x, int sampling_ratio, bool channels_last) -> Tensor");
}

DETOPS_REGISTER(m) {
  m.impl("roi_align_rotated", TORCH_BOX(&roi_align_rotated));
  m.impl("roi_align_rotated_backward", TORCH_BOX(&roi_align_rotated_backward));
}

}  // namespace DETOPS_NAMESPACE
