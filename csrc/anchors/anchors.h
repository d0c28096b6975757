// k-means on the shapes of boxes, for anchors: the math and the decisions, written once for both devices.
//
// Ops and shapes. Sizes (width, height) and anchors are float32 in (0, 1]: detops/anchors.py divides by a power of two.
//   assign_sizes    sizes [N, 2], anchors [K, 2] -> labels [N] int64, the nearest anchor; affinities [N] to it
//   kmeans_anchors  sizes [N, 2], start [K, 2] -> anchors [K, 2], iterations [] int64
//
// Affinity, the larger the nearer; ties go to the lower anchor:
//   iou        of the two boxes with one corner in common
//   euclidean  minus the squared distance
//   ratio      minus the greatest of the four ratios of sides, either way
//
// An iteration assigns every size, and moves every anchor to the mean of its sizes; an anchor without any stays. It
// ends when no label changes. Sizes are added up as integers, so that means depend on no order and are the same on
// every device: 2^(62 - log2 N) is 1, so no sum overflows, and of float32 sizes above 2^-20 nothing is lost for N up to
// 2^18.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/host_device.h"

namespace DETOPS_NAMESPACE {

enum class SizeMetric : int64_t { kIou, kEuclidean, kRatio };
constexpr int64_t kSizeMetrics = 3;
constexpr int64_t kMostAnchors = 1024;

template <SizeMetric metric>
DETOPS_HD float affinity(float width, float height, float anchor_width, float anchor_height) {
  if (metric == SizeMetric::kIou) {
    const float intersection = min_of(width, anchor_width) * min_of(height, anchor_height);
    return intersection / (width * height + anchor_width * anchor_height - intersection);
  }
  if (metric == SizeMetric::kEuclidean) {
    const float x = width - anchor_width, y = height - anchor_height;
    return -(x * x + y * y);
  }
  const float of_width = max_of(width / anchor_width, anchor_width / width);
  const float of_height = max_of(height / anchor_height, anchor_height / height);
  return -max_of(of_width, of_height);
}

// The decision of an assignment: anchors are tried in ascending order.
DETOPS_HD bool is_nearer(float affinity, float best) { return affinity > best; }

// Sizes as integers.
struct SizeScale {
  double one;  // a power of two

  explicit SizeScale(int64_t count) : one(1) {
    int bits = 62;
    while (bits > 30 && (int64_t(1) << (62 - bits)) < count) --bits;
    for (int bit = 0; bit < bits; ++bit) one *= 2;
  }
  DETOPS_HD int64_t integer(float size) const {
    return static_cast<int64_t>((size > 0.0f ? (size < 1.0f ? size : 1.0f) : 0.0f) * one);
  }
  DETOPS_HD float mean(int64_t sum, int64_t count) const {
    return static_cast<float>(static_cast<double>(sum) / static_cast<double>(count) / one);
  }
};

// Of the sizes with one label.
struct SizeSums {
  int64_t width, height, count;
};

template <SizeMetric metric>
struct MetricTag {
  static constexpr SizeMetric value = metric;
};
template <class Body>
void dispatch_size_metric(SizeMetric metric, const Body& body) {
  switch (metric) {
    case SizeMetric::kIou: return body(MetricTag<SizeMetric::kIou>{});
    case SizeMetric::kEuclidean: return body(MetricTag<SizeMetric::kEuclidean>{});
    case SizeMetric::kRatio: return body(MetricTag<SizeMetric::kRatio>{});
  }
}

// The launches. Arguments were checked and are contiguous, outputs are allocated, there is at least one size. `anchors`
// holds the start.
void assign_sizes_cuda(const torch::stable::Tensor& sizes, const torch::stable::Tensor& anchors, SizeMetric metric,
                       const torch::stable::Tensor& labels, const torch::stable::Tensor& affinities);
void kmeans_anchors_cuda(const torch::stable::Tensor& sizes, SizeMetric metric, int64_t max_iterations,
                         const torch::stable::Tensor& anchors, const torch::stable::Tensor& iterations);

}  // namespace DETOPS_NAMESPACE
