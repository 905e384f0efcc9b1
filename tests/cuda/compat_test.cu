// Tests of csrc/cuda/compat for either compiler: what CUDA promises of barriers, collectives, shared memory,
// asynchronous copies, fragments and number formats. Built by nvcc and run on a GPU, they prove the PTX wrappers.
#include <cmath>
#include <cstring>

#include "testing.h"

using namespace tinyres;

namespace {

// ---- indices, barriers, atomics
// --------------------------------------------------------------------------------------

__global__ void number_threads(unsigned* seen, unsigned threads) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(&seen[block * threads + thread], 1u);
}

void test_indices() {
  for (const dim3 block : {dim3(1), dim3(33), dim3(3, 4, 8), dim3(128)}) {
    const unsigned threads = block.x * block.y * block.z;
    const dim3 grid(3, 2, 4);
    Array<unsigned> seen(int(24 * threads));
    go(number_threads, grid, block, 0, seen.data(), threads);
    for (int i = 0; i < seen.size(); i++) CHECK(seen[i] == 1);
  }
}

// Each round hands every value one thread on: any two threads must meet in every round.
__global__ void rotate(int* y, int rounds) {
  SHARED(s, int[128]);
  const int t = int(threadIdx.x), n = int(blockDim.x);
  int value = t;
  for (int i = 0; i < rounds; i++) {
    s[t] = value;
    __syncthreads();
    value = s[(t + 1) % n];
    __syncthreads();
  }
  y[t] = value;
}

void test_barriers() {
  for (const int n : {1, 2, 31, 32, 33, 100, 128}) {
    Array<int> y(n, -1);
    go(rotate, dim3(1), dim3(unsigned(n)), 0, y.data(), 37);
    for (int t = 0; t < n; t++) CHECK(y[t] == (t + 37) % n);
  }
}

struct Totals {
  int sum_int, min_int, max_int, claimed;
  unsigned sum_unsigned, min_unsigned, max_unsigned, exchanged;
  unsigned long long sum_long;
  float sum_float, max_by_cas;
  double sum_double;
};

__global__ void use_atomics(Totals* y, int* owner) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&y->sum_int, i - 100);
  atomicMin(&y->min_int, 50 - i);
  atomicMax(&y->max_int, i - 1000);
  atomicAdd(&y->sum_unsigned, 3u);
  atomicMin(&y->min_unsigned, unsigned(i) + 7);
  atomicMax(&y->max_unsigned, 0x80000000u + unsigned(i));
  atomicAdd(&y->sum_long, 1ull << 33);
  atomicAdd(&y->sum_float, 0.5f);
  atomicAdd(&y->sum_double, 0.25);
  if (atomicCAS(owner, -1, i) == -1) atomicAdd(&y->claimed, 1);
  atomicExch(&y->exchanged, unsigned(i) + 1);
}

void test_atomics() {
  Array<Totals> y(1);
  Array<int> owner(1, -1);
  const int n = 6 * 64;
  go(use_atomics, dim3(6), dim3(64), 0, y.data(), owner.data());
  CHECK(y[0].sum_int == n * (n - 1) / 2 - 100 * n);
  CHECK(y[0].min_int == 50 - (n - 1));
  CHECK(y[0].max_int == 0);
  CHECK(y[0].sum_unsigned == 3u * n);
  CHECK(y[0].min_unsigned == 0);
  CHECK(y[0].max_unsigned == 0x80000000u + n - 1);
  CHECK(y[0].sum_long == (1ull << 33) * n);
  CHECK(y[0].sum_float == 0.5f * n);
  CHECK(y[0].sum_double == 0.25 * n);
  CHECK(y[0].claimed == 1 && owner[0] >= 0 && owner[0] < n);
  CHECK(y[0].exchanged >= 1 && y[0].exchanged <= unsigned(n));
}

// ---- warp collectives
// ------------------------------------------------------------------------------------------------

template <class T>
__global__ void shuffles(T* y, int width) {
  const int t = int(threadIdx.x), n = int(blockDim.x);
  const T value = T(1000 + t * 3);
  y[t] = __shfl_sync(~0u, value, t * 5 + 1, width);
  y[n + t] = __shfl_up_sync(~0u, value, 3u, width);
  y[2 * n + t] = __shfl_down_sync(~0u, value, 3u, width);
  y[3 * n + t] = __shfl_xor_sync(~0u, value, 2, width);
}

template <class T>
void test_shuffles() {
  const int n = 96;
  for (const int width : {4, 8, 16, 32}) {
    Array<T> y(4 * n);
    go(shuffles<T>, dim3(1), dim3(n), 0, y.data(), width);
    for (int t = 0; t < n; t++) {
      const int segment = t / width * width, at = t % width;
      CHECK(y[t] == T(1000 + 3 * (segment + (t * 5 + 1) % width)));
      CHECK(y[n + t] == T(1000 + 3 * (at < 3 ? t : t - 3)));
      CHECK(y[2 * n + t] == T(1000 + 3 * (at + 3 >= width ? t : t + 3)));
      CHECK(y[3 * n + t] == T(1000 + 3 * (segment + (at ^ 2))));
    }
  }
}

// Both halves of a warp hold a collective at once, each with its own mask.
__global__ void votes(unsigned* y, int* sums, int* mirrored) {
  SHARED(s, int[96]);
  const int t = int(threadIdx.x), n = int(blockDim.x);
  y[t] = __ballot_sync(~0u, t % 3 == 0);
  y[n + t] = unsigned(__any_sync(~0u, t == 40) * 2 + __all_sync(~0u, t < 64));
  if (t % 32 < 16) {
    y[2 * n + t] = __ballot_sync(0x0000ffffu, t % 5 == 0);
    sums[t] = __shfl_xor_sync(0x0000ffffu, t, 8);
  } else {
    y[2 * n + t] = __ballot_sync(0xffff0000u, t % 2 == 0);
    sums[t] = __shfl_xor_sync(0xffff0000u, t, 4);
  }
  s[t] = sums[t];
  if (t % 32 < 16) __syncwarp(0x0000ffffu);
  __syncwarp();
  mirrored[t] = s[t ^ 31];
}

void test_votes() {
  const int n = 96;
  Array<unsigned> y(3 * n);
  Array<int> sums(n), mirrored(n);
  go(votes, dim3(1), dim3(n), 0, y.data(), sums.data(), mirrored.data());
  for (int t = 0; t < n; t++) {
    unsigned thirds = 0, halves = 0;
    for (int lane = 0; lane < 32; lane++) {
      const int other = t / 32 * 32 + lane;
      if (other % 3 == 0) thirds |= 1u << lane;
      if (lane / 16 == t % 32 / 16 && other % (lane < 16 ? 5 : 2) == 0) halves |= 1u << lane;
    }
    CHECK(y[t] == thirds);
    CHECK(y[n + t] == unsigned(t / 32 == 1 ? 3 : t / 32 == 0 ? 1 : 0));
    CHECK(y[2 * n + t] == halves);
    CHECK(sums[t] == (t % 32 < 16 ? t ^ 8 : t ^ 4));
    CHECK(mirrored[t] == sums[t ^ 31]);
  }
}

// A scan within each warp by way of shared memory: __syncwarp must order it.
__global__ void warp_scan(int* y) {
  SHARED(s, int[4][32]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  s[warp][lane] = lane + 1;
  __syncwarp();
  for (int step = 1; step < 32; step *= 2) {
    const int value = lane >= step ? s[warp][lane - step] : 0;
    __syncwarp();
    s[warp][lane] += value;
    __syncwarp();
  }
  y[threadIdx.x] = s[warp][lane];
}

void test_syncwarp() {
  Array<int> y(128);
  go(warp_scan, dim3(1), dim3(128), 0, y.data());
  for (int t = 0; t < 128; t++) CHECK(y[t] == (t % 32 + 1) * (t % 32 + 2) / 2);
}

// ---- shared memory
// ---------------------------------------------------------------------------------------------------

template <class T, int ROWS>
__device__ T* scratch() {  // one array for each instance, the same one on every call
  SHARED(rows, T[ROWS][32]);
  return &rows[0][0];
}

__global__ void arrays(double* y, int* aligned, int n) {
  SmemArena arena;
  float* a = arena.take<float>(n);
  double* b = arena.take<double>(n);
  bf16* c = arena.take<bf16>(n);
  const int t = int(threadIdx.x);
  float* d = scratch<float, 2>();
  double* e = scratch<double, 2>();
  for (int i = t; i < n; i += int(blockDim.x)) {
    a[i] = float(i);
    b[i] = i * 2.0;
    c[i] = from_float<bf16>(float(i % 100));
    d[i] = float(i * 4);
    e[i] = i * 8.0;
  }
  __syncthreads();
  const int i = n - 1 - t;
  y[blockIdx.x * blockDim.x + threadIdx.x] =
      a[i] + b[i] + double(to_float(c[i])) + scratch<float, 2>()[i] + scratch<double, 2>()[i];
  if (t == 0) {
    for (const void* p : {(const void*)a, (const void*)b, (const void*)c, (const void*)d, (const void*)e})
      if (reinterpret_cast<std::uintptr_t>(p) % 16 == 0) atomicAdd(aligned, 1);
  }
}

void test_shared() {
  const int n = 51, threads = 48;
  Array<double> y(2 * threads);
  Array<int> aligned(1);
  go(arrays, dim3(2), dim3(threads), 208 + 416 + 112, y.data(), aligned.data(), n);
  for (int k = 0; k < 2 * threads; k++) {
    const int i = n - 1 - k % threads;
    CHECK(y[k] == i * 15.0 + i % 100);
  }
  CHECK(aligned[0] == 10);
}

// ---- asynchronous copies
// ------------------------------------------------------------------------------------------------

__global__ void fetch(float* y, const float* x) {
  SHARED(s, float[4][128]);
  const int t = int(threadIdx.x);  // of 32
  cp_async16(&s[0][4 * t], x + 4 * t);
  cp_async_commit();
  cp_async16_zfill(&s[1][4 * t], x + 128 + 4 * t, t % 2 == 1);
  cp_async_commit();
  for (int i = t; i < 128; i += 32) cp_async4(&s[2][i], x + 256 + 127 - i);
  cp_async_commit();
  for (int i = t; i < 128; i += 32) cp_async4_zfill(&s[3][i], x + 384 + i, i % 3 == 0);
  cp_async_commit();
  cp_async_wait<2>();
  __syncthreads();
  for (int i = t; i < 128; i += 32) {
    y[i] = s[0][127 - i];
    y[128 + i] = s[1][127 - i];
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int i = t; i < 128; i += 32) {
    y[256 + i] = s[2][127 - i];
    y[384 + i] = s[3][127 - i];
  }
}

void test_async_copies() {
  Array<float> x(512), y(512);
  for (int i = 0; i < 512; i++) x[i] = float(i + 1);
  go(fetch, dim3(1), dim3(32), 0, y.data(), x.data());
  for (int i = 0; i < 128; i++) {
    const int j = 127 - i;
    CHECK(y[i] == float(j + 1));
    CHECK(y[128 + i] == (j / 4 % 2 ? float(128 + j + 1) : 0));
    CHECK(y[256 + i] == float(256 + i + 1));
    CHECK(y[384 + i] == (j % 3 == 0 ? float(384 + j + 1) : 0));
  }
}

// ---- tensor cores
// -------------------------------------------------------------------------------------------------------

// The layouts anew, as a linear map: element v of lane t lies where the bits of t and v, times their strides, add up
// to. Written down from the figures of the PTX ISA, "Matrix Fragments for mma.m16n8k16 / .m16n8k8", column-major tiles.
struct Layout {
  int pair, group;  // strides of t % 4 and t / 4
  int v[3];         // of bits 0, 1, 2 of v
  int at(int t, int i) const {
    return t % 4 * pair + t / 4 * group + (i & 1) * v[0] + (i >> 1 & 1) * v[1] + (i >> 2 & 1) * v[2];
  }
};
const Layout A_BF16 = {32, 1, {16, 8, 128}};  // m + 16 k
const Layout B_BF16 = {16, 1, {8, 64, 0}};    // n + 8 k
const Layout A_TF32 = {16, 1, {8, 64, 0}};    // m + 16 k
const Layout B_TF32 = {8, 1, {32, 0, 0}};     // n + 8 k
const Layout D = {32, 1, {16, 8, 0}};         // m + 16 n

template <bool TF32>
__global__ void multiply(float* d, const u32* a, const u32* b) {
  const int t = int(threadIdx.x);
  u32 x[4], y[2];
  float z[4];
  for (int i = 0; i < 4; i++) x[i] = a[t * 4 + i];
  for (int i = 0; i < 2; i++) y[i] = b[t * 2 + i];
  for (int i = 0; i < 4; i++) z[i] = d[t * 4 + i];
  if (TF32) {
    mma_tf32_1688(z, x, y);
  } else {
    mma_bf16_16816(z, x, y);
  }
  for (int i = 0; i < 4; i++) d[t * 4 + i] = z[i];
}

u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Whole numbers below 100: products and sums are exact in any order.
template <bool TF32>
void test_mma() {
  constexpr int K = TF32 ? 8 : 16;
  const Layout layout_a = TF32 ? A_TF32 : A_BF16, layout_b = TF32 ? B_TF32 : B_BF16;
  float a[16 * K], b[8 * K], c[16 * 8];
  u32 state = 1;
  const auto draw = [&state] {
    state = state * 1664525u + 1013904223u;
    return float(int(state >> 16) % 199 - 99);
  };
  for (float& x : a) x = draw();
  for (float& x : b) x = draw();
  for (float& x : c) x = draw();
  Array<u32> ra(32 * 4), rb(32 * 2);
  Array<float> rd(32 * 4);
  for (int t = 0; t < 32; t++) {
    for (int i = 0; i < 4; i++) {
      rd[t * 4 + i] = c[D.at(t, i)];
      ra[t * 4 + i] = TF32 ? bits_of(a[layout_a.at(t, i)])
                           : bits_of(a[layout_a.at(t, 2 * i)]) >> 16 | bits_of(a[layout_a.at(t, 2 * i + 1)]);
    }
    for (int i = 0; i < 2; i++)
      rb[t * 2 + i] = TF32 ? bits_of(b[layout_b.at(t, i)])
                           : bits_of(b[layout_b.at(t, 2 * i)]) >> 16 | bits_of(b[layout_b.at(t, 2 * i + 1)]);
  }
  go(multiply<TF32>, dim3(1), dim3(32), 0, rd.data(), ra.data(), rb.data());
  for (int t = 0; t < 32; t++) {
    for (int i = 0; i < 4; i++) {
      const int m = D.at(t, i) % 16, n = D.at(t, i) / 16;
      float sum = c[m + 16 * n];
      for (int k = 0; k < K; k++) sum += a[m + 16 * k] * b[n + 8 * k];
      CHECK(rd[t * 4 + i] == sum);
    }
  }
}

template <int N, bool TRANSPOSED>
__global__ void load_tiles(u32* y) {
  SHARED(tiles, std::uint16_t[N][8][8]);
  for (int i = int(threadIdx.x); i < N * 64; i += 32) tiles[i / 64][i / 8 % 8][i % 8] = std::uint16_t(i * 3 + 1);
  __syncthreads();
  const int lane = int(threadIdx.x);
  const void* row = tiles[lane / 8 % N][lane % 8];
  u32 d[N];
  if constexpr (N == 4) {
    TRANSPOSED ? ldmatrix_x4_trans(d, row) : ldmatrix_x4(d, row);
  } else {
    TRANSPOSED ? ldmatrix_x2_trans(d, row) : ldmatrix_x2(d, row);
  }
  for (int i = 0; i < N; i++) y[lane * N + i] = d[i];
}

template <int N, bool TRANSPOSED>
void test_ldmatrix() {
  Array<u32> y(32 * N);
  go(load_tiles<N, TRANSPOSED>, dim3(1), dim3(32), 0, y.data());
  // Plain: lane t gets elements 2t and 2t + 1 of the row-major tile. Transposed: the same of the transposed tile.
  for (int k = 0; k < 32 * N * 2; k++) {
    const int t = k / 2 / N, matrix = k / 2 % N, e = 2 * t + k % 2;
    const int element = matrix * 64 + (TRANSPOSED ? e % 8 * 8 + e / 8 : e);
    CHECK((y[t * N + matrix] >> (k % 2 * 16) & 0xffff) == u32(element * 3 + 1));
  }
}

// ---- number formats
// -----------------------------------------------------------------------------------------------------

// Of the two neighbours of x whose low `drop` bits are zero: the nearer one, found in double. Infinity counts as 2^128.
u32 nearest(u32 bits, int drop, bool ties_to_even) {
  const u32 sign = bits & 0x80000000u, low = (bits & 0x7fffffffu) >> drop << drop, high = low + (1u << drop);
  const auto value = [](u32 b) { return b >= 0x7f800000u ? std::ldexp(1.0, 128) : double(float_of(b)); };
  const double x = value(bits & 0x7fffffffu), down = x - value(low), up = value(high) - x;
  const bool high_even = (high >> drop) % 2 == 0;
  return sign | (down == 0 || down < up || (down == up && ties_to_even && !high_even) ? low : high);
}

__global__ void convert(std::uint16_t* b, u32* t, const u32* x, int n) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) {
    float value;
    memcpy(&value, &x[i], sizeof value);
    b[i] = from_float<bf16>(value).bits;
    t[i] = to_tf32(value);
  }
}

void test_formats() {
  // Every upper half, with lower halves at and around each tie and end.
  const u32 lower[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff};
  const int n = 65536 * 11;
  Array<u32> x(n), t(n);
  Array<std::uint16_t> b(n);
  for (int i = 0; i < n; i++) x[i] = u32(i / 11) << 16 | lower[i % 11];
  go(convert, dim3(4), dim3(64), 0, b.data(), t.data(), x.data(), n);
  for (int i = 0; i < n; i++) {
    const u32 magnitude = x[i] & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      CHECK(b[i] == 0x7fff);
      CHECK((t[i] & 0x7fffffffu) > 0x7f800000u);
    } else if (magnitude == 0x7f800000u) {
      CHECK(u32(b[i]) << 16 == x[i]);
      CHECK(t[i] == x[i]);
    } else {
      CHECK(u32(b[i]) << 16 == nearest(x[i], 16, true));
      CHECK(t[i] == nearest(x[i], 13, false));
    }
  }
  for (u32 i = 0; i < 65536; i++) CHECK(bits_of(to_float(bf16{std::uint16_t(i)})) == i << 16);
  CHECK(from_float<float>(1.25f) == 1.25f && to_float(1.25f) == 1.25f);
}

}  // namespace

int main() {
  test_indices();
  test_barriers();
  test_atomics();
  test_shuffles<int>();
  test_shuffles<unsigned>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<long long>();
  test_votes();
  test_syncwarp();
  test_shared();
  test_async_copies();
  test_mma<false>();
  test_mma<true>();
  test_ldmatrix<2, false>();
  test_ldmatrix<2, true>();
  test_ldmatrix<4, false>();
  test_ldmatrix<4, true>();
  test_formats();
  return report();
}
