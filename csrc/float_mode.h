// The floating-point mode of a thread: how it rounds, and whether it takes denormal numbers for zero. Other libraries
// change it (torch.set_flush_denormal, anything built with -ffast-math as it is loaded), each for some threads only; a
// kernel whose chunks fall to one thread or another would then give different bits from run to run.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

#include <cstdint>

namespace tinyres {
namespace {

// Rounding to nearest, with denormal numbers and no traps, for the life of the object. The pool's threads are made by
// one that holds such an object, and inherit its mode.
class StandardFloats {
 public:
  StandardFloats() : before_(mode()) { set_mode(STANDARD); }
  ~StandardFloats() { set_mode(before_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
#if defined(__x86_64__) || defined(__i386__)
  using Mode = unsigned;
  static constexpr Mode STANDARD = 0x1F80;  // all exceptions masked
  static Mode mode() { return _mm_getcsr(); }
  static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = std::uint64_t;
  static constexpr Mode STANDARD = 0;
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = int;
  static constexpr Mode STANDARD = 0;
  static Mode mode() { return STANDARD; }
  static void set_mode(Mode) {}
#endif

  const Mode before_;
};

}  // namespace
}  // namespace tinyres
