// The machine that runs a kernel: one fiber per thread of a block, the blocks one after another.
//
// A thread runs until it must wait for others, at a barrier or in a warp collective; then the next one that can run
// does. The last to arrive sets the others free. Whatever CUDA leaves undefined here (a barrier that some threads miss,
// a collective whose lanes disagree, a lane that has ended) ends the process with a message.
//
// cuda_on_cpu.h gives all this CUDA's names.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.h"

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr int kMultiprocessors = 4;
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr size_t kLargestSharedBytes = 227 * 1024;  // with the kernel's permission

// A place in a source file: the default argument `Site::here()` names the line of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the process with "cuda_on_cpu: kernel K, block B, thread T: <text>".
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- launch

struct Launch {
  const char* kernel_text;      // as written at the launch, for messages and the registry
  const void* kernel_function;  // for its attributes
  dim3 grid, block;
  size_t shared_bytes;
  void (*call)(const void* arguments);  // runs the kernel's body for one thread
  const void* arguments;
};

void launch(const Launch& launch);

void allow_dynamic_shared(const void* kernel_function, size_t bytes);

// ---- inside a kernel

// Constant for the length of a kernel's body, which the compiler may use.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
uint3 block_dimensions() __attribute__((const));
uint3 grid_dimensions() __attribute__((const));

// Where an array in shared memory was declared; its address is the array's identity.
struct SharedArray {
  const char* name;
  size_t bytes;
  size_t alignment;
};

void* shared_array(const SharedArray& array);
void* dynamic_shared_array(size_t alignment);

struct BarrierResult {
  int any, all, count;  // over the predicates of all threads
};

// Waits for all threads of the block.
BarrierResult block_barrier(const char* name, int predicate, Site site);

// Waits for the lanes in `mask`, and shows what each of them brought. Orders memory only for __syncwarp.
class WarpMeeting {
 public:
  WarpMeeting(const char* name, unsigned mask, uint64_t value, Site site, bool orders_memory = false);
  ~WarpMeeting();
  WarpMeeting(const WarpMeeting&) = delete;

  uint64_t value_of(unsigned lane) const;  // the lane must be in the mask

 private:
  struct MeetingState* state_;
};

unsigned lane_index() __attribute__((const));

// Names the shared array that holds the byte.
[[noreturn]] void fail_uninitialised_read(const char* address);

// To be called at each atomic operation: the schedule may change here, and the old value is read.
void before_atomic(const void* address, size_t bytes);

// ---- streams

// A copy to the host lands when the stream is synchronised, and not before: until then the destination holds poison.
void copy_to_host_later(void* destination, const void* source, size_t bytes);
void synchronize();

}  // namespace cuda_on_cpu

extern "C" {
// The names of the kernels that were launched so far, one a line. Valid until the next call.
__attribute__((visibility("default"))) const char* detops_emulated_kernels();
}
