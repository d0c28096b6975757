// linear_sum_assignment on a GPU: a block per problem, all problems at once, no host synchronisation.
//
//   1. transpose  the costs, so that those of a target stand together (not where they do already)
//   2. assign     a thread has every 256th column; the search takes one barrier a step
#include <algorithm>
#include <vector>

#include "common/counted.h"
#include "common/launch_cuda.cuh"
#include "matching/linear_sum_assignment.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTile = 32;
constexpr size_t kSharedBytes = 40 * 1024;  // for the columns and rows of a problem, else they lie in global memory

// [rows, columns] to [columns, rows] for each image. A block per tile; 32 x 8 threads.
template <class S>
__global__ void assignment_transpose_kernel(const S* cost, int64_t rows, int64_t columns, int row_tiles,
                                            int column_tiles, S* transposed) {
  DETOPS_SHARED(S, tile, kTile * (kTile + 1));
  const int64_t image = blockIdx.x / column_tiles / row_tiles;
  const int64_t first_row = int64_t(blockIdx.x / column_tiles % row_tiles) * kTile;
  const int64_t first_column = int64_t(blockIdx.x % column_tiles) * kTile;
  const S* const from = cost + image * rows * columns;
  S* const to = transposed + image * rows * columns;
  const int lane = threadIdx.x % kTile;
  for (int i = threadIdx.x / kTile; i < kTile; i += kThreads / kTile) {
    if (first_row + i < rows && first_column + lane < columns) {
      tile[i * (kTile + 1) + lane] = from[(first_row + i) * columns + first_column + lane];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x / kTile; i < kTile; i += kThreads / kTile) {
    if (first_column + i < columns && first_row + lane < rows) {
      to[(first_column + i) * rows + first_row + lane] = tile[lane * (kTile + 1) + i];
    }
  }
}

template <bool tiered>
__device__ Nearest warp_nearest(Nearest best) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Nearest other{__shfl_xor_sync(kFullWarp, best.length, distance),
                        __shfl_xor_sync(kFullWarp, best.rank, distance),
                        tiered ? __shfl_xor_sync(kFullWarp, best.tier, distance) : 0};
    if (comes_before<tiered>(other, best)) best = other;
  }
  return best;
}

// The costs of one problem, with its rows and columns as the search sees them.
template <class S>
struct AssignmentCosts {
  const S* data;
  int64_t query_stride, target_stride;
  const int* targets;  // those that take part
  bool by_target;      // rows are targets

  __device__ double given(int row, int column) const {
    const int64_t target = targets[by_target ? row : column], query = by_target ? column : row;
    return static_cast<double>(static_cast<ComputeType<S>>(data[query * query_stride + target * target_stride]));
  }
  __device__ double operator()(int row, int column) const { return cost_or_forbidden(given(row, column)); }
};

// Memory of one problem. As many targets as there are at most take part, so that it has min(queries, targets) rows at
// most, and max(queries, targets) columns.
struct AssignmentMemory {
  Counted<double> row_dual, column_dual, length;
  Counted<int> column_of, row_of, from_row, targets;
  Counted<int> row_tier, column_tier, tier;  // of the search in tiers; tier is that of length
  Counted<bool> settled;

  static int64_t bytes(int64_t rows, int64_t columns, int64_t targets) {
    return ceil_div<int64_t>(8 * (rows + 2 * columns) + 4 * (2 * rows + 4 * columns + targets) + columns, 16) * 16;
  }
  __device__ AssignmentMemory(void* memory, int64_t rows, int64_t columns, int64_t target_count) {
    unsigned char* next = static_cast<unsigned char*>(memory);
    take(next, "row_dual", rows, row_dual);
    take(next, "column_dual", columns, column_dual);
    take(next, "length", columns, length);
    take(next, "column_of", rows, column_of);
    take(next, "row_of", columns, row_of);
    take(next, "from_row", columns, from_row);
    take(next, "targets", target_count, targets);
    take(next, "row_tier", rows, row_tier);
    take(next, "column_tier", columns, column_tier);
    take(next, "tier", columns, tier);
    take(next, "settled", columns, settled);
  }

 private:
  template <class T>
  __device__ static void take(unsigned char*& next, const char* name, int64_t count, Counted<T>& part) {
    part = Counted<T>("linear_sum_assignment", name, reinterpret_cast<T*>(next), count);
    next += count * sizeof(T);
  }
};

// Lists the targets that take part, in order; returns how many. The first warp.
__device__ inline int list_targets(const int64_t* num_targets, const bool* valid, int64_t image, int target_count,
                                   const Counted<int>& targets) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t limit = num_targets != nullptr ? num_targets[image] : target_count;
  int count = 0;
  for (int first = 0; first < target_count; first += kWarpSize) {
    const int target = first + lane;
    const bool used =
        target < target_count && target < limit && (valid == nullptr || valid[image * target_count + target]);
    const unsigned vote = __ballot_sync(kFullWarp, used);
    if (used) targets[count + __popc(vote & ((1u << lane) - 1))] = target;
    count += __popc(vote);
  }
  return count;
}

// The column of each row in memory.column_of, or -1; false if some row finds none, which in tiers does not happen. All
// threads of the block. Sets `bad` where a thread has seen what InvalidCosts::kRaise raises for; each cost is seen.
template <bool tiered, class S>
__device__ bool assign(const AssignmentCosts<S>& cost, double scale, const AssignmentMemory& memory, int rows,
                       int columns, Nearest* warp_best, bool& bad) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int j = threadIdx.x; j < columns; j += kThreads) {
    memory.column_dual[j] = 0.0;
    memory.row_of[j] = -1;
    if (tiered) memory.column_tier[j] = 0;
  }
  for (int row = warp; row < rows; row += kWarps) {
    Nearest least{kForbidden, columns, 0};
    for (int j = lane; j < columns; j += kWarpSize) {
      const double given = cost.given(row, j);
      bad |= !is_cost(given);
      const Nearest other{cost_or_forbidden(given), j, 0};
      if (comes_before<false>(other, least)) least = other;
    }
    least = warp_nearest<false>(least);
    if (lane == 0) {
      memory.row_dual[row] = first_row_dual(least.length) * (tiered ? scale : 1.0);
      if (tiered) memory.row_tier[row] = first_row_tier(least.length);
      memory.column_of[row] = least.length < kForbidden ? least.rank : -1;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int row = 0; row < rows; ++row) {
      const int wanted = memory.column_of[row];
      if (wanted < 0) continue;
      if (memory.row_of[wanted] < 0) {
        memory.row_of[wanted] = row;
      } else {
        memory.column_of[row] = -1;
      }
    }
  }
  __syncthreads();
  int step = 0;
  for (int start = 0; start < rows; ++start) {
    if (memory.column_of[start] >= 0) continue;
    for (int j = threadIdx.x; j < columns; j += kThreads) {
      memory.length[j] = kForbidden;
      if (tiered) memory.tier[j] = INT32_MAX;
      memory.settled[j] = false;
    }
    int row = start, column = -1, tier = 0;
    double length = 0.0;
    while (row >= 0) {
      const double base = length - memory.row_dual[row];
      const int base_tier = tiered ? tier - memory.row_tier[row] : 0;
      Nearest best{kForbidden, 2 * columns, INT32_MAX};
      for (int j = threadIdx.x; j < columns; j += kThreads) {
        if (memory.settled[j]) continue;
        const double given = cost(row, j);
        bool shorter;
        if (tiered) {
          const bool valid = given < kForbidden;
          const double through = path_length(base, valid ? given * scale : 0.0, memory.column_dual[j]);
          const int through_tier = base_tier + !valid - memory.column_tier[j], before = memory.tier[j];
          shorter = through_tier < before || (through_tier == before && through < memory.length[j]);
          if (shorter) {
            memory.length[j] = through;
            memory.tier[j] = through_tier;
          }
        } else {
          const double through = path_length(base, given, memory.column_dual[j]);
          shorter = through < memory.length[j];
          if (shorter) memory.length[j] = through;
        }
        if (shorter) memory.from_row[j] = row;
        const Nearest other{memory.length[j], memory.row_of[j] < 0 ? j : j + columns, tiered ? memory.tier[j] : 0};
        if (comes_before<tiered>(other, best)) best = other;
      }
      // Two sets, in turn: nobody writes to a set before all have read it.
      Nearest* const of_step = warp_best + (step++ & 1) * kWarps;
      best = warp_nearest<tiered>(best);
      if (lane == 0) of_step[warp] = best;
      __syncthreads();
      best = of_step[0];
      for (int i = 1; i < kWarps; ++i) {
        if (comes_before<tiered>(of_step[i], best)) best = of_step[i];
      }
      if (!(best.length < kForbidden)) return false;
      length = best.length;
      tier = best.tier;
      column = best.rank < columns ? best.rank : best.rank - columns;
      if (column % kThreads == static_cast<int>(threadIdx.x)) memory.settled[column] = true;
      row = memory.row_of[column];
    }
    for (int j = threadIdx.x; j < columns; j += kThreads) {
      if (!memory.settled[j] || j == column) continue;
      const double change = length - memory.length[j];
      memory.row_dual[memory.row_of[j]] += change;
      memory.column_dual[j] -= change;
      if (!tiered) continue;
      const int tier_change = tier - memory.tier[j];
      memory.row_tier[memory.row_of[j]] += tier_change;
      memory.column_tier[j] -= tier_change;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      memory.row_dual[start] += length;
      if (tiered) memory.row_tier[start] += tier;
      for (int from = -1; from != start;) {
        from = memory.from_row[column];
        const int before = memory.column_of[from];
        memory.row_of[column] = from;
        memory.column_of[from] = column;
        column = before;
      }
    }
    __syncthreads();
  }
  return true;
}

// blockIdx.x is the problem.
template <class S>
__global__ void linear_sum_assignment_kernel(const S* all_costs, int query_count, int target_count, bool by_target,
                                             const int64_t* num_targets, const bool* valid, bool keep_invalid,
                                             unsigned char* global, int64_t memory_bytes, int* bad_problems,
                                             int64_t* out) {
  DETOPS_DYNAMIC_SHARED(unsigned char, shared);
  DETOPS_SHARED(Nearest, warp_best, 2 * kWarps);
  DETOPS_SHARED(double, magnitudes, kWarps);
  DETOPS_SHARED(int, used_count, 1);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = blockIdx.x;
  void* const own_memory = global != nullptr ? global + image * memory_bytes : shared;
  const AssignmentMemory memory(own_memory, min(query_count, target_count), max(query_count, target_count),
                                target_count);
  for (int target = threadIdx.x; target < target_count; target += kThreads) out[image * target_count + target] = -1;
  if (warp == 0) {
    const int count = list_targets(num_targets, valid, image, target_count, memory.targets);
    if (lane == 0) used_count[0] = count;
  }
  __syncthreads();
  const int used = used_count[0];
  const int rows = min(used, query_count), columns = max(used, query_count);
  AssignmentCosts<S> cost{all_costs + image * query_count * target_count, by_target ? 1 : target_count,
                          by_target ? query_count : 1, memory.targets.data(), used <= query_count};
  bool bad = false;
  const bool assigned = assign<false>(cost, 1.0, memory, rows, columns, warp_best, bad);
  if (bad && bad_problems != nullptr) relaxed_store(bad_problems + image, 1);
  if (!assigned) {
    double magnitude = 0.0;
    for (int row = warp; row < rows; row += kWarps) {
      for (int j = lane; j < columns; j += kWarpSize) {
        const double value = cost(row, j);
        if (value < kForbidden) magnitude = max_of(max_of(value, -value), magnitude);
      }
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      magnitude = max_of(__shfl_xor_sync(kFullWarp, magnitude, distance), magnitude);
    }
    if (lane == 0) magnitudes[warp] = magnitude;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) magnitude = max_of(magnitudes[i], magnitude);
    assign<true>(cost, cost_scale(magnitude), memory, rows, columns, warp_best, bad);
  }
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    const int column = memory.column_of[row];
    if (column < 0 || !(keep_invalid || cost(row, column) < kForbidden)) continue;
    const int target = memory.targets[cost.by_target ? row : column];
    out[image * target_count + target] = cost.by_target ? column : row;
  }
}

}  // namespace

int64_t linear_sum_assignment_cuda(const AssignmentInputs& inputs, const Tensor& out) {
  const char* const op = "linear_sum_assignment";
  const CudaScope scope(inputs.cost);
  const cudaStream_t stream = scope.stream();
  const int64_t queries = inputs.queries, targets = inputs.targets;
  const bool transpose = !inputs.by_target && targets <= queries && targets > 1;
  const auto scratch = [&](int64_t bytes) { return allocate(op, {bytes}, ScalarType::Byte, inputs.cost); };
  const Tensor transposed = scratch(transpose ? inputs.cost.numel() * int64_t(inputs.cost.element_size()) : 0);
  const int64_t bytes = AssignmentMemory::bytes(min_of(queries, targets), max_of(queries, targets), targets);
  const bool in_shared = bytes <= int64_t(kSharedBytes);
  const Tensor global = scratch(in_shared ? 0 : inputs.images * bytes);
  const bool raise = inputs.invalid == InvalidCosts::kRaise;
  const Tensor bad_problems = scratch(raise ? inputs.images * int64_t(sizeof(int)) : 0);
  if (raise) {
    check_cuda(cudaMemsetAsync(bad_problems.mutable_data_ptr(), 0, inputs.images * sizeof(int), stream), op);
  }
  if (inputs.images > INT32_MAX) fail(op, "cost must have at most 2^31 problems, got " + shape_text(inputs.cost));
  dispatch_floating(inputs.cost.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const S* cost = inputs.cost.const_data_ptr<S>();
    if (transpose) {
      const int64_t row_tiles = ceil_div<int64_t>(queries, kTile), column_tiles = ceil_div<int64_t>(targets, kTile);
      const int64_t blocks = inputs.images * row_tiles * column_tiles;
      if (blocks > INT32_MAX) fail(op, "cost must make at most 2^31 tiles, got " + shape_text(inputs.cost));
      S* const target_rows = static_cast<S*>(transposed.mutable_data_ptr());
      DETOPS_LAUNCH((assignment_transpose_kernel<S>), static_cast<unsigned>(blocks), kThreads, 0, stream, cost, queries,
                    targets, static_cast<int>(row_tiles), static_cast<int>(column_tiles), target_rows);
      cost = target_rows;
    }
    DETOPS_LAUNCH(
        (linear_sum_assignment_kernel<S>), static_cast<unsigned>(inputs.images), kThreads,
        in_shared ? static_cast<size_t>(bytes) : 0, stream, cost, static_cast<int>(queries), static_cast<int>(targets),
        inputs.by_target || transpose, inputs.num_targets ? inputs.num_targets->const_data_ptr<int64_t>() : nullptr,
        inputs.valid ? static_cast<const bool*>(inputs.valid->const_data_ptr()) : nullptr,
        inputs.invalid == InvalidCosts::kLast,
        in_shared ? nullptr : static_cast<unsigned char*>(global.mutable_data_ptr()), bytes,
        raise ? static_cast<int*>(bad_problems.mutable_data_ptr()) : nullptr, out.mutable_data_ptr<int64_t>());
  });
  if (!raise) return -1;
  std::vector<int> bad(inputs.images);
  check_cuda(cudaMemcpyAsync(bad.data(), bad_problems.const_data_ptr(), bad.size() * sizeof(int),
                             cudaMemcpyDeviceToHost, stream),
             op);
  check_cuda(cudaStreamSynchronize(stream), op);
  const auto first = std::find(bad.begin(), bad.end(), 1);
  return first != bad.end() ? first - bad.begin() : -1;
}

}  // namespace DETOPS_NAMESPACE
