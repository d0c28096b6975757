// From a tensor's dtype and device to the code that handles it.
//
// An op has one entry function for both devices. It checks, allocates, and then runs the CPU loop or the launch:
//
//     Tensor area(const Tensor& boxes) {
//       check_shape("area", "boxes", boxes, "[N, 4]", {-1, 4});
//       if (on_gpu("area", boxes)) return area_cuda(boxes);   // needs DETOPS_GPU_ONLY(...) around the call
//       ...
//     }
//     DETOPS_OPS(ops) { ops.add<&area>("area(Tensor boxes) -> Tensor"); }   // see register.h
#pragma once

#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace DETOPS_NAMESPACE {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls `body` with a TypeTag of the C++ type of a floating dtype. The dtype was checked before.
template <class Body>
void dispatch_floating(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Half: return body(TypeTag<Half>{});
    case ScalarType::BFloat16: return body(TypeTag<BFloat16>{});
    case ScalarType::Double: return body(TypeTag<double>{});
    default: return body(TypeTag<float>{});
  }
}

// Calls `body` with the tag of the type in which values of this dtype are computed.
template <class Body>
void dispatch_compute_type(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Double) return body(TypeTag<double>{});
  return body(TypeTag<float>{});
}

// Calls `body` with constants that say which of two gradients are wanted: those that are not null. Not if none is.
template <class Body>
void dispatch_wanted(const Tensor* first, const Tensor* second, Body&& body) {
  if (first != nullptr && second != nullptr) return body(std::true_type{}, std::true_type{});
  if (first != nullptr) return body(std::true_type{}, std::false_type{});
  if (second != nullptr) return body(std::false_type{}, std::true_type{});
}

// Where to write a gradient. The pointer is null if the gradient is not wanted, but also if it is empty, since an empty
// tensor has no memory: only the tensor says whether it is wanted.
template <class T>
T* data_if_wanted(const Tensor* tensor) {
  return tensor == nullptr ? nullptr : tensor->mutable_data_ptr<T>();
}

// Calls an op of PyTorch: `stack` holds its arguments and then its results.
inline void call_torch(const char* op, const char* name, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) return;
  fail(op, std::string(name) + " failed" + last_torch_error());
}

#if defined(DETOPS_WITH_CUDA) || defined(DETOPS_EMULATED)
#define DETOPS_GPU_ONLY(statement) statement
#else
#define DETOPS_GPU_ONLY(statement)
#endif

// True if the CUDA kernels handle this tensor. In the emulation they handle every tensor.
inline bool on_gpu([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& tensor) {
#if defined(DETOPS_EMULATED)
  return true;
#else
#if !defined(DETOPS_WITH_CUDA)
  if (tensor.is_cuda()) {
    fail(op,
         "got a CUDA tensor, but this detops was built without CUDA kernels. Rebuild it from its source folder with "
         "'DETOPS_CUDA=1 pip install .'");
  }
#endif
  return tensor.is_cuda();
#endif
}

}  // namespace DETOPS_NAMESPACE
