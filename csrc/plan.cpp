#include "plan.h"

#include <stdexcept>
#include <string>

namespace spnet {
namespace {

constexpr int64_t kFormatVersion = 2;
constexpr int64_t kHeaderInts = 9, kConvInts = 6, kBlockInts = 5;
constexpr int64_t kMaxSize = 64, kMaxInChannels = 512, kMaxWidth = 4096, kMaxClasses = 1'000'000;
constexpr int64_t kMaxBlocks = 100'000;

[[noreturn]] void fail(const std::string& name, const std::string& expected, int64_t got) {
  throw std::invalid_argument("plan: " + name + ": expected " + expected + ", got " + std::to_string(got));
}

void require_equal(const std::string& name, int64_t value, int64_t expected, const char* why = "") {
  if (value != expected) fail(name, std::to_string(expected) + why, value);
}

void require_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, std::to_string(low) + " to " + std::to_string(high), value);
}

// Hands out consecutive ranges of the table of floats. The limits above keep every sum far from overflow.
class Floats {
 public:
  int64_t take(int64_t n) {
    const int64_t begin = used_;
    used_ += n;
    return begin;
  }

  PlanConv conv(int64_t cin, int64_t cout, int64_t taps) {
    const int64_t weight = take(cout * cin * taps);
    return {cin, cout, weight, take(cout)};
  }

  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// Hands out consecutive rows of the table of integers.
class Ints {
 public:
  Ints(const int64_t* ints, int64_t size) : ints_(ints), size_(size) {}

  const int64_t* take(int64_t n) {
    used_ += n;
    if (used_ > size_) fail("integers", std::to_string(used_) + " or more, as n_blocks says", size_);
    return ints_ + used_ - n;
  }

  int64_t used() const { return used_; }

 private:
  const int64_t* ints_;
  int64_t size_, used_ = 0;
};

// A 3x3 convolution of a map with `channels`; `stride` is 1 or 2 where the walkers take both.
PlanConv read_conv(const std::string& name, Ints& ints, Floats& floats, int64_t channels, int64_t* stride) {
  const int64_t* row = ints.take(kConvInts);
  require_equal(name + "cin", row[0], channels, ", the channels of the map before it");
  require_range(name + "cout", row[1], 1, kMaxWidth);
  require_equal(name + "kernel", row[2], 3, ", all that walk computes");
  require_range(name + "stride", row[3], 1, stride == nullptr ? 1 : 2);
  require_equal(name + "padding", row[4], 1, ", all that walk computes");
  require_equal(name + "groups", row[5], 1, ", all that walk computes");
  if (stride != nullptr) *stride = row[3];
  return floats.conv(row[0], row[1], 9);
}

PlanBlock read_block(Ints& ints, int64_t index, int64_t channels, int64_t height, int64_t width,
                     Floats& floats) {
  const std::string name = "block " + std::to_string(index) + ": ";
  const int64_t* row = ints.take(kBlockInts);
  const int64_t shortcut = row[1], shortcut_stride = row[2], pad_before = row[3], router_width = row[4];
  require_equal(name + "n_convolutions", row[0], 2, ", all that walk computes");
  require_range(name + "shortcut", shortcut, 0, 2);
  require_range(name + "router_width", router_width, 1, kMaxWidth);

  PlanBlock block{};
  block.conv1 = read_conv(name + "convolution 0: ", ints, floats, channels, &block.stride);
  block.conv2 = read_conv(name + "convolution 1: ", ints, floats, block.conv1.cout, nullptr);
  require_equal(name + "shortcut_stride", shortcut_stride, block.stride, " as the first convolution");
  const int64_t cout = block.conv2.cout;
  block.shortcut = static_cast<Shortcut>(shortcut);
  switch (block.shortcut) {
    case Shortcut::identity:
      require_equal(name + "cout", cout, channels, " as cin, for the shortcut is the identity");
      require_equal(name + "stride", block.stride, 1, ", for the shortcut is the identity");
      break;
    case Shortcut::pad:
      if (cout < channels) {
        fail(name + "cout", "cin = " + std::to_string(channels) + " or more to pad to", cout);
      }
      break;
    case Shortcut::projection:
      block.projection = floats.conv(channels, cout, 1);
      break;
  }
  require_range(name + "pad_before", pad_before, 0, block.shortcut == Shortcut::pad ? cout - channels : 0);

  block.in_height = height;
  block.in_width = width;
  block.out_height = (height - 1) / block.stride + 1;
  block.out_width = (width - 1) / block.stride + 1;
  block.pad_before = pad_before;
  block.router.cin = channels;
  block.router.width = router_width;
  block.router.weight1 = floats.take(router_width * channels);
  block.router.bias1 = floats.take(router_width);
  block.router.weight2 = floats.take(router_width);
  block.router.bias2 = floats.take(1);
  return block;
}

}  // namespace

Plan read_plan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats) {
  if (n_ints < kHeaderInts) fail("integers", "a header of " + std::to_string(kHeaderInts), n_ints);
  if (ints == nullptr) throw std::invalid_argument("plan: integers: null pointer");
  Ints rows(ints, n_ints);
  const int64_t* header = rows.take(kHeaderInts);
  require_equal("format_version", header[0], kFormatVersion, ", the only one known here");
  require_range("in_channels", header[1], 1, kMaxInChannels);
  require_range("in_height", header[2], 1, kMaxSize);
  require_range("in_width", header[3], 1, kMaxSize);
  require_range("num_classes", header[4], 1, kMaxClasses);
  require_range("n_blocks", header[5], 0, kMaxBlocks);
  require_equal("pool_kernel", header[6], 0, ", for walk does not pool behind the stem");
  require_equal("pool_stride", header[7], 0, ", for walk does not pool behind the stem");
  require_equal("pool_padding", header[8], 0, ", for walk does not pool behind the stem");

  Floats layout;
  const PlanConv stem = read_conv("stem: ", rows, layout, header[1], nullptr);
  Plan plan{header[1], header[2], header[3], header[4], stem, {}, {}};
  int64_t channels = stem.cout, height = header[2], width = header[3];
  for (int64_t i = 0; i < header[5]; ++i) {
    plan.blocks.push_back(read_block(rows, i, channels, height, width, layout));
    channels = plan.blocks.back().conv2.cout;
    height = plan.blocks.back().out_height;
    width = plan.blocks.back().out_width;
  }
  require_equal("integers", n_ints, rows.used(), ", as n_blocks says");
  plan.head = layout.conv(channels, plan.num_classes, 1);
  require_equal("floats", n_floats, layout.used(), ", as the integers say");
  if (floats == nullptr) throw std::invalid_argument("plan: floats: null pointer");
  return plan;
}

}  // namespace spnet
