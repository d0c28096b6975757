// Arithmetic with subnormal numbers, whatever the calling thread has set.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace DETOPS_NAMESPACE {

// While one lives its thread computes with subnormal numbers, whatever torch.set_flush_denormal says: that speaks to
// the calling thread alone, and a decision must not depend on which thread makes it.
class WithSubnormals {
 public:
#if defined(__SSE__)
  WithSubnormals() : before_(_mm_getcsr()) {
    if (before_ & kFlush) _mm_setcsr(before_ & ~kFlush);
  }
  ~WithSubnormals() {
    if (before_ & kFlush) _mm_setcsr(before_);
  }

 private:
  static constexpr unsigned kFlush = 0x8040;  // results to zero, operands as zero
  const unsigned before_;
#elif defined(__aarch64__)
  WithSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (before_ & kFlush) asm volatile("msr fpcr, %0" ::"r"(before_ & ~kFlush));
  }
  ~WithSubnormals() {
    if (before_ & kFlush) asm volatile("msr fpcr, %0" ::"r"(before_));
  }

 private:
  static constexpr uint64_t kFlush = uint64_t(1) << 24;
  uint64_t before_;
#else
  WithSubnormals() {}
#endif
 public:
  WithSubnormals(const WithSubnormals&) = delete;
  WithSubnormals& operator=(const WithSubnormals&) = delete;
};

}  // namespace DETOPS_NAMESPACE
