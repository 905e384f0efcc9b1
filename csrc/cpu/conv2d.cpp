// 2-D convolution (cross-correlation) and its two gradients, NHWC activations and RSCK weights:
//
//   y[n, p, q, k] = sum over r, s, c of x[n, p * stride_h + r - pad_h, q * stride_w + s - pad_w, c] * w[r, s, c, k]
//
// `naive` is that formula in plain loops, and the formula read backwards for the gradients; it is what the rest is
// tested against. `direct` does the same sums near the rate at which the cores can multiply and add:
//   - an image is first copied into a zero-bordered scratch in blocks of channels (Blocks), so that the inner loops
//     know no borders, and pixels lie a constant distance apart whatever the stride;
//   - weights are packed in the exact order in which they are read;
//   - a tile of pixels times a few vectors of filters stays in registers while all taps and channels are summed.
// One driver, correlate, serves forward and the input gradient; the weight gradient is a sum of outer products.
//
//   N batch, H W input size, C channels, K filters, R S window, P Q output size.
#include "vec.h"
#include "winograd.h"

namespace tinyres::TINYRES_TARGET {
namespace {

// Channels of a block: a cache line of floats. A multiple of every vector length.
constexpr int BLOCK = 16;

// The two FMA ports need 8 to 10 sums in flight. 16 (24 in the weight gradient) leave room in 32 registers for the
// weights that several pixels share; machines with 16 registers get half.
#if TINYRES_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int TILE = 16, OUTER_CHANNELS = 8;
#else
constexpr int TILE = 8, OUTER_CHANNELS = 4;
#endif
constexpr int FILTER_VECTORS = 2;

// Work is cut so that no machine of usual size idles at batch 1 and a scratch image stays in the L2 cache.
constexpr i64 TASKS = 16, SCRATCH_BYTES = 512 << 10, PARTIAL_BYTES = 32 << 20;

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Output positions p with 0 <= p * stride + tap - pad < size: the range of outputs that a tap finds inside the image.
struct Range {
  i64 begin, end;
};
inline Range inside(i64 outputs, i64 tap, i64 stride, i64 pad, i64 size) {
  const i64 begin = tap < pad ? ceil_div(pad - tap, stride) : 0;
  const i64 end = size + pad > tap ? least(outputs, ceil_div(size + pad - tap, stride)) : 0;
  return {begin, end};
}

// naive ------------------------------------------------------------------------------------------------------------

template <class T>
void naive_forward(T* y, const T* x, const T* w, const Window& s) {
  parallel_for(s.N * s.P, [&](i64 row) {
    const i64 n = row / s.P, p = row % s.P;
    for (i64 q = 0; q < s.Q; q++) {
      T* out = y + (row * s.Q + q) * s.K;
      for (i64 k = 0; k < s.K; k++) out[k] = 0;
      for (i64 r = 0; r < s.R; r++) {
        for (i64 u = 0; u < s.S; u++) {
          const i64 h = p * s.stride_h + r - s.pad_h, v = q * s.stride_w + u - s.pad_w;
          if (h < 0 || h >= s.H || v < 0 || v >= s.W) continue;
          const T* in = x + ((n * s.H + h) * s.W + v) * s.C;
          const T* tap = w + (r * s.S + u) * s.C * s.K;
          for (i64 c = 0; c < s.C; c++)
            for (i64 k = 0; k < s.K; k++) out[k] += in[c] * tap[c * s.K + k];
        }
      }
    }
  });
}

// Each product x * w in y passes dy * w back to that x.
template <class T>
void naive_backward_input(T* dx, const T* dy, const T* w, const Window& s) {
  parallel_for(s.N, [&](i64 n) {
    T* image = dx + n * s.H * s.W * s.C;
    for (i64 i = 0; i < s.H * s.W * s.C; i++) image[i] = 0;
    for (i64 p = 0; p < s.P; p++) {
      for (i64 q = 0; q < s.Q; q++) {
        const T* gradient = dy + ((n * s.P + p) * s.Q + q) * s.K;
        for (i64 r = 0; r < s.R; r++) {
          for (i64 u = 0; u < s.S; u++) {
            const i64 h = p * s.stride_h + r - s.pad_h, v = q * s.stride_w + u - s.pad_w;
            if (h < 0 || h >= s.H || v < 0 || v >= s.W) continue;
            const T* tap = w + (r * s.S + u) * s.C * s.K;
            for (i64 c = 0; c < s.C; c++)
              for (i64 k = 0; k < s.K; k++) image[(h * s.W + v) * s.C + c] += gradient[k] * tap[c * s.K + k];
          }
        }
      }
    }
  });
}

// Each product x * w in y passes dy * x back to that w.
template <class T>
void naive_backward_weight(T* dw, const T* dy, const T* x, const Window& s) {
  parallel_for(s.R * s.S * s.C, [&](i64 row) {
    const i64 c = row % s.C, u = row / s.C % s.S, r = row / s.C / s.S;
    T* out = dw + row * s.K;
    for (i64 k = 0; k < s.K; k++) out[k] = 0;
    for (i64 n = 0; n < s.N; n++) {
      for (i64 p = 0; p < s.P; p++) {
        for (i64 q = 0; q < s.Q; q++) {
          const i64 h = p * s.stride_h + r - s.pad_h, v = q * s.stride_w + u - s.pad_w;
          if (h < 0 || h >= s.H || v < 0 || v >= s.W) continue;
          const T value = x[((n * s.H + h) * s.W + v) * s.C + c];
          for (i64 k = 0; k < s.K; k++) out[k] += value * dy[((n * s.P + p) * s.Q + q) * s.K + k];
        }
      }
    }
  });
}

// direct: the scratch image -----------------------------------------------------------------------------------------

// A piece of an image in blocks: (channel block, row, column % stride, column / stride, BLOCK). Columns that a window
// of that stride meets one after the other are BLOCK elements apart, for any stride.
struct Blocks {
  i64 rows, columns, C, stride;
  i64 phase() const { return ceil_div(columns, stride) * BLOCK; }
  i64 row() const { return stride * phase(); }
  i64 block() const { return rows * row(); }
  i64 size() const { return ceil_div(C, BLOCK) * block(); }
  i64 offset(i64 r, i64 column) const { return r * row() + column % stride * phase() + column / stride * BLOCK; }
};

// Fills blocks with the rows from row0 and the columns from column0 of an image (H, W, pixel), of each pixel the first
// b.C elements, and with zeros outside of the image. The rest of the last channel block is left as it is.
template <class T>
void fill_blocks(T* blocks, const Blocks& b, const T* image, i64 H, i64 W, i64 pixel, i64 row0, i64 column0) {
  const Vec<T> zero{};
  for (i64 row = 0; row < b.rows; row++) {
    const bool row_inside = row0 + row >= 0 && row0 + row < H;
    for (i64 c = 0; c < b.C; c += BLOCK) {
      const i64 channels = least(BLOCK, b.C - c);
      for (i64 phase = 0; phase < b.stride; phase++) {
        T* to = blocks + c / BLOCK * b.block() + row * b.row() + phase * b.phase();
        const i64 count = b.phase() / BLOCK, first = column0 + phase;  // columns first, first + stride, ...
        const Range valid = row_inside ? inside(count, first, b.stride, 0, W) : Range{count, count};
        const T* from = image + ((row0 + row) * W + first) * pixel + c;
        for (i64 i = 0; i < count; i++) {
          T* at = to + i * BLOCK;
          const T* pixel_at = from + i * b.stride * pixel;
          if (i < valid.begin || i >= valid.end) {
            for (int k = 0; k < BLOCK; k += LANES<T>) store(at + k, zero);
          } else if (channels == BLOCK) {
            for (int k = 0; k < BLOCK; k += LANES<T>) store(at + k, load(pixel_at + k));
          } else {
            for (i64 k = 0; k < channels; k++) at[k] = pixel_at[k];
          }
        }
      }
    }
  }
}

// direct: forward and input gradient --------------------------------------------------------------------------------

// y(p, q, k) = sum over r < R, s < S, c of x(p * stride_h + r, q * stride_w + s, c) * w(r, s, c, k), with x in blocks
// of column stride stride_w. w(r, s, c, k) is weights[r * w_r + s * w_s + c * w_c + k * w_k] before packing.
template <class T>
struct Correlation {
  i64 R, S, C, K, stride_h;
  Blocks x;
  const T* weights;
  i64 w_r, w_s, w_c, w_k;
  T* packed;

  i64 taps(i64 phase) const { return ceil_div(S - phase, x.stride); }  // of a row, in one phase
  static i64 packed_size(i64 taps, i64 C, i64 K) { return taps * C * ceil_div(K, LANES<T>) * LANES<T>; }
};

// Taps that neighbour each other in the blocks, S of them or those of one phase, are summed in groups of up to 3.
inline i64 next_taps(i64 left) { return left == 4 ? 2 : least(left, 3); }

// The packed order: filter group, channel block, row of taps, phase, group of taps, channel, tap, filter of the group.
template <class T>
void pack(const Correlation<T>& o, i64 group) {
  constexpr i64 WIDTH = FILTER_VECTORS * LANES<T>;
  const i64 k0 = group * WIDTH, width = least(WIDTH, ceil_div(o.K - k0, LANES<T>) * LANES<T>);
  const i64 filters = least(width, o.K - k0);
  T* to = o.packed + k0 * o.R * o.S * o.C;
  for (i64 c0 = 0; c0 < o.C; c0 += BLOCK) {
    for (i64 r = 0; r < o.R; r++) {
      for (i64 phase = 0; phase < least(o.S, o.x.stride); phase++) {
        for (i64 left = o.taps(phase), s0 = phase; left > 0;) {
          const i64 taps = next_taps(left);
          for (i64 c = c0; c < least(c0 + BLOCK, o.C); c++) {
            for (i64 t = 0; t < taps; t++, to += width) {
              const T* from = o.weights + r * o.w_r + (s0 + t * o.x.stride) * o.w_s + c * o.w_c + k0 * o.w_k;
              for (i64 k = 0; k < filters; k++) to[k] = from[k * o.w_k];
              for (i64 k = filters; k < width; k++) to[k] = 0;
            }
          }
          left -= taps, s0 += taps * o.x.stride;
        }
      }
    }
  }
}

// Adds TAPS neighbouring taps of a channel block to the sums of PIXELS neighbouring outputs times VECTORS vectors of
// filters; returns the weights that follow. The weights of a channel are loaded once, and each pixel is broadcast once
// for all the outputs that it meets: with 3 taps 18 broadcasts and 3 loads serve 48 multiply-adds, where one tap at
// a time needs 17 loads for 16 and waits for the load ports.
template <class T, int TAPS, int PIXELS, int VECTORS>
inline const T* add_taps(Vec<T> (&sum)[PIXELS][VECTORS], const T* pixel, const T* w, i64 channels) {
  for (i64 c = 0; c < channels; c++, pixel++, w += TAPS * VECTORS * LANES<T>) {
    Vec<T> weights[TAPS][VECTORS];
#pragma GCC unroll 3
    for (int t = 0; t < TAPS; t++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) weights[t][v] = load(w + (t * VECTORS + v) * LANES<T>);
#pragma GCC unroll 32
    for (int i = 0; i < PIXELS + TAPS - 1; i++) {
      const T value = pixel[i * BLOCK];
#pragma GCC unroll 3
      for (int t = 0; t < TAPS; t++)
        if (i - t >= 0 && i - t < PIXELS)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; v++) sum[i - t][v] += value * weights[t][v];
    }
  }
  return w;
}

// One tile of outputs: all taps and channels, the sums in registers.
template <class T, int PIXELS, int VECTORS>
void correlate_tile(T* y, i64 y_column, i64 filters, const T* x, const T* w, const Correlation<T>& o) {
  Vec<T> sum[PIXELS][VECTORS] = {};
  const i64 phases = least(o.S, o.x.stride), taps = o.S / o.x.stride, longer = o.S % o.x.stride;
  for (i64 c0 = 0; c0 < o.C; c0 += BLOCK, x += o.x.block()) {
    const i64 channels = least(BLOCK, o.C - c0);
    for (i64 r = 0; r < o.R; r++) {
      for (i64 phase = 0; phase < phases; phase++) {
        const T* pixel = x + r * o.x.row() + phase * o.x.phase();
        for (i64 left = taps + (phase < longer), group; left > 0; left -= group, pixel += group * BLOCK) {
          group = next_taps(left);
          if (group == 3)
            w = add_taps<T, 3>(sum, pixel, w, channels);
          else if (group == 2)
            w = add_taps<T, 2>(sum, pixel, w, channels);
          else
            w = add_taps<T, 1>(sum, pixel, w, channels);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      const i64 rest = filters - v * LANES<T>;
      if (rest >= LANES<T>)
        store(y + i * y_column + v * LANES<T>, sum[i][v]);
      else
        store_first(y + i * y_column + v * LANES<T>, sum[i][v], rest);
    }
}

template <class T>
struct Outputs {
  T* y;
  i64 rows, columns, row, column;  // sizes, and distances in elements
};

// All outputs of one group of filters. The end of a row takes the smallest tile that covers it, moved back over
// outputs already written where it would stand out: computing them twice is cheaper than several small tiles.
template <class T, int VECTORS>
void correlate_group(const Outputs<T>& out, i64 k0, const T* x, const Correlation<T>& o) {
  const T* w = o.packed + k0 * o.R * o.S * o.C;
  const i64 filters = least(VECTORS * LANES<T>, o.K - k0);
  for (i64 p = 0; p < out.rows; p++, x += o.stride_h * o.x.row()) {
    for (i64 q = 0; q < out.columns;) {
      int pixels = TILE / VECTORS;
      while (pixels > out.columns || pixels / 2 >= out.columns - q) pixels /= 2;
      q = least(q, out.columns - pixels);
      T* y = out.y + p * out.row + q * out.column + k0;
      const T* in = x + q * BLOCK;
      switch (pixels) {
        case 16:
          if constexpr (TILE / VECTORS >= 16) correlate_tile<T, 16, VECTORS>(y, out.column, filters, in, w, o);
          break;
        case 8:
          if constexpr (TILE / VECTORS >= 8) correlate_tile<T, 8, VECTORS>(y, out.column, filters, in, w, o);
          break;
        case 4: correlate_tile<T, 4, VECTORS>(y, out.column, filters, in, w, o); break;
        case 2: correlate_tile<T, 2, VECTORS>(y, out.column, filters, in, w, o); break;
        default: correlate_tile<T, 1, VECTORS>(y, out.column, filters, in, w, o);
      }
      q += pixels;
    }
  }
}

// Filter groups outermost: the weights of a group stay in the cache while the rows of the image pass.
template <class T>
void correlate(const Outputs<T>& out, const T* x, const Correlation<T>& o) {
  for (i64 k0 = 0; k0 < o.K; k0 += FILTER_VECTORS * LANES<T>) {
    if (o.K - k0 > LANES<T>)
      correlate_group<T, FILTER_VECTORS>(out, k0, x, o);
    else
      correlate_group<T, 1>(out, k0, x, o);
  }
}

// Rows of an image that make one task.
inline i64 band_rows(i64 N, i64 rows, i64 bytes) {
  const i64 bands = most(ceil_div(TASKS, most(N, 1)), ceil_div(bytes, SCRATCH_BYTES));
  return ceil_div(rows, least(rows, bands));
}

template <class T>
void direct_forward(T* y, const T* x, const T* w, const Window& s) {
  Scratch<T> packed(Correlation<T>::packed_size(s.R * s.S, s.C, s.K));
  Blocks image{s.H + 2 * s.pad_h, (s.Q - 1) * s.stride_w + s.S, s.C, s.stride_w};
  const i64 band = band_rows(s.N, s.P, image.size() * i64(sizeof(T))), bands = ceil_div(s.P, band);
  image.rows = (band - 1) * s.stride_h + s.R;
  const Correlation<T> o{s.R, s.S, s.C, s.K, s.stride_h, image, w, s.S * s.C * s.K, s.C * s.K, s.K, 1, packed.get()};
  parallel_for(ceil_div(s.K, FILTER_VECTORS * LANES<T>), [&](i64 group) { pack(o, group); });
  parallel_for(s.N * bands, [&](i64 task) {
    const i64 n = task / bands, p = task % bands * band;
    Scratch<T> blocks(image.size());
    fill_blocks(blocks.get(), image, x + n * s.H * s.W * s.C, s.H, s.W, s.C, p * s.stride_h - s.pad_h, -s.pad_w);
    correlate<T>({y + (n * s.P + p) * s.Q * s.K, least(band, s.P - p), s.Q, s.Q * s.K, s.K}, blocks.get(), o);
  });
}

// Input gradient. x[h] met w[r] in y[p] where p * stride + r = h + pad. Write h + pad = stride * i + a and
// r = stride * j + a, with 0 <= a < stride: then p = i - j, so that
//   dx[stride * i + a - pad] = sum over j of dy[i - j] * w[stride * j + a].
// For each remainder a (and b, for columns) this is a correlation of stride 1 of dy with the taps of that class in
// reversed order, j = taps - 1 - t, and with channels and filters exchanged. All classes of an image share one
// scratch of dy; a class without taps (stride > window) sums nothing and writes zeros.
struct Class {
  i64 taps;        // j = 0 .. taps - 1
  i64 begin, end;  // the i whose pixel lies inside the image
};
inline Class class_of(i64 a, i64 size, i64 window, i64 stride, i64 pad) {
  return {a < window ? ceil_div(window - a, stride) : 0, ceil_div(pad - a, stride), ceil_div(size + pad - a, stride)};
}

template <class T>
void direct_backward_input(T* dx, const T* dy, const T* w, const Window& s) {
  Scratch<T> packed(Correlation<T>::packed_size(s.R * s.S, s.K, s.C));
  // dy[i - j] over all classes: i from first to last, j below the taps of class 0, which has most.
  const i64 taps_h = ceil_div(s.R, s.stride_h), first_h = s.pad_h / s.stride_h,
            last_h = (s.H - 1 + s.pad_h) / s.stride_h;
  const i64 taps_w = ceil_div(s.S, s.stride_w), first_w = s.pad_w / s.stride_w,
            last_w = (s.W - 1 + s.pad_w) / s.stride_w;
  const i64 rows = last_h - first_h + 1;
  Blocks image{rows + taps_h - 1, last_w - first_w + taps_w, s.K, 1};
  const i64 band = band_rows(s.N, rows, image.size() * i64(sizeof(T))), bands = ceil_div(rows, band);
  image.rows = band + taps_h - 1;

  const auto for_classes = [&](const auto& body) {
    T* at = packed.get();
    for (i64 a = 0; a < s.stride_h; a++) {
      for (i64 b = 0; b < s.stride_w; b++) {
        const Class h = class_of(a, s.H, s.R, s.stride_h, s.pad_h);
        const Class v = class_of(b, s.W, s.S, s.stride_w, s.pad_w);
        const T* last = w + ((a + s.stride_h * (h.taps - 1)) * s.S + b + s.stride_w * (v.taps - 1)) * s.C * s.K;
        body(a, b, h, v,
             Correlation<T>{h.taps, v.taps, s.K, s.C, 1, image, last, -s.stride_h * s.S * s.C * s.K,
                            -s.stride_w * s.C * s.K, 1, s.K, at});
        at += Correlation<T>::packed_size(h.taps * v.taps, s.K, s.C);
      }
    }
  };

  parallel_for(ceil_div(s.C, FILTER_VECTORS * LANES<T>), [&](i64 group) {
    for_classes([&](i64, i64, const Class&, const Class&, const Correlation<T>& o) { pack(o, group); });
  });
  parallel_for(s.N * bands, [&](i64 task) {
    const i64 n = task / bands, begin = first_h + task % bands * band, end = least(begin + band, last_h + 1);
    Scratch<T> blocks(image.size());
    fill_blocks(blocks.get(), image, dy + n * s.P * s.Q * s.K, s.P, s.Q, s.K, begin - (taps_h - 1),
                first_w - (taps_w - 1));
    for_classes([&](i64 a, i64 b, const Class& h, const Class& v, const Correlation<T>& o) {
      const i64 i = most(begin, h.begin), j = v.begin;
      const i64 row = s.stride_h * i + a - s.pad_h, column = s.stride_w * j + b - s.pad_w;
      const Outputs<T> out{dx + ((n * s.H + row) * s.W + column) * s.C, least(end, h.end) - i, v.end - j,
                           s.stride_h * s.W * s.C, s.stride_w * s.C};
      correlate<T>(out, blocks.get() + image.offset(i - begin + taps_h - h.taps, j - first_w + taps_w - v.taps), o);
    });
  });
}

// direct: weight gradient -------------------------------------------------------------------------------------------

// dw[r, s, c, k] = sum over n, p, q of x[n, p * stride_h + r - pad_h, q * stride_w + s - pad_w, c] * dy[n, p, q, k]:
// each pixel adds an outer product of its channels and the filters of dy. At stride 1 the three taps of a row of a
// window meet one pixel w of x with the three outputs q = w + pad_w - s.

// The pixels of one flush of the sums: `rows` runs of `columns` pixels in each of `images` images.
template <class T>
struct Pixels {
  const T *x, *dy;
  i64 images, rows, columns;
  i64 x_image, x_row, x_column, dy_image, dy_row;  // distances in elements; dy is in blocks
  i64 dy_vector;                                   // from one vector of filters to the next
};

template <class T>
struct WeightSums {
  T* dw;
  i64 tap, channel;  // distances in elements
  bool first;        // nothing there yet
};

// TAPS x CHANNELS x VECTORS sums in registers: 3 x 8 x 1 take 3 loads and 8 broadcasts for 24 multiply-adds.
template <class T, int TAPS, int CHANNELS, int VECTORS>
void outer_products(const WeightSums<T>& to, i64 channels, const Pixels<T>& from) {
  if constexpr (CHANNELS > 1) {
    if (channels < CHANNELS) return outer_products<T, TAPS, CHANNELS - 1, VECTORS>(to, channels, from);
  }
  Vec<T> sum[TAPS][CHANNELS][VECTORS] = {};
  for (i64 image = 0; image < from.images; image++) {
    for (i64 row = 0; row < from.rows; row++) {
      const T* x = from.x + image * from.x_image + row * from.x_row;
      const T* dy = from.dy + image * from.dy_image + row * from.dy_row;
      for (i64 column = 0; column < from.columns; column++, x += from.x_column, dy += BLOCK) {
        Vec<T> gradient[TAPS][VECTORS];
#pragma GCC unroll 3
        for (int t = 0; t < TAPS; t++)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; v++) gradient[t][v] = load(dy + v * from.dy_vector - t * BLOCK);
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; c++) {
          const T value = x[c];
#pragma GCC unroll 3
          for (int t = 0; t < TAPS; t++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[t][c][v] += value * gradient[t][v];
        }
      }
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < TAPS; t++)
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; c++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) {
        T* dw = to.dw + t * to.tap + c * to.channel + v * LANES<T>;
        store(dw, to.first ? sum[t][c][v] : load(dw) + sum[t][c][v]);
      }
}

template <class T, int TAPS>
void direct_backward_weight(T* dw, const T* dy, const T* x, const Window& s) {
  constexpr i64 VECTORS = TAPS == 3 ? 1 : 2;
  // A unit of work is a band of rows of one image, or several small images. Some 256 pixels are enough to make the
  // flush of the sums cheap, and few enough to stay in the cache while every tap and channel passes over them.
  const i64 unit_images = most(1, 256 / (s.P * s.Q)), unit_rows = most(1, least(s.P, 256 / s.Q));
  const i64 bands = ceil_div(s.P, unit_rows), units = ceil_div(s.N, unit_images) * bands;
  // A task sums one part of the units for one group of filters. Parts are added up in order at the end.
  const i64 group_filters = VECTORS * BLOCK, groups = ceil_div(s.K, group_filters);
  const i64 K = ceil_div(s.K, BLOCK) * BLOCK, rows = s.R * s.S * s.C;
  const i64 most_parts = most(1, least(ceil_div(TASKS, groups), PARTIAL_BYTES / (rows * K * i64(sizeof(T)))));
  const i64 parts = least(units, most_parts);
  const i64 chunk = ceil_div(s.C, ceil_div(s.C, OUTER_CHANNELS));  // channels at once, in even shares
  Scratch<T> partial(parts * rows * K);

  parallel_for(parts * groups, [&](i64 task) {
    const i64 part = task / groups, k0 = task % groups * group_filters, filters = least(group_filters, s.K - k0);
    // With 3 taps dy has the columns w + pad_w - s for each w of the image and s < 3.
    const Blocks image{unit_rows, TAPS == 3 ? s.W + 2 : s.Q, filters, 1};
    const i64 column0 = TAPS == 3 ? s.pad_w - 2 : 0;
    Scratch<T> blocks(unit_images * image.size());
    if (filters % BLOCK)
      std::memset(blocks.get(), 0, unit_images * image.size() * sizeof(T));  // sums read whole blocks
    const i64 first = part * units / parts, last = (part + 1) * units / parts;
    for (i64 unit = first; unit < last; unit++) {
      const i64 n0 = unit / bands * unit_images, p0 = unit % bands * unit_rows, p1 = least(s.P, p0 + unit_rows);
      const i64 images = least(unit_images, s.N - n0);
      for (i64 n = 0; n < images; n++)
        fill_blocks(&blocks[n * image.size()], image, dy + (n0 + n) * s.P * s.Q * s.K + k0, s.P, s.Q, s.K, p0, column0);
      // Borders are left out by ranges: the rows p, and at one tap a time the columns q, that find r, u inside x.
      for (i64 k = 0; k < filters; k += VECTORS * LANES<T>) {
        for (i64 r = 0; r < s.R; r++) {
          const Range valid = inside(s.P, r, s.stride_h, s.pad_h, s.H);
          const i64 p = most(valid.begin, p0), p_end = least(valid.end, p1), h = p * s.stride_h + r - s.pad_h;
          for (i64 u = 0; u < s.S; u += TAPS) {
            const Range q = TAPS == 3 ? Range{0, s.W} : inside(s.Q, u, s.stride_w, s.pad_w, s.W);
            const i64 x0 = TAPS == 3 ? 0 : q.begin * s.stride_w + u - s.pad_w, dy0 = TAPS == 3 ? 2 : q.begin;
            const auto vector = [&](i64 filter) { return filter / BLOCK * image.block() + filter % BLOCK; };
            for (i64 c = 0; c < s.C; c += chunk) {
              const WeightSums<T> to{&partial[((part * s.R + r) * s.S + u) * s.C * K + c * K + k0 + k], s.C * K, K,
                                     unit == first};
              const Pixels<T> from{x + ((n0 * s.H + h) * s.W + x0) * s.C + c,
                                   blocks.get() + vector(k) + (p - p0) * image.row() + dy0 * BLOCK,
                                   images,
                                   p_end - p,
                                   q.end - q.begin,
                                   s.H * s.W * s.C,
                                   s.stride_h * s.W * s.C,
                                   s.stride_w * s.C,
                                   image.size(),
                                   image.row(),
                                   vector(k + LANES<T>) - vector(k)};
              const i64 channels = least(chunk, s.C - c);
              if (filters - k > LANES<T>)
                outer_products<T, TAPS, OUTER_CHANNELS, VECTORS>(to, channels, from);
              else
                outer_products<T, TAPS, OUTER_CHANNELS, 1>(to, channels, from);
            }
          }
        }
      }
    }
  });

  parallel_ranges(rows, most(1, 8192 / K), [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; row++) {
      for (i64 k = 0; k < s.K; k += LANES<T>) {
        Vec<T> sum{};
        for (i64 part = 0; part < parts; part++) sum += load(&partial[(part * rows + row) * K + k]);
        if (k + LANES<T> <= s.K)
          store(dw + row * s.K + k, sum);
        else
          store_first(dw + row * s.K + k, sum, s.K - k);
      }
    }
  });
}

// The table's entries -----------------------------------------------------------------------------------------------

// Winograd's algorithm is never run in double: gradient checks and references get direct sums.
template <class T>
constexpr bool FLOAT = sizeof(T) == sizeof(float);

template <class T>
void conv2d_forward(T* y, const T* x, const T* w, const Window& s, ConvAlgorithm algorithm) {
  if constexpr (FLOAT<T>)
    if (use_winograd(s, algorithm)) return winograd_forward(y, x, w, s);
  if (algorithm == ConvAlgorithm::naive)
    naive_forward(y, x, w, s);
  else
    direct_forward(y, x, w, s);
}

template <class T>
void conv2d_backward_input(T* dx, const T* dy, const T* w, const Window& s, ConvAlgorithm algorithm) {
  if constexpr (FLOAT<T>)
    if (use_winograd(s, algorithm)) return winograd_backward_input(dx, dy, w, s);
  if (algorithm == ConvAlgorithm::naive)
    naive_backward_input(dx, dy, w, s);
  else
    direct_backward_input(dx, dy, w, s);
}

template <class T>
void conv2d_backward_weight(T* dw, const T* dy, const T* x, const Window& s, ConvAlgorithm algorithm) {
  if constexpr (FLOAT<T>)
    if (use_winograd(s, algorithm)) return winograd_backward_weight(dw, dy, x, s);
  if (algorithm == ConvAlgorithm::naive)
    naive_backward_weight(dw, dy, x, s);
  else if (s.stride_w == 1 && s.S == 3)
    direct_backward_weight<T, 3>(dw, dy, x, s);
  else
    direct_backward_weight<T, 1>(dw, dy, x, s);
}

}  // namespace

template <class T>
void conv2d_kernels(Kernels<T>& table) {
  table.conv2d_forward = conv2d_forward<T>;
  table.conv2d_backward_input = conv2d_backward_input<T>;
  table.conv2d_backward_weight = conv2d_backward_weight<T>;
}

template void conv2d_kernels<float>(Kernels<float>& table);
template void conv2d_kernels<double>(Kernels<double>& table);

}  // namespace tinyres::TINYRES_TARGET
