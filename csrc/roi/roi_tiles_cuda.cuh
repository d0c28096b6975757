// What gradients of RoI ops have in common on a GPU: one block per tile of 8 x 8 pixels and slice of the channels. It
// walks the RoIs of its map in the order of the list, takes those that touch the tile, and adds up what they send to
// each pixel in registers: nothing is added in memory, and every pixel is stored once.
#pragma once

#include "roi/roi_cuda.cuh"

namespace DETOPS_NAMESPACE {

constexpr int kTile = 8;           // pixels along each side
constexpr int kTileChannels = 16;  // of a thread, where planes are contiguous
constexpr int kChunk = 16;         // RoIs whose weights are held at once, at most

// What the tiles ask of each RoI. The RoIs of one map stand together in `order`, which keeps the order of the list.
struct RoiBounds {
  int4* pixels;  // [K] first and end row, first and end column
  int* maps;     // [K] level * images + image, or -1
  int* order;    // [K]
  int* begins;   // [maps + 1] into `order`
};

template <class T>
__global__ void roi_bounds_kernel(RoiMaps<T> maps, const T* boxes, int count, RoiOptions options, RoiBounds bounds) {
  const int roi = blockIdx.x * kRoiThreads + threadIdx.x;
  if (roi >= count) return;
  const RoiPlace<T> place = place_roi(boxes + 5 * int64_t(roi), maps, options);
  const IndexRange rows = pixels_read(place.y), columns = pixels_read(place.x);
  const bool reads = place.image >= 0 && rows.count() > 0 && columns.count() > 0;
  bounds.pixels[roi] = {static_cast<int>(rows.begin), static_cast<int>(rows.end), static_cast<int>(columns.begin),
                        static_cast<int>(columns.end)};
  bounds.maps[roi] = reads ? place.level * maps.images + place.image : -1;
}

// For how many of the block's threads the predicate holds: of those before this one, and of all. `votes` is written, so
// that two calls need a barrier between them.
struct Rank {
  int before, total;
};
__device__ inline Rank rank_in_block(bool predicate, unsigned* votes) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned vote = __ballot_sync(kFullWarp, predicate);
  if (lane == 0) votes[warp] = vote;
  __syncthreads();
  Rank rank{__popc(vote & ((1u << lane) - 1)), 0};
  for (int i = 0; i < kRoiWarps; ++i) {
    const int others = __popc(votes[i]);
    rank.total += others;
    if (i < warp) rank.before += others;
  }
  return rank;
}

// One block per map.
static __global__ void roi_group_kernel(int count, RoiBounds bounds) {
  DETOPS_SHARED(unsigned, votes, kRoiWarps);
  const int map = blockIdx.x;
  int begin = 0;  // RoIs of earlier maps
  for (int first = 0; first < count; first += kRoiThreads) {
    const int roi = first + threadIdx.x;
    const int other = roi < count ? bounds.maps[roi] : -1;
    begin += rank_in_block(other >= 0 && other < map, votes).total;
    __syncthreads();
  }
  if (threadIdx.x == 0) bounds.begins[map] = begin;
  for (int first = 0; first < count; first += kRoiThreads) {
    const int roi = first + threadIdx.x;
    const bool own = roi < count && bounds.maps[roi] == map;
    const Rank rank = rank_in_block(own, votes);
    // Every RoI belongs to one map at most.
    if (own) Counted<int>("roi", "RoIs of the maps", bounds.order, count)[begin + rank.before] = roi;
    begin += rank.total;
    __syncthreads();
  }
  if (threadIdx.x == 0 && map + 1 == static_cast<int>(gridDim.x)) bounds.begins[map + 1] = begin;
}

// The tiles of all levels, one after another.
struct Tiles {
  int64_t begins[kMostLevels + 1];
  int columns[kMostLevels];  // of tiles
  int per_image[kMostLevels];
};

// The weights of bin p on the pixels tile_begin .. tile_begin + 7, the same as those of the taps.
template <class T>
__device__ inline bool tile_weights(const RoiAxis<T>& axis, int p, int tile_begin, T* weights) {
  if (axis.rule != RoiRule::kAlign) {
    const IndexRange pixels = axis.pixels(p);
    const T weight = T(1) / static_cast<T>(pixels.count());
    for (int i = 0; i < kTile; ++i) {
      weights[i] = tile_begin + i >= pixels.begin && tile_begin + i < pixels.end ? weight : T(0);
    }
    return pixels.begin < tile_begin + kTile && pixels.end > tile_begin;
  }
  T sums[kTile] = {};
  const IndexRange all = axis.samples_on_map(p);
  const T low = static_cast<T>(tile_begin - 1), high = static_cast<T>(min(tile_begin + kTile, axis.size));
  const IndexRange near = axis.samples_between(p, low, high);
  const IndexRange range{max_of(all.begin, near.begin), min_of(all.end, near.end)};
  for (int64_t k = 0; k < range.count(); ++k) {
    const AxisSample<T> sample = axis_sample(axis.position(p, axis.ascending(range, k)), axis.size);
    const int offset = sample.low - tile_begin;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (offset == i) sums[i] += T(1) - sample.fraction;
      if (offset + 1 == i) sums[i] += sample.fraction;
    }
  }
  bool any = false;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    weights[i] = sums[i] / axis.samples;
    any = any || sums[i] != T(0);
  }
  return any;
}

// The weights of a chunk of RoIs on the pixels of a tile, in shared memory.
template <class T>
struct ChunkWeights {
  T* y;                                    // [RoIs, bins_y, kTile]
  T* x;                                    // [RoIs, bins_x, kTile]
  int *first_y, *end_y, *first_x, *end_x;  // [RoIs] the bins that reach the tile
};

// The RoIs whose weights are in shared memory.
template <class T>
struct TileRois {
  const int* rois;
  int count;
  ChunkWeights<T> weights;
  int bins_y, bins_x;

  __device__ T y(int g, int p, int r) const { return weights.y[(g * bins_y + p) * kTile + r]; }
  __device__ const T* x(int g, int q) const { return weights.x + (g * bins_x + q) * kTile; }
};

struct TilePixel {
  int top, left, r, column;  // of the tile, and in it
};

// pack: neighbouring channels of a thread with channels_last; 0: planes are contiguous.
//
// A Source says what the bins of RoIs send to pixels: its `pixels` adds up for one row of the tile and `pack` channels,
// its `planes` for one pixel and kTileChannels planes.
template <int pack, class S, class Source>
__global__ void roi_backward_kernel(Source source, const ComputeType<S>* boxes, RoiOptions options,
                                    RoiTensors<ComputeType<S>, S> out, Tiles tiles, RoiBounds bounds, int chunk) {
  using T = ComputeType<S>;
  DETOPS_DYNAMIC_SHARED(T, memory);
  DETOPS_SHARED(unsigned, votes, kRoiWarps);
  DETOPS_SHARED(int, touching, kRoiThreads);  // one for each thread at most
  DETOPS_SHARED(int, ranges, 4 * kChunk);
  const ChunkWeights<T> weights{memory,
                                memory + chunk * options.bins_y * kTile,
                                ranges,
                                ranges + kChunk,
                                ranges + 2 * kChunk,
                                ranges + 3 * kChunk};
  int level = 0;
  while (int64_t(blockIdx.x) >= tiles.begins[level + 1]) ++level;
  const int64_t in_level = int64_t(blockIdx.x) - tiles.begins[level];
  const int image = static_cast<int>(in_level / tiles.per_image[level]);
  const int tile = static_cast<int>(in_level - int64_t(image) * tiles.per_image[level]);
  const int top = tile / tiles.columns[level] * kTile, left = tile % tiles.columns[level] * kTile;
  const int height = out.shape.levels[level].height, width = out.shape.levels[level].width;
  const int channels = out.shape.channels;

  constexpr int kPack = pack > 0 ? pack : 1;
  // channels_last: a warp is a row, a lane some channels. Else 64 threads are the tile, which takes four sets of
  // planes.
  const int r = pack > 0 ? threadIdx.x / kWarpSize : threadIdx.x % (kTile * kTile) / kTile;
  const int column = threadIdx.x % kTile;
  const int channel =
      pack > 0 ? (blockIdx.y * kWarpSize + threadIdx.x % kWarpSize) * kPack
               : (blockIdx.y * (kRoiThreads / (kTile * kTile)) + threadIdx.x / (kTile * kTile)) * kTileChannels;
  T pixel_sums[kTile][kPack] = {};
  T plane_sums[kTileChannels] = {};

  const int map = level * out.shape.images + image;
  const int end = bounds.begins[map + 1];
  for (int first = bounds.begins[map]; first < end; first += kRoiThreads) {
    const int i = first + threadIdx.x;
    bool touches = false;
    if (i < end) {
      const int4 pixels = bounds.pixels[bounds.order[i]];
      touches = pixels.x < top + kTile && pixels.y > top && pixels.z < left + kTile && pixels.w > left;
    }
    const Rank rank = rank_in_block(touches, votes);
    if (touches) Counted<int>("roi", "RoIs of a tile", touching, kRoiThreads)[rank.before] = bounds.order[i];
    for (int done = 0; done < rank.total; done += chunk) {
      const int count = min(chunk, rank.total - done);
      if (threadIdx.x < kChunk) {
        weights.first_y[threadIdx.x] = options.bins_y;
        weights.first_x[threadIdx.x] = options.bins_x;
        weights.end_y[threadIdx.x] = 0;
        weights.end_x[threadIdx.x] = 0;
      }
      __syncthreads();
      const int bins = options.bins_y + options.bins_x;
      for (int task = threadIdx.x; task < count * bins; task += kRoiThreads) {
        const int g = task / bins, p = task - g * bins;
        const RoiPlace<T> place = place_roi(boxes + 5 * int64_t(touching[done + g]), out.shape, options);
        const bool along_y = p < options.bins_y;
        const int bin = along_y ? p : p - options.bins_y;
        T* const target =
            along_y ? weights.y + (g * options.bins_y + bin) * kTile : weights.x + (g * options.bins_x + bin) * kTile;
        if (!tile_weights(along_y ? place.y : place.x, bin, along_y ? top : left, target)) continue;
        atomicMin((along_y ? weights.first_y : weights.first_x) + g, bin);
        atomicMax((along_y ? weights.end_y : weights.end_x) + g, bin + 1);
      }
      __syncthreads();
      if (channel < channels) {
        const TileRois<T> rois{touching + done, count, weights, options.bins_y, options.bins_x};
        if constexpr (pack > 0) {
          source.pixels(rois, {top, left, r, 0}, channels, channel, pixel_sums);
        } else {
          source.planes(rois, {top, left, r, column}, channels, channel, min(kTileChannels, channels - channel),
                        plane_sums);
        }
      }
      __syncthreads();
    }
    if (rank.total == 0) __syncthreads();  // the votes are read before the next ones are cast
  }

  if (channel >= channels || top + r >= height) return;
  S* const target = out.image(level, image);
  if constexpr (pack > 0) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (left + i < width) {
        store_pack(pixel_sums[i], target + ((top + r) * int64_t(width) + left + i) * channels + channel);
      }
    }
  } else if (left + column < width) {
#pragma unroll
    for (int c = 0; c < kTileChannels; ++c) {
      if (channel + c >= channels) break;
      target[((int64_t(channel) + c) * height + top + r) * width + left + column] = static_cast<S>(plane_sums[c]);
    }
  }
}

template <int pack, class S, class Source>
void launch_roi_backward(const char* op, const Source& source, const Tensor& boxes, const RoiOptions& options,
                         const RoiTensors<ComputeType<S>, S>& out) {
  using T = ComputeType<S>;
  const int64_t count = boxes.size(0);
  const int64_t maps = int64_t(out.shape.count) * out.shape.images;
  if (maps > kMostRows) fail(op, "there must be at most 2^31 maps of images, got " + std::to_string(maps));
  Tiles tiles{};
  for (int level = 0; level < out.shape.count; ++level) {
    const int64_t rows = ceil_div(out.shape.levels[level].height, kTile);
    tiles.columns[level] = ceil_div(out.shape.levels[level].width, kTile);
    tiles.per_image[level] = static_cast<int>(rows * tiles.columns[level]);
    tiles.begins[level + 1] = tiles.begins[level] + out.shape.images * rows * tiles.columns[level];
  }
  const int64_t blocks = tiles.begins[out.shape.count];
  if (blocks == 0) return;
  if (blocks > kMostRows) fail(op, "the maps must have at most 2^31 tiles, got " + std::to_string(blocks));
  for (int level = out.shape.count; level < kMostLevels; ++level) tiles.begins[level + 1] = blocks;
  const size_t bytes_of_roi = sizeof(T) * kTile * (size_t(options.bins_y) + options.bins_x);
  if (bytes_of_roi > kMostSharedBytes - 8 * 1024) {
    fail(op, "output_size must be small enough for a GPU's shared memory (212 KB), got a need of " +
                 std::to_string(bytes_of_roi / 1024) + " KB");
  }
  const int chunk = static_cast<int>(max_of<size_t>(1, min_of<size_t>(kChunk, 24 * 1024 / bytes_of_roi)));
  const size_t bytes = chunk * bytes_of_roi;

  const CudaScope scope(boxes);
  const Tensor scratch = allocate(op, {6 * count + maps + 1}, ScalarType::Int, boxes);
  int* const data = scratch.mutable_data_ptr<int>();
  const RoiBounds bounds{reinterpret_cast<int4*>(data), data + 4 * count, data + 5 * count, data + 6 * count};
  const T* const rows = boxes.const_data_ptr<T>();
  if (count > 0) {
    DETOPS_LAUNCH((roi_bounds_kernel<T>), static_cast<unsigned>(ceil_div<int64_t>(count, kRoiThreads)), kRoiThreads, 0,
                  scope.stream(), out.shape, rows, static_cast<int>(count), options, bounds);
  }
  DETOPS_LAUNCH(roi_group_kernel, static_cast<unsigned>(maps), kRoiThreads, 0, scope.stream(), static_cast<int>(count),
                bounds);
  const int channels_of_block = pack > 0 ? kWarpSize * pack : kTileChannels * (kRoiThreads / (kTile * kTile));
  allow_shared_memory(roi_backward_kernel<pack, S, Source>, bytes);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(out.shape.channels, channels_of_block)));
  DETOPS_LAUNCH((roi_backward_kernel<pack, S, Source>), grid, kRoiThreads, bytes, scope.stream(), source, rows, options,
                out, tiles, bounds, chunk);
}

}  // namespace DETOPS_NAMESPACE
