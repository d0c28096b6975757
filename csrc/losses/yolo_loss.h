// The loss of YOLOv1 on targets of a grid: values and gradients, written once for both devices.
//
// Ops and shapes.
//   yolo_loss           predictions, targets [..., 5 + C] -> losses [...] or a scalar
//   yolo_loss_backward  its gradient with respect to predictions
//
// A row is (objectness, x, y, width, height, classes). Where the target's objectness is above 0:
//   lambda_coord ((x - x')^2 + (y - y')^2 + (s(w) - s(w'))^2 + (s(h) - s(h'))^2) + (o - o')^2 + sum_c (p_c - p_c')^2
// and elsewhere lambda_noobj (o - o')^2; s(v) = v / sqrt(|v| + 1e-6).               Redmon et al., CVPR 2016
#pragma once

#include <cmath>

#include "losses/loss.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct YoloLossWeights {
  T coord, noobj;

  // Of column k.
  DETOPS_HD T of(int64_t k, bool object) const {
    if (!object) return k == 0 ? noobj : T(0);
    return k >= 1 && k <= 4 ? coord : T(1);
  }
};

// The square root, made odd, and smooth at 0.
template <class T>
DETOPS_HD T soft_root(T value) {
  const T magnitude = value < T(0) ? -value : value;
  return value / std::sqrt(magnitude + T(1e-6));
}
template <class T>
DETOPS_HD T soft_root_slope(T value) {
  const T magnitude = value < T(0) ? -value : value;
  const T sum = magnitude + T(1e-6);
  return (magnitude / 2 + T(1e-6)) / (sum * std::sqrt(sum));
}

// What column k adds to the loss of a row, without its weight.
template <class T>
DETOPS_HD T yolo_loss_term(int64_t k, T prediction, T target) {
  const bool size = k == 3 || k == 4;
  const T difference = size ? soft_root(prediction) - soft_root(target) : prediction - target;
  return difference * difference;
}

// Its derivative with respect to the prediction.
template <class T>
DETOPS_HD T yolo_loss_slope(int64_t k, T prediction, T target) {
  if (k == 3 || k == 4) return 2 * (soft_root(prediction) - soft_root(target)) * soft_root_slope(prediction);
  return 2 * (prediction - target);
}

// The loss of a row of `columns`.
template <class S, class T>
DETOPS_HD T yolo_loss_row(const S* prediction, const T* target, int64_t columns, const YoloLossWeights<T>& weights) {
  const bool object = target[0] > T(0);
  T loss = 0;
  for (int64_t k = 0; k < (object ? columns : 1); ++k) {
    loss += weights.of(k, object) * yolo_loss_term(k, static_cast<T>(prediction[k]), target[k]);
  }
  return loss;
}

// The launches. Arguments were checked, outputs are allocated and not empty; `targets` are in the compute type.
void yolo_loss_cuda(const Tensor& predictions, const Tensor& targets, double lambda_coord, double lambda_noobj,
                    Reduction reduction, const Tensor& out);
void yolo_loss_backward_cuda(const Upstream& upstream, const Tensor& predictions, const Tensor& targets,
                             double lambda_coord, double lambda_noobj, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
