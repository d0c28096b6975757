// A fiber: a stack and a place to go on. One runs until it switches to another; the operating system sees one thread.
//
// swapcontext would do, but makes a system call at every switch. On x86-64 a switch is the dozen instructions in
// fiber.cpp; other processors take swapcontext.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

struct Fiber {
  void* stack_pointer = nullptr;  // of a fiber that is not running; with swapcontext its ucontext_t
  const void* stack = nullptr;    // lowest address
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// Prepares a fiber that calls `entry` when it is first switched to. `entry` must not return.
void create_fiber(Fiber& fiber, void (*entry)(), size_t stack_bytes, const char* name);

// Makes `fiber` stand for the code that is running now, on the stack that the operating system gave it.
void adopt_running_code(Fiber& fiber);

// Runs `to`; returns when something switches back to `from`, which must be the running one.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace cuda_on_cpu
