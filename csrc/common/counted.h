// Views that know how many elements they hold.
//
// A buffer's size is a proof. Where it rests on a claim about data (so many cells for a box, vertices for a polygon),
// the claim stands beside the allocation, and code writes through one of these views. Built with DETOPS_CHECKED=1, and
// always in the emulation, an access beyond the count ends the process and says where:
//
//     const Counted<int64_t> rows("assign_yolov5", "rows of a level", pointer, capacity);
//     rows[place] = row;  // assign_yolov5: rows of a level: index 15 is beyond 15 elements
//
// Other builds keep the pointer alone and check nothing.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "common/host_device.h"

#if defined(DETOPS_EMULATED) && !defined(DETOPS_CHECKED)
#define DETOPS_CHECKED
#endif

namespace DETOPS_NAMESPACE {

#if defined(DETOPS_CHECKED)
DETOPS_HD void check_index(const char* op, const char* argument, int64_t index, int64_t count) {
  if (index >= 0 && index < count) return;
#if defined(__CUDA_ARCH__)
  // The names are strings of the host.
  printf("detops: index %lld is beyond %lld elements\n", static_cast<long long>(index), static_cast<long long>(count));
  __trap();
#else
  std::fprintf(stderr, "%s: %s: index %lld is beyond %lld elements\n", op, argument, static_cast<long long>(index),
               static_cast<long long>(count));
  std::abort();
#endif
}
#endif

// A pointer to `count` elements. `op` and `argument` are string literals.
template <class T>
class Counted {
 public:
  Counted() = default;
#if defined(DETOPS_CHECKED)
  DETOPS_HD Counted(const char* op, const char* argument, T* data, int64_t count)
      : data_(data), count_(count), op_(op), argument_(argument) {}
  DETOPS_HD T& operator[](int64_t i) const {
    check_index(op_, argument_, i, count_);
    return data_[i];
  }
  // `count` elements from `first` on.
  DETOPS_HD Counted part(int64_t first, int64_t count) const {
    if (count > 0) check_index(op_, argument_, first, count_);
    if (count > 0) check_index(op_, argument_, first + count - 1, count_);
    return {op_, argument_, data_ + first, count};
  }
#else
  DETOPS_HD Counted(const char*, const char*, T* data, int64_t) : data_(data) {}
  DETOPS_HD T& operator[](int64_t i) const { return data_[i]; }
  DETOPS_HD Counted part(int64_t first, int64_t count) const { return {nullptr, nullptr, data_ + first, count}; }
#endif
  DETOPS_HD T* data() const { return data_; }

 private:
  T* data_ = nullptr;
#if defined(DETOPS_CHECKED)
  int64_t count_ = 0;
  const char *op_ = "", *argument_ = "";
#endif
};

// An array of a fixed size, in registers, on a stack or in shared memory.
template <class T, int size>
class CountedArray {
 public:
#if defined(DETOPS_CHECKED)
  DETOPS_HD CountedArray(const char* op, const char* argument) : op_(op), argument_(argument) {}
  DETOPS_HD T& operator[](int64_t i) {
    check_index(op_, argument_, i, size);
    return values_[i];
  }
  DETOPS_HD const T& operator[](int64_t i) const {
    check_index(op_, argument_, i, size);
    return values_[i];
  }
#else
  DETOPS_HD CountedArray(const char*, const char*) {}
  DETOPS_HD T& operator[](int64_t i) { return values_[i]; }
  DETOPS_HD const T& operator[](int64_t i) const { return values_[i]; }
#endif

 private:
  T values_[size];
#if defined(DETOPS_CHECKED)
  const char *op_, *argument_;
#endif
};

}  // namespace DETOPS_NAMESPACE
