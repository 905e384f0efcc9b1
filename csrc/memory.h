// The allocator of the host: every activation, gradient and scratch buffer comes from here and returns here.
// Blocks are kept by size and handed out again, so a training loop in its steady state asks the system for nothing.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace tinyres {

constexpr std::size_t ALIGNMENT = 64;

void* memory_take(std::size_t bytes);  // 64-byte aligned, contents undefined; throws a std::bad_alloc that tells sizes
void memory_return(void* block) noexcept;

struct MemoryStats {
  i64 system_allocations;                           // blocks asked from the system since the start
  i64 taken;                                        // blocks handed out since the start
  i64 bytes_in_use, peak_bytes_in_use, bytes_held;  // bytes_held: in use or waiting for reuse
};
MemoryStats memory_stats();
void memory_reset_peak();
void memory_release();  // gives every waiting block back to the system

// A scratch buffer of n elements for the life of the object. Each object file has its own copy of the code, as one
// compiled for AVX-512 must not serve the others.
namespace {
template <class T>
class Scratch {
 public:
  explicit Scratch(i64 n) : data_(static_cast<T*>(memory_take(static_cast<std::size_t>(n) * sizeof(T)))) {}
  ~Scratch() { memory_return(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](i64 i) const { return data_[i]; }

 private:
  T* data_;
};
}  // namespace

}  // namespace tinyres
