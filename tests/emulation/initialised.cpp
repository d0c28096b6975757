#include "initialised.h"

#if defined(DETOPS_CHECK_INITIALISED)
#include <cstdint>
#include <cstring>
#include <memory>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

const char* watched;  // shared memory
size_t watched_bytes;
std::unique_ptr<bool[]> written;

// The offset of an address in the watched memory; beyond its end for any other address.
inline size_t offset_of(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(watched);
}

inline void mark_written(const void* begin, size_t bytes) {
  const size_t offset = offset_of(begin);
  if (offset < watched_bytes && bytes <= watched_bytes - offset) memset(&written[offset], true, bytes);
}

}  // namespace

void watch_initialisation(const char* begin, size_t bytes) {
  watched = begin;
  watched_bytes = bytes;
  written = std::make_unique<bool[]>(bytes);
}

void mark_uninitialised(const char* begin, size_t bytes) { memset(&written[offset_of(begin)], false, bytes); }

void check_initialised(const void* begin, size_t bytes) {
  const size_t offset = offset_of(begin);
  if (offset >= watched_bytes || bytes > watched_bytes - offset) return;
  for (size_t i = 0; i < bytes; ++i) {
    if (written[offset + i]) continue;
    fail_uninitialised_read(static_cast<const char*>(begin) + i);
  }
}

}  // namespace cuda_on_cpu

#define DETOPS_ACCESS(size)                                                                                \
  void __asan_load##size##_noabort(const void* address) { cuda_on_cpu::check_initialised(address, size); } \
  void __asan_store##size##_noabort(const void* address) { cuda_on_cpu::mark_written(address, size); }

extern "C" {
DETOPS_ACCESS(1)
DETOPS_ACCESS(2)
DETOPS_ACCESS(4)
DETOPS_ACCESS(8)
DETOPS_ACCESS(16)
void __asan_loadN_noabort(const void* address, size_t size) { cuda_on_cpu::check_initialised(address, size); }
void __asan_storeN_noabort(const void* address, size_t size) { cuda_on_cpu::mark_written(address, size); }
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}
}
#endif
