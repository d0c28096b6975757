// matcher: schema, checks, and the CPU kernel.
#include <memory>

#include "common/parallel_cpu.h"
#include "common/register.h"
#include "matching/matching.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kTile = 512;  // columns that are looked at together

// The best row of each of up to kTile columns, and the best of each row among them.
template <class S>
DETOPS_CLONES void match_tile(const S* quality, int64_t rows, int64_t columns, int used,
                              const MatchThresholds<ComputeType<S>>& thresholds, int64_t* indices, int32_t* own,
                              ComputeType<S>* row_best) {
  using T = ComputeType<S>;
  T best[kTile];
  int32_t best_row[kTile];
  for (int i = 0; i < used; ++i) {
    best[i] = number_or_zero(static_cast<T>(quality[i]));
    best_row[i] = 0;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const S* const values = quality + row * columns;
    T top = number_or_zero(static_cast<T>(values[0]));
    for (int i = 0; i < used; ++i) {
      const T value = number_or_zero(static_cast<T>(values[i]));
      const bool better = value > best[i];
      best[i] = better ? value : best[i];
      best_row[i] = better ? static_cast<int32_t>(row) : best_row[i];
    }
    if (row_best == nullptr) continue;
    for (int i = 0; i < used; ++i) top = max_of(top, number_or_zero(static_cast<T>(values[i])));
    row_best[row] = top;
  }
  for (int i = 0; i < used; ++i) indices[i] = match_of(best[i], best_row[i], thresholds);
  if (own != nullptr) {
    for (int i = 0; i < used; ++i) own[i] = best_row[i];
  }
}

template <class S>
void matcher_cpu(const S* quality, int64_t rows, int64_t columns, const MatchThresholds<ComputeType<S>>& thresholds,
                 bool allow_low_quality, int64_t* indices) {
  using T = ComputeType<S>;
  const int64_t tiles = ceil_div<int64_t>(columns, kTile);
  const std::unique_ptr<int32_t[]> own(allow_low_quality ? new int32_t[columns] : nullptr);
  const std::unique_ptr<T[]> tile_best(allow_low_quality ? new T[tiles * rows] : nullptr);
  const int64_t grain = max_of<int64_t>(1, (1 << 15) / (kTile * rows));
  const auto used = [&](int64_t tile) { return static_cast<int>(min_of<int64_t>(kTile, columns - tile * kTile)); };
  parallel_ranges(tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      match_tile(quality + tile * kTile, rows, columns, used(tile), thresholds, indices + tile * kTile,
                 own ? own.get() + tile * kTile : nullptr, tile_best ? tile_best.get() + tile * rows : nullptr);
    }
  });
  if (!allow_low_quality) return;
  const std::unique_ptr<T[]> row_best(new T[rows]);
  for (int64_t row = 0; row < rows; ++row) row_best[row] = tile_best[row];
  for (int64_t tile = 1; tile < tiles; ++tile) {
    for (int64_t row = 0; row < rows; ++row) row_best[row] = max_of(row_best[row], tile_best[tile * rows + row]);
  }
  // Only tiles that hold the best of a row are looked at again.
  parallel_ranges(tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t row = 0; row < rows; ++row) {
        if (tile_best[tile * rows + row] != row_best[row]) continue;
        const S* const values = quality + row * columns + tile * kTile;
        for (int i = 0; i < used(tile); ++i) {
          const bool tied = number_or_zero(static_cast<T>(values[i])) == row_best[row];
          if (tied) indices[tile * kTile + i] = own[tile * kTile + i];
        }
      }
    }
  });
}

Tensor matcher(const Tensor& match_quality_matrix, double high_threshold, double low_threshold,
               bool allow_low_quality_matches) {
  const char* const op = "Matcher";
  check_shape(op, "match_quality_matrix", match_quality_matrix, "[M, N]", {-1, -1});
  check_floating(op, "match_quality_matrix", match_quality_matrix);
  const int64_t rows = match_quality_matrix.size(0), columns = match_quality_matrix.size(1);
  check_row_count(op, "match_quality_matrix", rows);
  check_row_count(op, "match_quality_matrix", columns, "columns");
  const Tensor quality = as_contiguous(match_quality_matrix);
  const Tensor indices = allocate(op, {columns}, ScalarType::Long, quality);
  if (columns == 0) return indices;
  if (rows == 0) {
    torch::stable::fill_(indices, static_cast<double>(kBelowLow));
    return indices;
  }
  if (on_gpu(op, quality)) {
    DETOPS_GPU_ONLY(matcher_cuda(quality, high_threshold, low_threshold, allow_low_quality_matches, indices));
  } else {
    dispatch_floating(quality.scalar_type(), [&](auto tag) {
      using S = typename decltype(tag)::type;
      matcher_cpu(quality.const_data_ptr<S>(), rows, columns, thresholds_in<S>(high_threshold, low_threshold),
                  allow_low_quality_matches, indices.mutable_data_ptr<int64_t>());
    });
  }
  return indices;
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&matcher>(
      "matcher(Tensor match_quality_matrix, float high_threshold, float low_threshold, "
      "bool allow_low_quality_matches) -> Tensor");
}

}  // namespace DETOPS_NAMESPACE
