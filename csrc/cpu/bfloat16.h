#pragma once

#include <cstdint>
#include <cstring>

namespace spnet::cpu {

// To nearest even; every NaN becomes the quiet one.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace spnet::cpu
