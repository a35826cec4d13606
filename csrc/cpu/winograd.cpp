// Compiled once per level (see level.h).
#include "winograd.h"

#include <utility>

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

constexpr int kGroup = 2;
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
int64_t most_tiles(int64_t cin) { return cin < 128 ? 16 : 32; }

// out[tile][output] = sum over channels of in[plane][tile][channel] * weight[channel][output].
template <int kTiles, int kVectors>
void multiply(const float* in, int64_t plane, int64_t channels, const float* weight, float* out) {
  Vec acc[kTiles][kVectors] = {};
  for (; channels > 0; channels -= kLanes, in += plane) {
    const int64_t n = channels < kLanes ? channels : kLanes;
#pragma GCC unroll 4
    for (int64_t c = 0; c < n; ++c) {
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
struct Chunk {
  int64_t first, count, in_row;  // tiles of a whole row
  int64_t planes;
  float *in, *products;  // [places][planes][tiles][lanes], [places][tiles][outputs of the group]

  int64_t y(int64_t i) const { return (first + i) / in_row * 2; }
  int64_t x(int64_t i) const { return (first + i) % in_row * 2; }
  int64_t in_place() const { return planes * count * kLanes + kGap; }
  int64_t products_place(int64_t vectors) const { return count * vectors * kLanes + kGap; }
};

// Four places of `n` neighbours from upper + lower, or from upper - lower. Neighbours share two columns.
template <bool kAdds>
void transform_row(const float* upper, const float* lower, int64_t n, float* out, int64_t place) {
  const auto column = [&](int64_t x) {
    const Vec a = load(upper + x * kLanes), b = load(lower + x * kLanes);
    return kAdds ? a + b : a - b;
  };
  Vec first = column(0), second = column(1);
  for (; n > 0; --n, upper += 2 * kLanes, lower += 2 * kLanes, out += kLanes) {
    const Vec third = column(2), fourth = column(3);
    store(out, first - third);
    store(out + place, second + third);
    store(out + 2 * place, third - second);
    store(out + 3 * place, second - fourth);
    first = third;
    second = fourth;
  }
}

void transform_in(const Conv& conv, const Chunk& chunk) {
  const int64_t row = conv.in.row, place = chunk.in_place();
  for (int64_t i = 0, n; i < chunk.count; i += n) {
    const int64_t y = chunk.y(i), x = chunk.x(i), in_row = chunk.in_row - x / 2;
    n = in_row < chunk.count - i ? in_row : chunk.count - i;
    const float* in = static_cast<const float*>(conv.in.data) + y * row + x * kLanes;
    float* out = chunk.in + i * kLanes;
    for (int64_t c = 0; c < conv.cin; c += kLanes, in += conv.in.plane, out += chunk.count * kLanes) {
      const float *second = in + row, *third = second + row;
      // Of a map of an odd height there is no more to read.
      const float* fourth = y + 1 < conv.height ? third + row : third;
      transform_row<false>(in, third, n, out, place);
      transform_row<true>(second, third, n, out + 4 * place, place);
      transform_row<false>(third, second, n, out + 8 * place, place);
      transform_row<false>(second, fourth, n, out + 12 * place, place);
    }
  }
}

void multiply_all(const Conv& conv, const Chunk& chunk, int64_t vectors, const float* weight) {
  const Multiply* const multiplies = vectors == 1 ? kMultiplies<1>.of_tiles : kMultiplies<2>.of_tiles;
  const int64_t most = kMaxTiles[vectors - 1], turns = (chunk.count + most - 1) / most;
  for (int place = 0; place < kWinogradPlaces; ++place, weight += conv.cin * vectors * kLanes) {
    const float* in = chunk.in + place * chunk.in_place();
    float* out = chunk.products + place * chunk.products_place(vectors);
    for (int64_t left = turns, tiles = chunk.count, n; left > 0; --left, tiles -= n) {
      n = (tiles + left - 1) / left;
      multiplies[n - 1](in, chunk.count * kLanes, conv.cin, weight, out);
      in += n * kLanes;
      out += n * vectors * kLanes;
    }
  }
}

// One row of a tile's outputs, as conv_tile ends.
void finish_row(const Conv& conv, int64_t vector, int64_t y, int64_t x, Vec left, Vec right) {
  float* to = static_cast<float*>(conv.out.data) + vector * conv.out.plane + y * conv.out.row + x * kLanes;
  float* sums = conv.row_sums == nullptr ? nullptr : conv.row_sums + (y * conv.vectors + vector) * kLanes;
  Vec sum = x == 0 || sums == nullptr ? Vec{} : load(sums);
  const auto finish = [&](Vec value) {
    if (conv.residual) value += load(to);
    if (conv.relu) value = relu(value);
    store(to, value);
    sum += value;
    to += kLanes;
  };
  finish(left);
  if (x + 1 < conv.width) finish(right);
  if (sums != nullptr) store(sums, sum);
}

void transform_out(const Conv& conv, const Chunk& chunk, int64_t vector, int64_t vectors, const Part& part) {
  const int64_t place = chunk.products_place(vectors);
  const float* tile = chunk.products;
  int64_t y = chunk.y(0), x = chunk.x(0);
  for (int64_t i = 0; i < chunk.count; ++i) {
    for (int64_t v = 0; v < vectors; ++v, tile += kLanes) {
      const float* from = tile;
      Vec upper[4], lower[4];
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column, from += place) {
        const Vec second = load(from + 4 * place), third = load(from + 8 * place);
        upper[column] = load(from) + second + third;
        lower[column] = second - third - load(from + 12 * place);
      }
      const Vec bias = load(conv.bias + (vector + v) * kLanes);
      const auto finish = [&](int64_t y, const Vec* row) {
        if (y < part.first_row || y >= part.last_row) return;
        finish_row(conv, vector + v, y, x, row[0] + row[1] + row[2] + bias, row[1] - row[2] - row[3] + bias);
      };
      finish(y, upper);
      finish(y + 1, lower);
    }
    x += 2;
    if (x >= conv.width) {
      x = 0;
      y += 2;
    }
  }
}

int64_t scratch(int64_t cin) {
  const int64_t channels = (cin + kLanes - 1) / kLanes * kLanes;
  return kWinogradPlaces * (most_tiles(cin) * (channels + kGroup * kLanes) + 2 * kGap);
}

void run(const Conv& conv, const Part& part) {
  Chunk chunk{};
  chunk.in_row = (conv.width + 1) / 2;
  chunk.planes = (conv.cin + kLanes - 1) / kLanes;
  chunk.in = conv.scratch;
  chunk.first = part.first_row / 2 * chunk.in_row;
  int64_t left = (part.last_row + 1) / 2 * chunk.in_row - chunk.first;
  const int64_t most = most_tiles(conv.cin);
  for (int64_t turns = (left + most - 1) / most; turns > 0; --turns) {
    chunk.count = (left + turns - 1) / turns;
    chunk.products = chunk.in + kWinogradPlaces * chunk.in_place();
    transform_in(conv, chunk);
    for (int64_t group = part.first_group; group < part.last_group; ++group) {
      const int64_t vector = group * kGroup;
      const int64_t vectors = conv.vectors - vector < kGroup ? conv.vectors - vector : kGroup;
      const float* weight =
          static_cast<const float*>(conv.weight) + vector * kLanes * kWinogradPlaces * conv.cin;
      multiply_all(conv, chunk, vectors, weight);
      transform_out(conv, chunk, vector, vectors, part);
    }
    chunk.first += chunk.count;
    left -= chunk.count;
  }
}

}  // namespace

const ConvFunctions winograd_functions = {kLanes, kLanes, kGroup, kWordChannels, false, true, scratch, run};

}  // namespace spnet::cpu::SPNET_LEVEL
