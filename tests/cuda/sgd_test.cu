// Parameters of many sizes in one step of SGD, against the rule written out.
#include <limits>
#include <memory>

#include "cuda/sgd.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

enum class Velocities { all, some, none };

// Parameters with one element on either side of each that must not change.
template <class T>
struct Parameters {
  Parameters(const std::vector<int>& sizes, Velocities velocities, bool integers) {
    for (const int n : sizes) {
      for (auto* arrays : {&w, &v, &dw}) {
        arrays->emplace_back(new Array<T>(n + 2));
        const unsigned seed = unsigned(arrays->size() * 3 + (arrays == &v) + 2 * (arrays == &dw));
        integers ? fill_integers(*arrays->back(), seed) : fill_uniform(*arrays->back(), seed);
      }
      w_at.push_back(w.back()->data() + 1);
      dw_at.push_back(dw.back()->data() + 1);
      const bool moves = velocities == Velocities::all || (velocities == Velocities::some && w.size() % 2);
      v_at.push_back(moves ? v.back()->data() + 1 : nullptr);
      size.push_back(n);
      decay.push_back(0.25 * double(w.size() % 3));
    }
  }

  std::vector<std::unique_ptr<Array<T>>> w, v, dw;
  std::vector<T*> w_at, v_at;
  std::vector<const T*> dw_at;
  std::vector<i64> size;
  std::vector<double> decay;
};

template <class T>
std::vector<double> values(Array<T>& array) {
  std::vector<double> y;
  for (int i = 0; i < array.size(); i++) y.push_back(value(array[i]));
  return y;
}

// Two steps from the same state give the same bits, within `ulps` of what is wanted.
template <class T>
void check(const std::vector<int>& sizes, Velocities velocities, bool nesterov, bool integers, double ulps) {
  const double lr = 0.5, momentum = velocities == Velocities::none ? 0 : 0.75;
  Parameters<T> p(sizes, velocities, integers), again(sizes, velocities, integers);
  std::vector<std::vector<double>> w, v;
  for (std::size_t i = 0; i < sizes.size(); i++) {
    if (sizes[i] > 2) (*p.dw[i])[2] = (*again.dw[i])[2] = rounded<T>(std::numeric_limits<double>::quiet_NaN());
    w.push_back(values(*p.w[i]));
    v.push_back(values(*p.v[i]));
    const std::vector<double> dw = values(*p.dw[i]);
    for (std::size_t j = 1; j <= std::size_t(sizes[i]); j++) {
      const double g = dw[j] + p.decay[i] * w[i][j];
      double step = g;
      if (p.v_at[i]) {
        const double moved = momentum * v[i][j] + g;
        step = nesterov ? g + momentum * moved : moved;
        v[i][j] = value(rounded<T>(moved));
      }
      w[i][j] = value(rounded<T>(w[i][j] - lr * step));
    }
  }
  Kernels<T> k{};
  sgd_kernels(k);
  for (Parameters<T>* q : {&p, &again})
    k.sgd(i64(sizes.size()), q->w_at.data(), velocities == Velocities::none ? nullptr : q->v_at.data(), q->dw_at.data(),
          q->size.data(), q->decay.data(), lr, momentum, nesterov);
  wait();
  for (std::size_t i = 0; i < sizes.size(); i++) {
    CHECK(close(*p.w[i], w[i], ulps));
    CHECK(close(*p.v[i], v[i], ulps));
    CHECK(same_bits(*p.w[i], *again.w[i]) && same_bits(*p.v[i], *again.v[i]));
  }
}

template <class T>
void test() {
  const int chunk = int(CHUNK);
  const std::vector<int> sizes{0, 1, 31, 0, 0, THREADS + 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 300, 7, 0};
  std::vector<int> many;
  for (int i = 0; i < 70; i++) many.push_back(i * 7 % 5);
  for (const Velocities velocities : {Velocities::all, Velocities::some, Velocities::none})
    for (const bool nesterov : {false, true}) {
      check<T>(sizes, velocities, nesterov, true, 0);
      check<T>(many, velocities, nesterov, true, 0);
      check<T>({40, 3000}, velocities, nesterov, false, 2);
    }
  check<T>({}, Velocities::all, false, true, 0);
  check<T>({0}, Velocities::all, false, true, 0);
  check<T>({0, 0, 0}, Velocities::none, false, true, 0);
}

}  // namespace

int main() {
  test<float>();
  test<double>();
  test<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
