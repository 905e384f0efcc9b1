// Conversions of bfloat16.
#pragma once

#include <cstring>

#include "../../bf16.h"

namespace tinyres {

__host__ __device__ inline float to_float(float x) { return x; }

__host__ __device__ inline float to_float(bf16 x) {
  const u32 bits = u32(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounds to the nearest, ties to even; every NaN becomes 0x7fff, as the GPU's own conversion has it.
__host__ __device__ inline bf16 to_bf16(float x) {
  u32 bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

template <class T>
__host__ __device__ T from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ inline bf16 from_float<bf16>(float x) {
#ifdef __CUDA_ARCH__
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return to_bf16(x);
#endif
}

}  // namespace tinyres
