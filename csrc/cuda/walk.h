// The walk on a GPU: one launch runs the whole network. Of GPUs an H100 alone has run it.
#pragma once

#include <cstdint>
#include <memory>

#include "../walk_batch.h"
#include "plan.h"

namespace spnet::cuda {

// A network in the memory of a device. It must outlive the launches, and the graphs that captured them.
class DevicePlan {
 public:
  // Copies everything, and waits for it; not while a stream is captured.
  // Throws std::invalid_argument as lay_out_walk, for the shared memory of this device, and for one older
  // than sm_80; std::runtime_error if a CUDA call fails.
  template <class Element>
  static std::unique_ptr<DevicePlan> make(const Plan& plan, const float* floats, int device);
  ~DevicePlan();

  // On the caller's stream, without waiting. Several threads and streams may run one plan at once.
  void run(const WalkBatch& batch, std::uintptr_t stream) const;

  int64_t shared_bytes() const;

 private:
  struct State;
  explicit DevicePlan(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace spnet::cuda
