// Cross-entropy against its definition, in double.
#include <limits>

#include "cuda/loss.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN(),
                 INFINITE = std::numeric_limits<double>::infinity();

// Runs twice, the second time in another order of threads, into NaN, and compares bits.
template <class T>
void run(Array<Wide<T>>& loss, Array<T>& dx, Array<T>& x, Array<i64>& labels, double smoothing) {
  Kernels<T> k{};
  loss_kernels(k);
  const int N = labels.size(), K = N ? x.size() / N : 0;
  Array<Wide<T>> loss_again(1);
  Array<T> dx_again(x.size());
  fill_nan(loss);
  fill_nan(loss_again);
  fill_nan(dx);
  fill_nan(dx_again);
  k.cross_entropy(loss.data(), dx.data(), x.data(), labels.data(), smoothing, N, K);
  const char* schedule = std::getenv("TINYRES_SCHEDULE");
  const std::string before = schedule ? schedule : "forward";
  setenv("TINYRES_SCHEDULE", "random:42", 1);
  k.cross_entropy(loss_again.data(), dx_again.data(), x.data(), labels.data(), smoothing, N, K);
  setenv("TINYRES_SCHEDULE", before.c_str(), 1);
  wait();
  CHECK(same_bits(loss, loss_again) && same_bits(dx, dx_again));
}

template <class T>
void check(Array<T>& x, Array<i64>& labels, double smoothing) {
  const int N = labels.size(), K = x.size() / N;
  std::vector<double> want(1, 0.0), want_dx(std::size_t(x.size()));
  for (int n = 0; n < N; n++) {
    double largest = -INFINITE, sum = 0, loss = 0;
    for (int j = 0; j < K; j++) largest = std::fmax(largest, value(x[n * K + j]));
    for (int j = 0; j < K; j++) sum += std::exp(value(x[n * K + j]) - largest);
    for (int j = 0; j < K; j++) {
      const double log_p = value(x[n * K + j]) - largest - std::log(sum);
      const double target = (j == labels[n] ? 1 - smoothing : 0) + smoothing / K;
      if (target > 0) loss -= target * log_p;
      want_dx[std::size_t(n * K + j)] = (std::exp(log_p) - target) / N;
    }
    want[0] += loss / N;
  }
  Array<Wide<T>> loss(1);
  Array<T> dx(x.size());
  run(loss, dx, x, labels, smoothing);
  CHECK(close(loss, want, 8));
  // Each element to within its own rounding, and that of exp (1 in Wide<T>): the sum over a row is to be 0.
  for (int i = 0; i < x.size(); i++) {
    const double w = want_dx[std::size_t(i)];
    CHECK(std::fabs(value(dx[i]) - w) <= 2 * epsilon<T>() * std::fabs(w) + 8 * epsilon<Wide<T>>() / N);
  }
}

void choose(Array<i64>& labels, int K) {
  for (int n = 0; n < labels.size(); n++) labels[n] = n == 0 ? K - 1 : n * 7919 % K;
}

template <class T>
void test_shapes() {
  struct Shape {
    int N, K;
  };
  for (const Shape s : {Shape{1, 1},
                        {3, 2},
                        {1, 10},
                        {5, 31},
                        {3, 32},
                        {4, 33},
                        {2, 127},
                        {2, 129},
                        {2, 513},
                        {3, 1000},
                        {1, 1500},
                        {300, 7},
                        {257, 10}}) {
    Array<T> x(s.N * s.K);
    Array<i64> labels(s.N);
    choose(labels, s.K);
    for (const double smoothing : {0.0, 0.1}) {
      fill_uniform(x, 1);
      check(x, labels, smoothing);
      for (int i = 0; i < x.size(); i++) x[i] = rounded<T>(40 * value(x[i]) - 1000);
      check(x, labels, smoothing);
    }
  }
}

// A certain prediction: no gradient but rounding, however far apart the logits are.
template <class T>
void test_certain() {
  Array<T> x(40, rounded<T>(-30000)), dx(40);
  Array<i64> labels(1, 35);
  Array<Wide<T>> loss(1);
  x[35] = rounded<T>(30000);
  run(loss, dx, x, labels, 0);
  CHECK(loss[0] == 0);
  for (int j = 0; j < 40; j++) CHECK(value(dx[j]) == 0);
  labels[0] = 3;
  run(loss, dx, x, labels, 0);
  CHECK(loss[0] == wide(x[35]) - wide(x[3]));
  for (int j = 0; j < 40; j++) CHECK(value(dx[j]) == (j == 3 ? -1 : j == 35));
}

template <class T>
void test_special() {
  for (const int K : {10, 400}) {
    Array<T> x(3 * K), dx(3 * K);
    Array<i64> labels(3);
    Array<Wide<T>> loss(1);
    // -inf is a logit like others, unless it is smoothed.
    fill_uniform(x, 2);
    choose(labels, K);
    x[K + 1] = rounded<T>(-INFINITE);
    labels[1] = 0;
    check(x, labels, 0);
    run(loss, dx, x, labels, 0.1);
    CHECK(value(loss[0]) == INFINITE);
    labels[1] = 1;
    run(loss, dx, x, labels, 0);
    CHECK(value(loss[0]) == INFINITE);

    // One row of NaN, whichever way; the others' gradients stay.
    for (const int way : {0, 1, 2, 3, 4, 5}) {
      fill_uniform(x, 2);
      choose(labels, K);
      if (way == 0) x[K + K - 1] = rounded<T>(NAN_VALUE);
      if (way == 1) x[K] = rounded<T>(INFINITE);
      if (way == 2) labels[1] = -1;
      if (way == 3) labels[1] = K;
      if (way == 4) labels[1] = i64(1) << 62;
      if (way == 5)
        for (int j = 0; j < K; j++) x[K + j] = rounded<T>(-INFINITE);
      for (const double smoothing : {0.0, 1.0}) {
        run(loss, dx, x, labels, smoothing);
        CHECK(std::isnan(loss[0]));
        for (int i = 0; i < 3 * K; i++) CHECK(std::isnan(value(dx[i])) == (i / K == 1));
      }
    }
  }
}

template <class T>
void test_nothing() {
  Array<T> x(0), dx(0);
  Array<i64> labels(0);
  Array<Wide<T>> loss(1, 5);
  run(loss, dx, x, labels, 0);
  CHECK(std::isnan(loss[0]));  // the mean of nothing
}

template <class T>
void test_all() {
  test_shapes<T>();
  test_certain<T>();
  test_special<T>();
  test_nothing<T>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
