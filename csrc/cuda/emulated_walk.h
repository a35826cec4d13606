// The CUDA walk on the host, for tests where no GPU is: the kernel's source with emulated warps.
#pragma once

#include <cstdint>

#include "walk_kernel.h"
#include "walk_layout.h"

namespace spnet::cuda {

// `thread_blocks` of them at once, each warp a host thread. Throws std::runtime_error for a forbidden access
// to memory and for a race. Returns the number of bank conflicts of ldmatrix.
template <class Element>
int64_t emulate_walk(const WalkLayout& layout, const WalkBatch& batch, int thread_blocks);

}  // namespace spnet::cuda
