// Warp collectives. All are one thing: each lane of a mask hands in a value; the last to come works out what every lane
// gets; each picks up its own. Values in and out lie apart, so that no second meeting is needed.
#pragma once

#include <type_traits>

#include "shared.h"

namespace tinyres::emulation {

// lanes: the warp's 32 threads. Only those of the mask may be touched.
using Combine = void (*)(Thread* lanes, u32 mask);

struct Site {
  const char *operation, *file;
  int line;
};

[[noreturn]] NO_TSAN inline void fail_diverged(const Site& here, const Thread& other, u32 mask) {
  fail(
      "warp diverged: in %s at %s:%d with mask 0x%08x, while thread (%u, %u, %u) waits in %s at %s:%d with mask 0x%08x",
      here.operation, here.file, here.line, mask, other.index.x, other.index.y, other.index.z, other.operation,
      other.file, other.line, other.mask);
}

NO_TSAN inline bool agrees(const Site& here, const Thread& other, u32 mask) {
  return other.mask == mask && other.line == here.line && same_text(other.operation, here.operation) &&
         same_text(other.file, here.file);
}

NO_TSAN inline bool all_agree(const Site& here, const Thread* lanes, u32 mask) {
  for (u32 rest = mask; rest; rest &= rest - 1) {
    if (!agrees(here, lanes[__builtin_ctz(rest)], mask)) return false;
  }
  return true;
}

// Shuffles and votes exchange values, but order no other memory; only __syncwarp does (`orders`).
NO_TSAN inline void meet(u32 mask, Site here, Combine combine, bool orders) {
  Engine& e = *engine;
  Thread& self = *e.current;
  const int w = e.number(&self) / 32, lane = e.number(&self) % 32;
  Thread* lanes = e.all + w * 32;
  Warp& warp = e.warp[w];
  if (!(mask >> lane & 1))
    fail("%s at %s:%d by lane %d, not in mask 0x%08x", here.operation, here.file, here.line, lane, mask);
  if (mask & ~warp.exists)
    fail("%s at %s:%d with mask 0x%08x, but the block's last warp has lanes 0x%08x only", here.operation, here.file,
         here.line, mask, warp.exists);
  self.operation = here.operation;
  self.file = here.file;
  self.line = here.line;
  self.mask = mask;
  // A lane that waits with a mask without this one may be on its way here; a lane that waits for this one is not.
  const u32 others = warp.waiting & mask;
  if (others) {
    const Thread& other = lanes[__builtin_ctz(others)];
    if (!agrees(here, other, mask) && other.mask >> lane & 1) fail_diverged(here, other, mask);
  }
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) == mask && all_agree(here, lanes, mask)) {
    if (combine) combine(lanes, mask);
    warp.waiting &= ~mask;
#ifdef TINYRES_TSAN
    void* token = &e.tokens->warp[w][__builtin_ctz(mask)];
    if (orders) e.for_threads(w, mask, tsan_release, token);
    if (orders) e.for_threads(w, mask, tsan_acquire, token);
    tsan_enter(self.fiber->tsan);
#else
    (void)orders;
#endif
    e.set_ready(w, mask);
  } else {
    e.clear_ready(&self);
  }
  e.yield();
}

// A value of at most 48 bytes goes in, one of at most 16 comes out.
template <class Out, class In>
NO_TSAN inline Out exchange(u32 mask, Site here, const In& in, Combine combine) {
  static_assert(sizeof(In) <= sizeof(Thread::in) && sizeof(Out) <= sizeof(Thread::out), "slots of a thread");
  Thread& self = *engine->current;
  __builtin_memcpy(self.in, &in, sizeof in);
  meet(mask, here, combine, false);
  Out out;
  __builtin_memcpy(&out, self.out, sizeof out);
  return out;
}

// ---- shuffles -----------------------------------------------------------------------------------------------------

struct Shuffle {
  u64 value;
  int source;
};

NO_TSAN inline void combine_shuffle(Thread* lanes, u32 mask) {
  for (u32 rest = mask; rest; rest &= rest - 1) {
    Thread& t = lanes[__builtin_ctz(rest)];
    const Shuffle* mine = reinterpret_cast<const Shuffle*>(t.in);
    if (!(mask >> mine->source & 1))
      fail("%s at %s:%d: lane %d reads from lane %d, not in mask 0x%08x", t.operation, t.file, t.line,
           __builtin_ctz(rest), mine->source, mask);
    *reinterpret_cast<u64*>(t.out) = reinterpret_cast<const Shuffle*>(lanes[mine->source].in)->value;
  }
}

// source: the lane to read within this lane's segment of `width` lanes; the own lane where that lies outside.
template <class T>
NO_TSAN inline T shuffle(u32 mask, T value, int source, int width, Site here) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles words of 4 or 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s at %s:%d: width must be a power of two up to 32; got %d", here.operation, here.file, here.line, width);
  const int lane = engine->number(engine->current) % 32, segment = lane & ~(width - 1);
  Shuffle in{0, source < segment || source >= segment + width ? lane : source};
  __builtin_memcpy(&in.value, &value, sizeof value);
  return exchange<T>(mask, here, in, combine_shuffle);
}

NO_TSAN inline int lane_number() { return engine->number(engine->current) % 32; }

// ---- votes --------------------------------------------------------------------------------------------------------

NO_TSAN inline void combine_ballot(Thread* lanes, u32 mask) {
  u32 votes = 0;
  for (u32 rest = mask; rest; rest &= rest - 1) {
    if (*reinterpret_cast<const u32*>(lanes[__builtin_ctz(rest)].in)) votes |= rest & -rest;
  }
  for (u32 rest = mask; rest; rest &= rest - 1) *reinterpret_cast<u32*>(lanes[__builtin_ctz(rest)].out) = votes;
}

}  // namespace tinyres::emulation

#define TINYRES_HERE \
  tinyres::emulation::Site { __func__, file, line }

NO_TSAN inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  tinyres::emulation::meet(mask, TINYRES_HERE, nullptr, true);
}

template <class T>
NO_TSAN inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
  const int segment = tinyres::emulation::lane_number() & ~(width - 1);
  return tinyres::emulation::shuffle(mask, value, segment + (source & (width - 1)), width, TINYRES_HERE);
}
template <class T>
NO_TSAN inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return tinyres::emulation::shuffle(mask, value, tinyres::emulation::lane_number() - int(delta), width, TINYRES_HERE);
}
template <class T>
NO_TSAN inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return tinyres::emulation::shuffle(mask, value, tinyres::emulation::lane_number() + int(delta), width, TINYRES_HERE);
}
template <class T>
NO_TSAN inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, const char* file = __builtin_FILE(),
                                 int line = __builtin_LINE()) {
  return tinyres::emulation::shuffle(mask, value, tinyres::emulation::lane_number() ^ bits, width, TINYRES_HERE);
}

NO_TSAN inline unsigned __ballot_sync(unsigned mask, int vote, const char* file = __builtin_FILE(),
                                      int line = __builtin_LINE()) {
  return tinyres::emulation::exchange<unsigned>(mask, TINYRES_HERE, unsigned(vote != 0),
                                                tinyres::emulation::combine_ballot);
}
NO_TSAN inline int __any_sync(unsigned mask, int vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return tinyres::emulation::exchange<unsigned>(mask, TINYRES_HERE, unsigned(vote != 0),
                                                tinyres::emulation::combine_ballot) != 0;
}
NO_TSAN inline int __all_sync(unsigned mask, int vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return tinyres::emulation::exchange<unsigned>(mask, TINYRES_HERE, unsigned(vote != 0),
                                                tinyres::emulation::combine_ballot) == mask;
}
#undef TINYRES_HERE
