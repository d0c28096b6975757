// sample_matches: schema, checks, and the CPU kernel.
#include "matching/sample_matches.h"

#include <algorithm>
#include <vector>

#include "common/counted.h"
#include "common/parallel_cpu.h"
#include "common/register.h"

namespace DETOPS_NAMESPACE {
namespace {

// One image after another; keeps its memory.
class Sampler {
 public:
  // Returns how many positives and how many in all.
  std::pair<int64_t, int64_t> run(const int64_t* matches, const int32_t* keys, const SampleSizes& sizes,
                                  int64_t* indices) {
    std::vector<int64_t> bins[2];
    for (auto& of_class : bins) of_class.assign(kSampleBins, 0);
    int64_t totals[3] = {};
    for (int64_t a = 0; a < sizes.anchors; ++a) {
      const int kind = sample_class(matches[a]);
      ++totals[kind];
      if (kind != kNoSample) ++bins[kind][sample_bin(sample_key(keys[a]), 0)];
    }
    const int64_t positives = std::min(sizes.most_positives, totals[kPositive]);
    const int64_t negatives = std::min(sizes.samples - positives, totals[kNegative]);
    const int64_t wanted[2] = {positives, negatives};

    // The bin of the first digit in which each draw ends, and then the draw.
    int last_bin[2];
    int64_t rest[2];
    for (int kind = 0; kind < 2; ++kind) {
      last_bin[kind] = 0;
      rest[kind] = wanted[kind];
      while (last_bin[kind] < kSampleBins && rest[kind] >= bins[kind][last_bin[kind]]) {
        rest[kind] -= bins[kind][last_bin[kind]++];
      }
      candidates_[kind].clear();
    }
    for (int64_t a = 0; a < sizes.anchors; ++a) {
      const int kind = sample_class(matches[a]);
      if (kind == kNoSample) continue;
      const uint32_t key = sample_key(keys[a]);
      if (sample_bin(key, 0) == last_bin[kind]) candidates_[kind].push_back(key);
    }
    Draw draws[2];
    for (int kind = 0; kind < 2; ++kind) draws[kind] = draw_of(candidates_[kind], last_bin[kind], rest[kind]);

    // Exactly as many keys are below the last of a draw, or are ties that it takes, as were wanted of its class.
    const Counted<int64_t> drawn("sample_matches", "indices of an image", indices, positives + negatives);
    int64_t next[2] = {0, positives};
    for (int64_t a = 0; a < sizes.anchors; ++a) {
      const int kind = sample_class(matches[a]);
      if (kind == kNoSample) continue;
      const uint32_t key = sample_key(keys[a]);
      if (key < draws[kind].key || (key == draws[kind].key && draws[kind].ties-- > 0)) drawn[next[kind]++] = a;
    }
    std::fill(indices + positives + negatives, indices + sizes.samples, int64_t(-1));
    return {positives, positives + negatives};
  }

 private:
  // The draw that takes all of the bins before `bin`, and `rest` of the candidates, which are those of that bin.
  static Draw draw_of(std::vector<uint32_t>& candidates, int bin, int64_t rest) {
    if (bin == kSampleBins) return {UINT32_MAX, INT32_MAX};
    if (rest == 0) return {static_cast<uint32_t>(bin) << sample_shift(0), 0};
    std::nth_element(candidates.begin(), candidates.begin() + (rest - 1), candidates.end());
    const uint32_t key = candidates[rest - 1];
    const auto below =
        std::count_if(candidates.begin(), candidates.begin() + rest, [&](uint32_t k) { return k < key; });
    return {key, static_cast<int>(rest - below)};
  }

  std::vector<uint32_t> candidates_[2];
};

std::tuple<Tensor, Tensor, Tensor> sample_matches(const Tensor& matches, const Tensor& keys,
                                                  int64_t batch_size_per_image, int64_t most_positives) {
  const char* const op = "sample_matches";
  check_shape(op, "matches", matches, "[B, A]", {-1, -1});
  if (matches.scalar_type() != ScalarType::Long) {
    fail(op, "matches must be int64, got " + dtype_name(matches.scalar_type()));
  }
  const SampleSizes sizes{matches.size(0), matches.size(1), batch_size_per_image, most_positives};
  check_row_count(op, "matches", sizes.anchors);
  check_shape(op, "keys", keys, "[B, A] of matches", {sizes.images, sizes.anchors});
  if (keys.scalar_type() != ScalarType::Int) fail(op, "keys must be int32, got " + dtype_name(keys.scalar_type()));
  check_same_device(op, "keys", keys, "matches", matches);
  if (sizes.samples < 0 || most_positives < 0 || most_positives > sizes.samples) {
    fail(op, "most_positives must be from 0 to batch_size_per_image (" + std::to_string(sizes.samples) + "), got " +
                 std::to_string(most_positives));
  }
  const Tensor dense_matches = as_contiguous(matches), dense_keys = as_contiguous(keys);
  const Tensor indices = allocate(op, {sizes.images, sizes.samples}, ScalarType::Long, matches);
  const Tensor positive_counts = allocate(op, {sizes.images}, ScalarType::Long, matches);
  const Tensor counts = allocate(op, {sizes.images}, ScalarType::Long, matches);
  if (sizes.images == 0) return {indices, positive_counts, counts};
  if (on_gpu(op, matches)) {
    DETOPS_GPU_ONLY(sample_matches_cuda(dense_matches, dense_keys, sizes, indices, positive_counts, counts));
    return {indices, positive_counts, counts};
  }
  const int64_t* const match_data = dense_matches.const_data_ptr<int64_t>();
  const int32_t* const key_data = dense_keys.const_data_ptr<int32_t>();
  int64_t* const out = indices.mutable_data_ptr<int64_t>();
  int64_t* const positives = positive_counts.mutable_data_ptr<int64_t>();
  int64_t* const all = counts.mutable_data_ptr<int64_t>();
  parallel_items(sizes.images, [&](const auto& next) {
    Sampler sampler;
    for (int64_t image = next(); image >= 0; image = next()) {
      std::tie(positives[image], all[image]) = sampler.run(
          match_data + image * sizes.anchors, key_data + image * sizes.anchors, sizes, out + image * sizes.samples);
    }
  });
  return {indices, positive_counts, counts};
}

}  // namespace

DETOPS_OPS(ops) {
  ops.add<&sample_matches>(
      "sample_matches(Tensor matches, Tensor keys, int batch_size_per_image, int most_positives) -> "
      "(Tensor, Tensor, Tensor)");
}

}  // namespace DETOPS_NAMESPACE
