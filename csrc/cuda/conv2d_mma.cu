// conv2d on tensor cores: the three matrix products of conv2d.cu, gathered on the way in the same manner, multiplied by
// mma.sync.
//
// A block makes a tile of outputs, its warps a part of it each, in fragments of 16 x 16 sums (fragments.h). Tensor
// cores finish a step in about the time that shared memory takes to feed them, so that a warp's part decides: with 64 x
// 32 sums it reads 4 + 2 fragments for 8 products of them. Per step a block brings DEPTH of the summed positions, 64
// bytes a line, by cp.async: straight from global to shared memory, past the registers, zeros for what lies outside of
// an image. There is room for STAGES such steps, in a ring:
//
//     step                         0    1    2    3    4   ...
//     multiplies what stage has    0    1    2    3    0
//     begins to copy to stage      3    0    1    2    3        what is needed three steps later
//
// Operands lie in shared memory as they do in global memory, in rows along the channels (or filters). Where the sum is
// over these, that is [line][k], else [k][line], which fragments are loaded from across:
//
//                      a                              b
//   forward            x   [pixel][channel]           w   [tap, channel][filter]    across
//   input gradient     dy  [pixel][filter]            w   [channel][filter]
//   weight gradient    x   [pixel][channel]   across  dy  [pixel][filter]           across
//
// A copy moves 16 bytes, neighbours along a row: channels and filters must be multiples of 8 bf16 or 4 floats. For the
// rest there is the same kernel with VECTOR = 1, which gathers element by element, bf16 through registers.
//
// Sums are float. A sum's order is that of the summed positions within a step of the tensor cores, whatever they make
// of it, and then from step to step: nothing but the shapes decides it.
#include "conv2d_mma.h"
#include "fragments.h"

namespace tinyres::mma {
namespace {

constexpr int STAGES = 4;
template <class T>
constexpr int DEPTH = 64 / sizeof(T);
template <class T>
constexpr int CHUNK = 16 / sizeof(T);  // elements that one copy moves

// A block's tile: its warps stand DOWN by RIGHT, each with ROWS by COLUMNS fragments. BLOCKS of it are to share a
// multiprocessor: that many fit into the 227 KB of shared memory of an H200, and the compiler keeps to their share of
// the registers.
//
//                 shared memory, KB, of
//                 forward, input and weight gradient      registers a thread
//     128 x 128   74   80   68                            up to 128
//     128 x 64    58   60   52                            up to 168
//     128 x 32    50   50   44                            up to 128
//     128 x 16    46   45   40                            up to 128
//     64 x 64     38   40   36                            up to 168
template <int DOWN_, int RIGHT_, int ROWS_, int COLUMNS_, int BLOCKS_>
struct Tile {
  static constexpr int DOWN = DOWN_, RIGHT = RIGHT_, ROWS = ROWS_, COLUMNS = COLUMNS_, BLOCKS = BLOCKS_;
  static constexpr int HEIGHT = 16 * ROWS * DOWN, WIDTH = 16 * COLUMNS * RIGHT, THREADS = WARP * DOWN * RIGHT;
};

using Tile128x128 = Tile<2, 4, 4, 2, 2>;
using Tile128x64 = Tile<2, 2, 4, 2, 3>;
using Tile128x32 = Tile<4, 1, 2, 2, 4>;
using Tile128x16 = Tile<4, 1, 2, 1, 4>;
using Tile64x64 = Tile<2, 2, 2, 2, 3>;

// One stage of an operand in shared memory: LINES by DEPTH, [line][k] or [k][line], and the threads that bring it: each
// the same chunk of COUNT rows that are STRIDE apart.
template <class T, int LINES, bool ACROSS_, int THREADS>
struct Operand {
  static constexpr bool ACROSS = ACROSS_;
  static constexpr int HEIGHT = ACROSS ? DEPTH<T> : LINES, LENGTH = ACROSS ? LINES : DEPTH<T>;
  static constexpr int PITCH = LENGTH + (ACROSS ? Fragment<T>::ACROSS_PADDING : Fragment<T>::PADDING);
  static constexpr int SIZE = HEIGHT * PITCH;

  static constexpr int CHUNKS = LENGTH / CHUNK<T>, STRIDE = THREADS / CHUNKS, COUNT = (HEIGHT + STRIDE - 1) / STRIDE;
  static_assert(THREADS % CHUNKS == 0 && (STRIDE > HEIGHT || HEIGHT % STRIDE == 0));

  // The thread's first row. Eight threads write at once. Where they have two rows of 64 bytes, 80 bytes from row to
  // row, these share no bank if they are four apart: rows go 0 4 1 5 2 6 3 7.
  static __device__ int row() {
    const int i = int(threadIdx.x) / CHUNKS;
    return ACROSS ? i : i / 8 * 8 + i % 2 * 4 + i / 2 % 4;
  }
  static __device__ int column() { return int(threadIdx.x) % CHUNKS * CHUNK<T>; }
  // Whether the thread has anything to bring: there may be more threads than chunks.
  static __device__ bool takes_part() { return STRIDE <= HEIGHT || row() < HEIGHT; }
  static __device__ T* place(T* stage, int i) { return stage + (row() + i * STRIDE) * PITCH + column(); }

  static constexpr __device__ int at(int line, int k) { return ACROSS ? k * PITCH + line : line * PITCH + k; }
  // What the lane reads of a fragment that begins at `line`.
  static __device__ int own(int line) {
    using F = Fragment<T>;
    return ACROSS ? at(line + F::across_line(), F::across_k()) : at(line + F::own_line(), F::own_k());
  }
  static __device__ void load(Fragment<T>& fragment, const T* own) {
    if constexpr (ACROSS)
      fragment.load_across(own, PITCH);
    else
      fragment.load(own);
  }
};

// Brings VECTOR elements, a chunk or one, to shared memory; zeros if they are not valid.
template <int VECTOR, class T>
__device__ inline void copy(T* to, const T* from, bool valid) {
  if constexpr (VECTOR == CHUNK<T>)
    cp_async16_zfill(to, from, valid);
  else if constexpr (sizeof(T) == 4)
    cp_async4_zfill(to, from, valid);
  else
    *to = valid ? *from : T{};
}

template <class Tile>
using Sums = float[Tile::ROWS][Tile::COLUMNS][2][4];

// The first row and column of a warp's part of the tile.
template <class Tile>
__device__ int warp_row() {
  return int(threadIdx.x) / WARP / Tile::RIGHT * (16 * Tile::ROWS);
}
template <class Tile>
__device__ int warp_column() {
  return int(threadIdx.x) / WARP % Tile::RIGHT * (16 * Tile::COLUMNS);
}

// Sums the products of all steps, which the copier brings one after the other.
template <class T, class Tile, class Copier>
__device__ void multiply(Sums<Tile>& sum, Copier copier, int steps, T* shared) {
  using A = typename Copier::A;
  using B = typename Copier::B;
  T *const a = shared, *const b = shared + STAGES * A::SIZE;
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < steps) copier.bring(a + stage * A::SIZE, b + stage * B::SIZE);
    cp_async_commit();
  }
  const int a_own = A::own(warp_row<Tile>()), b_own = B::own(warp_column<Tile>());
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();  // this thread's copies for the step are there,
    __syncthreads();              // now those of all, and all have left the stage before, which is next to be filled
    const int now = step % STAGES, next = (step + STAGES - 1) % STAGES;
    if (step + STAGES - 1 < steps) copier.bring(a + next * A::SIZE, b + next * B::SIZE);
    cp_async_commit();  // an empty group, at the end, keeps the count
    const T *const a_now = a + now * A::SIZE + a_own, *const b_now = b + now * B::SIZE + b_own;
#pragma unroll
    for (int k = 0; k < DEPTH<T>; k += Fragment<T>::DEPTH) {
      Fragment<T> rows[Tile::ROWS], columns[Tile::COLUMNS];
#pragma unroll
      for (int i = 0; i < Tile::ROWS; i++) A::load(rows[i], a_now + A::at(i * 16, k));
#pragma unroll
      for (int j = 0; j < Tile::COLUMNS; j++) B::load(columns[j], b_now + B::at(j * 16, k));
#pragma unroll
      for (int i = 0; i < Tile::ROWS; i++)
#pragma unroll
        for (int j = 0; j < Tile::COLUMNS; j++) multiply_add(sum[i][j], rows[i], columns[j]);
    }
  }
}

// Calls visit(row, column, values) for each pair of neighbouring sums of this thread, in the tile's coordinates.
template <class Tile, class Visit>
__device__ void for_pairs(const Sums<Tile>& sum, const Visit& visit) {
#pragma unroll
  for (int i = 0; i < Tile::ROWS; i++)
#pragma unroll
    for (int j = 0; j < Tile::COLUMNS; j++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int v = 0; v < 4; v += 2)
          visit(warp_row<Tile>() + i * 16 + sum_row(v), warp_column<Tile>() + j * 16 + sum_column(half, v),
                Vector<float, 2>{{sum[i][j][half][v], sum[i][j][half][v + 1]}});
}

// Whether rows of that length starting at p consist of aligned chunks.
template <class T>
bool in_chunks(const T* p, int length) {
  return length % CHUNK<T> == 0 && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

// Two for each of the 132 multiprocessors of an H200. Not asked of the GPU at hand, since parts follow from it.
constexpr i64 ENOUGH_BLOCKS = 264;

// Calls visit with the tile for a product of that many rows and columns, made in up to `parts` parts. No wider than the
// columns need. Of those for more than 32, a larger one reads an element less often: 128 x 128 a 64th of a time for
// each product, 128 x 64 and 64 x 64 a 43rd and a 32nd. But a GPU wants enough of them, and no column half empty.
template <class Visit>
void with_tile(i64 rows, int columns, i64 parts, const Visit& visit) {
  const auto blocks = [&](int height, int width) { return ceil_div(rows, height) * pieces(columns, width) * parts; };
  if (columns <= 16) return visit(Tile128x16());
  if (columns <= 32) return visit(Tile128x32());
  const bool filled = 2 * pieces(columns, 128) == pieces(columns, 64) && rows > 64;
  if (filled && blocks(128, 128) >= ENOUGH_BLOCKS) return visit(Tile128x128());
  if (rows > 64 && blocks(128, 64) >= ENOUGH_BLOCKS) return visit(Tile128x64());
  visit(Tile64x64());
}

// forward and input gradient ---------------------------------------------------------------------------------------

// Brings the pixels that taps meet, and weights. A thread has the same chunk of all its lines, so that it follows one
// tap only, and each of its pixels is found once. Rows and columns beyond the last repeat others, and are not stored.
template <class T, class Tile, bool BACKWARD, int VECTOR>
class TapCopier {
 public:
  using Element = T;
  using A = Operand<T, Tile::HEIGHT, false, Tile::THREADS>;
  using B = Operand<T, Tile::WIDTH, !BACKWARD, Tile::THREADS>;

  __device__ TapCopier(const T* x, const T* w, const Correlation& o, int row0, int column0)
      : o_(o),
        x_(x),
        w_(w),
        tap_(digits(A::column(), o.columns.taps, o.C)),
        step_(digits(DEPTH<T>, o.columns.taps, o.C)),
        depth_(B::row()) {
    const int last = o.outputs() - 1, row = row0 + A::row();
    const Digits stride = digits(A::STRIDE, o.rows.outputs, o.columns.outputs);
    Digits output = digits(min(row, last), o.rows.outputs, o.columns.outputs);
#pragma unroll
    for (int i = 0; i < A::COUNT; i++) {
      h_[i] = o.rows.input + output.mid * o.rows.stride;
      v_[i] = o.columns.input + output.low * o.columns.stride;
      pixel_[i] = (output.high * o.H + h_[i]) * o.W + v_[i];
      if (row + (i + 1) * A::STRIDE <= last) output.advance(stride, o.rows.outputs, o.columns.outputs);
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
      column_[i] = BACKWARD ? min(column0 + B::row() + i * B::STRIDE, o.K - 1) : column0 + B::column();
  }

  __device__ void bring(T* a, T* b) {
    Digits tap = tap_;
#pragma unroll
    for (int j = 0; j < CHUNK<T>; j += VECTOR) {
      const bool inside = tap.high < o_.rows.taps;
      const int down = tap.high * o_.rows.turn, right = tap.mid * o_.columns.turn;
#pragma unroll
      for (int i = 0; i < A::COUNT; i++)
        copy<VECTOR>(A::place(a, i) + j, x_ + (i64(pixel_[i] + down * o_.W + right) * o_.C + tap.low),
                     inside && within(h_[i] + down, o_.H) && within(v_[i] + right, o_.W));
      if constexpr (BACKWARD) {
        const int r = o_.rows.first + tap.high * o_.rows.every, s = o_.columns.first + tap.mid * o_.columns.every;
        const T* weight = w_ + ((r * o_.S + s) * o_.w_tap + tap.low);
#pragma unroll
        for (int i = 0; i < B::COUNT; i++)
          if (B::takes_part()) copy<VECTOR>(B::place(b, i) + j, weight + column_[i] * o_.w_filter, inside);
      }
      if constexpr (VECTOR == 1) tap.advance({0, 0, 1}, o_.columns.taps, o_.C);
    }
    tap_.advance(step_, o_.columns.taps, o_.C);
    if constexpr (!BACKWARD) {  // w is the matrix (tap and channel, filter) as it lies
#pragma unroll
      for (int i = 0; i < B::COUNT; i++) {
        const int depth = depth_ + i * B::STRIDE;
#pragma unroll
        for (int j = 0; j < CHUNK<T>; j += VECTOR)
          if (B::takes_part())
            copy<VECTOR>(B::place(b, i) + j, w_ + (i64(depth) * o_.K + min(column_[0] + j, o_.K - VECTOR)),
                         depth < o_.depth());
      }
      depth_ += DEPTH<T>;
    }
  }

 private:
  static constexpr int COLUMNS = BACKWARD ? B::COUNT : 1;
  const Correlation& o_;
  const T *x_, *w_;
  Digits tap_, step_;
  int depth_;
  int h_[A::COUNT], v_[A::COUNT], pixel_[A::COUNT], column_[COLUMNS];
};

// What a block of correlate needs of shared memory: its stages, and later its sums, on their way to whole chunks of y.
// With rows 8 longer no two lanes of half a warp store to a bank.
template <class Tile>
constexpr int SUMS_PITCH = Tile::WIDTH + 8;

template <class Copier>
constexpr int STAGE_BYTES = STAGES * (Copier::A::SIZE + Copier::B::SIZE) * sizeof(typename Copier::Element);
template <class Tile>
constexpr int SUM_BYTES = Tile::HEIGHT * SUMS_PITCH<Tile> * sizeof(float);
template <class Tile, class Copier>
constexpr int CORRELATE_BYTES = STAGE_BYTES<Copier> > SUM_BYTES<Tile> ? STAGE_BYTES<Copier> : SUM_BYTES<Tile>;

template <class T, class Tile, bool BACKWARD, int VECTOR>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    correlate(T* y, const T* __restrict__ x, const T* __restrict__ w, Epilogue<T> epilogue, Shape s) {
  // Blocks that gather the same pixels follow each other: all columns, then all classes, of one tile of rows.
  const int columns = pieces(BACKWARD ? s.C : s.K, Tile::WIDTH), classes = BACKWARD ? s.stride_h * s.stride_w : 1;
  const int column0 = int(blockIdx.x) % columns * Tile::WIDTH, class_ = int(blockIdx.x) / columns % classes;
  const int row0 = int(blockIdx.x) / columns / classes * Tile::HEIGHT;
  const Correlation o =
      BACKWARD ? backward_correlation(s, class_ / s.stride_w, class_ % s.stride_w) : forward_correlation(s);
  if (row0 >= o.outputs()) return;  // classes differ by a row and a column of each image

  SmemArena arena;
  using Copier = TapCopier<T, Tile, BACKWARD, VECTOR>;
  T* const shared = arena.take<T>(CORRELATE_BYTES<Tile, Copier> / int(sizeof(T)));
  Sums<Tile> sum = {};
  const int steps = pieces(o.depth(), DEPTH<T>);
  if (steps > 0) multiply<T, Tile>(sum, Copier(x, w, o, row0, column0), steps, shared);

  __syncthreads();  // whoever still multiplies
  float* const sums = reinterpret_cast<float*>(shared);
  for_pairs<Tile>(sum, [&](int row, int column, const Vector<float, 2>& pair) {
    *reinterpret_cast<Vector<float, 2>*>(sums + row * SUMS_PITCH<Tile> + column) = pair;
  });
  __syncthreads();
  constexpr int VECTORS = Tile::WIDTH / VECTOR, STRIDE = Tile::THREADS / VECTORS;
  const int column = int(threadIdx.x) % VECTORS * VECTOR, k = column0 + column, row = int(threadIdx.x) / VECTORS;
  if (k >= o.K) return;
  const Digits stride = digits(STRIDE, o.rows.outputs, o.columns.outputs);
  Digits output = digits(row0 + row, o.rows.outputs, o.columns.outputs);
  for (int i = row; i < Tile::HEIGHT && output.high < o.N; i += STRIDE) {
    const int p = o.rows.begin + output.mid * o.rows.step, q = o.columns.begin + output.low * o.columns.step;
    const i64 place = i64((output.high * o.P + p) * o.Q + q) * o.K + k;
    auto total = *reinterpret_cast<const Vector<float, VECTOR>*>(sums + i * SUMS_PITCH<Tile> + column);
    finish(total.v, epilogue, place, k);
    Vector<T, VECTOR> result;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) result.v[j] = narrow<T>(total.v[j]);
    *reinterpret_cast<Vector<T, VECTOR>*>(y + place) = result;
    output.advance(stride, o.rows.outputs, o.columns.outputs);
  }
}

template <class T, class Tile, bool BACKWARD, int VECTOR>
void launch_tile(const char* op, T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Shape& s, i64 rows,
                 i64 classes) {
  const i64 blocks = ceil_div(rows, Tile::HEIGHT) * classes * pieces(BACKWARD ? s.C : s.K, Tile::WIDTH);
  launch(op, correlate<T, Tile, BACKWARD, VECTOR>, dim3(unsigned(blocks)), dim3(Tile::THREADS),
         CORRELATE_BYTES<Tile, TapCopier<T, Tile, BACKWARD, VECTOR>>, current_stream(), y, x, w, epilogue, s);
}

template <class T, bool BACKWARD>
void launch_correlate(const char* op, T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Shape& s) {
  const int C = BACKWARD ? s.K : s.C, K = BACKWARD ? s.C : s.K;
  const i64 rows = BACKWARD ? i64(s.N) * pieces(s.H, s.stride_h) * pieces(s.W, s.stride_w) : i64(s.N) * s.P * s.Q;
  const i64 classes = BACKWARD ? i64(s.stride_h) * s.stride_w : 1;
  if (!in_chunks(x, C) || !in_chunks(w, s.K) || !in_chunks(y, K) || !in_chunks(epilogue.residual, K))
    return launch_tile<T, Tile64x64, BACKWARD, 1>(op, y, x, w, epilogue, s, rows, classes);
  with_tile(rows, K, classes, [&](auto tile) {
    launch_tile<T, decltype(tile), BACKWARD, CHUNK<T>>(op, y, x, w, epilogue, s, rows, classes);
  });
}

// weight gradient --------------------------------------------------------------------------------------------------

// Brings the pixels of x that taps meet, and dy, DEPTH output pixels a step. A thread keeps its row (tap, channel) and
// its column, and goes from pixel to pixel. Columns beyond the last repeat others, and are not stored, nor are the
// rows.
template <class T, class Tile, int VECTOR>
class PixelCopier {
 public:
  using Element = T;
  using A = Operand<T, Tile::HEIGHT, true, Tile::THREADS>;
  using B = Operand<T, Tile::WIDTH, true, Tile::THREADS>;

  __device__ PixelCopier(const T* dy, const T* x, const Shape& s, int row0, int column0, int begin)
      : s_(s),
        x_(x),
        dy_(dy),
        tap_(digits(row0 + A::column(), s.S, s.C)),
        x_pixel_(digits(begin + A::row(), s.P, s.Q)),
        stride_(digits(A::STRIDE, s.P, s.Q)),
        column_(column0 + B::column()),
        y_pixel_(u32(begin + B::row())) {}

  __device__ void bring(T* a, T* b) {
#pragma unroll
    for (int i = 0; i < A::COUNT; i++) {
      Digits tap = tap_;
#pragma unroll
      for (int j = 0; j < CHUNK<T>; j += VECTOR) {
        const int h = x_pixel_.mid * s_.stride_h + tap.high - s_.pad_h;
        const int v = x_pixel_.low * s_.stride_w + tap.mid - s_.pad_w;
        copy<VECTOR>(A::place(a, i) + j, x_ + ((i64(x_pixel_.high * s_.H + h) * s_.W + v) * s_.C + tap.low),
                     x_pixel_.high < s_.N && tap.high < s_.R && within(h, s_.H) && within(v, s_.W));
        if constexpr (VECTOR == 1) tap.advance({0, 0, 1}, s_.S, s_.C);
      }
      x_pixel_.advance(stride_, s_.P, s_.Q);
    }
#pragma unroll
    for (int i = 0; i < B::COUNT; i++) {
      const u32 pixel = y_pixel_ + i * B::STRIDE;
#pragma unroll
      for (int j = 0; j < CHUNK<T>; j += VECTOR)
        if (B::takes_part())
          copy<VECTOR>(B::place(b, i) + j, dy_ + (i64(pixel) * s_.K + min(column_ + j, s_.K - VECTOR)),
                       pixel < u32(s_.N * s_.P * s_.Q));
    }
    y_pixel_ += DEPTH<T>;
  }

 private:
  const Shape& s_;
  const T *x_, *dy_;
  Digits tap_, x_pixel_, stride_;
  int column_;
  u32 y_pixel_;  // may pass the end by DEPTH
};

template <class T, class Tile, int VECTOR>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    weight_gradient(float* __restrict__ dw, const T* __restrict__ dy, const T* __restrict__ x, Shape s,
                    int part_steps) {
  const int rows = s.R * s.S * s.C, columns = pieces(s.K, Tile::WIDTH), tiles = pieces(rows, Tile::HEIGHT) * columns;
  const int part = int(blockIdx.x) / tiles, tile = int(blockIdx.x) % tiles;
  const int row0 = tile / columns * Tile::HEIGHT, column0 = tile % columns * Tile::WIDTH;
  const int begin = part * part_steps, steps = min(part_steps, pieces(s.N * s.P * s.Q, DEPTH<T>) - begin);

  using Copier = PixelCopier<T, Tile, VECTOR>;
  SmemArena arena;
  T* const shared = arena.take<T>(STAGE_BYTES<Copier> / int(sizeof(T)));
  Sums<Tile> sum = {};
  if (steps > 0) multiply<T, Tile>(sum, Copier(dy, x, s, row0, column0, begin * DEPTH<T>), steps, shared);

  // Four neighbouring lanes have 32 bytes of a row, the least that memory moves: from the registers is well enough.
  for_pairs<Tile>(sum, [&](int row, int column, const Vector<float, 2>& pair) {
    row += row0, column += column0;
    float* const to = dw + (i64(part) * rows + row) * s.K + column;
    if (row >= rows || column >= s.K) return;
    if constexpr (VECTOR > 1) {
      *reinterpret_cast<Vector<float, 2>*>(to) = pair;
    } else {
      to[0] = pair.v[0];
      if (column + 1 < s.K) to[1] = pair.v[1];
    }
  });
}

constexpr int SHORTEST_PART = 512;  // pixels; of shorter ones, storing and adding the sums would show

template <class T, class Tile, int VECTOR>
void launch_weight_gradient(const char* op, float* dw, const T* dy, const T* x, const Shape& s) {
  const int n = s.R * s.S * s.C * s.K, pixels = s.N * s.P * s.Q;
  const int tiles = pieces(s.R * s.S * s.C, Tile::HEIGHT) * pieces(s.K, Tile::WIDTH);
  const Parts parts = cut(pieces(pixels, DEPTH<T>), min(ceil_div(ENOUGH_BLOCKS, tiles), i64(pixels / SHORTEST_PART)));
  const Scratch<float> partial(parts.count > 1 ? i64(parts.count) * n : 0);
  using Copier = PixelCopier<T, Tile, VECTOR>;
  launch(op, weight_gradient<T, Tile, VECTOR>, dim3(unsigned(i64(parts.count) * tiles)), dim3(Tile::THREADS),
         STAGE_BYTES<Copier>, current_stream(), parts.count > 1 ? partial.get() : dw, dy, x, s, parts.length);
  if (parts.count > 1) launch_sum_parts(op, dw, partial.get(), parts.count, n);
}

}  // namespace

template <class T>
void forward(const char* op, T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Shape& s) {
  launch_correlate<T, false>(op, y, x, w, epilogue, s);
}

template <class T>
void backward_input(const char* op, T* dx, const T* dy, const T* w, const Shape& s, bool add) {
  launch_correlate<T, true>(op, dx, dy, w, {nullptr, add ? dx : nullptr, false}, s);
}

template <class T>
void backward_weight(const char* op, Wide<T>* dw, const T* dy, const T* x, const Shape& s) {
  if (!in_chunks(x, s.C) || !in_chunks(dy, s.K) || !in_chunks(dw, s.K))
    return launch_weight_gradient<T, Tile64x64, 1>(op, dw, dy, x, s);
  const i64 parts = max(1, s.N * s.P * s.Q / SHORTEST_PART);
  with_tile(s.R * s.S * s.C, s.K, parts,
            [&](auto tile) { launch_weight_gradient<T, decltype(tile), CHUNK<T>>(op, dw, dy, x, s); });
}

template void forward(const char*, float*, const float*, const float*, const Epilogue<float>&, const Shape&);
template void forward(const char*, bf16*, const bf16*, const bf16*, const Epilogue<bf16>&, const Shape&);
template void backward_input(const char*, float*, const float*, const float*, const Shape&, bool);
template void backward_input(const char*, bf16*, const bf16*, const bf16*, const Shape&, bool);
template void backward_weight(const char*, float*, const float*, const float*, const Shape&);
template void backward_weight(const char*, float*, const bf16*, const bf16*, const Shape&);

}  // namespace tinyres::mma
