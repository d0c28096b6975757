// encode_boxes, decode_boxes, encode_ltrb and decode_ltrb: schemas, checks, and the CPU loops.
#include "coders/coders.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel_cpu.h"
#include "common/register.h"
#include "common/transpose_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kGrain = 1 << 12;  // rows that are worth a thread
constexpr int64_t kTile = 64;        // rows that are computed together
constexpr int64_t kRun = 128;        // rows whose repeated partners are laid out side by side

// Rows, column by column: the compiler vectorises over them, as it does not over the columns of one row.
template <class Row>
struct Tile {
  using T = typename Row::Scalar;
  static constexpr int kColumns = Row::kCoordinates;
  T columns[kColumns][kTile];

  template <class S>
  DETOPS_HD void read(const S* rows, int64_t count) {
    int64_t i = 0;
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float> && kColumns == 4) {
      for (; i + 4 <= count; i += 4) transpose_four(rows + 4 * i, &columns[0][i], kTile);
    }
    for (; i < count; ++i) {
      for (int c = 0; c < kColumns; ++c) columns[c][i] = static_cast<T>(rows[kColumns * i + c]);
    }
  }
  template <class S>
  DETOPS_HD void write(int64_t count, S* __restrict__ rows) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int c = 0; c < kColumns; ++c) rows[kColumns * i + c] = static_cast<S>(columns[c][i]);
    }
  }
  DETOPS_HD Row at(int64_t i) const {
    T values[kColumns];
    for (int c = 0; c < kColumns; ++c) values[c] = columns[c][i];
    Row row;
    load(values, row);
    return row;
  }
  DETOPS_HD void set(int64_t i, const Row& row) {
    T values[kColumns];
    store(row, values);
    for (int c = 0; c < kColumns; ++c) columns[c][i] = values[c];
  }
};

// The stride of each row, 1 where there are none.
template <class T, class A>
DETOPS_HD void read_strides(const A* strides, int64_t count, T* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = strides != nullptr ? static_cast<T>(strides[i]) : T(1);
}

template <class Coder, class S, class A>
DETOPS_CLONES void code_run(const Coder& coder, const S* first, const A* second, const A* strides, int64_t rows,
                            A* __restrict__ out) {
  using T = ComputeType<A>;
  constexpr int kColumns = Coder::Second::kCoordinates;
  Tile<Box<T>> boxes, results;
  Tile<typename Coder::Second> partners;
  T stride[kTile];
  for (int64_t begin = 0; begin < rows; begin += kTile) {
    const int64_t count = min_of<int64_t>(kTile, rows - begin);
    boxes.read(first + 4 * begin, count);
    partners.read(second + kColumns * begin, count);
    read_strides(strides == nullptr ? nullptr : strides + begin, count, stride);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) results.set(i, coder.forward(boxes.at(i), partners.at(i), stride[i]));
    results.write(count, out + 4 * begin);
  }
}

template <class Coder, class S, class A>
DETOPS_CLONES void code_run_backward(const Coder& coder, const A* grad, const S* first, const A* second,
                                     const A* strides, int64_t rows, S* __restrict__ grad_first,
                                     A* __restrict__ grad_second) {
  using T = ComputeType<A>;
  constexpr int kColumns = Coder::Second::kCoordinates;
  Tile<Box<T>> upstream, boxes, of_boxes;
  Tile<typename Coder::Second> partners, of_partners;
  T stride[kTile];
  for (int64_t begin = 0; begin < rows; begin += kTile) {
    const int64_t count = min_of<int64_t>(kTile, rows - begin);
    upstream.read(grad + 4 * begin, count);
    boxes.read(first + 4 * begin, count);
    partners.read(second + kColumns * begin, count);
    read_strides(strides == nullptr ? nullptr : strides + begin, count, stride);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      Box<T> of_box;
      typename Coder::Second of_partner;
      coder.backward(upstream.at(i), boxes.at(i), partners.at(i), stride[i], of_box, of_partner);
      of_boxes.set(i, of_box);
      of_partners.set(i, of_partner);
    }
    of_boxes.write(count, grad_first + 4 * begin);
    if (grad_second != nullptr) of_partners.write(count, grad_second + kColumns * begin);
  }
}

// `row` side by side, `count` times.
template <int kColumns, class A>
void repeat(const A* row, int64_t count, A* out) {
  for (int64_t i = 0; i < count; ++i) {
    for (int column = 0; column < kColumns; ++column) out[kColumns * i + column] = row[column];
  }
}

// Calls body(row, count, second, strides) for runs of rows whose partners lie one behind the other.
template <int kColumns, class A, class Body>
void each_run(const RowMap& map, int64_t begin, int64_t end, const A* second, const A* strides, const Body& body) {
  A repeated[kRun * kColumns], repeated_strides[kRun];
  int64_t partner = map.row_of(begin);
  for (int64_t row = begin; row < end;) {
    int64_t count;
    if (map.repeats == 1) {
      count = min_of(end - row, map.rows - partner);
      body(row, count, second + kColumns * partner, strides == nullptr ? nullptr : strides + partner);
      partner = 0;
    } else {
      count = min_of(min_of(end - row, map.repeats - row % map.repeats), kRun);
      repeat<kColumns>(second + kColumns * partner, count, repeated);
      if (strides != nullptr) repeat<1>(strides + partner, count, repeated_strides);
      body(row, count, repeated, strides == nullptr ? nullptr : repeated_strides);
      if ((row + count) % map.repeats == 0) partner = partner + 1 == map.rows ? 0 : partner + 1;
    }
    row += count;
  }
}

// Calls body(coder, tags of the types of the first tensor and of the second).
template <class Body>
void dispatch_rows(const CoderCall& call, const CoderRows& rows, const Body& body) {
  dispatch_row_types(rows.first.scalar_type(), rows.second.scalar_type(), [&](auto first, auto second) {
    using T = ComputeType<typename decltype(second)::type>;
    dispatch_coder<T>(call, [&](const auto& coder) { body(coder, first, second); });
  });
}

template <class A>
const A* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<A>() : nullptr;
}

void code_rows_cpu(const CoderCall& call, const CoderRows& rows, const Tensor& out) {
  dispatch_rows(call, rows, [&](const auto& coder, auto first_tag, auto second_tag) {
    using Coder = std::decay_t<decltype(coder)>;
    using S = typename decltype(first_tag)::type;
    using A = typename decltype(second_tag)::type;
    const S* const first = rows.first.const_data_ptr<S>();
    const A *const second = rows.second.const_data_ptr<A>(), *const strides = data_or_null<A>(rows.strides);
    A* const result = out.mutable_data_ptr<A>();
    parallel_ranges(rows.count, kGrain, [&](int64_t begin, int64_t end) {
      each_run<Coder::Second::kCoordinates>(rows.map, begin, end, second, strides,
                                            [&](int64_t row, int64_t count, const A* run_second, const A* run_strides) {
                                              code_run<Coder, S, A>(coder, first + 4 * row, run_second, run_strides,
                                                                    count, result + 4 * row);
                                            });
    });
  });
}

void code_rows_backward_cpu(const CoderCall& call, const CoderRows& rows, const Tensor& grad, const Tensor& grad_first,
                            const Tensor* grad_second) {
  dispatch_rows(call, rows, [&](const auto& coder, auto first_tag, auto second_tag) {
    using Coder = std::decay_t<decltype(coder)>;
    using S = typename decltype(first_tag)::type;
    using A = typename decltype(second_tag)::type;
    constexpr int kColumns = Coder::Second::kCoordinates;
    const S* const first = rows.first.const_data_ptr<S>();
    const A *const second = rows.second.const_data_ptr<A>(), *const strides = data_or_null<A>(rows.strides);
    const A* const upstream = grad.const_data_ptr<A>();
    S* const of_first = grad_first.mutable_data_ptr<S>();
    A* const of_second = data_if_wanted<A>(grad_second);
    parallel_ranges(rows.count, kGrain, [&](int64_t begin, int64_t end) {
      each_run<kColumns>(rows.map, begin, end, second, strides,
                         [&](int64_t row, int64_t count, const A* run_second, const A* run_strides) {
                           code_run_backward<Coder, S, A>(coder, upstream + 4 * row, first + 4 * row, run_second,
                                                          run_strides, count, of_first + 4 * row,
                                                          of_second == nullptr ? nullptr : of_second + kColumns * row);
                         });
    });
  });
}

// ---- Checks

// The map of a tensor [..., columns] whose rows are dense but for leading and trailing dimensions of stride 0; false
// for any other strides.
bool find_row_map(const Tensor& tensor, int64_t columns, int64_t row_dims, RowMap& map) {
  map = {1, 1};
  bool dense = row_dims == tensor.dim() || columns == 1 || tensor.stride(row_dims) == 1;
  bool ended = false;  // before the dense dimensions begin anew
  for (int64_t i = row_dims; i-- > 0;) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    if (size == 1) continue;
    if (stride == 0) {
      if (map.rows == 1) {
        map.repeats *= size;
      } else {
        ended = true;
      }
    } else {
      dense = dense && !ended && stride == columns * map.rows;
      map.rows *= size;
    }
  }
  return dense;
}

void check_columns(const char* op, const char* argument, const Tensor& tensor, int64_t columns) {
  if (tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == columns) return;
  fail(op,
       std::string(argument) + " must have shape [..., " + std::to_string(columns) + "], got " + shape_text(tensor));
}

void check_rows(const char* op, const char* argument, const Tensor& tensor, const char* reference,
                const Tensor& expected) {
  bool same = true;
  for (int64_t i = 0; i + 1 < expected.dim(); ++i) same = same && tensor.size(i) == expected.size(i);
  if (!same) {
    fail(op, std::string(argument) + " must have the leading dimensions of " + reference + " " + shape_text(expected) +
                 ", got " + shape_text(tensor));
  }
}

// The names of an op's tensors.
struct Names {
  const char *first, *second;
};
Names names_of(CoderKind kind) {
  switch (kind) {
    case CoderKind::kEncodeBoxes: return {"boxes", "anchors"};
    case CoderKind::kDecodeBoxes: return {"deltas", "anchors"};
    case CoderKind::kEncodeLtrb: return {"boxes", "points"};
    default: return {"distances", "points"};
  }
}

CoderRows checked_rows(const CoderCall& call, const Tensor& first, const Tensor& second,
                       const std::optional<Tensor>& strides) {
  const char* const op = call.op;
  const Names names = names_of(call.kind);
  const bool boxes = call.kind == CoderKind::kEncodeBoxes || call.kind == CoderKind::kDecodeBoxes;
  const int64_t columns = boxes ? 4 : 2;
  check_columns(op, names.first, first, 4);
  check_columns(op, names.second, second, columns);
  const bool same_dims = first.dim() == second.dim();
  if (!same_dims) {
    fail(op, std::string(names.second) + " must have as many dimensions as " + names.first + " " + shape_text(first) +
                 ", got " + shape_text(second));
  }
  check_rows(op, names.second, second, names.first, first);
  check_floating(op, names.first, first);
  check_floating(op, names.second, second);
  const ScalarType dtype = second.scalar_type();
  const bool half = first.scalar_type() == ScalarType::Half || first.scalar_type() == ScalarType::BFloat16;
  if (first.scalar_type() != dtype && !(half && dtype == ScalarType::Float)) {
    fail(op, std::string(names.second) + " must have the dtype of " + names.first + " (" +
                 dtype_name(first.scalar_type()) + ") or be float32 for a half, got " + dtype_name(dtype));
  }
  check_same_device(op, names.second, second, names.first, first);
  CoderRows rows{as_contiguous(first), second, Tensor(), {1, 1}, first.numel() / 4};
  bool readable = find_row_map(second, columns, second.dim() - 1, rows.map);
  if (strides.has_value()) {
    if (strides->dim() + 1 != first.dim()) {
      fail(op, std::string("strides must have one dimension less than ") + names.first + " " + shape_text(first) +
                   ", got " + shape_text(*strides));
    }
    check_rows(op, "strides", *strides, names.first, first);
    check_same_dtype(op, "strides", *strides, names.second, second);
    check_same_device(op, "strides", *strides, names.first, first);
    RowMap map;
    readable = readable && find_row_map(*strides, 1, strides->dim(), map) && map.repeats == rows.map.repeats &&
               map.rows == rows.map.rows;
    rows.strides = readable ? *strides : as_contiguous(*strides);
  }
  if (!readable) {
    rows.second = as_contiguous(second);
    rows.map = {1, max_of<int64_t>(rows.count, 1)};
  }
  return rows;
}

// ---- Entries

CoderCall boxes_call(const char* op, CoderKind kind, const std::vector<double>& weights, double clip) {
  if (weights.size() != 4) fail(op, "weights must be 4 numbers, got " + std::to_string(weights.size()));
  return {op, kind, {weights[0], weights[1], weights[2], weights[3]}, clip, false, 0};
}
CoderCall ltrb_call(const char* op, CoderKind kind, const std::optional<double>& max_distance) {
  return {op, kind, {1, 1, 1, 1}, 0, max_distance.has_value(), max_distance.value_or(0)};
}

Tensor code(const CoderCall& call, const Tensor& first, const Tensor& second,
            const std::optional<Tensor>& strides = std::nullopt) {
  const CoderRows rows = checked_rows(call, first, second, strides);
  const Tensor out = allocate(call.op, sizes_of(first), second.scalar_type(), first);
  if (rows.count == 0) return out;
  if (on_gpu(call.op, first)) {
    DETOPS_GPU_ONLY(code_rows_cuda(call, rows, out));
  } else {
    code_rows_cpu(call, rows, out);
  }
  return out;
}

// The gradient of the second tensor is empty if it is not wanted.
std::tuple<Tensor, Tensor> code_backward(const CoderCall& call, const Tensor& grad, const Tensor& first,
                                         const Tensor& second, const std::optional<Tensor>& strides,
                                         bool second_wanted) {
  const CoderRows rows = checked_rows(call, first, second, strides);
  check_columns(call.op, "grad", grad, 4);
  if (grad.dim() != first.dim()) fail(call.op, "grad must have the shape of the result, got " + shape_text(grad));
  check_rows(call.op, "grad", grad, names_of(call.kind).first, first);
  if (grad.scalar_type() != second.scalar_type()) {
    fail(call.op, "grad must be " + dtype_name(second.scalar_type()) + ", got " + dtype_name(grad.scalar_type()));
  }
  check_same_device(call.op, "grad", grad, names_of(call.kind).first, first);
  const Tensor grad_first = allocate(call.op, sizes_of(first), first.scalar_type(), first);
  const Tensor grad_second =
      allocate(call.op, second_wanted ? sizes_of(second) : std::vector<int64_t>{0}, second.scalar_type(), first);
  if (rows.count == 0) return {grad_first, grad_second};
  const Tensor upstream = as_contiguous(grad);
  const Tensor* const wanted = second_wanted ? &grad_second : nullptr;
  if (on_gpu(call.op, first)) {
    DETOPS_GPU_ONLY(code_rows_backward_cuda(call, rows, upstream, grad_first, wanted));
  } else {
    code_rows_backward_cpu(call, rows, upstream, grad_first, wanted);
  }
  return {grad_first, grad_second};
}

Tensor encode_boxes(const Tensor& boxes, const Tensor& anchors, std::vector<double> weights) {
  return code(boxes_call("encode_boxes", CoderKind::kEncodeBoxes, weights, 0), boxes, anchors);
}
Tensor decode_boxes(const Tensor& deltas, const Tensor& anchors, std::vector<double> weights, double clip) {
  return code(boxes_call("decode_boxes", CoderKind::kDecodeBoxes, weights, clip), deltas, anchors);
}
Tensor encode_ltrb(const Tensor& boxes, const Tensor& points, std::optional<Tensor> strides,
                   std::optional<double> max_distance) {
  return code(ltrb_call("encode_ltrb", CoderKind::kEncodeLtrb, max_distance), boxes, points, strides);
}
Tensor decode_ltrb(const Tensor& distances, const Tensor& points, std::optional<Tensor> strides) {
  return code(ltrb_call("decode_ltrb", CoderKind::kDecodeLtrb, std::nullopt), distances, points, strides);
}

std::tuple<Tensor, Tensor> encode_boxes_backward(const Tensor& grad, const Tensor& boxes, const Tensor& anchors,
                                                 std::vector<double> weights, bool anchors_wanted) {
  return code_backward(boxes_call("encode_boxes", CoderKind::kEncodeBoxes, weights, 0), grad, boxes, anchors,
                       std::nullopt, anchors_wanted);
}
std::tuple<Tensor, Tensor> decode_boxes_backward(const Tensor& grad, const Tensor& deltas, const Tensor& anchors,
                                                 std::vector<double> weights, double clip, bool anchors_wanted) {
  return code_backward(boxes_call("decode_boxes", CoderKind::kDecodeBoxes, weights, clip), grad, deltas, anchors,
                       std::nullopt, anchors_wanted);
}
std::tuple<Tensor, Tensor> encode_ltrb_backward(const Tensor& grad, const Tensor& boxes, const Tensor& points,
                                                std::optional<Tensor> strides, std::optional<double> max_distance,
                                                bool points_wanted) {
  return code_backward(ltrb_call("encode_ltrb", CoderKind::kEncodeLtrb, max_distance), grad, boxes, points, strides,
                       points_wanted);
}
std::tuple<Tensor, Tensor> decode_ltrb_backward(const Tensor& grad, const Tensor& distances, const Tensor& points,
                                                std::optional<Tensor> strides, bool points_wanted) {
  return code_backward(ltrb_call("decode_ltrb", CoderKind::kDecodeLtrb, std::nullopt), grad, distances, points, strides,
                       points_wanted);
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&encode_boxes>("encode_boxes(Tensor boxes, Tensor anchors, float[] weights) -> Tensor");
  ops.add<&decode_boxes>("decode_boxes(Tensor deltas, Tensor anchors, float[] weights, float clip) -> Tensor");
  ops.add<&encode_ltrb>("encode_ltrb(Tensor boxes, Tensor points, Tensor? strides, float? max_distance) -> Tensor");
  ops.add<&decode_ltrb>("decode_ltrb(Tensor distances, Tensor points, Tensor? strides) -> Tensor");
  ops.add<&encode_boxes_backward>(
      "encode_boxes_backward(Tensor grad, Tensor boxes, Tensor anchors, float[] weights, bool anchors_wanted) -> "
      "(Tensor, Tensor)");
  ops.add<&decode_boxes_backward>(
      "decode_boxes_backward(Tensor grad, Tensor deltas, Tensor anchors, float[] weights, float clip, "
      "bool anchors_wanted) -> (Tensor, Tensor)");
  ops.add<&encode_ltrb_backward>(
      "encode_ltrb_backward(Tensor grad, Tensor boxes, Tensor points, Tensor? strides, float? max_distance, "
      "bool points_wanted) -> (Tensor, Tensor)");
  ops.add<&decode_ltrb_backward>(
      "decode_ltrb_backward(Tensor grad, Tensor distances, Tensor points, Tensor? strides, bool points_wanted) -> "
      "(Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
