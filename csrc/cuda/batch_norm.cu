// Batch normalisation over the rows of x (M, C) and its fusions with a residual sum and ReLU.
//
// In training each way takes two passes over memory and a small launch between them: every strip of rows leaves its
// statistics, the strips' statistics are merged, and the result is written. Neighbouring threads take neighbouring
// channels, 16 bytes each where C allows; a block covers up to a cache line of channels and as many rows as it has
// threads left. Merging goes by halves within a block and over the strips in their order, all fixed by M and C.
#include "join.h"
#include "moments.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;
constexpr i64 BLOCKS = 4 * 132;  // four on each multiprocessor of an H100 or H200: enough reads on their way at once

// ---- rows and channels shared out ---------------------------------------------------------------------------------

// V neighbouring channels of a row, read and written at once where ALIGNMENT allows.
template <class Element, int COUNT, std::size_t ALIGNMENT>
struct alignas(ALIGNMENT) Pack {
  using T = Element;
  using W = Wide<T>;
  static constexpr int V = COUNT;
  T at[V];
};

// Calls body(P()) with the pack for rows of C channels. C alone decides on V, and so on the order of sums; an array
// that starts between two packs only takes longer to read.
template <class T, class F>
void with_packs(i64 C, std::initializer_list<const void*> arrays, const F& body) {
  constexpr int V = 16 / sizeof(T);
  std::uintptr_t addresses = 0;
  for (const void* array : arrays) addresses |= reinterpret_cast<std::uintptr_t>(array);
  if (C % V)
    body(Pack<T, 1, sizeof(T)>());
  else if (addresses % 16)
    body(Pack<T, V, sizeof(T)>());
  else
    body(Pack<T, V, 16>());
}

template <class P>
P* packs(typename P::T* x) {
  return reinterpret_cast<P*>(x);
}
template <class P>
const P* packs(const typename P::T* x) {
  return reinterpret_cast<const P*>(x);
}

// A matrix (M, width) of packs cut into strips of rows and columns of blockDim.x packs, one block each.
struct Split {
  i64 M, width, rows;  // rows: of a strip
  dim3 grid, block;

  Split(i64 M, i64 C, int V) : M(M), width(C / V) {
    const i64 line = V == 1 ? WARP : 8;  // packs in 128 bytes
    i64 across = 1;
    while (across < line && across < width) across *= 2;
    const i64 down = THREADS / across, columns = ceil_div(width, across);
    // At least four rows a thread; with fewer, merging takes longer than summing.
    const i64 most = max(min(BLOCKS / columns, M / (4 * down)), i64(1));
    rows = max(ceil_div(ceil_div(M, most), down), i64(1)) * down;
    grid = dim3(unsigned(columns), unsigned(max(ceil_div(M, rows), i64(1))));
    block = dim3(unsigned(across), unsigned(down));
  }
  i64 strips() const { return grid.y; }
};

// What one thread takes of it: a pack of every blockDim.y-th row, from `row` to before `end`. Beside the matrix
// (`inside` false) there are no rows.
struct Share {
  i64 pack, row, end;
  bool inside;

  __device__ explicit Share(const Split& s) {
    pack = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    inside = pack < s.width;
    end = inside ? min(s.M, (blockIdx.y + 1) * s.rows) : 0;
    row = blockIdx.y * s.rows + threadIdx.y;
  }
};

// ---- joining ------------------------------------------------------------------------------------------------------

// The merge of what the rows of threads of a block hold.
template <class Part>
__device__ Part merge_rows(const Part& part) {
  return join_threads(part, int(blockDim.x), int(blockDim.y), [](Part a, const Part& b) {
    a.merge(b);
    return a;
  });
}

// Writes the statistics of the block's strip into parts (strips, C).
template <template <class, int> class Part, class W, int V>
__device__ void leave(Part<W, 1>* parts, const Part<W, V>& of_thread, const Share& share, i64 width) {
  const Part<W, V> part = merge_rows(of_thread);
  if (threadIdx.y || !share.inside) return;
  for (int v = 0; v < V; v++) parts[(blockIdx.y * width + share.pack) * V + v] = part.channel(v);
}

// All strips' statistics of channel c. Few channels a block, as there may be many strips.
const dim3 MERGE_BLOCK(4, THREADS / 4);

inline dim3 merge_grid(i64 C) { return dim3(unsigned(ceil_div(C, MERGE_BLOCK.x))); }

template <class Part>
__device__ Part merge_strips(const Part* parts, i64 strips, i64 c, i64 C) {
  Part whole{};
  if (c < C)
    for (i64 strip = threadIdx.y; strip < strips; strip += blockDim.y) whole.merge(parts[strip * C + c]);
  return merge_rows(whole);
}

// 1 / sqrt(var + eps) of a channel: what the forward pass kept, or in inference (inv_std nullptr) worked out.
template <class W>
struct InverseStd {
  const W *inv_std, *var;
  W eps;

  __device__ W operator()(i64 c) const { return inv_std ? inv_std[c] : 1 / sqrt(var[c] + eps); }
};

// ---- forward ------------------------------------------------------------------------------------------------------

template <class P>
__global__ void __launch_bounds__(THREADS)
    moments(Moments<typename P::W, 1>* parts, const P* __restrict__ x, const Split s) {
  const Share share(s);
  Moments<typename P::W, P::V> total{};
#pragma unroll 4
  for (i64 row = share.row; row < share.end; row += blockDim.y) {
    const P in = x[row * s.width + share.pack];
    total.add(in);
  }
  leave(parts, total, share, s.width);
}

template <class W>
__global__ void __launch_bounds__(THREADS)
    finish_moments(W* mean, W* inv_std, W* running_mean, W* running_var, const Moments<W, 1>* parts, double momentum,
                   double eps, i64 strips, i64 M, i64 C) {
  const i64 c = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const Moments<W, 1> whole = merge_strips(parts, strips, c, C);
  if (threadIdx.y || c >= C) return;
  const double mean64 = whole.mean[0], var = double(whole.m2[0]) / double(M);
  const double unbiased = M > 1 ? var * (double(M) / double(M - 1)) : var;
  mean[c] = W(mean64);
  inv_std[c] = W(1 / sqrt(var + eps));
  if (running_mean) running_mean[c] = W((1 - momentum) * double(running_mean[c]) + momentum * mean64);
  if (running_var) running_var[c] = W((1 - momentum) * double(running_var[c]) + momentum * unbiased);
}

// y = gamma * (x - mean) * inv_std + beta, plus residual if given, through ReLU if asked; mean and beta may be nullptr
// for 0. Subtracting first loses nothing where the mean is large beside the deviation.
template <class P, class W = typename P::W>
__global__ void __launch_bounds__(THREADS)
    normalise(P* __restrict__ y, const P* __restrict__ x, const W* __restrict__ gamma, const W* __restrict__ beta,
              const W* __restrict__ mean, InverseStd<W> inv_std, const P* __restrict__ residual, bool relu,
              const Split s) {
  const Share share(s);
  if (!share.inside) return;
  W scale[P::V], offset[P::V], middle[P::V];
  for (int v = 0; v < P::V; v++) {
    const i64 c = share.pack * P::V + v;
    scale[v] = gamma[c] * inv_std(c);
    offset[v] = beta ? beta[c] : W(0);
    middle[v] = mean ? mean[c] : W(0);
  }
#pragma unroll 4
  for (i64 row = share.row; row < share.end; row += blockDim.y) {
    const i64 at = row * s.width + share.pack;
    const P in = x[at], more = residual ? residual[at] : P{};
    P out;
    for (int v = 0; v < P::V; v++) {
      W value = (wide(in.at[v]) - middle[v]) * scale[v] + offset[v];
      if (residual) value += wide(more.at[v]);
      if (relu && value < 0) value = 0;  // NaN stays
      out.at[v] = narrow<typename P::T>(value);
    }
    y[at] = out;
  }
}

template <class T>
void batch_norm_forward(T* y, Wide<T>* mean, Wide<T>* inv_std, Wide<T>* running_mean, Wide<T>* running_var, const T* x,
                        const Wide<T>* gamma, const Wide<T>* beta, const T* residual, bool relu, double momentum,
                        double eps, i64 M, i64 C) {
  if (C == 0) return;
  with_packs<T>(C, {y, x, residual}, [&](auto pack) {
    using P = decltype(pack);
    using W = Wide<T>;
    const Split s(M, C, P::V);
    const Scratch<Moments<W, 1>> parts(s.strips() * C);
    launch("batch_norm_forward", moments<P>, s.grid, s.block, 0, current_stream(), parts.get(), packs<P>(x), s);
    launch("batch_norm_forward", finish_moments<W>, merge_grid(C), MERGE_BLOCK, 0, current_stream(), mean, inv_std,
           running_mean, running_var, parts.get(), momentum, eps, s.strips(), M, C);
    launch("batch_norm_forward", normalise<P>, s.grid, s.block, 0, current_stream(), packs<P>(y), packs<P>(x), gamma,
           beta, mean, InverseStd<W>{inv_std, nullptr, 0}, packs<P>(residual), relu, s);
  });
}

template <class T>
void batch_norm_inference(T* y, const T* x, const Wide<T>* gamma, const Wide<T>* beta, const Wide<T>* mean,
                          const Wide<T>* var, const T* residual, bool relu, double eps, i64 M, i64 C) {
  if (C == 0) return;
  with_packs<T>(C, {y, x, residual}, [&](auto pack) {
    using P = decltype(pack);
    const Split s(M, C, P::V);
    launch("batch_norm_inference", normalise<P>, s.grid, s.block, 0, current_stream(), packs<P>(y), packs<P>(x), gamma,
           beta, mean, InverseStd<Wide<T>>{nullptr, var, Wide<T>(eps)}, packs<P>(residual), relu, s);
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------
// With s = inv_std, n = (x - mean) s and g the gradient before the ReLU,
//     dbeta = sum g,  dgamma = sum g n,  dx = gamma s (g - dbeta / M - n dgamma / M)
// (Ioffe and Szegedy 2015, section 3; derived in ../cpu/batch_norm.cpp). In inference mean and s are constants, and
// dx = gamma s g.

// y > 0 masks dy on its way through a ReLU: y itself, or y worked out from x as `normalise` does, an array less to
// read.
template <class P, class W = typename P::W>
struct Mask {
  const P* y;
  bool from_x;
  W scale[P::V], offset[P::V], middle[P::V];

  __device__ Mask(const P* y, const W* gamma, const W* beta, const W* mean, const W* inv_std, const Share& share)
      : y(y), from_x(beta != nullptr) {
    for (int v = 0; v < P::V; v++) {
      const i64 c = share.pack * P::V + v;
      middle[v] = share.inside ? mean[c] : W(0);
      scale[v] = share.inside && from_x ? gamma[c] * inv_std[c] : W(0);
      offset[v] = share.inside && from_x ? beta[c] : W(0);
    }
  }
  // g of one pack
  __device__ P operator()(const P* dy, const P& x, i64 at) const {
    P g = dy[at];
    if (y) {
      const P out = y[at];
      for (int v = 0; v < P::V; v++)
        if (!(wide(out.at[v]) > 0)) g.at[v] = typename P::T{};
    } else if (from_x) {
      for (int v = 0; v < P::V; v++)
        if (!((wide(x.at[v]) - middle[v]) * scale[v] + offset[v] > 0)) g.at[v] = typename P::T{};
    }
    return g;
  }
};

template <class P, class W = typename P::W>
__global__ void __launch_bounds__(THREADS)
    gradient_sums(Sums<W, 1>* parts, P* __restrict__ dresidual, const P* __restrict__ dy, const P* __restrict__ x,
                  const P* __restrict__ y, const W* __restrict__ gamma, const W* __restrict__ beta,
                  const W* __restrict__ mean, const W* __restrict__ inv_std, const Split s) {
  const Share share(s);
  const Mask<P> mask(y, gamma, beta, mean, inv_std, share);
  Sums<W, P::V> total{};
#pragma unroll 4
  for (i64 row = share.row; row < share.end; row += blockDim.y) {
    const i64 at = row * s.width + share.pack;
    const P in = x[at], g = mask(dy, in, at);
    if (dresidual) dresidual[at] = g;
    for (int v = 0; v < P::V; v++) {
      total.g[v] += wide(g.at[v]);
      total.gx[v] += wide(g.at[v]) * (wide(in.at[v]) - mask.middle[v]);
    }
  }
  leave(parts, total, share, s.width);
}

template <class W>
__global__ void __launch_bounds__(THREADS)
    finish_sums(W* dgamma, W* dbeta, const Sums<W, 1>* parts, InverseStd<W> inv_std, i64 strips, i64 C) {
  const i64 c = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const Sums<W, 1> whole = merge_strips(parts, strips, c, C);
  if (threadIdx.y || c >= C) return;
  dbeta[c] = whole.g[0];
  dgamma[c] = whole.gx[0] * inv_std(c);
}

template <class P, class W = typename P::W>
void sum_gradients(const char* op, P* dresidual, W* dgamma, W* dbeta, const P* dy, const P* x, const P* y,
                   const W* gamma, const W* beta, const W* mean, InverseStd<W> inv_std, const Split& s) {
  const i64 C = s.width * P::V;
  const Scratch<Sums<W, 1>> parts(s.strips() * C);
  launch(op, gradient_sums<P>, s.grid, s.block, 0, current_stream(), parts.get(), dresidual, dy, x, y, gamma, beta,
         mean, inv_std.inv_std, s);
  launch(op, finish_sums<W>, merge_grid(C), MERGE_BLOCK, 0, current_stream(), dgamma, dbeta, parts.get(), inv_std,
         s.strips(), C);
}

// dx written as gamma s ((g - dbeta / M) - (x - mean) (s dgamma / M)): both brackets are differences of numbers of one
// size.
template <class P, class W = typename P::W>
__global__ void __launch_bounds__(THREADS)
    input_gradient(P* __restrict__ dx, const P* __restrict__ dy, const P* __restrict__ x, const P* __restrict__ y,
                   const W* __restrict__ gamma, const W* __restrict__ beta, const W* __restrict__ mean,
                   const W* __restrict__ inv_std, const W* __restrict__ dgamma, const W* __restrict__ dbeta,
                   const Split s) {
  const Share share(s);
  if (!share.inside) return;
  const Mask<P> mask(y, gamma, beta, mean, inv_std, share);
  W scale[P::V], slope[P::V], mean_g[P::V];
  for (int v = 0; v < P::V; v++) {
    const i64 c = share.pack * P::V + v;
    scale[v] = gamma[c] * inv_std[c];
    slope[v] = dgamma[c] * inv_std[c] / W(s.M);
    mean_g[v] = dbeta[c] / W(s.M);
  }
#pragma unroll 4
  for (i64 row = share.row; row < share.end; row += blockDim.y) {
    const i64 at = row * s.width + share.pack;
    const P in = x[at], g = mask(dy, in, at);
    P out;
    for (int v = 0; v < P::V; v++) {
      const W apart = wide(in.at[v]) - mask.middle[v];
      out.at[v] = narrow<typename P::T>(scale[v] * ((wide(g.at[v]) - mean_g[v]) - apart * slope[v]));
    }
    dx[at] = out;
  }
}

template <class T>
void batch_norm_backward(T* dx, T* dresidual, Wide<T>* dgamma, Wide<T>* dbeta, const T* dy, const T* x, const T* y,
                         const Wide<T>* gamma, const Wide<T>* beta, const Wide<T>* mean, const Wide<T>* inv_std, i64 M,
                         i64 C) {
  if (C == 0) return;
  with_packs<T>(C, {dx, dresidual, dy, x, y}, [&](auto pack) {
    using P = decltype(pack);
    const Split s(M, C, P::V);
    sum_gradients<P>("batch_norm_backward", packs<P>(dresidual), dgamma, dbeta, packs<P>(dy), packs<P>(x), packs<P>(y),
                     gamma, beta, mean, InverseStd<Wide<T>>{inv_std, nullptr, 0}, s);
    // dresidual holds g already: one array to read where there would be two.
    launch("batch_norm_backward", input_gradient<P>, s.grid, s.block, 0, current_stream(), packs<P>(dx),
           packs<P>(dresidual ? dresidual : dy), packs<P>(x), packs<P>(dresidual ? nullptr : y), gamma,
           dresidual ? nullptr : beta, mean, inv_std, dgamma, dbeta, s);
  });
}

template <class T>
void batch_norm_inference_backward(T* dx, Wide<T>* dgamma, Wide<T>* dbeta, const T* dy, const T* x,
                                   const Wide<T>* gamma, const Wide<T>* mean, const Wide<T>* var, double eps, i64 M,
                                   i64 C) {
  if (C == 0) return;
  with_packs<T>(C, {dx, dy, x}, [&](auto pack) {
    using P = decltype(pack);
    const Split s(M, C, P::V);
    const InverseStd<Wide<T>> inv_std{nullptr, var, Wide<T>(eps)};
    sum_gradients<P, Wide<T>>("batch_norm_inference_backward", nullptr, dgamma, dbeta, packs<P>(dy), packs<P>(x),
                              nullptr, gamma, nullptr, mean, inv_std, s);
    launch("batch_norm_inference_backward", normalise<P>, s.grid, s.block, 0, current_stream(), packs<P>(dx),
           packs<P>(dy), gamma, nullptr, nullptr, inv_std, nullptr, false, s);
  });
}

}  // namespace

template <class T>
void batch_norm_kernels(Kernels<T>& table) {
  table.batch_norm_forward = batch_norm_forward<T>;
  table.batch_norm_backward = batch_norm_backward<T>;
  table.batch_norm_inference = batch_norm_inference<T>;
  table.batch_norm_inference_backward = batch_norm_inference_backward<T>;
}

template void batch_norm_kernels<float>(Kernels<float>&);
template void batch_norm_kernels<double>(Kernels<double>&);
template void batch_norm_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
