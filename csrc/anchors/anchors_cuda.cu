// assign_sizes and kmeans_anchors on a GPU. An iteration is two launches: one assigns and adds up what has changed, one
// moves the anchors. When nothing has changed, those that follow return at once: no host synchronisation.
#include "anchors/anchors.h"

#include <limits>

#include "common/allocate.h"
#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kSizesPerThread = 4;
constexpr float kFarthest = -std::numeric_limits<float>::infinity();

struct Nearest {
  int label;
  float affinity;
};

template <SizeMetric metric>
__device__ inline Nearest nearest_anchor(float width, float height, const float* anchors, int count) {
  Nearest nearest{0, kFarthest};
  for (int a = 0; a < count; ++a) {
    const float value = affinity<metric>(width, height, anchors[2 * a], anchors[2 * a + 1]);
    if (is_nearer(value, nearest.affinity)) nearest = {a, value};
  }
  return nearest;
}

template <SizeMetric metric>
__global__ void assign_sizes_kernel(const float* sizes, int64_t count, const float* anchors, int anchor_count,
                                    int64_t* labels, float* affinities) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const Nearest nearest = nearest_anchor<metric>(sizes[2 * i], sizes[2 * i + 1], anchors, anchor_count);
  labels[i] = nearest.label;
  affinities[i] = nearest.affinity;
}

// What iterations pass on to each other; `sums` [anchors][3] and `labels` are arrays of their own.
struct State {
  int64_t changes, iterations, ended;
};

// Integer sums: the order of threads does not matter.
__device__ inline void add(int64_t* sum, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

__global__ void kmeans_start_kernel(int64_t count, int anchor_count, int* labels, int64_t* sums, State* state) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) labels[i] = -1;
  if (i < 3 * anchor_count) sums[i] = 0;
  if (i == 0) *state = {0, 0, 0};
}

template <SizeMetric metric>
__global__ void kmeans_assign_kernel(const float* sizes, int64_t count, const float* anchors, int anchor_count,
                                     SizeScale scale, int* labels, int64_t* sums, State* state) {
  DETOPS_DYNAMIC_SHARED(int64_t, differences);  // [anchors][3], and the number of changes
  if (state->ended != 0) return;
  const int numbers = 3 * anchor_count + 1;
  for (int i = threadIdx.x; i < numbers; i += kThreads) differences[i] = 0;
  __syncthreads();
  for (int step = 0; step < kSizesPerThread; ++step) {
    const int64_t i = (int64_t(blockIdx.x) * kSizesPerThread + step) * kThreads + threadIdx.x;
    if (i >= count) break;
    const float width = sizes[2 * i], height = sizes[2 * i + 1];
    const int before = labels[i], after = nearest_anchor<metric>(width, height, anchors, anchor_count).label;
    if (before == after) continue;
    labels[i] = after;
    const int64_t whole_width = scale.integer(width), whole_height = scale.integer(height);
    add(differences + 3 * after, whole_width);
    add(differences + 3 * after + 1, whole_height);
    add(differences + 3 * after + 2, 1);
    add(differences + 3 * anchor_count, 1);
    if (before < 0) continue;
    add(differences + 3 * before, -whole_width);
    add(differences + 3 * before + 1, -whole_height);
    add(differences + 3 * before + 2, -1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < numbers; i += kThreads) {
    if (differences[i] != 0) add(i < 3 * anchor_count ? sums + i : &state->changes, differences[i]);
  }
}

// One block.
__global__ void kmeans_move_kernel(const int64_t* sums, int anchor_count, SizeScale scale, State* state,
                                   float* anchors) {
  const bool ended = state->ended != 0, changed = state->changes != 0;
  __syncthreads();
  if (ended) return;
  if (threadIdx.x == 0) {
    state->changes = 0;
    state->iterations += 1;
    state->ended = changed ? 0 : 1;
  }
  if (!changed) return;
  for (int a = threadIdx.x; a < anchor_count; a += kThreads) {
    const int64_t count = sums[3 * a + 2];
    if (count == 0) continue;
    anchors[2 * a] = scale.mean(sums[3 * a], count);
    anchors[2 * a + 1] = scale.mean(sums[3 * a + 1], count);
  }
}

__global__ void kmeans_finish_kernel(const State* state, int64_t* iterations) { *iterations = state->iterations; }

}  // namespace

void assign_sizes_cuda(const Tensor& sizes, const Tensor& anchors, SizeMetric size_metric, const Tensor& labels,
                       const Tensor& affinities) {
  const CudaScope scope(sizes);
  const int64_t count = sizes.size(0);
  dispatch_size_metric(size_metric, [&](auto metric) {
    DETOPS_LAUNCH(
        (assign_sizes_kernel<decltype(metric)::value>), blocks_for("kmeans_anchors", "sizes", count, kThreads),
        kThreads, 0, scope.stream(), sizes.const_data_ptr<float>(), count, anchors.const_data_ptr<float>(),
        static_cast<int>(anchors.size(0)), labels.mutable_data_ptr<int64_t>(), affinities.mutable_data_ptr<float>());
  });
}

void kmeans_anchors_cuda(const Tensor& sizes, SizeMetric size_metric, int64_t max_iterations, const Tensor& anchors,
                         const Tensor& iterations) {
  const char* const op = "kmeans_anchors";
  const CudaScope scope(sizes);
  const int64_t count = sizes.size(0);
  const int anchor_count = static_cast<int>(anchors.size(0));
  const SizeScale scale(count);
  const Tensor labels = allocate(op, {count}, ScalarType::Int, sizes);
  const Tensor sums = allocate(op, {anchor_count, 3}, ScalarType::Long, sizes);
  const Tensor state_memory = allocate(op, {sizeof(State) / sizeof(int64_t)}, ScalarType::Long, sizes);
  State* const state = reinterpret_cast<State*>(state_memory.mutable_data_ptr<int64_t>());
  int* const label_data = labels.mutable_data_ptr<int>();
  int64_t* const sum_data = sums.mutable_data_ptr<int64_t>();
  float* const anchor_data = anchors.mutable_data_ptr<float>();
  DETOPS_LAUNCH((kmeans_start_kernel), blocks_for(op, "sizes", max_of<int64_t>(count, 3 * anchor_count), kThreads),
                kThreads, 0, scope.stream(), count, anchor_count, label_data, sum_data, state);
  dispatch_size_metric(size_metric, [&](auto metric) {
    for (int64_t iteration = 0; iteration < max_iterations; ++iteration) {
      DETOPS_LAUNCH((kmeans_assign_kernel<decltype(metric)::value>),
                    blocks_for(op, "sizes", count, kThreads * kSizesPerThread), kThreads,
                    (3 * anchor_count + 1) * sizeof(int64_t), scope.stream(), sizes.const_data_ptr<float>(), count,
                    anchor_data, anchor_count, scale, label_data, sum_data, state);
      DETOPS_LAUNCH((kmeans_move_kernel), 1, kThreads, 0, scope.stream(), sum_data, anchor_count, scale, state,
                    anchor_data);
    }
  });
  DETOPS_LAUNCH((kmeans_finish_kernel), 1, 1, 0, scope.stream(), state, iterations.mutable_data_ptr<int64_t>());
}

}  // namespace DETOPS_NAMESPACE
