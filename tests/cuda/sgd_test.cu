// Parameters of many sizes in one step of SGD, against the rule written out.
#include <limits>
#include <memory>

#include "cuda/sgd.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

enum class Velocities { all, some, none };

// Parameters with one element on either side of each that must not change. Their gradients are in `parts` parts, or
// those of every third are.
template <class T>
struct Network {
  Network(const std::vector<int>& sizes, Velocities velocities, int parts, bool integers) {
    for (const int n : sizes) {
      const unsigned seed = unsigned(w.size());
      const bool moves = velocities == Velocities::all || (velocities == Velocities::some && seed % 2 == 0);
      const int of_this = seed % 3 == 2 ? 1 : parts;
      fill(w, n + 2, seed * 4, integers);
      fill(v, n + 2, seed * 4 + 1, integers);
      fill(dw, n * of_this + 2, seed * 4 + 2, integers);
      copy.emplace_back(new Array<bf16>(n + 2, rounded<bf16>(9)));
      copied.push_back(sizeof(T) == 4 && seed % 4 != 3);
      parameters.push_back({w.back()->data() + 1, moves ? v.back()->data() + 1 : nullptr,
                            copied.back() ? copy.back()->data() + 1 : nullptr, dw.back()->data() + 1, n, of_this,
                            0.25 * double(seed % 3)});
    }
  }

  using Arrays = std::vector<std::unique_ptr<Array<T>>>;

  static void fill(Arrays& arrays, int n, unsigned seed, bool integers) {
    arrays.emplace_back(new Array<T>(n));
    integers ? fill_integers(*arrays.back(), seed) : fill_uniform(*arrays.back(), seed);
  }

  Arrays w, v, dw;
  std::vector<std::unique_ptr<Array<bf16>>> copy;
  std::vector<bool> copied;
  std::vector<SgdParameter<T>> parameters;
};

template <class T>
std::vector<double> values(Array<T>& array) {
  std::vector<double> y;
  for (int i = 0; i < array.size(); i++) y.push_back(value(array[i]));
  return y;
}

// Two steps from the same state give the same bits, in whatever order and wherever the rate comes from, within `ulps`
// of what is wanted.
template <class T>
void check(const std::vector<int>& sizes, Velocities velocities, int parts, bool nesterov, bool integers, double ulps) {
  const double lr = 0.5, momentum = velocities == Velocities::none ? 0 : 0.75;
  Network<T> p(sizes, velocities, parts, integers), again(sizes, velocities, parts, integers);
  std::vector<std::vector<double>> w, v;
  for (std::size_t i = 0; i < sizes.size(); i++) {
    if (sizes[i] > 2) (*p.dw[i])[2] = (*again.dw[i])[2] = rounded<T>(std::numeric_limits<double>::quiet_NaN());
    w.push_back(values(*p.w[i]));
    v.push_back(values(*p.v[i]));
    const std::vector<double> dw = values(*p.dw[i]);
    for (std::size_t j = 1; j <= std::size_t(sizes[i]); j++) {
      double g = p.parameters[i].decay * w[i][j];
      for (std::size_t part = 0; part < std::size_t(p.parameters[i].parts); part++)
        g += dw[part * std::size_t(sizes[i]) + j];
      double step = g;
      if (p.parameters[i].velocity) {
        const double moved = momentum * v[i][j] + g;
        step = nesterov ? g + momentum * moved : moved;
        v[i][j] = value(rounded<T>(moved));
      }
      w[i][j] = value(rounded<T>(w[i][j] - lr * step));
    }
  }
  Kernels<T> k{};
  sgd_kernels(k);
  Array<double> rate(1, lr);
  k.sgd(i64(sizes.size()), p.parameters.data(), SgdRule{lr, nullptr, momentum, nesterov});
  k.sgd(i64(sizes.size()), again.parameters.data(), SgdRule{7, rate.data(), momentum, nesterov});
  wait();
  for (std::size_t i = 0; i < sizes.size(); i++) {
    CHECK(close(*p.w[i], w[i], ulps));
    CHECK(close(*p.v[i], v[i], ulps));
    CHECK(same_bits(*p.w[i], *again.w[i]) && same_bits(*p.v[i], *again.v[i]));
    bool good = true;
    for (int j = 0; j < sizes[i] + 2; j++) {
      const bool written = p.copied[i] && j > 0 && j <= sizes[i];
      const bf16 want = written ? to_bf16(float(value((*p.w[i])[j]))) : rounded<bf16>(9);
      good = good && (*p.copy[i])[j].bits == want.bits;
    }
    CHECK(good);
  }
}

// The parts are added as sum_parts adds them.
template <class T>
void check_order(int parts) {
  const int n = 300;
  Array<T> dw(parts * n), sum(n), w(n), again(n);
  fill_uniform(dw, 1);
  fill_uniform(w, 2);
  for (int i = 0; i < n; i++) again[i] = w[i];
  launch_sum_parts<T>("test", sum.data(), dw.data(), parts, n);
  Kernels<T> k{};
  sgd_kernels(k);
  const SgdRule rule{0.1, nullptr, 0, false};
  const SgdParameter<T> split{w.data(), nullptr, nullptr, dw.data(), n, parts, 0.01};
  const SgdParameter<T> summed{again.data(), nullptr, nullptr, sum.data(), n, 1, 0.01};
  k.sgd(1, &split, rule);
  k.sgd(1, &summed, rule);
  wait();
  CHECK(same_bits(w, again));
}

template <class T>
void test() {
  const int chunk = CHUNK, split = SPLIT_CHUNK;
  const std::vector<int> sizes{0, 1, 31, 0, 0, THREADS + 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 300, 7, 0};
  const std::vector<int> in_parts{0, 1, split - 1, split, split + 1, 7, 3 * split + 5};
  std::vector<int> many, more;
  for (int i = 0; i < 90; i++) many.push_back(i * 7 % 5);
  for (int i = 0; i < LARGE<T> + 3; i++) more.push_back(1);
  for (const Velocities velocities : {Velocities::all, Velocities::some, Velocities::none})
    for (const bool nesterov : {false, true}) {
      check<T>(sizes, velocities, 1, nesterov, true, 0);
      check<T>({40, 3000}, velocities, 1, nesterov, false, 2);
      check<T>({40, 300, 3}, velocities, 40, nesterov, false, 8);
    }
  for (const int parts : {2, 4, 5, 9, 33, 70}) check<T>(in_parts, Velocities::some, parts, true, sizeof(T) > 2, 4);
  // Every emulated thread gets the large table on its stack, which takes a sanitizer its time: so of one type each.
  if (sizeof(T) == 4) check<T>(more, Velocities::none, 1, false, true, 0);
  if (sizeof(T) == 8) check<T>(many, Velocities::some, 6, true, true, 4);
  check<T>({}, Velocities::all, 1, false, true, 0);
  check<T>({0}, Velocities::all, 1, false, true, 0);
  check<T>({0, 0, 0}, Velocities::none, 7, false, true, 0);
}

}  // namespace

int main() {
  test<float>();
  test<double>();
  test<bf16>();
  for (const int parts : {2, 3, 5, 16, 33, 264}) {
    check_order<float>(parts);
    check_order<double>(parts);
  }
  CHECK(scratch_blocks == 0);
  return report();
}
