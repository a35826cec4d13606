// The description of a routed network that the walkers execute: filled from Python, read by every device.
//
// The network, on one sample x [in_channels, in_height, in_width]:
//   map = stem(x), then max-pooled if pool_kernel > 0
//   for every block:  map = before(map)
//                     pooled = mean of map over its pixels
//                     margin = w2 . ReLU(W1 pooled + b1) + b2
//                     executes where margin > threshold (NaN: it does not)
//                     map = shortcut(map) + d * body(map), d = 1 if executed, else 0; its ReLU if relu = 1
//   map = after(map)
//   logits = Wh (mean of map over its pixels) + bh
// Stem, before, body and after are chains of convolutions; before and after may be empty. BatchNorm is folded
// into weights and biases; alone it is a convolution of 1x1 with as many groups as channels. Behind a
// convolution comes a ReLU if relu = 1, then, where squeeze > 0, squeeze-and-excitation: its map is
// multiplied by sigmoid(V2 ReLU(V1 (mean of the map over its pixels) + c1) + c2). A body's last one has relu
// = 0. A block with relu = 1 whose shortcut is the identity or a pad follows something with relu = 1, so that
// what skips it needs no ReLU.
//
// Integers (int64), one after the other: the header, the stem's convolutions, then every block with the
// convolutions of `before` and of its body behind it, then those of `after`:
//   header       format_version = 4, in_channels, in_height, in_width, num_classes, n_blocks,
//                pool_kernel, pool_stride, pool_padding (0, 0, 0: no pooling), n_convolutions of the stem,
//                n_convolutions of after
//   convolution  cin, cout, kernel, stride, padding, groups, squeeze, relu
//   block        n_convolutions of the body, shortcut (0 identity, 1 pad, 2 projection, 3 pooled),
//                shortcut_stride, pad_before, router_width, n_convolutions of before, relu
// A pad and a projection take every shortcut_stride-th pixel. A pad puts `pad_before` channels of zeros in
// front of its own and the rest behind; a projection is a 1x1 convolution. Pooled is a projection of the
// means of squares of shortcut_stride x shortcut_stride pixels, of those that there are at the lower and
// right edge.
//
// Floats (float32), one after the other without gaps:
//   stem    of each convolution weight [cout, cin / groups, kernel, kernel], bias [cout], and where it has
//           squeeze > 0: V1 [squeeze, cout], c1 [squeeze], V2 [cout, squeeze], c2 [cout]
//   block   of each convolution, of before and of the body, the same; projection and pooled:
//           weight [cout, cin], bias [cout]; router W1 [width, cin], b1 [width], w2 [width], b2 [1]
//   after   as the stem
//   head    weight [classes, channels], bias [classes]
//
// The structs below are what a walker runs of this: a stem that begins with 3x3, or with 7x7 of stride 2 and
// one group on 4 channels at most; bodies of two to four convolutions, with squeeze-and-excitation in them
// alone; 1x1 and 3x3, padding (kernel - 1) / 2, strides 1 and 2.
#pragma once

#include <cstdint>
#include <vector>

namespace spnet {

constexpr int64_t kMaxBody = 4;  // convolutions

enum class Shortcut { identity, pad, projection, pooled };

// Tensors are given as positions in the table of floats.
struct PlanSqueeze {
  int64_t width;  // 0: there is none
  int64_t weight1, bias1, weight2, bias2;
};

struct PlanConv {
  int64_t cin, cout, kernel, stride, groups;
  int64_t weight, bias;
  int64_t out_height, out_width;
  bool relu;
  PlanSqueeze squeeze;

  // Every channel times a number, plus another: a BatchNorm that is alone.
  bool is_affine() const { return kernel == 1 && stride == 1 && groups == cin && cin == cout; }
};

struct PlanPool {
  int64_t kernel, stride, padding;  // 0: no pooling
};

struct PlanRouter {
  int64_t cin, width, weight1, bias1, weight2, bias2;
};

struct PlanBlock {
  std::vector<PlanConv> before, body;
  int64_t height, width;  // of the map that the body is given
  int64_t stride;         // of the shortcut
  Shortcut shortcut;
  int64_t pad_before;
  bool relu;
  PlanConv projection;
  PlanRouter router;

  int64_t cin() const { return body.front().cin; }
  int64_t cout() const { return body.back().cout; }
  int64_t out_height() const { return body.back().out_height; }
  int64_t out_width() const { return body.back().out_width; }
  bool is_projection() const { return shortcut == Shortcut::projection || shortcut == Shortcut::pooled; }
};

struct Plan {
  int64_t in_channels, in_height, in_width, num_classes;
  std::vector<PlanConv> stem, after;
  PlanConv head;
  PlanPool pool;
  int64_t channels, height, width;  // of the map that the first block is given
  std::vector<PlanBlock> blocks;
};

// Checks every integer and the number of floats, and that a walker can run the network. Throws
// std::invalid_argument that names the block, the field, what was expected and what came; nothing but the
// integers is read.
Plan read_plan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats);

// Throws as read_plan does where a plan is more than the CIFAR form with basic blocks: a stem of one 3x3
// convolution of stride 1 without pooling, maps up to 64x64, bodies of two 3x3 convolutions with the stride
// on the first, ReLU behind every convolution and every block, nothing between blocks, no groups, no pooled
// shortcuts, no squeeze-and-excitation.
void require_cifar_form(const Plan& plan);

}  // namespace spnet
