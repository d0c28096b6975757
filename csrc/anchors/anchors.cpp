// assign_sizes and kmeans_anchors: schemas, checks, and the CPU loops.
#include "anchors/anchors.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/counted.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kTile = 128;       // sizes that are assigned together
constexpr int64_t kGrain = 1 << 13;  // sizes that are worth a thread

// Some or all of the anchors, in ascending order.
struct Candidates {
  std::vector<float> sides;
  std::vector<int32_t> labels;

  explicit Candidates(int64_t most) : sides(2 * most), labels(most) {}
  void set(int64_t place, const float* anchor, int32_t label) {
    sides[2 * place] = anchor[0];
    sides[2 * place + 1] = anchor[1];
    labels[place] = label;
  }
};

// Assigns up to kTile sizes, of which widths and heights lie apart, to `anchor_count` anchors with these labels.
template <SizeMetric metric>
DETOPS_CLONES void assign_tile(const float* widths, const float* heights, int64_t count, const float* anchors,
                               const int32_t* anchor_labels, int64_t anchor_count, int32_t* __restrict__ labels,
                               float* __restrict__ affinities) {
  float best[kTile], w[kTile] = {}, h[kTile] = {};
  int32_t nearest[kTile];
  for (int64_t i = 0; i < count; ++i) {
    w[i] = widths[i];
    h[i] = heights[i];
  }
  for (int64_t i = 0; i < kTile; ++i) {
    best[i] = -std::numeric_limits<float>::infinity();
    nearest[i] = anchor_labels[0];
  }
  for (int64_t a = 0; a < anchor_count; ++a) {
    const float width = anchors[2 * a], height = anchors[2 * a + 1];
    const int32_t label = anchor_labels[a];
    for (int64_t i = 0; i < kTile; ++i) {
      const float value = affinity<metric>(w[i], h[i], width, height);
      // A mask in place of a choice, of which the compiler makes a branch.
      const int32_t mask = -static_cast<int32_t>(is_nearer(value, best[i]));
      best[i] = max_of(value, best[i]);
      nearest[i] = (label & mask) | (nearest[i] & ~mask);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    labels[i] = nearest[i];
    affinities[i] = best[i];
  }
}

// The places where two runs of labels differ.
int64_t find_changes(const int32_t* before, const int32_t* after, int64_t count, CountedArray<int32_t, kTile>& places) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    places[found] = static_cast<int32_t>(i);  // overwritten until they differ: cheaper than a branch
    found += before[i] != after[i];
  }
  return found;
}

// Widths and heights, each together.
struct Columns {
  std::vector<float> widths, heights;

  explicit Columns(const Tensor& sizes) : widths(sizes.size(0)), heights(sizes.size(0)) {
    const float* const data = sizes.const_data_ptr<float>();
    for (size_t i = 0; i < widths.size(); ++i) {
      widths[i] = data[2 * i];
      heights[i] = data[2 * i + 1];
    }
  }
};

void assign_sizes_cpu(const Tensor& sizes, const Tensor& anchors, SizeMetric size_metric, const Tensor& labels,
                      const Tensor& affinities) {
  const int64_t anchor_count = anchors.size(0);
  const Columns columns(sizes);
  Candidates all(anchor_count);
  for (int64_t a = 0; a < anchor_count; ++a) {
    all.set(a, anchors.const_data_ptr<float>() + 2 * a, static_cast<int32_t>(a));
  }
  int64_t* const label_data = labels.mutable_data_ptr<int64_t>();
  float* const affinity_data = affinities.mutable_data_ptr<float>();
  dispatch_size_metric(size_metric, [&](auto metric) {
    parallel_ranges(sizes.size(0), kGrain, [&](int64_t begin, int64_t end) {
      int32_t tile_labels[kTile];
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t count = min_of(kTile, end - i);
        assign_tile<metric.value>(&columns.widths[i], &columns.heights[i], count, all.sides.data(), all.labels.data(),
                                  anchor_count, tile_labels, affinity_data + i);
        for (int64_t j = 0; j < count; ++j) label_data[i + j] = tile_labels[j];
      }
    });
  });
}

// The sums of all labels, to which threads add what has changed.
class SharedSums {
 public:
  explicit SharedSums(int64_t count) : sums_(count), changes_(0) {}

  void add(const std::vector<SizeSums>& differences, int64_t changes) {
    if (changes == 0) return;
    changes_.fetch_add(changes, std::memory_order_relaxed);
    for (size_t a = 0; a < differences.size(); ++a) {
      sums_[a].width.fetch_add(differences[a].width, std::memory_order_relaxed);
      sums_[a].height.fetch_add(differences[a].height, std::memory_order_relaxed);
      sums_[a].count.fetch_add(differences[a].count, std::memory_order_relaxed);
    }
  }
  int64_t take_changes() { return changes_.exchange(0); }
  void move(const SizeScale& scale, float* anchors) const {
    for (size_t a = 0; a < sums_.size(); ++a) {
      const int64_t count = sums_[a].count;
      if (count == 0) continue;
      anchors[2 * a] = scale.mean(sums_[a].width, count);
      anchors[2 * a + 1] = scale.mean(sums_[a].height, count);
    }
  }

 private:
  struct Atomics {
    std::atomic<int64_t> width{0}, height{0}, count{0};
  };
  std::vector<Atomics> sums_;
  std::atomic<int64_t> changes_;
};

// ---- k-means. Sizes are sorted so that those of a tile are alike: most tiles can have one label only, as bounds tell.

// Where a size stands along a curve that keeps neighbours together: the bits of both logarithms, in turn, in steps of a
// 16th of an octave. For any floats, NaN too, one of kPlaces = (255 + 1)^2.
DETOPS_HD uint32_t spread_bits(uint32_t byte) {
  byte = (byte | byte << 4) & 0x0f0f;
  byte = (byte | byte << 2) & 0x3333;
  return (byte | byte << 1) & 0x5555;
}
DETOPS_HD uint32_t level_of(float side) {
  const uint32_t one = 0x3f800000;
  const uint32_t bits = min_of(bit_cast<uint32_t>(side), one);  // of what is no size, any level will do
  return min_of<uint32_t>((one - bits) >> 19, 255);
}
DETOPS_CLONES void find_places(const Columns& columns, uint32_t* __restrict__ places) {
  const float *const widths = columns.widths.data(), *const heights = columns.heights.data();
  const size_t count = columns.widths.size();
  for (size_t i = 0; i < count; ++i) {
    places[i] = spread_bits(level_of(widths[i])) | spread_bits(level_of(heights[i])) << 1;
  }
}
constexpr int64_t kPlaces = 1 << 16;

Columns sorted_along_curve(const Columns& columns) {
  const size_t count = columns.widths.size();
  std::vector<uint32_t> places(count);
  find_places(columns, places.data());
  std::vector<int64_t> next(kPlaces + 1);
  for (uint32_t place : places) ++next[place + 1];
  for (int64_t place = 0; place < kPlaces; ++place) next[place + 1] += next[place];
  Columns sorted = columns;
  for (size_t i = 0; i < count; ++i) {
    const int64_t to = next[places[i]]++;
    sorted.widths[to] = columns.widths[i];
    sorted.heights[to] = columns.heights[i];
  }
  return sorted;
}

// What is known of the sizes of a tile together.
struct TileSummary {
  float least_width, greatest_width, least_height, greatest_height;
  SizeSums sums;
  int32_t label;  // of all of them, -1 if they differ
  int32_t hint;   // an anchor that is near
};

DETOPS_CLONES TileSummary summarise(const float* widths, const float* heights, int64_t count, const SizeScale& scale) {
  TileSummary tile{widths[0], widths[0], heights[0], heights[0], {0, 0, count}, -1, 0};
  for (int64_t i = 0; i < count; ++i) {
    tile.least_width = min_of(widths[i], tile.least_width);
    tile.greatest_width = max_of(widths[i], tile.greatest_width);
    tile.least_height = min_of(heights[i], tile.least_height);
    tile.greatest_height = max_of(heights[i], tile.greatest_height);
    tile.sums.width += scale.integer(widths[i]);
    tile.sums.height += scale.integer(heights[i]);
  }
  return tile;
}

// The anchors that can be nearest to some size of the tile. In each side alone every metric grows up to the anchor's
// and falls beyond: over a tile it is greatest where the tile is nearest to the anchor, and least in a corner. The
// margin is for what rounding can do to that.
template <SizeMetric metric>
DETOPS_CLONES int64_t find_candidates(const TileSummary& tile, const float* anchors, int64_t anchor_count,
                                      Candidates& candidates) {
  const float width = anchors[2 * tile.hint], height = anchors[2 * tile.hint + 1];
  const float least = min_of(min_of(affinity<metric>(tile.least_width, tile.least_height, width, height),
                                    affinity<metric>(tile.least_width, tile.greatest_height, width, height)),
                             min_of(affinity<metric>(tile.greatest_width, tile.least_height, width, height),
                                    affinity<metric>(tile.greatest_width, tile.greatest_height, width, height)));
  const float bound = least - 1e-5f * (least < 0.0f ? -least : least);
  int64_t found = 0;
  for (int64_t a = 0; a < anchor_count; ++a) {
    const float* const anchor = anchors + 2 * a;
    const float near_width = max_of(tile.least_width, min_of(tile.greatest_width, anchor[0]));
    const float near_height = max_of(tile.least_height, min_of(tile.greatest_height, anchor[1]));
    candidates.set(found, anchor, static_cast<int32_t>(a));
    // Negated, so that a bound of NaN excludes none. The hint is always a candidate, so that there is one.
    found += !(affinity<metric>(near_width, near_height, anchor[0], anchor[1]) < bound) | (a == tile.hint);
  }
  return found;
}

// One thread's part of an iteration.
template <SizeMetric metric>
class TileWorker {
 public:
  TileWorker(const Columns& columns, const SizeScale& scale, const float* anchors, int64_t anchor_count)
      : columns_(columns),
        scale_(scale),
        anchors_(anchors),
        anchor_count_(anchor_count),
        candidates_(anchor_count),
        differences_(anchor_count) {}

  // `labels` of a tile with one label are not kept.
  void assign(int64_t begin, int64_t count, TileSummary& tile, int32_t* labels) {
    const int64_t found = find_candidates<metric>(tile, anchors_, anchor_count_, candidates_);
    if (found == 1) {
      const int32_t label = candidates_.labels[0];
      if (tile.label == label) return;
      if (tile.label >= 0) {
        move(tile.sums, tile.label, label);
      } else {
        for (int64_t i = 0; i < count; ++i) relabel(begin + i, labels[i], label);
      }
      tile.label = tile.hint = label;
      return;
    }
    if (tile.label >= 0) std::fill_n(labels, count, tile.label);
    int32_t nearest[kTile];
    CountedArray<int32_t, kTile> places("kmeans_anchors", "changes in a tile");
    float best[kTile];
    assign_tile<metric>(&columns_.widths[begin], &columns_.heights[begin], count, candidates_.sides.data(),
                        candidates_.labels.data(), found, nearest, best);
    const int64_t changed = find_changes(labels, nearest, count, places);
    for (int64_t place = 0; place < changed; ++place) {
      const int64_t i = places[place];
      relabel(begin + i, labels[i], nearest[i]);
      labels[i] = nearest[i];
    }
    tile.label = -1;
    tile.hint = nearest[count / 2];
  }

  void finish(SharedSums& sums) const { sums.add(differences_, changes_); }

 private:
  void relabel(int64_t i, int32_t before, int32_t after) {
    if (before == after) return;
    move({scale_.integer(columns_.widths[i]), scale_.integer(columns_.heights[i]), 1}, before, after);
  }
  void move(const SizeSums& sums, int32_t before, int32_t after) {
    changes_ += sums.count;
    SizeSums& to = differences_[after];
    to = {to.width + sums.width, to.height + sums.height, to.count + sums.count};
    if (before < 0) return;
    SizeSums& from = differences_[before];
    from = {from.width - sums.width, from.height - sums.height, from.count - sums.count};
  }

  const Columns& columns_;
  const SizeScale& scale_;
  const float* const anchors_;
  const int64_t anchor_count_;
  Candidates candidates_;
  std::vector<SizeSums> differences_;
  int64_t changes_ = 0;
};

void kmeans_anchors_cpu(const Tensor& sizes, SizeMetric size_metric, int64_t max_iterations, const Tensor& anchors,
                        const Tensor& iterations) {
  const int64_t count = sizes.size(0), anchor_count = anchors.size(0), tile_count = ceil_div(count, kTile);
  const Columns columns = sorted_along_curve(Columns(sizes));
  const SizeScale scale(count);
  float* const anchor_data = anchors.mutable_data_ptr<float>();
  int64_t& iteration = *iterations.mutable_data_ptr<int64_t>();
  std::vector<int32_t> labels(count, -1);
  std::vector<TileSummary> tiles(tile_count);
  const auto size_of = [&](int64_t tile) { return min_of(kTile, count - tile * kTile); };
  for (int64_t tile = 0; tile < tile_count; ++tile) {
    tiles[tile] = summarise(&columns.widths[tile * kTile], &columns.heights[tile * kTile], size_of(tile), scale);
  }
  SharedSums sums(anchor_count);
  dispatch_size_metric(size_metric, [&](auto metric) {
    for (iteration = 0; iteration < max_iterations;) {
      parallel_ranges(tile_count, kGrain / kTile, [&](int64_t begin, int64_t end) {
        TileWorker<metric.value> worker(columns, scale, anchor_data, anchor_count);
        for (int64_t tile = begin; tile < end; ++tile) {
          worker.assign(tile * kTile, size_of(tile), tiles[tile], &labels[tile * kTile]);
        }
        worker.finish(sums);
      });
      ++iteration;
      if (sums.take_changes() == 0) break;
      sums.move(scale, anchor_data);
    }
  });
}

void check_pairs(const char* op, const char* argument, const Tensor& tensor) {
  check_shape(op, argument, tensor, "[N, 2]", {-1, 2});
  if (tensor.scalar_type() == ScalarType::Float) return;
  fail(op, std::string(argument) + " must be float32, got " + dtype_name(tensor.scalar_type()));
}

SizeMetric checked(const char* op, const Tensor& sizes, const char* argument, const Tensor& anchors, int64_t metric) {
  check_pairs(op, "sizes", sizes);
  check_pairs(op, argument, anchors);
  check_row_count(op, "sizes", sizes.size(0));
  check_same_device(op, argument, anchors, "sizes", sizes);
  if (anchors.size(0) < 1 || anchors.size(0) > kMostAnchors) {
    fail(op, std::string(argument) + " must have 1 to " + std::to_string(kMostAnchors) + " rows, got " +
                 std::to_string(anchors.size(0)));
  }
  if (metric < 0 || metric >= kSizeMetrics) fail(op, "metric must be in 0..2, got " + std::to_string(metric));
  return static_cast<SizeMetric>(metric);
}

std::tuple<Tensor, Tensor> assign_sizes(const Tensor& sizes, const Tensor& anchors, int64_t metric_number) {
  const char* const op = "assign_sizes";
  const SizeMetric metric = checked(op, sizes, "anchors", anchors, metric_number);
  const Tensor labels = allocate(op, {sizes.size(0)}, ScalarType::Long, sizes);
  const Tensor affinities = allocate(op, {sizes.size(0)}, ScalarType::Float, sizes);
  if (sizes.size(0) > 0) {
    if (on_gpu(op, sizes)) {
      DETOPS_GPU_ONLY(assign_sizes_cuda(as_contiguous(sizes), as_contiguous(anchors), metric, labels, affinities));
    } else {
      assign_sizes_cpu(as_contiguous(sizes), as_contiguous(anchors), metric, labels, affinities);
    }
  }
  return {labels, affinities};
}

std::tuple<Tensor, Tensor> kmeans_anchors(const Tensor& sizes, const Tensor& start, int64_t metric_number,
                                          int64_t max_iterations) {
  const char* const op = "kmeans_anchors";
  const SizeMetric metric = checked(op, sizes, "start", start, metric_number);
  if (sizes.size(0) < 1) fail(op, "sizes must have at least 1 row, got 0");
  if (max_iterations < 0) fail(op, "max_iterations must be at least 0, got " + std::to_string(max_iterations));
  const Tensor anchors = torch::stable::clone(as_contiguous(start));
  const Tensor iterations = allocate(op, {}, ScalarType::Long, sizes);
  if (on_gpu(op, sizes)) {
    DETOPS_GPU_ONLY(kmeans_anchors_cuda(as_contiguous(sizes), metric, max_iterations, anchors, iterations));
  } else {
    kmeans_anchors_cpu(as_contiguous(sizes), metric, max_iterations, anchors, iterations);
  }
  return {anchors, iterations};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&assign_sizes>("assign_sizes(Tensor sizes, Tensor anchors, int metric) -> (Tensor, Tensor)");
  ops.add<&kmeans_anchors>(
      "kmeans_anchors(Tensor sizes, Tensor start, int metric, int max_iterations) -> (Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
