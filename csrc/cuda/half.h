// The two 16-bit floats on the host. The bits of a number are an uint16_t.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/bfloat16.h"

namespace spnet::cuda {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Float16 {
  static constexpr const char* kName = "float16";

  static float widen(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f));
  }

  // To nearest even.
  static uint16_t round(float value) {
    const uint32_t word = bits<uint32_t>(value), sign = word >> 16 & 0x8000u, rest = word & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fff;
    if (rest >= 0x477ff000u) return sign | 0x7c00;
    // Half a unit of float at 0.5 is half of the smallest half: the addition rounds.
    if (rest < 0x38800000u) return sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u);
    return sign | ((rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13);
  }
};

struct BFloat16 {
  static constexpr const char* kName = "bfloat16";

  static float widen(uint16_t half) { return bits<float>(uint32_t{half} << 16); }
  static uint16_t round(float value) { return cpu::to_bfloat16(value); }
};

}  // namespace spnet::cuda
