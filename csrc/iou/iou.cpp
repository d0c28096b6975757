// box_iou and its gradient: schema, checks, and the CPU kernels.
#include "iou/iou.h"

#include <memory>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"
#include "common/register.h"
#include "iou/iou_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

// The second boxes, coordinate by coordinate, so that the loop over them vectorises.
template <class T>
struct IouColumns {
  const T *x1, *y1, *x2, *y2, *area, *angle;

  DETOPS_HD IouBox<T> at(int64_t j) const { return {{x1[j], y1[j], x2[j], y2[j]}, area[j], angle[j]}; }
};

template <IouKind kind, class T>
DETOPS_CLONES void fill_columns(const T* boxes, int64_t count, T* columns) {
  for (int64_t j = 0; j < count; ++j) {
    const IouBox<T> box = iou_box<kind>(load_box<T>(boxes + 4 * j));
    columns[j] = box.box.x1;
    columns[count + j] = box.box.y1;
    columns[2 * count + j] = box.box.x2;
    columns[3 * count + j] = box.box.y2;
    columns[4 * count + j] = box.area;
    columns[5 * count + j] = box.angle;
  }
}

// The second boxes of all images as columns: [sets][6][count].
template <class T>
class AllColumns {
 public:
  template <IouKind kind>
  static AllColumns make(const T* boxes, const IouShape& shape) {
    AllColumns all(shape);
    for (int64_t set = 0; set < shape.sets2(); ++set) {
      fill_columns<kind>(boxes + set * shape.stride2, shape.columns, all.data_.get() + set * 6 * shape.columns);
    }
    return all;
  }
  IouColumns<T> of(int64_t image) const {
    const int64_t count = shape_.columns;
    const T* const data = data_.get() + shape_.set2_of(image) * 6 * count;
    return {data, data + count, data + 2 * count, data + 3 * count, data + 4 * count, data + 5 * count};
  }

 private:
  explicit AllColumns(const IouShape& shape) : shape_(shape), data_(new T[shape.sets2() * 6 * shape.columns]) {}
  IouShape shape_;
  std::unique_ptr<T[]> data_;
};

template <IouKind kind, class T>
DETOPS_CLONES void iou_row(const IouBox<T>& a, const IouColumns<T>& columns, int64_t count, T eps,
                           T* __restrict__ out) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) out[j] = iou_value<kind>(a, columns.at(j), eps);
}

template <IouKind kind, class T>
void pairwise(const T* boxes1, const T* boxes2, const IouShape& shape, T eps, T* out) {
  const auto columns = AllColumns<T>::template make<kind>(boxes2, shape);
  const int64_t grain = ceil_div<int64_t>(1 << 14, max_of<int64_t>(1, shape.columns));
  parallel_ranges(shape.batch * shape.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / shape.rows;
      const T* const box = boxes1 + image * shape.stride1 + row % shape.rows * 4;
      iou_row<kind>(iou_box<kind>(load_box<T>(box)), columns.of(image), shape.columns, eps, out + row * shape.columns);
    }
  });
}

template <IouKind kind, class T>
DETOPS_CLONES void aligned_range(const T* boxes1, const T* boxes2, int64_t begin, int64_t end, T eps,
                                 T* __restrict__ out) {
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    out[i] =
        iou_value<kind>(iou_box<kind>(load_box<T>(boxes1 + 4 * i)), iou_box<kind>(load_box<T>(boxes2 + 4 * i)), eps);
  }
}

template <IouKind kind, class T>
DETOPS_CLONES void aligned_gradient_range(const T* boxes1, const T* boxes2, const T* grad, int64_t begin, int64_t end,
                                          T eps, T* __restrict__ grad1, T* __restrict__ grad2) {
  for (int64_t i = begin; i < end; ++i) {
    const PairGradient<T> gradient = iou_gradient<kind>(iou_box<kind>(load_box<T>(boxes1 + 4 * i)),
                                                        iou_box<kind>(load_box<T>(boxes2 + 4 * i)), eps, grad[i]);
    if (grad1 != nullptr) store_box(gradient.a, grad1 + 4 * i);
    if (grad2 != nullptr) store_box(gradient.b, grad2 + 4 * i);
  }
}

// Gradients of one row of pairs: with respect to its first box, and added to `sums` with respect to the second ones,
// where wanted. A fixed number of lanes, so that the sums are the same for every instruction set.
template <IouKind kind, bool first, bool second, class T>
DETOPS_CLONES Box<T> gradient_row(const IouBox<T>& a, const IouColumns<T>& columns, const T* grad, int64_t count, T eps,
                                  T* __restrict__ sums) {
  constexpr int kLanes = 16;
  T lanes[4][kLanes] = {};
  const auto add = [&](int64_t j, int lane) __attribute__((always_inline)) {
    const PairGradient<T> gradient = iou_gradient<kind>(a, columns.at(j), eps, grad[j]);
    if (first) {
      lanes[0][lane] += gradient.a.x1;
      lanes[1][lane] += gradient.a.y1;
      lanes[2][lane] += gradient.a.x2;
      lanes[3][lane] += gradient.a.y2;
    }
    if (second) {
      sums[j] += gradient.b.x1;
      sums[count + j] += gradient.b.y1;
      sums[2 * count + j] += gradient.b.x2;
      sums[3 * count + j] += gradient.b.y2;
    }
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) add(j + lane, lane);
  }
  for (int lane = 0; j + lane < count; ++lane) add(j + lane, lane);
  T total[4] = {};
  for (int k = 0; k < 4; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) total[k] += lanes[k][lane];
  }
  return {total[0], total[1], total[2], total[3]};
}

// The rows of each image fall into a number of blocks that depends on nothing but their count. Each block sums up the
// gradients of the second boxes for itself; the blocks' sums are added in order.
template <IouKind kind, bool first, bool second, class T>
void pairwise_gradient(const T* boxes1, const T* boxes2, const T* grad, const IouShape& shape, T eps, T* grad1,
                       T* grad2) {
  const auto columns = AllColumns<T>::template make<kind>(boxes2, shape);
  const int64_t rows_per_block = max_of<int64_t>(64, ceil_div<int64_t>(shape.rows, 16));
  const int64_t blocks = ceil_div(shape.rows, rows_per_block);
  const int64_t sums_per_block = second ? 4 * shape.columns : 0;
  parallel_items(shape.batch, [&](const auto& next_image) {
    const std::unique_ptr<T[]> sums(new T[blocks * sums_per_block]);
    for (int64_t image = next_image(); image >= 0; image = next_image()) {
      const IouColumns<T> image_columns = columns.of(image);
      // Inside a parallel region, as when there are several images, this loop is serial.
      parallel_items(blocks, [&](const auto& next_block) {
        for (int64_t block = next_block(); block >= 0; block = next_block()) {
          T* const block_sums = sums.get() + block * sums_per_block;
          std::fill(block_sums, block_sums + sums_per_block, T(0));
          const int64_t end = min_of((block + 1) * rows_per_block, shape.rows);
          for (int64_t row = block * rows_per_block; row < end; ++row) {
            const int64_t pair_row = image * shape.rows + row;
            const Box<T> box = load_box<T>(boxes1 + image * shape.stride1 + 4 * row);
            const Box<T> gradient = gradient_row<kind, first, second>(
                iou_box<kind>(box), image_columns, grad + pair_row * shape.columns, shape.columns, eps, block_sums);
            if (first) store_box(gradient, grad1 + 4 * pair_row);
          }
        }
      });
      for (int64_t j = 0; second && j < shape.columns; ++j) {
        T total[4] = {};
        for (int64_t block = 0; block < blocks; ++block) {
          for (int k = 0; k < 4; ++k) total[k] += sums[block * sums_per_block + k * shape.columns + j];
        }
        store_box(Box<T>{total[0], total[1], total[2], total[3]}, grad2 + 4 * (image * shape.columns + j));
      }
    }
  });
}

constexpr int64_t kAlignedGrain = 4096;

void box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2, IouKind iou_kind, bool aligned, const IouShape& shape,
                 double eps, const Tensor& out) {
  dispatch_iou(boxes1.scalar_type(), iou_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    const T *const data1 = boxes1.const_data_ptr<T>(), *const data2 = boxes2.const_data_ptr<T>();
    T* const result = out.mutable_data_ptr<T>();
    if (!aligned) return pairwise<kind.value>(data1, data2, shape, T(eps), result);
    parallel_ranges(shape.rows, kAlignedGrain, [&](int64_t begin, int64_t end) {
      aligned_range<kind.value>(data1, data2, begin, end, T(eps), result);
    });
  });
}

void box_iou_backward_cpu(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2, IouKind iou_kind,
                          bool aligned, const IouShape& shape, double eps, const Tensor* grad1, const Tensor* grad2) {
  dispatch_iou(boxes1.scalar_type(), iou_kind, [&](auto tag, auto kind) {
    using T = typename decltype(tag)::type;
    const T *const data1 = boxes1.const_data_ptr<T>(), *const data2 = boxes2.const_data_ptr<T>();
    const T* const grad_data = grad.const_data_ptr<T>();
    T *const out1 = data_if_wanted<T>(grad1), *const out2 = data_if_wanted<T>(grad2);
    if (!aligned) {
      return dispatch_wanted(grad1, grad2, [&](auto first, auto second) {
        pairwise_gradient<kind.value, first.value, second.value>(data1, data2, grad_data, shape, T(eps), out1, out2);
      });
    }
    parallel_ranges(shape.rows, kAlignedGrain, [&](int64_t begin, int64_t end) {
      aligned_gradient_range<kind.value>(data1, data2, grad_data, begin, end, T(eps), out1, out2);
    });
  });
}

// The function of detops that a kind belongs to, for errors.
const char* kind_name(int64_t kind) {
  static const char* const names[kIouKinds] = {"box_iou",          "generalized_box_iou", "distance_box_iou",
                                               "complete_box_iou", "efficient_box_iou",   "box_ioa"};
  if (kind < 0 || kind >= kIouKinds) fail("box_iou", "kind must be from 0 to 5, got " + std::to_string(kind));
  return names[kind];
}

Tensor box_iou(const Tensor& boxes1, const Tensor& boxes2, int64_t kind_number, bool aligned, double eps) {
  const char* const op = kind_name(kind_number);
  const auto kind = static_cast<IouKind>(kind_number);
  IouShape shape = check_iou_boxes(op, boxes1, boxes2, aligned);
  const IouBoxes dense1(boxes1, aligned), dense2(boxes2, aligned);
  shape.stride1 = dense1.stride;
  shape.stride2 = dense2.stride;
  const Tensor out = allocate(op, pair_sizes(boxes1, shape, aligned), boxes1.scalar_type(), boxes1);
  if (out.numel() == 0) return out;
  if (on_gpu(op, boxes1)) {
    DETOPS_GPU_ONLY(box_iou_cuda(dense1.tensor, dense2.tensor, kind, aligned, shape, eps, out));
  } else {
    box_iou_cpu(dense1.tensor, dense2.tensor, kind, aligned, shape, eps, out);
  }
  return out;
}

std::tuple<Tensor, Tensor> box_iou_backward(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                                            int64_t kind_number, bool aligned, double eps, bool boxes1_wanted,
                                            bool boxes2_wanted) {
  const char* const op = kind_name(kind_number);
  const auto kind = static_cast<IouKind>(kind_number);
  IouShape shape = check_iou_boxes(op, boxes1, boxes2, aligned);
  const IouBoxes dense1(boxes1, aligned), dense2(boxes2, aligned);
  shape.stride1 = dense1.stride;
  shape.stride2 = dense2.stride;
  check_sizes(op, "grad", grad, pair_sizes(boxes1, shape, aligned), " as the result");
  check_same_dtype(op, "grad", grad, "boxes1", boxes1);
  check_same_device(op, "grad", grad, "boxes1", boxes1);
  const Tensor dense_grad = as_contiguous(grad);
  const auto like = [&](const Tensor& boxes, bool wanted) {
    return allocate(op, wanted ? sizes_of(boxes) : std::vector<int64_t>{0}, boxes.scalar_type(), boxes);
  };
  const Tensor grad1 = like(boxes1, boxes1_wanted), grad2 = like(boxes2, boxes2_wanted);
  const Tensor *const wanted1 = boxes1_wanted ? &grad1 : nullptr, *const wanted2 = boxes2_wanted ? &grad2 : nullptr;
  if (!boxes1_wanted && !boxes2_wanted) return {grad1, grad2};
  if (on_gpu(op, boxes1)) {
    DETOPS_GPU_ONLY(
        box_iou_backward_cuda(dense_grad, dense1.tensor, dense2.tensor, kind, aligned, shape, eps, wanted1, wanted2));
  } else {
    box_iou_backward_cpu(dense_grad, dense1.tensor, dense2.tensor, kind, aligned, shape, eps, wanted1, wanted2);
  }
  return {grad1, grad2};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&box_iou>("box_iou(Tensor boxes1, Tensor boxes2, int kind, bool aligned, float eps) -> Tensor");
  ops.add<&box_iou_backward>(
      "box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int kind, bool aligned, float eps, "
      "bool boxes1_wanted=True, bool boxes2_wanted=True) -> (Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
