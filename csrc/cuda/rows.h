// The operations of cpu/rows.h on device memory. Of GPUs an H100 alone has run them.
//
// All work is put on the caller's stream and nothing waits for it. The number of rows stays on the device:
// kernels are launched for at most n_max rows and read *count themselves (null: all n_max), so that no call
// synchronises. An index outside [0, batch) traps, as PyTorch's own index kernels do; that indices are
// distinct is not checked. A failed launch throws std::runtime_error.
#pragma once

#include <cstdint>

#include "stream.h"

namespace spnet::cuda {

enum class Dtype { float32, bfloat16, float16 };

// out [batch] gets the positions of the non-zero bytes of mask [batch] in ascending order, *count their
// number.
void compact(Stream stream, const uint8_t* mask, int64_t batch, int64_t* out, int64_t* count);

void gather_rows(Stream stream, const void* src, int64_t batch, const int64_t* index, const int64_t* count,
                 int64_t n_max, void* dst, int64_t row_bytes);

void scatter_add_rows(Stream stream, void* dst, int64_t batch, const int64_t* index, const int64_t* count,
                      int64_t n_max, const void* src, int64_t row_elems, Dtype dtype, bool relu);

}  // namespace spnet::cuda
