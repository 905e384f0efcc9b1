// The end of a residual block and the gradient before it, against their formulas in double.
#include "cuda/block_output.cu"
#include "fused_testing.h"

using namespace tinyres;

namespace {

enum class Round { nothing, identity, option_a, projection };

template <class T>
void test_block_output(const Kernels<T>& k, int N, int H, int W_, int C, Round round) {
  using W = Wide<T>;
  const bool a = round == Round::option_a;
  const int M = N * H * W_, from_H = a ? 2 * H - 1 : H, from_W = a ? 2 * W_ : W_, from_C = a ? C / 2 : C;
  const int before = (C - from_C) / 2, stride = a ? 2 : 1;
  Array<T> x(M * C), y(M * C), z(N * from_H * from_W * from_C);
  fill_uniform(x, 1);
  fill_uniform(z, 2);
  fill_nan(y);
  Parameters<W> bn(C, false), of_z(C, true);
  const Shortcut<T> shortcut{round == Round::nothing ? nullptr : z.data(), from_H, from_W, from_C, stride, before};
  k.block_output(y.data(), x.data(), bn.template known<T>(), shortcut,
                 round == Round::projection ? of_z.template known<T>() : BatchNorm<T>{}, N, H, W_, C);
  wait();
  Doubles want(std::size_t(M * C));
  for (int i = 0; i < M * C; i++) {
    const int c = i % C, v = i / C % W_, h = i / C / W_ % H, n = i / C / W_ / H;
    double sum = double(bn.gamma[c]) * (value(x[i]) - double(bn.mean[c])) * double(bn.inv_std[c]) + double(bn.beta[c]);
    if (round != Round::nothing && c >= before && c < before + from_C) {
      double more = value(z[((n * from_H + h * stride) * from_W + v * stride) * from_C + c - before]);
      if (round == Round::projection)
        more = double(of_z.gamma[c]) * (more - double(of_z.mean[c])) * double(of_z.inv_std[c]) + double(of_z.beta[c]);
      sum += more;
    }
    want[std::size_t(i)] = std::fmax(0, sum);
  }
  CHECK(close(y, want, sizeof(T) == 2 ? 1 : 16));

  // Its gradient: mask, and rows of sums.
  Array<T> dy(M * C), dz(M * C);
  fill_uniform(dy, 3);
  fill_nan(dz);
  const i64 count = k.block_output_rows(M, C);
  Array<W> rows(int(count) * 2 * C), sums(2 * C);
  fill_nan(rows);
  k.block_output_backward(dz.data(), rows.data(), dy.data(), y.data(), x.data(), bn.mean.data(), M, C);
  wait();
  Doubles want_dz(std::size_t(M * C)), want_sums(std::size_t(2 * C));
  for (int i = 0; i < M * C; i++) {
    const std::size_t c = std::size_t(i % C);
    want_dz[std::size_t(i)] = value(y[i]) > 0 ? value(dy[i]) : 0;
    want_sums[c] += want_dz[std::size_t(i)];
    want_sums[c + std::size_t(C)] += want_dz[std::size_t(i)] * (value(x[i]) - double(bn.mean[i % C]));
  }
  for (int i = 0; i < 2 * C; i++) {
    double sum = 0;
    for (i64 row = 0; row < count; row++) sum += double(rows[int(row) * 2 * C + i]);
    sums[i] = W(sum);
  }
  CHECK(close(dz, want_dz, 0) && close(sums, want_sums, 64));
}

// Statistics and sums from rows: the same bits in another order of threads, and what the rows stand for.
template <class T>
void test_rows(const Kernels<T>& k, int C, int count) {
  using W = Wide<T>;
  constexpr int M = 40;
  Array<T> x(M * C), y(M * C), again(M * C);
  fill_uniform(x, 1);
  Array<W> rows(count * (2 * C + 1)), running_mean(C, W(0.25)), running_var(C, W(2));
  fill_uniform(rows, 2);
  for (int row = 0; row < count; row++) {
    for (int c = 0; c < C; c++) rows[(2 * row + 1) * C + c] = std::fabs(rows[(2 * row + 1) * C + c]);
    rows[2 * count * C + row] = W((row + 1) % 3 * 4);  // some blocks had nothing to do
  }
  Parameters<W> bn(C, false);
  fill_nan(bn.mean), fill_nan(bn.inv_std);
  BatchNorm<T> unknown = bn.template known<T>();
  unknown.rows = rows.data(), unknown.row_count = count;
  unknown.running_mean = running_mean.data(), unknown.running_var = running_var.data();
  k.block_output(y.data(), x.data(), unknown, Shortcut<T>{}, BatchNorm<T>{}, 1, 1, M, C);
  wait();
  Doubles mean(std::size_t(C), 0.0), inv_std(mean), running(mean), running2(mean);
  for (int c = 0; c < C; c++) {
    double n = 0, sum = 0, m2 = 0;
    const auto weight = [&](int row) { return double(rows[2 * count * C + row]); };
    for (int row = 0; row < count; row++) n += weight(row), sum += weight(row) * double(rows[2 * row * C + c]);
    for (int row = 0; row < count; row++)
      m2 += double(rows[(2 * row + 1) * C + c]) + weight(row) * std::pow(double(rows[2 * row * C + c]) - sum / n, 2);
    mean[std::size_t(c)] = sum / n;
    inv_std[std::size_t(c)] = 1 / std::sqrt(m2 / n + EPS);
    running[std::size_t(c)] = 0.9 * 0.25 + 0.1 * sum / n;
    running2[std::size_t(c)] = 0.9 * 2 + 0.1 * m2 / (n - 1);
  }
  CHECK(close(bn.mean, mean, 16) && close(bn.inv_std, inv_std, 16));
  CHECK(close(running_mean, running, 16) && close(running_var, running2, 16));
  in_another_order([&] { k.block_output(again.data(), x.data(), unknown, Shortcut<T>{}, BatchNorm<T>{}, 1, 1, M, C); });
  CHECK(same_bits(y, again));
  k.block_output(again.data(), x.data(), bn.template known<T>(), Shortcut<T>{}, BatchNorm<T>{}, 1, 1, M, C);
  wait();
  CHECK(same_bits(y, again));
}

template <class T>
void test_all() {
  Kernels<T> k{};
  block_output_kernels(k);
  for (const Round round : {Round::nothing, Round::identity, Round::option_a, Round::projection}) {
    test_block_output(k, 2, 5, 7, 32, round);
    test_block_output(k, 3, 4, 3, 64, round);
  }
  test_block_output(k, 31, 9, 16, 256, Round::identity);  // rows of many pixels
  test_rows(k, 16, 264);
  test_rows(k, 64, 67);
  test_rows(k, 256, 16);
  test_rows(k, 32, 1 + (sizeof(T) == 8));
}

}  // namespace

int main() {
  test_all<bf16>();
  test_all<float>();
  test_all<double>();
  CHECK(scratch_blocks == 0);
  return report();
}
