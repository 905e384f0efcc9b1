// The cross-entropy of one row of logits, and its gradient: for the loss by itself and for the end of a network.
//
// With z = x - max(x), log p_j = z_j - log(sum exp z), and targets t_j = (1 - smoothing) [j = label] + smoothing / K
// (Szegedy et al. 2016, section 7), the loss of a row is -sum t_j log p_j. As sum t_j = 1, its derivative by x_j is
// p_j - t_j; the mean over rows divides it by N. No exp overflows, since no z is positive.
#pragma once

#include "join.h"

namespace tinyres {

// NaN need not win: it reaches the result by exp all the same.
template <class W>
__device__ W larger(W a, W b) {
  return a > b ? a : b;
}

// By `threads` neighbours, a power of two, of which this is number `thread`. logit(j) is x_j; store(j, dx_j) is called
// once for each j. Returns the loss. Loss and gradient are NaN where the label is not one of 0 ... K - 1.
template <class W, class Logit, class Store>
__device__ double cross_entropy_row(i64 label, double smoothing, i64 N, i64 K, int thread, int threads,
                                    const Logit& logit, const Store& store) {
  const bool exists = 0 <= label && label < K;
  W largest = -W(INFINITY);
  for (i64 j = thread; j < K; j += threads) largest = larger(largest, logit(j));
  largest = join_threads(largest, 1, threads, larger<W>);

  const auto sum_threads = [&](double value) {
    return join_threads(value, 1, threads, [](double a, double b) { return a + b; });
  };
  double sum = 0, sum_z = 0;
  for (i64 j = thread; j < K; j += threads) {
    const W z = logit(j) - largest;
    sum += double(exp(z));
    sum_z += double(z);
  }
  sum = sum_threads(sum);
  sum_z = sum_threads(sum_z);

  const double everywhere = exists ? smoothing / double(K) : double(NAN);
  const double inverse = 1 / sum;
  for (i64 j = thread; j < K; j += threads) {
    const double target = j == label ? 1 - smoothing + everywhere : everywhere;
    store(j, W((double(exp(logit(j) - largest)) * inverse - target) / double(N)));
  }
  const double log_sum = log(sum);
  // Apart, because a logit of -inf is legal where it does not count, and 0 * inf is not 0.
  double loss = exists ? 0 : double(NAN);
  if (exists && smoothing < 1) loss = (1 - smoothing) * (log_sum - double(logit(label) - largest));
  if (smoothing > 0) loss += everywhere * (double(K) * log_sum - sum_z);
  return loss;
}

}  // namespace tinyres
