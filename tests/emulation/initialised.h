// Which bytes of shared memory have been written since the block began. In the `init` build the compiler calls a
// function at every load and store (it believes to compile for a kernel with its own AddressSanitizer); initialised.cpp
// answers these calls. In every other build all this is empty.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

#if defined(DETOPS_CHECK_INITIALISED)
void watch_initialisation(const char* begin, size_t bytes);
void mark_uninitialised(const char* begin, size_t bytes);
void check_initialised(const void* begin, size_t bytes);
#else
inline void watch_initialisation(const char*, size_t) {}
inline void mark_uninitialised(const char*, size_t) {}
inline void check_initialised(const void*, size_t) {}
#endif

}  // namespace cuda_on_cpu
