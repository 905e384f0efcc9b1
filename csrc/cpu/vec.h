// Vectors of the instruction set that this object is compiled for. Each kernel file of this folder is compiled once
// per set (baseline, AVX2, AVX-512), in a namespace of its own named by TINYRES_TARGET; the width of a vector is a
// macro of the object, because vectors wider than the machine's registers go through the stack (17 times slower).
// No standard-library templates in these files: the linker might keep an AVX-512 copy for everyone.
#pragma once

#include <cstring>

#include "../kernels.h"
#include "../memory.h"
#include "../parallel.h"

#ifndef TINYRES_TARGET
#error "compile with -DTINYRES_TARGET=baseline|avx2|avx512 and -DTINYRES_VECTOR_BYTES=16|32|64"
#endif

namespace tinyres::TINYRES_TARGET {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(TINYRES_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int LANES = TINYRES_VECTOR_BYTES / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // not 0 + x, which would lose the sign of -0
}

// The first n <= LANES elements; the others are zero. A plain load where the compiler sees that n is LANES.
template <class T>
inline Vec<T> load_first(const T* p, i64 n) {
  if (n == LANES<T>) return load(p);
  Vec<T> v{};
  __builtin_memcpy(&v, p, std::size_t(n) * sizeof(T));
  return v;
}

template <class T>
inline void store_first(T* p, Vec<T> v, i64 n) {
  if (n == LANES<T>) return store(p, v);
  __builtin_memcpy(p, &v, std::size_t(n) * sizeof(T));
}

template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Cuts n elements into vectors: body(i, LANES) for the whole ones, body(i, rest) for what is left.
template <class T, class F>
inline void for_vectors(i64 n, const F& body) {
  i64 i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) body(i, i64(LANES<T>));
  if (i < n) body(i, n - i);
}

template <class F>
inline void parallel_for(i64 chunks, const F& body) {
  parallel_run(
      chunks, [](void* context, i64 chunk) { (*static_cast<const F*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Elements of a part of work: enough memory traffic to pay for handing it to a thread.
constexpr i64 PART = 1 << 14;

// How many items of that many elements make up a part.
inline i64 items_per_part(i64 elements) { return elements > 0 && elements < PART ? PART / elements : 1; }

// Splits n items into parts of `grain` items and runs body(begin, end) for each.
template <class F>
inline void parallel_ranges(i64 n, i64 grain, const F& body) {
  parallel_for((n + grain - 1) / grain, [&](i64 part) {
    const i64 begin = part * grain, end = begin + grain < n ? begin + grain : n;
    body(begin, end);
  });
}

}  // namespace tinyres::TINYRES_TARGET
