// For test programs that run with either compiler.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "cuda/compat/cuda.h"

inline int failures = 0;

#define CHECK(...) check_that(__VA_ARGS__, #__VA_ARGS__, __FILE__, __LINE__)

inline void check_that(bool holds, const char* text, const char* file, int line) {
  if (holds) return;
  if (++failures <= 20) std::printf("%s:%d: %s\n", file, line, text);
}

inline int report() {  // what main returns
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Memory that the program and its kernels both see.
template <class T>
class Array {
 public:
  explicit Array(int n, T value = T()) : n_(n) {
#ifdef __CUDACC__
    tinyres::check("Array", cudaMallocManaged(&data_, (n + 1) * sizeof(T)));
#else
    data_ = static_cast<T*>(std::malloc(n * sizeof(T)));
#endif
    for (int i = 0; i < n; i++) data_[i] = value;
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  int size() const { return n_; }
  T* data() { return data_; }
  T& operator[](int i) { return data_[i]; }

 private:
  int n_;
  T* data_ = nullptr;
};

// Waits for the kernels launched so far; what went wrong in them is thrown here.
inline void wait() {
#ifdef __CUDACC__
  tinyres::check("wait", cudaDeviceSynchronize());
#endif
}

template <class Kernel, class... Args>
void go(Kernel* kernel, dim3 grid, dim3 block, std::size_t smem_bytes, Args... args) {
  tinyres::launch("test", kernel, grid, block, smem_bytes, nullptr, args...);
  wait();
}
