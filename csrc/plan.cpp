#include "plan.h"

#include <stdexcept>
#include <string>

namespace spnet {
namespace {

constexpr int64_t kFormatVersion = 1;
constexpr int64_t kHeaderInts = 8, kBlockInts = 8;
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

PlanBlock read_block(const int64_t* row, int64_t index, int64_t channels, int64_t height, int64_t width,
                     Floats& floats) {
  const std::string name = "block " + std::to_string(index) + ": ";
  const int64_t cin = row[0], mid = row[1], cout = row[2], stride = row[3], shortcut = row[4];
  const int64_t pad_before = row[5], router_width = row[6];
  require_equal(name + "cin", cin, channels, ", the channels of the map before it");
  require_range(name + "mid", mid, 1, kMaxWidth);
  require_range(name + "cout", cout, 1, kMaxWidth);
  require_range(name + "stride", stride, 1, 2);
  require_range(name + "shortcut", shortcut, 0, 2);
  require_range(name + "router_width", router_width, 1, kMaxWidth);
  require_equal(name + "reserved", row[7], 0);

  PlanBlock block{};
  block.shortcut = static_cast<Shortcut>(shortcut);
  switch (block.shortcut) {
    case Shortcut::identity:
      require_equal(name + "cout", cout, cin, " as cin, for the shortcut is the identity");
      require_equal(name + "stride", stride, 1, ", for the shortcut is the identity");
      break;
    case Shortcut::pad:
      if (cout < cin) fail(name + "cout", "cin = " + std::to_string(cin) + " or more to pad to", cout);
      break;
    case Shortcut::projection:
      break;
  }
  require_range(name + "pad_before", pad_before, 0, block.shortcut == Shortcut::pad ? cout - cin : 0);

  block.in_height = height;
  block.in_width = width;
  block.out_height = (height - 1) / stride + 1;
  block.out_width = (width - 1) / stride + 1;
  block.stride = stride;
  block.pad_before = pad_before;
  block.conv1 = floats.conv(cin, mid, 9);
  block.conv2 = floats.conv(mid, cout, 9);
  if (block.shortcut == Shortcut::projection) block.projection = floats.conv(cin, cout, 1);
  block.router.cin = cin;
  block.router.width = router_width;
  block.router.weight1 = floats.take(router_width * cin);
  block.router.bias1 = floats.take(router_width);
  block.router.weight2 = floats.take(router_width);
  block.router.bias2 = floats.take(1);
  return block;
}

}  // namespace

Plan read_plan(const int64_t* ints, int64_t n_ints, const float* floats, int64_t n_floats) {
  if (n_ints < kHeaderInts) fail("integers", "a header of " + std::to_string(kHeaderInts), n_ints);
  if (ints == nullptr) throw std::invalid_argument("plan: integers: null pointer");
  require_equal("format_version", ints[0], kFormatVersion, ", the only one known here");
  require_range("in_channels", ints[1], 1, kMaxInChannels);
  require_range("in_height", ints[2], 1, kMaxSize);
  require_range("in_width", ints[3], 1, kMaxSize);
  require_range("num_classes", ints[4], 1, kMaxClasses);
  require_range("n_blocks", ints[5], 0, kMaxBlocks);
  require_range("stem_channels", ints[6], 1, kMaxWidth);
  require_equal("stem_stride", ints[7], 1);
  require_equal("integers", n_ints, kHeaderInts + kBlockInts * ints[5], ", the header and n_blocks rows");

  Floats layout;
  Plan plan{ints[1], ints[2], ints[3], ints[4], layout.conv(ints[1], ints[6], 9), {}, {}};
  int64_t channels = ints[6], height = ints[2], width = ints[3];
  for (int64_t i = 0; i < ints[5]; ++i) {
    const int64_t* row = ints + kHeaderInts + kBlockInts * i;
    plan.blocks.push_back(read_block(row, i, channels, height, width, layout));
    channels = plan.blocks.back().conv2.cout;
    height = plan.blocks.back().out_height;
    width = plan.blocks.back().out_width;
  }
  plan.head = layout.conv(channels, plan.num_classes, 1);
  require_equal("floats", n_floats, layout.used(), ", as the integers say");
  if (floats == nullptr) throw std::invalid_argument("plan: floats: null pointer");
  return plan;
}

}  // namespace spnet
