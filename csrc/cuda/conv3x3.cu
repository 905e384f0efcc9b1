// 3x3 convolutions of 16, 32 or 64 channels, padding 1, stride 1 or 2, fused with what stands around them in a residual
// block: batch norm, ReLU and the shortcut, forward and backward.
//
//   y[n, p, q, k] = sum over r, s, c of u[n, p * stride + r - 1, q * stride + s - 1, c] * w[r, s, c, k]
//
// Layers this narrow do little arithmetic for every byte, so the aim is to touch each array once. A pass of its own
// over memory that batch norm would take is folded into its neighbours:
//
//   forward          u = relu(x * scale + shift) as x is loaded; statistics of y as it is stored
//   backward_input   dy = a * dz + b * y + c as dz and y are loaded; ReLU's mask, the shortcut's gradient and the sums
//                    for the next batch norm as dx is stored
//   backward_weight  both transforms, as both operands are loaded
//
// Padding stays zero: it is no pixel of x, and batch norm and ReLU do not apply to it.
//
// How a block works (convolve). It takes tiles of outputs, `pixels` of them: 8 rows by 32, 16 by 16, or several whole
// images. The inputs that these meet, a border of one pixel included, are loaded once, transformed and laid in shared
// memory as [pixel][channel]; there the nine taps are nine starting addresses for ldmatrix. The weights of all taps lie
// beside them from the start. Rows of both are 16 bytes (across k: 8 elements) longer than their channels, so that no
// load meets a bank twice (fragments.h); through stride 2, even columns lie before odd ones, so that the pixels of a
// fragment stay neighbours. Backward is the same walk with the window turned round: the tile is of dy, and the weights
// are read as [c][k], which is how they lie, instead of across. Through stride 2 an input meets only some taps: its
// class, (row % 2, column % 2), decides which, and the tile is walked once for each of the four classes.
//
// What it costs, in bf16 at a batch of 128; registers are those of nvcc 13.0 for sm_90a, forward and backward, and none
// spill. x: bytes of x read for each byte that it has, more than 1 where a tile's border belongs to others too, or
// where two blocks share the filters. A block reads its weights and its batch norm's rows (fused.h) once, from the L2
// cache.
//
//                    tile             warp       blocks x tiles   registers   shared    x      weights   rows
//   16 of 32 x 32    8 x 32 x 16      32 x 16    256 x 2          115, 128    25 KB     1.19    5 KB     34 KB
//   32 of 16 x 16    16 x 16 x 32     32 x 32    128 x 1          202, 207    53 KB     1.00   18 KB     33 KB
//   64 of 8 x 8      2 x 8 x 8 x 32   32 x 32    64 x 2 x 1       203, 198    87 KB     2.00   37 KB     33 KB
//   dw, 16           4 x 32           16 x 16    256 x 4          127         24 KB     1.44   each slab 9 KB
//   dw, 32           8 x 16           16 x 16    128 x 2          160         33 KB     1.13            37 KB
//   dw, 64           2 x 8 x 8        16 x 16    32 x 4 x 2       160         35 KB     2.00           147 KB
//
// tf32 takes twice the bytes. 132 multiprocessors thus have one block each, or two of 16 channels, whose registers and
// shared memory leave room for both. For a product of 16 x 16 x 16 a warp asks shared memory for one fragment where it
// has 32 x 32 sums, for 1.5 where it has 32 x 16 and bytes from memory bound it anyway, and for 1.1 in dw.
//
//   N batch, H W input size, C channels, K filters, P Q output size; `in` and `out` are as the product sees them: in
//   backward_input, in is of dy and out of dx.
#include "conv3x3.h"
#include "conv3x3_tile.h"
#include "correlation.h"

namespace tinyres {
namespace {

constexpr int WARPS = THREADS / WARP;

// How many blocks each multiprocessor is meant to run at once, for that many channels on either side; two share its
// registers.
template <class T>
__host__ __device__ constexpr int blocks_at_once(int in, int out) {
  return sizeof(T) < 8 && in == 16 && out == 16 ? 2 : 1;
}

// ---- a tile of outputs, finished ----------------------------------------------------------------------------------

constexpr int OCTET = 8;  // channels of one pixel, which a thread finishes

template <class T>
using Octet = Pack<T, OCTET>;

// A lane's sums are scattered over rows and columns (fragments.h). Four lanes exchange theirs, so that each has eight
// neighbouring channels of one pixel: row octet_row(), columns octet_column() on.
__device__ inline int octet_row() { return lane() / 4 + lane() % 4 / 2 * 8; }
__device__ inline int octet_column() { return lane() % 2 * 8; }

template <class W>
__device__ inline Octet<W> octet_of(const W (&sum)[2][4]) {
  const bool lower = lane() & 2, right = lane() & 1;
  W mine[2][2], other[2][2];  // [half][column]: of the row that stays here, for the pairs of columns of two lanes
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      mine[half][i] = lower ? sum[half][i + 2] : sum[half][i];
      other[half][i] = __shfl_xor_sync(~0u, lower ? sum[half][i] : sum[half][i + 2], 2);
    }
  Octet<W> out;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // Lanes 0 and 2 hold columns 0 1 and 4 5 of both halves, lanes 1 and 3 the others.
    const W near_low = lower ? other[0][i] : mine[0][i], far_low = lower ? mine[0][i] : other[0][i];
    const W near_high = lower ? other[1][i] : mine[1][i], far_high = lower ? mine[1][i] : other[1][i];
    const W near = __shfl_xor_sync(~0u, right ? near_low : near_high, 1);
    const W far = __shfl_xor_sync(~0u, right ? far_low : far_high, 1);
    out.at[i] = right ? near : near_low;
    out.at[2 + i] = right ? near_high : near;
    out.at[4 + i] = right ? far : far_low;
    out.at[6 + i] = right ? far_high : far;
  }
  return out;
}

// Forward: y is stored, and its statistics are taken before it is rounded.
template <class W>
using Statistics = Moments<W, OCTET>;

template <class T>
__device__ inline void finish(Statistics<Wide<T>>& total, T* y, i64 at, const Octet<Wide<T>>& sum) {
  Octet<T> out;
#pragma unroll
  for (int v = 0; v < OCTET; v++) out.at[v] = narrow<T>(sum.at[v]);
  pack_at<Octet<T>>(y + at) = out;
  total.add(sum);
}

// Backward: dx joined by the shortcut's gradient goes through the ReLU. The sums are of what is stored. before: mean,
// scale and shift, `pitch` of each, from this channel on, of the batch norm that went before.
template <class T, class W = Wide<T>>
__device__ inline void finish(Sums<W, OCTET>& total, T* dx, const Place& place, i64 at, int channel, Octet<W> sum,
                              const InputGradient<T>& input, const W* before, int pitch) {
  const Shortcut<T>& shortcut = input.shortcut;
  const int stride = int(shortcut.stride);
  if (shortcut.x && place.i % stride == 0 && place.j % stride == 0) {
    const i64 pixel = (place.n * shortcut.H + place.i / stride) * shortcut.W + place.j / stride;
    const auto more = pack_at<Octet<T>>(shortcut.x + pixel * shortcut.C + shortcut.before + channel);
#pragma unroll
    for (int v = 0; v < OCTET; v++) sum.at[v] += wide(more.at[v]);
  }
  Octet<T> y{};
  if (input.y) y = pack_at<Octet<T>>(input.y + at);
  if (input.output) {
    const auto output = pack_at<Octet<T>>(input.output + at);
#pragma unroll
    for (int v = 0; v < OCTET; v++)
      if (!(wide(output.at[v]) > 0)) sum.at[v] = 0;
  } else if (input.beta) {
#pragma unroll
    for (int v = 0; v < OCTET; v++)
      if (!(affine(wide(y.at[v]), before[pitch + v], before[2 * pitch + v]) > 0)) sum.at[v] = 0;
  }
  Octet<T> out;
#pragma unroll
  for (int v = 0; v < OCTET; v++) out.at[v] = narrow<T>(sum.at[v]);
  pack_at<Octet<T>>(dx + at) = out;
  if (!input.rows) return;
#pragma unroll
  for (int v = 0; v < OCTET; v++) {
    const W dz = wide(out.at[v]);
    total.g[v] += dz;
    total.gx[v] = fma(dz, wide(y.at[v]) - before[v], total.gx[v]);
  }
}

// ---- convolve -----------------------------------------------------------------------------------------------------

// How the warps of a block share a tile of PIXELS outputs by OUT channels: each takes HEIGHT times 16 pixels by COLUMNS
// times 16 channels. Where the images are so small that tiles of eight such pieces would be too few, four pieces make a
// tile, and two warps share each: the first takes one half of the input channels, the second the other.
template <int IN, int OUT>
struct Split {
  static constexpr int DEEP = IN == 64 && OUT == 32 ? 2 : 1;
  static constexpr int HEIGHT = 2, COLUMNS = OUT / 16, PIXELS = WARPS / DEEP * HEIGHT * 16;
  static constexpr int EXCHANGED = DEEP == 2 ? 8 * THREADS : 16;  // sums at a time
};

// What lies in shared memory.
template <class T, int IN, int OUT, bool BACKWARD>
struct Layout {
  using F = Fragment<Cell<T>>;
  static constexpr int PITCH = IN + F::PADDING;
  static constexpr int WEIGHT_LINES = BACKWARD ? OUT : IN, WEIGHT_COLUMNS = BACKWARD ? IN : OUT;
  static constexpr int WEIGHT_PITCH = WEIGHT_COLUMNS + (BACKWARD ? F::PADDING : F::ACROSS_PADDING);
  static constexpr int WEIGHTS = TAPS * WEIGHT_LINES * WEIGHT_PITCH;
  static constexpr int COEFFICIENTS = 3 * IN, BEFORE = 3 * OUT;
  static constexpr int PARTS = WARPS * OUT;  // of statistics, up to three numbers each

  static std::size_t bytes(const Geometry& g) {
    return (g.inputs * PITCH + WEIGHTS) * sizeof(Cell<T>) +
           (COEFFICIENTS + BEFORE + Split<IN, OUT>::EXCHANGED + 3 * PARTS) * sizeof(Wide<T>);
  }
};

// The weights of all taps, [tap][in][out] forward and [tap][out][in] backward, from w (3, 3, C, K): either way its
// columns are K. Those that need no rounding arrive by themselves: to be waited for.
template <class T, int IN, int OUT, bool BACKWARD>
__device__ void load_weights(Cell<T>* weights, const T* __restrict__ w, int out_channels, int first) {
  using L = Layout<T, IN, OUT, BACKWARD>;
  constexpr int PACKS = L::WEIGHT_COLUMNS / V<T>;
  const int C = BACKWARD ? out_channels : IN, K = BACKWARD ? IN : out_channels;
#pragma unroll 8
  for (int i = int(threadIdx.x); i < TAPS * L::WEIGHT_LINES * PACKS; i += THREADS) {
    const int row = i / PACKS, column = i % PACKS * V<T>, tap = row / L::WEIGHT_LINES, line = row % L::WEIGHT_LINES;
    const int c = line + (BACKWARD ? first : 0), k = column + (BACKWARD ? 0 : first);
    const T* from = w + (tap * C + c) * K + k;
    Cell<T>* to = weights + row * L::WEIGHT_PITCH + column;
    if constexpr (std::is_same_v<Cell<T>, T>) {
      cp_async16(to, from);
    } else {
      const auto in = pack_at<Pack<T, V<T>>>(from);
      Pack<Cell<T>, V<T>> out;
#pragma unroll
      for (int v = 0; v < V<T>; v++) out.at[v] = cell<T>(in.at[v]);
      pack_at<Pack<Cell<T>, V<T>>>(to) = out;
    }
  }
  cp_async_commit();
}

// Two warps of a block have summed the same outputs over half of the channels each. The first of them gets the whole
// sums of the upper 16 pixels, the second those of the lower; both in sum[0].
template <class W, int COLUMNS>
__device__ void join_halves(W (&sum)[2][COLUMNS][2][4], W* exchanged, bool second) {
  const int t = int(threadIdx.x), other = t ^ THREADS / 2;
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    __syncthreads();  // whoever still reads the last sums
#pragma unroll
    for (int i = 0; i < 8; i++) {
      W &upper = sum[0][n][i / 4][i % 4], lower = sum[1][n][i / 4][i % 4];
      exchanged[i * THREADS + t] = second ? upper : lower;
      if (second) upper = lower;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) sum[0][n][i / 4][i % 4] += exchanged[i * THREADS + other];
  }
}

// A block's row of statistics or of sums: lanes join theirs, then warps.
template <bool BACKWARD, int OUT, class Total, class Part, class W>
__device__ void leave_row(W* rows, Total (&total)[OUT / 16], Part* parts, int out_channels, int first) {
  const int t = int(threadIdx.x);
#pragma unroll
  for (int n = 0; n < OUT / 16; n++) {
#pragma unroll
    for (int offset = 2; offset < WARP; offset *= 2) total[n].merge(shuffle_xor(total[n], offset));
    if (lane() < 2)
#pragma unroll
      for (int v = 0; v < OCTET; v++) parts[t / WARP * OUT + n * 16 + octet_column() + v] = total[n].channel(v);
  }
  __syncthreads();
  if (t >= OUT) return;
  Part part = parts[t];
  for (int warp = 1; warp < WARPS; warp++) part.merge(parts[warp * OUT + t]);
  W* row = rows + 2 * i64(blockIdx.x) * out_channels + first + t;
  if constexpr (BACKWARD) {
    row[0] = part.g[0];
    row[out_channels] = part.gx[0];
  } else {
    row[0] = part.mean[0];
    row[out_channels] = part.m2[0];
    if (first + t == 0) rows[2 * i64(gridDim.x) * out_channels + blockIdx.x] = part.n;
  }
}

struct Nothing {};

// y (N, P, Q, out_channels) from x (N, H, W, IN): of a forward pass, or dx from dz.
template <class T, int IN, int OUT, bool BACKWARD, class Load, class Finish>
__global__ void __launch_bounds__(THREADS, blocks_at_once<T>(IN, OUT))
    convolve(T* y, Wide<T>* rows, const T* __restrict__ x, const T* __restrict__ w, int out_channels,
             const __grid_constant__ Geometry g, const __grid_constant__ Load load,
             const __grid_constant__ Finish input) {
  using W = Wide<T>;
  using S = Split<IN, OUT>;
  using L = Layout<T, IN, OUT, BACKWARD>;
  using F = typename L::F;
  using Total = std::conditional_t<BACKWARD, Sums<W, OCTET>, Statistics<W>>;
  using Part = std::conditional_t<BACKWARD, Sums<W, 1>, Moments<W, 1>>;
  constexpr int HEIGHT = S::HEIGHT, COLUMNS = S::COLUMNS;
  constexpr int BATCH = blocks_at_once<T>(IN, OUT) == 2 ? (BACKWARD ? 2 : 3) : BACKWARD ? 4 : 6;  // loads of a thread

  SmemArena arena;
  Cell<T>* tile = arena.take<Cell<T>>(g.inputs * L::PITCH);
  Cell<T>* weights = arena.take<Cell<T>>(L::WEIGHTS);
  W* coefficients = arena.take<W>(L::COEFFICIENTS);
  W* before = arena.take<W>(L::BEFORE);
  W* exchanged = arena.take<W>(S::EXCHANGED);
  Part* parts = arena.take<Part>(L::PARTS);

  const int first = int(blockIdx.y) * OUT, t = int(threadIdx.x);
  const bool publish = blockIdx.x == 0 && blockIdx.y == 0;
  // Everything that waits for memory is asked for before anything is waited for.
  load_weights<T, IN, OUT, BACKWARD>(weights, w, out_channels, first);
  const T* raw = nullptr;
  bool transforms;
  if constexpr (BACKWARD)
    transforms = load.y, raw = load.y;
  else
    transforms = load.gamma;
  Loader<T, IN, BACKWARD, BATCH> loader(x, raw, transforms, coefficients, 0, IN);
  loader.fetch(g.inputs, InputPixels{g, corner_of(g, int(blockIdx.x))});

  if constexpr (BACKWARD) {
    if (transforms)
      load_gradient(coefficients, coefficients + IN, coefficients + 2 * IN, load, IN, 0, IN, i64(g.N) * g.H * g.W,
                    publish);
    if (t < OUT && input.y) {
      const int c = first + t;
      before[t] = input.mean[c];
      if (input.beta)
        set_affine(before[OUT + t], before[2 * OUT + t], input.gamma[c], input.beta[c], input.mean[c],
                   input.inv_std[c]);
    }
  } else if (transforms) {
    load_batch_norm(coefficients, coefficients + IN, load, IN, 0, IN, publish);
  }

  const int warp = t / WARP, half = warp / (WARPS / S::DEEP), pixel0 = warp % (WARPS / S::DEEP) * HEIGHT * 16;
  const int k0 = half * (IN / S::DEEP) + (BACKWARD ? F::own_k() : F::across_k());  // of this lane, for weights
  const bool works = pixel0 < g.pixels;  // tiles may be smaller than the block
  const Cell<T>* own_pixel[HEIGHT];
#pragma unroll
  for (int i = 0; i < HEIGHT; i++)
    own_pixel[i] =
        tile + (works ? g.place(pixel0 + i * 16 + F::own_line()) * L::PITCH : 0) + half * (IN / S::DEEP) + F::own_k();
  const int eight = (g.place(8) - g.place(0)) * L::PITCH;
  const Cell<T>* own_weight =
      weights + (BACKWARD ? F::own_line() * L::WEIGHT_PITCH + k0 : k0 * L::WEIGHT_PITCH + F::across_line());

  Total total[COLUMNS]{};
  for (int number = int(blockIdx.x); number < g.tiles; number += int(gridDim.x)) {
    const Place corner = corner_of(g, number);
    if (number == int(blockIdx.x)) cp_async_wait<0>();
    __syncthreads();  // weights and coefficients are there, and nobody reads the last tile any more
    loader.template lay<L::PITCH>(tile, g.inputs, InputPixels{g, corner});
    __syncthreads();
    const int next = number + int(gridDim.x);
    if (next < g.tiles) loader.fetch(g.inputs, InputPixels{g, corner_of(g, next)});
    for (int kind = 0; kind < g.classes; kind++) {
      W sum[HEIGHT][COLUMNS][2][4] = {};
#pragma unroll(IN == 16 ? 3 : 1)
      for (int i = works ? g.begin[kind] : TAPS; i < g.begin[kind + 1]; i++) {
        const int offset = g.offset[i] * L::PITCH, tap = g.tap[i] * L::WEIGHT_LINES * L::WEIGHT_PITCH;
#pragma unroll
        for (int k = 0; k < IN / S::DEEP; k += F::DEPTH) {
          F pixels[HEIGHT];
#pragma unroll
          for (int h = 0; h < HEIGHT; h++) pixels[h].load(own_pixel[h] + offset + k, eight);
#pragma unroll
          for (int n = 0; n < COLUMNS; n++) {
            F filters;
            if constexpr (BACKWARD)
              filters.load(own_weight + tap + n * 16 * L::WEIGHT_PITCH + k, 8 * L::WEIGHT_PITCH);
            else
              filters.load_across(own_weight + tap + k * L::WEIGHT_PITCH + n * 16, L::WEIGHT_PITCH);
#pragma unroll
            for (int h = 0; h < HEIGHT; h++) multiply_add(sum[h][n], pixels[h], filters);
          }
        }
      }
      if constexpr (S::DEEP == 2) join_halves(sum, exchanged, half == 1);
      if (!works) continue;
      const OutputPixels outputs{g, corner, kind >> 1, kind & 1};
#pragma unroll
      for (int h = 0; h < HEIGHT / S::DEEP; h++) {
        const Place place = outputs.place(pixel0 + (h + half) * 16 + octet_row());
        const int pixel = (place.n * g.P + place.i) * g.Q + place.j;  // may be none
        const bool exists = outputs.exists(place);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
          const Octet<W> octet = octet_of(sum[h][n]);
          const int c = n * 16 + octet_column();
          const i64 at = i64(pixel) * out_channels + first + c;
          if (!exists) continue;
          if constexpr (BACKWARD)
            finish(total[n], y, place, at, first + c, octet, input, before + c, OUT);
          else
            finish(total[n], y, at, octet);
        }
      }
    }
  }
  if (rows) leave_row<BACKWARD, OUT>(rows, total, parts, out_channels, first);
}

// ---- launchers ----------------------------------------------------------------------------------------------------

bool channels_fit(i64 C) { return C == 16 || C == 32 || C == 64; }

bool fits(const Window& s) {
  return s.R == 3 && s.S == 3 && s.pad_h == 1 && s.pad_w == 1 && s.stride_h == s.stride_w &&
         (s.stride_h == 1 || s.stride_h == 2) && channels_fit(s.C) && channels_fit(s.K) && s.N > 0 && s.P > 0 &&
         s.Q > 0;
}

void expect_fit(const char* op, const Window& s, std::initializer_list<const void*> arrays) {
  if (!fits(s))
    throw std::invalid_argument("[" + std::string(op) +
                                "] needs a 3x3 window, padding 1, stride 1 or 2, and 16, 32 or 64 channels");
  expect_aligned(op, arrays);
}

template <int N>
using Channels = std::integral_constant<int, N>;

template <class Body>
void with_channels(i64 C, const Body& body) {
  C == 16 ? body(Channels<16>()) : C == 32 ? body(Channels<32>()) : body(Channels<64>());
}

// Calls body with the input channels of a product and the output channels of a block.
template <class T, class Body>
void with_channels(i64 in, i64 out, const Body& body) {
  with_channels(in, [&](auto in_channels) {
    if constexpr (sizeof(T) < 8)
      if (out > 16) return body(in_channels, Channels<32>());
    body(in_channels, Channels<16>());
  });
}

template <class T, int IN, int OUT, bool BACKWARD>
Geometry plan(const Window& s, i64 out_channels) {
  return tiles_of(s, BACKWARD, Split<IN, OUT>::PIXELS, out_channels / OUT, Layout<T, IN, OUT, BACKWARD>::bytes);
}

template <class T, bool BACKWARD>
i64 rows_of(const Window& s) {
  const i64 in = BACKWARD ? s.K : s.C, out = BACKWARD ? s.C : s.K;
  i64 rows = 0;
  with_channels<T>(
      in, out, [&](auto IN, auto OUT) { rows = blocks_for(plan<T, IN, OUT, BACKWARD>(s, out).tiles, most_rows(out)); });
  return rows;
}

template <class T>
i64 conv3x3_rows(const Window& s, bool backward) {
  return !fits(s) ? 0 : backward ? rows_of<T, true>(s) : rows_of<T, false>(s);
}

template <class T, bool BACKWARD, class Load, class Finish>
void launch_convolve(const char* op, T* y, Wide<T>* rows, const T* x, const T* w, const Load& load,
                     const Finish& finish, const Window& s) {
  const i64 in = BACKWARD ? s.K : s.C, out = BACKWARD ? s.C : s.K;
  with_channels<T>(in, out, [&](auto IN, auto OUT) {
    const Geometry g = plan<T, IN, OUT, BACKWARD>(s, out);
    const dim3 grid(unsigned(blocks_for(g.tiles, most_rows(out))), unsigned(out / OUT));
    launch(op, convolve<T, IN, OUT, BACKWARD, Load, Finish>, grid, dim3(THREADS),
           Layout<T, IN, OUT, BACKWARD>::bytes(g), current_stream(), y, rows, x, w, int(out), g, load, finish);
  });
}

template <class T>
void conv3x3_forward(T* y, Wide<T>* rows, const T* x, const T* w, const BatchNorm<T>& batch_norm, const Window& s) {
  expect_fit("conv3x3_forward", s, {y, x, w});
  launch_convolve<T, false>("conv3x3_forward", y, rows, x, w, batch_norm, Nothing(), s);
}

template <class T>
void conv3x3_backward_input(T* dx, const T* dz, const T* w, const BatchNormGradient<T>& gradient,
                            const InputGradient<T>& input, const Window& s) {
  expect_fit("conv3x3_backward_input", s, {dx, dz, w, gradient.y, input.shortcut.x, input.output, input.y});
  launch_convolve<T, true>("conv3x3_backward_input", dx, input.rows, dz, w, gradient, input, s);
}

// ---- weight gradient ----------------------------------------------------------------------------------------------
// dw[r, s, c, k] = sum over pixels of u[n, p * stride + r - 1, q * stride + s - 1, c] * dy[n, p, q, k]: a product
// summed over pixels. Both tiles lie [pixel][channel], across what is summed, and a tap is again a starting address. A
// block takes C_BLOCK by K_BLOCK channels of all nine taps, a warp 16 by 16 of them: 72 sums a lane. Warps that are
// left over share the pixels of a tile. Few blocks would keep few multiprocessors busy: each takes its share of the
// tiles, a slab, and leaves its own dw; a second kernel adds them in order.

template <int C_BLOCK, int K_BLOCK>
struct WeightSplit {
  static constexpr int SQUARES = C_BLOCK * K_BLOCK / 256, GROUPS = WARPS / SQUARES, PIXELS = 128;
};

template <class T, int C_BLOCK, int K_BLOCK>
struct WeightLayout {
  using F = Fragment<Cell<T>>;
  static constexpr int X_PITCH = C_BLOCK + F::ACROSS_PADDING, Y_PITCH = K_BLOCK + F::ACROSS_PADDING;
  static constexpr int COEFFICIENTS = 2 * C_BLOCK + 3 * K_BLOCK;
  static constexpr int SUMS = WARPS * 256;  // one tap, of every warp

  static std::size_t bytes(const Geometry& g) {
    return (g.inputs * X_PITCH + g.pixels * Y_PITCH) * sizeof(Cell<T>) + (COEFFICIENTS + SUMS) * sizeof(Wide<T>);
  }
};

template <class T, int C_BLOCK, int K_BLOCK>
__global__ void __launch_bounds__(THREADS, blocks_at_once<T>(C_BLOCK, K_BLOCK))
    weight_gradient(Wide<T>* __restrict__ slabs, const T* __restrict__ dz, const T* __restrict__ x, int C, int K,
                    const __grid_constant__ Geometry g, const __grid_constant__ BatchNormGradient<T> gradient,
                    const __grid_constant__ BatchNorm<T> bn) {
  using W = Wide<T>;
  using S = WeightSplit<C_BLOCK, K_BLOCK>;
  using L = WeightLayout<T, C_BLOCK, K_BLOCK>;
  using F = typename L::F;
  SmemArena arena;
  Cell<T>* x_tile = arena.take<Cell<T>>(g.inputs * L::X_PITCH);
  Cell<T>* y_tile = arena.take<Cell<T>>(g.pixels * L::Y_PITCH);
  W* coefficients = arena.take<W>(L::COEFFICIENTS);
  W* sums = arena.take<W>(L::SUMS);

  const int t = int(threadIdx.x), c_first = int(blockIdx.y) * C_BLOCK, k_first = int(blockIdx.z) * K_BLOCK;
  const bool normalised = bn.gamma, transforms = gradient.y;
  W* of_gradient = coefficients + 2 * C_BLOCK;
  if (normalised) load_batch_norm(coefficients, coefficients + C_BLOCK, bn, C, c_first, C_BLOCK, false);
  if (transforms)
    load_gradient(of_gradient, of_gradient + K_BLOCK, of_gradient + 2 * K_BLOCK, gradient, K, k_first, K_BLOCK,
                  i64(g.N) * g.P * g.Q, blockIdx.x == 0 && blockIdx.y == 0);

  const int warp = t / WARP, square = warp % S::SQUARES, group = warp / S::SQUARES;
  const int c = square / (K_BLOCK / 16) * 16, k = square % (K_BLOCK / 16) * 16;
  const int right = g.offset[1] * L::X_PITCH, far_right = g.offset[2] * L::X_PITCH, down = g.offset[3] * L::X_PITCH;
  Loader<T, C_BLOCK, false, C_BLOCK / 8> x_loader(x, nullptr, normalised, coefficients, c_first, C);
  Loader<T, K_BLOCK, true, K_BLOCK / 16> y_loader(dz, gradient.y, transforms, of_gradient, k_first, K);
  W sum[TAPS][2][4] = {};
  for (int number = int(blockIdx.x); number < g.tiles; number += int(gridDim.x)) {
    const Place corner = corner_of(g, number);
    const InputPixels inputs{g, corner};
    const OutputPixels outputs{g, corner, 0, 0};
    x_loader.fetch(g.inputs, inputs);
    __syncthreads();
    x_loader.template lay<L::X_PITCH>(x_tile, g.inputs, inputs);
    y_loader.fetch(g.pixels, outputs);
    y_loader.template lay<L::Y_PITCH>(y_tile, g.pixels, outputs);
    __syncthreads();
    for (int m = group * F::DEPTH; m < g.pixels; m += S::GROUPS * F::DEPTH) {
      F dy;
      dy.load_across(y_tile + (m + F::across_k()) * L::Y_PITCH + k + F::across_line(), L::Y_PITCH);
      const Cell<T>* own = x_tile + g.place(m + F::across_k()) * L::X_PITCH + c + F::across_line();
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) {
        F u;
        u.load_across(own + tap / 3 * down + (tap % 3 == 0 ? 0 : tap % 3 == 1 ? right : far_right), L::X_PITCH);
        multiply_add(sum[tap], u, dy);
      }
    }
  }

  // The groups' sums, tap by tap, in order.
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) {
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[warp * 256 + sum_row(i) * 16 + sum_column(half, i)] = sum[tap][half][i];
    __syncthreads();
    for (int i = t; i < S::SQUARES * 256; i += THREADS) {
      const int column = i % K_BLOCK, row = i / K_BLOCK;  // of the block
      const int at = (row / 16 * (K_BLOCK / 16) + column / 16) * 256 + row % 16 * 16 + column % 16;
      W whole = sums[at];
#pragma unroll
      for (int other = 1; other < S::GROUPS; other++) whole += sums[other * S::SQUARES * 256 + at];
      slabs[((i64(blockIdx.x) * TAPS + tap) * C + c_first + row) * K + k_first + column] = whole;
    }
  }
}

// How the channels and the tiles of a weight gradient are shared out.
template <class T, int C_BLOCK, int K_BLOCK>
struct WeightPlan {
  Geometry g;
  i64 slabs;

  explicit WeightPlan(const Window& s) {
    const i64 squares = s.C / C_BLOCK * (s.K / K_BLOCK);
    g = tiles_of(s, false, WeightSplit<C_BLOCK, K_BLOCK>::PIXELS, squares, WeightLayout<T, C_BLOCK, K_BLOCK>::bytes);
    // 9 KB of sums for two blocks on each multiprocessor, or up to 37 KB for one: 5 MB at most.
    slabs = blocks_for(g.tiles, MULTIPROCESSORS * (C_BLOCK * K_BLOCK == 256 ? 2 : 1) / squares);
  }
};

template <class Body>
void with_weight_blocks(const Window& s, const Body& body) {
  const auto with_k = [&](auto C_BLOCK) { s.K == 16 ? body(C_BLOCK, Channels<16>()) : body(C_BLOCK, Channels<32>()); };
  s.C == 16 ? with_k(Channels<16>()) : with_k(Channels<32>());
}

template <class T>
i64 conv3x3_slabs(const Window& s) {
  i64 slabs = 0;
  if (fits(s))
    with_weight_blocks(s, [&](auto C_BLOCK, auto K_BLOCK) { slabs = WeightPlan<T, C_BLOCK, K_BLOCK>(s).slabs; });
  return slabs;
}

template <class T>
void launch_weight_gradient(const char* op, Wide<T>* dw, Wide<T>* slabs, const T* dz, const T* x,
                            const BatchNormGradient<T>& gradient, const BatchNorm<T>& batch_norm, const Window& s) {
  with_weight_blocks(s, [&](auto C_BLOCK, auto K_BLOCK) {
    const WeightPlan<T, C_BLOCK, K_BLOCK> plan(s);
    const i64 n = TAPS * s.C * s.K;
    const bool add = !slabs && plan.slabs > 1;
    const Scratch<Wide<T>> scratch(add ? plan.slabs * n : 0);
    Wide<T>* to = slabs ? slabs : add ? scratch.get() : dw;
    const dim3 grid(unsigned(plan.slabs), unsigned(s.C / C_BLOCK), unsigned(s.K / K_BLOCK));
    launch(op, weight_gradient<T, C_BLOCK, K_BLOCK>, grid, dim3(THREADS),
           WeightLayout<T, C_BLOCK, K_BLOCK>::bytes(plan.g), current_stream(), to, dz, x, int(s.C), int(s.K), plan.g,
           gradient, batch_norm);
    if (add) launch_sum_parts(op, dw, to, int(plan.slabs), int(n));
  });
}

template <class T>
void conv3x3_backward_weight(Wide<T>* dw, Wide<T>* slabs, const T* dz, const T* x, const BatchNormGradient<T>& gradient,
                             const BatchNorm<T>& batch_norm, const Window& s) {
  expect_fit("conv3x3_backward_weight", s, {dz, x, gradient.y});
  launch_weight_gradient("conv3x3_backward_weight", dw, slabs, dz, x, gradient, batch_norm, s);
}

}  // namespace

// ---- for conv2d.cu --------------------------------------------------------------------------------------------------

namespace direct {

// Tiles have room for up to 16 times the pixels of narrow images, and are counted in 29 bits.
bool takes(const Window& s, std::initializer_list<const void*> arrays) {
  bool aligned = true;
  for (const void* array : arrays) aligned = aligned && is_aligned(array);
  return fits(s) && aligned && s.N * s.H * s.W < 1 << 25;
}

template <class T>
void forward(const char* op, T* y, const T* x, const T* w, const Window& s) {
  launch_convolve<T, false>(op, y, nullptr, x, w, BatchNorm<T>{}, Nothing(), s);
}

// What dx holds already comes to it as a shortcut's gradient would: read by the thread that then writes it.
template <class T>
void backward_input(const char* op, T* dx, const T* dy, const T* w, const Window& s, bool add) {
  InputGradient<T> input{};
  if (add) input.shortcut = {dx, s.H, s.W, s.C, 1, 0};
  launch_convolve<T, true>(op, dx, nullptr, dy, w, BatchNormGradient<T>{}, input, s);
}

template <class T>
void backward_weight(const char* op, Wide<T>* dw, const T* dy, const T* x, const Window& s) {
  launch_weight_gradient(op, dw, static_cast<Wide<T>*>(nullptr), dy, x, BatchNormGradient<T>{}, BatchNorm<T>{}, s);
}

template void forward(const char*, float*, const float*, const float*, const Window&);
template void forward(const char*, double*, const double*, const double*, const Window&);
template void forward(const char*, bf16*, const bf16*, const bf16*, const Window&);
template void backward_input(const char*, float*, const float*, const float*, const Window&, bool);
template void backward_input(const char*, double*, const double*, const double*, const Window&, bool);
template void backward_input(const char*, bf16*, const bf16*, const bf16*, const Window&, bool);
template void backward_weight(const char*, float*, const float*, const float*, const Window&);
template void backward_weight(const char*, double*, const double*, const double*, const Window&);
template void backward_weight(const char*, float*, const bf16*, const bf16*, const Window&);

}  // namespace direct

template <class T>
void conv3x3_kernels(Kernels<T>& table) {
  table.conv3x3_rows = conv3x3_rows<T>;
  table.conv3x3_forward = conv3x3_forward<T>;
  table.conv3x3_backward_input = conv3x3_backward_input<T>;
  table.conv3x3_slabs = conv3x3_slabs<T>;
  table.conv3x3_backward_weight = conv3x3_backward_weight<T>;
}
template void conv3x3_kernels<float>(Kernels<float>&);
template void conv3x3_kernels<double>(Kernels<double>&);
template void conv3x3_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
