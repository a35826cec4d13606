#include "walk_layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "half.h"

namespace spnet::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Gives each buffer the lowest place that nothing alive overlaps.
class Arena {
 public:
  explicit Arena(int64_t begin) : begin_(begin), peak_(begin) {}

  int64_t place(int64_t bytes) {
    std::sort(alive_.begin(), alive_.end(), [](Range a, Range b) { return a.begin < b.begin; });
    int64_t begin = begin_;
    for (const Range& range : alive_) {
      if (begin + bytes <= range.begin) break;
      begin = std::max(begin, range.end);
    }
    alive_.push_back({begin, begin + bytes});
    peak_ = std::max(peak_, begin + bytes);
    return begin;
  }

  void keep_only(int64_t begin) {
    const auto other = [=](Range range) { return range.begin != begin; };
    alive_.erase(std::remove_if(alive_.begin(), alive_.end(), other), alive_.end());
  }
  int64_t peak() const { return peak_; }

 private:
  struct Range {
    int64_t begin, end;
  };

  int64_t begin_, peak_;
  std::vector<Range> alive_;
};

template <class Element>
class Builder {
 public:
  Builder(const Plan& plan, const float* floats, int64_t shared_limit)
      : plan_(plan), floats_(floats), limit_(shared_limit), arena_(place_scratch()) {}

  WalkLayout build() {
    Network& network = layout_.network;
    network.in_channels = plan_.in_channels;
    network.n_blocks = plan_.blocks.size();
    const Map in = place_map(plan_.in_channels, plan_.in_height, plan_.in_width);
    Map state = place_map(plan_.channels, plan_.in_height, plan_.in_width);
    Block stem{};
    stem.second = layer(in, plan_.stem[0], 1, state, "stem");
    stem.second.pool_scale = 1.f / (plan_.in_height * plan_.in_width);
    stem.second.bias[0] = add_bias(plan_.stem[0], nullptr);
    stem.ring = place_ring(stem.first, stem.second);
    check("stem");
    layout_.blocks.push_back(stem);

    for (size_t i = 0; i < plan_.blocks.size(); ++i) {
      const PlanBlock& shape = plan_.blocks[i];
      const std::string name = "block " + std::to_string(i);
      arena_.keep_only(state.offset);
      Block block{};
      block.identity = shape.shortcut == Shortcut::identity;
      const Map out = block.identity ? state : place_map(shape.cout(), shape.out_height(), shape.out_width());
      const Map middle = place_map(shape.body[0].cout, shape.out_height(), shape.out_width());

      block.first = layer(state, shape.body[0], shape.stride, middle, name);
      block.first.bias[0] = add_bias(shape.body[0], nullptr);
      block.second = layer(middle, shape.body[1], 1, out, name);
      block.second.pool_scale = 1.f / (shape.out_height() * shape.out_width());
      block.second.residual = block.identity                    ? Residual::in_place
                              : shape.shortcut == Shortcut::pad ? Residual::pad
                                                                : Residual::none;
      block.second.sources[1].in = state;
      block.second.sources[1].stride = shape.stride;
      block.second.pad_before = shape.pad_before;
      block.second.pad_channels = shape.cin();
      const bool projection = shape.shortcut == Shortcut::projection;
      if (projection) {
        block.second.sources[1] = source(state, shape.projection, shape.stride, 1, name);
      }
      block.second.bias[0] = add_bias(shape.body[1], projection ? &shape.projection : nullptr);
      block.second.bias[1] = projection ? add_bias(shape.projection, nullptr) : add_zeros(shape.cout());
      block.ring = place_ring(block.first, block.second);
      block.router = linear(shape.router.weight1, shape.router.bias1, shape.router.cin, shape.router.width);
      block.router_weight2 = add(floats_ + shape.router.weight2, shape.router.width);
      block.router_bias2 = floats_[shape.router.bias2];

      // In no block does anything else lie where this one's does, so its halo stays zero from block to block.
      const Block& before = layout_.blocks.back();
      block.middle = before.middle + (std::memcmp(&middle, &before.first.out, sizeof(Map)) != 0);
      check(name);
      layout_.blocks.push_back(block);
      state = out;
    }
    network.head = linear(plan_.head.weight, plan_.head.bias, plan_.head.cin, plan_.num_classes);
    network.shared_bytes = arena_.peak();
    return std::move(layout_);
  }

 private:
  Map place_map(int64_t channels, int64_t height, int64_t width) {
    const int64_t pixel_bytes = 2 * round_up(channels, kTile) + 16;
    const int64_t offset = arena_.place((height + 2) * (width + 2) * pixel_bytes);
    return {static_cast<int32_t>(offset), static_cast<int32_t>(pixel_bytes), static_cast<int32_t>(height),
            static_cast<int32_t>(width)};
  }

  // Rows that a unit computes: as many as make the passes of the warps over all units take the shortest time.
  // A warp reads 3 (rows + 2) tiles of pixels and 9 of weights, and multiplies 9 rows of them.
  static int64_t unit_rows(int64_t height, int64_t width, int64_t groups) {
    int64_t best = 1, best_cost = 0;
    for (int64_t rows = 1; rows <= std::min<int64_t>(height, 8); rows *= 2) {
      const int64_t passes = ceil_div(strips(height, width, rows) * groups, kWarps);
      const int64_t cost = passes * (9 + 3 * (rows + 2) + 9 * rows);
      if (rows > 1 && cost > best_cost) continue;
      best = rows;
      best_cost = cost;
    }
    return best;
  }

  static int64_t strips(int64_t height, int64_t width, int64_t rows) {
    return ceil_div(width * ceil_div(height, rows), kTile);
  }

  // What pooling needs is known before any map has a place.
  int64_t place_scratch() {
    int64_t channels = 0, partial_sums = 0;
    const auto grow = [&](int64_t cout, int64_t height, int64_t width) {
      const int64_t padded = round_up(cout, kTile);
      const int64_t rows = unit_rows(height, width, padded / kTile);
      channels = std::max(channels, padded);
      partial_sums = std::max(partial_sums, padded * strips(height, width, rows));
    };
    grow(plan_.channels, plan_.in_height, plan_.in_width);
    for (const PlanBlock& block : plan_.blocks) grow(block.cout(), block.out_height(), block.out_width());
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      return static_cast<int32_t>(std::exchange(used, used + round_up(bytes, 16)));
    };
    Scratch& scratch = layout_.network.scratch;
    scratch.sample = take(sizeof(int64_t));
    scratch.warp_sums = take(kWarps * sizeof(float));
    scratch.blocks = take(2 * sizeof(Block));
    scratch.pooled = take(channels * sizeof(float));
    scratch.partial_sums = take(partial_sums * sizeof(float));
    return used;
  }

  Ring place_ring(const Layer& first, const Layer& second) {
    int64_t stage = 0;
    for (const Layer* layer : {&first, &second}) {
      for (const Source& source : layer->sources) {
        if (source.chunks == 0) continue;
        for (int64_t unit = 0; unit < layer->units(); unit += kWarps) {
          const int64_t last = std::min<int64_t>(unit + kWarps, layer->units()) - 1;
          const int64_t groups = last / layer->strips.value - unit / layer->strips.value + 1;
          stage = std::max<int64_t>(stage, groups * source.taps * kFragmentBytes);
        }
      }
    }
    return {static_cast<int32_t>(arena_.place(kStages * stage)), static_cast<int32_t>(stage)};
  }

  void check(const std::string& name) const {
    if (arena_.peak() <= limit_) return;
    throw std::invalid_argument("plan: " + name + ": needs " + std::to_string(arena_.peak()) +
                                " bytes of shared memory, a thread block has " + std::to_string(limit_));
  }

  Layer layer(const Map& in, const PlanConv& conv, int64_t stride, const Map& out, const std::string& name) {
    Layer layer{};
    layer.sources[0] = source(in, conv, stride, 9, name);
    layer.out = out;
    layer.channels = conv.cout;
    layer.groups = ceil_div(conv.cout, kTile);
    layer.rows = unit_rows(out.height, out.width, layer.groups);
    layer.strips = Divisor::of(strips(out.height, out.width, layer.rows));
    layer.width = Divisor::of(out.width);
    return layer;
  }

  Source source(const Map& in, const PlanConv& conv, int64_t stride, int64_t taps, const std::string& name) {
    const int64_t position = layout_.weights.size() * sizeof(uint16_t) / kFragmentBytes;
    const int64_t chunks = ceil_div(conv.cin, kTile), groups = ceil_div(conv.cout, kTile);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t tap = 0; tap < taps; ++tap) add_fragment(conv, taps, chunk, group, tap, name);
      }
    }
    return {in, static_cast<int32_t>(position), static_cast<int32_t>(chunks), static_cast<int32_t>(taps),
            static_cast<int32_t>(stride)};
  }

  // Lane by lane the two B operands [16 x 8] of mma.m16n8k16, each two registers of two numbers.
  void add_fragment(const PlanConv& conv, int64_t taps, int64_t chunk, int64_t group, int64_t tap,
                    const std::string& name) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int64_t cin = chunk * kTile + lane % 4 * 2 + i / 2 % 2 * 8 + i % 2;
        const int64_t cout = group * kTile + i / 4 * 8 + lane / 4;
        const bool real = cin < conv.cin && cout < conv.cout;
        layout_.weights.push_back(
            real ? rounded(floats_[conv.weight + (cout * conv.cin + cin) * taps + tap], name) : uint16_t{0});
      }
    }
  }

  static uint16_t rounded(float weight, const std::string& name) {
    const uint16_t result = Element::round(weight);
    if (std::isfinite(weight) && !std::isfinite(Element::widen(result))) {
      throw std::invalid_argument("plan: " + name + ": a weight of " + std::to_string(weight) +
                                  " is beyond the range of " + Element::kName);
    }
    return result;
  }

  int64_t add(const float* values, int64_t n) {
    const int64_t position = layout_.floats.size();
    layout_.floats.insert(layout_.floats.end(), values, values + n);
    layout_.floats.resize(round_up(layout_.floats.size(), 4));
    return position;
  }

  int64_t add_zeros(int64_t channels) {
    const std::vector<float> zeros(round_up(channels, kTile));
    return add(zeros.data(), zeros.size());
  }

  int64_t add_bias(const PlanConv& conv, const PlanConv* other) {
    const int64_t position = add_zeros(conv.cout);
    for (int64_t c = 0; c < conv.cout; ++c) {
      layout_.floats[position + c] = floats_[conv.bias + c] + (other ? floats_[other->bias + c] : 0.f);
    }
    return position;
  }

  Linear linear(int64_t weight, int64_t bias, int64_t inputs, int64_t outputs) {
    const int64_t quads = round_up(inputs, kTile) / 4;
    std::vector<float> packed(quads * outputs * 4);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        packed[(i / 4 * outputs + o) * 4 + i % 4] = floats_[weight + o * inputs + i];
      }
    }
    const int64_t position = add(packed.data(), packed.size());
    return {position, add(floats_ + bias, outputs), static_cast<int32_t>(quads),
            static_cast<int32_t>(outputs)};
  }

  const Plan& plan_;
  const float* floats_;
  const int64_t limit_;
  WalkLayout layout_{};
  Arena arena_;
};

}  // namespace

template <class Element>
WalkLayout lay_out_walk(const Plan& plan, const float* floats, int64_t shared_limit) {
  require_cifar_form(plan);
  return Builder<Element>(plan, floats, shared_limit).build();
}

template WalkLayout lay_out_walk<Float16>(const Plan&, const float*, int64_t);
template WalkLayout lay_out_walk<BFloat16>(const Plan&, const float*, int64_t);

}  // namespace spnet::cuda
