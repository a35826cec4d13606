#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "walk_batch.h"

using Address = std::uintptr_t;

// The arguments of every `run`.
inline spnet::WalkBatch batch_of(Address x, int64_t size, int64_t stride_n, int64_t stride_c,
                                 int64_t stride_h, int64_t stride_w, Address paths, float threshold,
                                 Address logits, Address decisions) {
  return {reinterpret_cast<const void*>(x),
          size,
          stride_n,
          stride_c,
          stride_h,
          stride_w,
          reinterpret_cast<const uint8_t*>(paths),
          threshold,
          reinterpret_cast<float*>(logits),
          reinterpret_cast<uint8_t*>(decisions)};
}

// core.Plan, and the measurements of its convolutions.
void bind_walk(pybind11::module_& m);
