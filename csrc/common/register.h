// Registers ops: one statement for each, with its schema and its entry.
//
//     DETOPS_OPS(ops) { ops.add<&area>("area(Tensor boxes) -> Tensor"); }
//
// The block runs once to define the schemas and once for each device of this library.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "common/subnormals.h"

namespace DETOPS_NAMESPACE {

// The name of an argument, by its place in a schema "op(Tensor boxes, float eps) -> Tensor".
inline std::string argument_name(std::string_view schema, int place) {
  size_t begin = schema.find('(') + 1;
  for (; place > 0; --place) begin = schema.find(',', begin) + 1;
  std::string_view argument = schema.substr(begin, schema.find_first_of(",)", begin) - begin);
  argument = argument.substr(0, argument.find('='));
  return std::string(argument.substr(argument.rfind(' ') + 1));
}

inline std::string op_name(std::string_view schema) { return std::string(schema.substr(0, schema.find('('))); }

// What torch calls: the entry of an op, with subnormal numbers on, and with tensors only. An op that is called by name
// takes None for a tensor, which is then one that is not defined, and nothing may be asked of that.
template <auto entry>
struct Entry;

template <class Result, class... Arguments, Result (*entry)(Arguments...)>
struct Entry<entry> {
  static inline const char* schema = nullptr;

  static Result call(Arguments... arguments) {
    int place = 0;
    (refuse_none(place++, arguments), ...);
    const WithSubnormals scope;
    try {
      return entry(std::forward<Arguments>(arguments)...);
    } catch (const WithoutOp& error) {
      fail(op_name(schema).c_str(), error.what());
    }
  }

 private:
  static void refuse_none(int place, const Tensor& tensor) {
    if (tensor.defined()) return;
    fail(op_name(schema).c_str(), argument_name(schema, place) + " must be a tensor, got None");
  }
  static void refuse_none(int place, const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) refuse_none(place, tensor);
  }
  template <class Other>
  static void refuse_none(int, const Other&) {}
};

class Ops {
 public:
  enum class Step { kDefine, kImplement };

  Ops(torch::stable::detail::StableLibrary& library, Step step) : library_(library), step_(step) {}

  template <auto entry>
  void add(const char* schema) {
    if (step_ == Step::kDefine) {
      library_.def(schema);
      return;
    }
    Entry<entry>::schema = schema;
    library_.impl(op_name(schema).c_str(), TORCH_BOX(&Entry<entry>::call));
  }

 private:
  torch::stable::detail::StableLibrary& library_;
  Step step_;
};

}  // namespace DETOPS_NAMESPACE

#define DETOPS_OPS(ops) DETOPS_OPS_UNIQUE(ops, C10_CONCATENATE(add_ops_, C10_UID))
#define DETOPS_OPS_UNIQUE(ops, name) DETOPS_OPS_NAMED(ops, name)
#if defined(DETOPS_EMULATED)
#define DETOPS_OPS_NAMED(ops, name)                                                                       \
  static void name(Ops ops);                                                                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(detops_emulated, library) { name(Ops(library, Ops::Step::kDefine)); }     \
  STABLE_TORCH_LIBRARY_IMPL(detops_emulated, CPU, library) { name(Ops(library, Ops::Step::kImplement)); } \
  static void name(Ops ops)
#else
#define DETOPS_OPS_NAMED(ops, name)                                                               \
  static void name(Ops ops);                                                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(detops, library) { name(Ops(library, Ops::Step::kDefine)); }      \
  STABLE_TORCH_LIBRARY_IMPL(detops, CPU, library) { name(Ops(library, Ops::Step::kImplement)); }  \
  STABLE_TORCH_LIBRARY_IMPL(detops, CUDA, library) { name(Ops(library, Ops::Step::kImplement)); } \
  static void name(Ops ops)
#endif
