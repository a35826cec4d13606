// Rows of a dense matrix picked by an index list: the data movement around a routed block.
//
// A row is one sample. Every function checks its index list before it writes anything.
#pragma once

#include <cstdint>

namespace spnet::cpu {

enum class Dtype { float32, float64, bfloat16, float16 };

// Bytes moved below which a call stays in its thread: waking a worker costs more than it saves.
constexpr int64_t kSmallBytes = 256 * 1024;

// Writes the positions of the non-zero bytes of mask [batch] to out, in ascending order, and returns their
// number. out must have room for `batch` values.
int64_t compact(const uint8_t* mask, int64_t batch, int64_t* out);

// dst[i] = src[index[i]] for i in [0, n); src has `batch` rows of row_bytes, dst has n.
// Throws std::out_of_range for an index outside [0, batch), std::invalid_argument for negative sizes or null.
void gather_rows(const void* src, int64_t batch, const int64_t* index, int64_t n, void* dst,
                 int64_t row_bytes, int threads);

// dst[index[i]] = dst[index[i]] + src[i], or its ReLU, for i in [0, n), in place. Halves are added in float
// and rounded once, to nearest even. Throws as gather_rows does, and std::invalid_argument where an index
// stands twice or src overlaps dst.
void scatter_add_rows(void* dst, int64_t batch, const int64_t* index, int64_t n, const void* src,
                      int64_t row_elems, Dtype dtype, bool relu, int threads);

}  // namespace spnet::cpu
