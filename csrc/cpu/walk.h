// Runs a packed plan: every thread takes a sample and carries its feature map through all blocks in cache, so
// that a skipped block is a branch not taken.
#pragma once

#include "../walk_batch.h"
#include "packed_plan.h"

namespace spnet::cpu {

// Samples are taken from a queue; threads for which none is left share the rows of those that others still
// compute. The output is the same to the last bit for every number of threads. May be called from several
// threads at once. is_bfloat16: x is, as the plan, else it is float32. Throws std::invalid_argument for
// negative sizes and null pointers.
void walk(const PackedPlan& plan, const WalkBatch& batch, bool is_bfloat16, int threads);

}  // namespace spnet::cpu
