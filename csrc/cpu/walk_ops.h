// What a walk computes beside its convolutions: shortcuts without weights, pooling, routers, the head,
// squeeze-and-excitation.
#pragma once

#include <cstdint>

#include "conv.h"
#include "level.h"

namespace spnet::cpu {

// Every stride-th pixel with zeros around its channels.
struct PadShortcut {
  MapView in, out;  // data: pixel (0, 0)
  int64_t cin, cout, pad_before, stride;
  int64_t width;    // of the output
  float* row_sums;  // as in Conv
};

// Every pixel the largest of those under its kernel.
struct MaxPool {
  MapView in, out;  // data: pixel (0, 0)
  int64_t kernel, stride, padding, in_height, in_width;
  int64_t width, vectors;  // of the output
  float* row_sums;         // as in Conv
};

// Every pixel the mean of a square of stride x stride, of those pixels that there are.
struct Means {
  MapView in, out;  // data: pixel (0, 0)
  int64_t stride, in_height, in_width;
  int64_t width, vectors;  // of the output
};

// Every channel times its number; `adds`: to what out holds.
struct Scale {
  MapView in, out;       // data: pixel (0, 0)
  const float* factors;  // [vectors * lanes]
  int64_t width, vectors;
  bool adds, relu;
  float* row_sums;  // as in Conv
};

// out = W in + b; the weight is stored as [vectors of outputs][inputs][lanes].
struct Linear {
  const float* weight;
  const float* bias;
  int64_t inputs, outputs;
};

struct WalkOps {
  void (*max_pool)(const MaxPool& pool, int64_t row_begin, int64_t row_end);

  void (*pad_shortcut)(const PadShortcut& pad, int64_t row_begin, int64_t row_end);

  void (*means)(const Means& means, int64_t row_begin, int64_t row_end);

  void (*scale)(const Scale& scale, int64_t row_begin, int64_t row_end);

  // pooled [vectors * lanes] = the sum of row_sums over its rows, from top to bottom, divided by `pixels`.
  void (*pool)(const float* row_sums, int64_t height, int64_t vectors, int64_t pixels, float* pooled);

  // Of n vectors, so that the weights are read once; columns [begin, end) of linear_columns(linear).
  void (*linear)(const Linear& linear, const float* const* in, float* const* out, int64_t n, int64_t begin,
                 int64_t end);
  int64_t (*linear_columns)(const Linear& linear);

  // w . ReLU(hidden) + bias
  float (*margin)(const float* hidden, const float* w, float bias, int64_t width);
};

#define SPNET_DECLARE(level)     \
  namespace level {              \
  extern const WalkOps walk_ops; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
SPNET_DECLARE(avx512_bf16)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
