// bfloat16 as storage: the upper half of a float. It has no arithmetic; conversions: cuda/compat/bf16.h.
#pragma once

#include <cstdint>

namespace tinyres {

struct bf16 {
  std::uint16_t bits;
};

}  // namespace tinyres
