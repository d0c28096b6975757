// The one way to allocate a tensor. Three times faster than torch::stable::new_empty, which goes through the
// dispatcher.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace DETOPS_NAMESPACE {

inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Asks for pages of 2 MB under large results on the CPU, as NumPy does: writing to fresh memory is otherwise mostly the
// handling of a page fault for every 4 KB. Where the system does not offer them, nothing happens.
inline void ask_for_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes < 2 * kPage) return;  // less holds perhaps no whole page
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

// Why torch gave no memory. Trainers look for the words "CUDA out of memory" to retry with a smaller batch: torch's
// text has them where that is the reason, and without its text it is the likely one.
inline std::string reason_of_failure(const Tensor& like) {
  const std::string reason = last_torch_error();
  if (!reason.empty()) return reason;
  return like.is_cuda() ? ": CUDA out of memory" : ": out of memory";
}

// An uninitialised tensor of the given shape and strides on the device of `like`.
inline Tensor allocate_strided(const char* op, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                               ScalarType dtype, const Tensor& like) {
  const int32_t device_type = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), shim_dtype(dtype),
                               device_type, like.get_device_index(), &handle) != AOTI_TORCH_SUCCESS) {
    fail(op,
         "cannot allocate a " + dtype_name(dtype) + " tensor of shape " + shape_text(sizes) + reason_of_failure(like));
  }
  Tensor tensor(handle);
  if (!like.is_cuda()) ask_for_huge_pages(tensor);
  return tensor;
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor allocate(const char* op, const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return allocate_strided(op, sizes, strides, dtype, like);
}

// A copy that torch makes. When torch fails to make it, memory is usually short, as for a view of one row that is
// expanded to millions. The entry of the op puts its name before the text, see register.h.
template <class Copy>
Tensor copied(const Tensor& tensor, const Copy& copy) {
  try {
    return copy();
  } catch (const std::runtime_error&) {
    throw WithoutOp("cannot copy a " + dtype_name(tensor.scalar_type()) + " tensor of shape " + shape_text(tensor) +
                    reason_of_failure(tensor));
  }
}

// The tensor itself where it is contiguous, else a contiguous copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : copied(tensor, [&] { return torch::stable::contiguous(tensor); });
}

// A contiguous tensor of this dtype.
inline Tensor as_dense(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return as_contiguous(tensor);
  return as_contiguous(copied(tensor, [&] { return torch::stable::to(tensor, dtype); }));
}

// The first `length` rows, sharing memory.
inline Tensor first_rows(Tensor tensor, int64_t length) {
  return length == tensor.size(0) ? tensor : torch::stable::narrow(tensor, 0, 0, length);
}

}  // namespace DETOPS_NAMESPACE
