// 2-D convolution (cross-correlation) and its two gradients, NHWC activations and RSCK weights:
//
//   y[n, p, q, k] = sum over r, s, c of x[n, p * stride_h + r - pad_h, q * stride_w + s - pad_w, c] * w[r, s, c, k]
//
// `naive` is that formula in plain loops, and the formula read backwards for the gradients; it is what the rest is
// tested against. `direct` does the same sums near the rate at which the cores can multiply and add:
//   - an image is first copied into a zero-bordered scratch in blocks of channels (Blocks), so that the inner loops
//     know no borders, and pixels lie a constant distance apart whatever the stride; windows of a single pixel without
//     borders need no copy, their convolution is a product of matrices;
//   - weights are packed in the exact order in which they are read, unless there is too little work to pay for that;
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

// Sums in registers. The two FMA ports need 8 in flight, and more where some wait for loads. 16 (24 in the weight
// gradient of 3 taps) leave room in 32 registers for the weights that several pixels share. Of 16 registers 12 can
// be sums: 8 would be too few (a tenth of the speed).
#if TINYRES_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int TILE = 16, OUTER_SUMS[2] = {16, 24};  // [3 taps?]
#else
constexpr int TILE = 12, OUTER_SUMS[2] = {12, 12};
#endif
constexpr int FILTER_VECTORS = 2;

// Up to so many channels, the weight gradient takes a row of a window as one tap.
constexpr i64 FEW_CHANNELS = 4;

// A convolution of few filters and multiply-adds, as at batch 1, reads the weights where they lie: packing them, and
// passing what one core packed to the others, took longer than the sums.
constexpr i64 UNPACKED_FILTERS = 64, UNPACKED_WORK = 1 << 25;

// Work is cut so that no machine of usual size idles at batch 1 and a scratch image stays in the L2 cache. Tasks that
// share an image's filters do FILTERS at least, to be worth a copy of the image each.
constexpr i64 TASKS = 16, FILTERS = 64, SCRATCH_BYTES = 512 << 10, PARTIAL_BYTES = 64 << 20;

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

// The output of filter k at element `place` of y.
template <class T>
inline T finish(T sum, const Epilogue<T>& epilogue, i64 place, i64 k) {
  if (epilogue.bias) sum += epilogue.bias[k];
  if (epilogue.residual) sum += epilogue.residual[place];
  return epilogue.relu && T(0) > sum ? T(0) : sum;
}

template <class T>
void naive_forward(T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Window& s) {
  parallel_for(s.N * s.P, [&](i64 row) {
    const i64 n = row / s.P, p = row % s.P;
    for (i64 q = 0; q < s.Q; q++) {
      const i64 pixel = row * s.Q + q;
      T* out = y + pixel * s.K;
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
      for (i64 k = 0; k < s.K; k++) out[k] = finish(out[k], epilogue, pixel * s.K + k, k);
    }
  });
}

// Each product x * w in y passes dy * w back to that x.
template <class T>
void naive_backward_input(T* dx, const T* dy, const T* w, const Window& s, bool add) {
  parallel_for(s.N, [&](i64 n) {
    T* image = dx + n * s.H * s.W * s.C;
    if (!add)
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

// What blocks are filled from: rows of elements in an array that ends at `end`, distances in elements. Columns are
// `pixel` apart, and may overlap.
template <class T>
struct Image {
  const T *x, *end;
  i64 rows, elements, row, pixel;
};

// Fills blocks with the rows from row0 on and the columns that begin at element `first`, each of b.C elements, and with
// zeros outside of the image. What the last channel block of a column has beyond b.C may be anything.
template <class T>
void fill_blocks(T* blocks, const Blocks& b, const Image<T>& image, i64 row0, i64 first) {
  const i64 step = b.stride * image.pixel, count = b.phase() / BLOCK;
  for (i64 row = row0; row < row0 + b.rows; row++, blocks += b.row()) {
    const i64 elements = row >= 0 && row < image.rows ? image.elements : 0;
    const T* const from = image.x + row * image.row;
    for (i64 c = 0; c < b.C; c += BLOCK) {
      const i64 channels = least(BLOCK, b.C - c);
      for (i64 phase = 0; phase < b.stride; phase++) {
        T* const to = blocks + c / BLOCK * b.block() + phase * b.phase();
        const i64 start = first + phase * image.pixel + c;  // columns at start, start + step, ...
        // From begin to end a column lies in the row, and BLOCK elements of it in the array.
        const i64 last = elements ? least(elements - channels, image.end - from - BLOCK) - start : -1;
        const i64 begin = start < 0 ? least(count, ceil_div(-start, step)) : 0;
        const i64 end = last < 0 ? begin : most(begin, least(count, last / step + 1));
        const auto at_border = [&](i64 i) {
          for (i64 k = 0, at = start + i * step; k < channels; k++, at++)
            to[i * BLOCK + k] = at >= 0 && at < elements ? from[at] : 0;
        };
        for (i64 i = 0; i < begin; i++) at_border(i);
        for (i64 i = begin; i < end; i++)
          for (int k = 0; k < BLOCK; k += LANES<T>) store(to + i * BLOCK + k, load(from + start + i * step + k));
        for (i64 i = end; i < count; i++) at_border(i);
      }
    }
  }
}

// direct: forward and input gradient --------------------------------------------------------------------------------

template <class T>
constexpr i64 GROUP = FILTER_VECTORS * LANES<T>;  // filters that are summed together

// Taps that neighbour each other in the blocks, up to 3.
struct Taps {
  i64 count;
  i64 x, w;  // where the first lies in the blocks, and in the weights
};

// y(p, q, k) = sum over r < R, s < S, c of x(p * stride_h + r, q * stride_w + s, c) * w(r, s, c, k), with x in blocks
// of column stride stride_w. Distances are in elements.
template <class T>
struct Correlation {
  i64 R, S, C, K, stride_h;
  const T* w;
  i64 w_r, w_s, w_c, w_k;                    // w(r, s, c, k) is w[r * w_r + s * w_s + c * w_c + k * w_k]
  T* y;                                      // that of p = 0, q = 0 in the first image
  Epilogue<T> epilogue;                      // its residual, too, as of that place
  i64 begin, end, columns, y_row, y_column;  // begin <= p < end, q < columns
  bool direct;                               // x is read where it lies: one tap, and no borders
  Blocks x;                                  // or else in blocks, of which q = 0 in the first row meets x_first
  i64 x_first, x_row, x_column, x_block;     // x_row and x_column: from one output to the next
  T* packed;                                 // packed_size() elements, or null: w is read where it lies
  Taps* taps;                                // R * S at most
  i64 groups;

  i64 packed_size() const { return R * S * C * ceil_div(K, LANES<T>) * LANES<T>; }
};

// The taps in the order in which they are summed: rows, phases, columns.
template <class T>
void list_taps(Correlation<T>& o) {
  o.groups = 0;
  for (i64 r = 0; r < o.R; r++) {
    for (i64 phase = 0; phase < least(o.S, o.x.stride); phase++) {
      for (i64 s = phase, left = ceil_div(o.S - s, o.x.stride); left > 0;) {
        const i64 count = left == 4 ? 2 : least(left, 3);
        o.taps[o.groups++] = {count, o.x.offset(r, s), r * o.w_r + s * o.w_s};
        left -= count, s += count * o.x.stride;
      }
    }
  }
}

// Packs the weights of a group of filters in the order of reading: channel block, taps, channel, tap, filter.
template <class T>
void pack(const Correlation<T>& o, i64 k0) {
  const i64 width = least(GROUP<T>, ceil_div(o.K - k0, LANES<T>) * LANES<T>), filters = least(width, o.K - k0);
  T* to = o.packed + k0 * o.R * o.S * o.C;
  for (i64 c0 = 0; c0 < o.C; c0 += BLOCK) {
    for (i64 i = 0; i < o.groups; i++) {
      for (i64 c = c0; c < least(c0 + BLOCK, o.C); c++) {
        for (i64 t = 0; t < o.taps[i].count; t++, to += width) {
          const T* from = o.w + o.taps[i].w + t * o.x.stride * o.w_s + c * o.w_c + k0 * o.w_k;
          if (o.w_k == 1 && filters == width) {
            for (i64 k = 0; k < width; k += LANES<T>) store(to + k, load(from + k));
          } else {
            for (i64 k = 0; k < filters; k++) to[k] = from[k * o.w_k];
            for (i64 k = filters; k < width; k++) to[k] = 0;
          }
        }
      }
    }
  }
}

// Adds TAPS neighbouring taps of a channel block to the sums of PIXELS neighbouring outputs times VECTORS vectors of
// filters; `tap` and `channel` are distances in w. The weights of a channel are loaded once, and each pixel is
// broadcast once for all the outputs that it meets: with 3 taps 18 broadcasts and 3 loads serve 48 multiply-adds, where
// one tap at a time needs 17 loads for 16 and waits for the load ports.
template <class T, int TAPS, int PIXELS, int VECTORS>
inline void add_taps(Vec<T> (&sum)[PIXELS][VECTORS], const T* pixel, i64 column, const T* w, i64 tap, i64 channel,
                     i64 channels) {
  for (i64 c = 0; c < channels; c++, pixel++, w += channel) {
    Vec<T> weights[TAPS][VECTORS];
#pragma GCC unroll 3
    for (int t = 0; t < TAPS; t++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) weights[t][v] = load(w + t * tap + v * LANES<T>);
#pragma GCC unroll 32
    for (int i = 0; i < PIXELS + TAPS - 1; i++) {
      const T value = pixel[i * column];
#pragma GCC unroll 3
      for (int t = 0; t < TAPS; t++)
        if (i - t >= 0 && i - t < PIXELS)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; v++) sum[i - t][v] += value * weights[t][v];
    }
  }
}

// One tile of outputs: all taps and channels, the sums in registers. Not inline, for then they would not all be.
template <class T, int PIXELS, int VECTORS>
__attribute__((noinline)) void correlate_tile(T* y, i64 k0, const T* x, const T* w, const Correlation<T>& o) {
  constexpr i64 WIDTH = VECTORS * LANES<T>;
  Vec<T> sum[PIXELS][VECTORS] = {};
  if (o.direct) {
    // With few filters most tiles meet their pixels for the first time, and ask for those of the next tile meanwhile.
    const i64 step = o.K > FILTERS ? o.C : BLOCK, channel = o.packed ? WIDTH : o.w_c;
    for (i64 c = 0; c < o.C && o.groups > 0; c += step) {
      for (int i = 0; i < PIXELS && step == BLOCK; i++) __builtin_prefetch(x + (i + PIXELS) * o.x_column + c);
      add_taps<T, 1>(sum, x + c, o.x_column, w + c * channel, 0, channel, least(step, o.C - c));
    }
  } else {
    const T* packed = w;
    for (i64 c = 0; c < o.C; c += BLOCK, x += o.x_block) {
      const i64 channels = least(BLOCK, o.C - c);
      for (const Taps* taps = o.taps; taps < o.taps + o.groups; taps++) {
        const i64 tap = o.packed ? WIDTH : o.x.stride * o.w_s, channel = o.packed ? taps->count * WIDTH : o.w_c;
        const T* const weights = o.packed ? packed : w + taps->w + c * channel;
        packed += channels * taps->count * WIDTH;
        if (taps->count == 3)
          add_taps<T, 3>(sum, x + taps->x, BLOCK, weights, tap, channel, channels);
        else if (taps->count == 2)
          add_taps<T, 2>(sum, x + taps->x, BLOCK, weights, tap, channel, channels);
        else
          add_taps<T, 1>(sum, x + taps->x, BLOCK, weights, tap, channel, channels);
      }
    }
  }
  const Epilogue<T>& epilogue = o.epilogue;
  const i64 place = y - o.y;
  if (o.K - k0 >= VECTORS * LANES<T>) {
    if (epilogue.bias) {
#pragma GCC unroll 32
      for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sum[i][v] += load(epilogue.bias + k0 + v * LANES<T>);
    }
    if (epilogue.residual) {
#pragma GCC unroll 32
      for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sum[i][v] += load(epilogue.residual + place + i * o.y_column + v * LANES<T>);
    }
    if (epilogue.relu) {
#pragma GCC unroll 32
      for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sum[i][v] = larger<T>(Vec<T>{}, sum[i][v]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) store(y + i * o.y_column + v * LANES<T>, sum[i][v]);
  } else {
    // By way of memory, since a number of lanes known only at run time would keep the sums out of registers.
    T tile[PIXELS][VECTORS * LANES<T>];
    __builtin_memcpy(tile, sum, sizeof tile);
    for (int i = 0; i < PIXELS; i++)
      for (i64 k = 0; k < o.K - k0; k++)
        y[i * o.y_column + k] = finish(tile[i][k], epilogue, place + i * o.y_column + k, k0 + k);
  }
}

// The tile of `pixels` <= PIXELS outputs.
template <class T, int PIXELS, int VECTORS>
inline void tile_of(i64 pixels, T* y, i64 k0, const T* x, const T* w, const Correlation<T>& o) {
  if constexpr (PIXELS > 1) {
    if (pixels < PIXELS) return tile_of<T, PIXELS - 1, VECTORS>(pixels, y, k0, x, w, o);
  }
  correlate_tile<T, PIXELS, VECTORS>(y, k0, x, w, o);
}

// The outputs of the group of filters from k0 in `rows` rows, each in as few tiles as will do, all of about one size.
template <class T, int VECTORS>
void correlate_group(T* y, i64 rows, i64 k0, const T* x, const Correlation<T>& o) {
  constexpr i64 PIXELS = TILE / VECTORS;
  if (o.columns <= 0) return;  // a class of pixels that a narrow image does not have
  const T* const w = o.packed ? o.packed + k0 * o.R * o.S * o.C : o.w + k0;
  const i64 tiles = ceil_div(o.columns, PIXELS);
  const i64 pixels = o.columns / tiles, larger = o.columns % tiles;  // the first tiles have one pixel more
  for (i64 p = 0; p < rows; p++, x += o.x_row) {
    for (i64 tile = 0, q = 0; tile < tiles; tile++) {
      const i64 count = pixels + (tile < larger);
      tile_of<T, PIXELS, VECTORS>(count, y + p * o.y_row + q * o.y_column + k0, k0, x + q * o.x_column, w, o);
      q += count;
    }
  }
}

// How the work on N images is cut: a task does some rows of one image, or some images where these are small and the
// weights large, so that those are read less often. With few images tasks share the filters, then the rows.
struct Cut {
  i64 images, rows, filters;  // of a task
  i64 sets, bands, parts;     // how many there are of each
};
template <class T>
Cut cut_work(i64 N, i64 rows, i64 K, i64 image_size, i64 weights) {
  constexpr i64 ELEMENTS = SCRATCH_BYTES / sizeof(T);
  i64 bands = least(rows, ceil_div(image_size, ELEMENTS));
  const i64 images = most(1, least(least(N, ELEMENTS / image_size), weights / ELEMENTS)), sets = ceil_div(N, images);
  const i64 share = most(K * sets * bands / TASKS, FILTERS);
  const i64 filters = ceil_div(share, GROUP<T>) * GROUP<T>, parts = ceil_div(K, filters);
  bands = least(rows, bands * ceil_div(TASKS, sets * bands * parts));
  const i64 band = ceil_div(rows, bands);
  return {images, band, filters, sets, ceil_div(rows, band), parts};
}

// What the correlations of one call share.
template <class T>
struct Images {
  i64 N, begin, end;     // images, and the rows p of any of the correlations
  Image<T> x;            // the first image
  i64 x_image, y_image;  // from one image to the next
  i64 row, column;       // of output row p: block row 0 is row p * stride_h + row, its column 0 begins at that element
};

// Runs `count` correlations that read the same blocks.
template <class T>
void correlate(const Correlation<T>* all, i64 count, const Images<T>& s, const Cut& cut) {
  const i64 K = all->K, stride_h = all->stride_h;
  const Blocks& blocks = all->x;
  if (all->packed)
    parallel_for(ceil_div(K, GROUP<T>), [&](i64 group) {
      for (i64 i = 0; i < count; i++) pack(all[i], group * GROUP<T>);
    });
  parallel_for(cut.sets * cut.bands * cut.parts, [&](i64 task) {
    const i64 part = task % cut.parts, band = task / cut.parts % cut.bands, set = task / cut.parts / cut.bands;
    const i64 p0 = s.begin + band * cut.rows, p1 = least(p0 + cut.rows, s.end);
    const i64 n0 = set * cut.images, n1 = least(n0 + cut.images, s.N);
    Scratch<T> scratch(all->direct ? 0 : cut.images * blocks.size());
    for (i64 n = n0; n < n1; n++) {
      if (all->direct) break;
      Image<T> image = s.x;
      image.x += n * s.x_image;
      fill_blocks(&scratch[(n - n0) * blocks.size()], blocks, image, p0 * stride_h + s.row, s.column);
    }
    // Filters outermost: the weights of a group stay in the cache while rows and images pass.
    for (i64 k0 = part * cut.filters; k0 < least((part + 1) * cut.filters, K); k0 += GROUP<T>) {
      for (i64 n = n0; n < n1; n++) {
        for (const Correlation<T>* o = all; o < all + count; o++) {
          const i64 p = most(p0, o->begin), rows = least(p1, o->end) - p;
          T* y = o->y + n * s.y_image + p * o->y_row;
          const T* x = o->direct ? s.x.x + n * s.x_image + p * o->x_row
                                 : &scratch[(n - n0) * blocks.size() + o->x_first + (p - p0) * o->x_row];
          if (K - k0 > LANES<T>)
            correlate_group<T, FILTER_VECTORS>(y, rows, k0, x, *o);
          else
            correlate_group<T, 1>(y, rows, k0, x, *o);
        }
      }
    }
  });
}

// How the windows of s see x. If `runs`, the S * C elements behind a row of a window, which lie side by side, are one
// tap of so many channels; rows that no window meets are left out; and where windows are single pixels, these are taken
// as one image with rows of any length.
template <class T>
struct View {
  i64 N, P, Q, S, C, stride_h, stride_w;
  Image<T> x;
  i64 x_image;

  Blocks blocks(i64 rows, i64 R) const { return {(rows - 1) * stride_h + R, (Q - 1) * stride_w + S, C, stride_w}; }
};
template <class T>
View<T> view_of(const T* x, const Window& s, bool runs) {
  View<T> v{s.N, s.P, s.Q, s.S, s.C, s.stride_h, s.stride_w, {}, s.H * s.W * s.C};
  v.x = {x, x + s.N * s.H * s.W * s.C, s.H, s.W * s.C, s.W * s.C, s.C};
  if (runs) v.S = 1, v.C = s.S * s.C, v.x.pixel *= s.stride_w, v.stride_w = 1;
  if (s.R == 1 && s.pad_h == 0) v.x.rows = s.P, v.x.row *= s.stride_h, v.stride_h = 1;
  if (s.R * s.S * s.stride_h * s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0) {
    const i64 pixels = s.N * s.P * s.Q;
    for (v.Q = most(s.Q, 128); pixels % v.Q;) v.Q--;
    v.N = 1, v.P = v.x.rows = pixels / v.Q, v.x.row = v.x.elements = v.Q * s.C;
  }
  return v;
}

// y from x where w(r, s, c, k) is w[r * w_r + s * w_s + c * w_c + k * w_k].
template <class T>
void correlate_images(T* y, const T* x, const T* w, i64 w_r, i64 w_s, i64 w_c, i64 w_k, const Epilogue<T>& epilogue,
                      const Window& s) {
  const View<T> v = view_of(x, s, s.S == 1);
  const Cut cut = cut_work<T>(v.N, v.P, s.K, v.blocks(v.P, s.R).size(), s.R * s.S * s.C * s.K);
  Scratch<Taps> taps(s.R * s.S);
  Correlation<T> o{};
  o.R = s.R, o.S = s.S, o.C = s.C, o.K = s.K, o.stride_h = v.stride_h;
  o.w = w, o.w_r = w_r, o.w_s = w_s, o.w_c = w_c, o.w_k = w_k;
  o.y = y, o.epilogue = epilogue, o.begin = 0, o.end = v.P, o.columns = v.Q, o.y_row = v.Q * s.K, o.y_column = s.K;
  o.direct = s.R == 1 && s.S == 1 && s.pad_h == 0 && s.pad_w == 0;
  o.x = v.blocks(cut.rows, s.R);
  o.x_row = o.direct ? v.x.row : v.stride_h * o.x.row(), o.x_column = o.direct ? v.x.pixel : BLOCK;
  o.x_block = o.x.block();
  const bool as_they_lie = w_k == 1 && s.K % LANES<T> == 0 && s.K <= UNPACKED_FILTERS &&
                           s.N * s.P * s.Q * s.R * s.S * s.C * s.K <= UNPACKED_WORK;
  Scratch<T> packed(as_they_lie ? 0 : o.packed_size());
  o.packed = as_they_lie ? nullptr : packed.get(), o.taps = taps.get();
  list_taps(o);
  correlate(&o, 1, {v.N, 0, v.P, v.x, v.x_image, v.P * v.Q * s.K, -s.pad_h, -s.pad_w * s.C}, cut);
}

template <class T>
void direct_forward(T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Window& s) {
  correlate_images(y, x, w, s.S * s.C * s.K, s.C * s.K, s.K, i64(1), epilogue, s);
}

// Input gradient. x[h] met w[r] in y[p] where p * stride + r = h + pad. Write h + pad = stride * i + a and
// r = stride * j + a, with 0 <= a < stride: then p = i - j, so that
//   dx[stride * i + a - pad] = sum over j of dy[i - j] * w[stride * j + a].
// For each remainder a (and b, for columns) this is a correlation of stride 1 of dy with the taps of that class in
// reversed order, j = taps - 1 - t, and with channels and filters exchanged. All classes of an image share one
// scratch of dy; a class without taps (stride > window) sums nothing and writes zeros. At stride 1 there is one class,
// another plain correlation.
struct Class {
  i64 taps;        // j = 0 .. taps - 1
  i64 begin, end;  // the i whose pixel lies inside the image
};
inline Class class_of(i64 a, i64 size, i64 window, i64 stride, i64 pad) {
  return {a < window ? ceil_div(window - a, stride) : 0, ceil_div(pad - a, stride), ceil_div(size + pad - a, stride)};
}

template <class T>
void direct_backward_input(T* dx, const T* dy, const T* w, const Window& s, bool add) {
  const auto epilogue = [add](T* y) { return Epilogue<T>{nullptr, add ? y : nullptr, false}; };
  const i64 w_r = -s.stride_h * s.S * s.C * s.K, w_s = -s.stride_w * s.C * s.K;
  if (s.stride_h == 1 && s.stride_w == 1) {
    const Window mirrored{s.N, s.P, s.Q, s.K, s.C, s.R, s.S, s.H, s.W, 1, 1, s.R - 1 - s.pad_h, s.S - 1 - s.pad_w};
    const T* const last = w + (s.R * s.S - 1) * s.C * s.K;
    return correlate_images(dx, dy, last, w_r, w_s, i64(1), s.K, epilogue(dx), mirrored);
  }
  // dy[i - j] over all classes: i from first to last, j below the taps of class 0, which has most.
  const i64 taps_h = ceil_div(s.R, s.stride_h), first_h = s.pad_h / s.stride_h,
            last_h = (s.H - 1 + s.pad_h) / s.stride_h;
  const i64 taps_w = ceil_div(s.S, s.stride_w), first_w = s.pad_w / s.stride_w,
            last_w = (s.W - 1 + s.pad_w) / s.stride_w;
  const i64 rows = last_h - first_h + 1;
  Blocks blocks{rows + taps_h - 1, last_w - first_w + taps_w, s.K, 1};
  const Cut cut = cut_work<T>(s.N, rows, s.C, blocks.size(), s.R * s.S * s.C * s.K);
  blocks.rows = cut.rows + taps_h - 1;

  Scratch<Correlation<T>> classes(s.stride_h * s.stride_w);
  Scratch<T> packed(s.R * s.S * s.K * ceil_div(s.C, LANES<T>) * LANES<T>);
  Scratch<Taps> taps(s.R * s.S);
  Correlation<T>* o = classes.get();
  T* at = packed.get();
  Taps* list = taps.get();
  for (i64 a = 0; a < s.stride_h; a++) {
    for (i64 b = 0; b < s.stride_w; b++, o++) {
      const Class h = class_of(a, s.H, s.R, s.stride_h, s.pad_h);
      const Class v = class_of(b, s.W, s.S, s.stride_w, s.pad_w);
      const T* last = w + ((a + s.stride_h * (h.taps - 1)) * s.S + b + s.stride_w * (v.taps - 1)) * s.C * s.K;
      T* y = dx + ((a - s.pad_h) * s.W + v.begin * s.stride_w + b - s.pad_w) * s.C;
      *o = {};
      o->R = h.taps, o->S = v.taps, o->C = s.K, o->K = s.C, o->stride_h = 1;
      o->w = last, o->w_r = w_r, o->w_s = w_s, o->w_c = 1, o->w_k = s.K;
      o->y = y, o->epilogue = epilogue(y), o->begin = h.begin, o->end = h.end, o->columns = v.end - v.begin;
      o->y_row = s.stride_h * s.W * s.C, o->y_column = s.stride_w * s.C;
      o->direct = s.R == 1 && s.S == 1 && s.pad_h == 0 && s.pad_w == 0;
      o->x = blocks, o->x_first = blocks.offset(taps_h - h.taps, v.begin - first_w + taps_w - v.taps);
      o->x_row = o->direct ? s.Q * s.K : blocks.row(), o->x_column = o->direct ? s.K : BLOCK;
      o->x_block = blocks.block();
      o->packed = at, o->taps = list;
      list_taps(*o);
      at += o->packed_size(), list += h.taps * v.taps;
    }
  }
  const Image<T> image{dy, dy + s.N * s.P * s.Q * s.K, s.P, s.Q * s.K, s.Q * s.K, s.K};
  correlate(
      classes.get(), s.stride_h * s.stride_w,
      {s.N, first_h, last_h + 1, image, s.P * s.Q * s.K, s.H * s.W * s.C, 1 - taps_h, (first_w - (taps_w - 1)) * s.K},
      cut);
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
__attribute__((noinline)) void outer_products(const WeightSums<T>& to, const Pixels<T>& from) {
  T* const dw = to.dw;
  const i64 tap = to.tap, channel = to.channel;
  const bool first = to.first;
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
        T* at = dw + t * tap + c * channel + v * LANES<T>;
        store(at, first ? sum[t][c][v] : load(at) + sum[t][c][v]);
      }
}

// The same for `channels` <= CHANNELS.
template <class T, int TAPS, int CHANNELS, int VECTORS>
inline void products_of(i64 channels, const WeightSums<T>& to, const Pixels<T>& from) {
  if constexpr (CHANNELS > 1) {
    if (channels < CHANNELS) return products_of<T, TAPS, CHANNELS - 1, VECTORS>(channels, to, from);
  }
  outer_products<T, TAPS, CHANNELS, VECTORS>(to, from);
}

// In how many parts the pixels are summed, where tasks that do the same part share the filters: as many tasks as
// wanted, then as little traffic as possible. Each share reads x again; each part writes all its sums, of which there
// may be `limit` elements, to be read once more.
inline i64 count_parts(i64 x, i64 weights, i64 units, i64 most_shares, i64 limit) {
  i64 best = 0, tasks = 0, cost = 0;
  for (i64 doubling = 1; doubling <= TASKS; doubling *= 2) {
    const i64 parts = least(doubling, units), shares = least(most_shares, TASKS / parts);
    const i64 traffic = shares * x + 2 * parts * weights;
    if (parts > 1 && parts * weights > limit) break;
    if (parts * shares > tasks || (parts * shares == tasks && traffic < cost))
      best = parts, tasks = parts * shares, cost = traffic;
  }
  return best;
}

template <class T, int TAPS>
void direct_backward_weight(T* dw, const T* dy, const T* x, const Window& s) {
  constexpr i64 VECTORS = TAPS == 3 ? 1 : 2, CHANNELS = OUTER_SUMS[TAPS == 3] / TAPS / VECTORS;
  const bool runs = s.S == 1 || (s.C <= FEW_CHANNELS && TAPS == 1);
  const View<T> v = view_of(x, s, runs);
  // A unit of work is a band of rows of one image, or several small images. So many pixels are enough to make the
  // flush of the sums cheap, and few enough to stay in the cache while every tap and channel passes over them.
  const i64 most_shares = ceil_div(s.K, FILTERS), fewest_parts = ceil_div(TASKS, most_shares);
  const i64 pixels = most(128, least(TAPS == 3 ? 512 : 256, v.N * v.P * v.Q / fewest_parts));
  const i64 unit_images = most(1, pixels / (v.P * v.Q));
  const i64 bands = ceil_div(v.P, most(1, least(v.P, pixels / v.Q))), unit_rows = ceil_div(v.P, bands);
  const i64 units = ceil_div(v.N, unit_images) * bands;
  // A task sums one part of the units for some filters. Parts are added up in order at the end.
  const i64 K = ceil_div(s.K, BLOCK) * BLOCK, rows = s.R * s.S * s.C;
  const i64 parts = count_parts(s.N * s.H * s.W * s.C, rows * K, units, most_shares, PARTIAL_BYTES / sizeof(T));
  const i64 share = ceil_div(ceil_div(s.K, ceil_div(TASKS, parts)), FILTERS) * FILTERS, shares = ceil_div(s.K, share);
  Scratch<T> partial(parts * rows * K);

  // Borders are left out by ranges, or are zeros in blocks where a run of channels reaches over them. Without such
  // runs, few channels are read where they are; many would be strewn over too many lines of the cache.
  const bool borders = runs && (s.S > 1 || s.pad_w > 0), direct = s.C <= 64 && !borders;
  Blocks xs = v.blocks(unit_rows, s.R);
  if (!borders) xs.columns = runs ? v.Q : s.W;

  parallel_for(parts * shares, [&](i64 task) {
    const i64 part = task / shares, k0 = task % shares * share, filters = least(share, s.K - k0);
    // With 3 taps dy has the columns w + pad_w - s for each w of the image and s < 3.
    const Blocks ys{unit_rows, TAPS == 3 ? s.W + 2 : v.Q, filters, 1};
    Scratch<T> x_blocks(direct ? 0 : unit_images * xs.size()), dy_blocks(unit_images * ys.size());
    if (filters % BLOCK)
      std::memset(dy_blocks.get(), 0, unit_images * ys.size() * sizeof(T));  // sums read whole blocks
    const i64 first = part * units / parts, last = (part + 1) * units / parts;
    for (i64 unit = first; unit < last; unit++) {
      const i64 n0 = unit / bands * unit_images, p0 = unit % bands * unit_rows, p1 = least(v.P, p0 + unit_rows);
      const i64 images = least(unit_images, v.N - n0), h0 = p0 * v.stride_h - s.pad_h, y_row = v.Q * s.K;
      for (i64 n = 0; n < images; n++) {
        Image<T> from = v.x;
        from.x += (n0 + n) * v.x_image;
        if (!direct) fill_blocks(&x_blocks[n * xs.size()], xs, from, h0, borders ? -s.pad_w * s.C : 0);
        from = {dy + (n0 + n) * v.P * y_row + k0, dy + v.N * v.P * y_row, v.P, y_row - k0, y_row, s.K};
        fill_blocks(&dy_blocks[n * ys.size()], ys, from, p0, TAPS == 3 ? (s.pad_w - 2) * s.K : 0);
      }
      for (i64 k = 0; k < filters; k += VECTORS * LANES<T>) {
        const auto vector = [&](i64 filter) { return filter / BLOCK * ys.block() + filter % BLOCK; };
        for (i64 c = 0, channels; c < v.C; c += channels) {
          // Channels at once: even shares of what is left of the block.
          const i64 left = least(BLOCK - c % BLOCK, v.C - c);
          channels = ceil_div(left, ceil_div(left, CHANNELS));
          for (i64 r = 0; r < s.R; r++) {
            const Range valid = inside(v.P, r, v.stride_h, s.pad_h, v.x.rows);  // rows p that find r inside x
            const i64 p = most(valid.begin, p0) - p0, p_end = least(valid.end, p1) - p0, h = p * v.stride_h + r;
            for (i64 u = 0; u < v.S; u += TAPS) {
              const Range q = TAPS == 3 ? Range{0, s.W}
                              : borders ? Range{0, v.Q}
                                        : inside(v.Q, u, v.stride_w, s.pad_w, runs ? v.Q : s.W);
              const i64 x0 = TAPS == 3 || borders ? 0 : q.begin * v.stride_w + u - s.pad_w,
                        dy0 = TAPS == 3 ? 2 : q.begin;
              const WeightSums<T> to{&partial[(((part * s.R + r) * v.S + u) * v.C + c) * K + k0 + k], v.C * K, K,
                                     unit == first};
              Pixels<T> from;
              from.images = images, from.rows = p_end - p, from.columns = q.end - q.begin;
              if (direct) {
                from.x = v.x.x + n0 * v.x_image + (h0 + h) * v.x.row + x0 * v.x.pixel + c;
                from.x_image = v.x_image, from.x_row = v.stride_h * v.x.row, from.x_column = v.stride_w * v.x.pixel;
              } else {
                from.x = &x_blocks[c / BLOCK * xs.block() + xs.offset(h, x0) + c % BLOCK];
                from.x_image = xs.size(), from.x_row = v.stride_h * xs.row(), from.x_column = BLOCK;
              }
              from.dy = &dy_blocks[vector(k) + p * ys.row() + dy0 * BLOCK];
              from.dy_image = ys.size(), from.dy_row = ys.row(), from.dy_vector = vector(k + LANES<T>) - vector(k);
              if (filters - k > LANES<T>)
                products_of<T, TAPS, CHANNELS, VECTORS>(channels, to, from);
              else
                products_of<T, TAPS, CHANNELS, 1>(channels, to, from);
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
void conv2d_forward(T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Window& s,
                    ConvAlgorithm algorithm) {
  if constexpr (FLOAT<T>)
    if (use_winograd(s, algorithm)) return winograd_forward(y, x, w, epilogue, s);
  if (algorithm == ConvAlgorithm::naive)
    naive_forward(y, x, w, epilogue, s);
  else
    direct_forward(y, x, w, epilogue, s);
}

template <class T>
void conv2d_backward_input(T* dx, const T* dy, const T* w, const Window& s, ConvAlgorithm algorithm, bool add) {
  if constexpr (FLOAT<T>)
    if (use_winograd(s, algorithm)) return winograd_backward_input(dx, dy, w, s, add);
  if (algorithm == ConvAlgorithm::naive)
    naive_backward_input(dx, dy, w, s, add);
  else
    direct_backward_input(dx, dy, w, s, add);
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
