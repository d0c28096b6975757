// masks_to_boxes on a GPU.
//
// A block takes some rows of a mask, a warp one row at a time, 16 bytes a lane. The boxes of a mask's parts are united
// by a second kernel, so that few large masks fill the GPU too; a mask in one part needs no second kernel.
#include "boxes/masks_to_boxes.h"

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/launch_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kBytesPerPart = 16 * 1024;
constexpr int64_t kVector = sizeof(ulonglong2);

// Extends `box` to the columns of the set pixels in 8 bytes of a row, of which some bits are given.
__device__ inline void add_pixels(PixelBox& box, const MaskLayout& layout, int64_t row, int64_t byte, uint64_t bits) {
  if (bits == 0) return;
  const int first = static_cast<int>(layout.column(byte + (__ffsll(static_cast<long long>(bits)) - 1) / 8));
  const int last = static_cast<int>(layout.column(byte + (63 - __clzll(static_cast<long long>(bits))) / 8));
  box = box_around(box, {first, static_cast<int>(row), last, static_cast<int>(row)});
}

__device__ inline PixelBox around_warp(PixelBox box) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    box = box_around(box, {__shfl_xor_sync(kFullWarp, box.x1, step), __shfl_xor_sync(kFullWarp, box.y1, step),
                           __shfl_xor_sync(kFullWarp, box.x2, step), __shfl_xor_sync(kFullWarp, box.y2, step)});
  }
  return box;
}

// One block per part of a mask. `parts` is [masks, parts_per_mask], or null where that is 1.
__global__ void mask_parts_kernel(const uint8_t* masks, MaskLayout layout, int64_t rows_per_part, int parts_per_mask,
                                  PixelBox* parts, float* boxes) {
  DETOPS_SHARED(PixelBox, warp_boxes, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t mask = blockIdx.x / parts_per_mask;
  const int64_t first_row = blockIdx.x % parts_per_mask * rows_per_part;
  const int64_t end_row = min_of(first_row + rows_per_part, layout.rows);

  PixelBox box = empty_pixel_box();
  for (int64_t row = first_row + warp; row < end_row; row += kWarps) {
    const uint8_t* const bytes = masks + (mask * layout.rows + row) * layout.row_bytes;
    // The row as single bytes up to an aligned address, whole vectors, and single bytes again.
    const int64_t head = min_of<int64_t>(-reinterpret_cast<uintptr_t>(bytes) % kVector, layout.row_bytes);
    const int64_t vectors = (layout.row_bytes - head) / kVector;
    const int64_t tail_begin = head + vectors * kVector;
    for (int64_t i = lane; i < vectors; i += kWarpSize) {
      const int64_t byte = head + i * kVector;
      const ulonglong2 vector = *reinterpret_cast<const ulonglong2*>(bytes + byte);
      add_pixels(box, layout, row, byte, vector.x & layout.significant);
      add_pixels(box, layout, row, byte + 8, vector.y & layout.significant);
    }
    const int64_t byte = lane < kVector ? lane : tail_begin + lane - kVector;
    if (byte < (lane < kVector ? head : layout.row_bytes)) {
      add_pixels(box, layout, row, byte, bytes[byte] & (layout.significant >> (byte % 8 * 8)) & 0xff);
    }
  }

  box = around_warp(box);
  if (lane == 0) warp_boxes[warp] = box;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kWarps; ++i) box = box_around(box, warp_boxes[i]);
  if (parts) {
    parts[blockIdx.x] = box;
  } else {
    store_pixel_box(box, boxes + 4 * mask);
  }
}

// One warp per mask.
__global__ void unite_parts_kernel(const PixelBox* parts, int64_t masks, int parts_per_mask, float* boxes) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t mask = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (mask >= masks) return;
  PixelBox box = empty_pixel_box();
  for (int i = lane; i < parts_per_mask; i += kWarpSize) box = box_around(box, parts[mask * parts_per_mask + i]);
  box = around_warp(box);
  if (lane == 0) store_pixel_box(box, boxes + 4 * mask);
}

}  // namespace

void masks_to_boxes_cuda(const Tensor& masks, const MaskLayout& layout, const Tensor& out) {
  if (layout.masks == 0) return;
  const CudaScope scope(masks);
  const int64_t rows_per_part = max_of<int64_t>(kWarps, kBytesPerPart / max_of<int64_t>(layout.row_bytes, 1));
  // Rows without a byte make no part.
  const int64_t parts_per_mask = layout.row_bytes > 0 ? max_of<int64_t>(1, ceil_div(layout.rows, rows_per_part)) : 1;
  const int64_t blocks = layout.masks * parts_per_mask;
  const bool divided = parts_per_mask > 1;
  Tensor scratch;
  if (divided) scratch = allocate("masks_to_boxes", {blocks, 4}, ScalarType::Int, masks);
  auto* const parts = divided ? reinterpret_cast<PixelBox*>(scratch.mutable_data_ptr<int>()) : nullptr;
  float* const boxes = out.mutable_data_ptr<float>();
  DETOPS_LAUNCH(mask_parts_kernel, blocks_for("masks_to_boxes", "masks", blocks, 1), kThreads, 0, scope.stream(),
                static_cast<const uint8_t*>(masks.const_data_ptr()), layout, rows_per_part,
                static_cast<int>(parts_per_mask), parts, boxes);
  if (!divided) return;
  DETOPS_LAUNCH(unite_parts_kernel, static_cast<unsigned>(ceil_div<int64_t>(layout.masks, kWarps)), kThreads, 0,
                scope.stream(), parts, layout.masks, static_cast<int>(parts_per_mask), boxes);
}

}  // namespace DETOPS_NAMESPACE
