// What both walks, on the CPU and on CUDA, are given and write.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace spnet {

struct WalkBatch {
  const void* x;
  int64_t size;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
  const uint8_t* paths;  // [size, blocks], non-zero: executes; null: the routers decide
  float threshold;
  float* logits;       // [size, classes]
  uint8_t* decisions;  // [size, blocks], 1 where a block was executed
};

// Throws std::invalid_argument for a negative size and null pointers.
inline void check_batch(const WalkBatch& batch, int64_t n_blocks) {
  const auto require = [](bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("walk: " + message);
  };
  require(batch.size >= 0, "batch: expected 0 or more, got " + std::to_string(batch.size));
  if (batch.size == 0) return;
  require(batch.x != nullptr, "x: null pointer");
  require(batch.logits != nullptr, "logits: null pointer");
  require(batch.decisions != nullptr || n_blocks == 0, "decisions: null pointer");
}

}  // namespace spnet
