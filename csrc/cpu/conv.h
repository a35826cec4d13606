// Direct convolutions on feature maps that stay in cache.
//
// A map is stored as [channels / lanes][height + 2][width + 2][lanes]: pixels of one vector, so that every
// offset inside a convolution's inner loop is a constant whatever the number of channels, and a halo of
// zeros, so that no border is a special case. Channels beyond the map's own are not read where maps are
// float32; in a bfloat16 map they are zeros, as are the weights that they meet.
#pragma once

#include <cstdint>

#include "level.h"

namespace spnet::cpu {

// What a convolution may read behind the last pixel of a map, in pixels.
constexpr int64_t kSlackPixels = 32;

// Where a map's pixels are; steps are in elements.
struct MapView {
  void* data;
  int64_t row, plane;  // to the next row, to the next vector of channels
};

// out = conv(in) + bias, with a residual, ReLU and sums over every row as asked.
struct Conv {
  MapView in;           // data: the pixel under the kernel's first tap at output (0, 0)
  MapView out;          // data: output (0, 0)
  const void* weight;   // [group][channels / lanes][kernel][words of the lanes][kernel][lanes of the group];
                        // [kernel][words] the other way round for ConvFunctions::tiles
  const float* bias;    // [vectors * lanes]
  int64_t cin, kernel;  // channels, 1 or 3
  int64_t stride;       // 1 or 2
  int64_t height, width;  // of the output
  int64_t cout, vectors;  // output channels, and vectors of them
  bool residual;          // out holds what is added
  bool relu;              // keeps NaN
  float* row_sums;  // [height, vectors * lanes]: sums of out over every row, from left to right; or null
};

struct ConvFunctions {
  int lanes;
  int group;          // vectors of output channels that are computed together
  int word_channels;  // 1: maps and weights are float32; 2: they are bfloat16, weights in pairs of channels
  bool tiles;         // matrix registers, which read all lanes

  // The work of a convolution in units, each one row of one group of output channels. Any split of the units
  // gives the same bits.
  int64_t (*units)(const Conv& conv);
  void (*run)(const Conv& conv, int64_t begin, int64_t end);
};

#define SPNET_DECLARE(level)                 \
  namespace level {                          \
  extern const ConvFunctions conv_functions; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
SPNET_DECLARE(avx512_bf16)
SPNET_DECLARE(amx_bf16)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
