// Two residual blocks, the second with stride 2 and option A, through the fused kernels in the order of csrc/README.md:
// every gradient against differences of the loss, which plain formulas give in double.
#include "cuda/block_output.cu"
#include "cuda/conv3x3.cu"
#include "fused_testing.h"

using namespace tinyres;

namespace {

constexpr int N = 2, H = 5, W = 7;

// A convolution and the batch norm behind it, with what the kernels keep of both.
struct Unit {
  int H, W, C, K, stride;
  Array<double> w, gamma, beta, y, mean, inv_std, rows, dz, dgamma, dbeta, dw;

  Unit(int H, int W, int C, int K, int stride, unsigned seed, const Kernels<double>& k)
      : H(H),
        W(W),
        C(C),
        K(K),
        stride(stride),
        w(9 * C * K),
        gamma(K),
        beta(K),
        y(size()),
        mean(K),
        inv_std(K),
        rows(int(k.conv3x3_rows(window(), false)) * (2 * K + 1)),
        dz(size()),
        dgamma(K),
        dbeta(K),
        dw(9 * C * K) {
    fill_uniform(w, seed);
    fill_uniform(gamma, seed + 1);
    fill_uniform(beta, seed + 2);
    for (int c = 0; c < K; c++) gamma[c] += gamma[c] < 0 ? -0.5 : 0.5;
    fill_nan(dw);
  }
  int P() const { return (H - 1) / stride + 1; }
  int Q() const { return (W - 1) / stride + 1; }
  int size() const { return N * P() * Q() * K; }
  Window window() const { return {N, H, W, C, K, 3, 3, P(), Q(), stride, stride, 1, 1}; }

  // As its first reader is told, and as later ones are.
  BatchNorm<double> fresh() {
    return {gamma.data(), beta.data(), rows.data(), rows.size() / (2 * K + 1), mean.data(), inv_std.data(), nullptr,
            nullptr,      MOMENTUM,    EPS};
  }
  BatchNorm<double> known() {
    BatchNorm<double> bn = fresh();
    bn.row_count = 0;
    return bn;
  }
  BatchNormGradient<double> gradient(Array<double>* sums) {
    return {y.data(),
            gamma.data(),
            mean.data(),
            inv_std.data(),
            sums ? sums->data() : nullptr,
            sums ? sums->size() / (2 * K) : 0,
            dgamma.data(),
            dbeta.data()};
  }

  // relu(batch norm of the convolution of x + shortcut), plainly.
  Doubles plain(const Doubles& x, const Doubles& shortcut) {
    Doubles out(std::size_t(size()), 0.0);
    for (int i = 0; i < size(); i++) {
      const int j = i % K, q = i / K % Q(), p = i / K / Q() % P(), n = i / K / Q() / P();
      for (int tap = 0; tap < 9; tap++) {
        const int h = p * stride + tap / 3 - 1, v = q * stride + tap % 3 - 1;
        if (h < 0 || h >= H || v < 0 || v >= W) continue;
        for (int c = 0; c < C; c++)
          out[std::size_t(i)] += x[std::size_t(((n * H + h) * W + v) * C + c)] * w[(tap * C + c) * K + j];
      }
    }
    const int M = size() / K;
    for (int j = 0; j < K; j++) {
      double average = 0, var = 0;
      for (int i = j; i < size(); i += K) average += out[std::size_t(i)] / M;
      for (int i = j; i < size(); i += K) var += std::pow(out[std::size_t(i)] - average, 2) / M;
      for (int i = j; i < size(); i += K)
        out[std::size_t(i)] = gamma[j] * (out[std::size_t(i)] - average) / std::sqrt(var + EPS) + beta[j];
    }
    for (std::size_t i = 0; i < out.size(); i++) out[i] = std::fmax(0, out[i] + (shortcut.empty() ? 0 : shortcut[i]));
    return out;
  }
};

void test_blocks() {
  Kernels<double> k{};
  conv3x3_kernels(k);
  block_output_kernels(k);
  Unit a1(H, W, 16, 16, 1, 10, k), a2(H, W, 16, 16, 1, 20, k), b1(H, W, 16, 32, 2, 30, k);
  Unit b2(b1.P(), b1.Q(), 32, 32, 1, 40, k);
  Array<double> x(a1.size()), a(a2.size()), b(b2.size()), weights(b2.size()), dx(x.size());
  fill_uniform(x, 1);
  fill_uniform(weights, 2);
  const Shortcut<double> identity{x.data(), H, W, 16, 1, 0}, option_a{a.data(), H, W, 16, 2, 8};

  const auto loss = [&] {
    const Doubles in = doubles(x), out_a = a2.plain(a1.plain(in, {}), in);
    Doubles round(std::size_t(b2.size()));
    for (int i = 0; i < b2.size(); i++) {
      const int c = i % 32 - 8, q = i / 32 % b2.Q(), p = i / 32 / b2.Q() % b2.P(), n = i / 32 / b2.Q() / b2.P();
      if (c >= 0 && c < 16) round[std::size_t(i)] = out_a[std::size_t(((n * H + 2 * p) * W + 2 * q) * 16 + c)];
    }
    const Doubles out = b2.plain(b1.plain(out_a, {}), round);
    double sum = 0;
    for (int i = 0; i < b2.size(); i++) sum += out[std::size_t(i)] * weights[i];
    return sum;
  };

  // Forward: three launches a block.
  k.conv3x3_forward(a1.y.data(), a1.rows.data(), x.data(), a1.w.data(), BatchNorm<double>{}, a1.window());
  k.conv3x3_forward(a2.y.data(), a2.rows.data(), a1.y.data(), a2.w.data(), a1.fresh(), a2.window());
  k.block_output(a.data(), a2.y.data(), a2.fresh(), identity, BatchNorm<double>{}, N, H, W, 16);
  k.conv3x3_forward(b1.y.data(), b1.rows.data(), a.data(), b1.w.data(), BatchNorm<double>{}, b1.window());
  k.conv3x3_forward(b2.y.data(), b2.rows.data(), b1.y.data(), b2.w.data(), b1.fresh(), b2.window());
  k.block_output(b.data(), b2.y.data(), b2.fresh(), option_a, BatchNorm<double>{}, N, b2.P(), b2.Q(), 32);
  wait();
  double sum = 0;
  for (int i = 0; i < b.size(); i++) sum += b[i] * weights[i];
  CHECK(std::fabs(sum - loss()) < 1e-9);

  // Backward: four launches a block, beside the sums of slabs.
  const auto sums_of = [&](Unit& behind) {  // what backward_input through `behind` leaves
    return int(k.conv3x3_rows(behind.window(), true)) * 2 * behind.C;
  };
  const auto through_relu = [](Unit& before, Array<double>& rows) {
    return InputGradient<double>{
        Shortcut<double>{},    nullptr,    before.y.data(), before.gamma.data(), before.beta.data(), before.mean.data(),
        before.inv_std.data(), rows.data()};
  };
  Array<double> b2_sums(int(k.block_output_rows(b2.size() / 32, 32)) * 2 * 32), b1_sums(sums_of(b2));
  Array<double> a2_sums(sums_of(b1)), a1_sums(sums_of(a2));
  k.block_output_backward(b2.dz.data(), b2_sums.data(), weights.data(), b.data(), b2.y.data(), b2.mean.data(),
                          b2.size() / 32, 32);
  k.conv3x3_backward_input(b1.dz.data(), b2.dz.data(), b2.w.data(), b2.gradient(&b2_sums), through_relu(b1, b1_sums),
                           b2.window());
  k.conv3x3_backward_weight(b2.dw.data(), nullptr, b2.dz.data(), b1.y.data(), b2.gradient(nullptr), b1.known(),
                            b2.window());
  InputGradient<double> to_a{};
  to_a.shortcut = {b2.dz.data(), b2.P(), b2.Q(), 32, 2, 8};
  to_a.output = a.data(), to_a.y = a2.y.data(), to_a.mean = a2.mean.data(), to_a.rows = a2_sums.data();
  k.conv3x3_backward_input(a2.dz.data(), b1.dz.data(), b1.w.data(), b1.gradient(&b1_sums), to_a, b1.window());
  k.conv3x3_backward_weight(b1.dw.data(), nullptr, b1.dz.data(), a.data(), b1.gradient(nullptr), BatchNorm<double>{},
                            b1.window());
  k.conv3x3_backward_input(a1.dz.data(), a2.dz.data(), a2.w.data(), a2.gradient(&a2_sums), through_relu(a1, a1_sums),
                           a2.window());
  k.conv3x3_backward_weight(a2.dw.data(), nullptr, a2.dz.data(), a1.y.data(), a2.gradient(nullptr), a1.known(),
                            a2.window());
  InputGradient<double> to_x{};
  to_x.shortcut = {a2.dz.data(), H, W, 16, 1, 0};
  k.conv3x3_backward_input(dx.data(), a1.dz.data(), a1.w.data(), a1.gradient(&a1_sums), to_x, a1.window());
  k.conv3x3_backward_weight(a1.dw.data(), nullptr, a1.dz.data(), x.data(), a1.gradient(nullptr), BatchNorm<double>{},
                            a1.window());
  wait();

  const auto check = [&](Array<double>& parameter, Array<double>& gradient) {
    for (int i = 3; i < parameter.size(); i += 1 + parameter.size() / 7) {
      constexpr double STEP = 1e-6;
      const double kept = parameter[i];
      parameter[i] = kept + STEP;
      const double above = loss();
      parameter[i] = kept - STEP;
      const double difference = (above - loss()) / (2 * STEP);
      parameter[i] = kept;
      CHECK(std::fabs(difference - gradient[i]) < 1e-6 * (1 + std::fabs(difference)));
    }
  };
  check(x, dx);
  for (Unit* unit : {&a1, &a2, &b1, &b2}) {
    check(unit->w, unit->dw);
    check(unit->gamma, unit->dgamma);
    check(unit->beta, unit->dbeta);
  }
}

}  // namespace

int main() {
  test_blocks();
  CHECK(scratch_blocks == 0);
  return report();
}
