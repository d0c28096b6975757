// The focal losses: a binary cross-entropy of each logit, weighted by how far the prediction is off. Values and
// gradients, written once for both devices.
//
// Ops and shapes.
//   focal_loss           inputs [..., C], targets [..., C] or classes [...], scores [...]
//                        -> losses [..., C] or a scalar
//   focal_loss_backward  its gradient with respect to inputs
//
// With the logit x, p = sigmoid(x), the target t in [0, 1] and the cross-entropy
//   ce = -t log(p) - (1 - t) log(1 - p) = (1 - t) max(x, 0) + t max(-x, 0) + log(1 + exp(-|x|)):
//   sigmoid    (alpha t + (1 - alpha)(1 - t)) (1 - p_t)^gamma ce,  1 - p_t = p (1 - t) + (1 - p) t   Lin et al., 2017
//   quality    |t - p|^beta ce                                                                        Li et al., 2020
//   varifocal  t ce where t > 0, alpha p^gamma ce elsewhere                                        Zhang et al., 2021
// d ce / dx = p - t.
//
// Class targets: c in 0 .. C-1 stands for t = 1 (or the row's score) at c and 0 elsewhere, C for 0 everywhere, and -1
// for a row that is ignored: its losses and gradients are 0.
#pragma once

#include "common/logistic.h"
#include "common/math.h"
#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

enum class FocalKind : int64_t { kSigmoid, kQuality, kVarifocal };

template <class T>
struct FocalOptions {
  T positive, negative;  // the weights of t and 1 - t
  T exponent;
  bool square;  // the exponent is 2
};

// False for a row that is ignored. Only the GPU meets classes that are neither: the entry refuses them on the CPU.
DETOPS_HD bool class_counts(int64_t label, int64_t classes) { return label >= 0 && label <= classes; }

// The factor of the cross-entropy, and its derivative with respect to the logit.
template <class T>
struct FocalWeight {
  T value, slope;
};

template <class T>
constexpr T kSmallestNormal = std::numeric_limits<T>::min();

// scale * base^exponent, given d base / dx. A base of 0 counts as the smallest normal number, so that 0^0 is 1.
template <bool square, class T>
DETOPS_HD FocalWeight<T> focal_power(T scale, T base, T slope, T exponent) {
  if (square) return {scale * (base * base), scale * 2 * base * slope};
  base = max_of(kSmallestNormal<T>, base);
  const T power = scale * fast_pow(base, exponent);
  return {power, power * exponent * (slope / base)};
}

// `error` is p - t.
template <FocalKind kind, bool square, class T>
DETOPS_HD FocalWeight<T> focal_weight(const Logistic<T>& logit, T error, T target, const FocalOptions<T>& options) {
  const T slope = logit.present * logit.absent;  // d p / dx
  if (kind == FocalKind::kSigmoid) {
    const T scale = options.positive * target + options.negative * (1 - target);
    const T off = logit.present * (1 - target) + logit.absent * target;
    return focal_power<square>(scale, off, slope * (1 - 2 * target), options.exponent);
  }
  if (kind == FocalKind::kQuality) {
    return focal_power<square>(T(1), error < T(0) ? -error : error, error < T(0) ? -slope : slope, options.exponent);
  }
  const FocalWeight<T> negative = focal_power<square>(options.negative, logit.present, slope, options.exponent);
  return {target > T(0) ? target : negative.value, target > T(0) ? T(0) : negative.slope};
}

// Without cancellation: a sum of terms that are not negative.
template <class T>
DETOPS_HD T cross_entropy(const Logistic<T>& logit, T input, T target) {
  return (input < T(0) ? -target : 1 - target) * input + logit.excess;
}

// p - t, without cancellation for t = 1.
template <class T>
DETOPS_HD T focal_error(const Logistic<T>& logit, T target) {
  return logit.present * (1 - target) - logit.absent * target;
}

template <FocalKind kind, bool square, class T>
DETOPS_HD T focal_value(T input, T target, const FocalOptions<T>& options) {
  const Logistic<T> logit = logistic(input);
  const FocalWeight<T> weight = focal_weight<kind, square>(logit, focal_error(logit, target), target, options);
  return weight.value * cross_entropy(logit, input, target);
}

// d focal_value / d input.
template <FocalKind kind, bool square, class T>
DETOPS_HD T focal_gradient(T input, T target, const FocalOptions<T>& options) {
  const Logistic<T> logit = logistic(input);
  const T error = focal_error(logit, target);
  const FocalWeight<T> weight = focal_weight<kind, square>(logit, error, target, options);
  return weight.value * error + weight.slope * cross_entropy(logit, input, target);
}

// The tensors of one call, checked and contiguous.
struct FocalTensors {
  Tensor inputs;
  Tensor targets;   // dense: as inputs. Classes: int64, one for a row of inputs
  Tensor scores;    // one for a row, in the compute type; undefined where there are none
  int64_t classes;  // inputs in a row; 0 for dense targets
};

template <class T>
FocalOptions<T> focal_options(FocalKind kind, double alpha, double exponent) {
  const bool sigmoid = kind == FocalKind::kSigmoid, weighted = alpha >= 0;
  return {T(sigmoid && weighted ? alpha : 1), T(sigmoid && weighted ? 1 - alpha : (weighted ? alpha : 1)), T(exponent),
          exponent == 2};
}

// Calls body(integral constant of the kind).
template <class Body>
void dispatch_focal(FocalKind kind, Body&& body) {
  switch (kind) {
    case FocalKind::kSigmoid: return body(std::integral_constant<FocalKind, FocalKind::kSigmoid>{});
    case FocalKind::kQuality: return body(std::integral_constant<FocalKind, FocalKind::kQuality>{});
    case FocalKind::kVarifocal: return body(std::integral_constant<FocalKind, FocalKind::kVarifocal>{});
  }
}

// The launches. Arguments were checked, outputs are allocated; there is at least one input for a gradient.
void focal_loss_cuda(const FocalTensors& tensors, FocalKind kind, double alpha, double exponent, Reduction reduction,
                     const Tensor& out);
void focal_loss_backward_cuda(const Upstream& upstream, const FocalTensors& tensors, FocalKind kind, double alpha,
                              double exponent, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
