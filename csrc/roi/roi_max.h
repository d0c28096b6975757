// Maxima over the bins of RoIs, of pixels (roi_pool) or of bilinear samples (roi_align in mode "max"): what the entries
// and the launches share.
//
// The winner of a bin is the first of the largest in reading order; the first NaN wins over everything, as in torch's
// max_pool2d. It is kept for the gradient as its position: winners [2, K, ...], y then x, in the compute type; off the
// map where a bin is empty or a sample off the map, which counts as 0, wins.
#pragma once

#include "common/counted.h"
#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {

constexpr int kNoWinner = -2;  // a position that no sample on the map has

// True if `value`, which comes later, takes the place of `best`.
template <class T>
DETOPS_HD bool wins(T value, T best) {
  return best == best && !(value <= best);
}

template <class T>
struct Winner {
  T value, y, x;
};

// The samples of a bin along one axis, as positions. A pixel is a sample at a whole number.
template <class T>
struct BinSamples {
  RoiAxis<T> axis;
  int p;
  IndexRange range;
  bool all_on_map;

  DETOPS_HD BinSamples(const RoiAxis<T>& axis, int p)
      : axis(axis),
        p(p),
        range(axis.rule == RoiRule::kAlign ? axis.samples_on_map(p) : axis.pixels(p)),
        all_on_map(axis.rule != RoiRule::kAlign || static_cast<T>(range.count()) == axis.samples) {}

  DETOPS_HD T position(int64_t i) const {
    return axis.rule == RoiRule::kAlign ? axis.position(p, i) : static_cast<T>(i);
  }
};

// The bilinear value at a position on the map. Pixels of weight 0 are not read.
template <class T, class S>
DETOPS_HD T value_at(const S* plane, const MapStrides& strides, const AxisSample<T>& y, const AxisSample<T>& x) {
  const S* const row = plane + y.low * strides.row + x.low * strides.column;
  T sum = (T(1) - y.fraction) * (T(1) - x.fraction) * static_cast<T>(row[0]);
  if (x.fraction != T(0)) sum += (T(1) - y.fraction) * x.fraction * static_cast<T>(row[strides.column]);
  if (y.fraction != T(0)) sum += y.fraction * (T(1) - x.fraction) * static_cast<T>(row[strides.row]);
  if (x.fraction != T(0) && y.fraction != T(0)) {
    sum += y.fraction * x.fraction * static_cast<T>(row[strides.row + strides.column]);
  }
  return sum;
}

// The winner of a bin of one channel.
template <class T, class S>
DETOPS_HD Winner<T> winner_of_bin(const S* plane, const MapStrides& strides, const BinSamples<T>& ys,
                                  const BinSamples<T>& xs) {
  Winner<T> best{T(0), T(kNoWinner), T(kNoWinner)};
  bool first = true;
  for (int64_t i = ys.range.begin; i < ys.range.end; ++i) {
    const T y = ys.position(i);
    const AxisSample<T> y_sample = axis_sample(y, ys.axis.size);
    for (int64_t j = xs.range.begin; j < xs.range.end; ++j) {
      const T x = xs.position(j);
      const T value = value_at(plane, strides, y_sample, axis_sample(x, xs.axis.size));
      if (first || wins(value, best.value)) best = {value, y, x};
      first = false;
    }
  }
  if (!first && !(ys.all_on_map && xs.all_on_map) && wins(T(0), best.value)) {
    best = {T(0), T(kNoWinner), T(kNoWinner)};
  }
  return best;
}

// What the CPU kernels write.
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

// The weight of a pixel in a sample.
template <class T>
DETOPS_HD T weight_in(const AxisSample<T>& sample, int pixel) {
  return pixel == sample.low ? T(1) - sample.fraction : (pixel == sample.low + 1 ? sample.fraction : T(0));
}

// The launches. `winners` is null where no gradient will be asked for.
template <class S>
void roi_max_cuda(const RoiTensors<ComputeType<S>, const S>& map, const Tensor& boxes, const RoiOptions& options,
                  const Tensor& out, ComputeType<S>* winners);
template <class S>
void roi_max_backward_cuda(const char* op, const Tensor& grad, const ComputeType<S>* winners, const Tensor& boxes,
                           const RoiOptions& options, const RoiTensors<ComputeType<S>, S>& out);

}  // namespace DETOPS_NAMESPACE
