// Compiled once per level (see level.h).
#include "add_row.h"

#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace spnet::cpu::SPNET_LEVEL {
namespace {

// ReLU keeps NaN and -0, like PyTorch's. The restrict pointers are parameters of plain loops, so that the
// compiler vectorises them for each level.
template <class T, bool relu>
void add_floats(T* __restrict dst, const T* __restrict src, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) {
    const T sum = dst[i] + src[i];
    dst[i] = relu && sum < 0 ? 0 : sum;
  }
}

template <class T, bool relu>
void add_row(void* dst, const void* src, int64_t elements) {
  add_floats<T, relu>(static_cast<T*>(dst), static_cast<const T*>(src), elements);
}

// Halves are computed on vectors of the level's register width: from plain loops gcc 12 made branches for
// float16 (0.8 GB/s) and long shuffles for bfloat16.
#ifdef __AVX2__
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using Words = uint32_t __attribute__((vector_size(kVectorBytes)));
using Floats = float __attribute__((vector_size(kVectorBytes)));

template <class Vector>
inline Vector load(const uint16_t* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class Vector>
inline void store(uint16_t* to, Vector value) {
  std::memcpy(to, &value, sizeof(value));
}

template <class Mask>
inline Words choose(Mask mask, Words yes, Words no) {
  return ((Words)mask & yes) | (~(Words)mask & no);
}

// ReLU is taken before rounding, which is the same: a sum of two halves is exact where it is subnormal, so no
// negative sum rounds to zero.
template <bool relu>
inline Floats add(Floats a, Floats b) {
  const Floats sum = a + b;
  return relu ? (Floats)(~(Words)(sum < 0.f) & (Words)sum) : sum;
}

// A word holds two numbers; each becomes a float in its place, so that nothing has to be widened and packed.
struct BFloat16 {
  static constexpr int kLanes = kVectorBytes / 2;

  static Floats low(Words pair) { return (Floats)(pair << 16); }
  static Floats high(Words pair) { return (Floats)(pair & 0xffff0000u); }

  // The upper half of each word is the number rounded to nearest even.
  static Words round(Floats value) {
    const Words bits = (Words)value;
    const Words nearest_even = bits + 0x7fffu + ((bits >> 16) & 1u);
    return choose(value != value, Words{} + 0x7fc00000u, nearest_even);
  }

  template <bool relu>
  static void add_lanes(uint16_t* dst, const uint16_t* src) {
    const Words a = load<Words>(dst), b = load<Words>(src);
    const Words low_sums = round(add<relu>(low(a), low(b)));
    const Words high_sums = round(add<relu>(high(a), high(b)));
    store(dst, (low_sums >> 16) | (high_sums & 0xffff0000u));
  }
};

struct Float16 {
  static constexpr int kLanes = kVectorBytes / 4;
  using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

#ifdef __F16C__
  static Floats widen(Halves value) { return (Floats)_mm256_cvtph_ps((__m128i)value); }
  static Halves round(Floats value) {
    return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  }
#else
  // The same in integer arithmetic. No subnormal float is made on the way, so the result does not change
  // where the host program flushes those to zero.
  static Floats widen(Halves value) {
    const Words words = __builtin_convertvector(value, Words);
    const Words sign = (words & 0x8000u) << 16;
    const Words magnitude = words & 0x7fffu;
    // Normal halves: exponent and fraction move to their places, and the exponent's bias grows by 112.
    const Words normal = (magnitude << 13) + (112u << 23);
    // Subnormal halves are multiples of 2^-24, the unit in the last place of 0.5.
    const Words subnormal = (Words)((Floats)(magnitude | 0x3f000000u) - 0.5f);
    Words bits = choose(magnitude < 0x0400u, subnormal, normal);
    bits |= (Words)(magnitude >= 0x7c00u) & 0x7f800000u;  // infinity, NaN
    return (Floats)(bits | sign);
  }

  static Halves round(Floats value) {
    const Words sign = (Words)value & 0x80000000u;
    const Words magnitude = (Words)value & 0x7fffffffu;
    // Normal halves: round the 13 bits that are lost to nearest even, then lower the exponent's bias by 112.
    const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Subnormal halves: the addition to 0.5 rounds to a multiple of 2^-24.
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    Words half = choose(magnitude < 0x38800000u, subnormal, normal);
    half = choose(magnitude >= 0x477ff000u, Words{} + 0x7c00u, half);  // 65520 and more round to infinity
    half = choose(magnitude > 0x7f800000u, Words{} + 0x7e00u, half);   // NaN
    return __builtin_convertvector(half | (sign >> 16), Halves);
  }
#endif

  template <bool relu>
  static void add_lanes(uint16_t* dst, const uint16_t* src) {
    store(dst, round(add<relu>(widen(load<Halves>(dst)), widen(load<Halves>(src)))));
  }
};

template <class Format, bool relu>
void add_half_row(void* dst_row, const void* src_row, int64_t elements) {
  constexpr int kLanes = Format::kLanes;
  auto* dst = static_cast<uint16_t*>(dst_row);
  const auto* src = static_cast<const uint16_t*>(src_row);
  int64_t i = 0;
  for (; i + kLanes <= elements; i += kLanes) Format::template add_lanes<relu>(dst + i, src + i);
  if (i == elements) return;
  uint16_t last_dst[kLanes] = {}, last_src[kLanes] = {};
  const size_t bytes = (elements - i) * sizeof(uint16_t);
  std::memcpy(last_dst, dst + i, bytes);
  std::memcpy(last_src, src + i, bytes);
  Format::template add_lanes<relu>(last_dst, last_src);
  std::memcpy(dst + i, last_dst, bytes);
}

}  // namespace

const AddRowFunctions add_row_functions = {
    {add_row<float, false>, add_row<float, true>},
    {add_row<double, false>, add_row<double, true>},
    {add_half_row<BFloat16, false>, add_half_row<BFloat16, true>},
    {add_half_row<Float16, false>, add_half_row<Float16, true>},
};

}  // namespace spnet::cpu::SPNET_LEVEL
