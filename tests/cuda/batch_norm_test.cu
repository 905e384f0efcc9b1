// Batch normalisation against its definition: two passes over the rows, in double.
#include <limits>

#include "cuda/batch_norm.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN(), EPS = 1e-5, MOMENTUM = 0.1;

using Doubles = std::vector<double>;

// Odd numbers of channels, whole packs of them, many of them; one strip of rows and several, the last one short.
struct Shape {
  int M, C;
  int size() const { return M * C; }
} const SHAPES[] = {{1, 1},    {2, 1},   {3, 16},  {7, 13},   {33, 37},  {300, 13}, {1001, 1}, {70, 33},
                    {600, 16}, {65, 64}, {200, 8}, {1300, 8}, {17, 200}, {5, 520},  {128, 72}, {150, 40}};

// Runs twice, the second time in another order of threads.
template <class Result, class Run>
void twice(Result& result, Result& again, const Run& run) {
  run(result);
  const char* schedule = std::getenv("TINYRES_SCHEDULE");
  const std::string before = schedule ? schedule : "forward";
  setenv("TINYRES_SCHEDULE", "random:42", 1);
  run(again);
  setenv("TINYRES_SCHEDULE", before.c_str(), 1);
  wait();
}

// Fits T's rounding of a value computed in Wide<T>.
template <class T>
constexpr double ulps(double of_wide) {
  return sizeof(T) == 2 ? 1 : of_wide;
}

// Everything that the four launchers read, and the shape.
template <class T>
struct Inputs {
  using W = Wide<T>;
  Shape s;
  Array<T> x, dy, y, residual;
  Array<W> gamma, beta, mean, var, inv_std;

  explicit Inputs(const Shape& s)
      : s(s),
        x(s.size()),
        dy(s.size()),
        y(s.size()),
        residual(s.size()),
        gamma(s.C),
        beta(s.C),
        mean(s.C),
        var(s.C),
        inv_std(s.C) {
    fill_uniform(x, 1);
    fill_uniform(dy, 2);
    fill_integers(y, 3);  // with zeros
    fill_uniform(residual, 4);
    fill_uniform(gamma, 5);
    fill_uniform(beta, 6);
    fill_uniform(mean, 7);
    for (int i = 0; i < s.size(); i++) x[i] = rounded<T>(value(x[i]) + i % s.C % 3);
    for (int c = 0; c < s.C; c++) {
      var[c] = W(0.5 + c % 5);
      inv_std[c] = W(1 / std::sqrt(double(var[c]) + EPS));
    }
  }
};

Doubles normalised(const Doubles& x, const Doubles& mean, const Doubles& inv_std, const Doubles& gamma,
                   const Doubles& beta, const Doubles& residual, bool relu) {
  Doubles y(x.size());
  for (std::size_t i = 0; i < x.size(); i++) {
    const std::size_t c = i % mean.size();
    y[i] = gamma[c] * (x[i] - mean[c]) * inv_std[c] + beta[c] + (residual.empty() ? 0 : residual[i]);
    if (relu && y[i] < 0) y[i] = 0;
  }
  return y;
}

template <class T>
Doubles doubles(Array<T>& a) {
  Doubles y(std::size_t(a.size()));
  for (int i = 0; i < a.size(); i++) y[std::size_t(i)] = value(a[i]);
  return y;
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Array<T> y;
  Array<Wide<T>> mean, inv_std, running_mean, running_var;

  explicit Forward(const Shape& s)
      : y(s.size()), mean(s.C), inv_std(s.C), running_mean(s.C, 0.25), running_var(s.C, 2) {
    fill_nan(y);
    fill_nan(mean);
    fill_nan(inv_std);
  }
};

template <class T>
void forward(const Kernels<T>& k, Inputs<T>& in, bool residual, bool relu) {
  const int M = in.s.M, C = in.s.C;
  Doubles mean(std::size_t(C), 0.0), var(mean), inv_std(mean), running_mean(mean), running_var(mean);
  const Doubles x = doubles(in.x);
  for (std::size_t i = 0; i < x.size(); i++) mean[i % mean.size()] += x[i] / M;
  for (std::size_t i = 0; i < x.size(); i++) var[i % mean.size()] += std::pow(x[i] - mean[i % mean.size()], 2) / M;
  for (std::size_t c = 0; c < mean.size(); c++) {
    inv_std[c] = 1 / std::sqrt(var[c] + EPS);
    running_mean[c] = 0.9 * 0.25 + 0.1 * mean[c];
    running_var[c] = 0.9 * 2 + 0.1 * var[c] * (M > 1 ? M / (M - 1.0) : 1);
  }
  const Doubles y = normalised(x, mean, inv_std, doubles(in.gamma), doubles(in.beta),
                               residual ? doubles(in.residual) : Doubles(), relu);

  Forward<T> got(in.s), again(in.s);
  twice(got, again, [&](Forward<T>& out) {
    k.batch_norm_forward(out.y.data(), out.mean.data(), out.inv_std.data(), out.running_mean.data(),
                         out.running_var.data(), in.x.data(), in.gamma.data(), in.beta.data(),
                         residual ? in.residual.data() : nullptr, relu, MOMENTUM, EPS, M, C);
  });
  CHECK(close(got.y, y, ulps<T>(64)));
  CHECK(close(got.mean, mean, 8));
  CHECK(close(got.inv_std, inv_std, 16));
  CHECK(close(got.running_mean, running_mean, 8));
  CHECK(close(got.running_var, running_var, 8));
  CHECK(same_bits(got.y, again.y) && same_bits(got.mean, again.mean) && same_bits(got.inv_std, again.inv_std));
  CHECK(same_bits(got.running_mean, again.running_mean) && same_bits(got.running_var, again.running_var));
}

template <class T>
void inference(const Kernels<T>& k, Inputs<T>& in, bool residual, bool relu) {
  const Doubles y = normalised(doubles(in.x), doubles(in.mean), doubles(in.inv_std), doubles(in.gamma),
                               doubles(in.beta), residual ? doubles(in.residual) : Doubles(), relu);
  Array<T> got(in.s.size()), again(in.s.size());
  fill_nan(got);
  fill_nan(again);
  twice(got, again, [&](Array<T>& out) {
    k.batch_norm_inference(out.data(), in.x.data(), in.gamma.data(), in.beta.data(), in.mean.data(), in.var.data(),
                           residual ? in.residual.data() : nullptr, relu, EPS, in.s.M, in.s.C);
  });
  CHECK(close(got, y, ulps<T>(16)));
  CHECK(same_bits(got, again));
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Array<T> dx, dresidual;
  Array<Wide<T>> dgamma, dbeta;

  explicit Backward(const Shape& s) : dx(s.size()), dresidual(s.size()), dgamma(s.C), dbeta(s.C) {
    fill_nan(dx);
    fill_nan(dresidual);
    fill_nan(dgamma);
    fill_nan(dbeta);
  }
};

template <class T>
void backward(const Kernels<T>& k, Inputs<T>& in, bool masked, bool residual, bool training, bool from_x = false) {
  const int M = in.s.M, C = in.s.C;
  const Doubles x = doubles(in.x), y = doubles(in.y), gamma = doubles(in.gamma), beta = doubles(in.beta),
                mean = doubles(in.mean), s = doubles(in.inv_std);
  Doubles g = doubles(in.dy), dx(x), dgamma(std::size_t(C), 0.0), dbeta(dgamma);
  for (std::size_t i = 0; i < x.size(); i++) {
    const std::size_t c = i % mean.size();
    if (masked && y[i] <= 0) g[i] = 0;
    if (from_x && gamma[c] * (x[i] - mean[c]) * s[c] + beta[c] <= 0) g[i] = 0;
    dbeta[c] += g[i];
    dgamma[c] += g[i] * (x[i] - mean[c]) * s[c];
  }
  for (std::size_t i = 0; i < x.size(); i++) {
    const std::size_t c = i % mean.size();
    dx[i] = gamma[c] * s[c] * (g[i] - (training ? dbeta[c] / M + (x[i] - mean[c]) * s[c] * dgamma[c] / M : 0));
  }

  Backward<T> got(in.s), again(in.s);
  twice(got, again, [&](Backward<T>& out) {
    if (training)
      k.batch_norm_backward(out.dx.data(), residual ? out.dresidual.data() : nullptr, out.dgamma.data(),
                            out.dbeta.data(), in.dy.data(), in.x.data(), masked ? in.y.data() : nullptr,
                            in.gamma.data(), from_x ? in.beta.data() : nullptr, in.mean.data(), in.inv_std.data(), M,
                            C);
    else
      k.batch_norm_inference_backward(out.dx.data(), out.dgamma.data(), out.dbeta.data(), in.dy.data(), in.x.data(),
                                      in.gamma.data(), in.mean.data(), in.var.data(), EPS, M, C);
  });
  CHECK(close(got.dx, dx, ulps<T>(16)));
  if (residual) CHECK(close(got.dresidual, g, 0));
  CHECK(close(got.dgamma, dgamma, 16));
  CHECK(close(got.dbeta, dbeta, 16));
  CHECK(same_bits(got.dx, again.dx) && same_bits(got.dresidual, again.dresidual));
  CHECK(same_bits(got.dgamma, again.dgamma) && same_bits(got.dbeta, again.dbeta));
}

template <class T>
void test_shapes() {
  Kernels<T> k{};
  batch_norm_kernels(k);
  int options = 0;
  for (const Shape& s : SHAPES) {
    Inputs<T> in(s);
    const bool first = options & 1, second = options & 2;
    forward(k, in, first, second);
    inference(k, in, second, first);
    backward(k, in, first, second, true);
    backward(k, in, false, second, true, true);
    backward(k, in, false, false, false);
    options++;
  }
}

// ---- single properties --------------------------------------------------------------------------------------------

// Integers: sums are exact, and so is all that follows from them.
template <class T>
void test_exact() {
  Kernels<T> k{};
  batch_norm_kernels(k);
  const Shape s{520, 16};
  Inputs<T> in(s);
  fill_integers(in.x, 1);
  fill_integers(in.dy, 2);
  for (int c = 0; c < s.C; c++) in.mean[c] = 1, in.inv_std[c] = 0.5;
  Doubles dgamma(16, 0.0), dbeta(16, 0.0);
  for (int i = 0; i < s.size(); i++) {
    dbeta[std::size_t(i % s.C)] += value(in.dy[i]);
    dgamma[std::size_t(i % s.C)] += value(in.dy[i]) * (value(in.x[i]) - 1) / 2;
  }
  Backward<T> out(s);
  k.batch_norm_backward(out.dx.data(), nullptr, out.dgamma.data(), out.dbeta.data(), in.dy.data(), in.x.data(), nullptr,
                        in.gamma.data(), nullptr, in.mean.data(), in.inv_std.data(), s.M, s.C);
  wait();
  CHECK(close(out.dgamma, dgamma, 0));
  CHECK(close(out.dbeta, dbeta, 0));
  for (int i = 0; i < s.size(); i++) CHECK(value(out.dresidual[i]) != value(out.dresidual[i]));  // not given

  // A constant channel, of a number with no short sums: the variance is 0, and y = beta.
  for (int i = 0; i < s.size(); i++) in.x[i] = rounded<T>(1 / 3.0);
  Forward<T> y(s);
  k.batch_norm_forward(y.y.data(), y.mean.data(), y.inv_std.data(), nullptr, nullptr, in.x.data(), in.gamma.data(),
                       in.beta.data(), nullptr, false, MOMENTUM, EPS, s.M, s.C);
  wait();
  for (int i = 0; i < s.size(); i++) CHECK(value(y.y[i]) == value(narrow<T>(in.beta[i % s.C])));
  for (int c = 0; c < s.C; c++) CHECK(y.running_mean[c] == Wide<T>(0.25) && y.running_var[c] == 2);
}

// The variance is not the difference of two large numbers.
template <class T>
void test_mean_far_from_zero() {
  Kernels<T> k{};
  batch_norm_kernels(k);
  const double offset = sizeof(T) == 4 ? 1e4 : 1e8;
  Inputs<T> in({1300, 8});
  for (int i = 0; i < in.s.size(); i++) in.x[i] = rounded<T>(value(in.x[i]) + offset);
  const Doubles x = doubles(in.x);
  Forward<T> got(in.s);
  k.batch_norm_forward(got.y.data(), got.mean.data(), got.inv_std.data(), nullptr, nullptr, in.x.data(),
                       in.gamma.data(), in.beta.data(), nullptr, false, MOMENTUM, EPS, in.s.M, in.s.C);
  wait();
  for (int c = 0; c < in.s.C; c++) {
    double mean = 0, var = 0;
    for (int m = 0; m < in.s.M; m++) mean += (x[std::size_t(m * in.s.C + c)] - offset) / in.s.M;
    for (int m = 0; m < in.s.M; m++) var += std::pow(x[std::size_t(m * in.s.C + c)] - offset - mean, 2) / in.s.M;
    CHECK(std::fabs(got.mean[c] - offset - mean) <= 4 * epsilon<T>() * offset);
    CHECK(std::fabs(1 / double(got.inv_std[c]) / double(got.inv_std[c]) - EPS - var) <=
          4 * epsilon<T>() * offset * var);
  }
}

// NaN in one channel: that channel's results are NaN, through ReLU too, and no other's.
template <class T>
void test_nan() {
  Kernels<T> k{};
  batch_norm_kernels(k);
  for (const Shape& s : {Shape{300, 13}, Shape{600, 16}}) {
    for (const int row : {0, s.M / 2, s.M - 1}) {
      Inputs<T> in(s);
      in.x[row * s.C + 5] = rounded<T>(NAN_VALUE);
      Forward<T> y(s);
      k.batch_norm_forward(y.y.data(), y.mean.data(), y.inv_std.data(), y.running_mean.data(), y.running_var.data(),
                           in.x.data(), in.gamma.data(), in.beta.data(), in.residual.data(), true, MOMENTUM, EPS, s.M,
                           s.C);
      Backward<T> d(s);
      k.batch_norm_backward(d.dx.data(), d.dresidual.data(), d.dgamma.data(), d.dbeta.data(), in.dy.data(), in.x.data(),
                            in.y.data(), in.gamma.data(), nullptr, in.mean.data(), in.inv_std.data(), s.M, s.C);
      wait();
      for (int i = 0; i < s.size(); i++) {
        CHECK(std::isnan(value(y.y[i])) == (i % s.C == 5));
        CHECK(std::isnan(value(d.dx[i])) == (i % s.C == 5));
        CHECK(!std::isnan(value(d.dresidual[i])));
      }
      for (int c = 0; c < s.C; c++) {
        CHECK(std::isnan(y.mean[c]) == (c == 5) && std::isnan(y.inv_std[c]) == (c == 5));
        CHECK(std::isnan(y.running_mean[c]) == (c == 5) && std::isnan(y.running_var[c]) == (c == 5));
        CHECK(std::isnan(d.dgamma[c]) == (c == 5) && !std::isnan(d.dbeta[c]));
      }
    }
  }
}

// Arrays that start between two packs: the same bits.
template <class T>
void test_alignment() {
  Kernels<T> k{};
  batch_norm_kernels(k);
  const Shape s{600, 16};
  Inputs<T> in(s);
  Array<T> x(s.size() + 1), y(s.size() + 1), dx(s.size() + 1);
  for (int i = 0; i < s.size(); i++) x[i + 1] = in.x[i];
  Forward<T> a(s), b(s);
  k.batch_norm_forward(a.y.data(), a.mean.data(), a.inv_std.data(), nullptr, nullptr, in.x.data(), in.gamma.data(),
                       in.beta.data(), in.residual.data(), true, MOMENTUM, EPS, s.M, s.C);
  k.batch_norm_forward(y.data() + 1, b.mean.data(), b.inv_std.data(), nullptr, nullptr, x.data() + 1, in.gamma.data(),
                       in.beta.data(), in.residual.data(), true, MOMENTUM, EPS, s.M, s.C);
  Backward<T> c(s), d(s);
  k.batch_norm_backward(c.dx.data(), c.dresidual.data(), c.dgamma.data(), c.dbeta.data(), in.dy.data(), in.x.data(),
                        in.y.data(), in.gamma.data(), nullptr, in.mean.data(), in.inv_std.data(), s.M, s.C);
  k.batch_norm_backward(dx.data() + 1, d.dresidual.data(), d.dgamma.data(), d.dbeta.data(), in.dy.data(), x.data() + 1,
                        in.y.data(), in.gamma.data(), nullptr, in.mean.data(), in.inv_std.data(), s.M, s.C);
  wait();
  for (int i = 0; i < s.size(); i++) b.y[i] = y[i + 1], d.dx[i] = dx[i + 1];
  CHECK(same_bits(a.y, b.y) && same_bits(a.mean, b.mean) && same_bits(a.inv_std, b.inv_std));
  CHECK(same_bits(c.dx, d.dx) && same_bits(c.dgamma, d.dgamma) && same_bits(c.dbeta, d.dbeta));
}

template <class T>
void test_nothing() {
  Kernels<T> k{};
  batch_norm_kernels(k);
  for (const Shape& s : {Shape{4, 0}, Shape{0, 5}, Shape{0, 16}}) {
    Inputs<T> in(s);
    inference(k, in, true, true);
    backward(k, in, false, false, false);  // the gradients of the parameters are 0
  }
}

template <class T>
void test_all() {
  test_shapes<T>();
  test_exact<T>();
  test_nan<T>();
  test_alignment<T>();
  test_nothing<T>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<bf16>();
  test_mean_far_from_zero<float>();
  test_mean_far_from_zero<double>();
  CHECK(scratch_blocks == 0);
  return report();
}
