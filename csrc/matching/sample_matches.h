// Random samples of matched and background anchors: who is drawn, written once for both devices.
//
//   sample_matches  matches [B, A], keys [B, A] -> indices [B, S], positive_counts [B], counts [B]
//
// Every anchor has a random key. Of the positives, matches >= 0, those with the smallest keys are drawn, up to a limit;
// of the negatives, -1, as many as then fit. At equal keys the lower index is drawn. The draw is found digit by digit.
#pragma once

#include "common/allocate.h"
#include "common/dispatch.h"

namespace DETOPS_NAMESPACE {

constexpr int kPositive = 0, kNegative = 1, kNoSample = 2;

DETOPS_HD int sample_class(int64_t match) { return match >= 0 ? kPositive : match == -1 ? kNegative : kNoSample; }

// Unsigned, in the order of the signed keys.
DETOPS_HD uint32_t sample_key(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

// Whom to draw of a class: all with a key below `key`, and the first `ties` of those that have it.
struct Draw {
  uint32_t key;
  int ties;
};

// Digits of keys, the highest first.
constexpr int kSampleDigits = 3;
constexpr int kSampleBits = 11;
constexpr int kSampleBins = 1 << kSampleBits;
DETOPS_HD int sample_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }
// Ten bits for the last.
DETOPS_HD int sample_bin(uint32_t key, int digit) {
  return static_cast<int>(key >> sample_shift(digit)) &
         (digit == kSampleDigits - 1 ? kSampleBins / 2 - 1 : kSampleBins - 1);
}
// The bits above a digit.
DETOPS_HD uint32_t sample_prefix(uint32_t key, int digit) { return digit == 0 ? 0 : key >> sample_shift(digit - 1); }

struct SampleSizes {
  int64_t images, anchors, samples, most_positives;
};

// The launch. Arguments were checked, outputs are allocated; there is at least one image.
void sample_matches_cuda(const Tensor& matches, const Tensor& keys, const SampleSizes& sizes, const Tensor& indices,
                         const Tensor& positive_counts, const Tensor& counts);

}  // namespace DETOPS_NAMESPACE
