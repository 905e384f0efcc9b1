// ldmatrix and mma.sync, with the fragment layouts of the PTX ISA: lane = 4 * group + pair, group 0..7 and pair 0..3.
#pragma once

#include "warp.h"

namespace tinyres {
namespace emulation {

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

struct Row {
  std::uint16_t element[8];
};
template <int N>
struct Registers {
  u32 r[N];
};

template <int N, bool TRANSPOSED>
NO_TSAN inline void combine_ldmatrix(Thread* lanes, u32) {
  for (int lane = 0; lane < 32; lane++) {
    Registers<N>* d = reinterpret_cast<Registers<N>*>(lanes[lane].out);
    for (int matrix = 0; matrix < N; matrix++) {
      u32 half[2];
      for (int i = 0; i < 2; i++) {
        const int major = lane / 4, minor = lane % 4 * 2 + i;
        const int row = TRANSPOSED ? minor : major, column = TRANSPOSED ? major : minor;
        half[i] = reinterpret_cast<const Row*>(lanes[matrix * 8 + row].in)->element[column];
      }
      d->r[matrix] = half[0] | half[1] << 16;
    }
  }
}

NO_TSAN inline void check_row(const void* row, const Site& here) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 || !is_shared(row, 16))
    fail("%s at %s:%d: a row must be 16 bytes, aligned, of one shared array; got %p", here.operation, here.file,
         here.line, row);
}

// The row is read here, by the lane that names it and under the sanitizers' eyes.
template <int N, bool TRANSPOSED>
inline void ldmatrix(u32 (&d)[N], const void* row, Site here) {
  Row mine = {};
  if (lane_number() < 8 * N) {
    check_row(row, here);
    kernel_reads(row, sizeof mine);
    __builtin_memcpy(&mine, row, sizeof mine);
  }
  const auto out = exchange<Registers<N>>(~0u, here, mine, combine_ldmatrix<N, TRANSPOSED>);
  for (int i = 0; i < N; i++) d[i] = out.r[i];
}

// ---- mma ----------------------------------------------------------------------------------------------------------

struct Fragments {
  u32 a[4], b[2];
  float d[4];
};
struct Accumulators {
  float d[4];
};

// Element i of accumulator d in a lane: row and column of the 16 x 8 tile.
NO_TSAN inline int d_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
NO_TSAN inline int d_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

NO_TSAN inline float float_of(u32 bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

template <int K>
NO_TSAN inline void multiply(Thread* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < 32; lane++) {
    const Fragments* in = reinterpret_cast<const Fragments*>(lanes[lane].in);
    Accumulators* out = reinterpret_cast<Accumulators*>(lanes[lane].out);
    for (int i = 0; i < 4; i++) {
      float sum = in->d[i];
      for (int k = 0; k < K; k++) sum += a[d_row(lane, i)][k] * b[k][d_column(lane, i)];
      out->d[i] = sum;
    }
  }
}

// Registers hold two elements each, the lower half first: register 0 of a lies in the upper left quarter, 1 below it, 2
// right of it, 3 across; register 1 of b lies below 0.
NO_TSAN inline void combine_mma_bf16(Thread* lanes, u32) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments* in = reinterpret_cast<const Fragments*>(lanes[lane].in);
    const int group = lane / 4, pair = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int r = 0; r < 4; r++)
        a[group + r % 2 * 8][pair * 2 + half + r / 2 * 8] = float_of(in->a[r] >> 16 * half << 16);
      for (int r = 0; r < 2; r++) b[pair * 2 + half + r * 8][group] = float_of(in->b[r] >> 16 * half << 16);
    }
  }
  multiply(lanes, a, b);
}

// One element a register. The low 13 bits are ignored, not rounded: to_tf32 is the kernel's business.
NO_TSAN inline void combine_mma_tf32(Thread* lanes, u32) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments* in = reinterpret_cast<const Fragments*>(lanes[lane].in);
    const int group = lane / 4, pair = lane % 4;
    for (int r = 0; r < 4; r++) a[group + r % 2 * 8][pair + r / 2 * 4] = float_of(in->a[r] & ~0x1fffu);
    for (int r = 0; r < 2; r++) b[pair + r * 4][group] = float_of(in->b[r] & ~0x1fffu);
  }
  multiply(lanes, a, b);
}

struct Fragments64 {
  double a, b, d[2];
};
struct Accumulators64 {
  double d[2];
};

NO_TSAN inline void combine_mma_f64(Thread* lanes, u32) {
  double a[8][4], b[4][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments64* in = reinterpret_cast<const Fragments64*>(lanes[lane].in);
    a[lane / 4][lane % 4] = in->a;
    b[lane % 4][lane / 4] = in->b;
  }
  for (int lane = 0; lane < 32; lane++) {
    const Fragments64* in = reinterpret_cast<const Fragments64*>(lanes[lane].in);
    Accumulators64* out = reinterpret_cast<Accumulators64*>(lanes[lane].out);
    for (int i = 0; i < 2; i++) {
      double sum = in->d[i];
      for (int k = 0; k < 4; k++) sum += a[lane / 4][k] * b[k][d_column(lane, i)];
      out->d[i] = sum;
    }
  }
}

inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Site here, Combine combine) {
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const auto out = exchange<Accumulators>(~0u, here, in, combine);
  for (int i = 0; i < 4; i++) d[i] = out.d[i];
}

}  // namespace emulation

// Lane l passes the address of row l % 8 of matrix l / 8 (8x8, 16 bits an element); d[i] receives its two neighbouring
// elements of matrix i.
inline void ldmatrix_x4(u32 (&d)[4], const void* row, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  emulation::ldmatrix<4, false>(d, row, {__func__, file, line});
}
inline void ldmatrix_x4_trans(u32 (&d)[4], const void* row, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  emulation::ldmatrix<4, true>(d, row, {__func__, file, line});
}
inline void ldmatrix_x2(u32 (&d)[2], const void* row, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  emulation::ldmatrix<2, false>(d, row, {__func__, file, line});
}
inline void ldmatrix_x2_trans(u32 (&d)[2], const void* row, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  emulation::ldmatrix<2, true>(d, row, {__func__, file, line});
}

// d (16, 8) += a (16, 16) b (16, 8): bf16 products summed in float.
inline void mma_bf16_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const char* file = __builtin_FILE(),
                           int line = __builtin_LINE()) {
  emulation::mma(d, a, b, {__func__, file, line}, emulation::combine_mma_bf16);
}

// d (16, 8) += a (16, 8) b (8, 8), the operands rounded by to_tf32.
inline void mma_tf32_1688(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  emulation::mma(d, a, b, {__func__, file, line}, emulation::combine_mma_tf32);
}

// d (8, 8) += a (8, 4) b (4, 8): lane 4 g + p holds a[g][p], b[p][g], and d[g][2 p] and d[g][2 p + 1].
inline void mma_f64_884(double& d0, double& d1, double a, double b, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  const emulation::Fragments64 in{a, b, {d0, d1}};
  const auto out =
      emulation::exchange<emulation::Accumulators64>(~0u, {__func__, file, line}, in, emulation::combine_mma_f64);
  d0 = out.d[0], d1 = out.d[1];
}

// To the nearest float with ten bits of mantissa, ties away from zero.
inline u32 to_tf32(float x) {
  const u32 bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x007fffffu) ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace tinyres
