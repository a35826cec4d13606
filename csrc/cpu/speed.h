// Measurements of the processor and of the convolution, for benchmarks.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace spnet::cpu {

// Each of `threads` threads runs for about `seconds`; the result is the sum of what they reached. Operations
// of a convolution are those of the direct one, also where Winograd's needs fewer.
double fma_gflops(int threads, double seconds, Precision precision);
double conv_gflops(int64_t channels, int64_t height, int64_t width, int threads, double seconds,
                   Precision precision);

}  // namespace spnet::cpu
