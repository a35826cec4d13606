// Vectors of the level's register width, and the elements of feature maps. For sources compiled once per
// level (see level.h).
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "conv.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

// Keeps NaN.
inline Vec relu(Vec x) {
#ifdef __AVX512F__
  // The second where one is NaN. Without a mask GCC 12 warns of a value in its own header.
  return (Vec)_mm512_maskz_max_ps(0xffff, __m512{}, (__m512)x);
#else
  return x < Vec{} ? Vec{} : x;
#endif
}

// Zeros in place of all but the first n.
inline Vec first_lanes(Vec x, int64_t n) {
  using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < Ints{} + static_cast<int32_t>(n) ? x : Vec{};
}

// Convolutions read maps and weights in words of 4 bytes: one float32 channel, or two bfloat16 channels whose
// products are added by one instruction.
#ifndef SPNET_BFLOAT16
using Element = float;
constexpr int kWordChannels = 1;

inline Vec broadcast(const float* word) { return *word - Vec{}; }  // "+ 0" is no identity: -0 + 0 = 0
inline Vec add_products(Vec sum, Vec word, Vec weights) { return sum + word * weights; }
inline Vec load_elements(const float* from) { return load(from); }
inline void store_elements(float* to, Vec value) { store(to, value); }
#else
using Element = uint16_t;
constexpr int kWordChannels = 2;

inline Vec broadcast(const uint16_t* word) {
  int pair;
  std::memcpy(&pair, word, sizeof(pair));
  return (Vec)_mm512_set1_epi32(pair);
}

inline Vec add_products(Vec sum, Vec word, Vec weights) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)word, (__m512bh)weights);
}

inline Vec load_elements(const uint16_t* from) {
  using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
  __m256i halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Vec)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
}

inline void store_elements(uint16_t* to, Vec value) {
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &halves, sizeof(halves));
}
#endif

// The first pixel of a row, its channels of one register.
inline Element* at(const MapView& map, int64_t vector, int64_t row) {
  const int64_t channel = vector * kLanes;
  return static_cast<Element*>(map.data) + channel / map.lanes * map.plane + row * map.row +
         channel % map.lanes;
}

}  // namespace
}  // namespace spnet::cpu::SPNET_LEVEL
