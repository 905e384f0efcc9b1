// The convolution kernels, one thread an output and tiled; and who is called for which algorithm.
#include "conv2d_testing.h"
#include "cuda/conv2d.cu"

using namespace tinyres;

namespace {

int mma_calls = 0;

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

namespace {

template <class T>
void test_algorithm(ConvAlgorithm algorithm, bool on_tensor_cores) {
  Kernels<T> k{};
  conv2d_kernels(k);
  const Window s = window(1, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0);
  Array<T> x(4), w(1), y(4);
  Array<Wide<T>> dw(1);
  fill_integers(x, 1), fill_integers(w, 2);
  mma_calls = 0;
  k.conv2d_forward(y.data(), x.data(), w.data(), {}, s, algorithm);
  k.conv2d_backward_input(y.data(), x.data(), w.data(), s, algorithm, false);
  k.conv2d_backward_weight(dw.data(), y.data(), x.data(), s, algorithm);
  wait();
  CHECK(mma_calls == (on_tensor_cores ? 3 : 0));
}

template <class T>
void test_type() {
  Kernels<T> k{};
  conv2d_kernels(k);
  const Algorithms algorithms = {ConvAlgorithm::naive, ConvAlgorithm::tiled};
  test_all(k, algorithms);
  test_no_images(k, algorithms);
  test_too_large(k);
  test_algorithm<T>(ConvAlgorithm::tiled, false);
  test_algorithm<T>(ConvAlgorithm::mma, sizeof(T) < 8);
  test_algorithm<T>(ConvAlgorithm::automatic, sizeof(T) == 2);
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  test_type<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
