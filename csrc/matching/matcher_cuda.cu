// matcher on a GPU: the best of each row, one block a row; then one thread a column.
#include "common/launch_cuda.cuh"
#include "matching/matching.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <class S>
__global__ void matcher_rows_kernel(const S* quality, int columns, ComputeType<S>* row_best) {
  using T = ComputeType<S>;
  DETOPS_SHARED(T, warp_best, kWarps);
  const S* const values = quality + int64_t(blockIdx.x) * columns;
  T best = number_or_zero(static_cast<T>(values[0]));
  for (int i = threadIdx.x; i < columns; i += kThreads) best = max_of(best, number_or_zero(static_cast<T>(values[i])));
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    best = max_of(best, __shfl_xor_sync(kFullWarp, best, distance));
  }
  if (threadIdx.x % kWarpSize == 0) warp_best[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) best = max_of(best, warp_best[warp]);
  row_best[blockIdx.x] = best;
}

// `row_best` is null without low-quality matches.
template <class S>
__global__ void matcher_columns_kernel(const S* quality, int rows, int columns, const ComputeType<S>* row_best,
                                       MatchThresholds<ComputeType<S>> thresholds, int64_t* indices) {
  using T = ComputeType<S>;
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  T best = T(0);
  int best_row = 0;
  bool tied = false;
  for (int row = 0; row < rows; ++row) {
    const T value = number_or_zero(static_cast<T>(quality[int64_t(row) * columns + column]));
    if (row == 0 || value > best) {
      best = value;
      best_row = row;
    }
    if (row_best != nullptr) tied = tied || value == row_best[row];
  }
  indices[column] = tied ? best_row : match_of(best, best_row, thresholds);
}

}  // namespace

void matcher_cuda(const Tensor& quality, double high_threshold, double low_threshold, bool allow_low_quality,
                  const Tensor& indices) {
  const CudaScope scope(quality);
  const cudaStream_t stream = scope.stream();
  const int rows = static_cast<int>(quality.size(0)), columns = static_cast<int>(quality.size(1));
  dispatch_floating(quality.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = ComputeType<S>;
    const Tensor scratch =
        allocate("Matcher", {allow_low_quality ? rows * int64_t(sizeof(T)) : 0}, ScalarType::Byte, quality);
    T* const row_best = allow_low_quality ? static_cast<T*>(scratch.mutable_data_ptr()) : nullptr;
    const S* const data = quality.const_data_ptr<S>();
    if (allow_low_quality) {
      DETOPS_LAUNCH((matcher_rows_kernel<S>), static_cast<unsigned>(rows), kThreads, 0, stream, data, columns,
                    row_best);
    }
    DETOPS_LAUNCH((matcher_columns_kernel<S>), static_cast<unsigned>(ceil_div(columns, kThreads)), kThreads, 0, stream,
                  data, rows, columns, row_best, (thresholds_in<S>(high_threshold, low_threshold)),
                  indices.mutable_data_ptr<int64_t>());
  });
}

}  // namespace DETOPS_NAMESPACE
