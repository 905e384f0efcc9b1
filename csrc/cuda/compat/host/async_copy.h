// Asynchronous copies. The bytes arrive as late as the hardware may let them, at the wait that covers their group; what
// they replace is gone as early as it may be, at the issue: NaN, and to AddressSanitizer forbidden ground until the
// wait.
#pragma once

#include "shared.h"

namespace tinyres {
namespace emulation {

NO_TSAN inline Copy& ring_entry(const Thread& t, int i) {
  return engine->rings[engine->number(&t) * MAX_COPIES + i % MAX_COPIES];
}

NO_TSAN inline void queue_copy(const Copy& copy, const char* operation, const char* file, int line) {
  Thread& self = *engine->current;
  if (reinterpret_cast<std::uintptr_t>(copy.dst) % copy.bytes ||
      reinterpret_cast<std::uintptr_t>(copy.src) % copy.bytes)
    fail("%s at %s:%d: both addresses must be multiples of %u; got %p, %p", operation, file, line, copy.bytes, copy.dst,
         copy.src);
  if (!is_shared(copy.dst, copy.bytes))
    fail("%s at %s:%d: the destination must lie in one array of SHARED or SmemArena", operation, file, line);
  if (self.copies - self.arrived == MAX_COPIES)
    fail("%s at %s:%d: more than %d copies of one thread on their way", operation, file, line, MAX_COPIES);
  Copy& queued = ring_entry(self, self.copies++);
  queued = copy;
  queued.group = self.groups;
}

// The next copy to finish so that at most `keep` committed groups are on their way.
NO_TSAN inline bool next_arrival(Copy* copy, unsigned keep) {
  Thread& self = *engine->current;
  if (self.arrived == self.copies) return false;
  *copy = ring_entry(self, self.arrived);
  if (copy->group + keep >= self.groups) return false;
  self.arrived++;
  return true;
}

// Both the early end of the old bytes and the late arrival of the new are writes by this thread, and race with whoever
// reads without a barrier between.
inline void begin_copy(void* dst, const void* src, unsigned bytes, bool valid, const char* operation, const char* file,
                       int line) {
  queue_copy(Copy{dst, src, bytes, 0, valid}, operation, file, line);
  kernel_writes(dst, bytes);
  for (unsigned i = 0; i < bytes / 4; i++) static_cast<u32*>(dst)[i] = ~0u;
#ifdef TINYRES_ASAN
  ASAN_POISON_MEMORY_REGION(dst, bytes);
#endif
}

inline void finish_copies(unsigned keep) {
  for (Copy copy; next_arrival(&copy, keep);) {
#ifdef TINYRES_ASAN
    ASAN_UNPOISON_MEMORY_REGION(copy.dst, copy.bytes);
#endif
    if (copy.valid) kernel_reads(copy.src, copy.bytes);
    kernel_writes(copy.dst, copy.bytes);
    for (unsigned i = 0; i < copy.bytes / 4; i++)
      static_cast<u32*>(copy.dst)[i] = copy.valid ? static_cast<const u32*>(copy.src)[i] : 0;
  }
}

}  // namespace emulation

inline void cp_async16(void* dst, const void* src, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::begin_copy(dst, src, 16, true, __func__, file, line);
}
// Zeros instead where src is not valid; nothing is then read.
inline void cp_async16_zfill(void* dst, const void* src, bool valid, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
  emulation::begin_copy(dst, src, 16, valid, __func__, file, line);
}
inline void cp_async4(void* dst, const void* src, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::begin_copy(dst, src, 4, true, __func__, file, line);
}
inline void cp_async4_zfill(void* dst, const void* src, bool valid, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  emulation::begin_copy(dst, src, 4, valid, __func__, file, line);
}
NO_TSAN inline void cp_async_commit() { emulation::engine->current->groups++; }
template <int N>  // until at most the N youngest groups of this thread are on their way
inline void cp_async_wait() {
  emulation::finish_copies(N);
}

}  // namespace tinyres
