// Distribution focal loss: the cross-entropy of a softmax over bins with a target between two of them. Written once for
// both devices.
//
// Ops and shapes.
//   distribution_focal_loss           inputs [..., bins], targets [...] -> losses [...] or a scalar
//   distribution_focal_loss_backward  its gradient with respect to inputs
//
// With s = softmax(inputs) and the target y between the bins i and i + 1:
//   -(i + 1 - y) log(s_i) - (y - i) log(s_(i+1))                                                      Li et al., 2020
#pragma once

#include "common/logistic.h"
#include "common/math.h"
#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

// The bins on both sides of a target and their weights. A target of bins - 1 lies on the right one of the last two.
template <class T>
struct BinPair {
  int64_t left;
  T left_weight, right_weight;  // NaN for a target that is NaN

  // The weight of a bin.
  DETOPS_HD T of(int64_t bin) const { return bin == left ? left_weight : bin == left + 1 ? right_weight : T(0); }
};

// Beyond the bins on either side. Only the GPU meets such targets, and gives 0: the entry refuses them on the CPU.
template <class T>
DETOPS_HD bool outside_bins(T target, int64_t bins) {
  return target < T(0) || target > static_cast<T>(bins - 1);
}

template <class T>
DETOPS_HD BinPair<T> bins_around(T target, int64_t bins) {
  if (outside_bins(target, bins)) return {0, T(0), T(0)};
  const int64_t left = target >= T(0) ? min_of(static_cast<int64_t>(target), bins - 2) : 0;
  const T right_weight = target - static_cast<T>(left);
  return {left, T(1) - right_weight, right_weight};
}

// The launches. Arguments were checked, outputs are allocated; there is at least one row for a gradient. `targets` are
// in the compute type of the inputs.
void distribution_focal_loss_cuda(const Tensor& inputs, const Tensor& targets, Reduction reduction, const Tensor& out);
void distribution_focal_loss_backward_cuda(const Upstream& upstream, const Tensor& inputs, const Tensor& targets,
                                           const Tensor& out);

}  // namespace DETOPS_NAMESPACE
