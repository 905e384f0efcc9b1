// Tests of convolution kernels against sums over plain loops, for any algorithms. Include the kernels before.
#pragma once

#include <limits>

#include "kernel_testing.h"

namespace tinyres {

using Algorithms = std::vector<ConvAlgorithm>;

inline Window window(int N, int H, int W, int C, int K, int R, int S, int stride_h, int stride_w, int pad_h,
                     int pad_w) {
  return {
      N,        H,        W,     C,    K, R, S, (H + 2 * pad_h - R) / stride_h + 1, (W + 2 * pad_w - S) / stride_w + 1,
      stride_h, stride_w, pad_h, pad_w};
}

// Calls visit(i of x, i of y, i of w) for every product of the convolution that lies inside the image.
template <class Visit>
void for_products(const Window& s, const Visit& visit) {
  for (i64 n = 0; n < s.N; n++)
    for (i64 p = 0; p < s.P; p++)
      for (i64 q = 0; q < s.Q; q++)
        for (i64 r = 0; r < s.R; r++)
          for (i64 u = 0; u < s.S; u++) {
            const i64 h = p * s.stride_h + r - s.pad_h, v = q * s.stride_w + u - s.pad_w;
            if (h < 0 || h >= s.H || v < 0 || v >= s.W) continue;
            for (i64 c = 0; c < s.C; c++)
              for (i64 k = 0; k < s.K; k++)
                visit(int(((n * s.H + h) * s.W + v) * s.C + c), int(((n * s.P + p) * s.Q + q) * s.K + k),
                      int(((r * s.S + u) * s.C + c) * s.K + k));
          }
}

// Runs a launcher, twice to compare the bits, on an output that holds NaN before.
template <class Out, class Run>
void check_run(int size, const std::vector<double>& want, double ulps, const Run& run) {
  Array<Out> got(size), again(size);
  for (Array<Out>* y : {&got, &again}) {
    fill_nan(*y);
    run(y->data());
    wait();
  }
  CHECK(close(got, want, ulps));
  CHECK(same_bits(got, again));
}

struct Sums {
  std::vector<double> y, dx, dw;
};

template <class T>
Sums sums_of(const Window& s, Array<T>& x, Array<T>& w, Array<T>& dy) {
  Sums want{std::vector<double>(std::size_t(dy.size())), std::vector<double>(std::size_t(x.size())),
            std::vector<double>(std::size_t(w.size()))};
  for_products(s, [&](int ix, int iy, int iw) {
    want.y[std::size_t(iy)] += value(x[ix]) * value(w[iw]);
    want.dx[std::size_t(ix)] += value(dy[iy]) * value(w[iw]);
    want.dw[std::size_t(iw)] += value(dy[iy]) * value(x[ix]);
  });
  return want;
}

inline int pixels_x(const Window& s) { return int(s.N * s.H * s.W); }
inline int pixels_y(const Window& s) { return int(s.N * s.P * s.Q); }
inline int taps(const Window& s) { return int(s.R * s.S); }

// For sums of fractions. mma rounds floats to 11 bits before it multiplies.
template <class T>
double fraction_ulps(ConvAlgorithm algorithm) {
  return algorithm == ConvAlgorithm::mma && sizeof(T) == 4 ? 1 << 13 : 64;
}

template <class T>
void test_shape(const Kernels<T>& k, const Algorithms& algorithms, const Window& s, unsigned seed) {
  // x and dy one element behind an aligned address at every other shape: the paths without vectors.
  const int shift = int(seed % 2);
  Array<T> x(pixels_x(s) * int(s.C) + shift), w(taps(s) * int(s.C * s.K)), dy(pixels_y(s) * int(s.K));
  for (const bool integers : {false, true}) {
    if (integers) {
      fill_integers(x, seed), fill_integers(w, seed + 1), fill_integers(dy, seed + 2);
    } else {
      fill_uniform(x, seed), fill_uniform(w, seed + 1), fill_uniform(dy, seed + 2);
    }
    Array<T> shifted(pixels_x(s) * int(s.C));
    for (int i = 0; i < shifted.size(); i++) shifted[i] = x[i + shift];
    const T* at = x.data() + shift;
    Sums want = sums_of(s, shifted, w, dy);
    for (const auto algorithm : algorithms) {
      // Integers are exact in the sums; what is stored may be rounded once.
      const double ulps = !integers ? fraction_ulps<T>(algorithm) : sizeof(T) == 2 ? 0.5 : 0;
      const double wide_ulps = integers ? 0 : fraction_ulps<T>(algorithm);
      check_run<T>(dy.size(), want.y, ulps, [&](T* y) { k.conv2d_forward(y, at, w.data(), {}, s, algorithm); });
      check_run<T>(shifted.size(), want.dx, ulps,
                   [&](T* dx) { k.conv2d_backward_input(dx, dy.data(), w.data(), s, algorithm, false); });
      check_run<Wide<T>>(w.size(), want.dw, wide_ulps,
                         [&](Wide<T>* dw) { k.conv2d_backward_weight(dw, dy.data(), at, s, algorithm); });
      Array<T> bias(int(s.K)), residual(dy.size());
      fill_integers(bias, seed + 4), fill_integers(residual, seed + 5);
      std::vector<double> finished = want.y;
      for (int i = 0; i < residual.size(); i++) {
        double& y = finished[std::size_t(i)];
        y = std::max(0.0, y + value(bias[i % int(s.K)]) + value(residual[i]));
      }
      const Epilogue<T> epilogue{bias.data(), residual.data(), true};
      check_run<T>(dy.size(), finished, ulps, [&](T* y) { k.conv2d_forward(y, at, w.data(), epilogue, s, algorithm); });
      Array<T> total(shifted.size());
      fill_integers(total, seed + 3);
      std::vector<double> sum = want.dx;
      for (int i = 0; i < total.size(); i++) sum[std::size_t(i)] += value(total[i]);
      k.conv2d_backward_input(total.data(), dy.data(), w.data(), s, algorithm, true);
      wait();
      CHECK(close(total, sum, ulps));
    }
  }
}

template <class T>
void test_shapes(const Kernels<T>& k, const Algorithms& algorithms) {
  const Window shapes[] = {
      //     N   H   W   C   K  R  S  stride pad
      window(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0),    window(1, 5, 7, 3, 5, 3, 3, 1, 1, 1, 1),  // scalars, one tile
      window(2, 8, 8, 4, 16, 3, 3, 1, 1, 1, 1),    // vectors, 16 wide, two row tiles
      window(2, 6, 8, 16, 16, 3, 3, 1, 1, 1, 1),   // a tap a step
      window(1, 9, 7, 20, 20, 3, 3, 1, 1, 1, 1),   // 32 wide, a tail of columns, a row tile less one
      window(1, 8, 8, 8, 36, 1, 1, 1, 1, 0, 0),    // 64 wide, one step
      window(1, 5, 13, 12, 68, 3, 1, 1, 1, 1, 0),  // two column tiles, a row tile and one
      window(1, 4, 5, 33, 31, 2, 3, 1, 1, 1, 2),   // more padding than a window needs
      window(2, 8, 9, 4, 8, 3, 3, 2, 2, 1, 1),     // strided
      window(1, 9, 8, 5, 4, 3, 2, 2, 3, 1, 0),    window(2, 7, 8, 8, 4, 1, 1, 2, 2, 0, 0),  // inputs without any tap
      window(1, 11, 12, 3, 6, 2, 3, 4, 5, 2, 1),   // stride larger than the window
      window(1, 15, 15, 3, 17, 7, 7, 2, 2, 3, 3),  // as ImageNet networks begin
      window(1, 3, 2, 4, 4, 5, 4, 2, 1, 4, 3),     // window larger than the image
      window(1, 2, 1, 2, 3, 1, 1, 5, 7, 3, 3),     // most classes without any input
      window(2, 16, 13, 4, 4, 3, 3, 1, 1, 1, 1),   // several parts of the pixels, the last one short
      window(5, 16, 16, 2, 3, 1, 1, 1, 1, 0, 0),
  };
  unsigned seed = 0;
  for (const Window& s : shapes) test_shape(k, algorithms, s, seed++);
  test_shape(k, algorithms, shapes[2], 1);  // what was aligned before
}

// More parts than sum_parts takes lanes.
template <class T>
void test_many_parts(const Kernels<T>& k, const Algorithms& algorithms) {
  const Window s = window(35, 16, 8, 3, 8, 1, 1, 1, 1, 0, 0);
  Array<T> x(pixels_x(s) * 3), w(24), dy(pixels_y(s) * 8);
  fill_integers(x, 1), fill_integers(w, 2), fill_integers(dy, 3);
  const Sums want = sums_of(s, x, w, dy);
  for (const auto algorithm : algorithms)
    check_run<Wide<T>>(24, want.dw, 0,
                       [&](Wide<T>* dw) { k.conv2d_backward_weight(dw, dy.data(), x.data(), s, algorithm); });
}

// NaN and infinity reach exactly those outputs whose sums contain them. The zeros around an image would make NaN of an
// infinite weight or dy, so that those of dy lie in the middle, where every tap is inside.
template <class T>
void test_not_finite(const Kernels<T>& k, const Algorithms& algorithms) {
  const Window s = window(2, 7, 10, 4, 20, 3, 3, 2, 2, 1, 1);
  Array<T> x(pixels_x(s) * 4), w(taps(s) * 4 * 20), dy(pixels_y(s) * 20);
  fill_uniform(x, 1), fill_uniform(w, 2), fill_uniform(dy, 3);
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  x[x.size() - 1] = rounded<T>(nan), x[17] = rounded<T>(inf);
  dy[((1 * 4 + 2) * 5 + 3) * 20 + 19] = rounded<T>(nan), dy[((0 * 4 + 1) * 5 + 1) * 20 + 3] = rounded<T>(-inf);
  const Sums want = sums_of(s, x, w, dy);
  for (const auto algorithm : algorithms) {
    const double ulps = fraction_ulps<T>(algorithm);
    check_run<T>(dy.size(), want.y, ulps, [&](T* y) { k.conv2d_forward(y, x.data(), w.data(), {}, s, algorithm); });
    check_run<T>(x.size(), want.dx, ulps,
                 [&](T* dx) { k.conv2d_backward_input(dx, dy.data(), w.data(), s, algorithm, false); });
    check_run<Wide<T>>(w.size(), want.dw, ulps,
                       [&](Wide<T>* dw) { k.conv2d_backward_weight(dw, dy.data(), x.data(), s, algorithm); });
  }
}

template <class T>
void test_no_images(const Kernels<T>& k, const Algorithms& algorithms) {
  const Window s = window(0, 4, 4, 2, 3, 3, 3, 1, 1, 1, 1);
  Array<T> none(1);
  for (const auto algorithm : algorithms) {
    k.conv2d_forward(none.data(), none.data(), none.data(), {}, s, algorithm);
    k.conv2d_backward_input(none.data(), none.data(), none.data(), s, algorithm, false);
    check_run<Wide<T>>(54, std::vector<double>(54), 0,
                       [&](Wide<T>* dw) { k.conv2d_backward_weight(dw, none.data(), none.data(), s, algorithm); });
  }
}

// Sums of nothing.
template <class T>
void test_no_channels(const Kernels<T>& k, const Algorithms& algorithms) {
  const Window s = window(1, 4, 4, 0, 3, 3, 3, 1, 1, 1, 1);
  Array<T> none(1);
  for (const auto algorithm : algorithms)
    check_run<T>(48, std::vector<double>(48), 0,
                 [&](T* y) { k.conv2d_forward(y, none.data(), none.data(), {}, s, algorithm); });
}

template <class T>
void test_too_large(const Kernels<T>& k) {
  Array<T> none(1);
  Array<Wide<T>> dw(1);
  const Window s = window(1 << 20, 64, 64, 1, 1, 1, 1, 1, 1, 0, 0);
  int thrown = 0;
  for (int i = 0; i < 3; i++) {
    try {
      if (i == 0) k.conv2d_forward(none.data(), none.data(), none.data(), {}, s, ConvAlgorithm::tiled);
      if (i == 1) k.conv2d_backward_input(none.data(), none.data(), none.data(), s, ConvAlgorithm::naive, false);
      if (i == 2) k.conv2d_backward_weight(dw.data(), none.data(), none.data(), s, ConvAlgorithm::automatic);
    } catch (const std::invalid_argument&) {
      thrown++;
    }
  }
  CHECK(thrown == 3);
}

template <class T>
void test_all(const Kernels<T>& k, const Algorithms& algorithms) {
  test_shapes(k, algorithms);
  test_many_parts(k, algorithms);
  test_not_finite(k, algorithms);
  test_no_channels(k, algorithms);
}

}  // namespace tinyres
