// Losses block by block on the CPU: stored, or summed up in an order that depends on nothing but their number.
#pragma once

#include <type_traits>

#include "common/parallel_cpu.h"
#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

constexpr int64_t kLossBlock = 1024;  // losses; a thread takes kLossGrain blocks at least
constexpr int64_t kLossGrain = 4;

// The sum in double, over lanes that are the same for every instruction set.
template <class T>
DETOPS_CLONES double sum_of_block(const T* values, int64_t count) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(values[i + lane]);
  }
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += static_cast<double>(values[i + lane]);
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Values in the type in which they are computed: they themselves, or a copy in `buffer`.
template <class S, class T>
const T* widened(const S* values, int64_t count, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    return values;
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(values[i]);
    return buffer;
  }
}

// Calls fill(begin, end, losses) for all blocks of `count` losses and writes the losses or their sum or mean to `out`.
template <class S, class Fill>
void write_losses(int64_t count, Reduction reduction, S* out, const Fill& fill) {
  using T = ComputeType<S>;
  const int64_t blocks = ceil_div(count, kLossBlock);
  std::vector<double> sums(reduction == Reduction::kNone ? 0 : blocks);
  parallel_ranges(blocks, kLossGrain, [&](int64_t first, int64_t last) {
    T buffer[kLossBlock];
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kLossBlock, end = min_of(begin + kLossBlock, count);
      if (reduction != Reduction::kNone) {
        fill(begin, end, buffer);
        sums[block] = sum_of_block(buffer, end - begin);
      } else if constexpr (std::is_same_v<S, T>) {
        fill(begin, end, out + begin);
      } else {
        fill(begin, end, buffer);
        for (int64_t i = begin; i < end; ++i) out[i] = static_cast<S>(buffer[i - begin]);
      }
    }
  });
  if (reduction == Reduction::kNone) return;
  double total = 0;
  for (double sum : sums) total += sum;
  *out = static_cast<S>(static_cast<T>(total / divisor(reduction, count)));
}

// out[i] = slopes[i - begin] * grad of loss i, for i in [begin, end).
template <class S>
DETOPS_CLONES void multiply(const ComputeType<S>* slopes, const UpstreamView<S>& grad, int64_t begin, int64_t end,
                            S* __restrict__ out) {
  using T = ComputeType<S>;
  if (grad.step == 0) {
    const T uniform = grad.at(0);
    for (int64_t i = begin; i < end; ++i) out[i] = static_cast<S>(slopes[i - begin] * uniform);
  } else {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<S>(slopes[i - begin] * (static_cast<T>(grad.grad[i]) * grad.factor));
    }
  }
}

}  // namespace DETOPS_NAMESPACE
