// decode_dfl: the mean of a softmax over bins, written once for both devices.
//
// Ops and shapes. The bins are one dimension of the logits, in any place; here they are [outer, bins, inner].
//   decode_dfl           logits [..., bins, ...] -> distances [..., ...], without that dimension
//   decode_dfl_backward  grad of the distances, logits -> gradient of the logits
//
// With p = softmax(logits): distance = sum_k k p_k, and d distance / d logit_k = p_k (k - distance)  Li et al., 2020
//
// A float stays a float, see common/logistic.h.
#pragma once

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/logistic.h"

namespace DETOPS_NAMESPACE {

// The layout of contiguous logits.
struct BinShape {
  int64_t outer, bins, inner;
  int64_t rows() const { return outer * inner; }
};

// The launches. Arguments were checked, outputs are allocated, there is at least one row.
void decode_dfl_cuda(const Tensor& logits, const BinShape& shape, const Tensor& out);
void decode_dfl_backward_cuda(const Tensor& grad, const Tensor& logits, const BinShape& shape, const Tensor& out);

}  // namespace DETOPS_NAMESPACE
