// Batched matrix product: y (M, N) = a (M, K) times b (K, N), operands of any strides.
//
// A block has 16 x 16 threads and a square tile of y, each thread R x R sums of it in registers, TILE = 16 * R on a
// side. It walks along K in steps of STEP, whose slices of a and b all threads bring into shared memory, so that
// every element is read once a tile instead of once a sum. R = 8 does the most arithmetic per element read; R = 4 and
// 1 are for products with too few tiles of that size to fill a GPU. Where tiles stay few and K is long, K is cut into
// parts that are blocks of their own and a second kernel adds what they find, always in the same order.
//
// Which element of a slice a thread fetches depends on the operand: neighbouring threads take neighbours along K where
// those lie side by side in memory (a row-major, or b transposed), else neighbours across.
#include "common.h"

namespace tinyres {
namespace {

constexpr int SIDE = 16, THREADS = SIDE * SIDE;
constexpr int FETCHED = 4;  // elements of each operand that a thread brings in a step

// Two blocks for each of the 132 multiprocessors of an H100, nearly. Not asked of the GPU at hand, as the order of
// sums depends on it.
constexpr i64 ENOUGH_BLOCKS = 256;
constexpr i64 MIN_DEPTH = 128;  // the least share of K that is worth a block of its own

template <int R>
constexpr int TILE = SIDE * R;
template <int R>
constexpr int STEP = FETCHED * THREADS / TILE<R>;
template <int R>
constexpr int CHUNK = R < 4 ? R : 4;  // neighbouring elements of a line of the tile that one thread reads at once

// [k][line]. Rows are lengthened so that neighbours along K fall into different banks (at most two meet, in float),
// and stay a multiple of a chunk, which is read in one instruction.
template <class T, int R>
using Slice = Wide<T>[STEP<R>][TILE<R> + CHUNK<R>];

template <class T>
struct Product {
  const T *a, *b;
  i64 batch, M, N, K;
  i64 a_batch, b_batch;
  MatrixView a_view, b_view;
};

// Brings one thread's share of an operand's slices, from memory to registers and from there to shared memory. Seen
// from here a and b are alike: lines, which are rows of a or columns of b, along K. Beyond the edges are zeros.
template <class T, int R>
class Carrier {
 public:
  // x is the first element of the first slice; from there on there are `lines`.
  __device__ Carrier(const T* x, i64 line_stride, i64 k_stride, i64 lines) : k_stride_(k_stride) {
    const int t = int(threadIdx.x);
    along_k_ = k_stride == 1;
    line_ = along_k_ ? t / STEP<R> : t % TILE<R>;
    k_ = along_k_ ? t % STEP<R> : t / TILE<R>;
    from_ = x + line_ * line_stride + k_ * k_stride;
    hop_ = along_k_ ? line_hop() * line_stride : k_hop() * k_stride;
    lines_ = int(min(lines, i64(TILE<R>)));
  }

  // Of the next slice, in which K has `depth` left.
  __device__ void fetch(i64 depth) {
    const int ks = int(min(depth, i64(STEP<R>)));
#pragma unroll
    for (int i = 0; i < FETCHED; i++) {
      const bool inside = line_ + i * line_hop() < lines_ && k_ + i * k_hop() < ks;
      held_[i] = inside ? wide(from_[i * hop_]) : Wide<T>(0);
    }
    from_ += STEP<R> * k_stride_;
  }

  __device__ void place(Slice<T, R>& slice) const {
#pragma unroll
    for (int i = 0; i < FETCHED; i++) slice[k_ + i * k_hop()][line_ + i * line_hop()] = held_[i];
  }

 private:
  // From one held element to the next.
  __device__ int line_hop() const { return along_k_ ? THREADS / STEP<R> : 0; }
  __device__ int k_hop() const { return along_k_ ? 0 : THREADS / TILE<R>; }

  bool along_k_;
  const T* from_;
  i64 hop_, k_stride_;
  int line_, k_, lines_;
  Wide<T> held_[FETCHED];
};

// The line of the tile that is number r of thread t's: chunks of neighbours, the chunks of all threads side by side.
template <int R>
__device__ int line_of(int t, int r) {
  return (r / CHUNK<R> * SIDE + t) * CHUNK<R> + r % CHUNK<R>;
}

// y (parts, batch, M, N), one part for each `depth` of K. Out is T, or Wide<T> if the parts are yet to be added. Two
// blocks of the largest tile share a multiprocessor if held to 128 registers a thread, which float can do.
template <class T, int R, class Out>
__global__ void __launch_bounds__(THREADS, R == 8 && sizeof(Wide<T>) == 4 ? 2 : 0)
    multiply(Out* y, Product<T> p, i64 depth) {
  SHARED(a_slices, Slice<T, R>[2]);
  SHARED(b_slices, Slice<T, R>[2]);
  const u32 across = u32(ceil_div(p.N, TILE<R>)), tiles = across * u32(ceil_div(p.M, TILE<R>));
  const u32 tile = blockIdx.x % tiles, matrix = blockIdx.x / tiles;
  const i64 row = i64(tile / across) * TILE<R>, column = i64(tile % across) * TILE<R>;
  const i64 item = matrix % u32(p.batch), k_begin = matrix / u32(p.batch) * depth;
  i64 left = min(depth, p.K - k_begin);

  const MatrixView av = p.a_view, bv = p.b_view;
  Carrier<T, R> a(p.a + item * p.a_batch + row * av.row + k_begin * av.column, av.row, av.column, p.M - row);
  Carrier<T, R> b(p.b + item * p.b_batch + k_begin * bv.row + column * bv.column, bv.column, bv.row, p.N - column);
  const int tx = int(threadIdx.x) % SIDE, ty = int(threadIdx.x) / SIDE;
  Wide<T> sum[R][R] = {};
  a.fetch(left);
  b.fetch(left);
  for (int buffer = 0; left > 0; buffer ^= 1) {
    a.place(a_slices[buffer]);
    b.place(b_slices[buffer]);
    __syncthreads();  // one a step is enough: whoever writes to a slice again has seen all leave it, a step ago
    left -= STEP<R>;
    a.fetch(left);  // on its way while the sums go on
    b.fetch(left);
#pragma unroll(16 / R)
    for (int k = 0; k < STEP<R>; k++) {
      Wide<T> a_k[R], b_k[R];
#pragma unroll
      for (int r = 0; r < R; r++) {
        a_k[r] = a_slices[buffer][k][line_of<R>(ty, r)];
        b_k[r] = b_slices[buffer][k][line_of<R>(tx, r)];
      }
#pragma unroll
      for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < R; j++) sum[i][j] += a_k[i] * b_k[j];
    }
  }

  y += matrix * p.M * p.N;
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < R; j++) {
      const i64 m = row + line_of<R>(ty, i), n = column + line_of<R>(tx, j);
      if (m < p.M && n < p.N) y[m * p.N + n] = narrow<Out>(sum[i][j]);
    }
  }
}

// y (size) = sum over the parts of partial (parts, size). There may be many parts of a small y, so eight threads share
// an element, each with every eighth part.
constexpr int SHARERS = THREADS / WARP;
template <class T>
__global__ void add_parts(T* y, const Wide<T>* __restrict__ partial, i64 size, i64 parts) {
  SHARED(sums, Wide<T>[SHARERS][WARP]);
  const int lane = int(threadIdx.x), sharer = int(threadIdx.y);
  const i64 i = i64(blockIdx.x) * WARP + lane;
  Wide<T> sum = 0;
  if (i < size) {
#pragma unroll 4
    for (i64 part = sharer; part < parts; part += SHARERS) sum += partial[part * size + i];
  }
  sums[sharer][lane] = sum;
  __syncthreads();
  if (sharer == 0 && i < size) {
    for (int other = 1; other < SHARERS; other++) sum += sums[other][lane];
    y[i] = narrow<T>(sum);
  }
}

template <class T>
i64 tiles_of(const Product<T>& p, i64 side) {
  return ceil_div(p.M, side) * ceil_div(p.N, side) * p.batch;
}

inline i64 most_parts(i64 K) { return max(K / MIN_DEPTH, i64(1)); }

template <class T, int R>
void multiply_by_tiles(T* y, const Product<T>& p) {
  const i64 tiles = tiles_of(p, TILE<R>), wanted = min(ceil_div(ENOUGH_BLOCKS, tiles), most_parts(p.K));
  // Whole steps; K = 0 counts as one empty part, which is written as zeros.
  const i64 depth = max(ceil_div(p.K, wanted * STEP<R>), i64(1)) * STEP<R>;
  const i64 parts = max(ceil_div(p.K, depth), i64(1)), size = p.batch * p.M * p.N;
  if (tiles * parts > INT32_MAX)
    throw std::invalid_argument("[matmul] y must have fewer than 2**31 tiles of " + std::to_string(TILE<R>) + " x " +
                                std::to_string(TILE<R>) + "; got " + std::to_string(tiles * parts));
  const dim3 grid = dim3(u32(tiles * parts));
  if (parts == 1) return launch("matmul", multiply<T, R, T>, grid, THREADS, 0, current_stream(), y, p, depth);
  const Scratch<Wide<T>> partial(parts * size);
  launch("matmul", multiply<T, R, Wide<T>>, grid, THREADS, 0, current_stream(), partial.get(), p, depth);
  launch("matmul", add_parts<T>, dim3(u32(ceil_div(size, WARP))), dim3(WARP, SHARERS), 0, current_stream(), y,
         partial.get(), size, parts);
}

// The largest tile that neither side of y is too short for and of which there are enough. Cutting K makes more, but
// costs a round trip of y through memory for each part: fewer parts of smaller tiles are the better bargain.
template <class T>
void matmul(T* y, const T* a, const T* b, i64 batch, i64 M, i64 N, i64 K, i64 a_batch, MatrixView a_view, i64 b_batch,
            MatrixView b_view) {
  const Product<T> p{a, b, batch, M, N, K, a_batch, b_batch, a_view, b_view};
  const i64 shorter = min(M, N);
  if (batch == 0 || shorter == 0) return;
  if (shorter > TILE<4> && tiles_of(p, TILE<8>) >= ENOUGH_BLOCKS) return multiply_by_tiles<T, 8>(y, p);
  if (shorter > TILE<1> && tiles_of(p, TILE<4>) * most_parts(K) >= ENOUGH_BLOCKS) return multiply_by_tiles<T, 4>(y, p);
  multiply_by_tiles<T, 1>(y, p);
}

}  // namespace

template <class T>
void matmul_kernels(Kernels<T>& table) {
  table.matmul = matmul<T>;
}

template void matmul_kernels<float>(Kernels<float>&);
template void matmul_kernels<double>(Kernels<double>&);
template void matmul_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
