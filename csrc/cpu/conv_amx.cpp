// Convolutions of bfloat16 maps by matrix registers (AMX). A row of a tile is that of a pixel or, where the
// output has 16 lanes, of two neighbours; a product takes 32 numbers of it, which follow one another in
// memory, to 32 outputs.
//
// Numbers that meet no tap, and lanes beyond the channels or of other groups, are multiplied by zeros: where
// the direct convolution gives infinity, an output may be NaN.
#include <immintrin.h>

#include "conv.h"
#include "fma_loop.h"
#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

constexpr int64_t kTile = 16;                                  // rows
constexpr int64_t kChunk = 2 * kTileWords;                     // numbers
constexpr int64_t kStepBytes = 4 * kTileWords * kTileOutputs;  // weights of a chunk

// Shapes of the eight registers:
//   0 to 3  float32 [rows][16]: sums of one tile and half of the outputs
//   4, 5    bfloat16 [rows][32]: two tiles
//   6, 7    bfloat16 [16][16][2]: weights of half of the outputs, in pairs of numbers
struct alignas(64) Shapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  explicit Shapes(int64_t tile_rows) {
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<uint8_t>(i < 6 ? tile_rows : kTileWords);
  }
};

// The compiler does not see which memory a tile instruction touches, so neither do the sanitizers: for them
// the ends of its rows are read. The gaps that AddressSanitizer knows of are no shorter than a row.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
void see_rows(int tile, const void* rows, int64_t step) {
  Shapes shapes(0);
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
  explicit Registers(int64_t rows) {
    // The compiler does not know that the instruction reads more than a pointer's size.
    const Shapes shapes(rows);
    __asm__ volatile("" : : "m"(shapes));
    _tile_loadconfig(&shapes);
  }
  ~Registers() { _tile_release(); }
};

// Rows of tiles are numbered along the rows of the output, `pitch` to each. Where those are no whole number
// of tiles, tiles of 16 go on through the halo to the next row, if the input's rows follow one another like
// the output's; else a row is cut into equal ones.
struct Tiling {
  int64_t together, width, rows = kTile, pitch;

  explicit Tiling(const Conv& conv)
      : together(kTileOutputs / conv.out.lanes),
        width((conv.width + together - 1) / together),
        pitch(conv.in.row / (together * conv.in.lanes)) {
    if (conv.stride == 1 && width % kTile != 0 && pitch * together * conv.in.lanes == conv.in.row) return;
    const int64_t count = (width + kTile - 1) / kTile;
    rows = (width + count - 1) / count;
    pitch = count * rows;
  }
};

// What a tile multiplies: `numbers` of each row of each plane.
struct Taps {
  int64_t planes, kernel;  // how many planes, and rows of each
  int64_t plane, row;      // elements to the next
  int64_t numbers;
  int64_t step;  // bytes to the next row of a tile

  Taps(const Conv& conv, const Bundle& bundle, int64_t together)
      : planes((bundle.channels + conv.in.lanes - 1) / conv.in.lanes),
        kernel(conv.kernel),
        plane(conv.in.plane),
        row(conv.in.row),
        numbers((conv.kernel + (together - 1) * conv.stride) * conv.in.lanes),
        step(together * conv.stride * conv.in.lanes * sizeof(Element)) {
    numbers = (numbers + kChunk - 1) / kChunk * kChunk;
  }
  int64_t chunks() const { return planes * kernel * numbers / kChunk; }
};

#define SPNET_INLINE inline __attribute__((always_inline))

// The way from sums to the output, tile row after tile row: bias, residual, ReLU, rounding.
template <bool kResidual, bool kRowSums>
class Finish {
 public:
  Finish(const Conv& conv, const Tiling& tiling, int64_t vector, int64_t begin, int64_t end)
      : conv_(conv),
        tiling_(tiling),
        to_(static_cast<char*>(conv.out.data) +
            (vector * kLanes / conv.out.lanes * conv.out.plane + begin * conv.out.row) * sizeof(Element)),
        rows_left_(end - begin),
        row_sum_(kRowSums ? conv.row_sums + (begin * conv.vectors + vector) * kLanes : nullptr),
        least_(_mm512_set1_ps(conv.relu ? 0.f : -__builtin_inff())) {
    const float* const bias = conv.bias + vector * kLanes;
    bias_[0] = load(bias);
    bias_[1] = load(bias + (tiling.together > 1 ? 0 : kLanes));
    alignas(64) uint16_t upper[2][kTileOutputs];
    for (int i = 0; i < kTileOutputs; ++i) {
      upper[0][i] = i / 2;
      upper[1][i] = kLanes + i / 2;
    }
    for (int i : {0, 1}) upper_[i] = _mm512_load_si512(upper[i]);
  }

  // The sums [2][rows][16] of so many tile rows, after all that were taken before are done.
  SPNET_INLINE void take(const float* sums, int64_t rows) {
    sums_ = sums;
    second_ = rows * kLanes;
    left_ = rows;
  }

  // The next `n` of those taken, or all that are left.
  SPNET_INLINE void advance(int64_t n) {
    if (n > left_) n = left_;
    left_ -= n;
    for (int64_t step; n > 0; n -= step) {
      const bool in_halo = x_ >= tiling_.width;
      const int64_t room = (in_halo ? tiling_.pitch : tiling_.width) - x_;
      step = room < n ? room : n;
      if (!in_halo && rows_left_ > 0) run(step);
      x_ += step;
      sums_ += step * kLanes;
      if (!in_halo && x_ == tiling_.width) end_row();
      if (x_ == tiling_.pitch) x_ = 0;
    }
  }

 private:
  SPNET_INLINE void run(int64_t n) {
    char* to = to_ + x_ * kBytes;
    const float* sums = sums_;
    const bool ends_with_half = x_ + n == tiling_.width && tiling_.width * tiling_.together > conv_.width;
    for (const float* const end = sums + (n - ends_with_half) * kLanes; sums < end;
         sums += kLanes, to += kBytes) {
      finish<kBytes>(sums, to);
    }
    if (ends_with_half) finish<kBytes / 2>(sums, to);
  }

  template <int kStored>
  SPNET_INLINE void finish(const float* sums, char* to) {
    Vec value[] = {load(sums) + bias_[0], load(sums + second_) + bias_[1]};
    if (kResidual) {
      const __m512i before = _mm512_loadu_si512(to);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        value[i] += (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper_[i], before);
      }
    }
    // The second where one is NaN.
    for (Vec& v : value) v = (Vec)_mm512_maskz_max_ps(0xffff, least_, (__m512)v);
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)value[1], (__m512)value[0]);
    std::memcpy(to, &rounded, kStored);
    if (!kRowSums) return;
    sum_[0] += value[0];
    if (kStored == kBytes) sum_[1] += value[1];
  }

  SPNET_INLINE void end_row() {
    to_ += conv_.out.row * sizeof(Element);
    if (kRowSums && rows_left_ > 0) {
      const bool pairs = tiling_.together > 1;
      store(row_sum_, pairs ? sum_[0] + sum_[1] : sum_[0]);
      if (!pairs) store(row_sum_ + kLanes, sum_[1]);
      row_sum_ += conv_.vectors * kLanes;
      sum_[0] = sum_[1] = Vec{};
    }
    --rows_left_;
  }

  static constexpr int kBytes = kTileOutputs * sizeof(Element);  // of a tile row's outputs

  const Conv& conv_;
  const Tiling& tiling_;
  char* to_;
  int64_t rows_left_, x_ = 0;  // of the output; tile rows
  const float* sums_ = nullptr;
  int64_t second_ = 0, left_ = 0;
  float* row_sum_;
  const __m512 least_;
  __m512i upper_[2];  // where 16 of 32 numbers stand in the upper halves of floats
  Vec bias_[2], sum_[2] = {};
};

// sums [2][kCount * rows][16] of tiles whose first taps are at `in`. Every number that is loaded is
// multiplied twice. Meanwhile `before` is finished, `share` of its rows at each step: vectors compute while
// tiles multiply.
template <int kCount, class Before>
SPNET_INLINE void multiply(const Taps& taps, const Element* const in[], const char* weight, int64_t rows,
                           bool fetches, float* sums, Before& before, int64_t share) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kCount > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t plane = 0; plane < taps.planes; ++plane) {
    for (int64_t ky = 0; ky < taps.kernel; ++ky) {
      const int64_t tap = plane * taps.plane + ky * taps.row;
      for (int64_t i = 0; i < taps.numbers; i += kChunk, weight += kStepBytes) {
        if (fetches) {
#pragma GCC unroll 32
          for (int line = 0; line < kChunk; ++line) __builtin_prefetch(weight + 2 * kStepBytes + line * 64);
        }
        SPNET_LOAD(6, weight, 2 * 64);
        SPNET_LOAD(4, in[0] + tap + i, taps.step);
        _tile_dpbf16ps(0, 4, 6);
        SPNET_LOAD(7, weight + 64, 2 * 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kCount > 1) {
          SPNET_LOAD(5, in[1] + tap + i, taps.step);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        before.advance(share);
      }
    }
  }
  SPNET_KEEP(0, sums);
  SPNET_KEEP(1, sums + kCount * rows * kLanes);
  if constexpr (kCount > 1) {
    SPNET_KEEP(2, sums + rows * kLanes);
    SPNET_KEEP(3, sums + 3 * rows * kLanes);
  }
}

// Rows [begin, end) of a bundle.
template <bool kResidual, bool kRowSums>
void run_rows(const Conv& conv, const Bundle& bundle, const Tiling& tiling, int64_t begin, int64_t end) {
  const Taps taps(conv, bundle, tiling.together);
  const char* weight = reinterpret_cast<const char*>(bundle.weight);
  const int64_t pitch = tiling.pitch, rows = tiling.rows;
  const int64_t share = (2 * rows + taps.chunks() - 1) / taps.chunks();
  Finish<kResidual, kRowSums> finish(conv, tiling, bundle.vector, begin, end);
  alignas(64) float sums[2][2 * 2 * kTile * kLanes];
  int64_t first = begin * pitch;
  int64_t tiles = ((end - 1) * pitch + tiling.width - first + rows - 1) / rows;
  for (int64_t turn = 0, n; tiles > 0; ++turn, tiles -= n) {
    n = tiles > 1 ? 2 : 1;
    const Element* in[2];
    for (int64_t i = 0; i < n; ++i, first += rows) {
      in[i] = static_cast<const Element*>(conv.in.data) + bundle.plane * conv.in.plane +
              (first / pitch * conv.in.row + first % pitch * tiling.together * conv.in.lanes) * conv.stride;
    }
    float* const to = sums[turn % 2];
    if (n == 2) {
      multiply<2>(taps, in, weight, rows, turn == 0, to, finish, share);
    } else {
      multiply<1>(taps, in, weight, rows, turn == 0, to, finish, share);
    }
    finish.take(to, n * rows);
  }
  finish.advance(2 * rows);
}

void run(const Conv& conv, const Part& part) {
  const Tiling tiling(conv);
  const Registers registers(tiling.rows);
  constexpr decltype(&run_rows<false, false>) kRun[2][2] = {{run_rows<false, false>, run_rows<false, true>},
                                                            {run_rows<true, false>, run_rows<true, true>}};
  for (int64_t number = part.first_bundle; number < part.last_bundle; ++number) {
    kRun[conv.residual][conv.row_sums != nullptr](conv, conv.bundles[number], tiling, part.first_row,
                                                  part.last_row);
  }
}

// The pure loop: products alone.
float multiply_only(int64_t repetitions) {
  const Registers registers(kTile);
  alignas(64) float sums[kTile * kLanes] = {};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t n = 0; n < repetitions; ++n) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  SPNET_KEEP(0, sums);
  return sums[0];
}

}  // namespace

const FmaLoop fma_loop = {2.0 * 4 * kTile * kLanes * kChunk, multiply_only};

const ConvFunctions conv_functions = {kLanes, kTileOutputs, 2, kWordChannels, true, 1, nullptr, run};

}  // namespace spnet::cpu::SPNET_LEVEL
