// Mean cross-entropy of softmax(logits) against integer labels, with its gradient from the same launch.
//
// With z = x - max(x), log p_j = z_j - log(sum exp z), and targets t_j = (1 - smoothing) [j = label] + smoothing / K
// (Szegedy et al. 2016, section 7), the loss of a row is -sum t_j log p_j. As sum t_j = 1, its derivative by x_j is
// p_j - t_j; the mean over rows divides it by N. No exp overflows, since no z is positive.
//
// A row is one block's: a warp for few classes, more for many. It reads its logits three times, the first time from
// memory and then from the cache. A second launch adds up the losses of the rows in a fixed order.
#include "join.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;

__device__ double sum_threads(double value) {
  return join_threads(value, 1, int(blockDim.x), [](double a, double b) { return a + b; });
}

// NaN need not win: it reaches the result by exp all the same.
template <class W>
__device__ W larger(W a, W b) {
  return a > b ? a : b;
}

// One row a block: dx = (p - t) / N, and the loss of the row. Both are NaN where the label is not one of 0 ... K - 1.
template <class T>
__global__ void cross_entropy_row(double* losses, T* __restrict__ dlogits, const T* __restrict__ logits,
                                  const i64* __restrict__ labels, double smoothing, i64 N, i64 K) {
  using W = Wide<T>;
  const i64 row = blockIdx.x, label = labels[row];
  const bool exists = 0 <= label && label < K;
  const T* x = logits + row * K;
  T* dx = dlogits + row * K;
  const i64 step = blockDim.x;

  W largest = -W(INFINITY);
  for (i64 j = threadIdx.x; j < K; j += step) largest = larger(largest, wide(x[j]));
  largest = join_threads(largest, 1, int(blockDim.x), larger<W>);

  double sum = 0, sum_z = 0;
  for (i64 j = threadIdx.x; j < K; j += step) {
    const W z = wide(x[j]) - largest;
    sum += double(exp(z));
    sum_z += double(z);
  }
  sum = sum_threads(sum);
  sum_z = sum_threads(sum_z);

  const double everywhere = exists ? smoothing / double(K) : double(NAN);
  const double inverse = 1 / sum;
  for (i64 j = threadIdx.x; j < K; j += step) {
    const double target = j == label ? 1 - smoothing + everywhere : everywhere;
    dx[j] = narrow<T>(W((double(exp(wide(x[j]) - largest)) * inverse - target) / double(N)));
  }
  if (threadIdx.x) return;
  const double log_sum = log(sum);
  // Apart, because a logit of -inf is legal where it does not count, and 0 * inf is not 0.
  double loss = exists ? 0 : double(NAN);
  if (exists && smoothing < 1) loss = (1 - smoothing) * (log_sum - double(wide(x[label]) - largest));
  if (smoothing > 0) loss += everywhere * (double(K) * log_sum - sum_z);
  losses[row] = loss;
}

template <class W>
__global__ void __launch_bounds__(THREADS) mean(W* loss, const double* __restrict__ losses, i64 N) {
  double sum = 0;
  for (i64 row = threadIdx.x; row < N; row += blockDim.x) sum += losses[row];
  sum = sum_threads(sum);
  if (threadIdx.x == 0) *loss = W(sum / double(N));
}

template <class T>
void cross_entropy(Wide<T>* loss, T* dlogits, const T* logits, const i64* labels, double smoothing, i64 N, i64 K) {
  const Scratch<double> losses(N);
  int threads = WARP;
  while (threads < THREADS && 4 * threads < K) threads *= 2;  // about four logits each
  if (N > 0)
    launch("cross_entropy", cross_entropy_row<T>, dim3(unsigned(N)), dim3(unsigned(threads)), 0, current_stream(),
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
