// masks_to_boxes: schema, checks, and the CPU kernel.
//
// The first set pixel gives the top row, the last one the bottom row. Then each row in between is searched only left
// and right of the columns known so far: what lies inside the box is never read.
#include "boxes/masks_to_boxes.h"

#include <cstring>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kBlock = 256;  // bytes that are tested at once

DETOPS_HD uint64_t load_word(const uint8_t* bytes) {
  uint64_t word;
  memcpy(&word, bytes, sizeof(word));
  return word;
}

DETOPS_HD bool any_set(const uint8_t* block, uint64_t significant) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < kBlock; i += 8) bits |= load_word(block + i);
  return (bits & significant) != 0;
}

// Up to 7 bytes.
DETOPS_HD uint64_t load_part(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  memcpy(&word, bytes, count);
  return word;
}

// The first byte in begin..end-1 with a significant bit, or `end`.
DETOPS_CLONES int64_t first_set(const uint8_t* bytes, int64_t begin, int64_t end, uint64_t significant) {
  int64_t i = begin;
  while (i + kBlock <= end && !any_set(bytes + i, significant)) i += kBlock;
  for (; i + 8 <= end; i += 8) {
    if (const uint64_t bits = load_word(bytes + i) & significant) return i + __builtin_ctzll(bits) / 8;
  }
  const uint64_t bits = load_part(bytes + i, end - i) & significant;
  return bits ? i + __builtin_ctzll(bits) / 8 : end;
}

// One past the last byte in begin..end-1 with a significant bit, or `begin`.
DETOPS_CLONES int64_t last_set(const uint8_t* bytes, int64_t begin, int64_t end, uint64_t significant) {
  int64_t i = end;
  while (i - kBlock >= begin && !any_set(bytes + i - kBlock, significant)) i -= kBlock;
  for (; i - 8 >= begin; i -= 8) {
    if (const uint64_t bits = load_word(bytes + i - 8) & significant) return i - __builtin_clzll(bits) / 8;
  }
  const uint64_t bits = load_part(bytes + begin, i - begin) & significant;
  return bits ? begin + 8 - __builtin_clzll(bits) / 8 : begin;
}

PixelBox box_of(const uint8_t* mask, const MaskLayout& layout) {
  const int64_t size = layout.mask_bytes(), width = layout.row_bytes, element = int64_t(1) << layout.size_log2;
  if (size == 0) return empty_pixel_box();  // masks without a byte have no address
  const int64_t first = first_set(mask, 0, size, layout.significant);
  if (first == size) return empty_pixel_box();
  const int64_t last = last_set(mask, first / element * element, size, layout.significant) - 1;
  const int64_t top = first / width, bottom = last / width;
  // Columns begin..end-1, in bytes, at the borders of elements.
  int64_t begin = first % width / element * element, end = (last % width / element + 1) * element;
  for (int64_t row = top; row <= bottom && (begin > 0 || end < width); ++row) {
    const uint8_t* const bytes = mask + row * width;
    begin = first_set(bytes, 0, begin, layout.significant) / element * element;
    end = ceil_div(last_set(bytes, end, width, layout.significant), element) * element;
  }
  return {static_cast<int>(layout.column(begin)), static_cast<int>(top), static_cast<int>(layout.column(end - 1)),
          static_cast<int>(bottom)};
}

void masks_to_boxes_cpu(const Tensor& masks, const MaskLayout& layout, const Tensor& out) {
  constexpr int64_t kBytesPerPart = 1 << 16;  // worth a thread
  const auto* const bytes = static_cast<const uint8_t*>(masks.const_data_ptr());
  float* const boxes = out.mutable_data_ptr<float>();
  const int64_t size = layout.mask_bytes();
  const int64_t masks_per_part = ceil_div(kBytesPerPart, max_of<int64_t>(size, 1));
  parallel_items(ceil_div(layout.masks, masks_per_part), [&](const auto& next) {
    for (int64_t part = next(); part >= 0; part = next()) {
      const int64_t begin = part * masks_per_part, end = min_of(begin + masks_per_part, layout.masks);
      for (int64_t i = begin; i < end; ++i) store_pixel_box(box_of(bytes + i * size, layout), boxes + 4 * i);
    }
  });
}

bool is_mask_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long: return true;
    default: return is_floating(dtype);
  }
}

// The bits of 8 bytes of elements that make an element differ from zero.
uint64_t significant_bits(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return 0x7fff7fff7fff7fffu;
    case ScalarType::Float: return 0x7fffffff7fffffffu;
    case ScalarType::Double: return 0x7fffffffffffffffu;
    default: return ~uint64_t(0);
  }
}

Tensor masks_to_boxes(const Tensor& masks) {
  const char* const op = "masks_to_boxes";
  const int64_t dim = masks.dim();
  if (dim < 2) fail(op, "masks must have shape [..., H, W], got " + shape_text(masks));
  if (!is_mask_dtype(masks.scalar_type())) {
    fail(op, "masks must be bool, integer or floating, got " + dtype_name(masks.scalar_type()));
  }
  const int64_t rows = masks.size(dim - 2), columns = masks.size(dim - 1);
  check_row_count(op, "masks", rows);
  check_row_count(op, "masks", columns, "columns");
  std::vector<int64_t> sizes;
  int64_t count = 1;
  for (int64_t i = 0; i + 2 < dim; ++i) {
    sizes.push_back(masks.size(i));
    count *= masks.size(i);
  }
  check_row_count(op, "masks", count, "masks");
  sizes.push_back(4);

  const int64_t element = static_cast<int64_t>(masks.element_size());
  const MaskLayout layout{count, rows, columns * element, __builtin_ctzll(element),
                          significant_bits(masks.scalar_type())};
  const Tensor out = allocate(op, sizes, ScalarType::Float, masks);
  const Tensor dense = as_contiguous(masks);
  if (on_gpu(op, masks)) {
    DETOPS_GPU_ONLY(masks_to_boxes_cuda(dense, layout, out));
  } else {
    masks_to_boxes_cpu(dense, layout, out);
  }
  return out;
}

}  // namespace

DETOPS_OPS(ops) { ops.add<&masks_to_boxes>("masks_to_boxes(Tensor masks) -> Tensor"); }

}  // namespace DETOPS_NAMESPACE
