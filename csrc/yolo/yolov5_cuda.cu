// assign_yolov5 on a GPU: all (cell, anchor, gt) of a level in their order fall into chunks, one block each. The blocks
// count their rows, and then each adds up the counts before its own and writes them.
#include "common/launch_cuda.cuh"
#include "yolo/yolov5.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Chunk `chunk` of `chunks_per_pair` of the gts, for one cell and anchor.
struct Chunk {
  int cell;
  int64_t anchor, row;

  __device__ Chunk(int64_t chunk, int64_t chunks_per_pair, int64_t anchors)
      : cell(static_cast<int>(chunk / chunks_per_pair / anchors)),
        anchor(chunk / chunks_per_pair % anchors),
        row(chunk % chunks_per_pair * kThreads + threadIdx.x) {}
};

template <class T>
__global__ void yolov5_count_kernel(Yolov5View<T> view, Yolov5Level<T> level, int64_t number, int64_t chunks_per_pair,
                                    int* counts) {
  const Chunk chunk(blockIdx.x, chunks_per_pair, view.anchor_count);
  const bool takes = chunk.row < view.gts && (view.cells(level, number, chunk.anchor, chunk.row) >> chunk.cell & 1);
  const int count = __syncthreads_count(takes);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

template <class T>
__global__ void yolov5_write_kernel(Yolov5View<T> view, Yolov5Level<T> level, int64_t number, int64_t chunks_per_pair,
                                    const int* counts, Yolov5Rows<T> out, int64_t* total) {
  DETOPS_SHARED(int, before, kThreads);  // rows of earlier chunks, by thread
  DETOPS_SHARED(int, of_warps, kWarps);  // rows of this chunk, by warp
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Chunk chunk(blockIdx.x, chunks_per_pair, view.anchor_count);
  const bool takes = chunk.row < view.gts && (view.cells(level, number, chunk.anchor, chunk.row) >> chunk.cell & 1);
  int sum = 0;
  for (int64_t i = threadIdx.x; i < blockIdx.x; i += kThreads) sum += counts[i];
  before[threadIdx.x] = sum;
  const unsigned vote = __ballot_sync(kFullWarp, takes);
  if (lane == 0) of_warps[warp] = __popc(vote);
  __syncthreads();
  const bool last = threadIdx.x == 0 && blockIdx.x + 1 == gridDim.x;
  if (!takes && !last) return;
  int64_t place = 0;
  for (int i = 0; i < kThreads; ++i) place += before[i];
  if (last) *total = place + counts[blockIdx.x];
  if (!takes) return;
  for (int i = 0; i < warp; ++i) place += of_warps[i];
  place += __popc(vote & ((1u << lane) - 1));
  const int64_t gts = view.ground_truth.count;
  write_row(view, level, chunk.cell, chunk.anchor, chunk.row / gts, chunk.row % gts, place, out);
}

template <class T>
void launch_all(const Yolov5Inputs& inputs, const Yolov5Outputs& out) {
  const char* const op = "assign_yolov5";
  const CudaScope scope(inputs.boxes);
  const cudaStream_t stream = scope.stream();
  const Yolov5View<T> view = inputs.view<T>();
  const int64_t levels = inputs.anchors.size(0);
  const auto set = [&](const Tensor& tensor, int value) {
    const size_t bytes = tensor.numel() * tensor.element_size();
    if (bytes > 0) check_cuda(cudaMemsetAsync(tensor.mutable_data_ptr(), value, bytes, stream), op);
  };
  set(out.indices, 0xff);
  set(out.gt_indices, 0xff);
  set(out.labels, 0xff);
  set(out.boxes, 0);
  set(out.counts, 0);
  const int64_t chunks_per_pair = ceil_div<int64_t>(view.gts, kThreads);
  const int64_t chunks = kYolov5Cells * view.anchor_count * chunks_per_pair;
  if (chunks == 0) return;
  const Tensor counts = allocate(op, {chunks}, ScalarType::Int, inputs.boxes);
  int* const chunk_counts = counts.mutable_data_ptr<int>();
  const auto blocks = static_cast<unsigned>(chunks);
  for (int64_t number = 0; number < levels; ++number) {
    DETOPS_LAUNCH((yolov5_count_kernel<T>), blocks, kThreads, 0, stream, view, inputs.level<T>(number), number,
                  chunks_per_pair, chunk_counts);
    DETOPS_LAUNCH((yolov5_write_kernel<T>), blocks, kThreads, 0, stream, view, inputs.level<T>(number), number,
                  chunks_per_pair, chunk_counts, out.level<T>(number, view.capacity),
                  out.counts.mutable_data_ptr<int64_t>() + number);
  }
}

}  // namespace

void assign_yolov5_cuda(const Yolov5Inputs& inputs, const Yolov5Outputs& out) {
  dispatch_compute_type(inputs.boxes.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_all<T>(inputs, out);
  });
}

}  // namespace DETOPS_NAMESPACE
