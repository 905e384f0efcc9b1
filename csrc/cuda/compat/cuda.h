// The only header that a CUDA source here includes besides our own. nvcc gets a thin layer over PTX (device.h); g++,
// as in `g++ -x c++ kernel.cu`, gets CUDA's names and an emulation of the machine beneath them (host.h).
//
// What both halves offer, and all that kernels may use of CUDA beside plain C++:
//   launch(op, kernel, grid, block, smem_bytes, stream, args...)      kernel parameters by value, up to
//                                         MAX_PARAMETER_BYTES in all, into the stack of each emulated thread; throws,
//                                         naming the op
//   SHARED(name, float[ROWS][33]);                                    a static shared array; 16-byte aligned
//   SmemArena arena; bf16* a = arena.take<bf16>(n);                   dynamic shared memory; 16-byte aligned
//   cp_async16, cp_async4, ..._zfill(dst, src, valid), cp_async_commit(), cp_async_wait<N>()
//   ldmatrix_x2, ldmatrix_x4, ..._trans, mma_bf16_16816, mma_tf32_1688, mma_f64_884, to_tf32
//   bf16, to_float(x), from_float<T>(x), WARP
//   threadIdx ... gridDim, __syncthreads, __syncwarp, __shfl_{,up_,down_,xor_}sync, __ballot_sync, __any_sync,
//   __all_sync, atomicAdd, atomicMax, atomicMin, atomicCAS, atomicExch, __threadfence
//
// Rules that the emulation enforces: all threads of a block meet at the same __syncthreads, all lanes of a mask at the
// same collective, none returns while others wait for it, every asynchronous copy is waited for. Rules that it cannot
// enforce: no waiting in a loop for another thread's write, no raw `__shared__` or `extern __shared__`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tinyres {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr int WARP = 32;  // CUDA's warpSize is no constant to the compiler

inline thread_local u64 launches = 0;  // how many this thread has asked for, captured ones included

}  // namespace tinyres

#ifndef __CUDACC__
#include "host/cuda_names.h"
#endif

#include "bf16.h"

#ifdef __CUDACC__
#include "device.h"
#else
#include "host.h"
#endif
