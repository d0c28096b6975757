// max_iou: schema, checks, and the CPU kernel.
#include <memory>
#include <optional>

#include "common/parallel_cpu.h"
#include "common/register.h"
#include "iou/iou_ops.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kLanes = 16;  // first boxes that are looked at together

// The best of `count` second boxes for each of up to kLanes first ones, which stand coordinate by coordinate. `rows`
// gives the numbers of the second boxes.
template <class T>
DETOPS_CLONES void best_of_lanes(const T (&lanes)[4][kLanes], const Box<T>* boxes2, const int32_t* rows, int64_t count,
                                 T (&values)[kLanes], int32_t (&indices)[kLanes]) {
  T area[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    area[lane] = box_area(Box<T>{lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane]});
    values[lane] = T(0);
    indices[lane] = rows[0];
  }
  for (int64_t j = 0; j < count; ++j) {
    const Box<T> other = boxes2[j];
    const T other_area = box_area(other);
    const int32_t row = rows[j];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Box<T> box{lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane]};
      const T iou = pair_iou(box, area[lane], other, other_area);
      const bool better = is_better_match(iou, values[lane]);
      values[lane] = better ? iou : values[lane];
      indices[lane] = better ? row : indices[lane];
    }
  }
}

template <class T>
void max_iou_cpu(const T* boxes1, const T* boxes2, const bool* valid, const IouShape& shape, T* values,
                 int64_t* indices) {
  // The valid second boxes of each image, packed: one set for all images where they share boxes and all are valid.
  const int64_t sets = valid == nullptr ? shape.sets2() : shape.batch;
  const std::unique_ptr<Box<T>[]> partners(new Box<T>[sets * shape.columns]);
  const std::unique_ptr<int32_t[]> rows(new int32_t[sets * shape.columns]);
  const std::unique_ptr<int64_t[]> counts(new int64_t[sets]);
  for (int64_t set = 0; set < sets; ++set) {
    int64_t count = 0;
    for (int64_t j = 0; j < shape.columns; ++j) {
      if (valid != nullptr && !valid[set * shape.columns + j]) continue;
      partners[set * shape.columns + count] = load_box<T>(boxes2 + set * shape.stride2 + 4 * j);
      rows[set * shape.columns + count++] = static_cast<int32_t>(j);
    }
    counts[set] = count;
  }
  const int64_t groups = ceil_div<int64_t>(shape.rows, kLanes);
  const int64_t grain = max_of<int64_t>(1, (1 << 14) / (kLanes * max_of<int64_t>(1, shape.columns)));
  parallel_ranges(shape.batch * groups, grain, [&](int64_t begin, int64_t end) {
    T lanes[4][kLanes] = {}, best[kLanes];
    int32_t best_rows[kLanes];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / groups, first = item % groups * kLanes;
      const int64_t set = sets == 1 ? 0 : image;
      const int64_t used = min_of<int64_t>(kLanes, shape.rows - first);
      T* const values_out = values + image * shape.rows + first;
      int64_t* const indices_out = indices + image * shape.rows + first;
      if (counts[set] == 0) {
        for (int64_t lane = 0; lane < used; ++lane) {
          values_out[lane] = T(0);
          indices_out[lane] = -1;
        }
        continue;
      }
      for (int64_t lane = 0; lane < used; ++lane) {
        for (int k = 0; k < 4; ++k) lanes[k][lane] = boxes1[image * shape.stride1 + 4 * (first + lane) + k];
      }
      best_of_lanes(lanes, partners.get() + set * shape.columns, rows.get() + set * shape.columns, counts[set], best,
                    best_rows);
      for (int64_t lane = 0; lane < used; ++lane) {
        values_out[lane] = best[lane];
        indices_out[lane] = best_rows[lane];
      }
    }
  });
}

std::tuple<Tensor, Tensor> max_iou(const Tensor& boxes1, const Tensor& boxes2, const std::optional<Tensor>& valid) {
  const char* const op = "max_iou";
  IouShape shape = check_iou_boxes(op, boxes1, boxes2, false);
  const IouBoxes dense1(boxes1, false), dense2(boxes2, false);
  shape.stride1 = dense1.stride;
  shape.stride2 = dense2.stride;
  std::optional<Tensor> dense_valid;
  if (valid.has_value()) {
    check_mask(op, "valid", *valid, "boxes2", boxes2);
    dense_valid = as_contiguous(*valid);
  }
  const std::vector<int64_t> sizes = leading_sizes(boxes1, boxes1.dim() - 1);
  const Tensor values = allocate(op, sizes, boxes1.scalar_type(), boxes1);
  const Tensor indices = allocate(op, sizes, ScalarType::Long, boxes1);
  if (values.numel() == 0) return {values, indices};
  if (on_gpu(op, boxes1)) {
    DETOPS_GPU_ONLY(
        max_iou_cuda(dense1.tensor, dense2.tensor, dense_valid ? &*dense_valid : nullptr, shape, values, indices));
  } else {
    dispatch_compute_type(boxes1.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      max_iou_cpu(dense1.tensor.const_data_ptr<T>(), dense2.tensor.const_data_ptr<T>(),
                  dense_valid ? static_cast<const bool*>(dense_valid->const_data_ptr()) : nullptr, shape,
                  values.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>());
    });
  }
  return {values, indices};
}

}  // namespace

DETOPS_OPS(ops) { ops.add<&max_iou>("max_iou(Tensor boxes1, Tensor boxes2, Tensor? valid) -> (Tensor, Tensor)"); }

}  // namespace DETOPS_NAMESPACE
