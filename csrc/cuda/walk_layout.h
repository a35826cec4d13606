// A routed network as the CUDA walk reads it: weights in the order of tensor-core fragments, and a place in
// the shared memory of one thread block for every map of every block.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"
#include "tiling.h"

namespace spnet::cuda {

constexpr int kWarps = 8;
constexpr int kLanes = 32;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTile = 16;            // pixels, input channels and output channels of a tile
constexpr int kFragmentBytes = 512;  // one tap's weights between 16 input and 16 output channels
constexpr int kStages = 3;           // of the ring through which weights stream

// A map [height + 2, width + 2, channels] of 16-bit numbers; the border, its halo, is zero. Pixels are an odd
// number of 16-byte units apart, so that the eight rows that ldmatrix reads lie in different banks.
struct Map {
  int32_t offset, pixel_bytes, height, width;
  SPNET_HOST_DEVICE int row_bytes() const { return (width + 2) * pixel_bytes; }
};

// One convolution that adds to a layer's sums: its weights, [chunk][group][tap] fragments.
struct Source {
  Map in;
  int32_t weight;  // position of its first fragment
  int32_t chunks;  // of kTile input channels; 0: there is no convolution
  int32_t taps;    // 9 or 1
  int32_t stride;
};

enum class Residual : int32_t { none, in_place, pad };

// out = ReLU(convolutions + bias + residual). A warp computes a unit: `rows` rows of kTile pixel columns, a
// strip, for a group of kTile output channels. The map is cut into bands of `rows` rows, whose columns are
// numbered one band after the other; a strip is kTile successive ones.
struct Layer {
  Source sources[2];  // the second one is a shortcut, computed whether or not the block is executed
  Map out;
  int64_t bias[2];  // positions: of all sources; of the second one alone
  int32_t channels, groups, rows;
  Divisor strips, width;  // of the output
  Residual residual;
  int32_t pad_before, pad_channels;  // of the shortcut's map
  float pool_scale;                  // 1 / pixels where routers and head see the output, else 0

  SPNET_HOST_DEVICE int units() const { return groups * strips.value; }
};

// W x + b with W as [inputs / 4][outputs][4].
struct Linear {
  int64_t weight, bias;
  int32_t quads, outputs;
};

// Where a block's weights stream through shared memory.
struct Ring {
  int32_t offset, stage_bytes;
};

// The stem is one too, the zeroth: it has no router and only its second layer.
struct alignas(16) Block {
  Layer first, second;
  Ring ring;
  Linear router;
  int64_t router_weight2;
  float router_bias2;
  int32_t identity;
  int32_t middle;  // number of the map between the layers, the same as before where that stays where it is
};

// Offsets of what is no map, in bytes of shared memory.
struct Scratch {
  int32_t sample, warp_sums, blocks, pooled, partial_sums;
};

struct Network {
  int32_t in_channels, n_blocks;  // without the stem
  Linear head;
  Scratch scratch;
  int32_t shared_bytes;
};

struct WalkLayout {
  Network network;
  std::vector<Block> blocks;
  std::vector<uint16_t> weights;
  std::vector<float> floats;
};

// Element is Float16 or BFloat16 (half.h). Throws std::invalid_argument as read_plan does, for a weight
// beyond the element's range, and for a block whose maps do not fit into shared_limit bytes.
template <class Element>
WalkLayout lay_out_walk(const Plan& plan, const float* floats, int64_t shared_limit);

}  // namespace spnet::cuda
