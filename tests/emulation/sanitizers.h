// What the sanitizers must be told, because the runtime itself is compiled without them: its bookkeeping is not part
// of the kernels' memory traffic. Each function is empty unless build.py defines the sanitizer's macro.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fiber.h"

#if defined(DETOPS_SANITIZE_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(DETOPS_SANITIZE_THREAD)
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
// What the compiler makes of an atomic store in instrumented code; g++ ships no header for it.
extern "C" void __tsan_atomic32_store(volatile int32_t* address, int32_t value, int memory_order);
#endif
#if defined(DETOPS_SANITIZE_UNDEFINED)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

// ---- every sanitizer: a line of ours after its report

inline void sanitizer_at_death([[maybe_unused]] void (*callback)()) {
#if defined(DETOPS_SANITIZE_ADDRESS) || defined(DETOPS_SANITIZE_UNDEFINED)
  __sanitizer_set_death_callback(callback);
#endif
}

// ---- AddressSanitizer: which stack is in use, which memory may be touched

// Memory is granted in whole granules, so what is allowed should begin at a multiple of 8.
inline void forbid_memory([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if defined(DETOPS_SANITIZE_ADDRESS)
  __asan_poison_memory_region(begin, bytes);
#endif
}

inline void allow_memory([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if defined(DETOPS_SANITIZE_ADDRESS)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

// ---- ThreadSanitizer: who runs, and what orders memory between fibers

// A meeting point in memory: what happened before `release` happens before what follows `acquire` on the same point.
struct OrderPoint {
  int32_t cell;
};

// Forgets earlier releases.
inline void first_release([[maybe_unused]] OrderPoint& point) {
#if defined(DETOPS_SANITIZE_THREAD)
  __tsan_atomic32_store(&point.cell, 0, __ATOMIC_RELEASE);
#endif
}

// Adds to earlier releases.
inline void release([[maybe_unused]] OrderPoint& point) {
#if defined(DETOPS_SANITIZE_THREAD)
  __tsan_release(&point);
#endif
}

inline void acquire([[maybe_unused]] OrderPoint& point) {
#if defined(DETOPS_SANITIZE_THREAD)
  __tsan_acquire(&point);
#endif
}

inline void* sanitizer_create_fiber([[maybe_unused]] const char* name) {
#if defined(DETOPS_SANITIZE_THREAD)
  void* const fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
#else
  return nullptr;
#endif
}

inline void* sanitizer_current_fiber() {
#if defined(DETOPS_SANITIZE_THREAD)
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}

// ---- both: around a switch

inline void sanitizer_start_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] Fiber& to) {
#if defined(DETOPS_SANITIZE_ADDRESS)
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(DETOPS_SANITIZE_THREAD)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);  // a switch is not a barrier
#endif
}

// `now` is null on a fiber's first run. AddressSanitizer alone knows the stack of a fiber that was adopted.
inline void sanitizer_finish_switch([[maybe_unused]] Fiber* now, [[maybe_unused]] Fiber& previous) {
#if defined(DETOPS_SANITIZE_ADDRESS)
  __sanitizer_finish_switch_fiber(now == nullptr ? nullptr : now->asan_fake_stack, &previous.stack,
                                  &previous.stack_bytes);
#endif
}

}  // namespace cuda_on_cpu
