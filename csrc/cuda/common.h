// What every kernel file in this folder stands on: element types, grid sizes, the stream and scratch memory of the
// call in progress. How a kernel file is laid out: csrc/README.md.
#pragma once

#include "compat/cuda.h"
#include "kernels.h"

namespace tinyres {

// Kernels compute in Wide<T>, whatever they load and store.
__host__ __device__ inline float wide(float x) { return x; }
__host__ __device__ inline double wide(double x) { return x; }
__host__ __device__ inline float wide(bf16 x) { return to_float(x); }

template <class T>
__host__ __device__ inline T narrow(Wide<T> x) {
  return x;
}
template <>
__host__ __device__ inline bf16 narrow<bf16>(float x) {
  return from_float<bf16>(x);
}

__host__ __device__ constexpr i64 ceil_div(i64 n, i64 by) { return (n + by - 1) / by; }

// Whether i lies in [0, size).
__device__ inline bool within(int i, int size) { return unsigned(i) < unsigned(size); }

// ---- supplied by whoever calls the launchers: the bindings, or a test ---------------------------------------------

// The stream of the call in progress on this thread.
cudaStream_t current_stream();

void* scratch_take(std::size_t bytes);
void scratch_return(void* block) noexcept;

// Memory on the device for the length of a launcher's call, uninitialised, from the allocator that hands out every
// array. Given back while kernels that use it may still run: the next owner's run after them, on the same stream.
template <class T>
class Scratch {
 public:
  explicit Scratch(i64 n) : block_(scratch_take(std::size_t(n) * sizeof(T))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { scratch_return(block_); }
  T* get() const { return static_cast<T*>(block_); }

 private:
  void* block_;
};

// ---- the parts of the table, one a file ---------------------------------------------------------------------------

template <class T>
void elementwise_kernels(Kernels<T>& table);
template <class T>
void reduce_kernels(Kernels<T>& table);
template <class T>
void matmul_kernels(Kernels<T>& table);
template <class T>
void conv2d_kernels(Kernels<T>& table);
template <class T>
void conv3x3_kernels(Kernels<T>& table);
template <class T>
void block_output_kernels(Kernels<T>& table);
template <class T>
void batch_norm_kernels(Kernels<T>& table);
template <class T>
void pool_kernels(Kernels<T>& table);
template <class T>
void loss_kernels(Kernels<T>& table);
template <class T>
void head_kernels(Kernels<T>& table);
template <class T>
void sgd_kernels(Kernels<T>& table);
template <class T>
void augment_kernels(Kernels<T>& table);

}  // namespace tinyres
