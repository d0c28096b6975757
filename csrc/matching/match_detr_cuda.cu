// match_detr on a GPU, without a host synchronisation.
//
//   1. softmax  of each query, one warp a query (not for focal costs)
//   2. cost     [B, M, Q], one thread a cost; and which boxes take part: those that are valid and have a label
//   3. the solver of linear_sum_assignment
#include "common/launch_cuda.cuh"
#include "matching/linear_sum_assignment.h"
#include "matching/match_detr.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kSoftmaxLanes == kWarpSize, "the sum runs over the lanes of a warp");

template <class T>
__global__ void match_detr_softmax_kernel(const T* logits, int64_t rows, int classes, Softmax* softmax) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const T* const own = logits + row * classes;
  double most = -kForbidden, sum = 0.0;
  for (int k = lane; k < classes; k += kWarpSize) most = max_of(static_cast<double>(own[k]), most);
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    most = max_of(__shfl_xor_sync(kFullWarp, most, distance), most);
  }
  for (int k = lane; k < classes; k += kWarpSize) sum += math::exp(static_cast<double>(own[k]) - most);
  sum = warp_sum(sum);
  if (lane == 0) softmax[row] = {most, sum};
}

// blockIdx.x is the box, of all images.
template <class T>
__global__ void match_detr_cost_kernel(const T* logits, const T* boxes, const T* gt_boxes, const int64_t* gt_labels,
                                       const bool* gt_valid, int queries, int classes, int gts, DetrOptions options,
                                       const Softmax* softmax, T* costs, bool* takes_part) {
  const int64_t gt = blockIdx.x, image = gt / gts;
  const int64_t label = gt_labels[gt];
  const bool valid = (gt_valid == nullptr || gt_valid[gt]) && label >= 0 && label < classes;
  if (blockIdx.y == 0 && threadIdx.x == 0) takes_part[gt] = valid;
  if (!valid) return;
  const DetrBox<T> gt_box = detr_box(load_box<T>(gt_boxes + 4 * gt), options.xyxy);
  for (int q = int(blockIdx.y) * kThreads + threadIdx.x; q < queries; q += int(gridDim.y) * kThreads) {
    const int64_t row = image * queries + q;
    const auto logit = static_cast<double>(logits[row * classes + label]);
    const double class_cost = softmax != nullptr     ? softmax_cost(logit, softmax[row].most, softmax[row].sum)
                              : options.gamma == 2.0 ? focal_cost<true>(logit, options.alpha, options.gamma)
                                                     : focal_cost<false>(logit, options.alpha, options.gamma);
    costs[gt * queries + q] =
        detr_cost(detr_box(load_box<T>(boxes + 4 * row), options.xyxy), gt_box, static_cast<T>(class_cost),
                  T(options.class_weight), T(options.l1_weight), T(options.giou_weight));
  }
}

}  // namespace

int64_t match_detr_cuda(const DetrInputs& inputs, const DetrOptions& options, const Tensor& out) {
  const char* const op = "match_detr";
  const CudaScope scope(inputs.logits);
  const cudaStream_t stream = scope.stream();
  const int64_t rows = inputs.images * inputs.queries, boxes = inputs.images * inputs.gts;
  check_row_count(op, "logits", rows, "rows of all images");
  check_row_count(op, "gt_boxes", boxes, "rows of all images");
  if (rows == 0) {  // no costs
    check_cuda(cudaMemsetAsync(out.mutable_data_ptr(), 0xff, out.numel() * sizeof(int64_t), stream), op);
    return -1;
  }
  const Tensor takes_part = allocate(op, {boxes}, ScalarType::Bool, inputs.logits);
  const Tensor cost =
      allocate(op, {inputs.images, inputs.gts, inputs.queries}, inputs.logits.scalar_type(), inputs.logits);
  dispatch_compute_type(inputs.logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor scratch =
        allocate(op, {options.focal ? 0 : rows * int64_t(sizeof(Softmax))}, ScalarType::Byte, inputs.logits);
    auto* const softmax = options.focal ? nullptr : static_cast<Softmax*>(scratch.mutable_data_ptr());
    const T* const logits = inputs.logits.const_data_ptr<T>();
    if (!options.focal) {
      DETOPS_LAUNCH((match_detr_softmax_kernel<T>), static_cast<unsigned>(ceil_div<int64_t>(rows, kWarps)), kThreads, 0,
                    stream, logits, rows, static_cast<int>(inputs.classes), softmax);
    }
    const dim3 grid(static_cast<unsigned>(boxes),
                    static_cast<unsigned>(min_of<int64_t>(ceil_div<int64_t>(inputs.queries, kThreads), 65535)));
    DETOPS_LAUNCH((match_detr_cost_kernel<T>), grid, kThreads, 0, stream, logits, inputs.boxes.const_data_ptr<T>(),
                  inputs.gt_boxes.const_data_ptr<T>(), inputs.gt_labels.const_data_ptr<int64_t>(),
                  bool_data(inputs.gt_valid), static_cast<int>(inputs.queries), static_cast<int>(inputs.classes),
                  static_cast<int>(inputs.gts), options, softmax, cost.mutable_data_ptr<T>(),
                  static_cast<bool*>(takes_part.mutable_data_ptr()));
  });
  return linear_sum_assignment_cuda(
      {cost, std::nullopt, takes_part, inputs.images, inputs.queries, inputs.gts, true, options.invalid}, out);
}

}  // namespace DETOPS_NAMESPACE
