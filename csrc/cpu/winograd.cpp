// Compiled once per level (see level.h).
#include "winograd.h"

#include <utility>

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

constexpr int kBundle = 2;
// Between the numbers of one place and of the next, so that those of a tile do not compete for cache lines.
constexpr int64_t kGap = 16;

// Accumulators are registers: tiles times vectors of output channels, beside the weights of one channel and
// one broadcast number.
#if defined(__AVX512F__)
constexpr int kMaxTiles[] = {16, 12};  // of 32 registers; [vectors - 1]
#elif defined(__AVX2__)
constexpr int kMaxTiles[] = {12, 5};  // of 16 registers
#else
constexpr int kMaxTiles[] = {8, 5};  // of 16 registers, with products that need one
#endif

// Tiles whose products are computed together: few, to stay in cache; more where weights come from farther.
int64_t most_tiles(int64_t channels) { return channels < 128 ? 16 : 32; }

// Of a tile of kSide x kSide outputs: what it reads, and its places, along one side.
template <int kSide>
constexpr int kReach = kSide + 2;

// B^T d: the places of one side, of its numbers.
template <int kSide>
void transform_in(const Vec* d, Vec* places) {
  if constexpr (kSide == 2) {
    places[0] = d[0] - d[2];
    places[1] = d[1] + d[2];
    places[2] = d[2] - d[1];
    places[3] = d[1] - d[3];
  } else {
    // Products of (x - point) over all other points, even and odd powers apart.
    constexpr float a = kWinogradPoints[0], b = kWinogradPoints[1], product = a * a * b * b,
                    sum = a * a + b * b;
    const Vec even_a = d[4] - b * b * d[2], odd_a = d[3] - b * b * d[1];
    const Vec even_b = d[4] - a * a * d[2], odd_b = d[3] - a * a * d[1];
    places[0] = d[4] - sum * d[2] + product * d[0];
    places[1] = even_a + a * odd_a;
    places[2] = even_a - a * odd_a;
    places[3] = even_b + b * odd_b;
    places[4] = even_b - b * odd_b;
    places[5] = d[5] - sum * d[3] + product * d[1];
  }
}

// A^T m: the outputs of one side, of its places.
template <int kSide>
void transform_out(const Vec* m, Vec* outputs) {
  if constexpr (kSide == 2) {
    outputs[0] = m[0] + m[1] + m[2];
    outputs[1] = m[1] - m[2] - m[3];
  } else {
    constexpr float a = kWinogradPoints[0], b = kWinogradPoints[1];
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    outputs[0] = m[0] + even_a + even_b;
    outputs[1] = a * odd_a + b * odd_b;
    outputs[2] = a * a * even_a + b * b * even_b;
    outputs[3] = a * a * a * odd_a + b * b * b * odd_b + m[5];
  }
}

// out[tile][output] = sum over channels of in[plane][tile][channel] * weight[channel][output]. `ahead`: as
// many cache lines of weights that are multiplied soon as there are channels, fetched meanwhile.
template <int kTiles, int kVectors>
void multiply(const float* in, int64_t plane, int64_t channels, const float* weight, const float* ahead,
              float* out) {
  Vec acc[kTiles][kVectors] = {};
  for (; channels > 0; channels -= kLanes, in += plane) {
    const int64_t n = channels < kLanes ? channels : kLanes;
#pragma GCC unroll 4
    for (int64_t c = 0; c < n; ++c, ahead += kLanes) {
      // A single vector's weights are few.
      if constexpr (kVectors > 1) __builtin_prefetch(ahead);
      Vec w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v, weight += kLanes) w[v] = load(weight);
#pragma GCC unroll 16
      for (int t = 0; t < kTiles; ++t) {
        const Vec x = broadcast(in + t * kLanes + c);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[t][v] = add_products(acc[t][v], x, w[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, out += kLanes) store(out, acc[t][v]);
  }
}

using Multiply = decltype(&multiply<1, 1>);

template <int kCount>
struct Multiplies {
  Multiply of_tiles[kCount];
};

template <int kVectors, int... kTiles>
constexpr Multiplies<sizeof...(kTiles)> make_multiplies(std::integer_sequence<int, kTiles...>) {
  return {{multiply<kTiles + 1, kVectors>...}};
}

template <int kVectors>
constexpr auto kMultiplies =
    make_multiplies<kVectors>(std::make_integer_sequence<int, kMaxTiles[kVectors - 1]>());

// Some tiles, in the order of the map's rows.
template <int kSide>
struct Chunk {
  int64_t first, count, in_row;  // tiles of a whole row
  int64_t plane, channels;       // of the input: the first plane, channels from there on
  float *in, *products;          // [places][planes][tiles][lanes], [places][tiles][outputs of a bundle]

  int64_t y(int64_t i) const { return (first + i) / in_row * kSide; }
  int64_t x(int64_t i) const { return (first + i) % in_row * kSide; }
  int64_t in_place() const { return (channels + kLanes - 1) / kLanes * count * kLanes + kGap; }
  int64_t products_place(int64_t vectors) const { return count * vectors * kLanes + kGap; }
};

// `n` neighbours, which share two columns. `last`: the map's last column, of zeros, as are those behind it.
template <int kSide>
void transform_neighbours(const float* const* rows, int64_t x, int64_t last, int64_t n, float* out,
                          int64_t place) {
  constexpr int kIn = kReach<kSide>;
  Vec columns[kIn][kIn];  // of the tile; each transformed
  const auto fill = [&](int column, int64_t from) {
    const int64_t offset = (from < last ? from : last) * kLanes;
    Vec numbers[kIn];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) numbers[i] = load(rows[i] + offset);
    transform_in<kSide>(numbers, columns[column]);
  };
  fill(kSide, x);
  fill(kSide + 1, x + 1);
  for (x += 2; n > 0; --n, x += kSide, out += kLanes) {
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) {
      columns[0][i] = columns[kSide][i];
      columns[1][i] = columns[kSide + 1][i];
    }
#pragma GCC unroll 4
    for (int column = 0; column < kSide; ++column) fill(column + 2, x + column);
    float* to = out;
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) {
      Vec row[kIn], places[kIn];
#pragma GCC unroll 6
      for (int column = 0; column < kIn; ++column) row[column] = columns[column][i];
      transform_in<kSide>(row, places);
#pragma GCC unroll 6
      for (int column = 0; column < kIn; ++column, to += place) store(to, places[column]);
    }
  }
}

template <int kSide>
void transform_all_in(const Conv& conv, const Chunk<kSide>& chunk) {
  for (int64_t i = 0, n; i < chunk.count; i += n) {
    const int64_t y = chunk.y(i), x = chunk.x(i), in_row = chunk.in_row - x / kSide;
    n = in_row < chunk.count - i ? in_row : chunk.count - i;
    const float* in = static_cast<const float*>(conv.in.data) + chunk.plane * conv.in.plane;
    float* out = chunk.in + i * kLanes;
    for (int64_t c = 0; c < chunk.channels; c += kLanes, in += conv.in.plane, out += chunk.count * kLanes) {
      const float* rows[kReach<kSide>];
      for (int64_t j = 0; j < kReach<kSide>; ++j) {
        // The last row is one of zeros, as are those behind it.
        rows[j] = in + (y + j <= conv.height ? y + j : conv.height + 1) * conv.in.row;
      }
      transform_neighbours<kSide>(rows, x, conv.width + 1, n, out, chunk.in_place());
    }
  }
}

template <int kSide>
void multiply_all(const Chunk<kSide>& chunk, const Bundle& bundle) {
  const int64_t vectors = bundle.vectors;
  const float* weight = bundle.weight;
  const Multiply* const multiplies = vectors == 1 ? kMultiplies<1>.of_tiles : kMultiplies<2>.of_tiles;
  const int64_t most = kMaxTiles[vectors - 1], turns = (chunk.count + most - 1) / most;
  for (int place = 0; place < winograd_places(kSide); ++place, weight += chunk.channels * vectors * kLanes) {
    const float* in = chunk.in + place * chunk.in_place();
    float* out = chunk.products + place * chunk.products_place(vectors);
    for (int64_t left = turns, tiles = chunk.count, n; left > 0; --left, tiles -= n) {
      n = (tiles + left - 1) / left;
      // The next place's, of which each turn takes a part.
      const float* ahead = weight + (vectors + (turns - left) % vectors) * chunk.channels * kLanes;
      multiplies[n - 1](in, chunk.count * kLanes, chunk.channels, weight, ahead, out);
      in += n * kLanes;
      out += n * vectors * kLanes;
    }
  }
}

// One row of a tile's outputs, as conv_tile ends.
template <int kSide>
void finish_row(const Conv& conv, int64_t vector, int64_t y, int64_t x, const Vec* outputs) {
  float* to = static_cast<float*>(conv.out.data) + vector * conv.out.plane + y * conv.out.row + x * kLanes;
  float* sums = conv.row_sums == nullptr ? nullptr : conv.row_sums + (y * conv.vectors + vector) * kLanes;
  Vec sum = x == 0 || sums == nullptr ? Vec{} : load(sums);
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i, to += kLanes) {
    if (i > 0 && x + i >= conv.width) break;
    Vec value = outputs[i];
    if (conv.residual) value += load(to);
    if (conv.relu) value = relu(value);
    store(to, value);
    sum += value;
  }
  if (sums != nullptr) store(sums, sum);
}

template <int kSide>
void transform_all_out(const Conv& conv, const Chunk<kSide>& chunk, const Bundle& bundle, const Part& part) {
  constexpr int kIn = kReach<kSide>;
  const int64_t place = chunk.products_place(bundle.vectors);
  const float* tile = chunk.products;
  int64_t y = chunk.y(0), x = chunk.x(0);
  for (int64_t i = 0; i < chunk.count; ++i) {
    for (int64_t v = bundle.vector; v < bundle.vector + bundle.vectors; ++v, tile += kLanes) {
      const float* from = tile;
      Vec columns[kIn][kSide];
#pragma GCC unroll 6
      for (int column = 0; column < kIn; ++column, from += place) {
        Vec places[kIn];
#pragma GCC unroll 6
        for (int j = 0; j < kIn; ++j) places[j] = load(from + j * kIn * place);
        transform_out<kSide>(places, columns[column]);
      }
      const Vec bias = load(conv.bias + v * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) {
        if (y + j < part.first_row || y + j >= part.last_row) continue;
        Vec row[kIn], outputs[kSide];
#pragma GCC unroll 6
        for (int column = 0; column < kIn; ++column) row[column] = columns[column][j];
        transform_out<kSide>(row, outputs);
#pragma GCC unroll 4
        for (int column = 0; column < kSide; ++column) outputs[column] += bias;
        finish_row<kSide>(conv, v, y + j, x, outputs);
      }
    }
    x += kSide;
    if (x >= conv.width) {
      x = 0;
      y += kSide;
    }
  }
}

template <int kSide>
int64_t scratch(int64_t channels) {
  const int64_t padded = (channels + kLanes - 1) / kLanes * kLanes;
  return winograd_places(kSide) * (most_tiles(channels) * (padded + kBundle * kLanes) + 2 * kGap);
}

// Bundles [begin, end), which read the same channels.
template <int kSide>
void run_bundles(const Conv& conv, const Part& part, const Bundle* begin, const Bundle* end) {
  Chunk<kSide> chunk{};
  chunk.in_row = (conv.width + kSide - 1) / kSide;
  chunk.plane = begin->plane;
  chunk.channels = begin->channels;
  chunk.in = conv.scratch;
  chunk.first = part.first_row / kSide * chunk.in_row;
  int64_t left = (part.last_row + kSide - 1) / kSide * chunk.in_row - chunk.first;
  const int64_t most = most_tiles(chunk.channels);
  for (int64_t turns = (left + most - 1) / most; turns > 0; --turns) {
    chunk.count = (left + turns - 1) / turns;
    chunk.products = chunk.in + winograd_places(kSide) * chunk.in_place();
    transform_all_in(conv, chunk);
    for (const Bundle* bundle = begin; bundle < end; ++bundle) {
      multiply_all(chunk, *bundle);
      transform_all_out(conv, chunk, *bundle, part);
    }
    chunk.first += chunk.count;
    left -= chunk.count;
  }
}

template <int kSide>
void run(const Conv& conv, const Part& part) {
  const Bundle* const last = conv.bundles + part.last_bundle;
  for (const Bundle *begin = conv.bundles + part.first_bundle, *end; begin < last; begin = end) {
    for (end = begin + 1; end < last && end->plane == begin->plane && end->channels == begin->channels;)
      ++end;
    run_bundles<kSide>(conv, part, begin, end);
  }
}

template <int kSide>
constexpr ConvFunctions functions() {
  return {kLanes, kLanes, kBundle, kWordChannels, false, kSide, scratch<kSide>, run<kSide>};
}

}  // namespace

const ConvFunctions winograd2_functions = functions<2>(), winograd4_functions = functions<4>();

}  // namespace spnet::cpu::SPNET_LEVEL
