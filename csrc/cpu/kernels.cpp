#include "kernels.h"

#include <stdexcept>
#include <string>

namespace spnet::cpu {

bool has_bfloat16() {
#ifdef SPNET_BFLOAT16_KERNELS
  return level() >= Level::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Kernels kernels(Precision precision) {
  if (precision == Precision::bfloat16) {
    if (!has_bfloat16()) {
      throw std::invalid_argument(
          std::string("precision: bfloat16 needs a processor with AVX512_BF16, a compiler that knows it and "
                      "level avx512 or above, got level ") +
          level_name(level()));
    }
#ifdef SPNET_AMX_KERNELS
    if (level() == Level::amx) {
      return {
          amx_bf16::conv_functions, avx512_bf16::affine_functions, nullptr, nullptr, avx512_bf16::walk_ops,
          amx_bf16::fma_loop};
    }
#endif
#ifdef SPNET_BFLOAT16_KERNELS
    return {avx512_bf16::conv_functions, avx512_bf16::affine_functions, nullptr, nullptr,
            avx512_bf16::walk_ops,       avx512_bf16::fma_loop};
#endif
  }
#define SPNET_KERNELS(level)                                                          \
  {level::conv_functions,       level::affine_functions, &level::winograd2_functions, \
   &level::winograd4_functions, level::walk_ops,         level::fma_loop},
  const Kernels of_level[] = {SPNET_FOR_EACH_LEVEL(SPNET_KERNELS)};
#undef SPNET_KERNELS
  return of_level[static_cast<int>(level())];
}

}  // namespace spnet::cpu
