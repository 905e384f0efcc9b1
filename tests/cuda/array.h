// Memory that host and kernels both see, for tests that run with either compiler: plain memory, or managed memory.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda.h"

template <class T>
class Array {
 public:
  explicit Array(int n, T value = T()) : n_(n) {
#ifdef __CUDACC__
    tinyres::check("Array", cudaMallocManaged(&data_, n * sizeof(T)));
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
