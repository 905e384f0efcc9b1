// What a warp multiplies by tensor cores: fragments of shared tiles, and the sums they are added to.
//
// An operand of mma.sync is spread over the registers of a warp. Count it in words of 4 bytes, two bf16 or one tf32
// each, and all operands look alike: 16 lines of 8 words, a line being a row of a or a column of b, and its words lying
// along k. Lane 4 g + p holds word p and word p + 4 of the lines g and g + 8:
//
//                 word of k
//             0  1  2  3    4  5  6  7
//           +-------------+-------------+
//    line 0 |  0  1  2  3 |  0  1  2  3 |
//         1 |  4  5  6  7 |  4  5  6  7 |        Of a, the instruction takes all 16 lines; of b only 8. So a fragment
//         . |   word[0]   |   word[2]   |        of b is two operands, words {0, 2} and words {1, 3}.
//         7 | 28 29 30 31 | 28 29 30 31 |
//           +-------------+-------------+
//         8 |  0  1  2  3 |  0  1  2  3 |
//         . |   word[1]   |   word[3]   |
//        15 | 28 29 30 31 | 28 29 30 31 |
//           +-------------+-------------+
//
// The sums d are 16 rows by 8 columns of floats. Lane 4 g + p has the columns 2 p and 2 p + 1 of the rows g and g + 8:
//
//     column  0  1    2  3    4  5    6  7
//           +------+-------+-------+-------+
//     row 0 |   0  |   1   |   2   |   3   |
//         1 |   4  |   5   |   6   |   7   |     d[0], d[1]
//         . |  ..  |       |       |       |
//         8 |   0  |   1   |   2   |   3   |
//         9 |   4  |   5   |   6   |   7   |     d[2], d[3]
//         . |  ..  |       |       |       |
//
// ldmatrix fills these registers from a tile that lies [line][k]: it moves rows of 16 bytes, whatever they hold. From
// [k][line] its transposing form turns pairs of bf16, which is what it was made for; words of 4 bytes it would tear
// apart, so that tf32 is read from there a word a lane.
//
// Banks. Shared memory serves 32 words at once if they lie in different banks, word number modulo 32. ldmatrix asks for
// eight rows of 4 words at a time: these meet no bank twice if the pitch of the rows is an odd number of 16 bytes. Lane
// 4 g + p reading word [p][g] meets none twice if the pitch is 8 or 24 words modulo 32. Tiles 16, 32, 48, ... wide
// therefore get rows that are 16 bytes longer, or 8 elements longer where they are read across.
#pragma once

#include <type_traits>

#include "common.h"

namespace tinyres {

// A float that to_tf32 has rounded. A tile of these is loaded as it is, one of floats is rounded on the way.
struct tf32 {
  u32 bits;
};

__device__ inline int lane() { return int(threadIdx.x) % WARP; }

// 16 lines of an operand by DEPTH elements along k; T is bf16, float or tf32 (and double, below).
template <class T>
struct Fragment {
  static constexpr int LINES = 16, DEPTH = 32 / sizeof(T);
  static constexpr int PADDING = 16 / sizeof(T), ACROSS_PADDING = 8;  // what rows of [line][k], of [k][line] are longer

  u32 word[4];

  // From a tile that lies [line][k]. Each lane passes the address of its own row, [own_line()][own_k()]: lines need not
  // be evenly spaced.
  static __device__ int own_line() { return lane() % 16; }
  static __device__ int own_k() { return lane() / 16 * (DEPTH / 2); }

  __device__ void load(const T* own, int = 0) {
    ldmatrix_x4(word, own);
    round();
  }

  // From a tile that lies [k][line]. Each lane passes the address of [across_k()][across_line()].
  static __device__ int across_k() { return sizeof(T) == 2 ? lane() / 16 * 8 + lane() % 8 : lane() % 4; }
  static __device__ int across_line() { return sizeof(T) == 2 ? lane() / 8 % 2 * 8 : lane() / 4; }

  __device__ void load_across(const T* own, int pitch) {
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4_trans(word, own);
    } else {
      const u32 words[4] = {bits(own[0]), bits(own[8]), bits(own[4 * pitch]), bits(own[4 * pitch + 8])};
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] = words[i];
      round();
    }
  }

 private:
  static __device__ u32 bits(float x) { return __float_as_uint(x); }
  static __device__ u32 bits(tf32 x) { return x.bits; }

  __device__ void round() {
    if constexpr (std::is_same_v<T, float>)
#pragma unroll
      for (u32& x : word) x = to_tf32(__uint_as_float(x));
  }
};

// The same for doubles, whose products serve gradient checks: lane 4 g + p holds element p of the lines g and g + 8,
// and the instruction takes 8 lines of each operand.
template <>
struct Fragment<double> {
  static constexpr int LINES = 16, DEPTH = 4;
  static constexpr int PADDING = 2, ACROSS_PADDING = 8;

  double word[2];

  static __device__ int own_line() { return lane() / 4; }
  static __device__ int own_k() { return lane() % 4; }

  // eight: how far line i + 8 lies from line i, for every i < 8.
  __device__ void load(const double* own, int eight) {
    word[0] = own[0];
    word[1] = own[eight];
  }

  static __device__ int across_k() { return lane() % 4; }
  static __device__ int across_line() { return lane() / 4; }

  __device__ void load_across(const double* own, int) {
    word[0] = own[0];
    word[1] = own[8];
  }
};

// sum (16 rows of a, 16 columns of b) += a b, in two halves of 8 columns.
template <class T>
__device__ inline void multiply_add(float (&sum)[2][4], const Fragment<T>& a, const Fragment<T>& b) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u32 columns[2] = {b.word[half], b.word[half + 2]};
    if constexpr (sizeof(T) == 2)
      mma_bf16_16816(sum[half], a.word, columns);
    else
      mma_tf32_1688(sum[half], a.word, columns);
  }
}

__device__ inline void multiply_add(double (&sum)[2][4], const Fragment<double>& a, const Fragment<double>& b) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    mma_f64_884(sum[half][0], sum[half][1], a.word[0], b.word[half]);
    mma_f64_884(sum[half][2], sum[half][3], a.word[1], b.word[half]);
  }
}

// Where element [half][i] of a lane's sums lies in its 16 x 16: i and i + 1 are neighbours for i = 0 and 2.
__device__ inline int sum_row(int i) { return lane() / 4 + i / 2 * 8; }
__device__ inline int sum_column(int half, int i) { return half * 8 + lane() % 4 * 2 + i % 2; }

}  // namespace tinyres
