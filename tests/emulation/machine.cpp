// Compiled without sanitizers: its bookkeeping is shared by all fibers, on purpose. What they should know is told
// through sanitizers.h. While a kernel runs nothing here allocates, because ThreadSanitizer sees malloc and free.
#include "machine.h"

#include <time.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "fiber.h"
#include "initialised.h"
#include "sanitizers.h"

namespace cuda_on_cpu {

struct MeetingState {
  const char* name;
  Site site;
  unsigned mask, arrived, not_left;
  uint64_t values[kWarp];
  OrderPoint point;
  MeetingState* next_free;
};

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kArenaBytes = 512 * 1024;  // shared memory and the forbidden zones between arrays
constexpr size_t kForbiddenZone = 64;
constexpr unsigned kMaxSharedArrays = 64;

#if defined(DETOPS_SANITIZE_ADDRESS) || defined(DETOPS_SANITIZE_THREAD)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// Under ThreadSanitizer blocks are dealt to two sets of fibers, as they are to multiprocessors. The blocks of one set
// follow each other; those of different sets are unordered, so that a race between blocks is seen. More sets would see
// more pairs of blocks at once, but each fiber makes all barriers slower; a seed deals the blocks anew.
#if defined(DETOPS_SANITIZE_THREAD)
constexpr unsigned kFiberSets = 2;
#else
constexpr unsigned kFiberSets = 1;
#endif

struct Thread {
  Fiber fiber;
  unsigned number;  // within the block
  uint3 index;
  bool at_barrier;
};

struct Warp {
  unsigned present, ended;  // lanes
  MeetingState* open[kWarp];
  unsigned open_count;
};

struct Barrier {
  const char* name;
  Site site;
  unsigned arrived;
  BarrierResult sum, result;
  // Used in turn: a thread may reach the next barrier before another has left this one.
  OrderPoint points[2];
  unsigned turn;
};

struct PlacedArray {
  const SharedArray* array;
  char* address;
};

// The fibers, shared memory and rendezvous of one block at a time.
struct Multiprocessor {
  Thread threads[kMaxThreads];
  unsigned fibers_made = 0;
  Warp warps[kMaxThreads / kWarp];
  MeetingState meetings[kMaxThreads];
  MeetingState* free_meetings = nullptr;
  Barrier barrier;

  unsigned ready[kMaxThreads];  // a ring of thread numbers
  unsigned ready_begin, ready_count;
  unsigned ended_count;
  unsigned last_ended;

  char* arena = nullptr;
  size_t arena_used;
  size_t shared_bytes;
  PlacedArray arrays[kMaxSharedArrays];
  unsigned array_count;
  char* dynamic_array;

  // A block begins after the launch, or after all of the block before it: it acquires one point and releases the other.
  OrderPoint between_blocks[2];
  unsigned block_turn = 0;
};

// Settings, from the environment.
struct Settings {
  uint64_t seed = 0;            // 0: threads and blocks run in the order of their numbers
  unsigned char poison = 0xff;  // fills shared memory: as floating-point numbers, NaN
  double seconds = 300;         // after which a launch is taken for endless
  std::string kernel_log;       // a file to which the name of each kernel is appended

  Settings() {
    if (const char* text = getenv("DETOPS_EMULATED_SEED")) seed = strtoull(text, nullptr, 0);
    if (const char* text = getenv("DETOPS_EMULATED_POISON"))
      poison = static_cast<unsigned char>(strtoul(text, nullptr, 0));
    if (const char* text = getenv("DETOPS_EMULATED_SECONDS")) seconds = strtod(text, nullptr);
    if (const char* text = getenv("DETOPS_EMULATED_KERNELS")) kernel_log = text;
  }
};

const Settings& settings() {
  static const Settings settings;
  return settings;
}

Multiprocessor* multiprocessors[kFiberSets];
Fiber launching_code;

// What runs now.
const Launch* the_launch;
const char* the_kernel = "";
Multiprocessor* here;
Thread* running;
uint3 the_block;
unsigned thread_count;
double launch_time;
unsigned switches;

uint64_t random_state;

uint64_t random_below(uint64_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 11) % bound;
}

// ---- messages

void print_place() {
  fprintf(stderr, "cuda_on_cpu: kernel %s", the_kernel);
  if (running == nullptr) return;
  const uint3 block = the_block, thread = running->index;
  fprintf(stderr, ", block (%u, %u, %u), thread (%u, %u, %u)", block.x, block.y, block.z, thread.x, thread.y, thread.z);
}

// After a sanitizer's report.
void print_place_at_death() {
  if (the_launch == nullptr) return;
  print_place();
  fprintf(stderr, ": see the report above\n");
}

// "nms::(mask_kernel<float>)" -> "mask_kernel"
std::string plain_name(const char* text) {
  std::string name;
  for (const char* c = text; *c != '\0' && *c != '<'; ++c) {
    if (*c == ':') {
      name.clear();
    } else if (*c != '(' && *c != ')' && *c != ' ') {
      name += *c;
    }
  }
  return name;
}

// Lists who waits where, a line for each place.
[[noreturn]] void fail_deadlock() {
  const Barrier& barrier = here->barrier;
  const unsigned warp_count = (thread_count + kWarp - 1) / kWarp;
  bool masks_overlap = false;
  for (unsigned w = 0; w < warp_count; ++w) {
    unsigned named = 0;
    for (unsigned i = 0; i < here->warps[w].open_count; ++i) {
      masks_overlap |= (named & here->warps[w].open[i]->mask) != 0;
      named |= here->warps[w].open[i]->mask;
    }
  }
  running = nullptr;
  print_place();
  fprintf(stderr, ", block (%u, %u, %u): deadlock%s\n", the_block.x, the_block.y, the_block.z,
          masks_overlap ? ", lanes of one warp wait with different masks" : "");
  if (barrier.arrived > 0) {
    fprintf(stderr, "  %u of %u threads wait in %s at %s:%d\n", barrier.arrived, thread_count, barrier.name,
            barrier.site.file, barrier.site.line);
  }
  for (unsigned w = 0; w < warp_count; ++w) {
    const uint3 first = here->threads[w * kWarp].index;
    for (unsigned i = 0; i < here->warps[w].open_count; ++i) {
      const MeetingState& meeting = *here->warps[w].open[i];
      fprintf(stderr, "  of the warp that begins with thread (%u, %u, %u), lanes 0x%08x wait in %s(0x%08x) at %s:%d\n",
              first.x, first.y, first.z, meeting.arrived, meeting.name, meeting.mask, meeting.site.file,
              meeting.site.line);
    }
  }
  abort();
}

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
bool same(const Site& a, const Site& b) { return a.line == b.line && same(a.file, b.file); }

// ---- schedule

void set_ready(Thread& thread) {
  thread.at_barrier = false;
  here->ready[(here->ready_begin + here->ready_count++) % kMaxThreads] = thread.number;
}

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void check_time() {
  if (++switches % (1 << 20) != 0 || seconds_now() - launch_time < settings().seconds) return;
  fail("is still running after %g seconds: an endless loop?", settings().seconds);
}

// Runs the next thread that can run. Returns when `me` runs again.
void run_next(Thread& me) {
  Multiprocessor& mp = *here;
  check_time();
  if (mp.ready_count == 0) {
    if (mp.ended_count < thread_count) fail_deadlock();
    running = nullptr;
    switch_fiber(me.fiber, launching_code);
    return;
  }
  unsigned& first = mp.ready[mp.ready_begin];
  if (settings().seed != 0) {
    std::swap(first, mp.ready[(mp.ready_begin + random_below(mp.ready_count)) % kMaxThreads]);
  }
  Thread& next = mp.threads[first];
  mp.ready_begin = (mp.ready_begin + 1) % kMaxThreads;
  --mp.ready_count;
  if (&next == &me) return;
  running = &next;
  switch_fiber(me.fiber, next.fiber);
}

// Lets others run first, perhaps: with a seed only, so that any of those set free can be the first.
void maybe_yield(Thread& me) {
  if (settings().seed == 0) return;
  set_ready(me);
  run_next(me);
}

void end_thread(Thread& me) {
  Multiprocessor& mp = *here;
  if (mp.barrier.arrived > 0) {
    fail("divergent barrier: this thread ends while %u threads wait in %s at %s:%d", mp.barrier.arrived,
         mp.barrier.name, mp.barrier.site.file, mp.barrier.site.line);
  }
  Warp& warp = mp.warps[me.number / kWarp];
  const unsigned bit = 1u << me.number % kWarp;
  for (unsigned i = 0; i < warp.open_count; ++i) {
    const MeetingState& meeting = *warp.open[i];
    if (meeting.mask & bit) {
      fail("this thread ends while other lanes wait for it in %s(0x%08x) at %s:%d", meeting.name, meeting.mask,
           meeting.site.file, meeting.site.line);
    }
  }
  warp.ended |= bit;
  mp.last_ended = me.number;
  ++mp.ended_count;
}

// What every fiber runs: one thread of a block after the other.
void run_threads() {
  for (;;) {
    Thread& me = *running;
    acquire(here->between_blocks[here->block_turn]);
    the_launch->call(the_launch->arguments);
    release(here->between_blocks[here->block_turn ^ 1]);
    end_thread(me);
    run_next(me);
  }
}

// ---- blocks

char* place_array(Multiprocessor& mp, size_t bytes, size_t alignment) {
  // At a multiple of the alignment, and of no larger power of two, so that a lucky alignment does not hide an unlucky
  // one. AddressSanitizer wants 8 at least.
  const size_t step = std::max<size_t>(alignment, 8);
  size_t offset = mp.arena_used + kForbiddenZone;
  offset = (offset + 2 * step - 1) / (2 * step) * (2 * step) + step;
  if (offset + bytes + kForbiddenZone > kArenaBytes) fail("too many or too large arrays in shared memory");
  mp.arena_used = offset + bytes;
  char* const address = mp.arena + offset;
  allow_memory(address, bytes);
  // Not memset, which ThreadSanitizer would take for the kernel's.
  volatile char* const cells = address;
  for (size_t i = 0; i < bytes; ++i) cells[i] = static_cast<char>(settings().poison);
  mark_uninitialised(address, bytes);
  return address;
}

void begin_block(Multiprocessor& mp, uint3 block) {
  here = &mp;
  the_block = block;
  running = nullptr;

  forbid_memory(mp.arena, kArenaBytes);
  mp.arena_used = 0;
  mp.array_count = 0;
  mp.shared_bytes = the_launch->shared_bytes;
  mp.dynamic_array = place_array(mp, the_launch->shared_bytes, 16);

  mp.barrier = Barrier{};
  mp.ended_count = 0;
  mp.ready_begin = mp.ready_count = 0;
  for (unsigned first = 0; first < thread_count; first += kWarp) {
    const unsigned lanes = std::min(kWarp, thread_count - first);
    mp.warps[first / kWarp] = Warp{lanes == kWarp ? ~0u : (1u << lanes) - 1, 0, {}, 0};
  }
  const dim3 size = the_launch->block;
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& thread = mp.threads[i];
    thread.number = i;
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    set_ready(thread);
  }
}

void run_block(Multiprocessor& mp, uint3 block) {
  begin_block(mp, block);
  unsigned& first = mp.ready[0];
  if (settings().seed != 0) std::swap(first, mp.ready[random_below(thread_count)]);
  running = &mp.threads[first];
  mp.ready_begin = 1;
  --mp.ready_count;
  switch_fiber(launching_code, running->fiber);
  mp.block_turn ^= 1;
}

Multiprocessor& multiprocessor_with_fibers(unsigned number) {
  Multiprocessor*& mp = multiprocessors[number];
  if (mp == nullptr) {
    mp = new Multiprocessor;
    mp->arena = static_cast<char*>(aligned_alloc(4096, kArenaBytes));
    watch_initialisation(mp->arena, kArenaBytes);
    for (MeetingState& meeting : mp->meetings) {
      meeting.next_free = mp->free_meetings;
      mp->free_meetings = &meeting;
    }
  }
  for (; mp->fibers_made < thread_count; ++mp->fibers_made) {
    char name[64];
    snprintf(name, sizeof(name), "CUDA thread %u (multiprocessor %u)", mp->fibers_made, number);
    create_fiber(mp->threads[mp->fibers_made].fiber, run_threads, kStackBytes, name);
  }
  return *mp;
}

// ---- registry

std::set<std::string>& launched_kernels() {
  static std::set<std::string> names;
  return names;
}

// Returns the name as the registry keeps it.
const char* register_kernel(const char* text) {
  const auto [name, is_new] = launched_kernels().insert(plain_name(text));
  if (is_new && !settings().kernel_log.empty()) {
    if (FILE* log = fopen(settings().kernel_log.c_str(), "a")) {
      fprintf(log, "%s\n", name->c_str());
      fclose(log);
    }
  }
  return name->c_str();
}

std::map<const void*, size_t>& allowed_dynamic_bytes() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

// The sum of static and dynamic shared memory: 48 KB, or more where the kernel's attribute says so.
void check_shared_bytes(size_t bytes) {
  const auto allowed = allowed_dynamic_bytes().find(the_launch->kernel_function);
  const bool raised = allowed != allowed_dynamic_bytes().end() && the_launch->shared_bytes <= allowed->second;
  const size_t limit = raised ? kLargestSharedBytes : kDefaultSharedBytes;
  if (bytes > limit) fail("needs %zu bytes of shared memory, only %zu are allowed", bytes, limit);
}

void check_dimensions(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    fail("a block must have 1 to 1024 threads and at most 64 layers, got (%u, %u, %u)", block.x, block.y, block.z);
  }
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    fail("a grid must have 1 to 2147483647 by 65535 by 65535 blocks, got (%u, %u, %u)", grid.x, grid.y, grid.z);
  }
}

}  // namespace

void fail(const char* format, ...) {
  print_place();
  fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  abort();
}

void launch(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  sanitizer_at_death(print_place_at_death);

  the_launch = &launch;
  launch_time = seconds_now();
  running = nullptr;
  the_kernel = register_kernel(launch.kernel_text);
  check_dimensions(launch);
  check_shared_bytes(launch.shared_bytes);
  thread_count = launch.block.x * launch.block.y * launch.block.z;
  if (random_state == 0) random_state = settings().seed * 0x9e3779b97f4a7c15u + 1;

  const dim3 grid = launch.grid;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const unsigned sets = static_cast<unsigned>(std::min<uint64_t>(kFiberSets, blocks));
  adopt_running_code(launching_code);
  for (unsigned i = 0; i < sets; ++i) {
    Multiprocessor& mp = multiprocessor_with_fibers(i);
    release(mp.between_blocks[mp.block_turn]);
  }

  std::vector<uint64_t> order(settings().seed != 0 ? blocks : 0);
  std::iota(order.begin(), order.end(), uint64_t(0));
  for (uint64_t i = 0; i < blocks; ++i) {
    unsigned set = static_cast<unsigned>(i % sets);
    uint64_t block = i;
    if (settings().seed != 0) {
      std::swap(order[i], order[i + random_below(blocks - i)]);
      block = order[i];
      set = static_cast<unsigned>(random_below(sets));
    }
    const uint64_t row = block / grid.x;
    run_block(*multiprocessors[set], {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(row % grid.y),
                                      static_cast<unsigned>(row / grid.y)});
  }

  for (unsigned i = 0; i < sets; ++i) acquire(multiprocessors[i]->between_blocks[multiprocessors[i]->block_turn]);
  the_launch = nullptr;
}

void allow_dynamic_shared(const void* kernel_function, size_t bytes) {
  allowed_dynamic_bytes()[kernel_function] = bytes;
}

uint3 thread_index() { return running->index; }
uint3 block_index() { return the_block; }
uint3 block_dimensions() { return the_launch->block; }
uint3 grid_dimensions() { return the_launch->grid; }
unsigned lane_index() { return running->number % kWarp; }

void* shared_array(const SharedArray& array) {
  Multiprocessor& mp = *here;
  for (unsigned i = 0; i < mp.array_count; ++i) {
    if (mp.arrays[i].array == &array) return mp.arrays[i].address;
  }
  if (mp.array_count == kMaxSharedArrays) fail("more than %u arrays in shared memory", kMaxSharedArrays);
  mp.shared_bytes += array.bytes;
  check_shared_bytes(mp.shared_bytes);
  PlacedArray& placed = mp.arrays[mp.array_count++];
  placed = {&array, place_array(mp, array.bytes, array.alignment)};
  return placed.address;
}

void* dynamic_shared_array(size_t alignment) {
  if (alignment > 16) fail("dynamic shared memory is aligned to 16 bytes, this type needs %zu", alignment);
  return here->dynamic_array;
}

BarrierResult block_barrier(const char* name, int predicate, Site site) {
  Multiprocessor& mp = *here;
  Thread& me = *running;
  Barrier& barrier = mp.barrier;
  if (mp.ended_count > 0) {
    const uint3 other = mp.threads[mp.last_ended].index;
    fail("divergent barrier: this thread reaches %s at %s:%d, but thread (%u, %u, %u) has ended", name, site.file,
         site.line, other.x, other.y, other.z);
  }
  const unsigned turn = barrier.turn;
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.site = site;
    barrier.sum = {0, 1, 0};
    first_release(barrier.points[turn]);
  } else {
    if (!same(barrier.name, name) || !same(barrier.site, site)) {
      fail("divergent barrier: this thread reaches %s at %s:%d, but %u threads wait in %s at %s:%d", name, site.file,
           site.line, barrier.arrived, barrier.name, barrier.site.file, barrier.site.line);
    }
    release(barrier.points[turn]);
  }
  barrier.sum.any |= predicate != 0;
  barrier.sum.all &= predicate != 0;
  barrier.sum.count += predicate != 0;
  if (++barrier.arrived < thread_count) {
    me.at_barrier = true;
    run_next(me);
  } else {
    barrier.result = barrier.sum;
    barrier.arrived = 0;
    barrier.turn ^= 1;
    for (unsigned i = 0; i < thread_count; ++i) {
      if (mp.threads[i].at_barrier) set_ready(mp.threads[i]);
    }
    maybe_yield(me);
  }
  acquire(barrier.points[turn]);
  return barrier.result;
}

WarpMeeting::WarpMeeting(const char* name, unsigned mask, uint64_t value, Site site, bool orders_memory) {
  Multiprocessor& mp = *here;
  Thread& me = *running;
  Warp& warp = mp.warps[me.number / kWarp];
  const unsigned lane = me.number % kWarp, bit = 1u << lane;
  if (!(mask & bit)) fail("%s at %s:%d: lane %u is not in its own mask 0x%08x", name, site.file, site.line, lane, mask);
  if (const unsigned missing = mask & (warp.ended | ~warp.present)) {
    const unsigned other = static_cast<unsigned>(__builtin_ctz(missing));
    fail("%s at %s:%d: mask 0x%08x names lane %u, which %s", name, site.file, site.line, mask, other,
         warp.present >> other & 1 ? "has ended" : "the block does not have");
  }

  unsigned place = 0;
  while (place < warp.open_count && warp.open[place]->mask != mask) ++place;
  const bool is_first = place == warp.open_count;
  if (is_first) {
    MeetingState* const fresh = mp.free_meetings;
    mp.free_meetings = fresh->next_free;
    fresh->name = name;
    fresh->site = site;
    fresh->mask = mask;
    fresh->arrived = 0;
    fresh->not_left = static_cast<unsigned>(__builtin_popcount(mask));
    warp.open[warp.open_count++] = fresh;
  }
  MeetingState& meeting = *warp.open[place];
  if (!same(meeting.name, name) || !same(meeting.site, site)) {
    fail("mismatched collectives: lane %u calls %s at %s:%d, but lane %d waits in %s at %s:%d", lane, name, site.file,
         site.line, __builtin_ctz(meeting.arrived), meeting.name, meeting.site.file, meeting.site.line);
  }
  state_ = &meeting;
  meeting.values[lane] = value;
  meeting.arrived |= bit;
  if (orders_memory) is_first ? first_release(meeting.point) : release(meeting.point);

  if (meeting.arrived != mask) {
    run_next(me);
  } else {
    warp.open[place] = warp.open[--warp.open_count];
    Thread* const lanes = &mp.threads[me.number - lane];
    for (unsigned rest = mask & ~bit; rest != 0; rest &= rest - 1) set_ready(lanes[__builtin_ctz(rest)]);
    maybe_yield(me);
  }
  if (orders_memory) acquire(meeting.point);
}

WarpMeeting::~WarpMeeting() {
  if (--state_->not_left > 0) return;
  state_->next_free = here->free_meetings;
  here->free_meetings = state_;
}

uint64_t WarpMeeting::value_of(unsigned lane) const {
  const MeetingState& meeting = *state_;
  if (!(meeting.mask >> lane & 1)) {
    fail("%s at %s:%d reads lane %u, which is not in mask 0x%08x", meeting.name, meeting.site.file, meeting.site.line,
         lane, meeting.mask);
  }
  return meeting.values[lane];
}

void fail_uninitialised_read(const char* address) {
  for (unsigned i = 0; i < here->array_count; ++i) {
    const PlacedArray& placed = here->arrays[i];
    const size_t offset = static_cast<size_t>(address - placed.address);
    if (address < placed.address || offset >= placed.array->bytes) continue;
    fail("reads shared array '%s' at byte %zu, which nobody has written", placed.array->name, offset);
  }
  const long offset = address - here->dynamic_array;
  const bool dynamic = offset >= 0 && static_cast<size_t>(offset) < the_launch->shared_bytes;
  if (dynamic) fail("reads dynamic shared memory at byte %ld, which nobody has written", offset);
  fail("reads shared memory outside of every array");
}

void before_atomic(const void* address, size_t bytes) {
  check_initialised(address, bytes);
  if (settings().seed != 0 && running != nullptr && random_below(4) == 0) maybe_yield(*running);
}

// ---- streams

namespace {

struct PendingCopy {
  void* destination;
  std::vector<char> bytes;
};

std::vector<PendingCopy>& pending_copies() {
  static std::vector<PendingCopy> copies;
  return copies;
}

}  // namespace

void copy_to_host_later(void* destination, const void* source, size_t bytes) {
  const char* const begin = static_cast<const char*>(source);
  pending_copies().push_back({destination, std::vector<char>(begin, begin + bytes)});
  memset(destination, settings().poison, bytes);
}

void synchronize() {
  for (const PendingCopy& copy : pending_copies()) memcpy(copy.destination, copy.bytes.data(), copy.bytes.size());
  pending_copies().clear();
}

}  // namespace cuda_on_cpu

const char* detops_emulated_kernels() {
  static std::string text;
  text.clear();
  for (const std::string& name : cuda_on_cpu::launched_kernels()) text += name + "\n";
  return text.c_str();
}
