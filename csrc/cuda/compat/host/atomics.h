// Atomics and fences. They are real ones, so that ThreadSanitizer takes them for what they are; like CUDA's they are
// relaxed and order nothing.
#pragma once

#include <type_traits>

#include "scheduler.h"

namespace tinyres::emulation {

template <class T, class... Others>
constexpr bool is_one_of = (std::is_same_v<T, Others> || ...);

template <class T>
using Value = std::common_type_t<T>;  // T, but not to be deduced from this argument

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class T, class F>
inline T atomic_update(T* p, F update) {
  using Bits = std::conditional_t<sizeof(T) == 4, u32, u64>;
  Bits* bits = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, bits_as<Bits>(update(bits_as<T>(old))), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return bits_as<T>(old);
}

#ifdef TINYRES_TSAN
inline u64 fence_token = 0;
#endif

}  // namespace tinyres::emulation

// The value takes the type of the address, as it does in CUDA's overloads.
template <class T>
inline T atomicAdd(T* p, tinyres::emulation::Value<T> value) {
  using namespace tinyres::emulation;
  static_assert(is_one_of<T, int, unsigned, unsigned long long, float, double>);
  if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  return atomic_update(p, [=](T old) { return T(old + value); });
}
template <class T>
inline T atomicMax(T* p, tinyres::emulation::Value<T> value) {
  using namespace tinyres::emulation;
  static_assert(is_one_of<T, int, unsigned, unsigned long long>);
  return atomic_update(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* p, tinyres::emulation::Value<T> value) {
  using namespace tinyres::emulation;
  static_assert(is_one_of<T, int, unsigned, unsigned long long>);
  return atomic_update(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicExch(T* p, tinyres::emulation::Value<T> value) {
  using namespace tinyres::emulation;
  static_assert(is_one_of<T, int, unsigned, unsigned long long, float>);
  return atomic_update(p, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* p, tinyres::emulation::Value<T> expected, tinyres::emulation::Value<T> value) {
  using namespace tinyres::emulation;
  static_assert(is_one_of<T, int, unsigned, unsigned long long>);
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// Everything before it in this thread is seen by whoever has passed a fence later.
NO_TSAN inline void __threadfence() {
#ifdef TINYRES_TSAN
  tinyres::emulation::tsan_release(&tinyres::emulation::fence_token);
  tinyres::emulation::tsan_acquire(&tinyres::emulation::fence_token);
#endif
}
