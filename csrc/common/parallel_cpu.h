// Loops over torch's thread pool, and code cloned per instruction set.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include <torch/csrc/stable/ops.h>

#include "common/host_device.h"
#include "common/subnormals.h"

// Compiles a function once per instruction set; the loader picks the best that the processor has. Put it on the free
// function that holds the inner loop: a lambda inside a cloned function is compiled for the baseline only.
// Not under sanitizers: the resolvers run before their runtime is ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && __GNUC__ >= 12
#define DETOPS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DETOPS_CLONES
#endif

namespace DETOPS_NAMESPACE {

// The first exception of several threads.
class FirstException {
 public:
  template <class Body>
  void run(const Body& body) noexcept {
    try {
      body();
    } catch (...) {
      if (!taken_.exchange(true)) exception_ = std::current_exception();
    }
  }
  // Once the threads have met.
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr exception_;
};

// Calls body(begin, end) for consecutive ranges of at least `grain` items, on torch's threads, with subnormals. What
// `body` throws, as where memory runs out, goes to the caller when all have ended: torch's loop would lose the type and
// the text.
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) {
    const WithSubnormals scope;
    return body(int64_t(0), count);
  }
  FirstException exception;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const WithSubnormals scope;
    exception.run([&] { body(begin, end); });
  });
  exception.rethrow();
}

// Calls body(next) once on each of up to `count` threads, where next() hands out the items 0 .. count-1 one by one, and
// -1 when none is left: for items of unequal cost. Exceptions as of parallel_ranges; other threads finish their items.
template <class Body>
void parallel_items(int64_t count, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : -1;
  };
  int64_t threads = torch::stable::get_num_threads();
  if (threads > count) threads = count;
  parallel_ranges(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(next);
  });
}

}  // namespace DETOPS_NAMESPACE
