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
  const int64_t in_lanes = pad.in.lanes, out_lanes = pad.out.lanes;
  const int64_t padded = (pad.cout + out_lanes - 1) / out_lanes * out_lanes;
  for (int64_t c = 0; c < padded; c += kChunk) {
    const int64_t from_channel = c - pad.pad_before;
    Element* to = out + c / out_lanes * pad.out.plane + c % out_lanes;
    if (from_channel < 0 || from_channel >= pad.cin) {
      for (int64_t x = 0; x < pad.width; ++x) std::memset(to + x * out_lanes, 0, kChunk * sizeof(Element));
    } else {
      const Element* from = in + from_channel / in_lanes * pad.in.plane + from_channel % in_lanes;
      for (int64_t x = 0; x < pad.width; ++x) {
        std::memcpy(to + x * out_lanes, from + x * pad.stride * in_lanes, kChunk * sizeof(Element));
      }
    }
  }
  if (pad.row_sums == nullptr) return;
  for (int64_t c = 0; c < padded; c += kLanes) {
    Vec sum{};
    const Element* from = out + c / out_lanes * pad.out.plane + c % out_lanes;
    for (int64_t x = 0; x < pad.width; ++x) sum += load_elements(from + x * out_lanes);
    store(pad.row_sums + y * padded + c, sum);
  }
}

void pad_shortcut(const PadShortcut& pad, int64_t row_begin, int64_t row_end) {
  const bool aligned = pad.pad_before % 4 == 0 && pad.cin % 4 == 0;
  for (int64_t y = row_begin; y < row_end; ++y) aligned ? pad_row<4>(pad, y) : pad_row<1>(pad, y);
}

void means(const Means& means, int64_t row_begin, int64_t row_end) {
  const int64_t lanes = means.in.lanes, stride = means.stride;
  for (int64_t y = row_begin; y < row_end; ++y) {
    const int64_t below = means.in_height - y * stride, rows = below < stride ? below : stride;
    for (int64_t v = 0; v < means.vectors; ++v) {
      const Element* from = at(means.in, v, y * stride);
      Element* to = at(means.out, v, y);
      for (int64_t x = 0; x < means.width; ++x, from += stride * lanes, to += lanes) {
        const int64_t left = means.in_width - x * stride, columns = left < stride ? left : stride;
        Vec sum{};
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) sum += load_elements(from + i * means.in.row + j * lanes);
        }
        store_elements(to, sum / static_cast<float>(rows * columns));
      }
    }
  }
}

void scale(const Scale& scale, int64_t row_begin, int64_t row_end) {
  const int64_t lanes = scale.in.lanes;
  for (int64_t y = row_begin; y < row_end; ++y) {
    for (int64_t v = 0; v < scale.vectors; ++v) {
      const Element* from = at(scale.in, v, y);
      Element* to = at(scale.out, v, y);
      const Vec factors = load(scale.factors + v * kLanes);
      Vec sum{};
      for (int64_t x = 0; x < scale.width; ++x, from += lanes, to += lanes) {
        Vec value = factors * load_elements(from);
        if (scale.adds) value += load_elements(to);
        if (scale.relu) value = relu(value);
        store_elements(to, value);
        sum += value;
      }
      if (scale.row_sums != nullptr) store(scale.row_sums + (y * scale.vectors + v) * kLanes, sum);
    }
  }
}

// Keeps NaN.
inline Vec larger(Vec a, Vec b) { return ((b > a) | (b != b)) ? b : a; }

// Of the places under a kernel, where there are pixels.
struct Range {
  int64_t begin, end;

  Range(int64_t first, int64_t kernel, int64_t size)
      : begin(first < 0 ? 0 : first), end(first + kernel < size ? first + kernel : size) {}
};

void max_pool(const MaxPool& pool, int64_t row_begin, int64_t row_end) {
  const int64_t lanes = pool.in.lanes;
  for (int64_t y = row_begin; y < row_end; ++y) {
    const Range rows(y * pool.stride - pool.padding, pool.kernel, pool.in_height);
    for (int64_t v = 0; v < pool.vectors; ++v) {
      const Element* in = at(pool.in, v, 0);
      Element* to = at(pool.out, v, y);
      Vec sum{};
      for (int64_t x = 0; x < pool.width; ++x, to += lanes) {
        const Range columns(x * pool.stride - pool.padding, pool.kernel, pool.in_width);
        Vec most = load_elements(in + rows.begin * pool.in.row + columns.begin * lanes);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            most = larger(most, load_elements(in + i * pool.in.row + j * lanes));
          }
        }
        store_elements(to, most);
        sum += most;
      }
      store(pool.row_sums + (y * pool.vectors + v) * kLanes, sum);
    }
  }
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

constexpr int kColumn = 8;  // vectors

int64_t padded_outputs(const Linear& linear) { return (linear.outputs + kLanes - 1) / kLanes * kLanes; }

int64_t linear_columns(const Linear& linear) {
  return (padded_outputs(linear) + kColumn * kLanes - 1) / (kColumn * kLanes);
}

void linear(const Linear& linear, const float* const* in, float* const* out, int64_t n, int64_t begin,
            int64_t end) {
  const int64_t padded = padded_outputs(linear);
  Vec part[kColumn];
  for (int64_t column = begin; column < end; ++column) {
    int64_t o = column * kColumn * kLanes;
    const int64_t stop = o + kColumn * kLanes < padded ? o + kColumn * kLanes : padded;
    const int64_t step = stop - o == kColumn * kLanes ? stop - o : kLanes;
    for (; o < stop; o += step) {
      const float* weight = linear.weight + o * linear.inputs;
      const int64_t outputs = o + step > linear.outputs ? linear.outputs - o : step;
      for (int64_t i = 0; i < n; ++i) {
        if (step == kLanes) {
          linear_vectors<1>(weight, linear.bias + o, linear.inputs, in[i], part);
        } else {
          linear_vectors<kColumn>(weight, linear.bias + o, linear.inputs, in[i], part);
        }
        std::memcpy(out[i] + o, part, outputs * sizeof(float));
      }
    }
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

const WalkOps walk_ops = {max_pool, pad_shortcut, means, scale, pool, linear, linear_columns, margin};

}  // namespace spnet::cpu::SPNET_LEVEL
