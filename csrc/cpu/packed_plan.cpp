#include "packed_plan.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "bfloat16.h"

namespace spnet::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

// Of one thread, to leave room in its core's cache for the weights of a block.
constexpr int64_t kWorkspaceBytes = 768 << 10;
constexpr int64_t kMostSamples = 8;

// Behind each buffer of a workspace, so that AddressSanitizer sees who writes beyond it.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGuardBytes = kLineBytes;
void guard(const void* begin) { __asan_poison_memory_region(begin, kGuardBytes); }
#else
constexpr int64_t kGuardBytes = 0;
void guard(const void*) {}
#endif

int64_t whole_lines(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

}  // namespace

AlignedFloats::AlignedFloats(int64_t size) {
  const int64_t bytes = whole_lines(std::max<int64_t>(size, 1) * sizeof(float));
  data_.reset(static_cast<float*>(std::aligned_alloc(kLineBytes, bytes)));
  if (!data_) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
}

PackedPlan::PackedPlan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats,
                       Precision precision)
    : plan(read_plan(ints, n_ints, floats, n_floats)),
      level(cpu::level()),
      precision(precision),
      conv(kernels(precision).conv),
      ops(kernels(precision).ops) {
  stem = pack(floats, plan.stem, 3);
  for (const PlanBlock& shape : plan.blocks) {
    PackedBlock block{};
    block.shape = shape;
    block.conv1 = pack(floats, shape.conv1, 3);
    block.conv2 = pack(floats, shape.conv2, 3);
    if (shape.shortcut == Shortcut::projection) block.projection = pack(floats, shape.projection, 1);
    const PlanRouter& router = shape.router;
    block.router = {pack_linear_weight(floats + router.weight1, router.width, router.cin),
                    pack_vector(floats + router.bias1, router.width), router.cin, router.width};
    block.router_weight2 = pack_vector(floats + router.weight2, router.width);
    block.router_bias2 = floats[router.bias2];
    blocks.push_back(block);
  }
  head = {pack_linear_weight(floats + plan.head.weight, plan.head.cout, plan.head.cin),
          pack_vector(floats + plan.head.bias, plan.head.cout), plan.head.cin, plan.head.cout};
  measure();
}

PackedConv PackedPlan::pack(const float* floats, const PlanConv& shape, int64_t kernel) {
  return {pack_conv_weight(floats + shape.weight, shape.cout, shape.cin, kernel),
          pack_vector(floats + shape.bias, shape.cout),
          shape.cin,
          shape.cout,
          vectors(shape.cout),
          kernel};
}

const void* PackedPlan::pack_conv_weight(const float* weight, int64_t cout, int64_t cin, int64_t kernel) {
  const int64_t lanes = conv.lanes, taps = kernel * kernel, step = conv.word_channels;
  const int64_t read = conv.tiles ? vectors(cin) * lanes : cin;
  packed_.emplace_back(vectors(cout) * lanes * ((read + step - 1) / step) * taps);
  float* to = packed_.back().get();
  for (int64_t vector = 0; vector < vectors(cout); vector += conv.group) {
    const int64_t first = vector * lanes;
    const int64_t n = std::min<int64_t>(conv.group, vectors(cout) - vector) * lanes;
    for (int64_t block = 0; block < cin; block += lanes) {
      const int64_t words = conv.tiles ? lanes / step : (std::min(lanes, cin - block) + step - 1) / step;
      for (int64_t ky = 0; ky < kernel; ++ky, to += words * kernel * n) {
        for (int64_t i = 0; i < words * kernel; ++i) {
          const int64_t word = conv.tiles ? i % words : i / kernel, kx = conv.tiles ? i / words : i % kernel;
          const int64_t c = block + word * step;
          if (c >= cin) continue;
          for (int64_t lane = 0; lane < std::min(n, cout - first); ++lane) {
            const float* channels = weight + ((first + lane) * cin + c) * taps + ky * kernel + kx;
            if (precision == Precision::float32) {
              to[i * n + lane] = *channels;
            } else {
              const uint16_t pair[] = {to_bfloat16(*channels),
                                       c + 1 < cin ? to_bfloat16(channels[taps]) : uint16_t{0}};
              std::memcpy(to + i * n + lane, pair, sizeof(pair));
            }
          }
        }
      }
    }
  }
  return packed_.back().get();
}

const float* PackedPlan::pack_vector(const float* values, int64_t n) {
  packed_.emplace_back(vectors(n) * conv.lanes);
  std::copy(values, values + n, packed_.back().get());
  return packed_.back().get();
}

const float* PackedPlan::pack_linear_weight(const float* weight, int64_t outputs, int64_t inputs) {
  const int64_t lanes = conv.lanes;
  packed_.emplace_back(vectors(outputs) * lanes * inputs);
  float* to = packed_.back().get();
  for (int64_t o = 0; o < outputs; ++o) {
    float* column = to + o / lanes * lanes * inputs + o % lanes;
    for (int64_t i = 0; i < inputs; ++i) column[i * lanes] = weight[o * inputs + i];
  }
  return to;
}

void PackedPlan::measure() {
  const auto grow = [](int64_t& bytes, int64_t elements, int64_t element_bytes) {
    bytes = std::max(bytes, whole_lines(elements * element_bytes) + kGuardBytes);
  };
  const auto map = [&](int64_t& bytes, int64_t channels, int64_t height, int64_t width) {
    const int64_t pixels = vectors(channels) * (height + 2) * (width + 2) + kSlackPixels;
    grow(bytes, pixels * conv.lanes, element_bytes());
  };
  const auto state = [&](int64_t channels, int64_t height, int64_t width) {
    map(state_bytes_, channels, height, width);
    grow(sums_bytes_, vectors(channels) * conv.lanes * height, sizeof(float));
    grow(pooled_bytes_, vectors(channels) * conv.lanes, sizeof(float));
  };
  map(middle_bytes_, plan.in_channels, plan.in_height, plan.in_width);
  state(plan.stem.cout, plan.in_height, plan.in_width);
  for (const PlanBlock& block : plan.blocks) {
    map(middle_bytes_, block.conv1.cout, block.out_height, block.out_width);
    grow(hidden_bytes_, block.router.width, sizeof(float));
    state(block.conv2.cout, block.out_height, block.out_width);
  }
}

int64_t PackedPlan::workspace_samples() const {
  const int64_t fitting = (kWorkspaceBytes - middle_bytes_ - hidden_bytes_) / sample_bytes();
  return std::clamp<int64_t>(fitting, 1, kMostSamples);
}

int64_t PackedPlan::workspace_bytes() const {
  return middle_bytes_ + hidden_bytes_ + workspace_samples() * sample_bytes();
}

std::unique_ptr<Workspace> PackedPlan::make_workspace() const {
  std::unique_ptr<Workspace> result(
      new Workspace{AlignedFloats(workspace_bytes() / sizeof(float)), {}, {}, {}});
  float* next = result->memory.get();
  const auto take = [&](int64_t bytes) {
    float* const end = next + bytes / sizeof(float);
    if (bytes > 0) guard(end - kGuardBytes / sizeof(float));
    return std::exchange(next, end);
  };
  result->middle.data = take(middle_bytes_);
  result->hidden = take(hidden_bytes_);
  result->samples.resize(workspace_samples());
  for (Workspace::Sample& sample : result->samples) {
    sample.state.data = take(state_bytes_);
    sample.spare.data = take(state_bytes_);
    sample.row_sums = take(sums_bytes_);
    sample.pooled = take(pooled_bytes_);
  }
  return result;
}

std::vector<std::unique_ptr<Workspace>> PackedPlan::take_workspaces(int64_t count) const {
  std::vector<std::unique_ptr<Workspace>> result;
  result.reserve(count);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int64_t>(result.size()) < count && !idle_.empty()) {
      result.push_back(std::move(idle_.back()));
      idle_.pop_back();
    }
  }
  while (static_cast<int64_t>(result.size()) < count) result.push_back(make_workspace());
  return result;
}

void PackedPlan::give_back(std::vector<std::unique_ptr<Workspace>> workspaces) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& workspace : workspaces) idle_.push_back(std::move(workspace));
}

}  // namespace spnet::cpu
