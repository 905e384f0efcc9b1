// Reductions against plain loops in double.
#include <limits>

#include "cuda/reduce.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN(),
                 INFINITE = std::numeric_limits<double>::infinity();

struct Shape {
  int outer, n, inner;
  int outputs() const { return outer * inner; }
  int size() const { return outer * n * inner; }
};

const Shape SHAPES[] = {
    {1, 1, 1},  {5, 1, 1},    {3, 2, 1},    {2, 7, 3},   {7, 31, 1},    {300, 3, 1},  {40, 10, 1},   {9, 33, 1},
    {2, 64, 1}, {1, 257, 1},  {2, 1000, 1}, {1, 5, 70},  {3, 9, 33},    {2, 100, 31}, {1, 3, 1000},  {17, 2, 32},
    {1, 17, 2}, {1, 5000, 1}, {2, 4100, 1}, {1, 777, 5}, {1, 1000, 16}, {1, 200, 33}, {20000, 1, 1}, {1, 1, 300},
    {3, 0, 4},  {0, 3, 4},    {3, 4, 0},    {3, 7, 64},  {1, 129, 128}, {2, 160, 40}, {1, 20001, 1}};

// body(output, element) for every element.
template <class Body>
void for_all(const Shape& s, const Body& body) {
  for (int o = 0; o < s.outer; o++)
    for (int k = 0; k < s.n; k++)
      for (int i = 0; i < s.inner; i++) body(std::size_t(o * s.inner + i), (o * s.n + k) * s.inner + i);
}

// Runs twice, the second time in another order of threads, into arrays of NaN, and compares bits.
template <class T, class Run>
void twice(Array<T>& y, const Run& run) {
  Array<T> again(y.size());
  fill_nan(y);
  fill_nan(again);
  run(y);
  const char* schedule = std::getenv("TINYRES_SCHEDULE");
  const std::string before = schedule ? schedule : "forward";
  setenv("TINYRES_SCHEDULE", "random:42", 1);
  run(again);
  setenv("TINYRES_SCHEDULE", before.c_str(), 1);
  wait();
  CHECK(same_bits(y, again));
}

template <class T>
void sum(const Kernels<T>& k, const Shape& s, Array<T>& x, bool exact) {
  std::vector<double> want(std::size_t(s.outputs()), 0.0);
  for_all(s, [&](std::size_t output, int i) { want[output] += value(x[i]); });
  if (exact)
    for (double& w : want) w = value(rounded<T>(w));

  Array<T> y(s.outputs());
  twice(y, [&](Array<T>& y) { k.sum(y.data(), x.data(), s.outer, s.n, s.inner); });
  CHECK(close(y, want, exact ? 0 : 1));
}

template <class T>
void max(const Kernels<T>& k, const Shape& s, Array<T>& x) {
  std::vector<double> want(std::size_t(s.outputs()), -INFINITE), ties(want.size(), 0.0), want_dx(std::size_t(s.size()));
  for_all(s, [&](std::size_t output, int i) {
    const double v = value(x[i]);
    if (v > want[output] || std::isnan(v)) want[output] = v;
    if (std::isnan(want[output])) want[output] = NAN_VALUE;
  });
  Array<T> y(s.outputs()), dy(s.outputs()), dx(s.size());
  twice(y, [&](Array<T>& y) { k.max(y.data(), x.data(), s.outer, s.n, s.inner); });
  CHECK(close(y, want, 0));

  fill_integers(dy, 3);
  for_all(s, [&](std::size_t output, int i) { ties[output] += value(x[i]) == want[output]; });
  for_all(s, [&](std::size_t output, int i) {
    const Wide<T> share = wide(dy[int(output)]) * Wide<T>(value(x[i]) == want[output]) / Wide<T>(ties[output]);
    want_dx[std::size_t(i)] = value(rounded<T>(double(share)));
  });
  twice(dx, [&](Array<T>& dx) { k.max_backward(dx.data(), dy.data(), x.data(), y.data(), s.outer, s.n, s.inner); });
  CHECK(close(dx, want_dx, 0));
}

template <class T>
void test_shapes() {
  Kernels<T> k{};
  reduce_kernels(k);
  for (const Shape& s : SHAPES) {
    Array<T> x(s.size());
    fill_integers(x, 1);
    sum(k, s, x, true);
    max(k, s, x);  // many ties
    fill_uniform(x, 2);
    sum(k, s, x, false);
    max(k, s, x);
  }
}

template <class T>
void test_special() {
  Kernels<T> k{};
  reduce_kernels(k);
  for (const Shape& s : {Shape{3, 50, 1}, Shape{2, 40, 5}, Shape{1, 5000, 1}, Shape{1, 700, 3}}) {
    for (const int at : {0, s.n / 2, s.n - 1}) {  // in the first output
      for (const double odd : {NAN_VALUE, INFINITE, -INFINITE}) {
        Array<T> x(s.size());
        fill_integers(x, 4);
        x[at * s.inner] = rounded<T>(odd);
        sum(k, s, x, true);
        max(k, s, x);
      }
    }
    Array<T> x(s.size(), rounded<T>(-INFINITE));
    max(k, s, x);
  }
}

// Where float would stand still or cancel.
void test_sums_in_double() {
  Kernels<float> k{};
  reduce_kernels(k);
  const int n = 6000;
  Array<float> x(n, 1.0f), y(1);
  x[0] = 1e9f;
  x[n - 1] = -1e9f;
  k.sum(y.data(), x.data(), 1, n, 1);
  wait();
  CHECK(y[0] == float(n - 2));
}

}  // namespace

int main() {
  test_shapes<float>();
  test_shapes<double>();
  test_shapes<bf16>();
  test_special<float>();
  test_special<double>();
  test_special<bf16>();
  test_sums_in_double();
  CHECK(scratch_blocks == 0);
  return report();
}
