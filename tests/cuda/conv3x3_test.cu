// The fused 3x3 convolutions against the plain formulas of convolution, batch norm, ReLU and shortcut, in double.
#include "cuda/conv3x3.cu"
#include "fused_testing.h"

using namespace tinyres;

namespace {

struct Case {
  int N, H, W, C, K, stride;
  int P() const { return (H - 1) / stride + 1; }
  int Q() const { return (W - 1) / stride + 1; }
  int x() const { return N * H * W * C; }
  int y() const { return N * P() * Q() * K; }
  int w() const { return 9 * C * K; }
  int pixels() const { return N * P() * Q(); }
  Window window() const { return {N, H, W, C, K, 3, 3, P(), Q(), stride, stride, 1, 1}; }
};

// Images of one pixel, of odd sizes, wider than a tile, several to a tile; each number of channels on each side. Of the
// slower types the first few will do.
const Case SMALL[] = {{1, 1, 1, 16, 16, 1},  {2, 5, 7, 16, 32, 2},   {2, 6, 5, 32, 64, 2}, {3, 4, 8, 64, 64, 1},
                      {1, 9, 33, 32, 32, 1}, {1, 13, 11, 64, 32, 1}, {5, 7, 3, 32, 16, 2}, {2, 4, 4, 16, 64, 1},
                      {1, 3, 40, 64, 16, 2}, {3, 1, 9, 16, 16, 2}};
template <class T>
constexpr int CASES = sizeof(T) == 2   ? 10
                      : sizeof(T) == 4 ? 5
                                       : 3;
// Tiles of full size, of few pixels each; several tiles to a block, and not as many for each; one to a block.
const Case LARGE[] = {{1, 1100, 3, 64, 64, 1}, {1, 2200, 3, 16, 32, 1}};

// ---- the formulas -------------------------------------------------------------------------------------------------

// Calls body(index of x, index of w without channels, index of y, ditto) for each pair that meets.
template <class Body>
void for_pairs(const Case& s, const Body& body) {
  for (int n = 0; n < s.N; n++)
    for (int p = 0; p < s.P(); p++)
      for (int q = 0; q < s.Q(); q++)
        for (int tap = 0; tap < 9; tap++) {
          const int h = p * s.stride + tap / 3 - 1, v = q * s.stride + tap % 3 - 1;
          if (h < 0 || h >= s.H || v < 0 || v >= s.W) continue;
          body((n * s.H + h) * s.W + v, tap, (n * s.P() + p) * s.Q() + q);
        }
}

Doubles convolution(const Case& s, const Doubles& x, const Doubles& w) {
  Doubles y(std::size_t(s.y()));
  for_pairs(s, [&](int from, int tap, int to) {
    for (int c = 0; c < s.C; c++)
      for (int k = 0; k < s.K; k++)
        y[std::size_t(to * s.K + k)] += x[std::size_t(from * s.C + c)] * w[std::size_t((tap * s.C + c) * s.K + k)];
  });
  return y;
}

Doubles convolution_backward_input(const Case& s, const Doubles& dy, const Doubles& w) {
  Doubles dx(std::size_t(s.x()));
  for_pairs(s, [&](int to, int tap, int from) {
    for (int c = 0; c < s.C; c++)
      for (int k = 0; k < s.K; k++)
        dx[std::size_t(to * s.C + c)] += dy[std::size_t(from * s.K + k)] * w[std::size_t((tap * s.C + c) * s.K + k)];
  });
  return dx;
}

template <class T>
Doubles as_stored(const Doubles& x) {
  Doubles y(x.size());
  for (std::size_t i = 0; i < x.size(); i++) y[i] = value(rounded<T>(x[i]));
  return y;
}

// Steps of T, at the size of the largest element, for sums of products whose factors were rounded to bf16 or tf32.
template <class T>
constexpr double bound() {
  return sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 8192 : 256;
}
// And for what is summed over the tensor.
template <class T>
constexpr double sum_bound() {
  return sizeof(T) == 2 ? 0x1p16 : sizeof(T) == 4 ? 8192 : 1024;
}

// ---- forward ------------------------------------------------------------------------------------------------------

// The mean and variance that rows of statistics stand for.
template <class W>
void check_statistics(Array<W>& rows, i64 count, int C, const Doubles& y, double ulps) {
  const i64 M = i64(y.size()) / C;
  double counted = 0;
  for (i64 row = 0; row < count; row++) counted += double(rows[int(2 * count * C + row)]);
  CHECK(counted == double(M));
  Array<W> mean(C), deviation(C);
  Doubles want_mean(std::size_t(C), 0.0), want_deviation(want_mean);
  for (int c = 0; c < C; c++) {
    double sum = 0, squares = 0;
    for (i64 row = 0; row < count; row++)
      sum += double(rows[int(2 * count * C + row)]) * double(rows[int(2 * row * C + c)]);
    for (i64 row = 0; row < count; row++)
      squares +=
          double(rows[int((2 * row + 1) * C + c)]) +
          double(rows[int(2 * count * C + row)]) * std::pow(double(rows[int(2 * row * C + c)]) - sum / double(M), 2);
    mean[c] = W(sum / double(M));
    deviation[c] = W(std::sqrt(squares / double(M)));
    for (i64 i = 0; i < M; i++) want_mean[std::size_t(c)] += y[std::size_t(i * C + c)] / double(M);
    for (i64 i = 0; i < M; i++)
      want_deviation[std::size_t(c)] += std::pow(y[std::size_t(i * C + c)] - want_mean[std::size_t(c)], 2) / double(M);
    want_deviation[std::size_t(c)] = std::sqrt(want_deviation[std::size_t(c)]);
  }
  CHECK(close(mean, want_mean, ulps));
  CHECK(close(deviation, want_deviation, ulps));
}

template <class T>
void test_forward(const Kernels<T>& k, const Case& s, bool normalised, bool exact) {
  using W = Wide<T>;
  Array<T> x(s.x()), w(s.w()), y(s.y()), again(s.y());
  fill_inputs(x, 1, exact);
  fill_inputs(w, 2, exact);
  Parameters<W> bn(s.C, exact);
  const i64 count = k.conv3x3_rows(s.window(), false);
  Array<W> rows(int(count) * (2 * s.K + 1)), rows_again(int(count) * (2 * s.K + 1));
  fill_nan(y), fill_nan(rows);
  const BatchNorm<T> before = normalised ? bn.template known<T>() : BatchNorm<T>{};
  const Doubles u = normalised ? activation(doubles(x), bn.gamma, bn.beta, bn.mean, bn.inv_std) : doubles(x);
  const Doubles want = convolution(s, u, doubles(w));
  k.conv3x3_forward(y.data(), rows.data(), x.data(), w.data(), before, s.window());
  wait();
  if (exact) {
    CHECK(close(y, as_stored<T>(want), 0));
    check_statistics(rows, count, s.K, want, 64);
  } else {
    CHECK(close(y, want, bound<T>()));
    check_statistics(rows, count, s.K, want, sum_bound<T>());
    in_another_order(
        [&] { k.conv3x3_forward(again.data(), rows_again.data(), x.data(), w.data(), before, s.window()); });
    CHECK(same_bits(y, again) && same_bits(rows, rows_again));
    k.conv3x3_forward(again.data(), nullptr, x.data(), w.data(), before, s.window());
    wait();
    CHECK(same_bits(y, again));
  }
}

// Two convolutions with a batch norm between them: what the second finds in the first one's rows.
template <class T>
void test_statistics(const Kernels<T>& k, const Case& s, float shift) {
  using W = Wide<T>;
  const Case next{s.N, s.P(), s.Q(), s.K, 16, 1};
  Array<T> x(s.x()), w(s.w()), y(s.y()), w2(next.w()), z(next.y()), z2(next.y());
  fill_uniform(x, 1);
  fill_uniform(w, 2);
  for (int i = 0; i < x.size(); i++) x[i] = rounded<T>(value(x[i]) + shift);
  fill_uniform(w2, 3);
  const i64 count = k.conv3x3_rows(s.window(), false);
  Array<W> rows(int(count) * (2 * s.K + 1)), running_mean(s.K, W(0.25)), running_var(s.K, W(2));
  Parameters<W> bn(s.K, false);
  fill_nan(bn.mean), fill_nan(bn.inv_std), fill_nan(z);
  k.conv3x3_forward(y.data(), rows.data(), x.data(), w.data(), BatchNorm<T>{}, s.window());
  BatchNorm<T> before = bn.template known<T>();
  before.rows = rows.data(), before.row_count = count;
  before.running_mean = running_mean.data(), before.running_var = running_var.data();
  k.conv3x3_forward(z.data(), nullptr, y.data(), w2.data(), before, next.window());
  wait();

  const Doubles raw = convolution(s, doubles(x), doubles(w));
  const int M = s.pixels();
  Doubles mean(std::size_t(s.K), 0.0), inv_std(mean), running(mean), running2(mean);
  for (std::size_t c = 0; c < mean.size(); c++) {
    double var = 0;
    for (std::size_t i = c; i < raw.size(); i += mean.size()) mean[c] += raw[i] / M;
    for (std::size_t i = c; i < raw.size(); i += mean.size()) var += std::pow(raw[i] - mean[c], 2) / M;
    inv_std[c] = 1 / std::sqrt(var + EPS);
    running[c] = 0.9 * 0.25 + 0.1 * mean[c];
    running2[c] = 0.9 * 2 + 0.1 * var * (M > 1 ? M / (M - 1.0) : 1);
  }
  CHECK(close(bn.mean, mean, sum_bound<T>()) && close(bn.inv_std, inv_std, sum_bound<T>()));
  CHECK(close(running_mean, running, sum_bound<T>()) && close(running_var, running2, sum_bound<T>()));
  // With the statistics that were kept, the same bits: so does backward find the mask of forward.
  k.conv3x3_forward(z2.data(), nullptr, y.data(), w2.data(), bn.template known<T>(), next.window());
  wait();
  CHECK(same_bits(z, z2));
  const Doubles u = activation(doubles(y), bn.gamma, bn.beta, bn.mean, bn.inv_std);
  CHECK(close(z, convolution(next, u, doubles(w2)), bound<T>()));
}

// ---- backward of the input ----------------------------------------------------------------------------------------

// dy = gamma inv_std (dz - dbeta / M - (y - mean) inv_std dgamma / M)
template <class T>
struct Gradient {
  using W = Wide<T>;
  Parameters<W> bn;
  Array<T> y;
  Array<W> dgamma, dbeta;

  Gradient(int size, int C, bool exact) : bn(C, exact), y(size), dgamma(C), dbeta(C) {
    fill_inputs(y, 11, exact);
    for (int c = 0; c < C; c++) {
      dgamma[c] = W(size / C) * W(exact ? c % 3 - 1 : 0.1 * (c % 5) - 0.2);
      dbeta[c] = W(size / C) * W(exact ? c % 2 : 0.1 * (c % 3) - 0.1);
    }
  }
  BatchNormGradient<T> known() {
    return {y.data(), bn.gamma.data(), bn.mean.data(), bn.inv_std.data(), nullptr, 0, dgamma.data(), dbeta.data()};
  }
  Doubles dy(Array<T>& dz) {
    Doubles out(std::size_t(y.size()));
    const int C = dgamma.size(), M = y.size() / C;
    for (int i = 0; i < y.size(); i++) {
      const int c = i % C;
      const double r = double(bn.inv_std[c]);
      out[std::size_t(i)] =
          double(bn.gamma[c]) * r *
          (value(dz[i]) - double(dbeta[c]) / M - (value(y[i]) - double(bn.mean[c])) * r * double(dgamma[c]) / M);
    }
    return out;
  }
};

enum class Mask { none, output, batch_norm };

template <class T>
void test_backward_input(const Kernels<T>& k, const Case& s, Mask mask, bool option_a, bool exact) {
  using W = Wide<T>;
  Array<T> dz(s.y()), w(s.w()), dx(s.x()), again(s.x()), output(s.x()), y(s.x());
  fill_inputs(dz, 1, exact);
  fill_inputs(w, 2, exact);
  fill_integers(output, 3);
  fill_inputs(y, 4, exact);
  Gradient<T> gradient(s.y(), s.K, exact);
  Parameters<W> before(s.C, exact);
  const int stride = option_a ? 2 : 1, new_channels = option_a ? 16 : 0, wider = s.C + 2 * new_channels;
  const int rows_round = (s.H - 1) / stride + 1, columns_round = (s.W - 1) / stride + 1;
  Array<T> round(s.N * rows_round * columns_round * wider);
  fill_inputs(round, 5, exact);
  const i64 count = k.conv3x3_rows(s.window(), true);
  Array<W> rows(int(count) * 2 * s.C), rows_again(int(count) * 2 * s.C);
  fill_nan(dx), fill_nan(rows);
  InputGradient<T> input{};
  const bool transforms = mask != Mask::none;
  if (transforms) {
    input.shortcut = {round.data(), rows_round, columns_round, wider, stride, new_channels};
    input.y = y.data(), input.mean = before.mean.data(), input.rows = rows.data();
    if (mask == Mask::output) input.output = output.data();
    if (mask == Mask::batch_norm)
      input.gamma = before.gamma.data(), input.beta = before.beta.data(), input.inv_std = before.inv_std.data();
  }
  const BatchNormGradient<T> known = transforms ? gradient.known() : BatchNormGradient<T>{};
  k.conv3x3_backward_input(dx.data(), dz.data(), w.data(), known, input, s.window());
  wait();

  Doubles want = convolution_backward_input(s, transforms ? gradient.dy(dz) : doubles(dz), doubles(w));
  const Doubles before_relu = activation(doubles(y), before.gamma, before.beta, before.mean, before.inv_std);
  for (int i = 0; i < s.x() && transforms; i++) {
    const int c = i % s.C, v = i / s.C % s.W, h = i / s.C / s.W % s.H, n = i / s.C / s.W / s.H;
    if (h % stride == 0 && v % stride == 0)
      want[std::size_t(i)] +=
          value(round[((n * rows_round + h / stride) * columns_round + v / stride) * wider + new_channels + c]);
    const bool passes = mask == Mask::output ? value(output[i]) > 0 : before_relu[std::size_t(i)] > 0;
    if (!passes) want[std::size_t(i)] = 0;
  }
  exact ? CHECK(close(dx, as_stored<T>(want), 0)) : CHECK(close(dx, want, bound<T>()));
  if (!transforms) return;

  // The sums of what was stored.
  Array<W> sums(2 * s.C);
  Doubles want_sums(std::size_t(2 * s.C));
  for (int c = 0; c < s.C; c++) {
    for (int i = c; i < s.x(); i += s.C) {
      want_sums[std::size_t(c)] += value(dx[i]);
      want_sums[std::size_t(s.C + c)] += value(dx[i]) * (value(y[i]) - double(before.mean[c]));
    }
    double g = 0, gx = 0;
    for (i64 row = 0; row < count; row++) {
      g += double(rows[int(2 * row * s.C + c)]);
      gx += double(rows[int((2 * row + 1) * s.C + c)]);
    }
    sums[c] = W(g), sums[s.C + c] = W(gx);
  }
  CHECK(close(sums, want_sums, 64));
  if (exact) return;
  in_another_order([&] {
    input.rows = rows_again.data();
    k.conv3x3_backward_input(again.data(), dz.data(), w.data(), known, input, s.window());
  });
  CHECK(same_bits(dx, again) && same_bits(rows, rows_again));
}

// dgamma and dbeta from rows of sums, and with them the same dx as when they are known.
template <class T>
void test_gradient_rows(const Kernels<T>& k, const Case& s) {
  using W = Wide<T>;
  constexpr int ROWS = 11;
  Array<T> dz(s.y()), w(s.w()), dx(s.x()), again(s.x());
  fill_uniform(dz, 1);
  fill_uniform(w, 2);
  Gradient<T> gradient(s.y(), s.K, false);
  Array<W> rows(ROWS * 2 * s.K);
  fill_uniform(rows, 6);
  Doubles dgamma(std::size_t(s.K), 0.0), dbeta(dgamma);
  for (int row = 0; row < ROWS; row++)
    for (int c = 0; c < s.K; c++) {
      dbeta[std::size_t(c)] += double(rows[2 * row * s.K + c]);
      dgamma[std::size_t(c)] += double(rows[(2 * row + 1) * s.K + c]) * double(gradient.bn.inv_std[c]);
    }
  fill_nan(gradient.dgamma), fill_nan(gradient.dbeta);
  BatchNormGradient<T> unknown = gradient.known();
  unknown.rows = rows.data(), unknown.row_count = ROWS;
  k.conv3x3_backward_input(dx.data(), dz.data(), w.data(), unknown, InputGradient<T>{}, s.window());
  wait();
  CHECK(close(gradient.dgamma, dgamma, 16) && close(gradient.dbeta, dbeta, 16));
  k.conv3x3_backward_input(again.data(), dz.data(), w.data(), gradient.known(), InputGradient<T>{}, s.window());
  wait();
  CHECK(same_bits(dx, again));
  CHECK(close(dx, convolution_backward_input(s, gradient.dy(dz), doubles(w)), bound<T>()));
}

// ---- weight gradient ----------------------------------------------------------------------------------------------

template <class T>
void test_backward_weight(const Kernels<T>& k, const Case& s, bool transforms, bool exact) {
  using W = Wide<T>;
  Array<T> dz(s.y()), x(s.x());
  Array<W> dw(s.w()), again(s.w());
  fill_inputs(dz, 1, exact);
  fill_inputs(x, 2, exact);
  Gradient<T> gradient(s.y(), s.K, exact);
  Parameters<W> bn(s.C, exact);
  fill_nan(dw);
  const BatchNormGradient<T> known = transforms ? gradient.known() : BatchNormGradient<T>{};
  const BatchNorm<T> before = transforms ? bn.template known<T>() : BatchNorm<T>{};
  k.conv3x3_backward_weight(dw.data(), nullptr, dz.data(), x.data(), known, before, s.window());
  wait();
  const Doubles u = transforms ? activation(doubles(x), bn.gamma, bn.beta, bn.mean, bn.inv_std) : doubles(x);
  const Doubles dy = transforms ? gradient.dy(dz) : doubles(dz);
  Doubles want(std::size_t(s.w()));
  for_pairs(s, [&](int from, int tap, int to) {
    for (int c = 0; c < s.C; c++)
      for (int j = 0; j < s.K; j++)
        want[std::size_t((tap * s.C + c) * s.K + j)] += u[std::size_t(from * s.C + c)] * dy[std::size_t(to * s.K + j)];
  });
  CHECK(close(dw, want, exact ? 0 : sum_bound<T>()));
  if (exact) {  // in parts, which whoever updates the weights adds
    const int count = int(k.conv3x3_slabs(s.window()));
    Array<W> slabs(count * s.w());
    fill_nan(slabs), fill_nan(dw);
    k.conv3x3_backward_weight(nullptr, slabs.data(), dz.data(), x.data(), known, before, s.window());
    wait();
    for (int i = 0; i < s.w(); i++) {
      dw[i] = 0;
      for (int slab = 0; slab < count; slab++) dw[i] += slabs[slab * s.w() + i];
    }
    CHECK(close(dw, want, 0));
  }
  if (exact) return;
  in_another_order(
      [&] { k.conv3x3_backward_weight(again.data(), nullptr, dz.data(), x.data(), known, before, s.window()); });
  CHECK(same_bits(dw, again));
}

// ---- NaN and what is refused --------------------------------------------------------------------------------------

// One NaN shows in the nine outputs that it meets and in all statistics, through batch norm and ReLU.
template <class T>
void test_nan(const Kernels<T>& k) {
  const Case s{2, 5, 6, 16, 16, 1};
  Array<T> x(s.x()), w(s.w()), y(s.y());
  fill_uniform(x, 1);
  fill_uniform(w, 2);
  x[((1 * s.H + 2) * s.W + 3) * s.C + 7] = rounded<T>(NAN);
  Parameters<Wide<T>> bn(s.C, false);
  Array<Wide<T>> rows(int(k.conv3x3_rows(s.window(), false)) * (2 * s.K + 1));
  k.conv3x3_forward(y.data(), rows.data(), x.data(), w.data(), bn.template known<T>(), s.window());
  wait();
  for (int i = 0; i < s.y(); i++) {
    const int q = i / s.K % s.Q(), p = i / s.K / s.Q() % s.P(), n = i / s.K / s.Q() / s.P();
    CHECK(std::isnan(value(y[i])) == (n == 1 && std::abs(p - 2) <= 1 && std::abs(q - 3) <= 1));
  }
  bool shown = false;
  for (int row = 0; row < rows.size() / (2 * s.K + 1); row++) shown |= std::isnan(double(rows[2 * row * s.K]));
  CHECK(shown);
}

template <class T>
void test_refused(const Kernels<T>& k) {
  const Case s{1, 4, 4, 16, 16, 1};
  Array<T> x(s.x() + 1), w(s.w()), y(s.y());
  Window other = s.window();
  other.C = 48;
  CHECK(k.conv3x3_rows(other, false) == 0);
  const auto refuses = [&](const T* from, const Window& window) {
    try {
      k.conv3x3_forward(y.data(), nullptr, from, w.data(), BatchNorm<T>{}, window);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  CHECK(refuses(x.data(), other) && refuses(x.data() + 1, s.window()));
}

// ---- as conv2d calls them -------------------------------------------------------------------------------------------

// Without batch norm; dx added to what is there already. Exact but for the rounding of what is stored.
template <class T>
void test_direct(const Case& s) {
  const Window window = s.window();
  Array<T> x(s.x()), w(s.w()), dy(s.y()), y(s.y()), dx(s.x());
  Array<Wide<T>> dw(s.w());
  fill_integers(x, 1), fill_integers(w, 2), fill_integers(dy, 3), fill_integers(dx, 4);
  Doubles want_dx = convolution_backward_input(s, doubles(dy), doubles(w)), want_dw(std::size_t(s.w()));
  for (int i = 0; i < s.x(); i++) want_dx[std::size_t(i)] += value(dx[i]);
  for_pairs(s, [&](int from, int tap, int to) {
    for (int c = 0; c < s.C; c++)
      for (int k = 0; k < s.K; k++)
        want_dw[std::size_t((tap * s.C + c) * s.K + k)] += value(x[from * s.C + c]) * value(dy[to * s.K + k]);
  });
  fill_nan(y), fill_nan(dw);
  direct::forward("test", y.data(), x.data(), w.data(), window);
  direct::backward_input("test", dx.data(), dy.data(), w.data(), window, true);
  direct::backward_weight("test", dw.data(), dy.data(), x.data(), window);
  wait();
  const double ulps = sizeof(T) == 2 ? 0.5 : 0;
  CHECK(close(y, convolution(s, doubles(x), doubles(w)), ulps) && close(dx, want_dx, ulps) && close(dw, want_dw, 0));
}

void test_takes() {
  alignas(16) const char array[32] = {};
  const auto takes = [&](const char* at, auto change) {
    Window s = Case{2, 8, 8, 16, 32, 2}.window();
    change(s);
    return direct::takes(s, {array, at, nullptr});
  };
  CHECK(takes(array, [](Window&) {}));
  CHECK(!takes(array + 8, [](Window&) {}));
  CHECK(!takes(array, [](Window& s) { s.C = 8; }) && !takes(array, [](Window& s) { s.K = 48; }));
  CHECK(!takes(array, [](Window& s) { s.stride_w = 1; }) && !takes(array, [](Window& s) { s.pad_h = 0; }));
  CHECK(!takes(array, [](Window& s) { s.R = 1; }) && !takes(array, [](Window& s) { s.stride_h = s.stride_w = 3; }));
  // More pixels than tiles can be counted for; with a pixel less in the worst case for tiles they can.
  CHECK(!takes(array, [](Window& s) { s.N = 1 << 19; }));
  const Window narrow = {(1 << 25) / 33 - 1, 33, 1, 64, 64, 3, 3, 33, 1, 1, 1, 1, 1};
  CHECK(direct::takes(narrow, {}) && geometry_of(narrow, false, 256).tiles > 0);
}

// ---- all ----------------------------------------------------------------------------------------------------------

template <class T>
void test_all() {
  Kernels<T> k{};
  conv3x3_kernels(k);
  for (int i = 0; i < CASES<T>; i++) {
    const Case& s = SMALL[i];
    const bool exact = i % 3 != 0;  // the others with fractions, twice
    test_forward(k, s, true, exact);
    test_backward_input(k, s, Mask::batch_norm, true, exact);
    test_backward_weight(k, s, true, exact);
    if (i % 2) {
      test_forward(k, s, false, true);
      test_backward_input(k, s, Mask::none, false, true);
      test_backward_weight(k, s, false, true);
    } else {
      test_backward_input(k, s, Mask::output, false, true);
    }
  }
  // As long as all others together: in one order of threads.
  const char* schedule = std::getenv("TINYRES_SCHEDULE");
  if (sizeof(T) == 2 && schedule && std::string(schedule) == "random:1")
    for (const Case& s : LARGE) {
      test_forward(k, s, true, true);
      test_backward_input(k, s, Mask::output, true, true);
      test_backward_weight(k, s, true, true);
    }
  for (const Case& s : {Case{3, 5, 7, 16, 32, 1}, Case{4, 9, 4, 32, 64, 2}, Case{9, 6, 6, 16, 16, 1}}) {
    test_statistics(k, s, 0);
    test_statistics(k, s, 2);  // a mean that is large beside the deviation
    test_gradient_rows(k, s);
  }
  for (const Case& s : {Case{2, 9, 5, 16, 16, 1}, Case{1, 6, 7, 32, 64, 2}}) test_direct<T>(s);
  test_nan(k);
  test_refused(k);
}

}  // namespace

int main() {
  test_takes();
  test_all<bf16>();
  test_all<float>();
  test_all<double>();
  CHECK(scratch_blocks == 0);
  return report();
}
