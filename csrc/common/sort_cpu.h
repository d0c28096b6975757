// Stable sorting of (key, index) pairs on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

namespace DETOPS_NAMESPACE {

// Key is uint32_t or uint64_t; smaller keys come first.
template <class Key>
struct Keyed {
  Key key;
  uint32_t index;
};

template <class Key>
inline bool operator<(const Keyed<Key>& a, const Keyed<Key>& b) {
  return a.key != b.key ? a.key < b.key : a.index < b.index;
}

// Least-significant-digit radix sort by key, stable. Digits that all keys share cost one look, so small ids in 64 bits
// sort as fast as small ids in 8.
template <class Key>
void radix_sort(Keyed<Key>* items, int64_t count) {
  constexpr int kBits = 11;
  constexpr int kDigits = 1 << kBits;
  constexpr int kPasses = (static_cast<int>(sizeof(Key)) * 8 + kBits - 1) / kBits;
  const auto digit = [](Key key, int pass) { return static_cast<int>(key >> (pass * kBits)) & (kDigits - 1); };

  const std::unique_ptr<uint32_t[]> counts(new uint32_t[kPasses * kDigits]());
  for (int64_t i = 0; i < count; ++i) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass * kDigits + digit(items[i].key, pass)];
  }
  const std::unique_ptr<Keyed<Key>[]> buffer(new Keyed<Key>[count]);
  Keyed<Key>* from = items;
  Keyed<Key>* to = buffer.get();
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* const offsets = counts.get() + pass * kDigits;
    if (offsets[digit(items[0].key, pass)] == count) continue;
    uint32_t offset = 0;
    for (int i = 0; i < kDigits; ++i) offset += std::exchange(offsets[i], offset);
    for (int64_t i = 0; i < count; ++i) to[offsets[digit(from[i].key, pass)]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + count, items);
}

// Sorts items whose order before was that of their index.
template <class Key>
void sort_keyed(Keyed<Key>* items, int64_t count) {
  constexpr int64_t kRadixPays = 512;
  if (count < kRadixPays) {
    std::sort(items, items + count);
  } else {
    radix_sort(items, count);
  }
}

}  // namespace DETOPS_NAMESPACE
