// 3x3 convolutions of stride 1 by fewer products: those of a tile of 2x2 outputs by 16 instead of 36, of 4x4
// outputs by 36 instead of 144: F(2x2, 3x3) and F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks" (CVPR 2016), section 4. The inputs of a tile, the kernel and the products
// are each transformed along both sides; what lies between are products of matrices, tiles x channels x
// output channels, one for each place of a transformed tile.
//
// The larger tile evaluates polynomials at 0, at infinity and at +-kWinogradPoints, which differ in size so
// that little is lost to rounding: its outputs have a few times the rounding error of direct ones, half as
// much as with the usual points 1 and 2. Where the direct convolution gives infinity, an output may be NaN, a
// difference of two infinities; and where it gives NaN, so may other outputs of the same tile be.
#pragma once

#include "conv.h"

namespace spnet::cpu {

constexpr double kWinogradPoints[] = {0.625, 1.5};  // of the larger tile

// Of a transformed tile of side x side outputs.
constexpr int winograd_places(int side) { return (side + 2) * (side + 2); }

#define SPNET_DECLARE(level)                                           \
  namespace level {                                                    \
  extern const ConvFunctions winograd2_functions, winograd4_functions; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
