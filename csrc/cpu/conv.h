// Convolutions on feature maps that stay in cache.
//
// A map is stored as [channels / lanes][height + 2 halo][width + 2 halo][lanes]: pixels of one plane, so that
// every offset inside a convolution's inner loop is a constant whatever the number of channels, and a halo of
// zeros, so that no border is a special case. Channels beyond the map's own are not read where maps are
// float32; in a bfloat16 map they are zeros, as are the weights that they meet.
#pragma once

#include <cstdint>

#include "level.h"

namespace spnet::cpu {

// What a convolution may read behind the last pixel of a map, in pixels: 15 of the 16 rows of a tile may lie
// behind it, each of two pixels of which every other one is read, and the taps of the last.
constexpr int64_t kSlackPixels = 15 * 4 + 12;

// Of the image that a convolution of 7x7 reads: as many as it has channels, or its pixels would be mostly
// zeros.
constexpr int64_t kImageLanes = 4;

// What matrix registers multiply together: words of a pixel and its neighbours, and outputs. They are those
// of two pixels where maps have 16 lanes: the second one's words begin a stride later, and where one has no
// tap its weights are zeros.
constexpr int64_t kTileWords = 16, kTileOutputs = 32;

// Where a map's pixels are; steps are in elements.
struct MapView {
  void* data;
  int64_t row, plane, lanes;  // to the next row, to the next plane, channels of a plane
};

// Vectors of output channels that are computed together, and what they read: from the first channel of a
// plane to the last one of their groups, with weights of zero where an output does not read it. So where what
// one group reads is infinite or no number, the outputs of others may be no numbers.
struct Bundle {
  int64_t vector, vectors;  // the first one; how many
  int64_t plane, channels;  // of the input: the first plane, and how many channels from its first on
  const float* weight;      // [planes][kernel][words of the lanes][kernel][outputs];
                            // for ConvFunctions::tiles [planes][kernel][words: pixels, lanes][kTileOutputs]
                            // with zeros to whole kTileWords;
                            // by Winograd [places][channels][outputs], transformed;
                            // of affine ones [outputs], float32 always
};

// out = conv(in) + bias, with a residual, ReLU and sums over every row as asked.
struct Conv {
  MapView in;             // data: the pixel under the kernel's first tap at output (0, 0)
  MapView out;            // data: output (0, 0)
  const Bundle* bundles;  // of all output channels
  const float* bias;      // [vectors * kLanes]
  int64_t kernel;         // 1, 3, or 7 with a stride of 2
  int64_t stride;         // 1 or 2
  int64_t height, width;  // of the output
  int64_t cout, vectors;  // output channels, and registers of them, which fill the planes of the output
  bool residual;          // out holds what is added
  bool relu;              // keeps NaN
  float* row_sums;  // [height, vectors * kLanes]: sums of out over every row, from left to right; or null
  float* scratch;   // of the calling thread, as large as ConvFunctions::scratch says
};

// Some rows of the output, of some bundles of its channels.
struct Part {
  int64_t first_bundle, last_bundle, first_row, last_row;
};

struct ConvFunctions {
  int vector;         // output channels of a register
  int lanes;          // of maps with more channels than a register takes; of others as many as it does
  int bundle;         // vectors of a bundle, at most
  int word_channels;  // 1: maps and weights are float32; 2: they are bfloat16, weights in pairs of channels
  bool tiles;         // matrix registers, which read all lanes and whole pairs of pixels
  int side;           // 1: direct; else by Winograd's tiles of so many rows, 3x3 of stride 1 alone (see
                      // winograd.h): a part that does not begin with a tile computes its other rows as well

  // Floats for bundles that read so many channels at most; null: none.
  int64_t (*scratch)(int64_t channels);
  // Any division into parts gives the same bits.
  void (*run)(const Conv& conv, const Part& part);

  int64_t lanes_of(int64_t channels) const { return channels > vector ? lanes : vector; }
  int64_t planes_of(int64_t channels) const {
    return (channels + lanes_of(channels) - 1) / lanes_of(channels);
  }
  // To whole planes.
  int64_t padded(int64_t channels) const { return planes_of(channels) * lanes_of(channels); }
  // In elements: a row of `pixels`. Two of 16 lanes are a cache line.
  int64_t row(int64_t pixels, int64_t lanes) const {
    return (tiles && lanes == vector ? pixels + pixels % 2 : pixels) * lanes;
  }
  // In elements: a map with a halo of one pixel, and what may be read behind it.
  int64_t map(int64_t channels, int64_t height, int64_t width) const {
    const int64_t lanes = lanes_of(channels);
    return planes_of(channels) * (height + 2) * row(width + 2, lanes) + kSlackPixels * lanes;
  }
};

#define SPNET_DECLARE(level)                                   \
  namespace level {                                            \
  extern const ConvFunctions conv_functions, affine_functions; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
SPNET_DECLARE(avx512_bf16)
SPNET_DECLARE(amx_bf16)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
