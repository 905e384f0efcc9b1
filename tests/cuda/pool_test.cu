// Pooling against plain loops over every window, in double.
#include <limits>

#include "cuda/pool.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN(),
                 INFINITE = std::numeric_limits<double>::infinity();

Window window(i64 N, i64 H, i64 W, i64 C, i64 R, i64 S, i64 stride_h, i64 stride_w, i64 pad_h, i64 pad_w) {
  const i64 P = (H + 2 * pad_h - R) / stride_h + 1, Q = (W + 2 * pad_w - S) / stride_w + 1;
  return {N, H, W, C, C, R, S, P, Q, stride_h, stride_w, pad_h, pad_w};
}

// body(index in y, index in x, position) for every element under every window, y's in order.
template <class Body>
void for_all(const Window& s, const Body& body) {
  for (i64 y = 0; y < s.N * s.P * s.Q * s.C; y++) {
    const i64 c = y % s.C, q = y / s.C % s.Q, p = y / s.C / s.Q % s.P, n = y / s.C / s.Q / s.P;
    for (i64 r = 0; r < s.R; r++) {
      for (i64 t = 0; t < s.S; t++) {
        const i64 h = p * s.stride_h - s.pad_h + r, w = q * s.stride_w - s.pad_w + t;
        if (h >= 0 && h < s.H && w >= 0 && w < s.W)
          body(std::size_t(y), int(((n * s.H + h) * s.W + w) * s.C + c), int(r * s.S + t));
      }
    }
  }
}

// Runs twice into arrays of NaN and compares bits.
template <class T, class Run>
void twice(Array<T>& y, const Run& run) {
  Array<T> again(y.size());
  fill_nan(y);
  fill_nan(again);
  run(again);
  run(y);
  wait();
  CHECK(same_bits(y, again));
}

template <class T>
void max_pool(const Kernels<T>& k, const Window& s, Array<T>& x) {
  const int inputs = x.size(), outputs = int(s.N * s.P * s.Q * s.C);
  std::vector<double> want(outputs), want_dx(inputs, 0.0);
  std::vector<int> position(outputs, -1), source(outputs, 0);
  for_all(s, [&](std::size_t i, int from, int at) {
    const double v = value(x[from]);
    if (position[i] >= 0 && !(v > want[i]) && !(std::isnan(v) && !std::isnan(want[i]))) return;
    want[i] = v, position[i] = at, source[i] = from;
  });

  Array<T> y(outputs), dy(outputs), dx(inputs);
  Array<std::int32_t> argmax(outputs, -7);
  twice(y, [&](Array<T>& y) { k.max_pool2d_forward(y.data(), argmax.data(), x.data(), s); });
  CHECK(close(y, want, 0));
  for (int i = 0; i < outputs; i++) CHECK(argmax[i] == position[std::size_t(i)]);

  fill_integers(dy, 5);
  for (int i = 0; i < outputs; i++) want_dx[std::size_t(source[std::size_t(i)])] += value(dy[i]);
  twice(dx, [&](Array<T>& dx) { k.max_pool2d_backward(dx.data(), dy.data(), argmax.data(), s); });
  CHECK(close(dx, want_dx, 0));
}

template <class T>
void avg_pool(const Kernels<T>& k, const Window& s, Array<T>& x) {
  const int inputs = x.size(), outputs = int(s.N * s.P * s.Q * s.C);
  const double area = double(s.R * s.S);
  Array<T> y(outputs), dy(outputs), dx(inputs);
  fill_integers(dy, 6);
  std::vector<double> want(outputs, 0.0), want_dx(inputs, 0.0);
  for_all(s, [&](std::size_t i, int from, int) {
    want[i] += value(x[from]) / area;
    want_dx[std::size_t(from)] += value(dy[int(i)]) / area;
  });
  const bool exact = (s.R * s.S & (s.R * s.S - 1)) == 0;  // sums of small integers, divided by a power of two
  twice(y, [&](Array<T>& y) { k.avg_pool2d_forward(y.data(), x.data(), s); });
  CHECK(close(y, want, exact ? 0 : 2));
  twice(dx, [&](Array<T>& dx) { k.avg_pool2d_backward(dx.data(), dy.data(), s); });
  CHECK(close(dx, want_dx, exact ? 0 : 2));
}

template <class T>
void global_avg_pool(const Kernels<T>& k, int N, int HW, int C) {
  Array<T> x(N * HW * C), y(N * C), dx(N * HW * C);
  fill_integers(x, 7);
  std::vector<double> want(N * C, 0.0), want_dx(N * HW * C);
  for (int i = 0; i < x.size(); i++) want[std::size_t(i / (HW * C) * C + i % C)] += value(x[i]) / HW;
  const bool exact = (HW & (HW - 1)) == 0;
  twice(y, [&](Array<T>& y) { k.global_avg_pool2d_forward(y.data(), x.data(), N, HW, C); });
  CHECK(close(y, want, exact ? 0 : 2));
  Array<T> dy(N * C);
  fill_integers(dy, 8);
  for (int i = 0; i < dx.size(); i++) want_dx[std::size_t(i)] = value(dy[i / (HW * C) * C + i % C]) / HW;
  twice(dx, [&](Array<T>& dx) { k.global_avg_pool2d_backward(dx.data(), dy.data(), N, HW, C); });
  CHECK(close(dx, want_dx, exact ? 0 : 1));
}

// NaN and infinity: the first NaN of a window wins, -inf is an element like others and padding is not.
template <class T>
void special_values(const Kernels<T>& k) {
  const Window s = window(1, 4, 4, 1, 3, 3, 1, 1, 1, 1);
  Array<T> x(16);
  for (int at = 0; at < 16; at++) {
    fill_integers(x, unsigned(at));
    x[at] = x[(at + 5) % 16] = rounded<T>(NAN_VALUE);
    x[(at + 2) % 16] = rounded<T>(INFINITE);
    max_pool(k, s, x);
  }
  for (int i = 0; i < 16; i++) x[i] = rounded<T>(-INFINITE);
  max_pool(k, s, x);

  Array<T> y(16), one(1), dx(16);
  x[0] = rounded<T>(NAN_VALUE);
  for (int i = 1; i < 16; i++) x[i] = rounded<T>(1);
  k.avg_pool2d_forward(y.data(), x.data(), s);
  k.global_avg_pool2d_forward(one.data(), x.data(), 1, 16, 1);
  k.global_avg_pool2d_backward(dx.data(), one.data(), 1, 16, 1);
  wait();
  for (int i = 0; i < 16; i++) CHECK(std::isnan(value(y[i])) == (i % 4 < 2 && i / 4 < 2) && std::isnan(value(dx[i])));
  CHECK(std::isnan(value(one[0])));
}

// Positions that are in no window, or in the padding, must do no harm.
template <class T>
void wrong_argmax(const Kernels<T>& k) {
  const Window s = window(2, 3, 3, 1, 2, 2, 1, 1, 1, 1);
  const int outputs = int(s.N * s.P * s.Q);
  Array<T> dy(outputs, rounded<T>(1)), dx(18);
  Array<std::int32_t> argmax(outputs);
  for (int i = 0; i < outputs; i++) argmax[i] = i % 3 == 0 ? -1 : i % 3 == 1 ? 4 : 0x7fffffff;
  argmax[0] = 0;  // the corner of the padding
  fill_nan(dx);
  k.max_pool2d_backward(dx.data(), dy.data(), argmax.data(), s);
  wait();
  CHECK(close(dx, std::vector<double>(18, 0.0), 0));
}

template <class T>
void test() {
  Kernels<T> k{};
  pool_kernels(k);

  const Window windows[] = {
      window(1, 1, 1, 1, 1, 1, 1, 1, 0, 0),     // one element
      window(2, 8, 8, 16, 3, 3, 2, 2, 1, 1),    // as in ResNet for ImageNet
      window(1, 5, 7, 300, 2, 2, 2, 2, 0, 0),   // more channels than threads; a last row and column in no window
      window(3, 7, 5, 5, 3, 2, 1, 3, 1, 0),     // overlapping along one axis, gaps along the other
      window(1, 6, 9, 33, 4, 4, 3, 2, 3, 2),    // windows with a single pixel on the image
      window(2, 3, 11, 3, 3, 11, 1, 1, 0, 0),   // the whole image
      window(2, 5, 5, 7, 2, 2, 4, 4, 0, 0),     // most pixels in no window
      window(17, 3, 2, 64, 2, 1, 1, 1, 1, 0)};  // windows over the lower edge
  for (const Window& s : windows) {
    Array<T> x(int(s.N * s.H * s.W * s.C));
    fill_integers(x, 1);  // many ties
    max_pool(k, s, x);
    avg_pool(k, s, x);
    fill_uniform(x, 2);
    max_pool(k, s, x);
  }
  const Window far_padding = window(1, 3, 3, 2, 2, 2, 2, 1, 4, 3);  // windows that see no image at all
  Array<T> x(18, rounded<T>(1));
  avg_pool(k, far_padding, x);

  for (const int C : {1, 10, 31, 32, 33, 70})
    for (const int HW : {1, 7, 8, 9, 49, 64}) global_avg_pool(k, C == 10 ? 5 : 2, HW, C);

  special_values(k);
  wrong_argmax(k);

  // An empty batch is nothing to do; one with too many pixels is refused before anything is read.
  Window none = windows[1], huge = windows[1];
  none.N = 0;
  huge.N = i64(1) << 25;
  const auto refused = [](auto call) {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return std::strstr(error.what(), "2**30") != nullptr;
    }
    return false;
  };
  k.max_pool2d_forward(nullptr, nullptr, nullptr, none);
  k.max_pool2d_backward(nullptr, nullptr, nullptr, none);
  k.avg_pool2d_forward(nullptr, nullptr, none);
  k.avg_pool2d_backward(nullptr, nullptr, none);
  k.global_avg_pool2d_forward(nullptr, nullptr, 0, 4, 4);
  k.global_avg_pool2d_backward(nullptr, nullptr, 0, 4, 4);
  CHECK(refused([&] { k.max_pool2d_forward(nullptr, nullptr, nullptr, huge); }));
  CHECK(refused([&] { k.max_pool2d_backward(nullptr, nullptr, nullptr, huge); }));
  CHECK(refused([&] { k.avg_pool2d_forward(nullptr, nullptr, huge); }));
  CHECK(refused([&] { k.avg_pool2d_backward(nullptr, nullptr, huge); }));
  CHECK(refused([&] { k.global_avg_pool2d_forward(nullptr, nullptr, huge.N, 64, 4); }));
  CHECK(refused([&] { k.global_avg_pool2d_backward(nullptr, nullptr, huge.N, 64, 4); }));
}

}  // namespace

int main() {
  test<float>();
  test<double>();
  test<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
