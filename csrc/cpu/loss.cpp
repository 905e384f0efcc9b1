// Mean cross-entropy of softmax(logits) against integer labels, with its gradient from the same pass.
//
// With z = x - max(x), log p_j = z_j - log(sum exp z), and targets t_j = (1 - smoothing) [j = label] + smoothing / K
// (Szegedy et al. 2016, section 7), the loss of a row is -sum t_j log p_j. As sum t_j = 1, its derivative by x_j is
// p_j - t_j; the mean over rows divides it by N. No exp overflows, since no z is positive.
#include <math.h>

#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

inline float exp_of(float x) { return ::expf(x); }
inline double exp_of(double x) { return ::exp(x); }

// One row: writes (p - t) / N, returns the loss.
template <class T>
double cross_entropy_row(T* dx, const T* x, i64 label, double smoothing, i64 N, i64 K) {
  T largest = x[0];
  for (i64 j = 1; j < K; j++) largest = x[j] > largest ? x[j] : largest;
  double sum = 0, sum_z = 0;
  for (i64 j = 0; j < K; j++) {
    const T z = x[j] - largest;
    dx[j] = exp_of(z);
    sum += double(dx[j]);
    sum_z += double(z);
  }
  const double log_sum = ::log(sum), everywhere = smoothing / double(K);
  for (i64 j = 0; j < K; j++) {
    const double target = j == label ? 1 - smoothing + everywhere : everywhere;
    dx[j] = T((double(dx[j]) / sum - target) / double(N));
  }
  // Apart, because a logit of -inf is legal where it does not count, and 0 * inf is not 0.
  double loss = smoothing < 1 ? (1 - smoothing) * (log_sum - double(x[label] - largest)) : 0;
  if (smoothing > 0) loss += everywhere * (double(K) * log_sum - sum_z);
  return loss;
}

template <class T>
void cross_entropy(T* loss, T* dlogits, const T* logits, const i64* labels, double smoothing, i64 N, i64 K) {
  Scratch<double> rows(N);
  // An exp costs about as much as eight elements of traffic.
  parallel_ranges(N, items_per_part(8 * K), [&](i64 begin, i64 end) {
    for (i64 n = begin; n < end; n++)
      rows[n] = cross_entropy_row(dlogits + n * K, logits + n * K, labels[n], smoothing, N, K);
  });
  double sum = 0;
  for (i64 n = 0; n < N; n++) sum += rows[n];
  *loss = T(sum / double(N));
}

}  // namespace

template <class T>
void loss_kernels(Kernels<T>& table) {
  table.cross_entropy = cross_entropy<T>;
}

template void loss_kernels<float>(Kernels<float>&);
template void loss_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
