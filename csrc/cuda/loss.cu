// Mean cross-entropy of softmax(logits) against integer labels, with its gradient from the same launch.
//
// A row is one block's: a warp for few classes, more for many. It reads its logits three times, the first time from
// memory and then from the cache. A second launch adds up the losses of the rows in a fixed order.
#include "cross_entropy.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;

// One row a block: dx = (p - t) / N, and the loss of the row.
template <class T>
__global__ void cross_entropy_rows(double* losses, T* __restrict__ dlogits, const T* __restrict__ logits,
                                   const i64* __restrict__ labels, double smoothing, i64 N, i64 K) {
  const i64 row = blockIdx.x;
  const T* x = logits + row * K;
  T* dx = dlogits + row * K;
  const double loss = cross_entropy_row<Wide<T>>(
      labels[row], smoothing, N, K, int(threadIdx.x), int(blockDim.x), [&](i64 j) { return wide(x[j]); },
      [&](i64 j, Wide<T> value) { dx[j] = narrow<T>(value); });
  if (threadIdx.x == 0) losses[row] = loss;
}

template <class W>
__global__ void __launch_bounds__(THREADS) mean(W* loss, const double* __restrict__ losses, i64 N) {
  double sum = 0;
  for (i64 row = threadIdx.x; row < N; row += blockDim.x) sum += losses[row];
  sum = join_threads(sum, 1, THREADS, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *loss = W(sum / double(N));
}

template <class T>
void cross_entropy(Wide<T>* loss, T* dlogits, const T* logits, const i64* labels, double smoothing, i64 N, i64 K) {
  const Scratch<double> losses(N);
  int threads = WARP;
  while (threads < THREADS && 4 * threads < K) threads *= 2;  // about four logits each
  if (N > 0)
    launch("cross_entropy", cross_entropy_rows<T>, dim3(unsigned(N)), dim3(unsigned(threads)), 0, current_stream(),
           losses.get(), dlogits, logits, labels, smoothing, N, K);
  launch("cross_entropy", mean<Wide<T>>, dim3(1), dim3(THREADS), 0, current_stream(), loss, losses.get(), N);
}

}  // namespace

template <class T>
void loss_kernels(Kernels<T>& table) {
  table.cross_entropy = cross_entropy<T>;
}

template void loss_kernels<float>(Kernels<float>&);
template void loss_kernels<double>(Kernels<double>&);
template void loss_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
