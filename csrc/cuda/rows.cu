#include "rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "runtime.h"
#include "tiling.h"

namespace spnet::cuda {
namespace {

constexpr int kCompactThreads = 1024;
constexpr int kCompactWarps = kCompactThreads / 32;
constexpr int kRowThreads = 256;
constexpr int kPacksPerThread = 4;  // packs (16 bytes where aligned) that a tile gives each thread
constexpr int kBlocksPerMultiprocessor = 8;
constexpr unsigned kFullWarp = 0xffffffffu;

// A persistent grid: as many blocks as fit on the device, fewer where there are fewer tiles.
int grid_size(int device, int64_t tiles) {
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  return static_cast<int>(std::min<int64_t>(tiles, int64_t{multiprocessors} * kBlocksPerMultiprocessor));
}

// One block, every warp with its own span of the mask. The warps count, add up the counts of the warps before
// them, and write: the order is that of the mask and does not depend on scheduling.
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const uint8_t* __restrict__ mask, int64_t batch, int64_t* __restrict__ out,
                   int64_t* __restrict__ count) {
  __shared__ int warp_counts[kCompactWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Span span = warp_span(batch, kCompactWarps, warp);

  int selected_here = 0;
  for (int64_t first = span.begin; first < span.end; first += 32) {
    const int64_t i = first + lane;
    selected_here += __popc(__ballot_sync(kFullWarp, i < span.end && mask[i] != 0));
  }
  if (lane == 0) warp_counts[warp] = selected_here;
  __syncthreads();

  int64_t offset = __reduce_add_sync(kFullWarp, lane < warp ? warp_counts[lane] : 0);
  for (int64_t first = span.begin; first < span.end; first += 32) {
    const int64_t i = first + lane;
    const bool selected = i < span.end && mask[i] != 0;
    const unsigned ballot = __ballot_sync(kFullWarp, selected);
    if (selected) out[offset + __popc(ballot & ((1u << lane) - 1u))] = i;
    offset += __popc(ballot);
  }
  if (warp == kCompactWarps - 1 && lane == 0) *count = offset;
}

__device__ int64_t checked_row(const int64_t* index, int64_t position, int64_t batch) {
  const int64_t row = index[position];
  if (row < 0 || row >= batch) __trap();
  return row;
}

template <class Pack>
__global__ void __launch_bounds__(kRowThreads)
    gather_rows_kernel(const Pack* __restrict__ src, int64_t batch, const int64_t* __restrict__ index,
                       const int64_t* __restrict__ count, int64_t n_max, Pack* __restrict__ dst,
                       int64_t row_packs) {
  constexpr int64_t kTile = kRowThreads * kPacksPerThread;
  const int64_t n = count != nullptr ? min(*count, n_max) : n_max;
  const int64_t tiles = n * tiles_per_row(row_packs, kTile);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile tile = row_tile(t, row_packs, kTile);
    const Pack* from = src + checked_row(index, tile.row, batch) * row_packs;
    Pack* to = dst + tile.row * row_packs;
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const int64_t i = tile.elems.begin + k * kRowThreads + threadIdx.x;
      if (i < tile.elems.end) to[i] = from[i];
    }
  }
}

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void from_float(float value, float& to) { to = value; }
__device__ void from_float(float value, __half& to) { to = __float2half_rn(value); }
__device__ void from_float(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

template <class T, int width, bool relu>
__global__ void __launch_bounds__(kRowThreads)
    scatter_add_rows_kernel(Pack<T, width>* __restrict__ dst, int64_t batch,
                            const int64_t* __restrict__ index, const int64_t* __restrict__ count,
                            int64_t n_max, const Pack<T, width>* __restrict__ src, int64_t row_packs) {
  constexpr int64_t kTile = kRowThreads * kPacksPerThread;
  const int64_t n = count != nullptr ? min(*count, n_max) : n_max;
  const int64_t tiles = n * tiles_per_row(row_packs, kTile);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile tile = row_tile(t, row_packs, kTile);
    const Pack<T, width>* from = src + tile.row * row_packs;
    Pack<T, width>* to = dst + checked_row(index, tile.row, batch) * row_packs;
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const int64_t i = tile.elems.begin + k * kRowThreads + threadIdx.x;
      if (i >= tile.elems.end) break;
      Pack<T, width> sum = to[i];
      const Pack<T, width> add = from[i];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        float value = to_float(sum.values[j]) + to_float(add.values[j]);
        if (relu) value = value < 0.f ? 0.f : value;  // keeps NaN and -0, like PyTorch
        from_float(value, sum.values[j]);
      }
      to[i] = sum;
    }
  }
}

bool aligned(const void* a, const void* b, int64_t row_bytes, int64_t bytes) {
  const auto bits = reinterpret_cast<std::uintptr_t>(a) | reinterpret_cast<std::uintptr_t>(b);
  return bits % bytes == 0 && row_bytes % bytes == 0;
}

void check_sizes(int64_t batch, int64_t n_max, int64_t row_elems) {
  if (batch < 0 || n_max < 0 || row_elems < 0) {
    throw std::invalid_argument("sizes: expected none below 0, got batch " + std::to_string(batch) + ", n " +
                                std::to_string(n_max) + ", row elements " + std::to_string(row_elems));
  }
}

template <class Pack>
void launch_gather(Stream stream, const void* src, int64_t batch, const int64_t* index, const int64_t* count,
                   int64_t n_max, void* dst, int64_t row_bytes) {
  const int64_t row_packs = row_bytes / static_cast<int64_t>(sizeof(Pack));
  const int grid = grid_size(stream.device, n_max * tiles_per_row(row_packs, kRowThreads * kPacksPerThread));
  gather_rows_kernel<Pack><<<grid, kRowThreads, 0, native(stream)>>>(
      static_cast<const Pack*>(src), batch, index, count, n_max, static_cast<Pack*>(dst), row_packs);
  check(cudaGetLastError(), "gather_rows launch");
}

template <class T, int width, bool relu>
void launch_scatter(Stream stream, void* dst, int64_t batch, const int64_t* index, const int64_t* count,
                    int64_t n_max, const void* src, int64_t row_elems) {
  using Element = Pack<T, width>;
  const int64_t row_packs = row_elems / width;
  const int grid = grid_size(stream.device, n_max * tiles_per_row(row_packs, kRowThreads * kPacksPerThread));
  scatter_add_rows_kernel<T, width, relu><<<grid, kRowThreads, 0, native(stream)>>>(
      static_cast<Element*>(dst), batch, index, count, n_max, static_cast<const Element*>(src), row_packs);
  check(cudaGetLastError(), "scatter_add_rows launch");
}

template <class T>
void scatter(Stream stream, void* dst, int64_t batch, const int64_t* index, const int64_t* count,
             int64_t n_max, const void* src, int64_t row_elems, bool relu) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = aligned(src, dst, row_elems * static_cast<int64_t>(sizeof(T)), 16);
  const auto launch = wide ? (relu ? launch_scatter<T, kWide, true> : launch_scatter<T, kWide, false>)
                           : (relu ? launch_scatter<T, 1, true> : launch_scatter<T, 1, false>);
  launch(stream, dst, batch, index, count, n_max, src, row_elems);
}

}  // namespace

void compact(Stream stream, const uint8_t* mask, int64_t batch, int64_t* out, int64_t* count) {
  check_sizes(batch, 0, 0);
  const DeviceGuard guard(stream.device);
  compact_kernel<<<1, kCompactThreads, 0, native(stream)>>>(mask, batch, out, count);
  check(cudaGetLastError(), "compact launch");
}

void gather_rows(Stream stream, const void* src, int64_t batch, const int64_t* index, const int64_t* count,
                 int64_t n_max, void* dst, int64_t row_bytes) {
  check_sizes(batch, n_max, row_bytes);
  if (n_max == 0 || row_bytes == 0) return;
  const DeviceGuard guard(stream.device);
  const auto launch = aligned(src, dst, row_bytes, 16)  ? launch_gather<uint4>
                      : aligned(src, dst, row_bytes, 4) ? launch_gather<uint32_t>
                                                        : launch_gather<uint8_t>;
  launch(stream, src, batch, index, count, n_max, dst, row_bytes);
}

void scatter_add_rows(Stream stream, void* dst, int64_t batch, const int64_t* index, const int64_t* count,
                      int64_t n_max, const void* src, int64_t row_elems, Dtype dtype, bool relu) {
  check_sizes(batch, n_max, row_elems);
  if (n_max == 0 || row_elems == 0) return;
  const DeviceGuard guard(stream.device);
  switch (dtype) {
    case Dtype::float32:
      return scatter<float>(stream, dst, batch, index, count, n_max, src, row_elems, relu);
    case Dtype::bfloat16:
      return scatter<__nv_bfloat16>(stream, dst, batch, index, count, n_max, src, row_elems, relu);
    case Dtype::float16:
      return scatter<__half>(stream, dst, batch, index, count, n_max, src, row_elems, relu);
  }
  throw std::invalid_argument("dtype: unknown");
}

}  // namespace spnet::cuda
