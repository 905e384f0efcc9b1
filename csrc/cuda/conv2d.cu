// 2-D convolution (cross-correlation) and its two gradients, NHWC activations and RSCK weights:
//
//   y[n, p, q, k] = sum over r, s, c of x[n, p * stride_h + r - pad_h, q * stride_w + s - pad_w, c] * w[r, s, c, k]
//
// `naive` is that formula and its two derivatives, one thread an output. `tiled` reads each as a matrix product whose
// left matrix is gathered on the way (implicit GEMM: Chetlur et al. 2014, cuDNN, section 3):
//
//                     rows          columns   summed over
//   forward           N * P * Q     K         R * S * C
//   input gradient    N * H * W     C         R * S * K
//   weight gradient   R * S * C     K         N * P * Q
//
// A block makes a tile of HEIGHT by 16, 32 or 64 outputs, so that the few filters of small networks waste no columns.
// Per step it brings DEPTH of the summed positions of both matrices to shared memory, where a number loaded once
// serves a whole row or column of the tile; each thread holds 8 by 4 sums in registers, 32 multiply-adds for every 12
// numbers read from shared memory. What differs between the three products is the loader that gathers. It brings zeros
// for what lies outside of an image: an infinite weight, or dy in the weight gradient, then gives NaN there, as it
// would with a padded x.
//
//   N batch, H W input size, C channels, K filters, R S window, P Q output size.
#include "conv2d_mma.h"
#include "conv3x3.h"
#include "correlation.h"

namespace tinyres {
namespace {

constexpr int NAIVE_THREADS = 256;
constexpr int SHORTEST_PART = 128;  // pixels, of the weight gradient

// Which kernels are called: what `automatic` is, by the type of the elements, and who stands in for whom.
//
//   automatic   is       because
//   bf16        direct   Products are exact on tensor cores, and sums are float. In bytes from memory or the L2 cache
//   an
//                        intensity of 75 to 120 (csrc/README.md), where mma has 14, 26 and 43 at 16, 32 and 64
//                        channels.
//   float       tiled    Products of float32 as it is; direct and mma would round the operands to tf32's 11 bits, which
//                        is for whoever asks to allow (precision="tf32": then direct it is).
//   double      tiled    Written for gradient checks: the plainest sums, whatever direct's double mma might gain.
//
//   asked for   taken where                                             elsewhere
//   direct      3x3 window, padding 1, stride 1 or 2; 16, 32 or 64      mma, the stem and 1x1 convolutions among it,
//               channels on each side; arrays aligned to 16 bytes;      which gathers whatever shape there is
//               no bias, residual or ReLU behind it
//   mma         float, bf16                                             tiled: there are no fragments of double
//   tiled       everything                                              that also for what only a CPU has
//   naive       everything
//
// The bytes are counted (benchmarks/traffic.py); no GPU has been asked yet. benchmarks/kernels.py does.
template <class T>
constexpr bool HAS_MMA = sizeof(T) <= 4;

template <class T>
ConvAlgorithm algorithm_for(ConvAlgorithm asked, bool direct_fits) {
  ConvAlgorithm a = asked;
  if (a == ConvAlgorithm::automatic) a = sizeof(T) == 2 ? ConvAlgorithm::direct : ConvAlgorithm::tiled;
  if (a == ConvAlgorithm::direct && !direct_fits) a = ConvAlgorithm::mma;
  if (a == ConvAlgorithm::mma && !HAS_MMA<T>) a = ConvAlgorithm::tiled;
  return a;
}

// naive ------------------------------------------------------------------------------------------------------------

template <class T>
__global__ void naive_forward(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ w, Epilogue<T> epilogue,
                              Shape s) {
  const i64 i = i64(blockIdx.x) * NAIVE_THREADS + threadIdx.x;
  if (i >= i64(s.N) * s.P * s.Q * s.K) return;
  const int pixel = int(i / s.K), k = int(i % s.K);
  const int n = pixel / s.Q / s.P, p = pixel / s.Q % s.P, q = pixel % s.Q;
  Wide<T> sum = 0;
  for (int r = 0; r < s.R; r++) {
    for (int u = 0; u < s.S; u++) {
      const int h = p * s.stride_h + r - s.pad_h, v = q * s.stride_w + u - s.pad_w;
      if (!within(h, s.H) || !within(v, s.W)) continue;
      const T* from = x + i64((n * s.H + h) * s.W + v) * s.C;
      const T* tap = w + (r * s.S + u) * s.C * s.K + k;
      for (int c = 0; c < s.C; c++) sum += wide(from[c]) * wide(tap[c * s.K]);
    }
  }
  y[i] = narrow<T>(finish(sum, epilogue, i, k));
}

// x[h] met w[r] in y[p] where p * stride + r = h + pad: only where the stride divides h + pad - r.
template <class T>
__global__ void naive_backward_input(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ w, Shape s,
                                     bool add) {
  const i64 i = i64(blockIdx.x) * NAIVE_THREADS + threadIdx.x;
  if (i >= i64(s.N) * s.H * s.W * s.C) return;
  const int pixel = int(i / s.C), c = int(i % s.C);
  const int n = pixel / s.W / s.H, h = pixel / s.W % s.H, v = pixel % s.W;
  Wide<T> sum = add ? wide(dx[i]) : Wide<T>(0);
  for (int r = 0; r < s.R; r++) {
    for (int u = 0; u < s.S; u++) {
      const int down = h + s.pad_h - r, right = v + s.pad_w - u;
      if (down % s.stride_h != 0 || right % s.stride_w != 0) continue;
      const int p = down / s.stride_h, q = right / s.stride_w;
      if (!within(p, s.P) || !within(q, s.Q)) continue;
      const T* from = dy + i64((n * s.P + p) * s.Q + q) * s.K;
      const T* tap = w + ((r * s.S + u) * s.C + c) * s.K;
      for (int k = 0; k < s.K; k++) sum += wide(from[k]) * wide(tap[k]);
    }
  }
  dx[i] = narrow<T>(sum);
}

// The rows of y are cut into parts.
template <class T>
__global__ void naive_backward_weight(Wide<T>* __restrict__ dw, const T* __restrict__ dy, const T* __restrict__ x,
                                      Shape s, int part_rows) {
  const int weights = s.R * s.S * s.C * s.K, blocks = pieces(weights, NAIVE_THREADS), part = int(blockIdx.x) / blocks;
  const i64 i = i64(blockIdx.x % blocks) * NAIVE_THREADS + threadIdx.x;
  if (i >= weights) return;
  const int k = int(i) % s.K, c = int(i) / s.K % s.C, tap = int(i) / s.K / s.C, r = tap / s.S, u = tap % s.S;
  const int begin = part * part_rows, end = begin + min(part_rows, s.N * s.P - begin);
  Wide<T> sum = 0;
  for (int row = begin; row < end; row++) {
    const int n = row / s.P, h = row % s.P * s.stride_h + r - s.pad_h;
    if (!within(h, s.H)) continue;
    for (int q = 0; q < s.Q; q++) {
      const int v = q * s.stride_w + u - s.pad_w;
      if (!within(v, s.W)) continue;
      sum += wide(x[i64((n * s.H + h) * s.W + v) * s.C + c]) * wide(dy[i64(row * s.Q + q) * s.K + k]);
    }
  }
  dw[i64(part) * weights + i] = sum;
}

// tiled: the product ------------------------------------------------------------------------------------------------

constexpr int HEIGHT = 64, DEPTH = 16, ROWS = 8, COLUMNS = 4;

template <int WIDTH>
constexpr int THREADS = HEIGHT * WIDTH / (ROWS * COLUMNS);

// Four neighbouring elements, moved at once where they are aligned.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
  T v[4];
};

template <class T>
__device__ inline Quad<T>& quad_at(T* p) {
  return *reinterpret_cast<Quad<T>*>(p);
}
template <class T>
__device__ inline const Quad<T>& quad_at(const T* p) {
  return *reinterpret_cast<const Quad<T>*>(p);
}

template <class T>
__device__ inline Quad<Wide<T>> widened(const Quad<T>& x) {
  return {{wide(x.v[0]), wide(x.v[1]), wide(x.v[2]), wide(x.v[3])}};
}

// Elements j to j + VECTOR of a quad; zeros where they are not valid.
template <int VECTOR, class T>
__device__ inline void load(Quad<T>& quad, int j, const T* from, bool valid) {
  if constexpr (VECTOR == 4)
    quad = valid ? quad_at(from) : Quad<T>{};
  else
    quad.v[j] = valid ? *from : T{};
}

// The first `count` of four sums. With vectors of 4, four or none.
template <int VECTOR, class T>
__device__ inline void store(T* to, const Wide<T> (&sum)[4], int count) {
  Quad<T> quad;
#pragma unroll
  for (int j = 0; j < 4; j++) quad.v[j] = narrow<T>(sum[j]);
  if constexpr (VECTOR == 4) {
    if (count > 0) quad_at(to) = quad;
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (j < count) to[j] = quad.v[j];
  }
}

// The first of a thread's ROWS by COLUMNS outputs in a tile. Threads are numbered along squares of two by two, so that
// each asks shared memory for the same quad as the next thread or the next but one: such reads are served together.
template <int WIDTH>
struct Patch {
  int row, column;

  __device__ Patch() {
    constexpr int SQUARES = WIDTH / COLUMNS / 2;
    const int t = int(threadIdx.x), square = t / 4;
    row = (square / SQUARES * 2 + t / 2 % 2) * ROWS;
    column = (square % SQUARES * 2 + t % 2) * COLUMNS;
  }
};

// Sums the products of all steps. While one pair of tiles is multiplied, the next is on its way into registers, from
// where it goes to the other half of shared memory: each step needs a single barrier.
template <class T, int WIDTH, class Loader>
__device__ void multiply(Wide<T> (&sum)[ROWS][COLUMNS], Loader loader, int steps) {
  // Rows are 4 longer than the tile: TapLoader's writes, to rows four apart, then meet two in a bank, not four.
  SHARED(a, Wide<T>[2][DEPTH][HEIGHT + 4]);
  SHARED(b, Wide<T>[2][DEPTH][WIDTH + 4]);
  const Patch<WIDTH> patch;
  loader.fetch();
  loader.put(a[0], b[0]);
  for (int step = 0; step < steps; step++) {
    const int now = step % 2;
    const bool more = step + 1 < steps;
    __syncthreads();
    if (more) loader.fetch();
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const Quad<Wide<T>> above = quad_at(&a[now][d][patch.row]), below = quad_at(&a[now][d][patch.row + 4]);
      const Quad<Wide<T>> right = quad_at(&b[now][d][patch.column]);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          sum[i][j] += above.v[i] * right.v[j];
          sum[i + 4][j] += below.v[i] * right.v[j];
        }
    }
    if (more) loader.put(a[1 - now], b[1 - now]);
  }
}

// The narrowest tile that takes all columns, or the widest: wider ones use what they gather more often.
int tile_width(int columns) { return columns > 32 ? 64 : columns > 16 ? 32 : 16; }

// Whether rows of that length starting at p consist of aligned quads.
template <class T>
bool in_quads(const T* p, int length) {
  return length % 4 == 0 && reinterpret_cast<std::uintptr_t>(p) % alignof(Quad<T>) == 0;
}

// tiled: forward and input gradient ---------------------------------------------------------------------------------

// Gathers tiles of the pixels that taps meet, and of weights. A thread loads the same four of every DEPTH positions
// (tap, channel) for all its rows, so that it follows one tap only, and each of its pixels is found once. Rows and
// filters beyond the last repeat others, and are not stored.
template <class T, int WIDTH, int VECTOR>
class TapLoader {
  static constexpr int QUADS = DEPTH / 4;                // neighbouring threads take these
  static constexpr int STRIDE = THREADS<WIDTH> / QUADS;  // and these rows
  static constexpr int PIXELS = HEIGHT / STRIDE, FILTERS = WIDTH / STRIDE;

 public:
  __device__ TapLoader(const T* x, const T* w, const Correlation& o, int row0, int column0)
      : o_(o),
        x_(x),
        w_(w),
        tap_(digits(int(threadIdx.x) % QUADS * 4, o.columns.taps, o.C)),
        step_(digits(DEPTH, o.columns.taps, o.C)) {
    const int last = o.outputs() - 1, row = row0 + int(threadIdx.x) / QUADS, filter = column0 + row - row0;
    const Digits stride = digits(STRIDE, o.rows.outputs, o.columns.outputs);
    Digits output = digits(min(row, last), o.rows.outputs, o.columns.outputs);
#pragma unroll
    for (int i = 0; i < PIXELS; i++) {
      h_[i] = o.rows.input + output.mid * o.rows.stride;
      v_[i] = o.columns.input + output.low * o.columns.stride;
      pixel_[i] = (output.high * o.H + h_[i]) * o.W + v_[i];
      if (row + (i + 1) * STRIDE <= last) output.advance(stride, o.rows.outputs, o.columns.outputs);
    }
#pragma unroll
    for (int i = 0; i < FILTERS; i++) filter_[i] = min(filter + i * STRIDE, o.K - 1) * o.w_filter;
  }

  __device__ void fetch() {
    Digits tap = tap_;
#pragma unroll
    for (int j = 0; j < 4; j += VECTOR) {
      const bool valid = tap.high < o_.rows.taps;
      const int down = tap.high * o_.rows.turn, right = tap.mid * o_.columns.turn;
#pragma unroll
      for (int i = 0; i < PIXELS; i++)
        load<VECTOR>(pixels_[i], j, x_ + (i64(pixel_[i] + down * o_.W + right) * o_.C + tap.low),
                     valid && within(h_[i] + down, o_.H) && within(v_[i] + right, o_.W));
      const int r = o_.rows.first + tap.high * o_.rows.every, s = o_.columns.first + tap.mid * o_.columns.every;
      const T* weight = w_ + ((r * o_.S + s) * o_.w_tap + tap.low * o_.w_channel);
#pragma unroll
      for (int i = 0; i < FILTERS; i++)
#pragma unroll
        for (int v = 0; v < VECTOR; v++) load<1>(weights_[i], j + v, weight + (filter_[i] + v * o_.w_channel), valid);
      tap.advance({0, 0, 1}, o_.columns.taps, o_.C);
    }
    tap_.advance(step_, o_.columns.taps, o_.C);
  }

  __device__ void put(Wide<T> (&a)[DEPTH][HEIGHT + 4], Wide<T> (&b)[DEPTH][WIDTH + 4]) const {
    const int d = int(threadIdx.x) % QUADS * 4, row = int(threadIdx.x) / QUADS;
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int i = 0; i < PIXELS; i++) a[d + j][row + i * STRIDE] = wide(pixels_[i].v[j]);
#pragma unroll
      for (int i = 0; i < FILTERS; i++) b[d + j][row + i * STRIDE] = wide(weights_[i].v[j]);
    }
  }

 private:
  const Correlation& o_;
  const T *x_, *w_;
  Digits tap_, step_;
  int h_[PIXELS], v_[PIXELS], pixel_[PIXELS], filter_[FILTERS];
  Quad<T> pixels_[PIXELS], weights_[FILTERS];
};

template <class T, int WIDTH, int VECTOR>
__global__ void __launch_bounds__(THREADS<WIDTH>)
    correlate(T* y, const T* __restrict__ x, const T* __restrict__ w, Epilogue<T> epilogue, Shape s, bool backward) {
  // Blocks that gather the same pixels follow each other: all columns, then all classes, of one tile of rows.
  const int columns = pieces(backward ? s.C : s.K, WIDTH), classes = backward ? s.stride_h * s.stride_w : 1;
  const int column0 = int(blockIdx.x) % columns * WIDTH, class_ = int(blockIdx.x) / columns % classes;
  const int row0 = int(blockIdx.x) / columns / classes * HEIGHT;
  const Correlation o =
      backward ? backward_correlation(s, class_ / s.stride_w, class_ % s.stride_w) : forward_correlation(s);
  if (row0 >= o.outputs()) return;  // classes differ by a row and a column of each image

  Wide<T> sum[ROWS][COLUMNS] = {};
  const int steps = pieces(o.depth(), DEPTH);
  if (steps > 0) multiply<T, WIDTH>(sum, TapLoader<T, WIDTH, VECTOR>(x, w, o, row0, column0), steps);

  const Patch<WIDTH> patch;
  const int k = column0 + patch.column;
  Digits output = digits(row0 + patch.row, o.rows.outputs, o.columns.outputs);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (output.high >= o.N) break;
    const int p = o.rows.begin + output.mid * o.rows.step, q = o.columns.begin + output.low * o.columns.step;
    const i64 place = i64((output.high * o.P + p) * o.Q + q) * o.K + k;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
      if (k + j < o.K) sum[i][j] = finish(sum[i][j], epilogue, place + j, k + j);
    store<VECTOR>(y + place, sum[i], o.K - k);
    output.advance({0, 0, 1}, o.rows.outputs, o.columns.outputs);
  }
}

template <class T>
void launch_correlate(const char* op, T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Shape& s,
                      bool backward) {
  const int C = backward ? s.K : s.C, K = backward ? s.C : s.K, width = tile_width(K);
  const bool quads = in_quads(x, C) && in_quads(y, K);
  const auto kernel = width == 64   ? (quads ? correlate<T, 64, 4> : correlate<T, 64, 1>)
                      : width == 32 ? (quads ? correlate<T, 32, 4> : correlate<T, 32, 1>)
                                    : (quads ? correlate<T, 16, 4> : correlate<T, 16, 1>);
  const i64 rows = backward ? i64(s.N) * pieces(s.H, s.stride_h) * pieces(s.W, s.stride_w) : i64(s.N) * s.P * s.Q;
  const i64 classes = backward ? i64(s.stride_h) * s.stride_w : 1;
  const i64 blocks = ceil_div(rows, HEIGHT) * classes * pieces(K, width);
  launch(op, kernel, dim3(unsigned(blocks)), dim3(unsigned(HEIGHT * width / (ROWS * COLUMNS))), 0, current_stream(), y,
         x, w, epilogue, s, backward);
}

template <class T>
void conv2d_forward(T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Window& window,
                    ConvAlgorithm algorithm) {
  const char* op = "conv2d_forward";
  const Shape s = shape_of(op, window);
  const i64 n = i64(s.N) * s.P * s.Q * s.K;
  if (n == 0) return;
  const bool plain = !epilogue.bias && !epilogue.residual && !epilogue.relu;
  algorithm = algorithm_for<T>(algorithm, plain && direct::takes(window, {y, x, w}));
  if (algorithm == ConvAlgorithm::direct) return direct::forward(op, y, x, w, window);
  if constexpr (HAS_MMA<T>)
    if (algorithm == ConvAlgorithm::mma) return mma::forward(op, y, x, w, epilogue, s);
  if (algorithm == ConvAlgorithm::naive)
    launch(op, naive_forward<T>, dim3(unsigned(ceil_div(n, NAIVE_THREADS))), dim3(NAIVE_THREADS), 0, current_stream(),
           y, x, w, epilogue, s);
  else
    launch_correlate(op, y, x, w, epilogue, s, false);
}

template <class T>
void conv2d_backward_input(T* dx, const T* dy, const T* w, const Window& window, ConvAlgorithm algorithm, bool add) {
  const char* op = "conv2d_backward_input";
  const Shape s = shape_of(op, window);
  const i64 n = i64(s.N) * s.H * s.W * s.C;
  if (n == 0) return;
  algorithm = algorithm_for<T>(algorithm, direct::takes(window, {dx, dy, w}));
  if (algorithm == ConvAlgorithm::direct) return direct::backward_input(op, dx, dy, w, window, add);
  if constexpr (HAS_MMA<T>)
    if (algorithm == ConvAlgorithm::mma) return mma::backward_input(op, dx, dy, w, s, add);
  if (algorithm == ConvAlgorithm::naive)
    launch(op, naive_backward_input<T>, dim3(unsigned(ceil_div(n, NAIVE_THREADS))), dim3(NAIVE_THREADS), 0,
           current_stream(), dx, dy, w, s, add);
  else
    launch_correlate(op, dx, dy, w, {nullptr, add ? dx : nullptr, false}, s, true);
}

// tiled: weight gradient --------------------------------------------------------------------------------------------

// Gathers tiles of the pixels of x that taps meet, and of dy, DEPTH output pixels a step. A thread keeps its four rows
// (tap, channel), neighbours along the channels, and goes from pixel to pixel. Rows and columns beyond the last repeat
// others, and are not stored.
template <class T, int WIDTH, int VECTOR>
class PixelLoader {
  static constexpr int X_QUADS = HEIGHT / 4, X_STRIDE = THREADS<WIDTH> / X_QUADS, X_PIXELS = DEPTH / X_STRIDE;
  static constexpr int Y_QUADS = WIDTH / 4, Y_STRIDE = THREADS<WIDTH> / Y_QUADS, Y_PIXELS = DEPTH / Y_STRIDE;

 public:
  __device__ PixelLoader(const T* dy, const T* x, const Shape& s, int row0, int column0, int begin)
      : s_(s),
        x_(x),
        dy_(dy),
        column_(column0 + int(threadIdx.x) % Y_QUADS * 4),
        y_pixel_(begin + int(threadIdx.x) / Y_QUADS),
        x_pixel_(digits(begin + int(threadIdx.x) / X_QUADS, s.P, s.Q)),
        stride_(digits(X_STRIDE, s.P, s.Q)) {
#pragma unroll
    for (int j = 0; j < 4; j += VECTOR) {
      const int row = row0 + int(threadIdx.x) % X_QUADS * 4 + j;
      const Digits tap = digits(min(row, s.R * s.S * s.C - VECTOR), s.S, s.C);
      down_[j] = tap.high - s.pad_h;
      right_[j] = tap.mid - s.pad_w;
      offset_[j] = (i64(down_[j]) * s.W + right_[j]) * s.C + tap.low;
    }
  }

  __device__ void fetch() {
#pragma unroll
    for (int i = 0; i < X_PIXELS; i++) {
      const int h = x_pixel_.mid * s_.stride_h, v = x_pixel_.low * s_.stride_w;
      const i64 at = (i64(x_pixel_.high * s_.H + h) * s_.W + v) * s_.C;
#pragma unroll
      for (int j = 0; j < 4; j += VECTOR)
        load<VECTOR>(x_quads_[i], j, x_ + (at + offset_[j]),
                     x_pixel_.high < s_.N && within(h + down_[j], s_.H) && within(v + right_[j], s_.W));
      x_pixel_.advance(stride_, s_.P, s_.Q);
    }
#pragma unroll
    for (int i = 0; i < Y_PIXELS; i++, y_pixel_ += Y_STRIDE)
#pragma unroll
      for (int j = 0; j < 4; j += VECTOR)
        load<VECTOR>(y_quads_[i], j, dy_ + (i64(y_pixel_) * s_.K + min(column_ + j, s_.K - VECTOR)),
                     y_pixel_ < u32(s_.N * s_.P * s_.Q));
  }

  __device__ void put(Wide<T> (&a)[DEPTH][HEIGHT + 4], Wide<T> (&b)[DEPTH][WIDTH + 4]) const {
    const int t = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < X_PIXELS; i++) quad_at(&a[t / X_QUADS + i * X_STRIDE][t % X_QUADS * 4]) = widened(x_quads_[i]);
#pragma unroll
    for (int i = 0; i < Y_PIXELS; i++) quad_at(&b[t / Y_QUADS + i * Y_STRIDE][t % Y_QUADS * 4]) = widened(y_quads_[i]);
  }

 private:
  const Shape& s_;
  const T *x_, *dy_;
  int column_;
  u32 y_pixel_;  // may pass the end by DEPTH
  Digits x_pixel_, stride_;
  int down_[4], right_[4];
  i64 offset_[4];
  Quad<T> x_quads_[X_PIXELS], y_quads_[Y_PIXELS];
};

template <class T, int WIDTH, int VECTOR>
__global__ void __launch_bounds__(THREADS<WIDTH>)
    tiled_backward_weight(Wide<T>* __restrict__ dw, const T* __restrict__ dy, const T* __restrict__ x, Shape s,
                          int part_steps) {
  const int rows = s.R * s.S * s.C, columns = pieces(s.K, WIDTH), tiles = pieces(rows, HEIGHT) * columns;
  const int part = int(blockIdx.x) / tiles, tile = int(blockIdx.x) % tiles;
  const int row0 = tile / columns * HEIGHT, column0 = tile % columns * WIDTH;
  const int begin = part * part_steps, steps = min(part_steps, pieces(s.N * s.P * s.Q, DEPTH) - begin);

  Wide<T> sum[ROWS][COLUMNS] = {};
  if (steps > 0) multiply<T, WIDTH>(sum, PixelLoader<T, WIDTH, VECTOR>(dy, x, s, row0, column0, begin * DEPTH), steps);

  const Patch<WIDTH> patch;
  const int k = column0 + patch.column;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = row0 + patch.row + i;
    if (row < rows) store<VECTOR>(dw + (i64(part) * rows + row) * s.K + k, sum[i], s.K - k);
  }
}

template <class T>
void conv2d_backward_weight(Wide<T>* dw, const T* dy, const T* x, const Window& window, ConvAlgorithm algorithm) {
  const char* op = "conv2d_backward_weight";
  const Shape s = shape_of(op, window);
  const int n = s.R * s.S * s.C * s.K, pixels = s.N * s.P * s.Q;
  if (n == 0) return;
  algorithm = algorithm_for<T>(algorithm, direct::takes(window, {dy, x}));
  if (algorithm == ConvAlgorithm::direct) return direct::backward_weight(op, dw, dy, x, window);
  if constexpr (HAS_MMA<T>)
    if (algorithm == ConvAlgorithm::mma) return mma::backward_weight(op, dw, dy, x, s);
  const bool naive = algorithm == ConvAlgorithm::naive;
  const int width = tile_width(s.K), threads = naive ? NAIVE_THREADS : HEIGHT * width / (ROWS * COLUMNS);
  const int blocks = naive ? pieces(n, threads) : pieces(s.R * s.S * s.C, HEIGHT) * pieces(s.K, width);

  // The steps are rows or DEPTH pixels. Parts, with `blocks` blocks each, until there are threads enough for a large
  // GPU (naive ones do a 32nd of the work), or parts so short that storing their sums would show.
  const i64 wanted = (naive ? 1 << 18 : 1 << 15) / (i64(blocks) * threads);
  const Parts parts = cut(naive ? s.N * s.P : pieces(pixels, DEPTH), min(wanted, i64(pixels / SHORTEST_PART)));
  Scratch<Wide<T>> partial(parts.count > 1 ? i64(parts.count) * n : 0);
  Wide<T>* to = parts.count > 1 ? partial.get() : dw;

  const bool quads = in_quads(x, s.C) && in_quads(dy, s.K) && in_quads(to, s.K);
  const auto kernel = naive         ? naive_backward_weight<T>
                      : width == 64 ? (quads ? tiled_backward_weight<T, 64, 4> : tiled_backward_weight<T, 64, 1>)
                      : width == 32 ? (quads ? tiled_backward_weight<T, 32, 4> : tiled_backward_weight<T, 32, 1>)
                                    : (quads ? tiled_backward_weight<T, 16, 4> : tiled_backward_weight<T, 16, 1>);
  launch(op, kernel, dim3(unsigned(i64(parts.count) * blocks)), dim3(unsigned(threads)), 0, current_stream(), to, dy, x,
         s, parts.length);
  if (parts.count > 1) launch_sum_parts(op, dw, partial.get(), parts.count, n);
}

}  // namespace

template <class T>
void conv2d_kernels(Kernels<T>& table) {
  table.conv2d_forward = conv2d_forward<T>;
  table.conv2d_backward_input = conv2d_backward_input<T>;
  table.conv2d_backward_weight = conv2d_backward_weight<T>;
}
template void conv2d_kernels<float>(Kernels<float>&);
template void conv2d_kernels<double>(Kernels<double>&);
template void conv2d_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
