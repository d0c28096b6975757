// assign_sizes and kmeans_anchors: schemas, checks, and the CPU loops.
#include "anchors/anchors.h"

#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/dispatch.h"
#include "common/parallel_cpu.h"

namespace DETOPS_NAMESPACE {
namespace {

constexpr int64_t kTile = 128;       // sizes that are assigned together
constexpr int64_t kGrain = 1 << 13;  // sizes that are worth a thread

// Assigns up to kTile sizes, of which widths and heights lie apart.
template <SizeMetric metric>
DETOPS_CLONES void assign_tile(const float* widths, const float* heights, int64_t count, const float* anchors,
                               int64_t anchor_count, int32_t* __restrict__ labels, float* __restrict__ affinities) {
  // Arrays of this function, which may be written where nothing changes: the compiler then needs no branch.
  float best[kTile], w[kTile] = {}, h[kTile] = {};
  int32_t nearest[kTile];
  for (int64_t i = 0; i < count; ++i) {
    w[i] = widths[i];
    h[i] = heights[i];
  }
  for (int64_t i = 0; i < kTile; ++i) {
    best[i] = -std::numeric_limits<float>::infinity();
    nearest[i] = 0;
  }
  for (int64_t a = 0; a < anchor_count; ++a) {
    const float width = anchors[2 * a], height = anchors[2 * a + 1];
    const int32_t label = static_cast<int32_t>(a);
    for (int64_t i = 0; i < kTile; ++i) {
      const float value = affinity<metric>(w[i], h[i], width, height);
      const bool nearer = is_nearer(value, best[i]);
      best[i] = nearer ? value : best[i];
      nearest[i] = nearer ? label : nearest[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    labels[i] = nearest[i];
    affinities[i] = best[i];
  }
}

// The places where two runs of labels differ.
int64_t find_changes(const int32_t* before, const int32_t* after, int64_t count, int32_t* places) {
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
  const Columns columns(sizes);
  const float* const anchor_data = anchors.const_data_ptr<float>();
  int64_t* const label_data = labels.mutable_data_ptr<int64_t>();
  float* const affinity_data = affinities.mutable_data_ptr<float>();
  dispatch_size_metric(size_metric, [&](auto metric) {
    parallel_ranges(sizes.size(0), kGrain, [&](int64_t begin, int64_t end) {
      int32_t tile_labels[kTile];
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t count = min_of(kTile, end - i);
        assign_tile<metric.value>(&columns.widths[i], &columns.heights[i], count, anchor_data, anchors.size(0),
                                  tile_labels, affinity_data + i);
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

void kmeans_anchors_cpu(const Tensor& sizes, SizeMetric size_metric, int64_t max_iterations, const Tensor& anchors,
                        const Tensor& iterations) {
  const int64_t count = sizes.size(0), anchor_count = anchors.size(0);
  const Columns columns(sizes);
  const SizeScale scale(count);
  float* const anchor_data = anchors.mutable_data_ptr<float>();
  int64_t& iteration = *iterations.mutable_data_ptr<int64_t>();
  std::vector<int32_t> labels(count, -1);
  SharedSums sums(anchor_count);
  dispatch_size_metric(size_metric, [&](auto metric) {
    for (iteration = 0; iteration < max_iterations;) {
      parallel_ranges(count, kGrain, [&](int64_t begin, int64_t end) {
        std::vector<SizeSums> differences(anchor_count);
        int64_t changes = 0;
        int32_t tile_labels[kTile], places[kTile];
        float best[kTile];
        for (int64_t i = begin; i < end; i += kTile) {
          const int64_t tile = min_of(kTile, end - i);
          assign_tile<metric.value>(&columns.widths[i], &columns.heights[i], tile, anchor_data, anchor_count,
                                    tile_labels, best);
          const int64_t changed = find_changes(&labels[i], tile_labels, tile, places);
          changes += changed;
          for (int64_t place = 0; place < changed; ++place) {
            const int64_t j = places[place];
            const int32_t before = labels[i + j], after = tile_labels[j];
            const int64_t width = scale.integer(columns.widths[i + j]), height = scale.integer(columns.heights[i + j]);
            SizeSums& to = differences[after];
            to = {to.width + width, to.height + height, to.count + 1};
            if (before >= 0) {
              SizeSums& from = differences[before];
              from = {from.width - width, from.height - height, from.count - 1};
            }
            labels[i + j] = after;
          }
        }
        sums.add(differences, changes);
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

STABLE_TORCH_LIBRARY_FRAGMENT(DETOPS_NAMESPACE, m) {
  m.def("assign_sizes(Tensor sizes, Tensor anchors, int metric) -> (Tensor, Tensor)");
  m.def("kmeans_anchors(Tensor sizes, Tensor start, int metric, int max_iterations) -> (Tensor, Tensor)");
}

DETOPS_REGISTER(m) {
  m.impl("assign_sizes", TORCH_BOX(&assign_sizes));
  m.impl("kmeans_anchors", TORCH_BOX(&kmeans_anchors));
}

}  // namespace DETOPS_NAMESPACE
