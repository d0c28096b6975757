// Keys that order scored items on a GPU.
#pragma once

#include "common/launch_cuda.cuh"
#include "nms/nms.h"

namespace DETOPS_NAMESPACE {

// Unique, and ascending in the order of ranks: the score's rank_key first, then the index.
__device__ inline uint64_t unique_key(uint32_t key, uint32_t index) { return uint64_t(key) << 32 | index; }
__device__ inline unsigned __int128 unique_key(uint64_t key, uint32_t index) {
  return static_cast<unsigned __int128>(key) << 32 | index;
}

// For scores of type S: 64 bits, and 128 for double.
template <class S>
using UniqueKey = decltype(unique_key(RankKey<S>(), 0));

template <class Key>
__device__ inline uint32_t index_of(Key key) {
  return static_cast<uint32_t>(key);
}

}  // namespace DETOPS_NAMESPACE
