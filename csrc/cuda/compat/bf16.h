// Conversions by element type; those of bfloat16 itself: bf16.h of csrc.
#pragma once

#include "../../bf16.h"

namespace tinyres {

__host__ __device__ inline float to_float(float x) { return x; }

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
