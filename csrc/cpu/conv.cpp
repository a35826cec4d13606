// Compiled once per level (see level.h).
#include "conv.h"

#include <utility>

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

// Accumulators are registers: pixels of a tile times vectors of output channels, beside the weights of three
// taps and one broadcast pixel.
constexpr int kBundle = 2;
#if defined(__AVX512F__)
constexpr int kMaxPixels[] = {16, 8};  // of 32 registers; [vectors - 1]
constexpr int kMaxPixelsOfOneTap =
    14;  // of two vectors: fewer would read weights faster than caches give them
#elif defined(__AVX2__)
constexpr int kMaxPixels[] = {12, 4};  // of 16 registers
constexpr int kMaxPixelsOfOneTap = 6;
#else
constexpr int kMaxPixels[] = {8, 3};  // of 16 registers, with products that need one
constexpr int kMaxPixelsOfOneTap = 5;
#endif

constexpr int max_pixels(int vectors, int64_t kernel) {
  return vectors == 2 && kernel == 1 ? kMaxPixelsOfOneTap : kMaxPixels[vectors - 1];
}

// One tile of kRows rows. An input pixel is read once for all outputs under whose kernel it lies: two loads
// in each cycle could not feed two multiply-adds otherwise. Every pixel is summed in the same order wherever
// the tile begins, and the row's sums are taken pixel by pixel, so that no result depends on the tiling.
template <int kPixels, int kVectors, int kStride, int kKernel, int kRows = 1>
void conv_tile(const Conv& conv, const Bundle& bundle, const Element* in, Element* out, float* sums,
               bool first) {
  static_assert(kRows == 1 || kKernel == 1);
  constexpr int kInLanes = kKernel == 7 ? kImageLanes : kLanes;
  const float *weight = bundle.weight, *bias = conv.bias + bundle.vector * kLanes;
  Vec acc[kRows][kPixels][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][p][v] = load(bias + v * kLanes);
    }
  }
  for (int64_t left = bundle.channels; left > 0; left -= kInLanes, in += conv.in.plane) {
    const int64_t channels = left < kInLanes ? left : kInLanes;
    for (int ky = 0; ky < kKernel; ++ky) {
      const Element* word = in + ky * conv.in.row;
      // Of the next plane, a pixel with each word of this one: no hardware follows from plane to plane.
      const Element* next = word + conv.in.plane;
#pragma GCC unroll 4
      for (int64_t c = 0; c < channels; c += kWordChannels, word += kWordChannels) {
        const int64_t pixel = c / kWordChannels;
        const int64_t row = kRows == 1 ? 0 : pixel / 8, x = kRows == 1 ? pixel : pixel % 8;
        __builtin_prefetch(next + kStride * (row * conv.in.row + x * kInLanes));
        Vec w[kKernel][kVectors];
#pragma GCC unroll 7
        for (int kx = 0; kx < kKernel; ++kx) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v, weight += kLanes) w[kx][v] = load(weight);
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 40
          for (int x = 0; x < (kPixels - 1) * kStride + kKernel; ++x) {
            const Vec pixel = broadcast(word + r * kStride * conv.in.row + x * kInLanes);
#pragma GCC unroll 7
            for (int kx = 0; kx < kKernel; ++kx) {
              const int p = (x - kx) / kStride;
              if (x < kx || (x - kx) % kStride != 0 || p >= kPixels) continue;
#pragma GCC unroll 2
              for (int v = 0; v < kVectors; ++v) acc[r][p][v] = add_products(acc[r][p][v], pixel, w[kx][v]);
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Element* to = out + r * conv.out.row + v * conv.out.plane;
      const int64_t channels = conv.cout - (bias + v * kLanes - conv.bias);
      const int64_t place = (r * conv.vectors + v) * kLanes;
      Vec sum = first || sums == nullptr ? Vec{} : load(sums + place);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        Vec y = acc[r][p][v];
        if (conv.residual) y += load_elements(to + p * kLanes);
        if (conv.relu) y = relu(y);
        if (kWordChannels > 1) y = first_lanes(y, channels);
        store_elements(to + p * kLanes, y);
        sum += y;
      }
      if (sums != nullptr) store(sums + place, sum);
    }
  }
}

using ConvTile = decltype(&conv_tile<1, 1, 1, 1>);

template <int kCount>
struct Tiles {
  ConvTile of_pixels[kCount];
};

template <int kVectors, int kStride, int kKernel, int kRows, int... kPixels>
constexpr Tiles<sizeof...(kPixels)> make_tiles(std::integer_sequence<int, kPixels...>) {
  return {{conv_tile<kPixels + 1, kVectors, kStride, kKernel, kRows>...}};
}

template <int kVectors, int kStride, int kKernel, int kRows = 1>
constexpr auto kTiles = make_tiles<kVectors, kStride, kKernel, kRows>(
    std::make_integer_sequence<int, max_pixels(kVectors, kKernel) / kRows>());

template <int kVectors>
const ConvTile* tiles(int64_t stride, int64_t kernel) {
  if (kernel == 7) return kTiles<kVectors, 2, 7>.of_pixels;
  if (stride == 1) return kernel == 1 ? kTiles<kVectors, 1, 1>.of_pixels : kTiles<kVectors, 1, 3>.of_pixels;
  return kernel == 1 ? kTiles<kVectors, 2, 1>.of_pixels : kTiles<kVectors, 2, 3>.of_pixels;
}

// Of two rows, where both fit one tile.
const ConvTile* two_rows(const Conv& conv, int64_t vectors) {
  if (conv.kernel != 1 || vectors != 2 || 2 * conv.width > kMaxPixelsOfOneTap) return nullptr;
  return conv.stride == 1 ? kTiles<2, 1, 1, 2>.of_pixels : kTiles<2, 2, 1, 2>.of_pixels;
}

void run(const Conv& conv, const Part& part) {
  for (int64_t number = part.first_bundle; number < part.last_bundle; ++number) {
    const Bundle& bundle = conv.bundles[number];
    const int64_t vector = bundle.vector, vectors = bundle.vectors;
    const ConvTile* tile =
        vectors == 1 ? tiles<1>(conv.stride, conv.kernel) : tiles<2>(conv.stride, conv.kernel);
    const ConvTile* pair = two_rows(conv, vectors);
    const int64_t most = max_pixels(vectors, conv.kernel);
    const int64_t count = (conv.width + most - 1) / most;
    const int64_t pixels = conv.width / count, longer = conv.width % count;
    for (int64_t y = part.first_row, rows; y < part.last_row; y += rows) {
      const Element* in = static_cast<const Element*>(conv.in.data) + y * conv.stride * conv.in.row +
                          bundle.plane * conv.in.plane;
      Element* out = static_cast<Element*>(conv.out.data) + y * conv.out.row + vector * conv.out.plane;
      float* sums = conv.row_sums == nullptr ? nullptr : conv.row_sums + (y * conv.vectors + vector) * kLanes;
      rows = pair != nullptr && y + 1 < part.last_row ? 2 : 1;
      if (rows == 2) {
        pair[conv.width - 1](conv, bundle, in, out, sums, true);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = pixels + (i < longer);
        tile[n - 1](conv, bundle, in, out, sums, i == 0);
        in += n * conv.stride * conv.in.lanes;
        out += n * kLanes;
      }
    }
  }
}

}  // namespace

const ConvFunctions conv_functions = {kLanes, kLanes, kBundle, kWordChannels, false, 1, nullptr, run};

}  // namespace spnet::cpu::SPNET_LEVEL
