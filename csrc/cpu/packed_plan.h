// A plan with its weights in the order in which the kernels of one instruction-set level read them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "level.h"
#include "plan.h"

namespace spnet::cpu {

// Zeros, aligned to a cache line.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t size);
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

struct PackedConv {
  const void* weight;
  const float* bias;
  int64_t cin, cout, vectors, kernel;
};

struct PackedBlock {
  PlanBlock shape;
  PackedConv conv1, conv2, projection;
  Linear router;
  const float* router_weight2;
  float router_bias2;
};

// A feature map in a buffer that is large enough for every map that will stand in it.
struct MapBuffer {
  void* data = nullptr;
  int64_t vectors = 0, height = 0, width = 0;
};

// What one thread writes to: in cache as long as the maps are small. It takes several samples through a block
// before the next, so that the weights come from its own cache for all but the first.
struct Workspace {
  struct Sample {
    MapBuffer state, spare;
    float* row_sums;
    float* pooled;
  };

  AlignedFloats memory;
  MapBuffer middle;
  float* hidden;
  std::vector<Sample> samples;
};

class PackedPlan {
 public:
  // For the level in use. Copies everything.
  // Throws std::invalid_argument as read_plan and kernels do.
  PackedPlan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats, Precision precision);

  const Plan plan;
  const Level level;
  const Precision precision;
  const ConvFunctions& conv;
  const WalkOps& ops;
  PackedConv stem;
  std::vector<PackedBlock> blocks;
  Linear head;

  int64_t element_bytes() const { return 4 / conv.word_channels; }
  int64_t workspace_bytes() const;
  int64_t workspace_samples() const;

  // `count` workspaces, kept for the next call after they are given back.
  std::vector<std::unique_ptr<Workspace>> take_workspaces(int64_t count) const;
  void give_back(std::vector<std::unique_ptr<Workspace>> workspaces) const;

 private:
  int64_t vectors(int64_t channels) const { return (channels + conv.lanes - 1) / conv.lanes; }
  const void* pack_conv_weight(const float* weight, int64_t cout, int64_t cin, int64_t kernel);
  const float* pack_vector(const float* values, int64_t n);
  const float* pack_linear_weight(const float* weight, int64_t outputs, int64_t inputs);
  PackedConv pack(const float* floats, const PlanConv& conv, int64_t kernel);
  void measure();
  int64_t sample_bytes() const { return 2 * state_bytes_ + sums_bytes_ + pooled_bytes_; }
  std::unique_ptr<Workspace> make_workspace() const;

  std::vector<AlignedFloats> packed_;
  int64_t state_bytes_ = 0, middle_bytes_ = 0, sums_bytes_ = 0, pooled_bytes_ = 0, hidden_bytes_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace spnet::cpu
