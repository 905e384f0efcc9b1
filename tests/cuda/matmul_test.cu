// Matrix products of every tile size, with and without K cut into parts, from operands laid out in every way.
#include <limits>

#include "cuda/matmul.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

enum class Layout { dense, transposed, spaced, reversed, repeated, constant };

// A batch of matrices in one of the layouts, within an array that has as many elements as it needs and no more.
template <class T>
struct Operand {
  Operand(Layout layout, i64 batch, i64 rows, i64 columns)
      : data(int(max(size_of(layout, batch, rows, columns), i64(1)))) {
    matrix = rows * columns;
    view = {columns, 1};
    switch (layout) {
      case Layout::dense: break;
      case Layout::transposed: view = {1, rows}; break;
      case Layout::spaced: view = {2 * columns + 1, 2}, matrix = rows * view.row + 5; break;
      case Layout::reversed: view = {-columns, -1}, matrix *= -1, start = data.size() - 1; break;
      case Layout::repeated: matrix = 0; break;
      case Layout::constant: view = {0, 0}, matrix = 1; break;
    }
  }
  static i64 size_of(Layout layout, i64 batch, i64 rows, i64 columns) {
    if (layout == Layout::spaced) return batch * (rows * (2 * columns + 1) + 5);
    if (layout == Layout::constant) return batch;
    return (layout == Layout::repeated ? 1 : batch) * rows * columns;
  }
  T* first() { return data.data() + start; }
  double at(i64 i, i64 row, i64 column) {
    return value(data[int(start + i * matrix + row * view.row + column * view.column)]);
  }

  Array<T> data;
  i64 start = 0, matrix;
  MatrixView view;
};

template <class T>
using Run = void (*)(T* y, const Product<T>& p);

// By way of the table, which chooses the tile.
template <class T>
void chosen(T* y, const Product<T>& p) {
  Kernels<T> k{};
  matmul_kernels(k);
  k.matmul(y, p.a, p.b, p.batch, p.M, p.N, p.K, p.a_batch, p.a_view, p.b_batch, p.b_view);
}

template <class T>
struct Case {
  Case(i64 batch, i64 M, i64 N, i64 K, Layout of_a = Layout::dense, Layout of_b = Layout::dense)
      : a(of_a, batch, M, K), b(of_b, batch, K, N), batch(batch), M(M), N(N), K(K) {
    fill_integers(a.data, unsigned(M + K));
    fill_integers(b.data, unsigned(K + N) + 100);
  }

  std::vector<double> wanted() {
    std::vector<double> y;
    for (i64 i = 0; i < batch; i++)
      for (i64 m = 0; m < M; m++)
        for (i64 n = 0; n < N; n++) {
          double sum = 0;
          for (i64 k = 0; k < K; k++) sum += a.at(i, m, k) * b.at(i, k, n);
          y.push_back(value(rounded<T>(sum)));
        }
    return y;
  }

  // Twice the same bits, within `ulps` of what is wanted; exactly that for integers.
  void check(Run<T> run, double ulps = 0) {
    const Product<T> p{a.first(), b.first(), batch, M, N, K, a.matrix, b.matrix, a.view, b.view};
    Array<T> y(int(batch * M * N)), again(y.size());
    fill_nan(y);
    fill_nan(again);
    run(y.data(), p);
    run(again.data(), p);
    wait();
    const bool right = close(y, wanted(), ulps);
    if (!right) std::printf("in batch %d, M %d, N %d, K %d\n", int(batch), int(M), int(N), int(K));
    CHECK(right);
    CHECK(same_bits(y, again));
  }

  Operand<T> a, b;
  i64 batch, M, N, K;
};

template <class T, int R>
void test_tile() {
  constexpr i64 tile = TILE<R>, step = STEP<R>;
  const Run<T> run = multiply_by_tiles<T, R>;
  for (const i64 M : {i64(1), tile - 1, tile + 1})
    for (const i64 N : {i64(1), tile, tile + 2}) Case<T>(1, M, N, step + 1).check(run);
  for (const i64 K : {i64(0), i64(1), step - 1, step, 2 * step, 3 * step + 1})
    Case<T>(2, 5, 3, K, Layout::transposed).check(run);
  const Layout layouts[] = {Layout::dense,    Layout::transposed, Layout::spaced,
                            Layout::reversed, Layout::repeated,   Layout::constant};
  for (const Layout of_a : layouts)
    for (const Layout of_b : layouts) Case<T>(2, 7, 9, step + 2, of_a, of_b).check(run);
  Case<T>(2, tile + 1, tile + 1, 2 * step + 1, Layout::transposed, Layout::transposed).check(run);
  // K in parts: two, of which the second is shorter; more than add up an element; more than one block of elements.
  Case<T>(1, 3, 2, 257).check(run);
  Case<T>(1, 1, 1, 1300, Layout::dense, Layout::transposed).check(run);
  Case<T>(3, 5, 7, 300, Layout::transposed, Layout::repeated).check(run);
}

template <class T>
void test_fractions() {
  for (const i64 K : {3, 100, 700}) {
    Case<T> c(2, 18, 20, K, Layout::dense, Layout::transposed);
    fill_uniform(c.a.data, 1);
    fill_uniform(c.b.data, 2);
    c.check(multiply_by_tiles<T, 1>, 16);
    c.check(multiply_by_tiles<T, 4>, 16);
    c.check(multiply_by_tiles<T, 8>, 16);
  }
}

// NaN and infinity reach their row or column of y, and the zeros beyond the edges carry them nowhere else.
template <class T>
void test_not_finite() {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  Case<T> c(1, 5, 6, 70);
  c.a.data[0] = rounded<T>(nan);
  c.a.data[4 * 70 + 69] = rounded<T>(inf);
  c.b.data[69 * 6 + 5] = rounded<T>(-inf);
  c.check(multiply_by_tiles<T, 1>);
  c.check(multiply_by_tiles<T, 4>);
  c.check(multiply_by_tiles<T, 8>);
}

template <class T>
void test_choice() {
  Case<T>(1, 128, 10, 64).check(chosen<T>);  // the last layer of a ResNet, and its gradients
  Case<T>(1, 64, 10, 128, Layout::transposed).check(chosen<T>);
  Case<T>(1, 128, 64, 10, Layout::dense, Layout::transposed).check(chosen<T>);
  Case<T>(256, 17, 18, 2).check(chosen<T>);  // enough tiles of 64
  Case<T>(256, 65, 66, 1).check(chosen<T>);  // and of 128
  for (const Product<T>& empty : {Product<T>{nullptr, nullptr, 0, 2, 3, 4, 8, 12, {4, 1}, {3, 1}},
                                  Product<T>{nullptr, nullptr, 2, 0, 3, 4, 0, 12, {4, 1}, {3, 1}}})
    chosen<T>(nullptr, empty);
  T unused{};
  bool thrown = false;
  try {
    chosen<T>(&unused, {&unused, &unused, i64(1) << 31, 1, 1, 1, 0, 0, {1, 1}, {1, 1}});
  } catch (const std::invalid_argument& error) {
    thrown = std::string(error.what()).find("[matmul] y must") == 0;
  }
  CHECK(thrown);
}

template <class T>
void test() {
  test_tile<T, 1>();
  test_tile<T, 4>();
  test_tile<T, 8>();
  test_fractions<T>();
  test_not_finite<T>();
  test_choice<T>();
}

}  // namespace

int main() {
  test<float>();
  test<double>();
  test<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
