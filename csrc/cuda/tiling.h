// Index arithmetic of the CUDA kernels, in functions that run on the host too so that it can be tested there.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SPNET_HOST_DEVICE __host__ __device__
#else
#define SPNET_HOST_DEVICE
#endif

namespace spnet::cuda {

struct Span {
  int64_t begin, end;
};

// Part `part` of [0, n) cut into `parts` consecutive spans whose lengths are multiples of 32 (the last ones
// may be shorter or empty): a warp then reads 32 neighbours at a time.
SPNET_HOST_DEVICE inline Span warp_span(int64_t n, int parts, int part) {
  const int64_t length = ((n + parts - 1) / parts + 31) / 32 * 32;
  const int64_t begin = length * part < n ? length * part : n;
  return {begin, begin + length < n ? begin + length : n};
}

// Rows of row_elems elements are cut into tiles of tile_elems; tiles are numbered row by row.
SPNET_HOST_DEVICE inline int64_t tiles_per_row(int64_t row_elems, int64_t tile_elems) {
  return (row_elems + tile_elems - 1) / tile_elems;
}

struct Tile {
  int64_t row;
  Span elems;  // of that row
};

SPNET_HOST_DEVICE inline Tile row_tile(int64_t tile, int64_t row_elems, int64_t tile_elems) {
  const int64_t per_row = tiles_per_row(row_elems, tile_elems);
  const int64_t row = tile / per_row;
  const int64_t begin = (tile - row * per_row) * tile_elems;
  return {row, {begin, begin + tile_elems < row_elems ? begin + tile_elems : row_elems}};
}

// A division that is a multiplication: that of integers takes a GPU twenty instructions, most of which wait
// for the one before. Exact where dividend * divisor < 2^18, and dividend < 2^13 * divisor.
struct Divisor {
  int32_t value, inverse;

  static Divisor of(int32_t value) { return {value, (1 << 18) / value + 1}; }
  template <class Int>
  SPNET_HOST_DEVICE Int divide(Int dividend) const {
    return dividend * inverse >> 18;
  }
};

}  // namespace spnet::cuda
