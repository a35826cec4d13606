// 3x3 convolutions of stride 1 by 16 products for 2x2 outputs (a tile) instead of 36: F(2x2, 3x3) of Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 4.1. The 4x4 inputs of a
// tile, the kernel and the products are each transformed along both sides; what lies between is 16 products
// of matrices, tiles x channels x output channels, one for each place in the 4x4.
//
// An output of a tile depends on those 3x3 inputs alone that lie under its kernel, to the bit: where a tile
// is cut off by the map's edge, or by that of a part, whatever finite or other number was read in the rest.
// Where the direct convolution gives infinity, an output may be NaN, a difference of two infinities.
#pragma once

#include "conv.h"

namespace spnet::cpu {

constexpr int kWinogradPlaces = 16;  // of a transformed tile

#define SPNET_DECLARE(level)                     \
  namespace level {                              \
  extern const ConvFunctions winograd_functions; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
