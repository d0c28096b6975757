// roi_align_rotated and its gradient: schema, checks, and the CPU kernels. The pixels and weights of a RoI are listed
// once for many channels, but never all at once: a bin may have millions of them.
#include "roi/roi_align_rotated.h"
#include "common/register.h"

#include "roi/eight_cpu.h"
#include "roi/roi_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kBlock = 4096;            // taps that are listed at once
constexpr int64_t kGradientsTogether = 16;  // channels whose gradients are added up together

template <class T>
struct PixelTap {
  int64_t pixel;
  T weight;
};

// Some of the pixels that a RoI reads, those of the samples of a bin one after another.
template <class T>
struct TapBlock {
  int64_t first_bin;
  bool resumes_first, cuts_last;  // bins that began in the block before, or end in the next one
  std::vector<PixelTap<T>> taps;
  std::vector<int64_t> ends;  // of the taps of each bin

  void start(int64_t bin, bool resumes) {
    first_bin = bin;
    resumes_first = resumes;
    taps.clear();
    ends.clear();
  }

  const PixelTap<T>* begin(size_t i) const { return taps.data() + (i > 0 ? ends[i - 1] : 0); }
  const PixelTap<T>* end(size_t i) const { return taps.data() + ends[i]; }
};

// Calls body() with the block filled anew, with up to `limit` taps, until all bins of the RoI have been in it.
template <class T, class Body>
void for_each_block(const RotatedRoi<T>& roi, TapBlock<T>& block, int64_t limit, const Body& body) {
  block.start(0, false);
  const auto finish = [&](bool cuts) {
    block.cuts_last = cuts;
    body();
  };
  for (int64_t p = 0, bin = 0; p < roi.v.bins; ++p) {
    for (int64_t q = 0; q < roi.u.bins; ++q, ++bin) {
      roi.for_each_sample(
          static_cast<int>(p), static_cast<int>(q), [&](const AxisSample<T>& y, const AxisSample<T>& x) {
            if (int64_t(block.taps.size()) + 4 > limit) {
              block.ends.push_back(static_cast<int64_t>(block.taps.size()));
              finish(true);
              block.start(bin, true);
            }
            for (int row = 0; row <= (y.fraction != T(0)); ++row) {
              for (int column = 0; column <= (x.fraction != T(0)); ++column) {
                const T y_weight = row ? y.fraction : T(1) - y.fraction;
                const T x_weight = column ? x.fraction : T(1) - x.fraction;
                block.taps.push_back(
                    {int64_t(y.low + row) * roi.width + x.low + column, roi.weight(y_weight * x_weight)});
              }
            }
          });
      block.ends.push_back(static_cast<int64_t>(block.taps.size()));
    }
  }
  finish(false);
}

// An upper bound of the taps of a RoI: for_each_sample visits every pair of these rows and columns, and a sample reads
// four pixels at most.
template <class T>
int64_t most_taps(const RotatedRoi<T>& roi) {
  double rows = 0, columns = 0;  // may exceed any integer
  for (int p = 0; p < roi.v.bins; ++p) rows += static_cast<double>(roi.rows(p).count());
  for (int q = 0; q < roi.u.bins; ++q) columns += static_cast<double>(roi.columns(q).count());
  return static_cast<int64_t>(min_of(4 * rows * columns, 1e18));
}

// Adds what a bin reads in kEights * 8 neighbouring channels, whose sums stay in registers.
template <int kEights, class S, class T>
DETOPS_HD void gather_eights(const S* map, int64_t column, const PixelTap<T>* tap, const PixelTap<T>* end, T* sums) {
  Eight<T> added[kEights];
  memcpy(added, sums, sizeof(added));
  for (; tap != end; ++tap) {
    const S* const pixel = map + tap->pixel * column;
    for (int i = 0; i < kEights; ++i) {
      Eight<T> values;
      load_eight<S, T>(pixel + 8 * i, values);
      added[i] += tap->weight * values;
    }
  }
  memcpy(sums, added, sizeof(added));
}

// Adds what a bin reads in `kPlanes` planes.
template <int kPlanes, class S, class T>
DETOPS_HD void gather_planes(const S* map, int64_t plane, const PixelTap<T>* tap, const PixelTap<T>* end, T* sums) {
  T added[kPlanes];
  for (int c = 0; c < kPlanes; ++c) added[c] = sums[c];
  for (; tap != end; ++tap) {
    const S* const pixel = map + tap->pixel;
    for (int c = 0; c < kPlanes; ++c) added[c] += tap->weight * static_cast<T>(pixel[c * plane]);
  }
  for (int c = 0; c < kPlanes; ++c) sums[c] = added[c];
}

// Adds what a bin reads to the sums of `count` channels.
template <class S, class T>
DETOPS_CLONES void gather(const S* map, const MapStrides& strides, const PixelTap<T>* tap, const PixelTap<T>* end,
                          int64_t count, T* sums) {
  int64_t c = 0;
  if (strides.channel == 1) {
    for (; c + 64 <= count; c += 64) gather_eights<8>(map + c, strides.column, tap, end, sums + c);
    for (; c + 16 <= count; c += 16) gather_eights<2>(map + c, strides.column, tap, end, sums + c);
    for (; c + 8 <= count; c += 8) gather_eights<1>(map + c, strides.column, tap, end, sums + c);
  } else {
    for (; c + 8 <= count; c += 8) gather_planes<8>(map + c * strides.channel, strides.channel, tap, end, sums + c);
  }
  for (; c < count; ++c) {
    T sum = sums[c];
    for (const PixelTap<T>* i = tap; i != end; ++i) {
      sum += i->weight * static_cast<T>(map[i->pixel * strides.column + c * strides.channel]);
    }
    sums[c] = sum;
  }
}

// Adds the gradients of a bin's `count` channels to those of the pixels that it reads, [pixels, count].
template <class T>
DETOPS_CLONES void scatter(const T* values, const PixelTap<T>* tap, const PixelTap<T>* end, int64_t count,
                           const Counted<T>& sums) {
  if (count == kGradientsTogether) {
    Eight<T> low, high;
    load_eight<T, T>(values, low);
    load_eight<T, T>(values + 8, high);
    for (; tap != end; ++tap) {
      T* const pixel = sums.part(tap->pixel * kGradientsTogether, kGradientsTogether).data();
      Eight<T> of_pixel;
      load_eight<T, T>(pixel, of_pixel);
      of_pixel += tap->weight * low;
      memcpy(pixel, &of_pixel, sizeof(of_pixel));
      load_eight<T, T>(pixel + 8, of_pixel);
      of_pixel += tap->weight * high;
      memcpy(pixel + 8, &of_pixel, sizeof(of_pixel));
    }
    return;
  }
  for (; tap != end; ++tap) {
    T* const __restrict__ pixel = sums.part(tap->pixel * count, count).data();
    for (int64_t c = 0; c < count; ++c) pixel[c] += tap->weight * values[c];
  }
}

template <class S>
void roi_align_rotated_cpu(const RoiTensors<ComputeType<S>, const S>& map, const ComputeType<S>* boxes, int64_t count,
                           const RoiOptions& options, S* out) {
  using T = ComputeType<S>;
  const int64_t bins = int64_t(options.bins_y) * options.bins_x, channels = map.shape.channels;
  const MapStrides strides(map.channels_last, map.shape.levels[0].height, map.shape.levels[0].width, channels);
  const int64_t together = map.channels_last ? kChannelsTogether : kPlanesTogether;
  parallel_items(count, [&](const auto& next) {
    TapBlock<T> block;
    std::vector<T> cut(channels);  // sums of a bin that goes on in the next block
    T sums[max_of(kChannelsTogether, kPlanesTogether)];
    for (int64_t roi = next(); roi >= 0; roi = next()) {
      const RotatedRoi<T> place = place_rotated(boxes + 6 * roi, map.shape, options);
      const S* const image = map.image(0, max_of(place.image, 0));
      S* const result = out + roi * channels * bins;
      for_each_block(place, block, kBlock, [&] {
        for (int64_t first = 0; first < channels; first += together) {
          const int64_t used = min_of(together, channels - first);
          for (size_t i = 0; i < block.ends.size(); ++i) {
            if (i == 0 && block.resumes_first) {
              std::copy_n(cut.data() + first, used, sums);
            } else {
              std::fill_n(sums, used, T(0));
            }
            gather(image + first * strides.channel, strides, block.begin(i), block.end(i), used, sums);
            if (i + 1 == block.ends.size() && block.cuts_last) {
              std::copy_n(sums, used, cut.data() + first);
              continue;
            }
            const int64_t bin = block.first_bin + static_cast<int64_t>(i);
            for (int64_t c = 0; c < used; ++c) {
              result[bin_offset(map.channels_last, first + c, bin, channels, bins)] = static_cast<S>(sums[c]);
            }
          }
        }
      });
    }
  });
}

// The taps of the first RoIs of the list, as many as fit into about the memory of the maps. For the others the blocks
// are left empty, and each thread lists their taps when it needs them.
template <class T>
std::vector<TapBlock<T>> keep_taps(const T* boxes, int64_t count, const RoiMaps<T>& maps, const RoiOptions& options) {
  std::vector<int64_t> most(count);
  parallel_ranges(count, 1, [&](int64_t first, int64_t last) {
    for (int64_t roi = first; roi < last; ++roi) most[roi] = most_taps(place_rotated(boxes + 6 * roi, maps, options));
  });
  const int64_t elements = int64_t(maps.images) * maps.channels * maps.levels[0].height * maps.levels[0].width;
  int64_t room = elements / 4, used = 0;
  while (used < count && most[used] <= room) room -= most[used++];
  std::vector<TapBlock<T>> kept(count);
  parallel_items(used, [&](const auto& next) {
    for (int64_t roi = next(); roi >= 0; roi = next()) {
      kept[roi].taps.reserve(most[roi]);
      for_each_block(place_rotated(boxes + 6 * roi, maps, options), kept[roi], most[roi] + 4, [] {});
    }
  });
  return kept;
}

// Parts are some channels of an image, each written by one thread, all RoIs in the order of the list.
template <class S>
void roi_align_rotated_backward_cpu(const S* grad, const ComputeType<S>* boxes, int64_t count,
                                    const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const int64_t bins = int64_t(options.bins_y) * options.bins_x, channels = out.shape.channels;
  const int64_t pixels = out.pixels(0);
  const MapStrides strides(out.channels_last, out.shape.levels[0].height, out.shape.levels[0].width, channels);
  const std::vector<TapBlock<T>> kept = keep_taps(boxes, count, out.shape, options);
  const int64_t parts = ceil_div(channels, kGradientsTogether);
  parallel_items(out.shape.images * parts, [&](const auto& next) {
    TapBlock<T> listed;
    std::vector<T> sums;
    T values[kGradientsTogether];
    for (int64_t item = next(); item >= 0; item = next()) {
      const int image = static_cast<int>(item / parts);
      const int64_t first = item % parts * kGradientsTogether, used = min_of(kGradientsTogether, channels - first);
      sums.assign(pixels * used, T(0));  // [pixels, used]
      const Counted<T> into("roi_align_rotated", "gradients of the map", sums.data(), pixels * used);
      const auto add = [&](int64_t roi, const TapBlock<T>& block) {
        for (size_t i = 0; i < block.ends.size(); ++i) {
          if (block.begin(i) == block.end(i)) continue;
          const int64_t bin = block.first_bin + static_cast<int64_t>(i);
          for (int64_t c = 0; c < used; ++c) {
            const int64_t offset = bin_offset(out.channels_last, first + c, bin, channels, bins);
            values[c] = static_cast<T>(grad[roi * channels * bins + offset]);
          }
          scatter(values, block.begin(i), block.end(i), used, into);
        }
      };
      for (int64_t roi = 0; roi < count; ++roi) {
        if (image_of(boxes[6 * roi], out.shape.images) != image) continue;
        if (kept[roi].ends.empty()) {
          const RotatedRoi<T> place = place_rotated(boxes + 6 * roi, out.shape, options);
          for_each_block(place, listed, kBlock, [&] { add(roi, listed); });
        } else {
          add(roi, kept[roi]);
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
  const RoiOptions options = roi_options(op, RoiRule::kAlign, bins_y, bins_x, sampling_ratio, true);
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
  const RoiOptions options = roi_options(op, RoiRule::kAlign, bins_y, bins_x, sampling_ratio, true);
  check_map_sizes(op, sizes);
  check_floating(op, "grad", grad);
  check_roi_boxes(op, boxes, 6, "grad", grad);
  const int64_t count = boxes.size(0);
  check_shape(op, "grad", grad, "[K, C, bins, bins]", {count, sizes[1], options.bins_y, options.bins_x});
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

DETOPS_OPS(ops) {
  ops.add<&roi_align_rotated>(
      "roi_align_rotated(Tensor input, Tensor boxes, float spatial_scale, SymInt bins_y, SymInt bins_x, "
      "int sampling_ratio) -> Tensor");
  ops.add<&roi_align_rotated_backward>(
      "roi_align_rotated_backward(Tensor grad, Tensor boxes, SymInt[] sizes, float spatial_scale, SymInt bins_y, "
      "SymInt bins_x, int sampling_ratio, bool channels_last) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
