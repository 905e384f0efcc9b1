// Joining what the threads of a block hold: sums, maxima, statistics.
#pragma once

#include "common.h"

namespace tinyres {

constexpr int MAX_JOINED = 256;  // threads of a block that joins

// The value of the lane whose number differs in the bits of `offset`: any struct of 4-byte words.
template <class Value>
__device__ Value shuffle_xor(const Value& value, int offset) {
  constexpr int WORDS = sizeof(Value) / 4;
  static_assert(sizeof(Value) % 4 == 0, "a warp shuffles words of 4 bytes");
  u32 words[WORDS];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (int i = 0; i < WORDS; i++) words[i] = __shfl_xor_sync(~0u, words[i], offset);
  Value other;
  memcpy(&other, words, sizeof other);
  return other;
}

// Joins the values of `depth` threads that lie `stride` apart, by halves: those in different warps through shared
// memory, then those of one warp by shuffles. Both are powers of two; all threads of the block take part, each group
// of stride * depth neighbours for itself. join(a, b) is asked in the order of threads, so that all threads of a group
// get the same bits.
template <class Value, class Join>
__device__ Value join_threads(Value value, int stride, int depth, const Join& join) {
  SHARED(values, Value[MAX_JOINED]);
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  int offset = stride * depth / 2;
  for (; offset >= max(stride, WARP); offset /= 2) {
    __syncthreads();  // whoever still reads the last values
    values[thread] = value;
    __syncthreads();
    const Value other = values[thread ^ offset];
    value = thread & offset ? join(other, value) : join(value, other);
  }
  for (; offset >= stride; offset /= 2) {
    const Value other = shuffle_xor(value, offset);
    value = thread & offset ? join(other, value) : join(value, other);
  }
  return value;
}

}  // namespace tinyres
