#pragma once

#include <cstdint>

namespace spnet::cuda {

struct Stream {
  int device;
  std::uintptr_t handle;  // a cudaStream_t
};

}  // namespace spnet::cuda
