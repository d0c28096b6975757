// Loops of common/parallel_cpu.h with bodies that throw, for tests/test_parallel.py.
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

#include "common/parallel_cpu.h"

namespace {

void visit(int64_t item, int64_t first_bad, int64_t step, bool no_memory, std::atomic<int64_t>& visited) {
  ++visited;
  if (item < first_bad || (item - first_bad) % step != 0) return;
  if (no_memory) throw std::bad_alloc();
  throw std::runtime_error("item " + std::to_string(item));
}

}  // namespace

// Loops over `count` items, of which first_bad, first_bad + step, ... throw. Returns how many were visited and writes
// what reached the caller.
extern "C" int64_t loop(bool by_item, int64_t count, int64_t grain, int64_t first_bad, int64_t step, bool no_memory,
                        char* text, int64_t length) {
  std::atomic<int64_t> visited{0};
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) visit(item, first_bad, step, no_memory, visited);
  };
  const auto items = [&](const auto& next) {
    for (int64_t item = next(); item >= 0; item = next()) visit(item, first_bad, step, no_memory, visited);
  };
  const char* caught = "nothing";
  std::string what;
  try {
    by_item ? DETOPS_NAMESPACE::parallel_items(count, items) : DETOPS_NAMESPACE::parallel_ranges(count, grain, range);
  } catch (const std::bad_alloc&) {
    caught = "bad_alloc";
  } catch (const std::runtime_error& error) {
    what = error.what();
    caught = what.c_str();
  }
  snprintf(text, static_cast<size_t>(length), "%s", caught);
  return visited;
}
