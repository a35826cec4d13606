// Compiled once per level (see level.h).
#include "fma_loop.h"

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

// Enough to hide the latency of two units; few enough for 16 registers.
constexpr int kChains = 12;

#ifndef SPNET_BFLOAT16
inline Vec step(Vec acc, Vec a, Vec b) { return acc * a + b; }
#else
inline Vec step(Vec acc, Vec a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

float run(int64_t repetitions) {
  Vec acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = Vec{} + static_cast<float>(i);
  Vec factor = Vec{} + 0.999f, term = Vec{} + 0.001f;
  // Unknown to the compiler, so that it computes every step.
  __asm__ volatile("" : "+m"(factor), "+m"(term));
  const Vec a = factor, b = term;
  for (int64_t n = 0; n < repetitions; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i], a, b);
  }
  Vec sum{};
  for (int i = 0; i < kChains; ++i) sum += acc[i];
  return sum[0];
}

}  // namespace

const FmaLoop fma_loop = {2.0 * kWordChannels * kChains * kLanes, run};

}  // namespace spnet::cpu::SPNET_LEVEL
