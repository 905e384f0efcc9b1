// The convolution kernels, one thread an output and tiled; and who is called for which algorithm.
#include "conv2d_testing.h"
#include "cuda/conv2d.cu"

using namespace tinyres;

namespace {

int mma_calls = 0, direct_calls = 0;
bool direct_takes = false;

}  // namespace

// In the place of conv2d_mma.cu, which conv2d_mma_test.cu tests.
namespace tinyres::mma {

template <class T>
void forward(const char*, T*, const T*, const T*, const Epilogue<T>&, const Shape&) {
  mma_calls++;
}
template <class T>
void backward_input(const char*, T*, const T*, const T*, const Shape&, bool) {
  mma_calls++;
}
template <class T>
void backward_weight(const char*, Wide<T>*, const T*, const T*, const Shape&) {
  mma_calls++;
}

}  // namespace tinyres::mma

// Likewise conv3x3.cu; conv3x3_test.cu.
namespace tinyres::direct {

bool takes(const Window&, std::initializer_list<const void*>) { return direct_takes; }

template <class T>
void forward(const char*, T*, const T*, const T*, const Window&) {
  direct_calls++;
}
template <class T>
void backward_input(const char*, T*, const T*, const T*, const Window&, bool) {
  direct_calls++;
}
template <class T>
void backward_weight(const char*, Wide<T>*, const T*, const T*, const Window&) {
  direct_calls++;
}

}  // namespace tinyres::direct

namespace {

enum class Called { here, mma, direct };

template <class T>
void test_algorithm(ConvAlgorithm algorithm, Called wanted) {
  Kernels<T> k{};
  conv2d_kernels(k);
  const Window s = window(1, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0);
  Array<T> x(4), w(1), y(4);
  Array<Wide<T>> dw(1);
  fill_integers(x, 1), fill_integers(w, 2);
  mma_calls = direct_calls = 0;
  k.conv2d_forward(y.data(), x.data(), w.data(), {}, s, algorithm);
  k.conv2d_backward_input(y.data(), x.data(), w.data(), s, algorithm, false);
  k.conv2d_backward_weight(dw.data(), y.data(), x.data(), s, algorithm);
  wait();
  CHECK(mma_calls == (wanted == Called::mma ? 3 : 0) && direct_calls == (wanted == Called::direct ? 3 : 0));
  // Forward, direct has no bias, residual or ReLU.
  for (const Epilogue<T>& epilogue :
       {Epilogue<T>{x.data(), nullptr, false}, {nullptr, x.data(), false}, {{}, {}, true}})
    k.conv2d_forward(y.data(), x.data(), w.data(), epilogue, s, algorithm);
  wait();
  CHECK(direct_calls == (wanted == Called::direct ? 3 : 0));
}

template <class T>
void test_type() {
  Kernels<T> k{};
  conv2d_kernels(k);
  const Algorithms algorithms = {ConvAlgorithm::naive, ConvAlgorithm::tiled};
  test_all(k, algorithms);
  test_no_images(k, algorithms);
  test_too_large(k);
  const Called mma = sizeof(T) < 8 ? Called::mma : Called::here;
  for (const bool takes : {false, true}) {
    direct_takes = takes;
    test_algorithm<T>(ConvAlgorithm::naive, Called::here);
    test_algorithm<T>(ConvAlgorithm::tiled, Called::here);
    test_algorithm<T>(ConvAlgorithm::mma, mma);
    test_algorithm<T>(ConvAlgorithm::direct, takes ? Called::direct : mma);
    test_algorithm<T>(ConvAlgorithm::automatic, sizeof(T) > 2 ? Called::here : takes ? Called::direct : Called::mma);
  }
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  test_type<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
