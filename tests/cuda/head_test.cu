// The end of a network against its formulas in double: loss, gradients, metrics.
#include <limits>

#include "cuda/head.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN();

template <class T>
struct Problem {
  int N, HW, C, K;
  Array<T> x, w, b;
  Array<i64> labels;

  Problem(int N, int HW, int C, int K) : N(N), HW(HW), C(C), K(K), x(N * HW * C), w(C * K), b(K), labels(N) {
    fill_uniform(x, 1);
    fill_uniform(w, 2);
    fill_uniform(b, 3);
    for (int n = 0; n < N; n++) labels[n] = n * 7919 % K;
  }
};

// What a call has left. The parts of dw and db, if that is what was asked for, are added up here.
template <class T>
struct Results {
  using W = Wide<T>;
  Array<W> loss, dw, db;
  Array<T> dx;
  Array<double> metrics;

  explicit Results(const Problem<T>& p) : loss(1), dw(p.C * p.K), db(p.K), dx(p.N * p.HW * p.C), metrics(4) {
    fill_nan(loss), fill_nan(dw), fill_nan(db), fill_nan(dx);
    metrics[0] = 0.5, metrics[1] = 2, metrics[2] = 10;  // of a batch before
  }

  void run(Problem<T>& p, double smoothing, bool gradients = true, bool parts = false) {
    Kernels<T> k{};
    head_kernels(k);
    const int count = parts ? int(k.classifier_parts(p.N, p.C, p.K)) : 1;
    Array<W> dw_parts(count * dw.size()), db_parts(count * db.size());
    fill_nan(dw_parts), fill_nan(db_parts);
    k.classifier(loss.data(), gradients ? dx.data() : nullptr, gradients ? dw_parts.data() : nullptr,
                 gradients ? db_parts.data() : nullptr, metrics.data(), p.x.data(), p.w.data(), p.b.data(),
                 p.labels.data(), smoothing, parts, p.N, p.HW, p.C, p.K);
    wait();
    const auto add = [&](Array<W>& sum, Array<W>& of) {
      for (int i = 0; i < sum.size(); i++) {
        double total = 0;
        for (int part = 0; part < count; part++) total += double(of[part * sum.size() + i]);
        sum[i] = W(total);
      }
    };
    add(dw, dw_parts), add(db, db_parts);
  }
};

template <class T>
bool same(Results<T>& a, Results<T>& b) {
  return same_bits(a.loss, b.loss) && same_bits(a.dx, b.dx) && same_bits(a.dw, b.dw) && same_bits(a.db, b.db) &&
         same_bits(a.metrics, b.metrics);
}

// Each element to within some steps at the size of the sum that it is, of which there are few: not of the largest.
template <class A>
void check_close(A& got, const Doubles& want, double bound) {
  bool good = got.size() == int(want.size());
  for (int i = 0; good && i < got.size(); i++) {
    good = std::fabs(value(got[i]) - want[std::size_t(i)]) <= bound;
    if (!good)
      std::printf("element %d: got %.9g, want %.9g within %.3g\n", i, value(got[i]), want[std::size_t(i)], bound);
  }
  CHECK(good);
}

template <class T>
void check(Problem<T>& p, double smoothing) {
  const int N = p.N, HW = p.HW, C = p.C, K = p.K;
  Doubles dx(std::size_t(N * HW * C)), dw(std::size_t(C * K)), db(std::size_t(K), 0.0);
  double loss = 0;
  int wrong = 0;
  for (int n = 0; n < N; n++) {
    Doubles f(std::size_t(C), 0.0), z(std::size_t(K), 0.0);
    for (int c = 0; c < C; c++)
      for (int i = 0; i < HW; i++) f[std::size_t(c)] += value(p.x[(n * HW + i) * C + c]) / HW;
    double largest = -1e300, sum = 0;
    int best = 0;
    for (int k = 0; k < K; k++) {
      double& to = z[std::size_t(k)] = value(p.b[k]);
      for (int c = 0; c < C; c++) to += f[std::size_t(c)] * value(p.w[c * K + k]);
      if (to > largest) largest = to, best = k;
    }
    wrong += best != int(p.labels[n]);
    for (int k = 0; k < K; k++) sum += std::exp(z[std::size_t(k)] - largest);
    Doubles g(std::size_t(K), 0.0);
    for (int k = 0; k < K; k++) {
      const double log_p = z[std::size_t(k)] - largest - std::log(sum);
      const double target = (k == p.labels[n] ? 1 - smoothing : 0) + smoothing / K;
      loss -= target * log_p;
      g[std::size_t(k)] = (std::exp(log_p) - target) / N;
      db[std::size_t(k)] += g[std::size_t(k)];
    }
    for (int c = 0; c < C; c++) {
      double df = 0;
      for (int k = 0; k < K; k++) {
        df += g[std::size_t(k)] * value(p.w[c * K + k]);
        dw[std::size_t(c * K + k)] += f[std::size_t(c)] * g[std::size_t(k)];
      }
      for (int i = 0; i < HW; i++) dx[std::size_t((n * HW + i) * C + c)] = df / HW;
    }
  }
  Results<T> r(p), again(p), parts(p), alone(p);
  r.run(p, smoothing);
  const double e = epsilon<Wide<T>>(), rough = sizeof(T) == 2 ? epsilon<T>() : 0;
  check_close(r.loss, {loss / N}, 32 * e * (1 + loss / N));
  check_close(r.dx, dx, (64 * e + rough) / (N * HW));
  check_close(r.dw, dw, 32 * e);
  check_close(r.db, db, 32 * e);
  check_close(r.metrics, {0.5 + loss, 2.0 + wrong, 10.0 + N, 0}, 64 * e * (1 + loss));
  CHECK(r.metrics[1] == 2 + wrong && r.metrics[2] == 10 + N && r.metrics[3] == 0);

  in_another_order([&] { again.run(p, smoothing); });
  CHECK(same(r, again));
  parts.run(p, smoothing, true, true);
  check_close(parts.dw, dw, 32 * e);
  check_close(parts.db, db, 32 * e);
  alone.run(p, smoothing, false);
  CHECK(same_bits(alone.loss, r.loss) && same_bits(alone.metrics, r.metrics));
}

template <class T>
void test_shapes() {
  const int sizes[][4] = {{1, 1, 1, 1},  {3, 4, 5, 2},    {5, 9, 64, 10}, {2, 2, 300, 33}, {7, 1, 16, 100},
                          {40, 1, 3, 7}, {2, 3, 31, 260}, {1, 49, 8, 10}, {300, 1, 2, 3}};
  for (const auto& s : sizes) {
    Problem<T> p(s[0], s[1], s[2], s[3]);
    check(p, 0);
    check(p, 0.1);
  }
  // More images than there are parts of so large a dw: a block has several.
  if (sizeof(T) > 4) return;
  Problem<T> large(37, 1, 300, 230);
  CHECK(classifier_parts(37, 300, 230) == 32);
  check(large, 0.1);
}

// Ties, NaN, labels that do not exist.
template <class T>
void test_special() {
  Problem<T> p(4, 2, 3, 40);
  for (int i = 0; i < p.w.size(); i++) p.w[i] = rounded<T>(0);
  for (int k = 0; k < p.K; k++) p.b[k] = rounded<T>(k == 7 || k == 36 ? 2 : k == 5 ? -1 : 0);
  p.labels[0] = 7, p.labels[1] = 36, p.labels[2] = 7, p.labels[3] = 5;
  Results<T> tie(p);
  tie.run(p, 0);
  CHECK(tie.metrics[1] == 2 + 2);  // the first of equals
  p.b[36] = p.b[39] = rounded<T>(NAN_VALUE);
  Results<T> nan(p);
  nan.run(p, 0);
  CHECK(nan.metrics[1] == 2 + 3 && nan.metrics[2] == 14 && nan.metrics[3] == 0);  // the first NaN
  CHECK(std::isnan(nan.loss[0]) && std::isnan(nan.metrics[0]) && std::isnan(value(nan.dx[0])));
  for (const i64 label : {i64(-1), i64(40), i64(1) << 62}) {
    Problem<T> q(4, 2, 3, 40);
    q.labels[2] = label;
    Results<T> r(q);
    r.run(q, 0.1);
    CHECK(std::isnan(r.loss[0]) && std::isnan(value(r.dw[0])) && r.metrics[3] == 0);
    for (int i = 0; i < r.dx.size(); i++) CHECK(std::isnan(value(r.dx[i])) == (i / 6 == 2));
  }
}

template <class T>
void test_too_large() {
  Kernels<T> k{};
  head_kernels(k);
  bool thrown = false;
  try {
    k.classifier(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, false, 1, 1,
                 CLASSIFIER_LIMIT - 1, 1);
  } catch (const std::invalid_argument& error) {
    thrown = std::string(error.what()).find("[classifier] C + 2 K must") == 0;
  }
  CHECK(thrown);
  if (sizeof(T) < 8) return;
  Problem<T> p(1, 1, int(CLASSIFIER_LIMIT) - 6, 3);  // as large as it may be
  check(p, 0);
}

template <class T>
void test_all() {
  test_shapes<T>();
  test_special<T>();
  test_too_large<T>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
