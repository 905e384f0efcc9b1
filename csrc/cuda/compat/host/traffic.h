// What each launch reads and writes of global memory, counted (benchmarks/traffic.py). In a build for this
// (TINYRES_TRAFFIC) the kernels carry ThreadSanitizer's instrumentation, a call before every access to memory, but are
// linked to traffic.cpp instead of that sanitizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_names.h"

namespace tinyres::emulation::traffic {

// By all threads of a launch together. `asked` adds up every access: what a machine without caches would move. The
// others count a sector of 32 bytes, the least that a GPU's memory moves, once however often it is met: what is left
// with a perfect cache, in arrays that were marked and in all others.
struct Bytes {
  std::uint64_t asked = 0, marked = 0, others = 0;
};

struct Launch {
  std::string op;
  std::uintptr_t kernel;  // as an offset into the library or program: what nm names
  dim3 grid, block;
  Bytes read, written;
};

// A launch in progress. One at a time: not for several threads of the system.
struct Counting {
  Counting(const char* op, const void* kernel, dim3 grid, dim3 block);
  ~Counting();
};

// From now on the array at p is marked, or not. A new array at the same place must be marked anew.
void mark(const void* p, std::size_t bytes, bool marked);

// The launches since the last call.
std::vector<Launch> take();

}  // namespace tinyres::emulation::traffic
