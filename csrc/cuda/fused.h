// What the kernels share into which batch norm was folded (conv3x3.cu, block_output.cu): its coefficients.
//
// With m = mean, r = inv_std and M pixels, batch norm is u = gamma r (y - m) + beta = y * scale + shift. Its gradient
// (Ioffe and Szegedy 2015, section 3), with the sums S = sum dz and D = sum dz (y - m), so dbeta = S and dgamma = r D,
// is
//
//   dy = gamma r (dz - S / M - (y - m) r r D / M) = a dz + b y + c,
//   a = gamma r,  b = -a r dgamma / M,  c = -a dbeta / M - b m.
//
// y * scale + shift loses what y - m would keep only where |m| is so large that y itself, rounded when it was stored,
// has lost as much. Every kernel works it out with the same fused multiply-add, so that backward finds the mask that
// forward had.
//
// Sums over a whole tensor are left as one row a block (kernels.h) and added by every block that reads them: no kernel
// between two others, no waiting. The number of rows is bounded, so that they take 34 KB at most. Read from the L2
// cache by up to 264 blocks that is 9 MB beside tensors of 16 channels, 4.5 MB beside wider ones.
#pragma once

#include "join.h"
#include "moments.h"

namespace tinyres {

constexpr int THREADS = 256;
constexpr int MULTIPROCESSORS = 132;                // of an H100 or H200
constexpr int ROW_CHANNELS = MULTIPROCESSORS * 32;  // channels of all rows together
constexpr int ROWS_AT_ONCE = 16;                    // whose loads a thread has on their way

// Rows, and so blocks, for a tensor of that many channels: two blocks to a multiprocessor at most.
inline i64 most_rows(i64 channels) { return max(i64(1), min(2 * i64(MULTIPROCESSORS), ROW_CHANNELS / channels)); }

inline bool is_aligned(const void* array) { return reinterpret_cast<std::uintptr_t>(array) % 16 == 0; }

inline void expect_aligned(const char* op, std::initializer_list<const void*> arrays) {
  for (const void* array : arrays)
    if (!is_aligned(array)) throw std::invalid_argument("[" + std::string(op) + "] arrays must be aligned to 16 bytes");
}

// ---- elements -----------------------------------------------------------------------------------------------------

// Neighbouring channels, moved 16 bytes at once.
template <class Element, int COUNT>
struct alignas(16) Pack {
  Element at[COUNT];
};
template <class T>
constexpr int V = 16 / int(sizeof(T));

template <class P, class T>
__device__ inline P& pack_at(T* p) {
  return *reinterpret_cast<P*>(p);
}
template <class P, class T>
__device__ inline const P& pack_at(const T* p) {
  return *reinterpret_cast<const P*>(p);
}

// Batch norm of one number: everywhere the same bits.
template <class W>
__device__ inline W affine(W x, W scale, W shift) {
  return fma(x, scale, shift);
}

template <class W>
__device__ inline W relu(W x) {
  return 0 > x ? W(0) : x;  // NaN stays
}

// ---- batch norm, from the rows of its sums --------------------------------------------------------------------------

template <class W>
__device__ inline void set_affine(W& scale, W& shift, W gamma, W beta, W mean, W inv_std) {
  scale = gamma * inv_std;
  shift = fma(-mean, scale, beta);
}

// Of a set of rows, about an origin near their means: then nothing is lost by summing instead of merging.
template <class W>
struct RowSums {
  W n, apart, m2;  // pixels; the sum of their distances from the origin, and of the squares

  __device__ RowSums operator()(const RowSums& a, const RowSums& b) const {
    return {a.n + b.n, a.apart + b.apart, a.m2 + b.m2};
  }
};

// scale and shift (channels) for the channels from `first` on, of C; the whole block takes part. `publish`: this is the
// block that keeps the statistics.
template <class T, class W = Wide<T>>
__device__ void load_batch_norm(W* scale, W* shift, const BatchNorm<T>& bn, int C, int first, int channels,
                                bool publish) {
  const int t = int(threadIdx.x), c = first + t % channels, lanes = THREADS / channels;
  W mean = 0, inv_std = 0;
  if (bn.row_count) {
    const W origin = bn.rows[c];
    RowSums<W> sums{};
    for (int start = t / channels; start < int(bn.row_count); start += ROWS_AT_ONCE * lanes) {
      W n[ROWS_AT_ONCE], at[ROWS_AT_ONCE], m2[ROWS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) {
        const int row = start + i * lanes;
        const bool exists = row < bn.row_count;
        n[i] = exists ? bn.rows[2 * bn.row_count * C + row] : W(0);
        at[i] = exists ? bn.rows[2 * row * C + c] : origin;
        m2[i] = exists ? bn.rows[(2 * row + 1) * C + c] : W(0);
      }
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) {
        const W apart = at[i] - origin;
        sums = sums(sums, {n[i], n[i] * apart, fma(n[i] * apart, apart, m2[i])});
      }
    }
    sums = join_threads(sums, channels, lanes, sums);
    if (t < channels) {
      const double n = sums.n, offset = sums.apart / n, m2 = sums.m2 - sums.apart * offset;
      const double var = m2 < 0 ? 0 : m2 / n, mean64 = origin + offset;
      mean = W(mean64), inv_std = W(1 / sqrt(var + bn.eps));
      if (publish) {
        bn.mean[c] = mean;
        bn.inv_std[c] = inv_std;
        const double old = 1 - bn.momentum, unbiased = n > 1 ? var * (n / (n - 1)) : var;
        if (bn.running_mean) bn.running_mean[c] = W(old * double(bn.running_mean[c]) + bn.momentum * mean64);
        if (bn.running_var) bn.running_var[c] = W(old * double(bn.running_var[c]) + bn.momentum * unbiased);
      }
    }
  } else if (t < channels) {
    mean = bn.mean[c], inv_std = bn.inv_std[c];
  }
  if (t < channels) set_affine(scale[t], shift[t], bn.gamma[c], bn.beta[c], mean, inv_std);
}

// a, b and c (channels) of dy = a dz + b y + c, likewise; M pixels of y.
template <class T, class W = Wide<T>>
__device__ void load_gradient(W* a, W* b, W* c, const BatchNormGradient<T>& bn, int C, int first, int channels, i64 M,
                              bool publish) {
  const int t = int(threadIdx.x), channel = first + t % channels, lanes = THREADS / channels;
  const W mean = bn.mean[channel], inv_std = bn.inv_std[channel];
  W dgamma = 0, dbeta = 0;
  if (bn.row_count) {
    Sums<W, 1> sums{};
    for (int start = t / channels; start < int(bn.row_count); start += ROWS_AT_ONCE * lanes) {
      Sums<W, 1> row_sums[ROWS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) {
        const int row = start + i * lanes;
        const bool exists = row < bn.row_count;
        row_sums[i].g[0] = exists ? bn.rows[2 * row * C + channel] : W(0);
        row_sums[i].gx[0] = exists ? bn.rows[(2 * row + 1) * C + channel] : W(0);
      }
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) sums.merge(row_sums[i]);
    }
    sums = join_threads(sums, channels, lanes, [](Sums<W, 1> x, const Sums<W, 1>& y) {
      x.merge(y);
      return x;
    });
    dgamma = sums.gx[0] * inv_std, dbeta = sums.g[0];
    if (publish && t < channels) {
      bn.dgamma[channel] = dgamma;
      bn.dbeta[channel] = dbeta;
    }
  } else if (t < channels) {
    dgamma = bn.dgamma[channel], dbeta = bn.dbeta[channel];
  }
  if (t >= channels) return;
  a[t] = bn.gamma[channel] * inv_std;
  b[t] = -a[t] * inv_std * (dgamma / W(M));
  c[t] = fma(-b[t], mean, -a[t] * (dbeta / W(M)));
}

}  // namespace tinyres
