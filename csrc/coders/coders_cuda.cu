// encode_boxes, decode_boxes, encode_ltrb and decode_ltrb on a GPU: one thread per row.
#include "coders/coders.h"

#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;

// A row in as few accesses as there can be.
template <class S, int columns>
struct alignas(sizeof(S) * columns < 16 ? sizeof(S) * columns : 16) Row {
  S values[columns];
};

// Rows may begin anywhere in memory: `packed` says that they are aligned.
template <class Value, class S>
__device__ inline Value load_row(const S* rows, int64_t i, bool packed) {
  constexpr int kColumns = Value::kCoordinates;
  Value value;
  if (packed) {
    const Row<S, kColumns> row = reinterpret_cast<const Row<S, kColumns>*>(rows)[i];
    load(row.values, value);
  } else {
    load(rows + kColumns * i, value);
  }
  return value;
}
// Results are allocated, and so aligned.
template <class Value, class S>
__device__ inline void store_row(const Value& value, int64_t i, S* rows) {
  Row<S, Value::kCoordinates> row;
  store(value, row.values);
  reinterpret_cast<Row<S, Value::kCoordinates>*>(rows)[i] = row;
}

template <class S, int columns>
bool is_packed(const Tensor& rows) {
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % alignof(Row<S, columns>) == 0;
}

// Divisions by 32 bits where they do.
__device__ inline int64_t partner_of(int64_t i, const RowMap& map) {
  return i <= INT32_MAX ? int64_t(map.row_of(static_cast<uint32_t>(i))) : map.row_of(i);
}

template <class Coder, class T, class S, class A>
__global__ void code_rows_kernel(Coder coder, const S* first, const A* second, const A* strides, RowMap map,
                                 int64_t count, bool packed, A* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t partner = partner_of(i, map);
  const T stride = strides != nullptr ? static_cast<T>(strides[partner]) : T(1);
  store_row(coder.forward(load_row<Box<T>>(first, i, packed), load_row<typename Coder::Second>(second, partner, packed),
                          stride),
            i, out);
}

template <class Coder, class T, class S, class A>
__global__ void code_rows_backward_kernel(Coder coder, const A* grad, const S* first, const A* second, const A* strides,
                                          RowMap map, int64_t count, bool packed, S* grad_first, A* grad_second) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t partner = partner_of(i, map);
  const T stride = strides != nullptr ? static_cast<T>(strides[partner]) : T(1);
  Box<T> of_first;
  typename Coder::Second of_second;
  coder.backward(load_row<Box<T>>(grad, i, packed), load_row<Box<T>>(first, i, packed),
                 load_row<typename Coder::Second>(second, partner, packed), stride, of_first, of_second);
  store_row(of_first, i, grad_first);
  if (grad_second != nullptr) store_row(of_second, i, grad_second);
}

// Calls body(coder, tags of the compute type and of the types of the first tensor and of the second).
template <class Body>
void dispatch_rows(const CoderCall& call, const CoderRows& rows, const Body& body) {
  dispatch_row_types(rows.first.scalar_type(), rows.second.scalar_type(), [&](auto first, auto second) {
    using T = ComputeType<typename decltype(second)::type>;
    dispatch_coder<T>(call, [&](const auto& coder) { body(coder, TypeTag<T>{}, first, second); });
  });
}

}  // namespace

void code_rows_cuda(const CoderCall& call, const CoderRows& rows, const Tensor& out) {
  const CudaScope scope(rows.first);
  const unsigned blocks = blocks_for(call.op, "the rows", rows.count, kThreads);
  dispatch_rows(call, rows, [&](const auto& coder, auto compute, auto first_tag, auto second_tag) {
    using Coder = std::decay_t<decltype(coder)>;
    using T = typename decltype(compute)::type;
    using S = typename decltype(first_tag)::type;
    using A = typename decltype(second_tag)::type;
    const bool packed = is_packed<S, 4>(rows.first) && is_packed<A, Coder::Second::kCoordinates>(rows.second);
    DETOPS_LAUNCH((code_rows_kernel<Coder, T, S, A>), blocks, kThreads, 0, scope.stream(), coder,
                  rows.first.const_data_ptr<S>(), rows.second.const_data_ptr<A>(),
                  rows.strides.defined() ? rows.strides.const_data_ptr<A>() : nullptr, rows.map, rows.count, packed,
                  out.mutable_data_ptr<A>());
  });
}

void code_rows_backward_cuda(const CoderCall& call, const CoderRows& rows, const Tensor& grad, const Tensor& grad_first,
                             const Tensor* grad_second) {
  const CudaScope scope(rows.first);
  const unsigned blocks = blocks_for(call.op, "the rows", rows.count, kThreads);
  dispatch_rows(call, rows, [&](const auto& coder, auto compute, auto first_tag, auto second_tag) {
    using Coder = std::decay_t<decltype(coder)>;
    using T = typename decltype(compute)::type;
    using S = typename decltype(first_tag)::type;
    using A = typename decltype(second_tag)::type;
    const bool packed =
        is_packed<A, 4>(grad) && is_packed<S, 4>(rows.first) && is_packed<A, Coder::Second::kCoordinates>(rows.second);
    DETOPS_LAUNCH((code_rows_backward_kernel<Coder, T, S, A>), blocks, kThreads, 0, scope.stream(), coder,
                  grad.const_data_ptr<A>(), rows.first.const_data_ptr<S>(), rows.second.const_data_ptr<A>(),
                  rows.strides.defined() ? rows.strides.const_data_ptr<A>() : nullptr, rows.map, rows.count, packed,
                  grad_first.mutable_data_ptr<S>(), data_if_wanted<A>(grad_second));
  });
}

}  // namespace DETOPS_NAMESPACE
