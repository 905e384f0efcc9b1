// Elementwise kernels against the C library's functions in double, one element after the other.
#include <limits>

#include "cuda/elementwise.cu"
#include "kernel_testing.h"

#ifndef __CUDACC__
#include <sys/mman.h>
#endif

using namespace tinyres;

namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN(),
                 INFINITE = std::numeric_limits<double>::infinity();

constexpr int SIZES[] = {1, 7, 8, 31, 257, 2053};

// A dense array that begins `shift` elements after an aligned address; NaN at first.
template <class T>
class Shifted {
 public:
  Shifted(int n, int shift) : all_(n + shift), shift_(shift) { fill_nan(all_); }
  T* data() { return all_.data() + shift_; }
  T& operator[](int i) { return all_[i + shift_]; }
  int size() const { return all_.size() - shift_; }

 private:
  Array<T> all_;
  int shift_;
};

// Numbers between low and high; every eighth is a special one.
template <class T>
void fill_varied(Shifted<T>& x, unsigned seed, double low, double high) {
  const double special[] = {0.0, -0.0, 1.0, -1.0, 2.0, INFINITE, -INFINITE, NAN_VALUE};
  Array<T> uniform(x.size());
  fill_uniform(uniform, seed);
  u64 state = seed;
  for (int i = 0; i < x.size(); i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x[i] = state >> 61 == 0 ? rounded<T>(special[state >> 40 & 7])
                            : rounded<T>(low + (high - low) * (value(uniform[i]) + 1) / 2);
  }
}

// Whether y[i] is want(i) to within `ulps` steps of T.
template <class T, class Want>
bool matches(Shifted<T>& y, double ulps, const Want& want) {
  for (int i = 0; i < y.size(); i++) {
    const double g = value(y[i]), w = value(rounded<T>(want(i)));
    if (g == w || (std::isnan(g) && std::isnan(w))) continue;
    if (std::fabs(g - w) <= ulps * epsilon<T>() * std::fmax(1, std::fabs(w)) && std::isfinite(w)) continue;
    std::printf("%s element %d of %d: got %.9g, want %.9g\n", type_name<T>(), i, y.size(), g, w);
    return false;
  }
  return true;
}

// test(n, shift of the inputs, shift of the outputs): with packs of 16 bytes, and without for either reason.
template <class Test>
void for_layouts(const Test& test) {
  for (const int n : SIZES) {
    test(n, 0, 0);
    test(n, 1, 0);
    test(n, 0, 3);
  }
}

// ---- dense arrays of one shape ------------------------------------------------------------------------------------

double relu_of(double x) { return x < 0 ? 0 : x; }
double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
void unary_ops(const Kernels<T>& k) {
  const struct {
    Unary op;
    double (*f)(double);
    double ulps;
  } ops[] = {
      {Unary::neg, [](double x) { return -x; }, 0},
      {Unary::exp, [](double x) { return std::exp(x); }, 2},
      {Unary::log, [](double x) { return std::log(x); }, 2},
      {Unary::sqrt, [](double x) { return std::sqrt(x); }, 0},
      {Unary::sigmoid, sigmoid_of, 4},
      {Unary::tanh, [](double x) { return std::tanh(x); }, 3},
      {Unary::relu, relu_of, 0},
  };
  for_layouts([&](int n, int in, int out) {
    for (const auto& op : ops) {
      Shifted<T> x(n, in), y(n, out);
      fill_varied(x, unsigned(n), -4, 4);
      k.unary(op.op, y.data(), x.data(), n);
      wait();
      CHECK(matches(y, op.ulps, [&](int i) { return op.f(value(x[i])); }));
    }
  });

  Shifted<T> x(2, 0), y(2, 0);  // where exp of the argument itself would overflow
  x[0] = rounded<T>(-1000);
  x[1] = rounded<T>(1000);
  k.unary(Unary::sigmoid, y.data(), x.data(), 2);
  wait();
  CHECK(value(y[0]) >= 0 && value(y[0]) < 1e-300 + epsilon<T>() && value(y[1]) == 1);
}

template <class T>
void unary_backwards(const Kernels<T>& k) {
  const struct {
    Unary op;
    double (*f)(double, double);
    double ulps;
  } ops[] = {
      {Unary::sqrt, [](double dy, double y) { return dy / (2 * y); }, 1},
      {Unary::sigmoid, [](double dy, double y) { return dy * (y * (1 - y)); }, 4},
      {Unary::tanh, [](double dy, double y) { return dy * (1 - y * y); }, 4},
      {Unary::relu, [](double dy, double y) { return y > 0 ? dy : 0; }, 0},
  };
  for_layouts([&](int n, int in, int out) {
    for (const auto& op : ops) {
      Shifted<T> dy(n, in), y(n, 0), dx(n, out);
      fill_varied(dy, 1, -2, 2);
      fill_varied(y, 2, -1, 1);
      k.unary_backward(op.op, dx.data(), dy.data(), y.data(), n);
      wait();
      CHECK(matches(dx, op.ulps, [&](int i) { return op.f(value(dy[i]), value(y[i])); }));
    }
  });
}

template <class T>
void two_operands(const Kernels<T>& k) {
  for_layouts([&](int n, int in, int out) {
    Shifted<T> a(n, in), b(n, 0), y(n, 0), dy(n, 0), da(n, out), db(n, 0);
    fill_varied(a, 3, -3, 3);
    fill_varied(b, 4, -3, 3);
    fill_varied(dy, 5, -2, 2);
    for (int i = 0; i < n; i += 3) b[i] = a[i];  // ties, and NaN on both sides

    k.add_relu(y.data(), a.data(), b.data(), n);
    k.maximum_backward(da.data(), db.data(), dy.data(), a.data(), b.data(), n);
    wait();
    CHECK(matches(y, 0, [&](int i) { return relu_of(value(a[i]) + value(b[i])); }));
    const auto share = [&](int i, double mine, double other) {
      return mine > other ? value(dy[i]) : mine == other ? value(dy[i]) / 2 : 0;
    };
    CHECK(matches(da, 0, [&](int i) { return share(i, value(a[i]), value(b[i])); }));
    CHECK(matches(db, 0, [&](int i) { return share(i, value(b[i]), value(a[i])); }));

    for (int i = 0; i < n; i++) y[i] = rounded<T>(std::pow(value(a[i]), value(b[i])));
    k.pow_backward(da.data(), db.data(), dy.data(), a.data(), b.data(), y.data(), n);
    wait();
    CHECK(matches(da, 8, [&](int i) {
      const double u = value(a[i]), v = value(b[i]);
      return v == 0 ? 0 : value(dy[i]) * v * std::pow(u, v - 1);
    }));
    CHECK(matches(db, 8, [&](int i) {
      const double u = value(a[i]);
      return u == 0 ? 0 : value(dy[i]) * value(y[i]) * std::log(u);
    }));
  });
}

template <class T>
void dropouts(const Kernels<T>& k) {
  const RandomKey key{0x0123456789abcdefu, 0xfedcba9876543210u};
  for_layouts([&](int n, int in, int out) {
    std::vector<u32> words(std::size_t(n), 0);
    philox::philox_fill(words.data(), n, key.key, key.draw);
    const double at_last = (words.back() >> 8) * 0x1p-24;  // p that the last uniform just reaches
    for (const double p : {0.0, 0.1, 0.5, 0.999, at_last, at_last + 0x1p-40}) {
      Shifted<T> x(n, in), y(n, out);
      fill_varied(x, 6, -2, 2);
      k.dropout(y.data(), x.data(), n, p, key);
      wait();
      const Wide<T> scale = Wide<T>(1 / (1 - p));
      CHECK(matches(
          y, 0, [&](int i) { return (words[std::size_t(i)] >> 8) * 0x1p-24 >= p ? double(wide(x[i]) * scale) : 0; }));
    }
  });
  Shifted<T> x(4, 0);  // in place; the words of draw 0 under key 0 are 6627e8d5 e169c58d bc57ac4c 9b00dbd8
  for (int i = 0; i < 4; i++) x[i] = rounded<T>(i + 1);
  k.dropout(x.data(), x.data(), 4, 0.5, RandomKey{0, 0});
  wait();
  CHECK(matches(x, 0, [](int i) { return i == 0 ? 0.0 : 2.0 * (i + 1); }));
}

template <class T>
void fills(const Kernels<T>& k) {
  for_layouts([&](int n, int, int out) {
    Shifted<T> y(n + 1, out);  // one more, which stays as it is
    k.fill(y.data(), -1.5, n);
    wait();
    CHECK(matches(y, 0, [&](int i) { return i < n ? -1.5 : NAN_VALUE; }));
  });
}

// More elements than threads in the largest grid, one a thread.
void large(const Kernels<bf16>& k) {
  const int n = int(MAX_BLOCKS) * THREADS + 300;
  Shifted<bf16> x(n, 1), y(n, 1);
  k.fill(x.data(), 3, n);
  k.binary(Binary::add, y.data(), x.data(), x.data(), {1, {n}, {}, {1}, {0}});
  wait();
  CHECK(matches(y, 0, [](int) { return 6.0; }));
  k.dropout(y.data(), y.data(), n, 0.5, RandomKey{0, 0});
  wait();
  for (const int i : {0, int(MAX_BLOCKS) * THREADS, n - 1})
    CHECK(value(y[i]) == (philox::block(u64(i) / 4, 0, 0).word[i % 4] >> 31 ? 12 : 0));
}

// ---- strided arrays -----------------------------------------------------------------------------------------------

struct Case {
  Strided s;
  int a_start, b_start;  // where element (0, 0, ...) lies in an array of SPACE elements
};
constexpr int SPACE = 4096;

// Offsets of all elements in row-major order.
std::vector<int> offsets(const Strided& s, const i64* stride) {
  std::vector<int> all{0};
  for (int axis = 0; axis < s.rank; axis++) {
    std::vector<int> longer;
    for (const int offset : all)
      for (i64 i = 0; i < s.size[axis]; i++) longer.push_back(offset + int(i * stride[axis]));
    all = longer;
  }
  return all;
}

const Case CASES[] = {
    {{0, {}, {}, {}, {}}, 0, 0},                              // a scalar
    {{1, {2053}, {}, {1}, {1}}, 0, 0},                        // dense
    {{1, {2053}, {}, {1}, {1}}, 0, 1},                        // dense, one operand not aligned
    {{1, {1000}, {}, {1}, {0}}, 0, 5},                        // with a scalar
    {{1, {1000}, {}, {0}, {1}}, 5, 0},                        // the other way round
    {{2, {37, 64}, {}, {64, 1}, {0, 1}}, 0, 0},               // a row for every row, in packs
    {{2, {37, 30}, {}, {30, 1}, {0, 1}}, 0, 0},               // in packs for double alone
    {{2, {61, 7}, {}, {7, 1}, {0, 1}}, 0, 0},                 // not in packs
    {{2, {37, 64}, {}, {1, 0}, {64, 1}}, 1, 0},               // a number for every row
    {{2, {9, 16}, {}, {17, 1}, {16, 1}}, 0, 0},               // rows that are not aligned
    {{2, {6, 16}, {}, {-16, 1}, {16, -1}}, 80, 15},           // turned round
    {{2, {19, 23}, {}, {1, 19}, {-23, -1}}, 0, 19 * 23 - 1},  // transposed
    {{2, {9, 5}, {}, {16, 1}, {8, 1}}, 0, 0},                 // rows that are aligned and end inside of a pack
    {{2, {33, 5}, {}, {10, 2}, {0, 0}}, 1, 0},                // every second element
    {{4, {3, 1, 5, 8}, {}, {0, 3, 8, 1}, {40, 7, 0, 1}}, 0, 0},
    {{5, {2, 3, 4, 5, 7}, {}, {1, 2, 6, 24, 120}, {420, 140, 35, 7, 1}}, 0, 0},
    {{16,
      {2, 1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 2},
      {},
      {512, 9, 256, 0, 9, 64, 32, 9, 16, 8, 9, 4, 128, 9, 2, 1},
      {0, 9, 1, 2, 9, 4, 8, 9, 16, 32, 9, 64, 128, 9, 256, 512}},
     0,
     0},
    {{2, {3, 0}, {}, {1, 1}, {1, 1}}, 0, 0},  // nothing
};

template <class T>
void binary_ops(const Kernels<T>& k) {
  const struct {
    Binary op;
    double (*f)(double, double);
    double ulps;
  } ops[] = {
      {Binary::add, [](double a, double b) { return a + b; }, 0},
      {Binary::sub, [](double a, double b) { return a - b; }, 0},
      {Binary::mul, [](double a, double b) { return a * b; }, 0},
      {Binary::div, [](double a, double b) { return a / b; }, 0},
      {Binary::pow, [](double a, double b) { return std::pow(a, b); }, 8},
      {Binary::maximum, [](double a, double b) { return std::isnan(a) || a > b ? a : b; }, 0},
  };
  Shifted<T> a(SPACE, 0), b(SPACE, 0);
  fill_varied(a, 7, -3, 3);
  fill_varied(b, 8, -3, 3);
  for (const Case& test : CASES) {
    const std::vector<int> at_a = offsets(test.s, test.s.a), at_b = offsets(test.s, test.s.b);
    const int n = int(at_a.size());
    for (const auto& op : ops) {
      for (const int shift : {0, 1}) {
        Shifted<T> y(n + 1, shift);  // one more, which stays as it is
        k.binary(op.op, y.data(), a.data() + test.a_start, b.data() + test.b_start, test.s);
        wait();
        CHECK(matches(y, op.ulps, [&](int i) {
          if (i == n) return NAN_VALUE;
          return op.f(value(a[test.a_start + at_a[std::size_t(i)]]), value(b[test.b_start + at_b[std::size_t(i)]]));
        }));
      }
    }
  }

  for (const i64 repeat : {1, 0}) {  // into the first operand
    Shifted<T> y(100, 0), old(100, 0);
    fill_varied(y, 9, -3, 3);
    for (int i = 0; i < 100; i++) old[i] = y[i];
    k.binary(Binary::add, y.data(), y.data(), b.data(), {1, {100}, {}, {1}, {repeat}});
    wait();
    CHECK(matches(y, 0, [&](int i) { return value(old[i]) + value(b[int(repeat) * i]); }));
  }
}

template <class T>
void copies(const Kernels<T>& k) {
  Shifted<T> a(SPACE, 0), y(SPACE, 0), want(SPACE, 0);
  fill_varied(a, 10, -3, 3);
  if constexpr (sizeof(T) == 2) a[3].bits = 0xffa5;  // a NaN that arithmetic would change
  for (const Case& test : CASES) {
    // Taken into the layout of either operand, where that has a place for every element, and into a dense one.
    Strided s = test.s;
    const auto run = [&](int start) {
      const std::vector<int> to = offsets(s, s.y), from = offsets(s, s.a);
      for (int i = 0; i < SPACE; i++) y[i] = want[i] = rounded<T>(-7);
      for (std::size_t i = 0; i < to.size(); i++) want[start + to[i]] = a[test.a_start + from[i]];
      k.copy(y.data() + start, a.data() + test.a_start, s);
      wait();
      CHECK(std::memcmp(y.data(), want.data(), SPACE * sizeof(T)) == 0);
    };
    bool repeats = false;
    for (int axis = 0; axis < s.rank; axis++) {
      s.y[axis] = test.s.b[axis];
      repeats = repeats || s.y[axis] == 0;
    }
    if (!repeats) run(test.b_start);
    for (i64 axis = s.rank - 1, stride = 1; axis >= 0; stride *= s.size[axis--]) s.y[axis] = stride;
    run(0);
    run(1);
  }
}

// Two rows that lie farther apart than an int can count, in memory that is never touched between them.
void far_apart(const Kernels<bf16>& k) {
  const i64 stride = i64(1) << 31;
  const std::size_t bytes = std::size_t(stride + 32) * sizeof(bf16);
  void* memory = nullptr;
#ifdef __CUDACC__
  check("far_apart", cudaMallocManaged(&memory, bytes));
#else
  memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(memory != MAP_FAILED);
  if (memory == MAP_FAILED) return;
#endif
  bf16* const a = static_cast<bf16*>(memory);
  for (int i = 0; i < 16; i++) {
    a[i] = rounded<bf16>(i);
    a[stride + i] = rounded<bf16>(100 + i);
  }
  Shifted<bf16> y(32, 0);
  k.binary(Binary::add, y.data(), a, a + stride, {2, {2, 16}, {}, {stride, 1}, {-stride, 1}});
  wait();
  CHECK(matches(y, 0, [](int i) { return 100.0 + 2 * (i % 16); }));
  k.copy(a + stride, y.data(), {3, {2, 2, 8}, {-stride, 8, 1}, {16, 8, 1}, {}});
  wait();
  for (int i = 0; i < 16; i++) CHECK(value(a[i]) == 100 + 2 * i && value(a[stride + i]) == 100 + 2 * i);
#ifdef __CUDACC__
  cudaFree(memory);
#else
  munmap(memory, bytes);
#endif
}

// Between float and bf16, bit for bit: ties, NaN and infinities among the numbers.
void casts() {
  Kernels<float> k{};
  elementwise_kernels(k);
  for (int n : SIZES) {
    for (int shift : {0, 1, 4}) {
      Shifted<float> x(n, shift), back(n, shift);
      Shifted<bf16> y(n, shift);
      fill_varied(x, unsigned(n), -100, 100);
      x[0] = 1 + 0x1p-8f;  // lies half-way
      k.to_bf16(y.data(), x.data(), n);
      k.from_bf16(back.data(), y.data(), n);
      wait();
      bool same = y[0].bits == 0x3f80;
      for (int i = 0; i < n; i++) {
        const float stored = to_float(to_bf16(x[i]));
        same = same && y[i].bits == to_bf16(x[i]).bits && std::memcmp(&back[i], &stored, sizeof stored) == 0;
      }
      CHECK(same);
    }
  }
  k.to_bf16(nullptr, nullptr, 0);
  k.from_bf16(nullptr, nullptr, 0);
}

template <class T>
void test() {
  Kernels<T> k{};
  elementwise_kernels(k);
  unary_ops(k);
  unary_backwards(k);
  two_operands(k);
  dropouts(k);
  fills(k);
  binary_ops(k);
  copies(k);
  if constexpr (sizeof(T) == 2) {
    far_apart(k);
    large(k);
  }

  k.unary(Unary::exp, nullptr, nullptr, 0);  // nothing to do
  k.add_relu(nullptr, nullptr, nullptr, 0);
  k.dropout(nullptr, nullptr, 0, 0.5, RandomKey{0, 0});
  k.fill(nullptr, 0, 0);
}

}  // namespace

int main() {
  test<float>();
  test<double>();
  test<bf16>();
  casts();
  CHECK(scratch_blocks == 0);
  return report();
}
