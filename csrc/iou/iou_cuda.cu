// box_iou and its gradient on a GPU.
//
// Forward: one pass that writes the output, 16 bytes a store; each block has the second boxes of its columns in
// registers. Backward: sums over a row by one warp each, sums over a column first within blocks of rows and then over
// the blocks, always in the same order.
#include "common/allocate.h"
#include "common/pack_cuda.cuh"
#include "iou/iou_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowsPerWarp = 4;
constexpr int kTileRows = kWarps * kRowsPerWarp;

template <class T>
constexpr int kTileColumns = kWarpSize * Pack<T>::kSize;

// One block per tile of kTileRows x kTileColumns pairs, one warp per row at a time.
template <IouKind kind, class T>
__global__ void box_iou_pairs_kernel(const T* boxes1, const T* boxes2, IouShape shape, int row_tiles, int column_tiles,
                                     T eps, T* out) {
  constexpr int kSize = Pack<T>::kSize;
  const int tile = blockIdx.x;
  const int64_t image = tile / column_tiles / row_tiles;
  const int64_t first_row = int64_t(tile / column_tiles % row_tiles) * kTileRows + threadIdx.x / kWarpSize;
  const int64_t column = int64_t(tile % column_tiles) * kTileColumns<T> + threadIdx.x % kWarpSize * kSize;
  const int columns = static_cast<int>(min_of<int64_t>(kSize, shape.columns - column));
  if (columns <= 0) return;
  IouBox<T> others[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int64_t j = min_of(column + i, shape.columns - 1);
    others[i] = iou_box<kind>(load_box<T>(boxes2 + image * shape.stride2 + 4 * j));
  }
  const bool packed = shape.columns % kSize == 0;  // then every store is aligned
  for (int step = 0; step < kRowsPerWarp; ++step) {
    const int64_t row = first_row + step * kWarps;
    if (row >= shape.rows) return;
    const IouBox<T> box = iou_box<kind>(load_box<T>(boxes1 + image * shape.stride1 + 4 * row));
    T values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = iou_value<kind>(box, others[i], eps);
    store_pack(values, columns, packed, out + (image * shape.rows + row) * shape.columns + column);
  }
}

template <IouKind kind, class T>
__global__ void box_iou_aligned_kernel(const T* boxes1, const T* boxes2, int64_t count, T eps, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  out[i] = iou_value<kind>(iou_box<kind>(load_box<T>(boxes1 + 4 * i)), iou_box<kind>(load_box<T>(boxes2 + 4 * i)), eps);
}

template <IouKind kind, class T>
__global__ void box_iou_aligned_backward_kernel(const T* grad, const T* boxes1, const T* boxes2, int64_t count, T eps,
                                                T* grad1, T* grad2) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const PairGradient<T> gradient = iou_gradient<kind>(iou_box<kind>(load_box<T>(boxes1 + 4 * i)),
                                                      iou_box<kind>(load_box<T>(boxes2 + 4 * i)), eps, grad[i]);
  if (grad1 != nullptr) store_box(gradient.a, grad1 + 4 * i);
  if (grad2 != nullptr) store_box(gradient.b, grad2 + 4 * i);
}

// Gradients of the first boxes: one warp per row of pairs.
template <IouKind kind, class T>
__global__ void box_iou_backward_rows_kernel(const T* grad, const T* boxes1, const T* boxes2, IouShape shape, T eps,
                                             T* grad1) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= shape.batch * shape.rows) return;
  const int64_t image = row / shape.rows;
  const IouBox<T> box = iou_box<kind>(load_box<T>(boxes1 + image * shape.stride1 + row % shape.rows * 4));
  Box<T> sum{};
  for (int64_t j = threadIdx.x % kWarpSize; j < shape.columns; j += kWarpSize) {
    const IouBox<T> other = iou_box<kind>(load_box<T>(boxes2 + image * shape.stride2 + 4 * j));
    const Box<T> gradient = iou_gradient<kind>(box, other, eps, grad[row * shape.columns + j]).a;
    sum.x1 += gradient.x1;
    sum.y1 += gradient.y1;
    sum.x2 += gradient.x2;
    sum.y2 += gradient.y2;
  }
  sum = {warp_sum(sum.x1), warp_sum(sum.y1), warp_sum(sum.x2), warp_sum(sum.y2)};
  if (threadIdx.x % kWarpSize == 0) store_box(sum, grad1 + 4 * row);
}

// Gradients of the second boxes, summed over one block of rows: partial [batch, row_blocks, columns]. One thread per
// column, so that a warp reads a row of `grad` together.
template <IouKind kind, class T>
__global__ void box_iou_backward_columns_kernel(const T* grad, const T* boxes1, const T* boxes2, IouShape shape,
                                                int64_t row_blocks, int64_t rows_per_block, T eps, Box<T>* partial) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= shape.batch * row_blocks * shape.columns) return;
  const int64_t column = item % shape.columns;
  const int64_t block = item / shape.columns % row_blocks;
  const int64_t image = item / shape.columns / row_blocks;
  const IouBox<T> other = iou_box<kind>(load_box<T>(boxes2 + image * shape.stride2 + 4 * column));
  Box<T> sum{};
  const int64_t end = min_of((block + 1) * rows_per_block, shape.rows);
  for (int64_t row = block * rows_per_block; row < end; ++row) {
    const IouBox<T> box = iou_box<kind>(load_box<T>(boxes1 + image * shape.stride1 + 4 * row));
    const Box<T> gradient =
        iou_gradient<kind>(box, other, eps, grad[(image * shape.rows + row) * shape.columns + column]).b;
    sum.x1 += gradient.x1;
    sum.y1 += gradient.y1;
    sum.x2 += gradient.x2;
    sum.y2 += gradient.y2;
  }
  partial[item] = sum;
}

// Adds the partial sums in the order of the row blocks. One thread per column.
template <class T>
__global__ void box_iou_backward_sum_kernel(const Box<T>* partial, IouShape shape, int64_t row_blocks, T* grad2) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= shape.batch * shape.columns) return;
  const Box<T>* const first = partial + item / shape.columns * row_blocks * shape.columns + item % shape.columns;
  Box<T> sum{};
  for (int64_t block = 0; block < row_blocks; ++block) {
    const Box<T> part = first[block * shape.columns];
    sum.x1 += part.x1;
    sum.y1 += part.y1;
    sum.x2 += part.x2;
    sum.y2 += part.y2;
  }
  store_box(sum, grad2 + 4 * item);
}

}  // namespace

void box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, IouKind iou_kind, bool aligned, const IouShape& shape,
                  double eps, const Tensor& out) {
  const char* const op = "box_iou";
  const CudaScope scope(boxes1);
  dispatch_iou(boxes1.scalar_type(), iou_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    constexpr IouKind kKind = decltype(kind)::value;
    const T *const data1 = boxes1.const_data_ptr<T>(), *const data2 = boxes2.const_data_ptr<T>();
    T* const result = out.mutable_data_ptr<T>();
    if (aligned) {
      DETOPS_LAUNCH((box_iou_aligned_kernel<kKind, T>), blocks_for(op, "the boxes", shape.rows, kThreads), kThreads, 0,
                    scope.stream(), data1, data2, shape.rows, T(eps), result);
      return;
    }
    const int row_tiles = static_cast<int>(ceil_div<int64_t>(shape.rows, kTileRows));
    const int column_tiles = static_cast<int>(ceil_div<int64_t>(shape.columns, kTileColumns<T>));
    const unsigned blocks = blocks_for(op, "the boxes", shape.batch * row_tiles * column_tiles, 1);
    DETOPS_LAUNCH((box_iou_pairs_kernel<kKind, T>), blocks, kThreads, 0, scope.stream(), data1, data2, shape, row_tiles,
                  column_tiles, T(eps), result);
  });
}

void box_iou_backward_cuda(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2, IouKind iou_kind,
                           bool aligned, const IouShape& shape, double eps, const Tensor* grad1, const Tensor* grad2) {
  const char* const op = "box_iou_backward";
  const CudaScope scope(boxes1);
  const cudaStream_t stream = scope.stream();
  dispatch_iou(boxes1.scalar_type(), iou_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    constexpr IouKind kKind = decltype(kind)::value;
    const T *const data1 = boxes1.const_data_ptr<T>(), *const data2 = boxes2.const_data_ptr<T>();
    const T* const grad_data = grad.const_data_ptr<T>();
    T *const out1 = data_if_wanted<T>(grad1), *const out2 = data_if_wanted<T>(grad2);
    if (aligned) {
      if (shape.rows == 0) return;
      DETOPS_LAUNCH((box_iou_aligned_backward_kernel<kKind, T>), blocks_for(op, "the boxes", shape.rows, kThreads),
                    kThreads, 0, stream, grad_data, data1, data2, shape.rows, T(eps), out1, out2);
      return;
    }
    if (grad1 != nullptr && shape.batch * shape.rows > 0) {
      DETOPS_LAUNCH((box_iou_backward_rows_kernel<kKind, T>),
                    blocks_for(op, "the boxes", shape.batch * shape.rows, kWarps), kThreads, 0, stream, grad_data,
                    data1, data2, shape, T(eps), out1);
    }
    if (grad2 == nullptr || shape.batch * shape.columns == 0) return;
    const int64_t rows_per_block = max_of<int64_t>(32, ceil_div<int64_t>(shape.rows, 128));
    const int64_t row_blocks = ceil_div(shape.rows, rows_per_block);
    const int64_t sums = shape.batch * row_blocks * shape.columns;
    const Tensor partial = allocate(op, {sums, 4}, boxes1.scalar_type(), boxes1);
    auto* const partial_data = static_cast<Box<T>*>(partial.mutable_data_ptr());
    if (sums > 0) {
      DETOPS_LAUNCH((box_iou_backward_columns_kernel<kKind, T>), blocks_for(op, "the boxes", sums, kThreads), kThreads,
                    0, stream, grad_data, data1, data2, shape, row_blocks, rows_per_block, T(eps), partial_data);
    }
    DETOPS_LAUNCH((box_iou_backward_sum_kernel<T>), blocks_for(op, "the boxes", shape.batch * shape.columns, kThreads),
                  kThreads, 0, stream, partial_data, shape, row_blocks, out2);
  });
}

}  // namespace DETOPS_NAMESPACE
