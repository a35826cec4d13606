// A plan with its weights in the order in which the kernels of one instruction-set level read them.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
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

// How a convolution is computed.
struct ConvLayout {
  const ConvFunctions* functions;
  std::vector<Bundle> bundles;
  int64_t size;
  AlignedFloats weights;  // of all bundles, `size` zeros
};

// The fastest way. Winograd's ones are not with few channels, which would not pay for the transformations,
// nor on maps that tiles do not cover well, nor where weights come from memory for a few tiles. Outputs are
// computed vector by vector where that takes fewer products than larger bundles do, which read the channels
// of more groups.
ConvLayout lay_out(const Kernels& kernels, const PlanConv& conv);

// Of one thread at once.
constexpr int64_t kMostSamples = 8;
// As many as a body has convolutions but the last: a strip reads rows again that the one before it has left.
constexpr int64_t kMiddles = kMaxBody - 1;

struct PackedConv {
  const ConvFunctions* functions;
  std::vector<Bundle> bundles;
  const float* bias;
  PlanConv shape;
  int64_t vectors, bytes;  // of output channels; of the weights
  bool streams;            // by Winograd, with weights that come from memory for a few tiles
  Linear squeeze, excite;  // where shape.squeeze says so
};

struct PackedBlock {
  PlanBlock shape;
  std::vector<PackedConv> before, body;
  PackedConv projection;
  int64_t strip;  // rows that go through the block together, as many as stay in cache from its first
                  // convolution on
  bool is_heavy;  // its weights do not stay in cache while a sample goes through
  bool squeezes;  // so that each convolution ends before the next begins
  Linear router;
  const float* router_weight2;
  float router_bias2;

  // The pixels of a projection, one of four, are read again for every bundle of outputs: of heavy blocks from
  // a map of their own, as means are.
  bool gathers() const { return averages() || (is_heavy && shape.stride > 1); }
  // The averages lie where a body that goes strip by strip has its own maps, so they come before it.
  bool averages() const { return shape.shortcut == Shortcut::pooled; }
};

// A feature map in a buffer that is large enough for every map that will stand in it.
struct MapBuffer {
  void* data = nullptr;
  int64_t planes = 0, lanes = 0, halo = 0, height = 0, width = 0;
};

// What one thread writes to: in cache as long as the maps are small. It takes several samples through a block
// before the next, so that the weights come from its own cache for all but the first.
struct Workspace {
  struct Sample {
    MapBuffer state, spare;
    float* row_sums;
    float* pooled;
    float* hidden;
  };
  // What the convolutions of a body hand on, in turn.
  using Middle = std::array<MapBuffer, kMiddles>;

  AlignedFloats memory;
  std::vector<Sample> samples;
  std::vector<Middle> middles;  // one; or one for each sample, where they go through heavy blocks together
};

class PackedPlan {
 public:
  // For the level in use. Copies everything.
  // Throws std::invalid_argument as read_plan and kernels do.
  PackedPlan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats, Precision precision);

  const Plan plan;
  const Level level;
  const Precision precision;
  const Kernels kernels;
  const ConvFunctions& conv;
  const WalkOps& ops;
  std::vector<PackedConv> stem, after;
  int64_t stem_strip;  // rows of the pooled map that are computed together
  std::vector<PackedBlock> blocks;
  Linear head;
  bool is_heavy = false;  // a block is

  int64_t element_bytes() const { return 4 / conv.word_channels; }
  int64_t workspace_bytes() const { return bytes_of(workspace_samples()) + scratch_bytes_; }
  // The most samples that a thread takes through the blocks together.
  int64_t workspace_samples() const;

  // `count` workspaces for `samples` samples, and what each of `count` threads computes in, whoever's sample
  // it is: kept for the next call after they are given back.
  std::vector<std::unique_ptr<Workspace>> take_workspaces(int64_t count, int64_t samples) const;
  std::vector<AlignedFloats> take_scratch(int64_t count) const;
  void give_back(std::vector<std::unique_ptr<Workspace>> workspaces,
                 std::vector<AlignedFloats> scratch) const;

 private:
  int64_t row_bytes(int64_t channels, int64_t width) const;  // without a halo
  int64_t map_bytes(int64_t channels, int64_t height, int64_t width) const;
  const float* pack_vector(const float* values, int64_t n);
  PackedConv pack(const float* floats, const PlanConv& conv);
  std::vector<PackedConv> pack(const float* floats, const std::vector<PlanConv>& chain);
  // To zeros.
  void pack_affine(const float* weight, const PlanConv& conv, const Bundle& bundle, float* to) const;
  void pack_direct(const float* weight, const PlanConv& conv, const Bundle& bundle, float* to) const;
  void pack_tiles(const float* weight, const PlanConv& conv, const Bundle& bundle, float* to) const;
  void pack_winograd(const float* weight, const PlanConv& conv, const Bundle& bundle, int side,
                     float* to) const;
  // For every channel calls what of_channel(channel) returns with (output, weights [kernel, kernel]) of all
  // outputs that read it, both counted from the bundle's first.
  template <class OfChannel>
  void each_kernel(const float* weight, const PlanConv& conv, const Bundle& bundle,
                   const OfChannel& of_channel) const;
  // In a word that holds a channel and perhaps its neighbour.
  void pack_number(float value, int64_t channel, float* word) const;
  Linear pack_linear(const float* floats, int64_t weight, int64_t bias, int64_t inputs, int64_t outputs);
  PackedBlock pack(const float* floats, const PlanBlock& block);
  void measure();
  int64_t middles_bytes() const {
    return std::accumulate(middle_bytes_.begin(), middle_bytes_.end(), int64_t{0});
  }
  int64_t sample_bytes() const { return 2 * state_bytes_ + sums_bytes_ + pooled_bytes_ + hidden_bytes_; }
  int64_t bytes_of(int64_t samples) const;
  std::unique_ptr<Workspace> make_workspace(int64_t samples) const;

  std::vector<AlignedFloats> packed_;
  int64_t state_bytes_ = 0, sums_bytes_ = 0, pooled_bytes_ = 0, hidden_bytes_ = 0;
  std::array<int64_t, kMiddles> middle_bytes_{};
  int64_t scratch_bytes_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
  mutable std::vector<AlignedFloats> idle_scratch_;
};

}  // namespace spnet::cpu
