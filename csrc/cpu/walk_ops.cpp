// Compiled once per level (see level.h).
#include "walk_ops.h"

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

// kChunk channels at a time: 4 where no chunk straddles the border between zeros and channels.
template <int kChunk>
void pad_row(const PadShortcut& pad, int64_t y) {
  const auto* in = static_cast<const Element*>(pad.in.data) + y * pad.stride * pad.in.row;
  auto* out = static_cast<Element*>(pad.out.data) + y * pad.out.row;
  const int64_t padded = (pad.cout + kLanes - 1) / kLanes * kLanes;
  for (int64_t c = 0; c < padded; c += kChunk) {
    const int64_t from_channel = c - pad.pad_before;
    Element* to = out + c / kLanes * pad.out.plane + c % kLanes;
    if (from_channel < 0 || from_channel >= pad.cin) {
      for (int64_t x = 0; x < pad.width; ++x) std::memset(to + x * kLanes, 0, kChunk * sizeof(Element));
    } else {
      const Element* from = in + from_channel / kLanes * pad.in.plane + from_channel % kLanes;
      for (int64_t x = 0; x < pad.width; ++x) {
        std::memcpy(to + x * kLanes, from + x * pad.stride * kLanes, kChunk * sizeof(Element));
      }
    }
  }
  if (pad.row_sums == nullptr) return;
  for (int64_t c = 0; c < padded; c += kLanes) {
    Vec sum{};
    for (int64_t x = 0; x < pad.width; ++x)
      sum += load_elements(out + c / kLanes * pad.out.plane + x * kLanes);
    store(pad.row_sums + y * padded + c, sum);
  }
}

void pad_shortcut(const PadShortcut& pad, int64_t row_begin, int64_t row_end) {
  const bool aligned = pad.pad_before % 4 == 0 && pad.cin % 4 == 0;
  for (int64_t y = row_begin; y < row_end; ++y) aligned ? pad_row<4>(pad, y) : pad_row<1>(pad, y);
}

void pool(const float* row_sums, int64_t height, int64_t vectors, int64_t pixels, float* pooled) {
  const float divisor = static_cast<float>(pixels);
  for (int64_t v = 0; v < vectors; ++v) {
    Vec sum = load(row_sums + v * kLanes);
    for (int64_t y = 1; y < height; ++y) sum += load(row_sums + (y * vectors + v) * kLanes);
    store(pooled + v * kLanes, sum / divisor);
  }
}

template <int kVectors>
void linear_vectors(const float* weight, const float* bias, int64_t inputs, const float* in, Vec* out) {
  Vec acc[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) acc[v] = load(bias + v * kLanes);
  for (int64_t i = 0; i < inputs; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[v] += in[i] * load(weight + (v * inputs + i) * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) out[v] = acc[v];
}

void linear(const Linear& linear, const float* in, float* out) {
  constexpr int kVectors = 8;
  const int64_t padded = (linear.outputs + kLanes - 1) / kLanes * kLanes;
  Vec part[kVectors];
  for (int64_t o = 0; o < linear.outputs;) {
    const float* weight = linear.weight + o * linear.inputs;
    int64_t n = kVectors * kLanes;
    if (o + n <= padded) {
      linear_vectors<kVectors>(weight, linear.bias + o, linear.inputs, in, part);
    } else {
      n = kLanes;
      linear_vectors<1>(weight, linear.bias + o, linear.inputs, in, part);
    }
    if (o + n > linear.outputs) n = linear.outputs - o;
    std::memcpy(out + o, part, n * sizeof(float));
    o += n;
  }
}

float margin(const float* hidden, const float* w, float bias, int64_t width) {
  Vec sums{};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) sums += load(w + i) * relu(load(hidden + i));
  for (int lane = 0; i + lane < width; ++lane) {
    const float h = hidden[i + lane];
    sums[lane] += w[i + lane] * (h < 0 ? 0 : h);
  }
  float sum = bias;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

}  // namespace

const WalkOps walk_ops = {pad_shortcut, pool, linear, margin};

}  // namespace spnet::cpu::SPNET_LEVEL
