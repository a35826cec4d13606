#include "plan.h"

#include <stdexcept>
#include <string>

namespace spnet {
namespace {

constexpr int64_t kFormatVersion = 4;
constexpr int64_t kHeaderInts = 11, kConvInts = 8, kBlockInts = 7;
constexpr int64_t kMaxSize = 1024, kMaxCifarSize = 64, kMaxImageChannels = 4, kMaxInChannels = 512,
                  kMaxWidth = 4096, kMaxClasses = 1'000'000;
constexpr int64_t kMaxBlocks = 100'000, kMaxChain = 64;

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

  void place(PlanConv& conv) {
    conv.weight = take(conv.cout * conv.cin / conv.groups * conv.kernel * conv.kernel);
    conv.bias = take(conv.cout);
    PlanSqueeze& squeeze = conv.squeeze;
    if (squeeze.width == 0) return;
    squeeze.weight1 = take(squeeze.width * conv.cout);
    squeeze.bias1 = take(squeeze.width);
    squeeze.weight2 = take(conv.cout * squeeze.width);
    squeeze.bias2 = take(conv.cout);
  }

  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// A map on its way through the network.
struct Shape {
  int64_t channels, height, width;
  bool rectified;  // so it holds nothing negative

  void pass(const PlanConv& conv) { *this = {conv.cout, conv.out_height, conv.out_width, conv.relu}; }
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

// The size of a map in which a convolution or pooling puts what it makes of `size` pixels.
int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

PlanConv make_conv(int64_t cin, int64_t cout, int64_t kernel, int64_t stride, int64_t height, int64_t width,
                   Floats& floats, int64_t groups = 1, int64_t squeeze = 0, bool relu = false) {
  PlanConv conv{};
  conv.cin = cin;
  conv.cout = cout;
  conv.kernel = kernel;
  conv.stride = stride;
  conv.groups = groups;
  conv.out_height = out_size(height, kernel, stride, kernel / 2);
  conv.out_width = out_size(width, kernel, stride, kernel / 2);
  conv.relu = relu;
  conv.squeeze.width = squeeze;
  floats.place(conv);
  return conv;
}

// A convolution of a map, whose kernel is one of two.
PlanConv read_conv(const std::string& name, Ints& ints, Floats& floats, const Shape& in, int64_t small_kernel,
                   int64_t large_kernel, int64_t max_stride) {
  const int64_t* row = ints.take(kConvInts);
  require_equal(name + "cin", row[0], in.channels, ", the channels of the map before it");
  require_range(name + "cout", row[1], 1, kMaxWidth);
  if (row[2] != small_kernel && row[2] != large_kernel) {
    const std::string kernels = std::to_string(small_kernel) + " or " + std::to_string(large_kernel);
    fail(name + "kernel", kernels + ", all that walk computes", row[2]);
  }
  require_range(name + "stride", row[3], 1, max_stride);
  require_equal(name + "padding", row[4], row[2] / 2, ", all that walk computes");
  require_range(name + "groups", row[5], 1, row[0]);
  if (row[0] % row[5] != 0 || row[1] % row[5] != 0)
    fail(name + "groups", "a divisor of cin and cout", row[5]);
  require_range(name + "squeeze", row[6], 0, kMaxWidth);
  require_range(name + "relu", row[7], 0, 1);
  return make_conv(row[0], row[1], row[2], row[3], in.height, in.width, floats, row[5], row[6], row[7] == 1);
}

// A chain on all samples; the first one's kernel is at least `first_kernel`.
std::vector<PlanConv> read_chain(const std::string& name, int64_t size, Ints& ints, Floats& floats,
                                 Shape& map, int64_t first_kernel = 1) {
  std::vector<PlanConv> chain;
  for (int64_t i = 0; i < size; ++i) {
    const std::string convolution = name + "convolution " + std::to_string(i) + ": ";
    const int64_t least = i == 0 ? first_kernel : 1, most = least == 3 ? 7 : 3;
    chain.push_back(read_conv(convolution, ints, floats, map, least, most, 2));
    require_equal(convolution + "squeeze", chain.back().squeeze.width, 0,
                  ", all that walk computes outside of bodies");
    map.pass(chain.back());
  }
  return chain;
}

PlanBlock read_block(Ints& ints, int64_t index, Shape& map, Floats& floats) {
  const std::string name = "block " + std::to_string(index) + ": ";
  const int64_t* row = ints.take(kBlockInts);
  const int64_t shortcut = row[1], shortcut_stride = row[2], pad_before = row[3], router_width = row[4];
  require_range(name + "n_convolutions", row[0], 2, kMaxBody);
  require_range(name + "shortcut", shortcut, 0, 3);
  require_range(name + "router_width", router_width, 1, kMaxWidth);
  require_range(name + "n_convolutions of before", row[5], 0, kMaxChain);
  require_range(name + "relu", row[6], 0, 1);

  PlanBlock block{};
  block.before = read_chain(name + "before: ", row[5], ints, floats, map);
  block.stride = 1;
  block.relu = row[6] == 1;
  const Shape in = map;
  block.height = in.height;
  block.width = in.width;
  for (int64_t i = 0; i < row[0]; ++i) {
    const std::string convolution = name + "convolution " + std::to_string(i) + ": ";
    block.body.push_back(read_conv(convolution, ints, floats, map, 1, 3, block.stride == 1 ? 2 : 1));
    block.stride *= block.body.back().stride;
    map.pass(block.body.back());
    if (i + 1 == row[0]) require_equal(convolution + "relu", map.rectified, 0, ", for it is the last one");
  }
  map.rectified = block.relu;
  require_equal(name + "shortcut_stride", shortcut_stride, block.stride, " as the body");
  block.shortcut = static_cast<Shortcut>(shortcut);
  switch (block.shortcut) {
    case Shortcut::identity:
      require_equal(name + "cout", map.channels, in.channels, " as cin, for the shortcut is the identity");
      require_equal(name + "stride", block.stride, 1, ", for the shortcut is the identity");
      break;
    case Shortcut::pad:
      if (map.channels < in.channels) {
        fail(name + "cout", "cin = " + std::to_string(in.channels) + " or more to pad to", map.channels);
      }
      break;
    case Shortcut::projection:
      block.projection = make_conv(in.channels, map.channels, 1, block.stride, in.height, in.width, floats);
      break;
    case Shortcut::pooled:
      block.projection = make_conv(in.channels, map.channels, 1, 1, map.height, map.width, floats);
      break;
  }
  if (!block.is_projection() && !in.rectified) {
    require_equal(name + "relu", block.relu, 0, ", for what it is given comes from no ReLU");
  }
  const int64_t most = block.shortcut == Shortcut::pad ? map.channels - in.channels : 0;
  require_range(name + "pad_before", pad_before, 0, most);

  block.pad_before = pad_before;
  block.router.cin = in.channels;
  block.router.width = router_width;
  block.router.weight1 = floats.take(router_width * in.channels);
  block.router.bias1 = floats.take(router_width);
  block.router.weight2 = floats.take(router_width);
  block.router.bias2 = floats.take(1);
  return block;
}

std::vector<PlanConv> read_stem(const int64_t* header, Ints& ints, Floats& floats, Shape& map) {
  require_range("stem: n_convolutions", header[9], 1, kMaxChain);
  const std::vector<PlanConv> stem = read_chain("stem: ", header[9], ints, floats, map, 3);
  if (stem[0].kernel == 7) {
    const std::string name = "stem: convolution 0: ";
    require_range("in_channels", stem[0].cin, 1, kMaxImageChannels);
    require_equal(name + "stride", stem[0].stride, 2, ", all that walk computes with a kernel of 7");
    require_equal(name + "groups", stem[0].groups, 1, ", all that walk computes with a kernel of 7");
  }
  return stem;
}

PlanPool read_pool(const int64_t* row) {
  const PlanPool pool{row[0], row[1], row[2]};
  const bool none = pool.kernel == 0;
  if (!none) require_range("pool_kernel", pool.kernel, 2, 3);
  require_range("pool_stride", pool.stride, none ? 0 : 1, none ? 0 : 2);
  require_range("pool_padding", pool.padding, 0, pool.kernel / 2);
  return pool;
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
  require_range("after: n_convolutions", header[10], 0, kMaxChain);
  Floats layout;
  Plan plan{};
  plan.in_channels = header[1];
  plan.in_height = header[2];
  plan.in_width = header[3];
  plan.num_classes = header[4];
  plan.pool = read_pool(header + 6);
  Shape map{plan.in_channels, plan.in_height, plan.in_width, false};
  plan.stem = read_stem(header, rows, layout, map);
  const PlanPool& pool = plan.pool;
  if (pool.kernel > 0) {
    for (int64_t* size : {&map.height, &map.width}) {
      require_range("the map to pool", *size, pool.kernel - 2 * pool.padding, kMaxSize);
      *size = out_size(*size, pool.kernel, pool.stride, pool.padding);
    }
  }
  plan.channels = map.channels;
  plan.height = map.height;
  plan.width = map.width;
  for (int64_t i = 0; i < header[5]; ++i) plan.blocks.push_back(read_block(rows, i, map, layout));
  plan.after = read_chain("after: ", header[10], rows, layout, map);
  require_equal("integers", n_ints, rows.used(), ", as n_blocks says");
  plan.head = make_conv(map.channels, plan.num_classes, 1, 1, 1, 1, layout);
  require_equal("floats", n_floats, layout.used(), ", as the integers say");
  if (floats == nullptr) throw std::invalid_argument("plan: floats: null pointer");
  return plan;
}

void require_cifar_form(const Plan& plan) {
  require_range("in_height", plan.in_height, 1, kMaxCifarSize);
  require_range("in_width", plan.in_width, 1, kMaxCifarSize);
  require_equal("pool_kernel", plan.pool.kernel, 0);
  require_equal("stem: n_convolutions", plan.stem.size(), 1);
  require_equal("stem: convolution 0: kernel", plan.stem[0].kernel, 3);
  require_equal("stem: convolution 0: stride", plan.stem[0].stride, 1);
  require_equal("stem: convolution 0: groups", plan.stem[0].groups, 1);
  require_equal("stem: convolution 0: relu", plan.stem[0].relu, 1);
  require_equal("after: n_convolutions", plan.after.size(), 0);
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    const std::string name = "block " + std::to_string(i) + ": ";
    const std::vector<PlanConv>& body = plan.blocks[i].body;
    require_equal(name + "n_convolutions", body.size(), 2);
    require_equal(name + "n_convolutions of before", plan.blocks[i].before.size(), 0);
    require_equal(name + "relu", plan.blocks[i].relu, 1);
    require_range(name + "shortcut", static_cast<int64_t>(plan.blocks[i].shortcut), 0, 2);
    for (size_t j = 0; j < body.size(); ++j) {
      const std::string convolution = name + "convolution " + std::to_string(j) + ": ";
      require_equal(convolution + "kernel", body[j].kernel, 3);
      require_equal(convolution + "groups", body[j].groups, 1);
      require_equal(convolution + "squeeze", body[j].squeeze.width, 0);
    }
    require_equal(name + "convolution 0: relu", body[0].relu, 1);
    require_equal(name + "convolution 1: stride", body[1].stride, 1);
  }
}

}  // namespace spnet
