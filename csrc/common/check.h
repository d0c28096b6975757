// Argument checks. One message format: "<op>: <argument> must <rule>, got <fact>".
//
// Each op checks its tensors once, in its entry; kernels see validated tensors. The exceptions are plain
// std::runtime_error, which PyTorch passes on as RuntimeError with the text as it stands.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/host_device.h"

namespace DETOPS_NAMESPACE {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const std::string& text) {
  throw std::runtime_error(std::string(op) + ": " + text);
}

// An error whose text lacks the name of the op, which its entry adds.
class WithoutOp : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// ": " and the text of the error that a call into PyTorch has just returned. Empty before torch 2.13, which has no
// function for it (the error is on stderr there).
inline std::string last_torch_error() {
  using GetText = const char* (*)();
  static const auto get_text =
      reinterpret_cast<GetText>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return get_text != nullptr ? std::string(": ") + get_text() : std::string();
}

// As torch names it, without "torch.", by its number: those stand in torch's files and never change.
inline std::string dtype_name(ScalarType dtype) {
  // clang-format off
  static const char* const names[] = {
      "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32", "complex64",
      "complex128", "bool", "qint8", "quint8", "qint32", "bfloat16", "quint4x2", "quint2x4", "bits1x8",
      "bits2x4", "bits4x2", "bits8", "bits16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz",
      "float8_e4m3fnuz", "uint16", "uint32", "uint64", "uint1", "uint2", "uint3", "uint4", "uint5", "uint6",
      "uint7", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "float8_e8m0fnu", "float4_e2m1fn_x2"};
  // clang-format on
  const auto number = static_cast<size_t>(dtype);
  return number < std::size(names) ? names[number] : "dtype number " + std::to_string(number);
}

// The sizes of the first `dims` dimensions, and then some.
inline std::vector<int64_t> leading_sizes(const Tensor& tensor, int64_t dims,
                                          std::initializer_list<int64_t> then = {}) {
  std::vector<int64_t> sizes;
  sizes.reserve(dims + then.size());
  for (int64_t i = 0; i < dims; ++i) sizes.push_back(tensor.size(i));
  sizes.insert(sizes.end(), then);
  return sizes;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return leading_sizes(tensor, tensor.dim()); }

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return (text.empty() ? "[" : text) + "]";
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(sizes_of(tensor)); }

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

// One wildcard dimension is written as -1. `rule` names the dimensions for the reader: "[N, 4]".
inline void check_shape(const char* op, const char* argument, const Tensor& tensor, const std::string& rule,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    if (same && size >= 0) same = tensor.size(i) == size;
    ++i;
  }
  if (!same) fail(op, std::string(argument) + " must have shape " + rule + ", got " + shape_text(tensor));
}

// `meaning` says where the sizes come from: " as boxes1".
inline void check_sizes(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& sizes,
                        const std::string& meaning) {
  if (sizes_of(tensor) == sizes) return;
  fail(op, std::string(argument) + " must have shape " + shape_text(sizes) + meaning + ", got " + shape_text(tensor));
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  if (is_floating(tensor.scalar_type())) return;
  fail(op, std::string(argument) + " must be float16, bfloat16, float32 or float64, got " +
               dtype_name(tensor.scalar_type()));
}

inline void check_integer(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::Bool: return;
    default: fail(op, std::string(argument) + " must be an integer tensor, got " + dtype_name(tensor.scalar_type()));
  }
}

// The dtype in which values of `dtype` are computed: that of ComputeType.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `expected` is the argument named `reference`.
inline void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* reference,
                             const Tensor& expected) {
  if (tensor.scalar_type() == expected.scalar_type()) return;
  fail(op, std::string(argument) + " must have the dtype of " + reference + " (" + dtype_name(expected.scalar_type()) +
               "), got " + dtype_name(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor, const char* reference,
                              const Tensor& expected) {
  if (tensor.is_cuda() == expected.is_cuda() && tensor.get_device_index() == expected.get_device_index()) return;
  fail(op, std::string(argument) + " must be on the device of " + reference + " (" + device_text(expected) + "), got " +
               device_text(tensor));
}

// One bool for each of `boxes` [..., 4].
inline void check_mask(const char* op, const char* argument, const Tensor& mask, const char* reference,
                       const Tensor& boxes) {
  if (sizes_of(mask) != leading_sizes(boxes, boxes.dim() - 1)) {
    fail(op, std::string(argument) + " must have one value per box of " + reference + " (" + shape_text(boxes) +
                 "), got " + shape_text(mask));
  }
  if (mask.scalar_type() != ScalarType::Bool) {
    fail(op, std::string(argument) + " must be bool, got " + dtype_name(mask.scalar_type()));
  }
  check_same_device(op, argument, mask, reference, boxes);
}

// Row numbers are 32 bits inside the kernels, with room to step past the last one.
constexpr int64_t kMostRows = INT32_MAX - 0xffff;

inline void check_row_count(const char* op, const char* argument, int64_t rows, const char* what = "rows") {
  if (rows <= kMostRows) return;
  fail(op, std::string(argument) + " must have at most " + std::to_string(kMostRows) + " " + what + ", got " +
               std::to_string(rows));
}

}  // namespace DETOPS_NAMESPACE
