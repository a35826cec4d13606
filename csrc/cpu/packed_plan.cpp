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

int64_t in_lanes(const ConvFunctions& functions, const PlanConv& conv) {
  return conv.kernel == 7 ? kImageLanes : functions.lanes_of(conv.cin);
}

// Bundles of so many vectors, but for the last one, and what each reads.
std::vector<Bundle> cut(const ConvFunctions& functions, const PlanConv& conv, int64_t most) {
  const int64_t inputs = conv.cin / conv.groups, outputs = conv.cout / conv.groups;
  const int64_t all = functions.padded(conv.cout) / functions.vector, lanes = in_lanes(functions, conv);
  std::vector<Bundle> bundles;
  for (int64_t vector = 0; vector < all; vector += most) {
    const int64_t vectors = std::min(most, all - vector);
    const int64_t begin = vector * functions.vector;
    const int64_t end = std::min(begin + vectors * functions.vector, conv.cout);
    const int64_t plane = begin / outputs * inputs / lanes;
    const int64_t channels = ((end - 1) / outputs + 1) * inputs - plane * lanes;
    bundles.push_back({vector, vectors, plane, channels, nullptr});
  }
  return bundles;
}

// Words of so many channels.
int64_t words_of(const ConvFunctions& functions, int64_t channels) {
  return (channels + functions.word_channels - 1) / functions.word_channels;
}

// Floats of the weights that tiles take for a row of a kernel and one plane.
int64_t tile_row(const ConvFunctions& functions, const PlanConv& conv) {
  const int64_t words = words_of(functions, in_lanes(functions, conv));
  const int64_t together = kTileOutputs / functions.lanes_of(conv.cout);  // pixels
  return round_up((conv.kernel + (together - 1) * conv.stride) * words, kTileWords) * kTileOutputs;
}

// Of a pixel under one tap.
int64_t count_products(const ConvFunctions& functions, const std::vector<Bundle>& bundles) {
  int64_t products = 0;
  for (const Bundle& bundle : bundles) products += bundle.vectors * functions.vector * bundle.channels;
  return products;
}

// Of the fewest products.
std::vector<Bundle> make_bundles(const ConvFunctions& functions, const PlanConv& conv) {
  if (conv.is_affine()) return cut(functions, conv, 1);
  std::vector<Bundle> widest = cut(functions, conv, functions.bundle);
  if (functions.tiles || conv.groups == 1) return widest;
  std::vector<Bundle> single = cut(functions, conv, 1);
  return count_products(functions, single) < count_products(functions, widest) ? single : widest;
}

const ConvFunctions& choose_conv(const Kernels& kernels, const PlanConv& conv,
                                 const std::vector<Bundle>& bundles) {
  if (conv.is_affine()) return kernels.affine;
  const int64_t tiles = winograd_tiles(conv, 2), large_tiles = winograd_tiles(conv, 4);
  const auto bytes = [products = count_products(kernels.conv, bundles)](int side) {
    return winograd_places(side) * products * static_cast<int64_t>(sizeof(float));
  };
  const bool suits = kernels.winograd2 != nullptr && conv.kernel == 3 && conv.stride == 1 &&
                     std::min(bundles[0].channels, conv.cout) >= kWinogradChannels &&
                     tiles >= kWinogradTiles &&
                     (bytes(2) <= kWeightBytes || tiles >= kWinogradTilesOfLargeWeights);
  if (!suits) return kernels.conv;
  // Three quarters of the products at most.
  const bool saves = 4 * winograd_places(4) * large_tiles <= 3 * winograd_places(2) * tiles;
  return saves && bytes(4) <= kLargeTileBytes * large_tiles ? *kernels.winograd4 : *kernels.winograd2;
}

// Floats of a bundle's weights.
int64_t weights_of(const ConvFunctions& functions, const PlanConv& conv, const Bundle& bundle) {
  if (conv.is_affine()) return functions.vector;
  if (functions.tiles) {
    const int64_t lanes = in_lanes(functions, conv);
    return (bundle.channels + lanes - 1) / lanes * conv.kernel * tile_row(functions, conv);
  }
  const int64_t taps = functions.side > 1 ? winograd_places(functions.side) : conv.kernel * conv.kernel;
  return words_of(functions, bundle.channels) * taps * bundle.vectors * functions.vector;
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

ConvLayout lay_out(const Kernels& kernels, const PlanConv& conv) {
  std::vector<Bundle> bundles = make_bundles(kernels.conv, conv);
  const ConvFunctions& functions = choose_conv(kernels, conv, bundles);
  const auto of = [&](const Bundle& bundle) { return weights_of(functions, conv, bundle); };
  int64_t size = 0;
  for (const Bundle& bundle : bundles) size += of(bundle);
  AlignedFloats weights(size);
  const float* next = weights.get();
  for (Bundle& bundle : bundles) next = (bundle.weight = next) + of(bundle);
  return {&functions, std::move(bundles), size, std::move(weights)};
}

PackedPlan::PackedPlan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats,
                       Precision precision)
    : plan(read_plan(ints, n_ints, floats, n_floats)),
      level(cpu::level()),
      precision(precision),
      kernels(cpu::kernels(precision)),
      conv(kernels.conv),
      ops(kernels.ops) {
  stem = pack(floats, plan.stem);
  after = pack(floats, plan.after);
  const int64_t stem_row = row_bytes(plan.channels, plan.stem.back().out_width);
  stem_strip = strip_of(stem_row * 2);
  for (const PlanBlock& block : plan.blocks) {
    blocks.push_back(pack(floats, block));
    is_heavy |= blocks.back().is_heavy;
  }
  head = pack_linear(floats, plan.head.weight, plan.head.bias, plan.head.cin, plan.head.cout);
  measure();
}

PackedBlock PackedPlan::pack(const float* floats, const PlanBlock& shape) {
  PackedBlock block{};
  block.shape = shape;
  block.before = pack(floats, shape.before);
  int64_t weight_bytes = 0, reach = 0, rows_bytes = row_bytes(shape.cin(), shape.width) * shape.stride;
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
  block.is_heavy = weight_bytes > std::max(kWeightBytes, map_bytes(shape.cin(), shape.height, shape.width));
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

std::vector<PackedConv> PackedPlan::pack(const float* floats, const std::vector<PlanConv>& chain) {
  std::vector<PackedConv> result;
  for (const PlanConv& conv : chain) result.push_back(pack(floats, conv));
  return result;
}

PackedConv PackedPlan::pack(const float* floats, const PlanConv& shape) {
  ConvLayout layout = lay_out(kernels, shape);
  const ConvFunctions& functions = *layout.functions;
  const int side = functions.side;
  const float* const weight = floats + shape.weight;
  for (const Bundle& bundle : layout.bundles) {
    float* const to = layout.weights.get() + (bundle.weight - layout.weights.get());
    if (shape.is_affine()) {
      pack_affine(weight, shape, bundle, to);
    } else if (side > 1) {
      pack_winograd(weight, shape, bundle, side, to);
      scratch_bytes_ = std::max<int64_t>(scratch_bytes_, functions.scratch(bundle.channels) * sizeof(float));
    } else if (functions.tiles) {
      pack_tiles(weight, shape, bundle, to);
    } else {
      pack_direct(weight, shape, bundle, to);
    }
  }
  packed_.push_back(std::move(layout.weights));
  const int64_t bytes = layout.size * sizeof(float), vectors = conv.padded(shape.cout) / conv.vector;
  const bool streams = side > 1 && bytes > kStreamedBytes * winograd_tiles(shape, side);
  const float* bias = pack_vector(floats + shape.bias, shape.cout);
  PackedConv result{&functions, std::move(layout.bundles), bias, shape, vectors, bytes, streams, {}, {}};
  const PlanSqueeze& squeeze = shape.squeeze;
  if (squeeze.width > 0) {
    result.squeeze = pack_linear(floats, squeeze.weight1, squeeze.bias1, shape.cout, squeeze.width);
    result.excite = pack_linear(floats, squeeze.weight2, squeeze.bias2, squeeze.width, shape.cout);
  }
  return result;
}

template <class OfChannel>
void PackedPlan::each_kernel(const float* weight, const PlanConv& shape, const Bundle& bundle,
                             const OfChannel& of_channel) const {
  const int64_t inputs = shape.cin / shape.groups, outputs = shape.cout / shape.groups;
  const int64_t begin = bundle.vector * conv.vector;
  const int64_t end = std::min(begin + bundle.vectors * conv.vector, shape.cout);
  std::vector<int64_t> first;
  for (int64_t o = begin; o < end; ++o) {
    first.push_back(o / outputs * inputs - bundle.plane * in_lanes(conv, shape));
  }
  for (int64_t channel = 0; channel < bundle.channels; ++channel) {
    const auto put = of_channel(channel);
    for (int64_t o = begin; o < end; ++o) {
      const int64_t c = channel - first[o - begin];
      if (c < 0 || c >= inputs) continue;
      put(o - begin, weight + (o * inputs + c) * shape.kernel * shape.kernel);
    }
  }
}

void PackedPlan::pack_winograd(const float* weight, const PlanConv& shape, const Bundle& bundle, int side,
                               float* to) const {
  const int64_t n = bundle.vectors * conv.vector, n_places = winograd_places(side), reach = side + 2;
  each_kernel(weight, shape, bundle, [&](int64_t channel) {
    return [=, step = bundle.channels * n](int64_t output, const float* kernel) {
      // In double precision, so that the result is rounded once.
      double columns[6][3], places[winograd_places(4)];
      for (int x = 0; x < 3; ++x) {
        const double column[] = {kernel[x], kernel[3 + x], kernel[6 + x]};
        transform_kernel(side, column, &columns[0][x], 3);
      }
      for (int64_t y = 0; y < reach; ++y) transform_kernel(side, columns[y], places + reach * y, 1);
      for (int64_t i = 0; i < n_places; ++i) {
        to[i * step + channel * n + output] = static_cast<float>(places[i]);
      }
    };
  });
}

void PackedPlan::pack_affine(const float* weight, const PlanConv& shape, const Bundle& bundle,
                             float* to) const {
  const int64_t first = std::min(bundle.vector * conv.vector, shape.cout);
  std::copy(weight + first, weight + std::min(first + conv.vector, shape.cout), to);
}

void PackedPlan::pack_direct(const float* weight, const PlanConv& shape, const Bundle& bundle,
                             float* to) const {
  const int64_t n = bundle.vectors * conv.vector, side = shape.kernel, lanes = in_lanes(conv, shape);
  each_kernel(weight, shape, bundle, [&](int64_t channel) {
    const int64_t first = channel / lanes * lanes;  // of the plane
    const int64_t row = words_of(conv, std::min(lanes, bundle.channels - first)) * side * n;
    const int64_t word = (channel - first) / conv.word_channels;
    float* const place = to + (words_of(conv, first) * side + word) * side * n;
    return [=](int64_t output, const float* kernel) {
      for (int64_t ky = 0; ky < side; ++ky) {
        for (int64_t kx = 0; kx < side; ++kx) {
          pack_number(*kernel++, channel, place + ky * row + kx * n + output);
        }
      }
    };
  });
}

void PackedPlan::pack_tiles(const float* weight, const PlanConv& shape, const Bundle& bundle,
                            float* to) const {
  const int64_t lanes = in_lanes(conv, shape), words = words_of(conv, lanes), side = shape.kernel;
  const int64_t out_lanes = conv.lanes_of(shape.cout), row = tile_row(conv, shape);
  each_kernel(weight, shape, bundle, [&](int64_t channel) {
    const int64_t word = channel % lanes / conv.word_channels;
    float* const plane = to + channel / lanes * side * row;
    return [=, stride = shape.stride](int64_t output, const float* kernel) {
      for (int64_t ky = 0; ky < side; ++ky) {
        for (int64_t kx = 0; kx < side; ++kx, ++kernel) {
          for (int64_t pixel = 0; pixel * out_lanes < kTileOutputs; ++pixel) {
            float* const outputs = plane + ky * row + ((pixel * stride + kx) * words + word) * kTileOutputs;
            pack_number(*kernel, channel, outputs + pixel * out_lanes + output);
          }
        }
      }
    };
  });
}

void PackedPlan::pack_number(float value, int64_t channel, float* word) const {
  if (precision == Precision::float32) {
    *word = value;
    return;
  }
  const uint16_t half = to_bfloat16(value);
  std::memcpy(reinterpret_cast<char*>(word) + channel % 2 * sizeof(half), &half, sizeof(half));
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
    grow(middle_bytes_[i % kMiddles], map_bytes(conv.cout, conv.out_height, conv.out_width));
  };
  if (plan.stem[0].kernel == 7) {
    const int64_t pixels = (plan.in_height + 6) * (plan.in_width + 6) + kSlackPixels;
    grow(middle_bytes_[0], whole_lines(pixels * kImageLanes * element_bytes()));
  } else {
    grow(middle_bytes_[0], map_bytes(plan.in_channels, plan.in_height, plan.in_width));
  }
  for (size_t i = 0; i + 1 < plan.stem.size(); ++i) middle((i + 1) % 2, plan.stem[i]);
  state(plan.channels, plan.stem.back().out_height, plan.stem.back().out_width);
  state(plan.channels, plan.height, plan.width);  // larger where a pooling of stride 1 is padded
  const auto states = [&](const std::vector<PlanConv>& chain) {
    for (const PlanConv& conv : chain) state(conv.cout, conv.out_height, conv.out_width);
  };
  states(plan.after);
  for (const PlanBlock& block : plan.blocks) {
    states(block.before);
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
  const int64_t fitting = (kWorkspaceBytes - scratch_bytes_ - middles_bytes()) / sample_bytes();
  return std::clamp<int64_t>(fitting, 1, kMostSamples);
}

int64_t PackedPlan::bytes_of(int64_t samples) const {
  return (is_heavy ? samples : 1) * middles_bytes() + samples * sample_bytes();
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
    for (int64_t i = 0; i < kMiddles; ++i) middle[i].data = take(middle_bytes_[i]);
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
