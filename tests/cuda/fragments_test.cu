// Products of shared tiles by fragments, against plain loops; and the banks that their loads ask.
#include <type_traits>

#include "cuda/fragments.h"
#include "kernel_testing.h"

using namespace tinyres;

namespace {

constexpr int STEPS = 3;  // along k

template <class T>
__device__ T element(float x) {
  if constexpr (std::is_same_v<T, tf32>)
    return tf32{to_tf32(x)};
  else
    return narrow<T>(x);
}

// y (16, 16) = a (16, k) b (k, 16), from tiles that lie along k or across it.
template <class T>
__global__ void multiply(float* y, const float* a, const float* b, bool a_across, bool b_across) {
  using F = Fragment<T>;
  constexpr int K = STEPS * F::DEPTH, LONG = K + F::PADDING, WIDE = F::LINES + F::ACROSS_PADDING;
  SHARED(a_tile, T[16 * LONG + K * WIDE]);
  SHARED(b_tile, T[16 * LONG + K * WIDE]);
  for (int i = lane(); i < 16 * K; i += WARP) {
    const int line = i / K, k = i % K;
    a_tile[a_across ? k * WIDE + line : line * LONG + k] = element<T>(a[line * K + k]);
    b_tile[b_across ? k * WIDE + line : line * LONG + k] = element<T>(b[k * 16 + line]);
  }
  __syncwarp();
  std::conditional_t<sizeof(T) == 8, double, float> sum[2][4] = {};
  for (int k = 0; k < K; k += F::DEPTH) {
    F rows, columns;
    const int along = F::own_line() * LONG + F::own_k() + k, across = (F::across_k() + k) * WIDE + F::across_line();
    a_across ? rows.load_across(&a_tile[across], WIDE) : rows.load(&a_tile[along], 8 * LONG);
    b_across ? columns.load_across(&b_tile[across], WIDE) : columns.load(&b_tile[along], 8 * LONG);
    multiply_add(sum, rows, columns);
  }
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 4; i++) y[sum_row(i) * 16 + sum_column(half, i)] = float(sum[half][i]);
}

template <class T>
void test_product() {
  constexpr int K = STEPS * Fragment<T>::DEPTH;
  Array<float> a(16 * K), b(K * 16), y(16 * 16);
  for (const bool fractions : {false, true}) {
    fractions ? fill_uniform(a, 1) : fill_integers(a, 1);
    fractions ? fill_uniform(b, 2) : fill_integers(b, 2);
    std::vector<double> want(16 * 16);
    // Operands as the tensor cores see them, so that what is left to differ is the order of the sum.
    const auto seen = [](float x) {
      if (sizeof(T) == 8) return value(x);
      if (sizeof(T) == 2) return value(rounded<bf16>(x));
      u32 bits;
      std::memcpy(&bits, &x, sizeof bits);
      bits = (bits + 0x1000) & ~0x1fffu;
      std::memcpy(&x, &bits, sizeof bits);
      return value(x);
    };
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++)
        for (int k = 0; k < K; k++) want[std::size_t(i * 16 + j)] += seen(a[i * K + k]) * seen(b[k * 16 + j]);
    for (const bool a_across : {false, true})
      for (const bool b_across : {false, true}) {
        fill_nan(y);
        go(multiply<T>, dim3(1), dim3(WARP), 0, y.data(), a.data(), b.data(), a_across, b_across);
        CHECK(close(y, want, fractions ? 8 : 0));
      }
  }
}

template <class T>
__global__ void offsets(int* along, int* across, int along_pitch, int across_pitch) {
  using F = Fragment<T>;
  along[lane()] = F::own_line() * along_pitch + F::own_k();
  across[lane()] = F::across_k() * across_pitch + F::across_line();
}

// Whether the words that `lanes` lanes from `first` on read, `words` each, lie in different banks.
template <class T>
bool different_banks(Array<int>& offset, int first, int lanes, int words) {
  u32 met = 0;
  for (int i = 0; i < lanes * words; i++)
    met |= 1u << (offset[first + i / words] * int(sizeof(T)) / 4 + i % words) % 32;
  return met == ~0u;
}

template <class T>
void test_banks() {
  Array<int> along(WARP), across(WARP);
  for (int n = 16; n <= 160; n += 16) {
    go(offsets<T>, dim3(1), dim3(WARP), 0, along.data(), across.data(), n + Fragment<T>::PADDING,
       n + Fragment<T>::ACROSS_PADDING);
    for (int first = 0; first < WARP; first += 8) CHECK(different_banks<T>(along, first, 8, 4));
    if (sizeof(T) == 4) CHECK(different_banks<T>(across, 0, 32, 1));
    for (int first = 0; first < WARP && sizeof(T) == 2; first += 8) CHECK(different_banks<T>(across, first, 8, 4));
  }
}

template <class T>
void test_all() {
  test_product<T>();
  test_banks<T>();
}

}  // namespace

int main() {
  test_all<bf16>();
  test_all<float>();
  test_all<tf32>();
  test_product<double>();
  return report();
}
