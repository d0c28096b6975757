// decode_dfl: schema, checks, and the CPU kernels.
#include "coders/decode_dfl.h"

#include "common/register.h"
#include "common/softmax_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kGrain = 256;  // rows that are worth a thread

// Writes scale[lane] * values[bin][lane] * (bin - mean[lane]).
template <class S, class T>
DETOPS_CLONES void write_gradients(const SoftmaxTile<T>& tile, const T* scale, const BinShape& shape, int64_t count,
                                   S* __restrict__ first) {
  const int64_t bin_step = shape.inner, lane_step = shape.inner == 1 ? shape.bins : 1;
  for (int64_t bin = 0; bin < shape.bins; ++bin) {
    const T number = static_cast<T>(bin);
    T gradients[kSoftmaxRows];
    for (int lane = 0; lane < kSoftmaxRows; ++lane) {
      gradients[lane] = scale[lane] * tile.values[bin * kSoftmaxRows + lane] * (number - tile.mean[lane]);
    }
    S* const row = first + bin * bin_step;
    for (int64_t lane = 0; lane < count; ++lane) row[lane * lane_step] = static_cast<S>(gradients[lane]);
  }
}

// Calls body(first row, where its logits begin, rows) for [begin, end), so that rows lie at steps of 1 or `bins`.
template <class Body>
void each_tile(const BinShape& shape, int64_t begin, int64_t end, const Body& body) {
  for (int64_t row = begin; row < end;) {
    int64_t count = min_of<int64_t>(kSoftmaxRows, end - row), offset = row * shape.bins;
    if (shape.inner > 1) {
      const int64_t column = row % shape.inner;
      count = min_of(count, shape.inner - column);
      offset = row / shape.inner * shape.bins * shape.inner + column;
    }
    body(row, offset, count);
    row += count;
  }
}

void decode_dfl_cpu(const Tensor& logits, const BinShape& shape, const Tensor& out) {
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const S* const data = logits.const_data_ptr<S>();
    S* const result = out.mutable_data_ptr<S>();
    parallel_ranges(shape.rows(), kGrain, [&](int64_t begin, int64_t end) {
      SoftmaxTile<T> tile(shape.bins);
      each_tile(shape, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
        read_softmax_rows(data + offset, shape.bins, shape.inner, count, tile.values.data());
        compute_softmax<true>(shape.bins, tile);
        for (int64_t lane = 0; lane < count; ++lane) result[row + lane] = static_cast<S>(tile.mean[lane]);
      });
    });
  });
}

void decode_dfl_backward_cpu(const Tensor& grad, const Tensor& logits, const BinShape& shape, const Tensor& out) {
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const S *const data = logits.const_data_ptr<S>(), *const upstream = grad.const_data_ptr<S>();
    S* const result = out.mutable_data_ptr<S>();
    parallel_ranges(shape.rows(), kGrain, [&](int64_t begin, int64_t end) {
      SoftmaxTile<T> tile(shape.bins);
      T scale[kSoftmaxRows] = {};
      each_tile(shape, begin, end, [&](int64_t row, int64_t offset, int64_t count) {
        read_softmax_rows(data + offset, shape.bins, shape.inner, count, tile.values.data());
        compute_softmax<true>(shape.bins, tile);
        for (int64_t lane = 0; lane < count; ++lane) {
          scale[lane] = static_cast<T>(upstream[row + lane]) / tile.sum[lane];
        }
        write_gradients(tile, scale, shape, count, result + offset);
      });
    });
  });
}

constexpr const char* kOp = "decode_dfl";

// Checks the logits; the sizes of the distances go to `sizes`.
BinShape checked_shape(const Tensor& logits, int64_t dim, std::vector<int64_t>& sizes) {
  check_floating(kOp, "logits", logits);
  const int64_t dims = logits.dim(), bins_dim = dim < 0 ? dim + dims : dim;
  if (bins_dim < 0 || bins_dim >= dims) {
    fail(kOp, "dim must be a dimension of logits " + shape_text(logits) + ", got " + std::to_string(dim));
  }
  BinShape shape{1, logits.size(bins_dim), 1};
  if (shape.bins == 0) fail(kOp, "logits must have at least 1 bin, got shape " + shape_text(logits));
  for (int64_t i = 0; i < dims; ++i) {
    if (i == bins_dim) continue;
    (i < bins_dim ? shape.outer : shape.inner) *= logits.size(i);
    sizes.push_back(logits.size(i));
  }
  return shape;
}

Tensor decode_dfl(const Tensor& logits, int64_t dim) {
  std::vector<int64_t> sizes;
  const BinShape shape = checked_shape(logits, dim, sizes);
  const Tensor out = allocate(kOp, sizes, logits.scalar_type(), logits);
  if (shape.rows() == 0) return out;
  if (on_gpu(kOp, logits)) {
    DETOPS_GPU_ONLY(decode_dfl_cuda(as_contiguous(logits), shape, out));
  } else {
    decode_dfl_cpu(as_contiguous(logits), shape, out);
  }
  return out;
}

Tensor decode_dfl_backward(const Tensor& grad, const Tensor& logits, int64_t dim) {
  std::vector<int64_t> sizes;
  const BinShape shape = checked_shape(logits, dim, sizes);
  bool same = grad.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = grad.size(static_cast<int64_t>(i)) == sizes[i];
  if (!same) fail(kOp, "grad must have the shape of the distances, got " + shape_text(grad));
  if (grad.scalar_type() != logits.scalar_type()) {
    fail(kOp, "grad must be " + dtype_name(logits.scalar_type()) + ", got " + dtype_name(grad.scalar_type()));
  }
  check_same_device(kOp, "grad", grad, "logits", logits);
  std::vector<int64_t> all_sizes;
  for (int64_t i = 0; i < logits.dim(); ++i) all_sizes.push_back(logits.size(i));
  const Tensor out = allocate(kOp, all_sizes, logits.scalar_type(), logits);
  if (shape.rows() == 0) return out;
  if (on_gpu(kOp, logits)) {
    DETOPS_GPU_ONLY(decode_dfl_backward_cuda(as_contiguous(grad), as_contiguous(logits), shape, out));
  } else {
    decode_dfl_backward_cpu(as_contiguous(grad), as_contiguous(logits), shape, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&decode_dfl>("decode_dfl(Tensor logits, int dim) -> Tensor");
  ops.add<&decode_dfl_backward>("decode_dfl_backward(Tensor grad, Tensor logits, int dim) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
