// Tiles of pixels for the 3x3 convolutions of conv3x3.cu: where their pixels lie, and how they come to shared memory,
// batch norm applied on the way.
#pragma once

#include <type_traits>

#include "fragments.h"
#include "fused.h"

namespace tinyres {

constexpr int TAPS = 9;
constexpr int SHARED_BYTES = 160 * 1024;  // of a block, dynamic; an A100 has 163 KB
constexpr int SMALLEST_TILE = 32;         // pixels: what a warp takes

// ---- where pixels lie ---------------------------------------------------------------------------------------------

// Where outputs, the inputs that they meet, and taps lie. Outputs are numbered in a grid for each class; without
// classes that is the image.
struct Geometry {
  int N, H, W, P, Q;                  // images; inputs and outputs of one
  int step, apart;                    // inputs between the centres of neighbours in the grid; outputs between them
  int border;                         // inputs that stand before the first centre
  int log_width, log_height, pixels;  // of a tile, in the grid; over all its images
  int rows, columns, half, inputs;    // of a tile's inputs; where the odd columns begin; over all its images
  int down, across, tiles;            // tiles of an image, and of all
  u32 by_rows, by_columns;            // 2^20 / rows and 2^20 / columns, rounded up
  int classes, begin[5];              // the taps of class i are begin[i] to begin[i + 1]
  int offset[TAPS], tap[TAPS];        // of a tap: from a centre to its input, in the tile; its weights

  // The input under the first tap for pixel m of the tile.
  __device__ int place(int m) const {
    const int j = m & ((1 << log_width) - 1), i = m >> log_width & ((1 << log_height) - 1);
    return ((m >> (log_width + log_height)) * rows + i * step) * columns + j;
  }
};

// A pixel of the grid, or of the inputs.
struct Place {
  int n, i, j;
};

__device__ inline Place corner_of(const Geometry& g, int tile) {
  const int j = tile % g.across, rest = tile / g.across;
  return {rest / g.down * (g.pixels >> (g.log_width + g.log_height)), rest % g.down << g.log_height, j << g.log_width};
}

// Pixel m of the tile.
__device__ inline Place pixel_of(const Geometry& g, const Place& corner, int m) {
  return {corner.n + (m >> (g.log_width + g.log_height)), corner.i + (m >> g.log_width & ((1 << g.log_height) - 1)),
          corner.j + (m & ((1 << g.log_width) - 1))};
}

// The inputs of a tile.
struct InputPixels {
  const Geometry& g;
  Place corner;

  __device__ int operator()(int i) const {
    const int line = int(u32(i) * g.by_columns >> 20), column = i - line * g.columns;
    const int image = int(u32(line) * g.by_rows >> 20), row = line - image * g.rows;
    const int right = g.step == 1 ? column : column < g.half ? 2 * column : 2 * (column - g.half) + 1;
    const int n = corner.n + image, h = corner.i * g.step - g.border + row, v = corner.j * g.step - g.border + right;
    return n < g.N && within(h, g.H) && within(v, g.W) ? (n * g.H + h) * g.W + v : -1;
  }
};

// The outputs of a tile; for one class.
struct OutputPixels {
  const Geometry& g;
  Place corner;
  int row, column;  // of the class

  __device__ Place place(int m) const {
    const Place at = pixel_of(g, corner, m);
    return {at.n, at.i * g.apart + row, at.j * g.apart + column};
  }
  __device__ bool exists(const Place& at) const { return at.n < g.N && at.i < g.P && at.j < g.Q; }
  __device__ int operator()(int m) const {
    const Place at = place(m);
    return exists(at) ? (at.n * g.P + at.i) * g.Q + at.j : -1;
  }
};

// ---- how they are cut ---------------------------------------------------------------------------------------------

inline int log_of(i64 n, int most) {  // of the smallest power of two that is not less, up to `most`
  int log = 0;
  while (i64(1) << log < n && 1 << log < most) log++;
  return log;
}

// Tiles of `pixels` outputs (of one class), as wide as the image allows.
inline Geometry geometry_of(const Window& s, bool backward, int pixels) {
  const int stride = int(s.stride_h);
  const bool by_class = backward && stride == 2;
  Geometry g{};
  g.N = int(s.N);
  g.H = int(backward ? s.P : s.H), g.W = int(backward ? s.Q : s.W);
  g.P = int(backward ? s.H : s.P), g.Q = int(backward ? s.W : s.Q);
  g.step = backward ? 1 : stride, g.apart = by_class ? 2 : 1, g.border = by_class ? 0 : 1;
  const i64 down = ceil_div(g.P, g.apart), across = ceil_div(g.Q, g.apart);  // of the grid
  g.log_width = max(3, log_of(across, min(32, pixels / 4)));
  g.log_height = log_of(down, pixels >> g.log_width);
  g.pixels = pixels;
  const int width = 1 << g.log_width, height = 1 << g.log_height, images = pixels / width / height;
  g.half = g.step == 2 ? width + 1 : 0;
  g.rows = by_class ? height + 1 : (height - 1) * g.step + 3;
  g.columns = by_class ? width + 1 : g.step == 2 ? 2 * g.half : width + 2;
  g.inputs = images * g.rows * g.columns;
  g.by_rows = u32((1 << 20) / g.rows + 1), g.by_columns = u32((1 << 20) / g.columns + 1);
  g.down = int(ceil_div(down, height)), g.across = int(ceil_div(across, width));
  const i64 tiles = ceil_div(s.N, images) * g.down * g.across;
  if (tiles * pixels * 4 > 0x7fffffff) throw std::invalid_argument("[conv3x3] pixels must be under 2^29");
  g.tiles = int(tiles);

  // Backward through stride 2: y[p] met x[2 p + r - 1]. So an even row of x met y[row / 2] through r = 1 only, an odd
  // one y[row / 2] through r = 2 and y[row / 2 + 1] through r = 0; columns likewise.
  int taps = 0;
  const auto add = [&](int r, int u, int tap) {
    const int right = g.step == 2 ? u % 2 * g.half + u / 2 : u;
    g.offset[taps] = r * g.columns + right;
    g.tap[taps++] = tap;
  };
  if (by_class) {
    for (int kind = 0; kind < 4; kind++) {
      for (int r = 0; r <= kind / 2; r++)
        for (int u = 0; u <= kind % 2; u++) add(r, u, (kind / 2 ? 2 - 2 * r : 1) * 3 + (kind % 2 ? 2 - 2 * u : 1));
      g.begin[kind + 1] = taps;
    }
    g.classes = 4;
  } else {
    for (int tap = 0; tap < TAPS; tap++) add(tap / 3, tap % 3, backward ? TAPS - 1 - tap : tap);
    g.classes = 1, g.begin[1] = taps;
  }
  return g;
}

// The largest tile that fits shared memory and leaves no multiprocessor idle.
template <class Bytes>
Geometry tiles_of(const Window& s, bool backward, int pixels, i64 parts, const Bytes& bytes) {
  Geometry g = geometry_of(s, backward, pixels);
  while (pixels > SMALLEST_TILE && (bytes(g) > SHARED_BYTES || 2 * g.tiles * parts <= MULTIPROCESSORS))
    g = geometry_of(s, backward, pixels /= 2);
  return g;
}

// Blocks that share `tiles` as evenly as may be, at most `most`.
inline i64 blocks_for(i64 tiles, i64 most) { return ceil_div(tiles, ceil_div(tiles, most)); }

// ---- how they are filled ------------------------------------------------------------------------------------------

// What tiles hold: floats are rounded to tf32 as they are laid down.
template <class T>
using Cell = std::conditional_t<std::is_same_v<T, float>, tf32, T>;

template <class T>
__device__ inline Cell<T> cell(Wide<T> x) {
  if constexpr (std::is_same_v<T, float>)
    return tf32{to_tf32(x)};
  else
    return narrow<T>(x);
}

// Reads packs of x (or of dz and y), makes of them packs of u (or of dy), and lays these into a tile of CHANNELS
// channels. The first BATCH packs of each thread can be asked for long before the tile is free: they wait in registers.
//
// Coefficients, scale and shift or a, b and c, stand in shared memory, CHANNELS of each. They are read again for every
// few packs: kept in registers, they would take those that the sums need.
template <class T, int CHANNELS, bool GRADIENT, int BATCH>
class Loader {
  using W = Wide<T>;
  using Cells = Pack<Cell<T>, V<T>>;
  static constexpr int PACKS = CHANNELS / V<T>, STRIDE = THREADS / PACKS;

 public:
  // first: of the tile's channels, in the tensor, which has `all`.
  __device__ Loader(const T* x, const T* y, bool transforms, const W* coefficients, int first, int all)
      : x_(x),
        y_(y),
        transforms_(transforms),
        coefficients_(coefficients),
        channel_(int(threadIdx.x) % PACKS * V<T>),
        first_(first),
        all_(all) {}

  // where(i) is the tensor's number of pixel i of the tile, which has `count`, or -1 for zeros.
  template <class Where>
  __device__ void fetch(int count, const Where& where, int start = int(threadIdx.x) / PACKS) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = start + b * STRIDE, pixel = i < count ? where(i) : -1;
      inside_[b] = pixel >= 0;
      one_[b] = two_[b] = {};
      if (!inside_[b]) continue;
      const i64 at = i64(pixel) * all_ + first_ + channel_;
      one_[b] = pack_at<Pack<T, V<T>>>(x_ + at);
      if (GRADIENT && transforms_) two_[b] = pack_at<Pack<T, V<T>>>(y_ + at);
    }
  }

  // The tile whose first packs were fetched.
  template <int PITCH, class Where>
  __device__ void lay(Cell<T>* tile, int count, const Where& where) {
    for (int start = int(threadIdx.x) / PACKS;;) {
      Cells out[BATCH];
      transform(out);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = start + b * STRIDE;
        if (i < count) pack_at<Cells>(tile + i * PITCH + channel_) = inside_[b] ? out[b] : Cells{};
      }
      start += BATCH * STRIDE;
      if (start >= count) return;
      fetch(count, where, start);
    }
  }

 private:
  __device__ void transform(Cells (&out)[BATCH]) const {
    constexpr int FEW = V<T> < 4 ? V<T> : 4;
#pragma unroll
    for (int v = 0; v < V<T>; v += FEW) {
      Pack<W, FEW> k[3] = {};
#pragma unroll
      for (int i = 0; i < (GRADIENT ? 3 : 2); i++)
        if (transforms_) k[i] = pack_at<Pack<W, FEW>>(coefficients_ + i * CHANNELS + channel_ + v);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
#pragma unroll
        for (int j = 0; j < FEW; j++) {
          W value = wide(one_[b].at[v + j]);
          if (transforms_)
            value = GRADIENT ? fma(k[0].at[j], value, fma(k[1].at[j], wide(two_[b].at[v + j]), k[2].at[j]))
                             : relu(affine(value, k[0].at[j], k[1].at[j]));
          out[b].at[v + j] = cell<T>(value);
        }
      }
    }
  }

  const T *x_, *y_;
  bool transforms_;
  const W* coefficients_;
  int channel_, first_, all_;
  Pack<T, V<T>> one_[BATCH], two_[BATCH];
  bool inside_[BATCH];
};

}  // namespace tinyres
