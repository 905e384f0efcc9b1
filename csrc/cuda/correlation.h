// What the convolution kernels have in common: the window, counting without division, convolution and its input
// gradient as correlations, the epilogue, and sums cut into parts.
#pragma once

#include "common.h"

namespace tinyres {

// The window in 32-bit integers, which a GPU divides much faster.
struct Shape {
  int N, H, W, C, K, R, S, P, Q, stride_h, stride_w, pad_h, pad_w;
};

inline Shape shape_of(const char* op, const Window& s) {
  for (const i64 count : {s.N * s.H * s.W, s.N * s.P * s.Q, s.R * s.S * s.C * s.K, s.R * s.S * max(s.C, s.K)})
    if (count > 0x7fffffff)
      throw std::invalid_argument("[" + std::string(op) +
                                  "] pixels of x, pixels of y and elements of w must each be under 2^31; got " +
                                  std::to_string(count));
  return {int(s.N), int(s.H), int(s.W),        int(s.C),        int(s.K),     int(s.R),    int(s.S),
          int(s.P), int(s.Q), int(s.stride_h), int(s.stride_w), int(s.pad_h), int(s.pad_w)};
}

// ceil_div without 64-bit division and without overflow.
__host__ __device__ constexpr int pieces(int n, int size) { return n / size + (n % size > 0); }

// A number of three digits that counts up without division: row, column and channel of a tap, or image, row and
// column of a pixel.
struct Digits {
  int high, mid, low;

  __device__ void advance(const Digits& by, int mids, int lows) {
    low += by.low, mid += by.mid, high += by.high;
    if (low >= lows) low -= lows, mid++;
    if (mid >= mids) mid -= mids, high++;
  }
};

__device__ inline Digits digits(int i, int mids, int lows) { return {i / lows / mids, i / lows % mids, i % lows}; }

// One axis of a correlation. Output i meets tap j, j < taps, in input `input + i * stride + j * turn`. In the array
// that is output `begin + i * step` and tap `first + j * every`.
struct Axis {
  int outputs, begin, step;
  int taps, first, every;
  int input, stride, turn;
};

__device__ inline Axis forward_axis(int P, int R, int stride, int pad) { return {P, 0, 1, R, 0, 1, -pad, stride, 1}; }

// x[h] met w[r] in y[p] where p * stride + r = h + pad. Write h + pad = stride * i + a and r = stride * j + a, with
// 0 <= a < stride: then p = i - j. So the inputs of one class a are a correlation of stride 1 of dy with the taps of
// that class, and no tap is visited in vain. A class without taps (stride > window) sums nothing and writes zeros.
__device__ inline Axis backward_axis(int H, int R, int stride, int pad, int a) {
  const int i = pieces(pad > a ? pad - a : 0, stride), h = stride * i + a - pad;  // the first inside the image
  return {h < H ? pieces(H - h, stride) : 0, h, stride, a < R ? pieces(R - a, stride) : 0, a, stride, i, 1, -1};
}

// y (N, P, Q, K) from x (N, H, W, C), whose weight for window column s of S, channel c and filter k lies
// tap * w_tap + c * w_channel + k * w_filter into w.
struct Correlation {
  Axis rows, columns;
  int N, H, W, C, P, Q, K, S, w_tap, w_channel, w_filter;
  __device__ int outputs() const { return N * rows.outputs * columns.outputs; }
  __device__ int depth() const { return rows.taps * columns.taps * C; }
};

__device__ inline Correlation forward_correlation(const Shape& s) {
  const Axis rows = forward_axis(s.P, s.R, s.stride_h, s.pad_h), columns = forward_axis(s.Q, s.S, s.stride_w, s.pad_w);
  return {rows, columns, s.N, s.H, s.W, s.C, s.P, s.Q, s.K, s.S, s.C * s.K, s.K, 1};
}

// dx from dy: x and y change places, and so do channels and filters.
__device__ inline Correlation backward_correlation(const Shape& s, int class_h, int class_w) {
  const Axis rows = backward_axis(s.H, s.R, s.stride_h, s.pad_h, class_h);
  const Axis columns = backward_axis(s.W, s.S, s.stride_w, s.pad_w, class_w);
  return {rows, columns, s.N, s.P, s.Q, s.K, s.H, s.W, s.C, s.S, s.C * s.K, 1, s.K};
}

// The epilogue -----------------------------------------------------------------------------------------------------

// Neighbouring elements that lie aligned, so that they are moved at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T v[N];
};

// The outputs of N neighbouring filters from the k-th on, at element `place` of y. More than one must be aligned there.
template <class T, int N>
__device__ inline void finish(Wide<T> (&sum)[N], const Epilogue<T>& epilogue, i64 place, int k) {
  if (epilogue.bias) {
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += wide(epilogue.bias[k + j]);
  }
  if (epilogue.residual) {
    const auto residual = *reinterpret_cast<const Vector<T, N>*>(epilogue.residual + place);
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += wide(residual.v[j]);
  }
#pragma unroll
  for (int j = 0; j < N; j++) sum[j] = epilogue.relu && Wide<T>(0) > sum[j] ? Wide<T>(0) : sum[j];
}

template <class T>
__device__ inline Wide<T> finish(Wide<T> sum, const Epilogue<T>& epilogue, i64 place, int k) {
  Wide<T> one[1] = {sum};
  finish(one, epilogue, place, k);
  return one[0];
}

// Sums in parts ----------------------------------------------------------------------------------------------------

// There are few weights and many pixels: `steps` over them are cut into `count` parts of up to `length`, each with its
// own copy of the sums.
struct Parts {
  int length, count;
};

inline Parts cut(int steps, i64 wanted) {
  const int length = max(1, int(ceil_div(steps, max(i64(1), wanted))));
  return {length, max(1, pieces(steps, length))};
}

constexpr int SUM_COLUMNS = 32, SUM_LANES = 8;

// dw[i] = the sum of partial[part][i] over all parts: by up to SUM_LANES threads, which take turns, then by one.
template <class T>
__global__ void sum_parts(T* __restrict__ dw, const T* __restrict__ partial, int parts, int n) {
  SHARED(sums, T[SUM_LANES][SUM_COLUMNS]);
  const int column = int(threadIdx.x), lane = int(threadIdx.y), lanes = int(blockDim.y);
  const i64 i = i64(blockIdx.x) * SUM_COLUMNS + column;
  T sum = 0;
  if (i < n) {
#pragma unroll 8
    for (int part = lane; part < parts; part += lanes) sum += partial[i64(part) * n + i];
  }
  sums[lane][column] = sum;
  __syncthreads();
  if (lane != 0 || i >= n) return;
  for (int other = 1; other < lanes; other++) sum += sums[other][column];
  dw[i] = sum;
}

// How many threads take turns: sgd.cu adds in the same order.
__host__ __device__ constexpr int sum_lanes(int parts) { return parts > 4 * SUM_LANES ? SUM_LANES : pieces(parts, 4); }

template <class T>
void launch_sum_parts(const char* op, T* dw, const T* partial, int parts, int n) {
  launch(op, sum_parts<T>, dim3(unsigned(ceil_div(n, SUM_COLUMNS))), dim3(SUM_COLUMNS, unsigned(sum_lanes(parts))), 0,
         current_stream(), dw, partial, parts, n);
}

}  // namespace tinyres
