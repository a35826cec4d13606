// The convolutions and other operations of a walk, for the level in use and the precision asked for.
#pragma once

#include "conv.h"
#include "fma_loop.h"
#include "walk_ops.h"
#include "winograd.h"

namespace spnet::cpu {

// What maps and convolution weights are stored as. Sums, pooled vectors, routers and the head are float32.
enum class Precision { float32, bfloat16 };

struct Kernels {
  const ConvFunctions& conv;
  const ConvFunctions& affine;
  const ConvFunctions *winograd2, *winograd4;  // null: there is none
  const WalkOps& ops;
  const FmaLoop& fma_loop;
};

// Whether this build, this processor and the level in use have bfloat16 dot products (AVX512_BF16).
bool has_bfloat16();

// Throws std::invalid_argument for bfloat16 without has_bfloat16().
Kernels kernels(Precision precision);

}  // namespace spnet::cpu
