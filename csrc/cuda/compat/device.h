// The GPU half of cuda.h: one instruction a function, and the only <<<>>> of the project.
#pragma once

#include <cuda_runtime.h>

namespace tinyres {

// ---- launches -----------------------------------------------------------------------------------------------------

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("[" + std::string(op) + "] " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// What a launch can take along by value. Longer ones than 4096 are news of CUDA 12.1, from compute capability 7.0 on.
constexpr int MAX_PARAMETER_BYTES = CUDART_VERSION >= 12010 ? 32764 : 4096;

// Reports what the launch itself finds wrong; what goes wrong on the GPU later is reported by whoever waits for it.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem_bytes,
            cudaStream_t stream, Args&&... args) {
  if (smem_bytes > 48 * 1024)  // more than every GPU grants unasked
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes)));
  kernel<<<grid, block, smem_bytes, stream>>>(static_cast<Params>(args)...);
  check(op, cudaGetLastError());
  launches++;
}

// ---- shared memory ------------------------------------------------------------------------------------------------

template <class T>
struct Same {
  using Type = T;
};
#define SHARED(name, ...) __shared__ __align__(16) typename ::tinyres::Same<__VA_ARGS__>::Type name

class SmemArena {
 public:
  __device__ SmemArena() {
    extern __shared__ uint4 dynamic_shared_memory[];
    next_ = reinterpret_cast<char*>(dynamic_shared_memory);
  }
  template <class T>
  __device__ T* take(int n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (n * sizeof(T) + 15) / 16 * 16;
    return taken;
  }

 private:
  char* next_;
};

// ---- asynchronous copies from global to shared memory --------------------------------------------------------------

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ inline void cp_async16(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(dst)), "l"(src) : "memory");
}
// Zeros instead where src is not valid; nothing is then read.
__device__ inline void cp_async16_zfill(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async4(void* dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(dst)), "l"(src) : "memory");
}
__device__ inline void cp_async4_zfill(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>  // until at most the N youngest groups of this thread are on their way
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- tensor cores -------------------------------------------------------------------------------------------------

// Lane l passes the address of row l % 8 of matrix l / 8 (8x8, 16 bits an element); d[i] receives its two neighbouring
// elements of matrix i.
__device__ inline void ldmatrix_x4(u32 (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(u32 (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2(u32 (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2_trans(u32 (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8): bf16 products summed in float.
__device__ inline void mma_bf16_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16, 8) += a (16, 8) b (8, 8), the operands rounded by to_tf32.
__device__ inline void mma_tf32_1688(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (8, 8) += a (8, 4) b (4, 8): lane 4 g + p holds a[g][p], b[p][g], and d[g][2 p] and d[g][2 p + 1].
__device__ inline void mma_f64_884(double& d0, double& d1, double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d0), "+d"(d1)
               : "d"(a), "d"(b));
}

// To the nearest float with ten bits of mantissa, ties away from zero.
__device__ inline u32 to_tf32(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

}  // namespace tinyres
