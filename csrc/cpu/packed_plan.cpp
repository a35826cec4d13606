#include "packed_plan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "bfloat16.h"

namespace spnet::cpu {
namespace {

constexpr int64_t kLineBytes = 64;
// Of a large page: a convolution walks through more small ones than the processor keeps the addresses of.
constexpr int64_t kPageBytes = 2 << 20;

// Of one thread, to leave room in its core's cache for the weights of a block.
constexpr int64_t kWorkspaceBytes = 768 << 10;
constexpr int64_t kWeightBytes = 1 << 20;
constexpr int64_t kStripBytes = 512 << 10;

constexpr int64_t kWinogradChannels = 16;
constexpr int64_t kWinogradTiles = 4;
constexpr int64_t kWinogradTilesOfLargeWeights = 16;
// For each tile: more come slower from memory than they are multiplied; of the larger tile than those of the
// smaller one.
constexpr int64_t kStreamedBytes = 128 << 10;
constexpr int64_t kLargeTileBytes = 64 << 10;

// Behind each buffer of a workspace, so that AddressSanitizer sees who writes beyond it.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGuardBytes = kLineBytes;
void guard(const void* begin) { __asan_poison_memory_region(begin, kGuardBytes); }
#else
constexpr int64_t kGuardBytes = 0;
void guard(const void*) {}
#endif

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t whole_lines(int64_t bytes) { return round_up(bytes, kLineBytes); }

// Rows whose bytes stay in cache: whole tiles of Winograd's.
int64_t strip_of(int64_t row_bytes) { return std::max<int64_t>(kStripBytes / row_bytes / 4, 1) * 4; }

int64_t winograd_tiles(const PlanConv& conv, int side) {
  return (conv.out_height + side - 1) / side * ((conv.out_width + side - 1) / side);
}

int64_t winograd_bytes(const PlanConv& conv, int side) {
  return winograd_places(side) * conv.cin * conv.cout * sizeof(float);
}

// One side of a kernel, of three numbers, at the points of winograd.h.
void transform_kernel(int side, const double* kernel, double* places, int64_t step) {
  constexpr double one = 1;
  const double* const points = side == 2 ? &one : kWinogradPoints;
  places[0] = kernel[0];
  for (int i = 0; i < side / 2; ++i) {
    const double square = points[i] * points[i];
    places[0] /= square;
    double scale = 2 * square;
    for (int j = 0; j < side / 2; ++j) {
      if (j != i) scale *= square - points[j] * points[j];
    }
    const double even = (kernel[0] + square * kernel[2]) / scale, odd = points[i] * kernel[1] / scale;
    places[(2 * i + 1) * step] = even + odd;
    places[(2 * i + 2) * step] = even - odd;
  }
  places[(side + 1) * step] = kernel[2];
}

}  // namespace

AlignedFloats::AlignedFloats(int64_t size) {
  int64_t bytes = std::max<int64_t>(size, 1) * sizeof(float);
  const bool is_large = bytes >= kPageBytes;
  bytes = round_up(bytes, is_large ? kPageBytes : kLineBytes);
  data_.reset(static_cast<float*>(std::aligned_alloc(is_large ? kPageBytes : kLineBytes, bytes)));
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  if (is_large) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // refused: slower, no error
#endif
  std::memset(data_.get(), 0, bytes);
}

const ConvFunctions& choose_conv(const Kernels& kernels, const PlanConv& conv) {
  const int64_t tiles = winograd_tiles(conv, 2), large_tiles = winograd_tiles(conv, 4);
  const bool suits = kernels.winograd2 != nullptr && conv.kernel == 3 && conv.stride == 1 &&
                     std::min(conv.cin, conv.cout) >= kWinogradChannels && tiles >= kWinogradTiles &&
                     (winograd_bytes(conv, 2) <= kWeightBytes || tiles >= kWinogradTilesOfLargeWeights);
  if (!suits) return kernels.conv;
  // Three quarters of the products at most.
  const bool saves = 4 * winograd_places(4) * large_tiles <= 3 * winograd_places(2) * tiles;
  return saves && winograd_bytes(conv, 4) <= kLargeTileBytes * large_tiles ? *kernels.winograd4
                                                                           : *kernels.winograd2;
}

PackedPlan::PackedPlan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats,
                       Precision precision)
    : plan(read_plan(ints, n_ints, floats, n_floats)),
      level(cpu::level()),
      precision(precision),
      kernels(cpu::kernels(precision)),
      conv(kernels.conv),
      ops(kernels.ops) {
  for (const PlanConv& conv : plan.stem) stem.push_back(pack(floats, conv));
  const int64_t stem_row = row_bytes(plan.channels, plan.stem.back().out_width);
  stem_strip = strip_of(stem_row * 2);
  int64_t height = plan.height, width = plan.width;
  for (const PlanBlock& block : plan.blocks) {
    blocks.push_back(pack(floats, block, height, width));
    is_heavy |= blocks.back().is_heavy;
    height = block.out_height();
    width = block.out_width();
  }
  head = pack_linear(floats, plan.head.weight, plan.head.bias, plan.head.cin, plan.head.cout);
  measure();
}

PackedBlock PackedPlan::pack(const float* floats, const PlanBlock& shape, int64_t height, int64_t width) {
  PackedBlock block{};
  block.shape = shape;
  int64_t weight_bytes = 0, reach = 0, rows_bytes = row_bytes(shape.cin(), width) * shape.stride;
  for (const PlanConv& conv : shape.body) {
    block.body.push_back(pack(floats, conv));
    weight_bytes += block.body.back().bytes;
    rows_bytes += row_bytes(conv.cout, conv.out_width);
    block.squeezes |= conv.squeeze.width > 0;
    if (&conv != &shape.body.front()) reach += conv.kernel / 2;
  }
  // In place, a row must not be written before the first convolution has read it.
  const bool in_strips = !block.squeezes && reach >= shape.body.front().kernel / 2;
  block.strip = in_strips ? strip_of(rows_bytes) : shape.out_height();
  block.is_heavy = weight_bytes > std::max(kWeightBytes, map_bytes(shape.cin(), height, width));
  if (shape.is_projection()) {
    PlanConv projection = shape.projection;
    if (block.gathers()) projection.stride = 1;
    block.projection = pack(floats, projection);
  }
  const PlanRouter& router = shape.router;
  block.router = pack_linear(floats, router.weight1, router.bias1, router.cin, router.width);
  block.router_weight2 = pack_vector(floats + router.weight2, router.width);
  block.router_bias2 = floats[router.bias2];
  return block;
}

PackedConv PackedPlan::pack(const float* floats, const PlanConv& shape) {
  const ConvFunctions& functions = choose_conv(kernels, shape);
  const int side = functions.side;
  const float* weight = floats + shape.weight;
  const int64_t bytes = side > 1          ? pack_winograd(weight, shape, side)
                        : functions.tiles ? pack_tiles(weight, shape)
                                          : pack_direct(weight, shape);
  if (side > 1) {
    scratch_bytes_ = std::max<int64_t>(scratch_bytes_, functions.scratch(shape.cin) * sizeof(float));
  }
  const float* packed = packed_.back().get();
  const bool streams = side > 1 && bytes > kStreamedBytes * winograd_tiles(shape, side);
  const float* bias = pack_vector(floats + shape.bias, shape.cout);
  const int64_t vectors = conv.padded(shape.cout) / conv.vector;
  PackedConv result{&functions, packed, bias, shape, vectors, bytes, streams, {}, {}};
  const PlanSqueeze& squeeze = shape.squeeze;
  if (squeeze.width > 0) {
    result.squeeze = pack_linear(floats, squeeze.weight1, squeeze.bias1, shape.cout, squeeze.width);
    result.excite = pack_linear(floats, squeeze.weight2, squeeze.bias2, squeeze.width, shape.cout);
  }
  return result;
}

int64_t PackedPlan::pack_winograd(const float* weight, const PlanConv& shape, int side) {
  const int64_t lanes = conv.vector, outputs = conv.padded(shape.cout), reach = side + 2;
  const int64_t n_places = winograd_places(side);
  packed_.emplace_back(n_places * outputs * shape.cin);
  float* const packed = packed_.back().get();
  for (int64_t o = 0; o < shape.cout; ++o) {
    const int64_t first = o / (conv.group * lanes) * conv.group * lanes;
    const int64_t n = std::min(conv.group * lanes, outputs - first);
    float* const to = packed + n_places * first * shape.cin + o - first;
    for (int64_t c = 0; c < shape.cin; ++c, weight += 9) {
      // In double precision, so that the result is rounded once.
      double columns[6][3], places[winograd_places(4)];
      for (int x = 0; x < 3; ++x) {
        const double column[] = {weight[x], weight[3 + x], weight[6 + x]};
        transform_kernel(side, column, &columns[0][x], 3);
      }
      for (int64_t y = 0; y < reach; ++y) transform_kernel(side, columns[y], places + reach * y, 1);
      for (int64_t i = 0; i < n_places; ++i) to[(i * shape.cin + c) * n] = static_cast<float>(places[i]);
    }
  }
  return n_places * outputs * shape.cin * sizeof(float);
}

int64_t PackedPlan::pack_direct(const float* weight, const PlanConv& shape) {
  const int64_t cout = shape.cout, cin = shape.cin, kernel = shape.kernel, taps = kernel * kernel;
  const int64_t lanes = kernel == 7 ? kImageLanes : conv.lanes, step = conv.word_channels;
  const int64_t outputs = conv.padded(cout), group = conv.group * conv.vector;
  packed_.emplace_back(outputs * ((cin + step - 1) / step) * taps);
  float* to = packed_.back().get();
  for (int64_t first = 0; first < outputs; first += group) {
    const int64_t n = std::min(group, outputs - first);
    for (int64_t block = 0; block < cin; block += lanes) {
      for (int64_t ky = 0; ky < kernel; ++ky) {
        for (int64_t c = block; c < std::min(block + lanes, cin); c += step) {
          for (int64_t kx = 0; kx < kernel; ++kx, to += n) {
            for (int64_t lane = 0; lane < std::min(n, cout - first); ++lane) {
              const float* channels = weight + ((first + lane) * cin + c) * taps + ky * kernel + kx;
              pack_word(channels, taps, cin - c, to + lane);
            }
          }
        }
      }
    }
  }
  return (to - packed_.back().get()) * sizeof(float);
}

int64_t PackedPlan::pack_tiles(const float* weight, const PlanConv& shape) {
  const int64_t cout = shape.cout, cin = shape.cin, kernel = shape.kernel, taps = kernel * kernel;
  const int64_t lanes = kernel == 7 ? kImageLanes : conv.lanes_of(cin), out_lanes = conv.lanes_of(cout);
  const int64_t together = kTileOutputs / out_lanes;  // pixels
  const int64_t words = lanes / conv.word_channels;
  const int64_t rows = round_up((kernel + (together - 1) * shape.stride) * words, kTileWords);
  packed_.emplace_back(conv.padded(cout) * together * ((cin + lanes - 1) / lanes) * kernel * rows);
  float* to = packed_.back().get();
  for (int64_t first = 0; first < cout; first += out_lanes) {
    for (int64_t block = 0; block < cin; block += lanes) {
      for (int64_t ky = 0; ky < kernel; ++ky, to += rows * kTileOutputs) {
        for (int64_t pixel = 0; pixel < together; ++pixel) {
          for (int64_t i = 0; i < kernel * words; ++i) {
            const int64_t c = block + i % words * conv.word_channels;
            if (c >= cin) continue;
            float* const row = to + (pixel * shape.stride * words + i) * kTileOutputs + pixel * out_lanes;
            for (int64_t lane = 0; lane < std::min(out_lanes, cout - first); ++lane) {
              const float* channels = weight + ((first + lane) * cin + c) * taps + ky * kernel + i / words;
              pack_word(channels, taps, cin - c, row + lane);
            }
          }
        }
      }
    }
  }
  return (to - packed_.back().get()) * sizeof(float);
}

void PackedPlan::pack_word(const float* channels, int64_t step, int64_t left, float* to) const {
  if (precision == Precision::float32) {
    *to = *channels;
    return;
  }
  const uint16_t pair[] = {to_bfloat16(*channels), left > 1 ? to_bfloat16(channels[step]) : uint16_t{0}};
  std::memcpy(to, pair, sizeof(pair));
}

const float* PackedPlan::pack_vector(const float* values, int64_t n) {
  packed_.emplace_back(conv.padded(n));
  std::copy(values, values + n, packed_.back().get());
  return packed_.back().get();
}

Linear PackedPlan::pack_linear(const float* floats, int64_t weight, int64_t bias, int64_t inputs,
                               int64_t outputs) {
  const int64_t lanes = conv.vector;
  packed_.emplace_back(conv.padded(outputs) * inputs);
  float* to = packed_.back().get();
  for (int64_t o = 0; o < outputs; ++o) {
    float* column = to + o / lanes * lanes * inputs + o % lanes;
    for (int64_t i = 0; i < inputs; ++i) column[i * lanes] = floats[weight + o * inputs + i];
  }
  return {to, pack_vector(floats + bias, outputs), inputs, outputs};
}

int64_t PackedPlan::row_bytes(int64_t channels, int64_t width) const {
  return conv.padded(channels) * width * element_bytes();
}

int64_t PackedPlan::map_bytes(int64_t channels, int64_t height, int64_t width) const {
  return whole_lines(conv.map(channels, height, width) * element_bytes());
}

void PackedPlan::measure() {
  const auto grow = [](int64_t& bytes, int64_t wanted) { bytes = std::max(bytes, wanted + kGuardBytes); };
  const auto floats = [](int64_t n) { return whole_lines(n * sizeof(float)); };
  const auto sums = [&](int64_t channels, int64_t height) {
    const int64_t padded = conv.padded(channels);
    grow(sums_bytes_, floats(padded * height));
    grow(pooled_bytes_, floats(padded));
  };
  const auto state = [&](int64_t channels, int64_t height, int64_t width) {
    grow(state_bytes_, map_bytes(channels, height, width));
    sums(channels, height);
  };
  const auto middle = [&](int64_t i, const PlanConv& conv) {
    grow(middle_bytes_[i % 2], map_bytes(conv.cout, conv.out_height, conv.out_width));
  };
  if (plan.stem[0].kernel == 7) {
    const int64_t pixels = (plan.in_height + 6) * (plan.in_width + 6) + kSlackPixels;
    grow(middle_bytes_[0], whole_lines(pixels * kImageLanes * element_bytes()));
  } else {
    grow(middle_bytes_[0], map_bytes(plan.in_channels, plan.in_height, plan.in_width));
  }
  for (size_t i = 0; i + 1 < plan.stem.size(); ++i) middle(i + 1, plan.stem[i]);
  state(plan.channels, plan.stem.back().out_height, plan.stem.back().out_width);
  state(plan.channels, plan.height, plan.width);  // larger where a pooling of stride 1 is padded
  for (const PlanBlock& block : plan.blocks) {
    for (size_t i = 0; i < block.body.size(); ++i) {
      const PlanConv& conv = block.body[i];
      const bool squeezes = conv.squeeze.width > 0;
      if (squeezes || i + 1 < block.body.size()) middle(i, conv);
      if (squeezes) sums(conv.cout, conv.out_height);
      grow(hidden_bytes_, floats(conv.squeeze.width));
    }
    if (block.is_projection()) {
      grow(middle_bytes_[0], map_bytes(block.cin(), block.out_height(), block.out_width()));
    }
    grow(hidden_bytes_, floats(block.router.width));
    state(block.cout(), block.out_height(), block.out_width());
  }
}

int64_t PackedPlan::workspace_samples() const {
  if (is_heavy) return kMostSamples;
  const int64_t fitting =
      (kWorkspaceBytes - scratch_bytes_ - middle_bytes_[0] - middle_bytes_[1]) / sample_bytes();
  return std::clamp<int64_t>(fitting, 1, kMostSamples);
}

int64_t PackedPlan::bytes_of(int64_t samples) const {
  return (is_heavy ? samples : 1) * (middle_bytes_[0] + middle_bytes_[1]) + samples * sample_bytes();
}

std::unique_ptr<Workspace> PackedPlan::make_workspace(int64_t samples) const {
  std::unique_ptr<Workspace> result(new Workspace{AlignedFloats(bytes_of(samples) / sizeof(float)), {}, {}});
  float* next = result->memory.get();
  const auto take = [&](int64_t bytes) {
    float* const end = next + bytes / sizeof(float);
    if (bytes > 0) guard(end - kGuardBytes / sizeof(float));
    return std::exchange(next, end);
  };
  result->middles.resize(is_heavy ? samples : 1);
  for (Workspace::Middle& middle : result->middles) {
    for (int i : {0, 1}) middle[i].data = take(middle_bytes_[i]);
  }
  result->samples.resize(samples);
  for (Workspace::Sample& sample : result->samples) {
    sample.state.data = take(state_bytes_);
    sample.spare.data = take(state_bytes_);
    sample.row_sums = take(sums_bytes_);
    sample.pooled = take(pooled_bytes_);
    sample.hidden = take(hidden_bytes_);
  }
  return result;
}

std::vector<std::unique_ptr<Workspace>> PackedPlan::take_workspaces(int64_t count, int64_t samples) const {
  std::vector<std::unique_ptr<Workspace>> result;
  result.reserve(count);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int64_t>(result.size()) < count && !idle_.empty()) {
      if (idle_.back()->samples.size() >= static_cast<size_t>(samples))
        result.push_back(std::move(idle_.back()));
      idle_.pop_back();
    }
  }
  while (static_cast<int64_t>(result.size()) < count) result.push_back(make_workspace(samples));
  return result;
}

std::vector<AlignedFloats> PackedPlan::take_scratch(int64_t count) const {
  std::vector<AlignedFloats> result;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto last = idle_scratch_.end(), first = last - std::min<int64_t>(count, idle_scratch_.size());
    result.assign(std::make_move_iterator(first), std::make_move_iterator(last));
    idle_scratch_.erase(first, last);
  }
  while (static_cast<int64_t>(result.size()) < count) result.emplace_back(scratch_bytes_ / sizeof(float));
  return result;
}

void PackedPlan::give_back(std::vector<std::unique_ptr<Workspace>> workspaces,
                           std::vector<AlignedFloats> scratch) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& workspace : workspaces) idle_.push_back(std::move(workspace));
  for (auto& each : scratch) idle_scratch_.push_back(std::move(each));
}

}  // namespace spnet::cpu
