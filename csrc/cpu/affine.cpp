// Compiled once per level (see level.h).
//
// Every channel times its weight, plus its bias: bundles are single vectors, with one float32 weight for each
// of their channels, in bfloat16 maps too.
#include "conv.h"
#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

void run(const Conv& conv, const Part& part) {
  for (int64_t y = part.first_row; y < part.last_row; ++y) {
    for (int64_t number = part.first_bundle; number < part.last_bundle; ++number) {
      const Bundle& bundle = conv.bundles[number];
      const Vec weight = load(bundle.weight), bias = load(conv.bias + bundle.vector * kLanes);
      const Element* from = at(conv.in, bundle.vector, y);
      Element* to = at(conv.out, bundle.vector, y);
      Vec sum{};
      for (int64_t x = 0; x < conv.width; ++x, from += conv.in.lanes, to += conv.out.lanes) {
        Vec value = load_elements(from) * weight + bias;
        if (conv.residual) value += load_elements(to);
        if (conv.relu) value = relu(value);
        store_elements(to, value);
        sum += value;
      }
      if (conv.row_sums != nullptr) {
        store(conv.row_sums + (y * conv.vectors + bundle.vector) * kLanes, sum);
      }
    }
  }
}

}  // namespace

const ConvFunctions affine_functions = {kLanes, kLanes, 1, kWordChannels, false, 1, nullptr, run};

}  // namespace spnet::cpu::SPNET_LEVEL
