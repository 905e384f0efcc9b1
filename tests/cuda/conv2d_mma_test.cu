// The convolution kernels on tensor cores: every tile, with and without vectors.
#include "conv2d_testing.h"
#include "cuda/conv2d_mma.cu"

using namespace tinyres;

namespace {

// Of the tiles only the larger suit a GPU; here each gets problems of two tiles and a tail down and right. K and C are
// whole chunks of bf16 and of floats, but not whole fragments.
template <class T, class Tile>
void test_tile() {
  for (const Window& window :
       {window(2, 9, 9, 24, 136, 3, 3, 1, 1, 1, 1), window(3, 7, 9, 136, 24, 2, 2, 1, 2, 0, 1)}) {
    const Shape s = shape_of("test", window);
    Array<T> x(pixels_x(window) * s.C), w(taps(window) * s.C * s.K), dy(pixels_y(window) * s.K);
    fill_integers(x, 1), fill_integers(w, 2), fill_integers(dy, 3);
    const Sums want = sums_of(window, x, w, dy);
    const double ulps = sizeof(T) == 2 ? 0.5 : 0;
    check_run<T>(dy.size(), want.y, ulps, [&](T* y) {
      mma::launch_tile<T, Tile, false, mma::CHUNK<T>>("test", y, x.data(), w.data(), {}, s, i64(s.N) * s.P * s.Q, 1);
    });
    check_run<T>(x.size(), want.dx, ulps, [&](T* dx) {
      mma::launch_tile<T, Tile, true, mma::CHUNK<T>>("test", dx, dy.data(), w.data(), {}, s,
                                                     i64(s.N) * s.H * pieces(s.W, s.stride_w), s.stride_w);
    });
    check_run<float>(w.size(), want.dw, 0, [&](float* dw) {
      mma::launch_weight_gradient<T, Tile, mma::CHUNK<T>>("test", dw, dy.data(), x.data(), s);
    });
  }
}

template <class T>
void test_tiles() {
  test_tile<T, mma::Tile128x128>();
  test_tile<T, mma::Tile128x64>();
  test_tile<T, mma::Tile128x32>();
  test_tile<T, mma::Tile128x16>();
  test_tile<T, mma::Tile64x64>();
}

template <class Operand>
__global__ void place_chunks(int* offset) {
  SHARED(stage, float[Operand::SIZE]);
  offset[threadIdx.x] = int(Operand::place(stage, 0) - stage);
}

// Eight threads that write to shared memory at once meet all banks.
template <bool ACROSS>
void test_banks_of_copies() {
  Array<int> offset(128);
  go(place_chunks<mma::Operand<float, 64, ACROSS, 128>>, dim3(1), dim3(128), 0, offset.data());
  for (int first = 0; first < 128; first += 8) {
    u32 met = 0;
    for (int i = 0; i < 32; i++) met |= 1u << (offset[first + i / 4] + i % 4) % 32;
    CHECK(met == ~0u);
  }
}

// Which tile a product gets: rows, columns, parts, and what is expected.
void test_choice() {
  const struct {
    i64 rows;
    int columns;
    i64 parts;
    int height, width;
  } products[] = {
      {1 << 20, 16, 1, 128, 16},   {1 << 20, 17, 1, 128, 32},  {1 << 20, 64, 1, 128, 64},
      {1 << 20, 128, 1, 128, 128}, {1 << 20, 192, 1, 128, 64},  // the last 64 columns of 256 would be empty
      {33792, 128, 1, 128, 128},   {33664, 128, 1, 128, 64},   {1568, 512, 1, 64, 64},
      {64, 256, 1000, 64, 64},     {576, 64, 1000, 128, 64},   {1, 1, 1, 128, 16},
  };
  for (const auto& p : products)
    mma::with_tile(p.rows, p.columns, p.parts,
                   [&](auto tile) { CHECK(tile.HEIGHT == p.height && tile.WIDTH == p.width); });
}

template <class T>
Kernels<T> table() {
  Kernels<T> k{};
  k.conv2d_forward = [](T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Window& s, ConvAlgorithm) {
    mma::forward("test", y, x, w, epilogue, shape_of("test", s));
  };
  k.conv2d_backward_input = [](T* dx, const T* dy, const T* w, const Window& s, ConvAlgorithm, bool add) {
    mma::backward_input("test", dx, dy, w, shape_of("test", s), add);
  };
  k.conv2d_backward_weight = [](float* dw, const T* dy, const T* x, const Window& s, ConvAlgorithm) {
    mma::backward_weight("test", dw, dy, x, shape_of("test", s));
  };
  return k;
}

// Channels and filters in whole chunks of either type, so that nothing takes the way around.
template <class T>
void test_chunks() {
  const Window shapes[] = {
      //     N   H   W   C   K  R  S  stride pad
      window(2, 8, 9, 16, 16, 3, 3, 1, 1, 1, 1),    // five steps and more: each stage twice
      window(1, 9, 15, 8, 24, 3, 3, 2, 2, 1, 1),    // strided
      window(2, 9, 8, 16, 32, 1, 1, 2, 2, 0, 0),    // inputs without any tap
      window(1, 12, 11, 40, 72, 1, 1, 1, 1, 0, 0),  // a tail of columns and of depth
      window(1, 3, 2, 8, 16, 5, 4, 2, 1, 4, 3),     // window larger than the image
      window(5, 16, 16, 16, 8, 1, 1, 1, 1, 0, 0),   // parts of the pixels
  };
  unsigned seed = 0;
  for (const Window& s : shapes) test_shape(table<T>(), {ConvAlgorithm::mma}, s, seed += 2);  // even: aligned
}

template <class T>
void test_type() {
  test_tiles<T>();
  test_chunks<T>();
  test_all(table<T>(), {ConvAlgorithm::mma});
}

}  // namespace

int main() {
  test_choice();
  test_banks_of_copies<false>();
  test_banks_of_copies<true>();
  test_type<float>();
  test_type<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
