// Batched matrix product, packed and tiled: y (M, N) = a (M, K) times b (K, N), any strides.
//
// A tile of ROWS rows by two vectors of y is summed in registers along K, from copies laid out in the order of
// reading: b once as panels (K, TILE_N), a block by block as (K, ROWS), both filled up with zeros, so that the inner
// loop has no edges. K goes in blocks, whose panel slice stays in the first-level cache. The order of every sum
// depends on K alone.
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

// ROWS x 2 sums, two vectors of b and one element of a must fit the registers: 32 with AVX-512, else 16.
constexpr i64 ROWS = TINYRES_VECTOR_BYTES == 64 ? 8 : 4;
template <class T>
constexpr i64 TILE_N = 2 * LANES<T>;
constexpr i64 BLOCK_K = 256, BLOCK_M = 64;

inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// packed (K, TILE_N) = b[:, column : column + TILE_N]
template <class T>
void pack_panel(T* packed, const T* b, MatrixView view, i64 column, i64 N, i64 K) {
  const i64 width = smaller(N - column, TILE_N<T>);
  for (i64 k = 0; k < K; k++) {
    const T* from = b + k * view.row + column * view.column;
    for (i64 j = 0; j < width; j++) packed[k * TILE_N<T> + j] = from[j * view.column];
    for (i64 j = width; j < TILE_N<T>; j++) packed[k * TILE_N<T> + j] = 0;
  }
}

// packed (rows / ROWS, depth, ROWS) = a[row : row + rows, k : k + depth]
template <class T>
void pack_rows(T* packed, const T* a, MatrixView view, i64 row, i64 rows, i64 k, i64 depth) {
  for (i64 tile = 0; tile < rows; tile += ROWS) {
    const i64 height = smaller(rows - tile, ROWS);
    for (i64 d = 0; d < depth; d++, packed += ROWS) {
      const T* from = a + (row + tile) * view.row + (k + d) * view.column;
      for (i64 r = 0; r < height; r++) packed[r] = from[r * view.row];
      for (i64 r = height; r < ROWS; r++) packed[r] = 0;
    }
  }
}

// The first height x width elements of the tile at y, added to what is there if `add`.
template <class T>
void multiply_tile(T* y, i64 N, const T* a, const T* b, i64 depth, i64 height, i64 width, bool add) {
  constexpr i64 L = LANES<T>;
  Vec<T> sum[ROWS][2] = {};
  for (i64 k = 0; k < depth; k++) {
    const Vec<T> b0 = load(b + k * TILE_N<T>), b1 = load(b + k * TILE_N<T> + L);
#pragma GCC unroll 8
    for (i64 r = 0; r < ROWS; r++) {
      sum[r][0] += a[k * ROWS + r] * b0;
      sum[r][1] += a[k * ROWS + r] * b1;
    }
  }
  // By way of memory, since an index known only at run time would keep the sums out of registers throughout.
  T tile[ROWS][TILE_N<T>];
#pragma GCC unroll 8
  for (i64 r = 0; r < ROWS; r++) {
    store(tile[r], sum[r][0]);
    store(tile[r] + L, sum[r][1]);
  }
  for (i64 r = 0; r < height; r++) {
    for_vectors<T>(width, [&](i64 j, i64 lanes) {
      const Vec<T> v = load_first(tile[r] + j, lanes);
      T* to = y + r * N + j;
      store_first(to, add ? load_first(to, lanes) + v : v, lanes);
    });
  }
}

// Rows [row, row + rows) of one product, from b's panels.
template <class T>
void multiply_rows(T* y, const T* a, MatrixView a_view, const T* panels, i64 row, i64 rows, i64 N, i64 K) {
  Scratch<T> packed(BLOCK_M * BLOCK_K);
  i64 k = 0;
  do {  // once at least: a product with K = 0 is zero
    const i64 depth = smaller(K - k, BLOCK_K);
    pack_rows(packed.get(), a, a_view, row, rows, k, depth);
    for (i64 column = 0; column < N; column += TILE_N<T>) {
      const T* panel = panels + column * K + k * TILE_N<T>;
      for (i64 tile = 0; tile < rows; tile += ROWS)
        multiply_tile(y + (row + tile) * N + column, N, packed.get() + tile * depth, panel, depth,
                      smaller(rows - tile, ROWS), smaller(N - column, TILE_N<T>), k > 0);
    }
    k += depth;
  } while (k < K);
}

template <class T>
void matmul(T* y, const T* a, const T* b, i64 batch, i64 M, i64 N, i64 K, i64 a_batch, MatrixView a_view, i64 b_batch,
            MatrixView b_view) {
  const i64 panels = (N + TILE_N<T> - 1) / TILE_N<T>, blocks = (M + BLOCK_M - 1) / BLOCK_M;
  const i64 packed_size = panels * TILE_N<T> * K;
  Scratch<T> packed((b_batch ? batch : smaller(batch, 1)) * packed_size);
  parallel_ranges(
      (b_batch ? batch : smaller(batch, 1)) * panels, items_per_part(TILE_N<T> * K), [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++)
          pack_panel(packed.get() + i * TILE_N<T> * K, b + i / panels * b_batch, b_view, i % panels * TILE_N<T>, N, K);
      });
  // A multiplication costs about a sixteenth of an element of traffic.
  parallel_ranges(batch * blocks, items_per_part(smaller(M, BLOCK_M) * N * K / 16), [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; i++) {
      const i64 item = i / blocks, row = i % blocks * BLOCK_M;
      multiply_rows(y + item * M * N, a + item * a_batch, a_view, packed.get() + (b_batch ? item : 0) * packed_size,
                    row, smaller(M - row, BLOCK_M), N, K);
    }
  });
}

}  // namespace

template <class T>
void matmul_kernels(Kernels<T>& table) {
  table.matmul = matmul<T>;
}

template void matmul_kernels<float>(Kernels<float>&);
template void matmul_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
