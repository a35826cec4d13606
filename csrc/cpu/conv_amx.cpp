// Convolutions of bfloat16 maps by matrix registers (AMX). A tile is 16 pixels; a product takes 32 numbers of
// each, which follow one another in memory: 32 channels of a pixel, 16 channels of two neighbouring pixels,
// or 4 channels of eight.
#include <immintrin.h>

#include "conv.h"
#include "fma_loop.h"
#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

// Shapes of the eight registers. All are whole where maps have 32 lanes, or 4; where they have 16:
//   0 to 3  float32 [16][16]: sums of 16 pixels and 16 output channels
//   4       bfloat16 [16][32]: two taps of 16 pixels, 16 channels each
//   5       bfloat16 [16][16][2]: weights of two taps, pairs of channels
//   6, 7    the same for one tap
struct alignas(64) Shapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  Shapes(bool halves, int64_t pixels) {
    for (int i : {0, 1, 2, 3, 4}) rows[i] = static_cast<uint8_t>(pixels);
    rows[halves ? 6 : 5] = static_cast<uint8_t>(pixels);
    if (!halves) return;
    row_bytes[6] = 32;
    rows[7] = 8;
  }
};

// The compiler does not see which memory a tile instruction touches, so neither do the sanitizers: for them
// the ends of its rows are read. The gaps that AddressSanitizer knows of are no shorter than a row.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
void see_rows(int tile, const void* rows, int64_t step) {
  Shapes shapes(false, 0);
  _tile_storeconfig(&shapes);
  __asm__ volatile("" : "+m"(shapes));  // it writes more than the compiler knows of
  const auto* row = static_cast<const volatile char*>(rows);
  for (int left = shapes.rows[tile]; left > 0; --left, row += step) {
    row[0];
    row[shapes.row_bytes[tile] - 1];
  }
}
#else
void see_rows(int, const void*, int64_t) {}
#endif

#define SPNET_LOAD(tile, from, step) \
  see_rows(tile, from, step);        \
  _tile_loadd(tile, from, step)
#define SPNET_KEEP(tile, to) \
  see_rows(tile, to, 64);    \
  _tile_stored(tile, to, 64)

// While one lives, this thread has the registers.
struct Registers {
  Registers(bool halves, int64_t pixels) {
    // The compiler does not know that the instruction reads more than a pointer's size.
    const Shapes shapes(halves, pixels);
    __asm__ volatile("" : : "m"(shapes));
    _tile_loadconfig(&shapes);
  }
  ~Registers() { _tile_release(); }
};

constexpr int64_t kTile = 16;
constexpr int64_t kTiles = 4;   // summed at once: fewer would wait for the latency of a product
constexpr int64_t kChunk = 32;  // numbers of a product

// Output pixels are numbered row after row, `pitch` to a row, and come in tiles of `pixels`. Where a row is
// no whole number of tiles, tiles of 16 go on through the halo to the next row, if the input's rows follow
// one another like the output's; else a row is cut into equal ones.
struct Tiling {
  int64_t pixels = kTile, pitch;

  explicit Tiling(const Conv& conv) : pitch(conv.in.row / conv.in.lanes) {
    if (conv.stride == 1 && conv.width % kTile != 0) return;
    const int64_t count = (conv.width + kTile - 1) / kTile;
    pixels = (conv.width + count - 1) / count;
    pitch = count * pixels;
  }
};

#define SPNET_EACH_TILE(X)    \
  X(0);                       \
  if constexpr (kCount > 1) { \
    X(1);                     \
  }                           \
  if constexpr (kCount > 2) { \
    X(2);                     \
  }                           \
  if constexpr (kCount > 3) { \
    X(3);                     \
  }

int64_t planes(const Conv& conv) { return (conv.cin + conv.in.lanes - 1) / conv.in.lanes; }

// sums [kCount * pixels][16] of tiles whose first taps are at `in`, on maps of 16 lanes.
template <int kCount>
void multiply(const Conv& conv, const Element* const in[], const char* weight, int64_t pixels, float* sums) {
  const int64_t step = conv.stride * kLanes * sizeof(Element);
  const int64_t n_planes = planes(conv);
#define SPNET_ZERO(i) _tile_zero(i)
  SPNET_EACH_TILE(SPNET_ZERO)
  for (int64_t plane = 0; plane < n_planes; ++plane) {
    for (int64_t ky = 0; ky < conv.kernel; ++ky) {
      int64_t tap = plane * conv.in.plane + ky * conv.in.row;
      if (conv.kernel == 3) {
        SPNET_LOAD(5, weight, 64);
#define SPNET_TWO_TAPS(i)           \
  SPNET_LOAD(4, in[i] + tap, step); \
  _tile_dpbf16ps(i, 4, 5)
        SPNET_EACH_TILE(SPNET_TWO_TAPS)
        weight += 16 * 64;
        tap += 2 * kLanes;
      }
      SPNET_LOAD(7, weight, 64);
#define SPNET_ONE_TAP(i)            \
  SPNET_LOAD(6, in[i] + tap, step); \
  _tile_dpbf16ps(i, 6, 7)
      SPNET_EACH_TILE(SPNET_ONE_TAP)
      weight += 8 * 64;
    }
  }
#define SPNET_STORE(i) SPNET_KEEP(i, sums + i * pixels * kLanes)
  SPNET_EACH_TILE(SPNET_STORE)
}

// Bytes from the weights in use to those that are fetched: what two steps read.
constexpr int64_t kAhead = 2 * 2 * 16 * 64;

// sums [2][kCount * pixels][16] of tiles and two vectors of output channels, on maps of other lanes: every
// number that is loaded is multiplied twice.
template <int kCount>
void multiply_two(const Conv& conv, const Element* const in[], const char* weight, int64_t pixels,
                  float* sums) {
  const int64_t step = conv.stride * conv.in.lanes * sizeof(Element);
  const int64_t n_planes = planes(conv), row = conv.kernel * conv.in.lanes;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kCount > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t plane = 0; plane < n_planes; ++plane) {
    for (int64_t ky = 0; ky < conv.kernel; ++ky) {
      const int64_t tap = plane * conv.in.plane + ky * conv.in.row;
      for (int64_t i = 0; i < row; i += kChunk, weight += 2 * 16 * 64) {
#pragma GCC unroll 32
        for (int line = 0; line < kChunk; ++line) __builtin_prefetch(weight + kAhead + line * 64);
        SPNET_LOAD(6, weight, 2 * 64);
        SPNET_LOAD(4, in[0] + tap + i, step);
        _tile_dpbf16ps(0, 4, 6);
        SPNET_LOAD(7, weight + 64, 2 * 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kCount > 1) {
          SPNET_LOAD(5, in[1] + tap + i, step);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  SPNET_KEEP(0, sums);
  SPNET_KEEP(1, sums + kCount * pixels * kLanes);
  if constexpr (kCount > 1) {
    SPNET_KEEP(2, sums + pixels * kLanes);
    SPNET_KEEP(3, sums + 3 * pixels * kLanes);
  }
}

using Multiply = decltype(&multiply<1>);
constexpr Multiply kMultiply[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};
constexpr Multiply kMultiplyTwo[] = {multiply_two<1>, multiply_two<2>};

// Pixels [x, end) of row y, from their sums.
template <bool kResidual, bool kRowSums>
void finish(const Conv& conv, int64_t vector, int64_t y, int64_t x, int64_t end, const float* sums) {
  const Vec bias = load(conv.bias + vector * kLanes);
  const int64_t lanes = conv.out.lanes, first = vector * kLanes;
  Element* to = static_cast<Element*>(conv.out.data) + first / lanes * conv.out.plane + y * conv.out.row +
                x * lanes + first % lanes;
  const int64_t channels = conv.cout - vector * kLanes;
  float* row_sum = kRowSums ? conv.row_sums + (y * conv.vectors + vector) * kLanes : nullptr;
  Vec sum = kRowSums && x > 0 ? load(row_sum) : Vec{};
  for (; x < end; ++x, sums += kLanes, to += lanes) {
    Vec value = load(sums) + bias;
    if (kResidual) value += load_elements(to);
    if (conv.relu) value = relu(value);
    if (channels < kLanes) value = first_lanes(value, channels);
    store_elements(to, value);
    if (kRowSums) sum += value;
  }
  if (kRowSums) store(row_sum, sum);
}

using Finish = decltype(&finish<false, false>);
constexpr Finish kFinish[2][2] = {{finish<false, false>, finish<false, true>},
                                  {finish<true, false>, finish<true, true>}};

// The same of two vectors on maps of 32 lanes, whose pixels are a cache line; `sums` and `more` are those of
// each.
template <bool kResidual, bool kRowSums>
void finish_two(const Conv& conv, int64_t group, int64_t y, int64_t x, int64_t end, const float* sums,
                const float* more) {
  constexpr int64_t kPixel = 2 * kLanes;
  const Vec bias[] = {load(conv.bias + group * kPixel), load(conv.bias + group * kPixel + kLanes)};
  // The second where one is NaN.
  const __m512 least = _mm512_set1_ps(conv.relu ? 0.f : -__builtin_inff());
  Element* to = static_cast<Element*>(conv.out.data) + group * conv.out.plane + y * conv.out.row + x * kPixel;
  const int64_t channels = conv.cout - group * kPixel;
  float* row_sum = kRowSums ? conv.row_sums + y * conv.vectors * kLanes + group * kPixel : nullptr;
  Vec sum[2] = {};
  if (kRowSums && x > 0) {
    sum[0] = load(row_sum);
    sum[1] = load(row_sum + kLanes);
  }
  for (; x < end; ++x, sums += kLanes, more += kLanes, to += kPixel) {
    Vec value[] = {load(sums) + bias[0], load(more) + bias[1]};
    if (kResidual) {
      value[0] += load_elements(to);
      value[1] += load_elements(to + kLanes);
    }
    for (Vec& v : value) v = (Vec)_mm512_maskz_max_ps(0xffff, least, (__m512)v);
    if (channels < kPixel) {
      value[0] = first_lanes(value[0], channels);
      value[1] = first_lanes(value[1], channels - kLanes);
    }
    const __m512bh pixel = _mm512_cvtne2ps_pbh((__m512)value[1], (__m512)value[0]);
    std::memcpy(to, &pixel, sizeof(pixel));
    if (kRowSums) {
      sum[0] += value[0];
      sum[1] += value[1];
    }
  }
  if (kRowSums) {
    store(row_sum, sum[0]);
    store(row_sum + kLanes, sum[1]);
  }
}

using FinishTwo = decltype(&finish_two<false, false>);
constexpr FinishTwo kFinishTwo[2][2] = {{finish_two<false, false>, finish_two<false, true>},
                                        {finish_two<true, false>, finish_two<true, true>}};

// Rows [begin, end) of a group of kGroup vectors of output channels.
template <int kGroup>
void run_rows(const Conv& conv, int64_t group, int64_t begin, int64_t end) {
  const int64_t chunk_rows = kGroup == 1 ? 8 : 16;
  const int64_t rows = (conv.kernel * conv.in.lanes / 2 + chunk_rows - 1) / chunk_rows * chunk_rows;
  const char* weight =
      static_cast<const char*>(conv.weight) + group * planes(conv) * conv.kernel * rows * kGroup * 64;
  const Tiling tiling(conv);
  const int64_t pitch = tiling.pitch, last = (end - 1) * pitch + conv.width;
  int64_t pixel = begin * pitch, tiles = (last - pixel + tiling.pixels - 1) / tiling.pixels;
  alignas(64) float sums[kTiles * kTile * kLanes];
  const Finish finish = kFinish[conv.residual][conv.row_sums != nullptr];
  const FinishTwo finish_two = kFinishTwo[conv.residual][conv.row_sums != nullptr];
  constexpr int64_t kMost = kTiles / kGroup;
  for (int64_t chunks = (tiles + kMost - 1) / kMost; chunks > 0; --chunks) {
    const int64_t count = tiles / chunks, pixels = count * tiling.pixels;
    tiles -= count;
    const Element* in[kMost];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = pixel + i * tiling.pixels;
      in[i] = static_cast<const Element*>(conv.in.data) +
              (first / pitch * conv.in.row + first % pitch * conv.in.lanes) * conv.stride;
    }
    (kGroup == 1 ? kMultiply : kMultiplyTwo)[count - 1](conv, in, weight, tiling.pixels, sums);
    for (int64_t from = 0, n = 0; from < pixels; from += n, pixel += n) {
      const int64_t y = pixel / pitch, x = pixel % pitch;
      n = pitch - x < pixels - from ? pitch - x : pixels - from;
      const int64_t row_end = x + n < conv.width ? x + n : conv.width;
      if (y >= end || x >= row_end) continue;
      const float* first = sums + from * kLanes;
      if (kGroup == 1) {
        finish(conv, group, y, x, row_end, first);
      } else {
        finish_two(conv, group, y, x, row_end, first, first + pixels * kLanes);
      }
    }
  }
}

template <int kGroup>
void run(const Conv& conv, const Part& part) {
  const Registers registers(kGroup == 1, Tiling(conv).pixels);
  for (int64_t group = part.first_group; group < part.last_group; ++group) {
    run_rows<kGroup>(conv, group, part.first_row, part.last_row);
  }
}

// The pure loop: products alone.
float multiply_only(int64_t repetitions) {
  const Registers registers(false, kTile);
  alignas(64) float sums[kTile * kLanes] = {};
#define SPNET_ZERO_ALL(i) _tile_zero(i);
  SPNET_ZERO_ALL(0)
  SPNET_ZERO_ALL(1)
  SPNET_ZERO_ALL(2)
  SPNET_ZERO_ALL(3) SPNET_ZERO_ALL(4) SPNET_ZERO_ALL(5) for (int64_t n = 0; n < repetitions; ++n) {
#define SPNET_PRODUCT(i) _tile_dpbf16ps(i, 4, 5);
    SPNET_PRODUCT(0) SPNET_PRODUCT(1) SPNET_PRODUCT(2) SPNET_PRODUCT(3)
  }
  SPNET_KEEP(0, sums);
  return sums[0];
}

}  // namespace

const FmaLoop fma_loop = {2.0 * kTiles * kTile * kLanes * 2 * kLanes, multiply_only};

const ConvFunctions conv_functions = {kLanes, kLanes, 1, kWordChannels, true, false, nullptr, run<1>};
const ConvFunctions wide_conv_functions = {kLanes, 2 * kLanes, 2,       kWordChannels,
                                           true,   false,      nullptr, run<2>};

}  // namespace spnet::cpu::SPNET_LEVEL
