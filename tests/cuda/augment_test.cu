// Images normalised, flipped and moved, bit for bit against the definition.
#include <limits>

#include "cuda/augment.cu"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

struct Move {
  i64 index;
  std::int32_t top, left;
  bool flip;
};

template <class T>
void check(const std::vector<Move>& moves, int L, int H, int W, int C) {
  const int N = int(moves.size()), image = H * W * C;
  Array<std::uint8_t> images(L * image), flip(N);
  Array<i64> index(N);
  Array<std::int32_t> top(N), left(N);
  Array<float> mean(image), scale(C);
  fill_uniform(mean, 1);
  fill_uniform(scale, 2);
  for (int i = 0; i < image; i++) mean[i] = 128 + 50 * mean[i];
  for (int i = 0; i < images.size(); i++) images[i] = std::uint8_t(i * 37 + i / 256);
  for (int n = 0; n < N; n++) {
    const Move& m = moves[std::size_t(n)];
    index[n] = m.index, top[n] = m.top, left[n] = m.left, flip[n] = m.flip ? 255 : 0;
  }
  Array<T> want(N * image), x(N * image), again(N * image);
  int at = 0;
  for (const Move& m : moves)
    for (int h = 0; h < H; h++)
      for (int w = 0; w < W; w++)
        for (int c = 0; c < C; c++, at++) {
          const i64 row = h + i64(m.top), moved = w + i64(m.left);
          want[at] = rounded<T>(0);
          if (row < 0 || row >= H || moved < 0 || moved >= W) continue;
          const int from = int((row * W + (m.flip ? W - 1 - moved : moved)) * C) + c;
          const Wide<T> pixel = images[int(m.index) * image + from];
          want[at] = narrow<T>((pixel - Wide<T>(mean[from])) * Wide<T>(scale[c]));
        }
  fill_nan(x);
  fill_nan(again);
  Kernels<T> k{};
  augment_kernels(k);
  for (Array<T>* y : {&x, &again})
    k.augment(y->data(), images.data(), index.data(), top.data(), left.data(), flip.data(), mean.data(), scale.data(),
              N, H, W, C);
  wait();
  CHECK(same_bits(x, want));
  CHECK(same_bits(x, again));
}

template <class T>
void test() {
  const std::int32_t lowest = std::numeric_limits<std::int32_t>::min(), highest = -(lowest + 1);
  check<T>({{0, 0, 0, false}}, 1, 1, 1, 1);
  check<T>({{2, 0, 0, false}, {0, 0, 0, true}, {2, 4, -4, false}, {1, -3, 2, true}, {4, 1, 1, false}}, 5, 32, 32, 3);
  std::vector<Move> moves;
  for (const std::int32_t top : {-6, -5, -1, 0, 2, 5})
    for (const std::int32_t left : {-7, -6, -2, 0, 1, 7})
      moves.push_back({i64(moves.size() % 3), top, left, moves.size() % 2 == 1});
  check<T>(moves, 3, 5, 7, 2);
  check<T>({{0, lowest, 0, false}, {0, 0, lowest, true}, {0, highest, 0, false}, {0, 0, highest, true}}, 1, 3, 4, 5);
  Kernels<T> k{};
  augment_kernels(k);
  const auto of_nothing = [&](i64 N) {
    k.augment(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, N, 1 << 8, 1 << 7, 1);
  };
  of_nothing(0);
  bool thrown = false;
  try {
    of_nothing(1 << 16);  // 2**31 elements
  } catch (const std::invalid_argument& error) {
    thrown = std::string(error.what()).find("[augment] x must") == 0;
  }
  CHECK(thrown);
}

}  // namespace

int main() {
  test<float>();
  test<double>();
  test<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
