// bfloat16 as storage: the upper half of a float. It has conversions, no arithmetic.
//
// Functions are static, so that every object keeps its own copy, compiled for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TINYRES_ANYWHERE __host__ __device__
#else
#define TINYRES_ANYWHERE
#endif

namespace tinyres {

struct bf16 {
  std::uint16_t bits;
};

TINYRES_ANYWHERE static inline float to_float(bf16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounds to the nearest, ties to even; every NaN becomes 0x7fff, as the GPU's own conversion has it.
TINYRES_ANYWHERE static inline bf16 to_bf16(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

}  // namespace tinyres
