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

// A step's batch is that of `augment` with the moves drawn here, from the words of the generator.
template <class T>
void check_step(i64 step, int N, int batch_size, int steps_per_epoch, bool augmented, int H, int W, int C) {
  constexpr int L = 7, PADDING = 4;
  const std::uint64_t key = 0x0123456789abcdef;
  const int image = H * W * C;
  Array<std::uint8_t> images(L * image), flip(N);
  Array<i64> labels(L), order(batch_size * steps_per_epoch), index(N), got_labels(N, -1), counter(2);
  Array<std::int32_t> top(N), left(N);
  Array<float> mean(image), scale(C);
  fill_uniform(mean, 1);
  fill_uniform(scale, 2);
  for (int i = 0; i < images.size(); i++) images[i] = std::uint8_t(i * 37 + i / 256);
  for (int i = 0; i < L; i++) labels[i] = 100 - i;
  for (int i = 0; i < order.size(); i++) order[i] = i * 5 % L;
  Array<u32> words(6 * N + 4);
  philox::philox_fill(words.data(), words.size(), key, u64(step));
  const auto draw = [&](int i) {
    return (std::floor(words[2 * i] / 32.0) * 0x1p26 + std::floor(words[2 * i + 1] / 64.0)) * 0x1p-53;
  };
  for (int i = 0; i < 3 * N; i++) CHECK(philox::uniform(i, key, u64(step)) == draw(i));
  for (int n = 0; n < N; n++) {
    index[n] = order[int(step % steps_per_epoch) * batch_size + n];
    top[n] = augmented ? int(std::floor(draw(n) * (2 * PADDING + 1))) - PADDING : 0;
    left[n] = augmented ? int(std::floor(draw(N + n) * (2 * PADDING + 1))) - PADDING : 0;
    flip[n] = augmented && draw(2 * N + n) < 0.5;
  }
  Array<T> want(N * image), x(N * image);
  fill_nan(x);
  counter[0] = step;
  Kernels<T> k{};
  augment_kernels(k);
  k.augment(want.data(), images.data(), index.data(), top.data(), left.data(), flip.data(), mean.data(), scale.data(),
            N, H, W, C);
  const BatchPlan plan{N, batch_size, steps_per_epoch, augmented, PADDING, key};
  k.augment_step(x.data(), got_labels.data(), images.data(), labels.data(), order.data(), counter.data(), mean.data(),
                 scale.data(), plan, H, W, C);
  wait();
  CHECK(same_bits(x, want));
  CHECK(u64(counter[0]) == u64(step) + 1 && counter[1] == 0);
  for (int n = 0; n < N; n++) CHECK(got_labels[n] == labels[int(index[n])]);
}

template <class T>
void test_steps() {
  for (const bool augmented : {false, true}) {
    check_step<T>(0, 1, 1, 1, augmented, 1, 1, 1);
    check_step<T>(5, 6, 6, 3, augmented, 8, 9, 3);
    check_step<T>((i64(1) << 33) + 1, 3, 5, 2, augmented, 5, 4, 2);
    check_step<T>(INT64_MAX, 40, 40, 2, augmented, 2, 3, 1);
  }
}

}  // namespace

int main() {
  test_steps<float>();
  test_steps<double>();
  test_steps<bf16>();
  test<float>();
  test<double>();
  test<bf16>();
  CHECK(scratch_blocks == 0);
  return report();
}
