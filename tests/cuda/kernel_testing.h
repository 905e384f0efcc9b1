// For the tests of the kernels of one file: what the launchers ask of their caller, and arrays filled and compared.
//
//     #include "cuda/relu.cu"
//     #include "kernel_testing.h"
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/common.h"
#include "testing.h"

namespace tinyres {

inline int scratch_blocks = 0;  // handed out and not given back

cudaStream_t current_stream() { return nullptr; }

void* scratch_take(std::size_t bytes) {
  void* block = nullptr;
#ifdef __CUDACC__
  check("Scratch", cudaMallocManaged(&block, bytes + 1));
#else
  block = std::malloc(bytes + 1);
#endif
  std::memset(block, 0xff, bytes);  // NaN, so that reading before writing shows
  scratch_blocks++;
  return block;
}

void scratch_return(void* block) noexcept {
  scratch_blocks--;
#ifdef __CUDACC__
  cudaFree(block);
#else
  std::free(block);
#endif
}

template <class T>
constexpr const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "float" : "double";
}

// The step from 1 to the next larger number.
template <class T>
constexpr double epsilon() {
  return sizeof(T) == 2 ? 0x1p-7 : sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
}

inline double value(float x) { return x; }
inline double value(double x) { return x; }
inline double value(bf16 x) { return to_float(x); }

template <class T>
T rounded(double x) {
  return narrow<T>(Wide<T>(x));
}

// Numbers in [-1, 1), as T holds them; the same for the same seed.
template <class T>
void fill_uniform(Array<T>& array, unsigned seed) {
  u64 state = seed * 0x9E3779B97F4A7C15u + 1;
  for (int i = 0; i < array.size(); i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    array[i] = rounded<T>(double(state >> 40) * 0x1p-23 - 1);
  }
}

// Integers from -2 to 2: sums of their products are exact, also in bf16 while they stay under 256.
template <class T>
void fill_integers(Array<T>& array, unsigned seed) {
  fill_uniform(array, seed);
  for (int i = 0; i < array.size(); i++) array[i] = rounded<T>(std::floor(value(array[i]) * 2.5 + 0.5));
}

template <class T>
void fill_nan(Array<T>& array) {
  std::memset(static_cast<void*>(array.data()), 0xff, std::size_t(array.size()) * sizeof(T));
}

using Doubles = std::vector<double>;

// Whether got is want to within `ulps` steps of T at the size of the largest element; NaN only where NaN is wanted.
template <class T>
bool close(Array<T>& got, const Doubles& want, double ulps) {
  double scale = 1;
  for (const double w : want) scale = std::isfinite(w) && std::fabs(w) > scale ? std::fabs(w) : scale;
  if (got.size() != int(want.size())) return false;
  for (int i = 0; i < got.size(); i++) {
    const double g = value(got[i]), w = want[std::size_t(i)];
    const bool same = g == w || (std::isnan(g) && std::isnan(w));
    if (same || std::fabs(g - w) <= ulps * epsilon<T>() * scale) continue;
    std::printf("%s element %d: got %.9g, want %.9g\n", type_name<T>(), i, g, w);
    return false;
  }
  return true;
}

template <class T>
bool same_bits(Array<T>& a, Array<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(T)) == 0;
}

// Runs a second time in another order of threads; the bits must be the same.
template <class Run>
void in_another_order(const Run& run) {
  const char* schedule = std::getenv("TINYRES_SCHEDULE");
  const std::string before = schedule ? schedule : "forward";
  setenv("TINYRES_SCHEDULE", "random:42", 1);
  run();
  setenv("TINYRES_SCHEDULE", before.c_str(), 1);
  wait();
}

}  // namespace tinyres
