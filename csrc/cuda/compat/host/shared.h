// Shared memory: a heap block for every array of every CUDA block, filled with NaN. So AddressSanitizer guards its
// ends, ThreadSanitizer knows no older history of it, and what is read before it is written shows in the result.
#pragma once

#include "launch.h"

namespace tinyres {
namespace emulation {

// An array is allocated in the name of the launcher: on behalf of one thread, ThreadSanitizer would take its allocation
// for a write that the others do not know of.
NO_TSAN inline char* allocate_shared(std::size_t bytes, void* token) {
#ifdef TINYRES_TSAN
  tsan_enter(engine->launcher.tsan);
#endif
  char* memory = static_cast<char*>(std::malloc(bytes));
  if (memory) std::memset(memory, 0xff, bytes);
#ifdef TINYRES_TSAN
  tsan_release(token);
  tsan_enter(engine->current->fiber->tsan);
#else
  (void)token;
#endif
  if (!memory) fail("no memory left for shared arrays");
  return memory;
}

NO_TSAN inline void* array_token(int i) {
#ifdef TINYRES_TSAN
  return &engine->tokens->array[i];
#else
  (void)i;
  return nullptr;
#endif
}

NO_TSAN inline void* static_array(const void* site, const char* name, std::size_t bytes) {
  Engine& e = *engine;
  int i = 0;
  while (i < e.static_count && e.statics[i].site != site) i++;
  if (i == e.static_count) {
    if (i == MAX_ARRAYS) fail("more than %d shared arrays", MAX_ARRAYS);
    e.static_bytes += (bytes + 15) / 16 * 16;
    if (e.static_bytes > MAX_STATIC_SMEM)
      fail("shared array %s (%zu bytes) makes %zu bytes of static shared memory; at most %zu", name, bytes,
           e.static_bytes, MAX_STATIC_SMEM);
    if (e.static_bytes + e.dynamic_bytes > MAX_SMEM)
      fail("%zu bytes of static and %zu of dynamic shared memory; at most %zu together", e.static_bytes,
           e.dynamic_bytes, MAX_SMEM);
    e.statics[i] = {site, name, allocate_shared(bytes, array_token(i)), bytes, 1};
    e.static_count++;
  }
  tsan_acquire(array_token(i));
  return e.statics[i].memory;
}

NO_TSAN inline void* dynamic_array(int i, long long n, std::size_t item) {
  Engine& e = *engine;
  const std::size_t bytes = std::size_t(n) * item;
  if (n <= 0) fail("SmemArena::take of %lld elements", n);
  if (i < e.dynamic_count) {
    const SharedArray& first = e.dynamics[i];
    if (first.bytes != bytes || first.item != item)
      fail("SmemArena::take number %d of %zu bytes (%zu an element), but another thread took %zu (%zu)", i + 1, bytes,
           item, first.bytes, first.item);
  } else {
    if (i == MAX_ARRAYS) fail("more than %d arrays from the arena", MAX_ARRAYS);
    if (e.taken_bytes + bytes > e.dynamic_bytes)
      fail("SmemArena::take of %zu bytes after %zu; the launch gives %zu", bytes, e.taken_bytes, e.dynamic_bytes);
    e.taken_bytes += (bytes + 15) / 16 * 16;
    e.dynamics[i] = {nullptr, nullptr, allocate_shared(bytes, array_token(MAX_ARRAYS + i)), bytes, item};
    e.dynamic_count++;
  }
  tsan_acquire(array_token(MAX_ARRAYS + i));
  return e.dynamics[i].memory;
}

NO_TSAN inline bool is_shared(const void* p, std::size_t bytes) {
  const Engine& e = *engine;
  const char* at = static_cast<const char*>(p);
  for (int i = 0; i < e.static_count + e.dynamic_count; i++) {
    const SharedArray& a = i < e.static_count ? e.statics[i] : e.dynamics[i - e.static_count];
    if (at >= a.memory && at + bytes <= a.memory + a.bytes) return true;
  }
  return false;
}

}  // namespace emulation

// The tag is not const, so that no two are merged: its address tells declarations apart.
#define SHARED(name, ...)                                     \
  static char name##_declaration = 0;                         \
  auto& name = *static_cast<std::add_pointer_t<__VA_ARGS__>>( \
      ::tinyres::emulation::static_array(&name##_declaration, #name, sizeof(__VA_ARGS__)))

// Every thread takes the same arrays in the same order, once.
class SmemArena {
 public:
  template <class T>
  T* take(int n) {
    return static_cast<T*>(emulation::dynamic_array(taken_++, n, sizeof(T)));
  }

 private:
  int taken_ = 0;
};

}  // namespace tinyres
