// What the arithmetic of a level reaches at most, to compare its convolutions with.
#pragma once

#include <cstdint>

#include "level.h"

namespace spnet::cpu {

struct FmaLoop {
  double flops;  // of one repetition
  float (*run)(int64_t repetitions);
};

#define SPNET_DECLARE(level)     \
  namespace level {              \
  extern const FmaLoop fma_loop; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
SPNET_DECLARE(avx512_bf16)
SPNET_DECLARE(amx_bf16)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
