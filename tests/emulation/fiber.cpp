#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "sanitizers.h"

#if !defined(__x86_64__) || defined(DETOPS_FIBERS_BY_UCONTEXT)
#define DETOPS_UCONTEXT 1
#include <ucontext.h>
#else
#define DETOPS_UCONTEXT 0
#endif

namespace cuda_on_cpu {
namespace {

Fiber* previous_fiber;     // who switched to the fiber that runs now
void (*entry_function)();  // the same for all fibers

// The first instructions on a new stack.
void fiber_start() {
  sanitizer_finish_switch(nullptr, *previous_fiber);
  entry_function();
  fprintf(stderr, "cuda_on_cpu: a fiber's entry returned\n");
  abort();
}

#if !DETOPS_UCONTEXT
// Saves what a called function must preserve, changes stacks, restores it. The floating-point control words are
// left alone: all fibers share one setting.
extern "C" void cuda_on_cpu_switch_stack(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
  .text
  .type cuda_on_cpu_switch_stack, @function
cuda_on_cpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_cpu_switch_stack, . - cuda_on_cpu_switch_stack
)");
#endif

}  // namespace

void create_fiber(Fiber& fiber, void (*entry)(), size_t stack_bytes, const char* name) {
  // The lowest page is left inaccessible, so that a stack overflow is a fault and not a neighbour's corruption.
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    perror("cuda_on_cpu: no memory for a fiber's stack");
    abort();
  }
  char* const stack = static_cast<char*>(memory) + page;
  fiber.stack = stack;
  fiber.stack_bytes = stack_bytes;
  fiber.tsan_fiber = sanitizer_create_fiber(name);
  entry_function = entry;
#if DETOPS_UCONTEXT
  auto* const context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, fiber_start, 0);
  fiber.stack_pointer = context;
#else
  // As if the fiber had called cuda_on_cpu_switch_stack just before fiber_start: six registers and a return address.
  // A null return address above them ends every stack trace.
  auto* top = reinterpret_cast<uintptr_t*>(stack + stack_bytes);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&fiber_start);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
#endif
}

void adopt_running_code(Fiber& fiber) {
  fiber.tsan_fiber = sanitizer_current_fiber();
#if DETOPS_UCONTEXT
  if (fiber.stack_pointer == nullptr) fiber.stack_pointer = new ucontext_t;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  previous_fiber = &from;
  sanitizer_start_switch(from, to);
#if DETOPS_UCONTEXT
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
#else
  cuda_on_cpu_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  sanitizer_finish_switch(&from, *previous_fiber);
}

}  // namespace cuda_on_cpu
