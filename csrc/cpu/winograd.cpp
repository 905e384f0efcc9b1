// Winograd's algorithm F(4x4, 3x3) for convolutions of 3x3 windows at stride 1, in float. docs/winograd.md derives it.
//
// A tile of 4x4 outputs needs 6x6 inputs. Both, and the 3x3 window, are taken for polynomials and evaluated at six
// points along each axis, where convolution is a product: 36 multiplications instead of 144. With the matrices below
//
//   y = A^T [(G w G^T) * (B^T x B)] A        * is element by element; summed over channels before the outer A
//   dw = G^T [(B^T x B) * (A dy A^T)] G      the adjoint; summed over tiles before the outer G
//
// and dx is y's formula on dy with the window turned by half a circle. So there are three kinds of work:
//   1. transforms, for 16 channels of a tile at a time: vectors run over channels, loads and stores are whole vectors;
//   2. for each of the 36 points a product of matrices, tiles x channels by channels x filters;
//   3. the transform back.
// Most of the time should go to 2, and does if 1 and 3 find their data in the cache. Hence two drivers, chosen by
// shape:
//   - fused, where the transformed weights fit in the L2 cache: a task takes a group of tiles through all three;
//   - in phases, otherwise: each step runs over many tiles at once, and 2 reads each weight once.
// In the fused one, 2 also asks the memory for what the next 1 and 3 need (Ahead).
//
//   N batch, H W input size, C channels, K filters, P Q output size.
#include "winograd.h"

#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

using V = Vec<float>;
constexpr int LANE = LANES<float>;

constexpr int OUT = 4, IN = 6, POINTS = IN * IN;

// Channels of a block: a cache line, and a multiple of every vector length.
constexpr int BLOCK = 16;

// Sums in registers: the two FMA ports need 8 to 10 in flight. 4 tiles x 4 vectors of filters take the fewest loads, 4
// broadcasts and 4 vectors for 16 multiply-adds; 8 x 2 take 10, 16 x 1 take 17 (a quarter slower).
#if TINYRES_VECTOR_BYTES == 64
constexpr int SUMS = 16, MOST_VECTORS = 4;
#elif defined(__aarch64__)
constexpr int SUMS = 16, MOST_VECTORS = 2;
#else
constexpr int SUMS = 8, MOST_VECTORS = 2;
#endif

// Transformed weights of up to FUSED_WEIGHTS leave room in an L2 cache of 1 or 2 MiB for a group of tiles, GROUP_BYTES;
// the weight gradient keeps its sums there in place of the weights. PHASE_BYTES bounds the scratch of the other driver.
constexpr i64 FUSED_WEIGHTS = 1 << 20, GROUP_BYTES = 320 << 10, PHASE_BYTES = 32 << 20;

// Work is cut into TASKS at least where there are tiles for it, so that no machine of usual size idles at batch 1.
constexpr i64 TASKS = 16;

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 padded(i64 channels) { return ceil_div(channels, BLOCK) * BLOCK; }

// The transforms ----------------------------------------------------------------------------------------------------

// The points are 0, +-a, +-b and infinity. a = 3/4, b = 3/2 make half of the error of the textbook's 1 and 2, and all
// constants of A and B are exact in float.
constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;

// B^T x, in halves: the points 0, a, -a, then b, -b, infinity.
struct InputTransform {
  static constexpr int SIZE = IN;
  template <int HALF>
  static inline void half(V (&t)[3], const V (&x)[IN]) {
    if constexpr (HALF == 0) {
      const V even = x[4] - b2 * x[2], odd = x[3] - b2 * x[1];
      t[0] = a2 * b2 * x[0] + (x[4] - (a2 + b2) * x[2]);
      t[1] = even + a * odd;
      t[2] = even - a * odd;
    } else {
      const V even = x[4] - a2 * x[2], odd = x[3] - a2 * x[1];
      t[0] = even + b * odd;
      t[1] = even - b * odd;
      t[2] = a2 * b2 * x[1] + (x[5] - (a2 + b2) * x[3]);
    }
  }
};

// A dy, in the same halves.
struct OutputAdjoint {
  static constexpr int SIZE = OUT;
  template <int HALF>
  static inline void half(V (&t)[3], const V (&dy)[OUT]) {
    constexpr float p = HALF == 0 ? a : b, p2 = p * p;
    const V even = dy[0] + p2 * dy[2], odd = dy[1] + p2 * dy[3];
    t[HALF == 0 ? 0 : 2] = dy[HALF == 0 ? 0 : 3];
    t[HALF == 0 ? 1 : 0] = even + p * odd;
    t[HALF == 0 ? 2 : 1] = even - p * odd;
  }
};

// A^T m
inline void output_transform(V (&y)[OUT], const V (&m)[IN]) {
  const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = a * difference_a + b * difference_b;
  y[2] = a2 * sum_a + b2 * sum_b;
  y[3] = a2 * a * difference_a + b2 * b * difference_b + m[5];
}

// The rows of G are (1, p, p^2) over the product of p's distances from the other finite points.
constexpr float at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

// G w
inline void weight_transform(V (&u)[IN], const V (&w)[3]) {
  const V even_a = at_a * (w[0] + a2 * w[2]), even_b = at_b * (w[0] + b2 * w[2]);
  const V odd_a = at_a * a * w[1], odd_b = at_b * b * w[1];
  u[0] = at_0 * w[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = w[2];
}

// G^T du
inline void weight_adjoint(V (&dw)[3], const V (&du)[IN]) {
  const V sum_a = at_a * (du[1] + du[2]), difference_a = at_a * a * (du[1] - du[2]);
  const V sum_b = at_b * (du[3] + du[4]), difference_b = at_b * b * (du[3] - du[4]);
  dw[0] = at_0 * du[0] + sum_a + sum_b;
  dw[1] = difference_a + difference_b;
  dw[2] = a2 * sum_a + b2 * sum_b + du[5];
}

// A transform along both axes of one vector of channels, columns first, then rows: write(element of `to`, value).
// Strides count elements.
template <auto TRANSFORM, int TO, int FROM, class Write>
inline void both_axes(i64 to_row, i64 to_column, const float* from, i64 from_row, i64 from_column, const Write& write) {
  V half[TO][FROM];
#pragma GCC unroll 6
  for (int j = 0; j < FROM; j++) {
    V column[FROM], result[TO];
#pragma GCC unroll 6
    for (int i = 0; i < FROM; i++) column[i] = load(from + i * from_row + j * from_column);
    TRANSFORM(result, column);
#pragma GCC unroll 6
    for (int i = 0; i < TO; i++) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < TO; i++) {
    V result[TO];
    TRANSFORM(result, half[i]);
#pragma GCC unroll 6
    for (int j = 0; j < TO; j++) write(i * to_row + j * to_column, result[j]);
  }
}

// Tiles and where they lie -------------------------------------------------------------------------------------------

// Values at the 36 points: (group of tiles, channel block, point, tile, BLOCK). Constant distances make short code of a
// transform's 36 addresses. One more block between points keeps them off powers of two, at which the 36 lines would
// compete for the same places of the cache.
constexpr i64 GROUP = 16, POINT = (GROUP + 1) * BLOCK;
struct Points {
  float* data;
  i64 tiles, channels;
  static constexpr i64 block() { return POINTS * POINT; }
  i64 group() const { return ceil_div(channels, BLOCK) * block(); }
  i64 size() const { return ceil_div(tiles, GROUP) * group(); }
  float* at(i64 channel, i64 tile) const {
    return data + tile / GROUP * group() + channel / BLOCK * block() + tile % GROUP * BLOCK + channel % BLOCK;
  }
};

// Images (N, H, W, C) cut into tiles of SIZE x SIZE pixels whose corners are 4 apart, the first at (-pad_h, -pad_w).
struct Images {
  const float* x;
  i64 H, W, C, pad_h, pad_w;
};

// Tiles are numbered through all images: image, row of tiles, column.
struct Grid {
  i64 N, rows, columns;
  Grid(i64 N, i64 P, i64 Q) : N(N), rows(ceil_div(P, OUT)), columns(ceil_div(Q, OUT)) {}
  i64 tiles() const { return N * rows * columns; }
};

// Cuts tiles [first, last) at the ends of rows: body(tile, count, n, p, q) for `count` tiles of one row of image n, the
// outputs of the first beginning at (p, q).
template <class F>
inline void for_rows(const Grid& grid, i64 first, i64 last, const F& body) {
  for (i64 tile = first, count; tile < last; tile += count) {
    const i64 row = tile / grid.columns, column = tile % grid.columns;
    count = least(last - tile, grid.columns - column);
    body(tile, count, row / grid.rows, row % grid.rows * OUT, column * OUT);
  }
}

// One vector of a tile, along both axes, columns first. All 36 values between the two passes would not fit into
// registers, the three rows of a half do: that is worth reading the tile twice.
template <class TRANSFORM, int HALF>
inline void transform_half(float* to, const float* tile, i64 row, i64 column) {
  constexpr int SIZE = TRANSFORM::SIZE;
  V half[3][SIZE];
#pragma GCC unroll 6
  for (int j = 0; j < SIZE; j++) {
    V pixels[SIZE], result[3];
#pragma GCC unroll 6
    for (int i = 0; i < SIZE; i++) pixels[i] = load(tile + i * row + j * column);
    TRANSFORM::template half<HALF>(result, pixels);
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) half[i][j] = result[i];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) {
    V first[3], second[3];
    TRANSFORM::template half<0>(first, half[i]);
    TRANSFORM::template half<1>(second, half[i]);
    float* line = to + (HALF * 3 + i) * IN * POINT;
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) store(line + j * POINT, first[j]), store(line + (3 + j) * POINT, second[j]);
  }
}

// By itself, as is write_tile: merged with its caller it would get too few registers for its addresses.
template <class TRANSFORM>
__attribute__((noinline)) void transform_tile(float* to, const float* tile, i64 row, i64 column) {
  transform_half<TRANSFORM, 0>(to, tile, row, column);
  transform_half<TRANSFORM, 1>(to, tile, row, column);
}

alignas(64) const float zeros[BLOCK] = {};
inline void store_block(float* to, const float* from) {
#pragma GCC unroll 4
  for (int k = 0; k < BLOCK; k += LANE) store(to + k, load(from + k));
}

// Copies a block of channels of the tile at (h, w) with zeros for what is missing of it.
template <int SIZE>
void fill_up(float (&copy)[SIZE][SIZE][BLOCK], const float* tile, const Images& s, i64 h, i64 w, i64 channels) {
  const i64 left = most(0, -w), right = least(SIZE, s.W - w);
  for (i64 i = 0; i < SIZE; i++) {
    const bool inside = h + i >= 0 && h + i < s.H;
    const i64 begin = inside ? left : SIZE, end = inside ? right : SIZE;
    for (i64 j = 0; j < begin; j++) store_block(copy[i][j], zeros);
    for (i64 j = begin; j < end; j++) {
      const float* pixel = tile + (i * s.W + j) * s.C;
      if (channels == BLOCK)
        store_block(copy[i][j], pixel);
      else
        for (i64 k = 0; k < BLOCK; k++) copy[i][j][k] = k < channels ? pixel[k] : 0;
    }
    for (i64 j = end; j < SIZE; j++) store_block(copy[i][j], zeros);
  }
}

// Transforms tiles [first, last) of the images into `to` from place `place` on.
template <class TRANSFORM>
void transform_tiles(const Points& to, i64 place, const Images& s, const Grid& grid, i64 first, i64 last) {
  constexpr int SIZE = TRANSFORM::SIZE;
  for_rows(grid, first, last, [&](i64 tile, i64 count, i64 n, i64 p, i64 q) {
    const i64 h = p - s.pad_h;
    for (i64 c = 0; c < s.C; c += BLOCK) {
      const i64 channels = least(BLOCK, s.C - c);
      for (i64 t = 0; t < count; t++) {
        const i64 w = q - s.pad_w + t * OUT;
        const float* from = s.x + ((n * s.H + h) * s.W + w) * s.C + c;
        const bool inside = h >= 0 && w >= 0 && h + SIZE <= s.H && w + SIZE <= s.W && channels == BLOCK;
        alignas(64) float copy[SIZE][SIZE][BLOCK];
        if (!inside) fill_up(copy, from, s, h, w, channels);
        const float* pixels = inside ? from : copy[0][0];
        const i64 row = inside ? s.W * s.C : SIZE * BLOCK, column = inside ? s.C : BLOCK;
        float* out = to.at(c, place + tile - first + t);
#pragma GCC unroll 4
        for (int k = 0; k < BLOCK; k += LANE) {
          transform_tile<TRANSFORM>(out + k, pixels + k, row, column);
        }
      }
    }
  });
}

// Outputs (N, P, Q, K).
struct Outputs {
  float* y;
  i64 P, Q, K;
  Epilogue<float> epilogue;
};

// Writes one vector of a tile; SHIFT where there is a bias or a ReLU.
template <bool SHIFT, bool RESIDUAL>
__attribute__((noinline)) void write_tile(float* y, i64 row, i64 column, const float* from, const float* bias,
                                          const float* residual, bool relu) {
  const V shift = load(bias), floor = relu ? V{} : splat(-__builtin_inff());
  both_axes<output_transform, OUT, IN>(row, column, from, IN * POINT, POINT, [&](i64 i, V value) {
    if constexpr (SHIFT) value += shift;
    if constexpr (RESIDUAL) value += load(residual + i);
    store(y + i, SHIFT ? larger<float>(floor, value) : value);
  });
}

// Transforms `from`, from place `place` on, back into tiles [first, last) of the outputs, leaving out what stands out
// of the image.
void write_tiles(const Outputs& s, const Points& from, i64 place, const Grid& grid, i64 first, i64 last) {
  const i64 P = s.P, Q = s.Q, K = s.K;
  const Epilogue<float>& e = s.epilogue;
  const bool shift = e.bias || e.relu;
  const auto write = shift ? (e.residual ? write_tile<true, true> : write_tile<true, false>)
                           : (e.residual ? write_tile<false, true> : write_tile<false, false>);
  for_rows(grid, first, last, [&](i64 tile, i64 count, i64 n, i64 p, i64 q) {
    for (i64 k = 0; k < K; k += LANE) {
      const i64 filters = least(LANE, K - k);
      float bias[LANE] = {};
      if (e.bias) store(bias, load_first(e.bias + k, filters));
      i64 at = ((n * P + p) * Q + q) * K + k;
      for (i64 t = 0; t < count; t++, at += OUT * K) {
        const float* in = from.at(k, place + tile - first + t);
        const i64 rows = least(OUT, P - p), columns = least(OUT, Q - q - t * OUT);
        if (rows == OUT && columns == OUT && filters == LANE) {
          write(s.y + at, Q * K, K, in, bias, e.residual ? e.residual + at : nullptr, e.relu);
          continue;
        }
        // By way of a tile of its own, whose residual is zero where there is none.
        float results[OUT][OUT][LANE], residual[OUT][OUT][LANE] = {};
        for (i64 i = 0; i < rows && e.residual; i++)
          for (i64 j = 0; j < columns; j++)
            store(residual[i][j], load_first(e.residual + at + (i * Q + j) * K, filters));
        write(results[0][0], OUT * LANE, LANE, in, bias, residual[0][0], e.relu);
        for (i64 i = 0; i < rows; i++)
          for (i64 j = 0; j < columns; j++) store_first(s.y + at + (i * Q + j) * K, load(results[i][j]), filters);
      }
    }
  });
}

// Filters that are summed together: MOST_VECTORS vectors of them, as often as that goes, then half as many.
struct Filters {
  i64 first, count;
  // The group of filter k of K.
  static Filters of(i64 k, i64 K) {
    i64 count = MOST_VECTORS * LANE;
    while (k >= padded(K) / count * count) count /= 2;
    return {k / count * count, count};
  }
  static Filters number(i64 index, i64 K) {
    Filters group = of(0, K);
    while (index-- > 0) group = of(group.first + group.count, K);
    return group;
  }
  static i64 groups(i64 K) {
    i64 groups = 0;
    for (i64 k = 0; k < padded(K); k += of(k, K).count) groups++;
    return groups;
  }
};

// Transformed weights: (point, group of filters, channel, filter), the order in which the products read them.
struct Weights {
  float* data;
  i64 C, K;  // summed channels and filters of the product
  i64 point() const { return C * padded(K) + BLOCK; }
  i64 size() const { return POINTS * point(); }
};

// w(tap, c, k) = w[tap * w_tap + c * w_c + k * w_k] for the nine taps.
void transform_weights(const Weights& u, const float* w, i64 w_tap, i64 w_c, i64 w_k) {
  const i64 blocks = ceil_div(u.K, BLOCK), point = u.point();
  parallel_for(ceil_div(u.C, BLOCK) * blocks, [&](i64 task) {
    const i64 c0 = task / blocks * BLOCK, k0 = task % blocks * BLOCK;
    const i64 channels = least(BLOCK, u.C - c0), filters = least(BLOCK, u.K - k0);
    // Copied first, so that vectors run over filters whichever of C and K is the inner one in memory.
    alignas(64) float copy[9][BLOCK][BLOCK] = {};
    for (i64 tap = 0; tap < 9; tap++) {
      const float* from = w + tap * w_tap + c0 * w_c + k0 * w_k;
      if (w_k == 1) {
        for (i64 c = 0; c < channels; c++)
          for (i64 k = 0; k < filters; k++) copy[tap][c][k] = from[c * w_c + k];
      } else {
        for (i64 k = 0; k < filters; k++)
          for (i64 c = 0; c < channels; c++) copy[tap][c][k] = from[c * w_c + k * w_k];
      }
    }
    for (int k = 0; k < BLOCK; k += LANE) {
      const Filters group = Filters::of(k0 + k, u.K);
      for (i64 c = 0; c < channels; c++) {
        float* to = u.data + group.first * u.C + (c0 + c) * group.count + (k0 + k - group.first);
        both_axes<weight_transform, IN, 3>(IN * point, point, &copy[0][c][k], 3 * BLOCK * BLOCK, BLOCK * BLOCK,
                                           [to](i64 i, V value) { store(to + i, value); });
      }
    }
  });
}

// While the products of a group of tiles run, which leave the memory idle, they ask it for what comes next: of images
// (N, H, W, C) the 4x4 pixels `down` rows below the outputs of tiles [first, last), some tiles at each point.
class Ahead {
 public:
  Ahead(const float* x, i64 H, i64 W, i64 C, i64 down, const Grid& grid, i64 first, i64 last)
      : x_(x), H_(H), W_(W), C_(C), down_(down), grid_(grid), tiles_(most(0, last - first)) {
    const i64 row = first / grid.columns;
    n_ = row / grid.rows, row_ = row % grid.rows, column_ = first % grid.columns;
  }
  // Of a tile's 6x6 inputs, the last four rows are those that the tiles above it have not read.
  Ahead(const Images& s, const Grid& grid, i64 first, i64 last)
      : Ahead(s.x, s.H, s.W, s.C, IN - OUT - s.pad_h, grid, first, last) {}

  void ask(i64 point) {
    for (; asked_ < tiles_ * (point + 1) / POINTS; asked_++) {
      const i64 w = column_ * OUT, width = least(OUT, W_ - w) * C_;
      for (i64 i = 0; i < OUT; i++) {
        const i64 h = row_ * OUT + i + down_;
        if (h < 0 || h >= H_) continue;
        const float* pixels = x_ + ((n_ * H_ + h) * W_ + w) * C_;
        for (i64 c = 0; c < width; c += BLOCK) __builtin_prefetch(pixels + c, 0, 2);  // as far as the L2 cache
      }
      if (++column_ == grid_.columns) column_ = 0, row_++;
      if (row_ == grid_.rows) row_ = 0, n_++;
    }
  }

 private:
  const float* x_;
  i64 H_, W_, C_, down_;
  const Grid& grid_;
  i64 tiles_, asked_ = 0, n_, row_, column_;
};

// Forward and input gradient -----------------------------------------------------------------------------------------

// m(tile, k) = sum over c of v(tile, c) * u(c, k) for TILES x VECTORS sums in registers.
template <int TILES, int VECTORS>
void multiply_tiles(float* m, i64 m_vector, const float* v, const float* u, i64 C) {
  V sum[TILES][VECTORS] = {};
  for (i64 c0 = 0; c0 < C; c0 += BLOCK, v += Points::block()) {
    for (i64 c = 0; c < least(BLOCK, C - c0); c++, u += VECTORS * LANE) {
      V weights[VECTORS];
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; k++) weights[k] = load(u + k * LANE);
#pragma GCC unroll 16
      for (int i = 0; i < TILES; i++)
#pragma GCC unroll 4
        for (int k = 0; k < VECTORS; k++) sum[i][k] += v[i * BLOCK + c] * weights[k];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILES; i++)
#pragma GCC unroll 4
    for (int k = 0; k < VECTORS; k++) store(m + i * BLOCK + k * m_vector, sum[i][k]);
}

// One point and the filters from k0 on for the first `tiles` tiles. The last tiles of a group take the smallest kernel
// that covers them, moved back where it would stand out: computing some twice is cheaper than several small kernels.
template <int VECTORS>
void multiply_filters(const Points& m, const Points& v, const float* u, i64 point, i64 k0, i64 tiles) {
  const i64 m_vector = m.at(k0 + LANE, 0) - m.at(k0, 0);
  for (i64 first = 0; first < tiles; first += GROUP) {
    const float* from = v.at(0, first) + point * POINT;
    float* to = m.at(k0, first) + point * POINT;
    const i64 rest = least(GROUP, tiles - first);
    for (i64 t = 0; t < rest;) {
      int count = SUMS / VECTORS;
      while (count > rest || count / 2 >= rest - t) count /= 2;
      t = least(t, rest - count);
      float* out = to + t * BLOCK;
      const float* in = from + t * BLOCK;
      switch (count) {
        case 16:
          if constexpr (SUMS / VECTORS >= 16) multiply_tiles<16, VECTORS>(out, m_vector, in, u, v.channels);
          break;
        case 8:
          if constexpr (SUMS / VECTORS >= 8) multiply_tiles<8, VECTORS>(out, m_vector, in, u, v.channels);
          break;
        case 4: multiply_tiles<4, VECTORS>(out, m_vector, in, u, v.channels); break;
        case 2: multiply_tiles<2, VECTORS>(out, m_vector, in, u, v.channels); break;
        default: multiply_tiles<1, VECTORS>(out, m_vector, in, u, v.channels);
      }
      t += count;
    }
  }
}

void multiply(const Points& m, const Points& v, const Weights& u, i64 point, const Filters& filters, i64 tiles) {
  const i64 k0 = filters.first, vectors = filters.count / LANE;
  const float* weights = u.data + point * u.point() + k0 * u.C;
  if (vectors == MOST_VECTORS)
    multiply_filters<MOST_VECTORS>(m, v, weights, point, k0, tiles);
  else if (vectors == 2)
    multiply_filters<2>(m, v, weights, point, k0, tiles);
  else
    multiply_filters<1>(m, v, weights, point, k0, tiles);
}

inline bool is_fused(i64 C, i64 K) { return POINTS * C * K * i64(sizeof(float)) <= FUSED_WEIGHTS; }

// Tiles of C + K channels that fit into `bytes`, in whole groups of places, but no more than keep the TASKS busy. Less
// than a group would read all weights for a few tiles.
inline i64 group_tiles(i64 bytes, i64 channels, i64 tiles) {
  const i64 fit = bytes / (POINTS * channels * i64(sizeof(float))), share = ceil_div(tiles, TASKS);
  const i64 most_tiles = most(GROUP, least(4 * GROUP, fit / GROUP * GROUP));
  return least(most_tiles, ceil_div(share, GROUP) * GROUP);
}
inline i64 phase_tiles(i64 channels, i64 tiles) {
  return least(tiles, most(64, PHASE_BYTES / (POINTS * channels * i64(sizeof(float)))));
}

// y (N, P, Q, K) from x (N, H, W, C) and transformed weights.
void correlate(const Outputs& y, const Images& x, const Weights& u, i64 N) {
  const Grid grid(N, y.P, y.Q);
  const i64 C = u.C, K = u.K, tiles = grid.tiles();
  if (C <= BLOCK && K <= least(BLOCK, MOST_VECTORS * LANE)) {
    // One block of channels and one kernel's filters: a product reads all that it overwrites before it does. So a group
    // of tiles fits into the L1 cache.
    parallel_ranges(ceil_div(tiles, GROUP), most(1, least(8, tiles / GROUP / TASKS)), [&](i64 first, i64 last) {
      Points v{nullptr, GROUP, BLOCK};
      const Scratch<float> scratch(v.size());
      v.data = scratch.get();
      for (i64 g = first; g < last; g++) {
        const i64 begin = g * GROUP, end = least(begin + GROUP, tiles);
        transform_tiles<InputTransform>(v, 0, x, grid, begin, end);
        const Points in{v.data, GROUP, C};
        Ahead outputs(y.y, y.P, y.Q, K, 0, grid, begin, end), inputs(x, grid, end, least(end + GROUP, tiles));
        for (i64 point = 0; point < POINTS; point++) {
          outputs.ask(point), inputs.ask(point);
          multiply(v, in, u, point, Filters::of(0, K), GROUP);
        }
        write_tiles(y, v, 0, grid, begin, end);
      }
    });
    return;
  }
  const i64 groups = Filters::groups(K);
  if (is_fused(C, K)) {
    const i64 group = group_tiles(GROUP_BYTES, C + K, tiles);
    parallel_ranges(tiles, group, [&](i64 begin, i64 end) {
      Points v{nullptr, group, C}, m{nullptr, group, padded(K)};
      const Scratch<float> scratch(v.size() + m.size());
      v.data = scratch.get(), m.data = v.data + v.size();
      transform_tiles<InputTransform>(v, 0, x, grid, begin, end);
      Ahead outputs(y.y, y.P, y.Q, K, 0, grid, begin, end), inputs(x, grid, end, least(end + group, tiles));
      for (i64 point = 0; point < POINTS; point++) {
        outputs.ask(point), inputs.ask(point);
        for (i64 g = 0; g < groups; g++) multiply(m, v, u, point, Filters::number(g, K), end - begin);
      }
      write_tiles(y, m, 0, grid, begin, end);
    });
    return;
  }
  const i64 phase = phase_tiles(C + K, tiles);
  Points v{nullptr, phase, C}, m{nullptr, phase, padded(K)};
  const Scratch<float> v_scratch(v.size()), m_scratch(m.size());
  v.data = v_scratch.get(), m.data = m_scratch.get();
  for (i64 first = 0; first < tiles; first += phase) {
    const i64 count = least(phase, tiles - first);
    parallel_ranges(count, most(1, 1024 / C), [&](i64 begin, i64 end) {
      transform_tiles<InputTransform>(v, begin, x, grid, first + begin, first + end);
    });
    parallel_for(POINTS * groups,
                 [&](i64 task) { multiply(m, v, u, task / groups, Filters::number(task % groups, K), count); });
    parallel_ranges(count, most(1, 1024 / K),
                    [&](i64 begin, i64 end) { write_tiles(y, m, begin, grid, first + begin, first + end); });
  }
}

// Weight gradient ----------------------------------------------------------------------------------------------------

// du(c, k) += sum over tiles of v(tile, c) * d(tile, k) for CHANNELS x VECTORS sums in registers.
template <int CHANNELS, int VECTORS>
void outer_products(float* du, i64 du_row, const float* v, i64 v_group, const float* d, i64 d_group, i64 d_vector,
                    i64 tiles, bool first) {
  V sum[CHANNELS][VECTORS] = {};
  for (; tiles > 0; tiles -= GROUP, v += v_group, d += d_group) {
    for (i64 t = 0; t < least(GROUP, tiles); t++) {
      V gradient[VECTORS];
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; k++) gradient[k] = load(d + t * BLOCK + k * d_vector);
#pragma GCC unroll 16
      for (int c = 0; c < CHANNELS; c++)
#pragma GCC unroll 4
        for (int k = 0; k < VECTORS; k++) sum[c][k] += v[t * BLOCK + c] * gradient[k];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < CHANNELS; c++)
#pragma GCC unroll 4
    for (int k = 0; k < VECTORS; k++) {
      float* to = du + c * du_row + k * LANE;
      store(to, first ? sum[c][k] : load(to) + sum[c][k]);
    }
}

// Gradients of transformed weights: (point, channel, filter), both padded to whole blocks.
struct WeightSums {
  float* data;
  i64 C, K;
  i64 point() const { return padded(C) * padded(K) + BLOCK; }
  i64 size() const { return POINTS * point(); }
};

template <int VECTORS>
void accumulate_filters(const WeightSums& du, const Points& v, const Points& d, i64 point, i64 k0, i64 tiles,
                        bool first) {
  constexpr int CHANNELS = SUMS / VECTORS;
  const float* gradient = d.at(k0, 0) + point * POINT;
  const i64 d_vector = d.at(k0 + LANE, 0) - d.at(k0, 0), row = padded(du.K);
  for (i64 c = 0; c < padded(du.C); c += CHANNELS)
    outer_products<CHANNELS, VECTORS>(du.data + point * du.point() + c * row + k0, row, v.at(c, 0) + point * POINT,
                                      v.group(), gradient, d.group(), d_vector, tiles, first);
}

void accumulate(const WeightSums& du, const Points& v, const Points& d, i64 point, const Filters& filters, i64 tiles,
                bool first) {
  const i64 k0 = filters.first, vectors = filters.count / LANE;
  if (vectors == MOST_VECTORS)
    accumulate_filters<MOST_VECTORS>(du, v, d, point, k0, tiles, first);
  else if (vectors == 2)
    accumulate_filters<2>(du, v, d, point, k0, tiles, first);
  else
    accumulate_filters<1>(du, v, d, point, k0, tiles, first);
}

// dw(tap, c, k) of channel c, dw having rows of K filters.
void write_weights(float* dw, i64 K, const WeightSums& du, i64 c) {
  for (i64 k = 0; k < K; k += LANE) {
    const float* from = du.data + c * padded(du.K) + k;
    float results[9][LANE];
    both_axes<weight_adjoint, 3, IN>(3 * LANE, LANE, from, IN * du.point(), du.point(),
                                     [&](i64 i, V value) { store(results[0] + i, value); });
    for (i64 tap = 0; tap < 9; tap++)
      store_first(dw + (tap * du.C + c) * K + k, load(results[tap]), least(LANE, K - k));
  }
}

}  // namespace

void winograd_forward(float* y, const float* x, const float* w, const Epilogue<float>& epilogue, const Window& s) {
  Weights u{nullptr, s.C, s.K};
  const Scratch<float> scratch(u.size());
  u.data = scratch.get();
  transform_weights(u, w, s.C * s.K, s.K, 1);
  correlate({y, s.P, s.Q, s.K, epilogue}, {x, s.H, s.W, s.C, s.pad_h, s.pad_w}, u, s.N);
}

// dx[h, w, c] = sum of dy[h + pad_h - r, w + pad_w - s, k] * w[r, s, c, k]: with r = 2 - i a correlation of dy with
// the taps in reversed order, padded by 2 - pad. A negative padding leaves out the first pixels of dy.
void winograd_backward_input(float* dx, const float* dy, const float* w, const Window& s, bool add) {
  Weights u{nullptr, s.K, s.C};
  const Scratch<float> scratch(u.size());
  u.data = scratch.get();
  transform_weights(u, w + 8 * s.C * s.K, -s.C * s.K, 1, s.K);
  correlate({dx, s.H, s.W, s.C, {nullptr, add ? dx : nullptr, false}}, {dy, s.P, s.Q, s.K, 2 - s.pad_h, 2 - s.pad_w}, u,
            s.N);
}

void winograd_backward_weight(float* dw, const float* dy, const float* x, const Window& s) {
  const Grid grid(s.N, s.P, s.Q);
  const Images xs{x, s.H, s.W, s.C, s.pad_h, s.pad_w}, dys{dy, s.P, s.Q, s.K, 0, 0};
  const i64 tiles = grid.tiles(), groups = Filters::groups(s.K);
  if (is_fused(s.C, s.K)) {
    // A part sums its tiles, two groups at a time, and transforms the sums back itself, which leaves 9 values of 36 to
    // add up in order. At least 64 tiles pay for that.
    const i64 parts = most(1, least(TASKS, tiles / 64)), size = 9 * s.C * s.K;
    const i64 group = least(2 * GROUP, 2 * group_tiles(GROUP_BYTES, s.C + s.K, TASKS * tiles));
    const Scratch<float> partial(parts * size);
    parallel_for(parts, [&](i64 part) {
      Points v{nullptr, group, s.C}, d{nullptr, group, s.K};
      WeightSums du{nullptr, s.C, s.K};
      const Scratch<float> scratch(v.size() + d.size() + du.size());
      v.data = scratch.get(), d.data = v.data + v.size(), du.data = d.data + d.size();
      const i64 first = part * tiles / parts, last = (part + 1) * tiles / parts;
      for (i64 begin = first; begin < last; begin += group) {
        const i64 count = least(group, last - begin);
        transform_tiles<InputTransform>(v, 0, xs, grid, begin, begin + count);
        transform_tiles<OutputAdjoint>(d, 0, dys, grid, begin, begin + count);
        const i64 next = begin + count, end = least(next + group, last);
        Ahead inputs(xs, grid, next, end), gradients(dy, s.P, s.Q, s.K, 0, grid, next, end);
        for (i64 point = 0; point < POINTS; point++) {
          inputs.ask(point), gradients.ask(point);
          for (i64 g = 0; g < groups; g++) accumulate(du, v, d, point, Filters::number(g, s.K), count, begin == first);
        }
      }
      for (i64 c = 0; c < s.C; c++) write_weights(&partial[part * size], s.K, du, c);
    });
    parallel_ranges(size, 4096, [&](i64 begin, i64 end) {
      for_vectors<float>(end - begin, [&](i64 i, i64 count) {
        V sum{};
        for (i64 part = 0; part < parts; part++) sum += load_first(&partial[part * size + begin + i], count);
        store_first(dw + begin + i, sum, count);
      });
    });
    return;
  }
  const i64 phase = phase_tiles(s.C + s.K, tiles);
  Points v{nullptr, phase, s.C}, d{nullptr, phase, s.K};
  WeightSums du{nullptr, s.C, s.K};
  const Scratch<float> v_scratch(v.size()), d_scratch(d.size()), du_scratch(du.size());
  v.data = v_scratch.get(), d.data = d_scratch.get(), du.data = du_scratch.get();
  for (i64 first = 0; first < tiles; first += phase) {
    const i64 count = least(phase, tiles - first);
    parallel_ranges(count, most(1, 1024 / (s.C + s.K)), [&](i64 begin, i64 end) {
      transform_tiles<InputTransform>(v, begin, xs, grid, first + begin, first + end);
      transform_tiles<OutputAdjoint>(d, begin, dys, grid, first + begin, first + end);
    });
    parallel_for(POINTS * groups, [&](i64 task) {
      accumulate(du, v, d, task / groups, Filters::number(task % groups, s.K), count, first == 0);
    });
  }
  parallel_ranges(s.C, most(1, 2048 / s.K), [&](i64 begin, i64 end) {
    for (i64 c = begin; c < end; c++) write_weights(dw, s.K, du, c);
  });
}

// By itself the choice falls on Winograd where it was measured to be the faster one: not below a vector of channels or
// filters (a block of 16 costs the same transforms as one), not where tiles are too few to pay for transforming the
// weights or the whole is little work, and not where more than half of what the tiles compute lies outside of the
// image.
constexpr i64 LEAST_WORK = 1 << 16;
bool use_winograd(const Window& s, ConvAlgorithm algorithm) {
  if (s.R != 3 || s.S != 3 || s.stride_h != 1 || s.stride_w != 1) return false;
  if (algorithm != ConvAlgorithm::automatic) return algorithm == ConvAlgorithm::winograd;
  const i64 tiles = Grid(s.N, s.P, s.Q).tiles();
  return s.C >= BLOCK && s.K >= BLOCK && tiles >= 16 && tiles * s.C * s.K >= LEAST_WORK &&
         2 * s.N * s.P * s.Q >= OUT * OUT * tiles;
}

}  // namespace tinyres::TINYRES_TARGET
