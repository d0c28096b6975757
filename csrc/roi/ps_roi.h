// Position-sensitive pooling: what the entry and the launches of ps_roi_align and ps_roi_pool share.
//
// Every bin (p, q) has maps of its own: result channel c reads channel (c * bins_y + p) * bins_x + q of the input.
#pragma once

#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {

template <class S>
void ps_roi_cuda(const char* op, const RoiTensors<ComputeType<S>, const S>& map, const Tensor& boxes,
                 const RoiOptions& options, const Tensor& out);
template <class S>
void ps_roi_backward_cuda(const char* op, const Tensor& grad, const Tensor& boxes, const RoiOptions& options,
                          const RoiTensors<ComputeType<S>, S>& out);

}  // namespace DETOPS_NAMESPACE
