// Runs a packed plan: every thread takes a sample and carries its feature map through all blocks in cache, so
// that a skipped block is a branch not taken.
#pragma once

#include <cstdint>

#include "packed_plan.h"

namespace spnet::cpu {

struct WalkBatch {
  const void* x;     // float32, or bfloat16 where the plan is
  bool is_bfloat16;  // x is
  int64_t size;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
  const uint8_t* paths;  // [size, blocks], non-zero: executes; null: the routers decide
  float threshold;
  float* logits;       // [size, classes]
  uint8_t* decisions;  // [size, blocks], 1 where a block was executed
};

// Samples are taken from a queue; threads for which none is left share the rows of those that others still
// compute. The output is the same to the last bit for every number of threads. May be called from several
// threads at once. Throws std::invalid_argument for negative sizes and null pointers.
void walk(const PackedPlan& plan, const WalkBatch& batch, int threads);

}  // namespace spnet::cpu
