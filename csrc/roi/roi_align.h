// roi_align as an average, from one map or several: what the entries and the launches share.
#pragma once

#include <vector>

#include "roi/roi_ops.h"

namespace DETOPS_NAMESPACE {

// The launches, for S = Half, BFloat16, float and double. Boxes are contiguous, in the compute type.
template <class S>
void roi_align_cuda(const RoiTensors<ComputeType<S>, const S>& maps, const Tensor& boxes, const RoiOptions& options,
                    const Tensor& out);
template <class S>
void roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes, const RoiOptions& options,
                             const RoiTensors<ComputeType<S>, S>& out);

}  // namespace DETOPS_NAMESPACE
