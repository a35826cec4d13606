// The description of a routed network that the walkers execute: filled from Python, read by every device.
//
// The network, on one sample x [in_channels, in_height, in_width]:
//   map = ReLU(conv3x3(x))
//   for every block:  pooled = mean of map over its pixels
//                     margin = w2 . ReLU(W1 pooled + b1) + b2
//                     executes where margin > threshold (NaN: it does not)
//                     map = ReLU(shortcut(map) + d * conv3x3(ReLU(conv3x3(map)))), d = 1 if executed, else 0
//   logits = Wh (mean of map over its pixels) + bh
// BatchNorm is folded into weights and biases. A block's stride is on its first convolution and its shortcut.
//
// Integers (int64):
//   header  format_version = 1, in_channels, in_height, in_width, num_classes, n_blocks, stem_channels,
//           stem_stride = 1
//   block   cin, mid, cout, stride (1 or 2), shortcut (0 identity, 1 pad, 2 projection), pad_before,
//           router_width, 0
// A pad shortcut takes every stride-th pixel and puts `pad_before` channels of zeros in front of its own and
// the rest behind.
//
// Floats (float32), one after the other without gaps:
//   stem    weight [cout, cin, 3, 3], bias [cout]
//   block   conv1 weight [mid, cin, 3, 3], bias [mid]; conv2 weight [cout, mid, 3, 3], bias [cout];
//           projection only: weight [cout, cin], bias [cout];
//           router W1 [width, cin], b1 [width], w2 [width], b2 [1]
//   head    weight [classes, channels], bias [classes]
#pragma once

#include <cstdint>
#include <vector>

namespace spnet {

enum class Shortcut { identity, pad, projection };

// Tensors are given as positions in the table of floats.
struct PlanConv {
  int64_t cin, cout, weight, bias;
};

struct PlanRouter {
  int64_t cin, width, weight1, bias1, weight2, bias2;
};

struct PlanBlock {
  int64_t in_height, in_width, out_height, out_width;
  int64_t stride;
  Shortcut shortcut;
  int64_t pad_before;
  PlanConv conv1, conv2, projection;
  PlanRouter router;
};

struct Plan {
  int64_t in_channels, in_height, in_width, num_classes;
  PlanConv stem, head;
  std::vector<PlanBlock> blocks;
};

// Checks every integer and the number of floats. Throws std::invalid_argument that names the block, the
// field, what was expected and what came; nothing but the integers is read.
Plan read_plan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats);

}  // namespace spnet
