// Convolutions of bfloat16 maps by matrix registers (AMX). A tile is 16 pixels, one after the other in
// memory; a product takes 32 numbers of each, which are the 16 channels of two neighbouring pixels, so two
// taps.
#include <immintrin.h>

#include "conv.h"
#include "fma_loop.h"
#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

// Shapes of the eight registers:
//   0 to 3  float32 [16][16]: sums of 16 pixels and 16 output channels
//   4       bfloat16 [16][32]: two taps of 16 pixels, 16 channels each
//   5       bfloat16 [16][16][2]: weights of two taps, pairs of channels
//   6, 7    the same for one tap
struct alignas(64) Shapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};
// Static: the compiler does not know that the instruction reads more than a pointer's size.
constexpr Shapes kShapes;

// The compiler does not see which memory a tile instruction touches, so neither do the sanitizers: for them
// the ends of its rows are read. The gaps that AddressSanitizer knows of are no shorter than a row.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
void see_rows(int tile, const void* rows, int64_t step) {
  const auto* row = static_cast<const volatile char*>(rows);
  for (int left = kShapes.rows[tile]; left > 0; --left, row += step) {
    row[0];
    row[kShapes.row_bytes[tile] - 1];
  }
}
#else
void see_rows(int, const void*, int64_t) {}
#endif

#define SPNET_LOAD(tile, from, step) \
  see_rows(tile, from, step);        \
  _tile_loadd(tile, from, step)

// While one lives, this thread has the registers.
struct Registers {
  Registers() { _tile_loadconfig(&kShapes); }
  ~Registers() { _tile_release(); }
};

constexpr int64_t kTile = 16;
constexpr int64_t kTiles = 4;  // summed at once: fewer would wait for the latency of a product

// Output pixels are numbered row after row, `pitch` to a row. Where a row is no whole number of tiles, tiles
// go on through the halo to the next row, if the input's rows follow one another like the output's.
int64_t pitch_of(const Conv& conv) {
  const bool through_halo = conv.stride == 1 && conv.width % kTile != 0;
  return through_halo ? conv.out.row / kLanes : (conv.width + kTile - 1) / kTile * kTile;
}

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

// sums [kCount * 16][16] of tiles whose first taps are at `in`.
template <int kCount>
void multiply(const Conv& conv, const Element* const in[], const char* weight, float* sums) {
  const int64_t step = conv.stride * kLanes * sizeof(Element);
  const int64_t planes = (conv.cin + kLanes - 1) / kLanes;
#define SPNET_ZERO(i) _tile_zero(i)
  SPNET_EACH_TILE(SPNET_ZERO)
  for (int64_t plane = 0; plane < planes; ++plane) {
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
#define SPNET_STORE(i)                        \
  see_rows(i, sums + i * kTile * kLanes, 64); \
  _tile_stored(i, sums + i * kTile * kLanes, 64)
  SPNET_EACH_TILE(SPNET_STORE)
}

using Multiply = decltype(&multiply<1>);
constexpr Multiply kMultiply[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};

// Pixels [x, end) of row y, from their sums.
template <bool kResidual, bool kRowSums>
void finish(const Conv& conv, int64_t vector, int64_t y, int64_t x, int64_t end, const float* sums) {
  const Vec bias = load(conv.bias + vector * kLanes);
  Element* to =
      static_cast<Element*>(conv.out.data) + vector * conv.out.plane + y * conv.out.row + x * kLanes;
  const int64_t channels = conv.cout - vector * kLanes;
  float* row_sum = kRowSums ? conv.row_sums + (y * conv.vectors + vector) * kLanes : nullptr;
  Vec sum = kRowSums && x > 0 ? load(row_sum) : Vec{};
  for (; x < end; ++x, sums += kLanes, to += kLanes) {
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

// Rows [begin, end) of one vector of output channels.
void run_rows(const Conv& conv, int64_t vector, int64_t begin, int64_t end) {
  const int64_t planes = (conv.cin + kLanes - 1) / kLanes;
  const char* weight =
      static_cast<const char*>(conv.weight) + vector * planes * conv.kernel * conv.kernel * 8 * 64;
  const int64_t pitch = pitch_of(conv);
  const int64_t last = (end - 1) * pitch + conv.width;
  int64_t pixel = begin * pitch, tiles = (last - pixel + kTile - 1) / kTile;
  alignas(64) float sums[kTiles * kTile * kLanes];
  const Finish finish = kFinish[conv.residual][conv.row_sums != nullptr];
  for (int64_t chunks = (tiles + kTiles - 1) / kTiles; chunks > 0; --chunks) {
    const int64_t count = tiles / chunks;
    tiles -= count;
    const Element* in[kTiles];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = pixel + i * kTile;
      in[i] = static_cast<const Element*>(conv.in.data) +
              (first / pitch * conv.in.row + first % pitch * kLanes) * conv.stride;
    }
    kMultiply[count - 1](conv, in, weight, sums);
    const float* from = sums;
    for (int64_t stop = pixel + count * kTile; pixel < stop;) {
      const int64_t y = pixel / pitch, x = pixel % pitch;
      const int64_t n = pitch - x < stop - pixel ? pitch - x : stop - pixel;
      const int64_t row_end = x + n < conv.width ? x + n : conv.width;
      if (y < end && x < row_end) finish(conv, vector, y, x, row_end, from);
      pixel += n;
      from += n * kLanes;
    }
  }
}

int64_t units(const Conv& conv) { return conv.vectors * conv.height; }

void run(const Conv& conv, int64_t begin, int64_t end) {
  const Registers registers;
  while (begin < end) {
    const int64_t vector = begin / conv.height, first = begin - vector * conv.height;
    const int64_t rows = end - begin < conv.height - first ? end - begin : conv.height - first;
    run_rows(conv, vector, first, first + rows);
    begin += rows;
  }
}

// The pure loop: products alone.
float multiply_only(int64_t repetitions) {
  const Registers registers;
  alignas(64) float sums[kTile * kLanes] = {};
#define SPNET_ZERO_ALL(i) _tile_zero(i);
  SPNET_ZERO_ALL(0)
  SPNET_ZERO_ALL(1)
  SPNET_ZERO_ALL(2)
  SPNET_ZERO_ALL(3) SPNET_ZERO_ALL(4) SPNET_ZERO_ALL(5) for (int64_t n = 0; n < repetitions; ++n) {
#define SPNET_PRODUCT(i) _tile_dpbf16ps(i, 4, 5);
    SPNET_PRODUCT(0) SPNET_PRODUCT(1) SPNET_PRODUCT(2) SPNET_PRODUCT(3)
  }
  _tile_stored(0, sums, 64);
  return sums[0];
}

}  // namespace

const FmaLoop fma_loop = {2.0 * kTiles * kTile * kLanes * 2 * kLanes, multiply_only};

const ConvFunctions conv_functions = {kLanes, 1, kWordChannels, true, units, run};

}  // namespace spnet::cpu::SPNET_LEVEL
