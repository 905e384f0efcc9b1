// The convolution kernels on tensor cores: every tile, with and without vectors.
#include "conv2d_testing.h"
#include "cuda/conv2d.cu"
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

// Channels and filters in whole chunks of either type, so that nothing takes the way around.
template <class T>
void test_chunks() {
  Kernels<T> k{};
  conv2d_kernels(k);
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
  for (const Window& s : shapes) test_shape(k, {ConvAlgorithm::mma}, s, seed += 2);  // even: aligned
}

}  // namespace

int main() {
  test_choice();
  test_tiles<float>();
  test_tiles<bf16>();
  test_chunks<float>();
  test_chunks<bf16>();
  test_all<float>({ConvAlgorithm::mma});
  test_all<bf16>({ConvAlgorithm::mma});
  test_all<double>({ConvAlgorithm::mma});  // tiled in its stead
  CHECK(scratch_blocks == 0);
  return report();
}
