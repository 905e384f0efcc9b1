// The threads of one block and who runs next. A thread runs until it waits, then changes straight to the best thread
// that can run: always the same order of preference within a block, because that keeps threads as far apart as the
// barriers allow, which is what shows a missing one.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "fiber.h"

namespace tinyres::emulation {

constexpr int MAX_THREADS = 1024, MAX_WARPS = 32, MAX_ARRAYS = 64, MAX_COPIES = 128;

struct Copy {
  void* dst;
  const void* src;
  unsigned bytes, group;
  bool valid;
};

struct Thread {
  alignas(16) unsigned char in[48], out[16];  // what the thread gives to a warp collective, what it gets back
  Fiber* fiber;                               // null until it starts
  uint3 index;
  bool returned;
  const char *operation, *file;  // where it waits
  int line;
  u32 mask;
  int copies, arrived;  // asynchronous copies begun and finished
  unsigned groups;      // of copies, committed
};

struct Warp {
  u32 exists, waiting;  // lanes: part of the block; in a collective
};

// One block's shared array: static ones are known by the address of their declaration, dynamic ones by their number.
struct SharedArray {
  const void* site;
  const char* name;
  char* memory;
  std::size_t bytes, item;
};

// What ThreadSanitizer hangs CUDA's order on. New for each block, or old barriers would order new blocks.
struct Tokens {
  u64 barrier, done;
  u64 warp[MAX_WARPS][32];  // by the lowest lane of the mask, to which all earlier uses are known
  u64 array[2 * MAX_ARRAYS];
};

struct Schedule {
  enum Kind { forward, reverse, random } kind = forward;
  u64 seed = 0;
};

// The strings that name call sites are equal by address within a source file, but perhaps not between two.
NO_TSAN inline bool same_text(const char* a, const char* b) {
  if (a == b) return true;
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

NO_TSAN inline u64 next_random(u64& state) {  // splitmix64
  u64 z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// The emulated machine of one OS thread. It keeps its stacks from launch to launch.
struct Engine {
  // The launch.
  const char* op = nullptr;
  int threads = 0, warps = 0;
  std::size_t dynamic_bytes = 0;
  void (*body)(void*) = nullptr;
  void* call = nullptr;
  Schedule schedule;

  // The block. Masks of who can run are kept in order of preference: bit i of warps_ready is warp warp_at[i], and bit j
  // of ready[i] is its lane lane_at[j].
  Thread* all = nullptr;
  Copy* rings = nullptr;  // MAX_COPIES for each thread
  Warp warp[MAX_WARPS];
  Thread* current = nullptr;
  u32 warps_ready = 0, ready[MAX_WARPS], startable[MAX_WARPS];
  unsigned char warp_at[MAX_WARPS], warp_position[MAX_WARPS], lane_at[32], lane_position[32];
  int returned = 0;
  int at_barrier = 0;  // threads that wait there; the last to come was barrier_thread
  Thread* barrier_thread = nullptr;
  SharedArray statics[MAX_ARRAYS], dynamics[MAX_ARRAYS];
  int static_count = 0, dynamic_count = 0;
  std::size_t static_bytes = 0, taken_bytes = 0;
  bool failed = false;
  char failure[1024];

  // Stacks. ThreadSanitizer takes a fibre for a thread, so there each thread keeps its own; two sets in turn, or the
  // threads of a block would come after their namesakes in the block before.
  Fiber launcher;
  Fiber fibers[2][MAX_THREADS];
  Fiber* idle[MAX_THREADS];
  int idle_count = 0, mapped = 0;
  unsigned turn = 0;
  Tokens* tokens = nullptr;
  u64 start = 0, finish = 0;  // tokens: the launcher before all blocks, all blocks before the launcher
  void* reaper = nullptr;     // the ThreadSanitizer fibre that comes after a block, which the launcher must not

  Engine() {
    all = new Thread[MAX_THREADS]();
    rings = static_cast<Copy*>(std::malloc(MAX_THREADS * MAX_COPIES * sizeof(Copy)));
    if (!rings) std::abort();
  }
  Engine(const Engine&) = delete;
  ~Engine() {
    for (auto& set : fibers) {
      for (Fiber& fiber : set) {
#ifdef TINYRES_TSAN
        if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
#endif
        unmap_stack(fiber);
      }
    }
#ifdef TINYRES_TSAN
    if (reaper) __tsan_destroy_fiber(reaper);
#endif
    std::free(rings);
    delete[] all;
  }

  NO_TSAN int number(const Thread* t) const { return int(t - all); }

  // ---- who runs ----

  NO_TSAN Thread* best() {
    if (!warps_ready) return nullptr;
    const int w = __builtin_ctz(warps_ready);
    return all + warp_at[w] * 32 + lane_at[__builtin_ctz(ready[w])];
  }

  NO_TSAN void clear_ready(const Thread* t) {
    const int w = warp_position[number(t) / 32];
    ready[w] &= ~(1u << lane_position[number(t) % 32]);
    if (!ready[w]) warps_ready &= ~(1u << w);
  }

  NO_TSAN void set_ready(int of_warp, u32 lanes) {
    const int w = warp_position[of_warp];
    if (lanes == warp[of_warp].exists) {
      ready[w] = startable[w];
    } else {
      for (; lanes; lanes &= lanes - 1) ready[w] |= 1u << lane_position[__builtin_ctz(lanes)];
    }
    warps_ready |= 1u << w;
  }

  NO_TSAN void make_current(Thread* t) {
    current = t;
    threadIdx = t->index;
  }

#ifdef TINYRES_TSAN
  // In the name of each of these threads, which all wait. A meeting is put in order at once by the last to come: were
  // each to acquire only as it leaves, it would learn of what others did after it.
  NO_TSAN void for_threads(int of_warp, u32 lanes, void (*step)(void*), void* token) {
    for (; lanes; lanes &= lanes - 1) {
      tsan_enter(all[of_warp * 32 + __builtin_ctz(lanes)].fiber->tsan);
      step(token);
    }
  }
#endif

  // Lets the best thread run, which may be the current one; returns when that is chosen again.
  NO_TSAN void yield() {
    Thread* self = current;
    Thread* next = best();
    if (next == self) return;
    if (next && !next->fiber) next->fiber = fiber_for(next);
    if (next) make_current(next);
    switch_fiber(*self->fiber, next ? *next->fiber : launcher, launcher);
  }

  NO_TSAN Fiber* fiber_for(Thread* t) {
#ifdef TINYRES_TSAN
    return &fibers[turn % 2][number(t)];
#else
    (void)t;
    if (idle_count) return idle[--idle_count];
    Fiber* fiber = &fibers[0][mapped];
    map_stack(*fiber);
    start_at(*fiber, run_threads, mapped++);
    return fiber;
#endif
  }

  // What every fibre executes: a thread, then the next that has not started yet, on the same stack.
  static void run_threads();

  // ---- a block ----

  NO_TSAN void shuffle_order(unsigned char* at, unsigned char* position, int n, u64& state) {
    for (int i = 0; i < n; i++) at[i] = static_cast<unsigned char>(schedule.kind == Schedule::reverse ? n - 1 - i : i);
    for (int i = n - 1; i > 0 && schedule.kind == Schedule::random; i--) {
      const int j = int(next_random(state) % unsigned(i + 1));
      const unsigned char kept = at[i];
      at[i] = at[j];
      at[j] = kept;
    }
    for (int i = 0; i < n; i++) position[at[i]] = static_cast<unsigned char>(i);
  }

  NO_TSAN void prepare_block(u64 block) {
    u64 state = schedule.seed ^ (block + 1) * 0xd1342543de82ef95u;
    shuffle_order(warp_at, warp_position, warps, state);
    shuffle_order(lane_at, lane_position, 32, state);
    for (int w = 0; w < warps; w++) {
      const int lanes = threads - w * 32 < 32 ? threads - w * 32 : 32;
      const int p = warp_position[w];
      warp[w].exists = lanes == 32 ? ~0u : (1u << lanes) - 1;
      warp[w].waiting = 0;
      startable[p] = ready[p] = 0;
      for (int lane = 0; lane < lanes; lane++) startable[p] |= 1u << lane_position[lane];
      ready[p] = startable[p];
    }
    warps_ready = warps == 32 ? ~0u : (1u << warps) - 1;
    for (int i = 0; i < threads; i++) {
      Thread& t = all[i];
      t.fiber = nullptr;
      t.returned = false;
      t.operation = nullptr;
      t.copies = t.arrived = 0;
      t.groups = 0;
    }
    returned = at_barrier = 0;
    static_count = dynamic_count = 0;
    static_bytes = taken_bytes = 0;
    failed = false;
#ifdef TINYRES_TSAN
    turn++;
    tokens = static_cast<Tokens*>(std::malloc(sizeof(Tokens)));
    if (!tokens) throw std::bad_alloc();
#endif
  }

  // True if every thread returned.
  NO_TSAN bool run_block(u64 block) {
    blockIdx = uint3{unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                     unsigned(block / gridDim.x / gridDim.y)};
    prepare_block(block);
    Thread* first = best();
    first->fiber = fiber_for(first);
    make_current(first);
    switch_fiber(launcher, *first->fiber, launcher);
    const bool done = !failed && returned == threads;
    if (!done) abandon();
#ifdef TINYRES_TSAN
    tsan_release(&tokens->done);  // the launcher allocated what is freed here
    tsan_enter(reaper);
    tsan_acquire(&tokens->done);
#endif
    for (int i = 0; i < static_count; i++) std::free(statics[i].memory);
    for (int i = 0; i < dynamic_count; i++) std::free(dynamics[i].memory);
#ifdef TINYRES_TSAN
    std::free(tokens);
    tsan_enter(launcher.tsan);
#endif
    return done;
  }

  // Gives up the stacks of all threads that have not returned.
  NO_TSAN void abandon() {
    for (int i = 0; i < threads; i++) {
      Fiber* fiber = all[i].fiber;
      if (all[i].returned || !fiber) continue;
#ifdef TINYRES_TSAN
      tsan_enter(fiber->tsan);
      tsan_release(&tokens->done);
      tsan_release(&finish);
      tsan_enter(launcher.tsan);
      __tsan_destroy_fiber(fiber->tsan);
      fiber->tsan = __tsan_create_fiber(0);
#else
      idle[idle_count++] = fiber;
#endif
      start_at(*fiber, run_threads, i);
    }
  }

  // ThreadSanitizer's fibres inherit the history of their creator, which therefore is the launcher.
  NO_TSAN void prepare_sanitizer() {
    launcher.stack = nullptr;
#ifdef TINYRES_TSAN
    launcher.tsan = __tsan_get_current_fiber();
    if (!reaper) reaper = __tsan_create_fiber(0);
    for (; mapped < threads; mapped++) {
      for (auto& set : fibers) {
        map_stack(set[mapped]);
        set[mapped].tsan = __tsan_create_fiber(0);
        start_at(set[mapped], run_threads, mapped);
      }
    }
    tsan_release(&start);
#endif
  }

  // ---- why a block did not come to its end ----

  std::string reason() const {
    if (failed) return thread_name(*current) + ": " + failure;
    std::string text = "no thread can go on:";
    for (int i = 0, next, runs = 0; i < threads; i = next) {
      if (++runs > 16) return text + ", ...";
      const Thread& t = all[i];
      for (next = i + 1; next < threads; next++) {
        const Thread& o = all[next];
        if (o.returned != t.returned || (!t.returned && (o.line != t.line || o.operation != t.operation))) break;
      }
      text += i ? ", thread" : " thread";
      text += next - i > 1 ? "s " + std::to_string(i) + ".." + std::to_string(next - 1) : " " + std::to_string(i);
      text +=
          t.returned ? " returned" : std::string(" in ") + t.operation + " at " + t.file + ":" + std::to_string(t.line);
    }
    return text;
  }

  static std::string thread_name(const Thread& t) {
    return "thread (" + std::to_string(t.index.x) + ", " + std::to_string(t.index.y) + ", " +
           std::to_string(t.index.z) + ")";
  }
};

inline thread_local Engine* engine = nullptr;  // while a launch is in progress on this OS thread

// Ends the launch with this message. The thread's stack is given up, without destructors.
[[noreturn]] __attribute__((format(printf, 1, 2))) NO_TSAN inline void fail(const char* format, ...) {
  Engine& e = *engine;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(e.failure, sizeof e.failure, format, arguments);
  va_end(arguments);
  e.failed = true;
  switch_fiber(*e.current->fiber, e.launcher, e.launcher);
  std::abort();
}

NO_TSAN inline void Engine::run_threads() {
  Engine& e = *engine;
  Fiber& fiber = *e.current->fiber;
  arrived(fiber, e.launcher);
  for (;;) {
    tsan_acquire(&e.start);
    e.body(e.call);
    Thread* self = e.current;
    if (self->copies != self->arrived)
      fail("returned with %d asynchronous copies never waited for", self->copies - self->arrived);
#ifdef TINYRES_TSAN
    tsan_release(&e.tokens->done);
    tsan_release(&e.finish);
#endif
    self->returned = true;
    e.returned++;
    e.clear_ready(self);
    Thread* next = e.best();
    if (next) e.make_current(next);
#ifndef TINYRES_TSAN
    if (next && !next->fiber) {
      next->fiber = &fiber;
      continue;
    }
    e.idle[e.idle_count++] = &fiber;
#else
    if (next && !next->fiber) next->fiber = e.fiber_for(next);
#endif
    switch_fiber(fiber, next ? *next->fiber : e.launcher, e.launcher);
  }
}

NO_TSAN inline void sync_threads(const char* file, int line) {
  Engine& e = *engine;
  Thread& self = *e.current;
  if (e.at_barrier) {
    const Thread& other = *e.barrier_thread;
    if (other.line != line || !same_text(other.file, file))
      fail("__syncthreads at %s:%d, but thread (%u, %u, %u) waits in the one at %s:%d", file, line, other.index.x,
           other.index.y, other.index.z, other.file, other.line);
  }
  self.operation = "__syncthreads";
  self.file = file;
  self.line = line;
  e.barrier_thread = &self;
  if (++e.at_barrier == e.threads) {
    e.at_barrier = 0;
#ifdef TINYRES_TSAN
    for (int w = 0; w < e.warps; w++) e.for_threads(w, e.warp[w].exists, tsan_release, &e.tokens->barrier);
    for (int w = 0; w < e.warps; w++) e.for_threads(w, e.warp[w].exists, tsan_acquire, &e.tokens->barrier);
    tsan_enter(self.fiber->tsan);
#endif
    for (int w = 0; w < e.warps; w++) e.set_ready(w, e.warp[w].exists);
  } else {
    e.clear_ready(&self);
  }
  e.yield();
}

}  // namespace tinyres::emulation

// All threads of a block must meet here, at one line of the source.
NO_TSAN inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  tinyres::emulation::sync_threads(file, line);
}
