// dst[i] = dst[i] + src[i], or its ReLU, over contiguous elements.
#pragma once

#include <cstdint>

#include "level.h"

namespace spnet::cpu {

// dst and src must not overlap.
using AddRow = void (*)(void* dst, const void* src, int64_t elements);

struct AddRowFunctions {
  AddRow float32[2], float64[2], bfloat16[2], float16[2];  // [without, with ReLU]
};

#define SPNET_DECLARE(level)                      \
  namespace level {                               \
  extern const AddRowFunctions add_row_functions; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
