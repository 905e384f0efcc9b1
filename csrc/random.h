// Philox4x32-10, the one random number generator of the project (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). It has no state: word i of draw d under a key is a function of (key, d, i), so any thread can
// make any part of a draw. The same generator in NumPy: tinyres/backend/random.py.
//
// Functions are static, so that every object keeps its own copy, compiled for its own instruction set.
#pragma once

#include "kernels.h"

namespace tinyres::philox {

struct Block {
  std::uint32_t word[4];
};

// Words 4 * number .. 4 * number + 3 of a draw: ten rounds over the counter (number, draw).
TINYRES_ANYWHERE static inline Block block(std::uint64_t number, std::uint64_t key, std::uint64_t draw) {
  std::uint32_t c0 = std::uint32_t(number), c1 = std::uint32_t(number >> 32);
  std::uint32_t c2 = std::uint32_t(draw), c3 = std::uint32_t(draw >> 32);
  std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
  for (int round = 0; round < 10; round++) {
    const std::uint64_t a = std::uint64_t(0xD2511F53u) * c0, b = std::uint64_t(0xCD9E8D57u) * c2;
    c0 = std::uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = std::uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = std::uint32_t(b);
    c3 = std::uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Number i of a draw of doubles in [0, 1), of 53 bits: from words 2 i and 2 i + 1, as Python's uniform has it.
TINYRES_ANYWHERE static inline double uniform(i64 i, std::uint64_t key, std::uint64_t draw) {
  const Block bits = block(std::uint64_t(i) / 2, key, draw);
  const std::uint64_t high = i % 2 ? bits.word[2] : bits.word[0], low = i % 2 ? bits.word[3] : bits.word[1];
  return double((high >> 5 << 26) + (low >> 6)) * 0x1p-53;
}

// The first n words of a draw.
static inline void philox_fill(std::uint32_t* out, i64 n, std::uint64_t key, std::uint64_t draw) {
  for (i64 i = 0; i < n; i += 4) {
    const Block bits = block(std::uint64_t(i) / 4, key, draw);
    for (i64 j = 0; j < 4 && i + j < n; j++) out[i + j] = bits.word[j];
  }
}

}  // namespace tinyres::philox
