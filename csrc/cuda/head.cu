// The end of a network in one launch, there and back: global average pooling, a linear layer and softmax cross-entropy,
// the gradients of all three, and what an epoch wants to know.
//
// Of an image, f_c is the mean over its pixels, z = f w + b are the logits, and g = dloss / dz comes with the loss (see
// cross_entropy.h). Then dx = (g w^T) / HW at every pixel, dw is the sum over images of f g^T, and db that of g.
//
// A block takes an image, or several in turn where there are more images than it pays to have parts of dw, and keeps f,
// z and g in shared memory. So x is read once and dx written once; of what lies between nothing leaves the block. Sums
// over images are left in parts, one a block: those of dw and db for a second launch, or for whoever updates the
// weights; those of the loss for the last block to finish.
#include "correlation.h"
#include "cross_entropy.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;

// What is summed over images beside gradients.
struct Score {
  double loss, wrong;
  __device__ Score operator+(const Score& other) const { return {loss + other.loss, wrong + other.wrong}; }
};

// finish(c, sum over r < rows of term(r, c)) for each c < columns, by the whole block. Neighbouring threads take
// neighbouring columns; where those are few, groups of threads take turns at the rows.
template <class W, class Term, class Finish>
__device__ void sum_rows(W* partial, int rows, int columns, const Term& term, const Finish& finish) {
  const int width = min(columns, THREADS), groups = THREADS / width;
  const int thread = int(threadIdx.x), group = thread / width, column = thread % width;
  for (int first = 0; first < columns; first += width) {
    const int c = first + column;
    W sum = 0;
    if (group < groups && c < columns) {
#pragma unroll 8
      for (int r = group; r < rows; r += groups) sum += term(r, c);
    }
    partial[thread] = sum;
    __syncthreads();
    if (group == 0 && c < columns) {
      for (int other = 1; other < groups; other++) sum += partial[other * width + column];
      finish(c, sum);
    }
    __syncthreads();
  }
}

template <class W>
struct Candidate {
  W value;
  int index;
};

// The one that numpy.argmax takes: NaN before all numbers, the first of equals.
template <class W>
__device__ Candidate<W> first_largest(const Candidate<W>& a, const Candidate<W>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (a.value == b.value || a_nan) return a.index < b.index ? a : b;
  return a.value > b.value ? a : b;
}

// argmax of the K logits at z, by a warp.
template <class W>
__device__ int argmax(const W* z, int K, int lane) {
  Candidate<W> best{-W(INFINITY), K};
  for (int k = lane; k < K; k += WARP) best = first_largest(best, {z[k], k});
  return join_threads(best, 1, WARP, first_largest<W>).index;
}

// Adds up what the blocks have left, in their order, in whichever block is the last to come.
template <class W>
__device__ void finish_scores(W* loss, double* metrics, Score* scores, const Score& own, int N) {
  SHARED(last, bool[1]);
  if (threadIdx.x == 0) {
    scores[blockIdx.x] = own;
    __threadfence();  // what this block has written, before it says that it has
    last[0] = atomicAdd(&metrics[3], 1.0) == double(gridDim.x - 1);
  }
  __syncthreads();
  if (!last[0]) return;
  __threadfence();  // and what the others have, before it is read
  Score sum{0, 0};
  for (u32 i = threadIdx.x; i < gridDim.x; i += THREADS) sum = sum + scores[i];
  sum = join_threads(sum, 1, THREADS, [](const Score& a, const Score& b) { return a + b; });
  if (threadIdx.x != 0) return;
  *loss = W(sum.loss / double(N));
  metrics[0] += sum.loss;
  metrics[1] += sum.wrong;
  metrics[2] += double(N);
  atomicAdd(&metrics[3], -double(gridDim.x));
}

// dx nullptr: no gradients. Of the blocks there are two on a multiprocessor at most, so each may have many registers.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    classify(Wide<T>* loss, T* __restrict__ dx, Wide<T>* __restrict__ dw, Wide<T>* __restrict__ db, double* metrics,
             Score* scores, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ b,
             const i64* __restrict__ labels, double smoothing, int N, int HW, int C, int K) {
  using W = Wide<T>;
  SmemArena arena;
  W* f = arena.take<W>(C);
  W* z = arena.take<W>(K);
  W* g = arena.take<W>(K);
  W* partial = arena.take<W>(THREADS);
  const int thread = int(threadIdx.x);
  if (dx) dw += i64(blockIdx.x) * C * K, db += i64(blockIdx.x) * K;
  Score score{0, 0};

  for (int n = int(blockIdx.x); n < N; n += int(gridDim.x)) {
    const bool first = n == int(blockIdx.x);
    const i64 image = i64(n) * HW * C;
    sum_rows(
        partial, HW, C, [&](int pixel, int c) { return wide(x[image + pixel * C + c]); },
        [&](int c, W sum) { f[c] = sum / W(HW); });
    sum_rows(
        partial, C, K, [&](int c, int k) { return f[c] * wide(w[i64(c) * K + k]); },
        [&](int k, W sum) { z[k] = sum + wide(b[k]); });
    if (thread < WARP) {
      const i64 label = labels[n];
      score.loss += cross_entropy_row<W>(
          label, smoothing, N, K, thread, WARP, [&](i64 k) { return z[k]; }, [&](i64 k, W value) { g[k] = value; });
      score.wrong += argmax(z, K, thread) != label;
    }
    if (!dx) continue;  // the next image's sums begin with a barrier
    __syncthreads();

    for (int i = thread; i < C * K; i += THREADS) dw[i] = (first ? W(0) : dw[i]) + f[i / K] * g[i % K];
    for (int k = thread; k < K; k += THREADS) db[k] = (first ? W(0) : db[k]) + g[k];
    __syncthreads();  // f makes room for its gradient

    // A channel's row of w lies side by side: up to a warp adds its products.
    int depth = 1;
    while (depth < WARP && depth < K) depth *= 2;
    for (int begin = 0; begin < C; begin += THREADS / depth) {
      const int c = begin + thread / depth;
      W sum = 0;
      if (c < C)
        for (int k = thread % depth; k < K; k += depth) sum += g[k] * wide(w[i64(c) * K + k]);
      sum = join_threads(sum, 1, depth, [](W a, W b) { return a + b; });
      if (c < C && thread % depth == 0) f[c] = sum / W(HW);
    }
    __syncthreads();
    for (int i = thread; i < HW * C; i += THREADS) dx[image + i] = narrow<T>(f[i % C]);
    __syncthreads();
  }
  finish_scores(loss, metrics, scores, score, N);
}

// An image a block, up to two blocks for each multiprocessor of a large GPU; fewer where dw is large, so that its parts
// stay in the cache.
i64 classifier_parts(i64 N, i64 C, i64 K) {
  constexpr i64 MOST = 264, FEWEST = 32, ELEMENTS = i64(1) << 21;
  return min(N, min(MOST, max(FEWEST, ELEMENTS / (C * K))));
}

template <class T>
void classifier(Wide<T>* loss, T* dx, Wide<T>* dw, Wide<T>* db, double* metrics, const T* x, const T* w, const T* b,
                const i64* labels, double smoothing, bool parts, i64 N, i64 HW, i64 C, i64 K) {
  using W = Wide<T>;
  if (C + 2 * K > CLASSIFIER_LIMIT || N > INT32_MAX || HW * C > INT32_MAX)
    throw std::invalid_argument("[classifier] C + 2 K must be at most " + std::to_string(CLASSIFIER_LIMIT) +
                                ", N and H W C under 2^31; got N " + std::to_string(N) + ", H W " + std::to_string(HW) +
                                ", C " + std::to_string(C) + ", K " + std::to_string(K));
  const i64 blocks = classifier_parts(N, C, K);
  const bool add = dx && !parts && blocks > 1;
  const Scratch<W> dw_parts(add ? blocks * C * K : 0), db_parts(add ? blocks * K : 0);
  const Scratch<Score> scores(blocks);
  const std::size_t shared =
      (std::size_t(C + 2 * K) + THREADS) * sizeof(W) + 3 * 16;  // each array from a multiple of 16
  launch("classifier", classify<T>, dim3(unsigned(blocks)), dim3(THREADS), shared, current_stream(), loss, dx,
         add ? dw_parts.get() : dw, add ? db_parts.get() : db, metrics, scores.get(), x, w, b, labels, smoothing,
         int(N), int(HW), int(C), int(K));
  if (!add) return;
  launch_sum_parts("classifier", dw, dw_parts.get(), int(blocks), int(C * K));
  launch_sum_parts("classifier", db, db_parts.get(), int(blocks), int(K));
}

}  // namespace

template <class T>
void head_kernels(Kernels<T>& table) {
  table.classifier_parts = classifier_parts;
  table.classifier = classifier<T>;
}

template void head_kernels<float>(Kernels<float>&);
template void head_kernels<double>(Kernels<double>&);
template void head_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
