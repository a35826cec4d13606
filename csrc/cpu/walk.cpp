#include "walk.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "pool.h"
#include "team.h"

namespace spnet::cpu {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("walk: " + message);
}

// One channel of a row of pixels.
template <class Convert>
void put_channel(const float* from, int64_t step, int64_t width, int64_t lanes, void* to, Convert convert) {
  auto* pixel = static_cast<decltype(convert(0.f))*>(to);
  for (int64_t i = 0; i < width; ++i) pixel[i * lanes] = convert(from[i * step]);
}

// The groups of samples of a batch and the threads that work on them.
class Crew {
 public:
  explicit Crew(int64_t groups, int64_t threads)
      : groups_(groups), drivers_(std::min(groups, threads)), teams_(drivers_) {}

  int64_t drivers() const { return drivers_; }

  // Takes the next group; -1 if there is none.
  int64_t next() {
    const int64_t group = next_.fetch_add(1, std::memory_order_relaxed);
    return group < groups_ ? group : -1;
  }

  // A number of its own, below drivers(), for each thread that has a group.
  int64_t join() { return joined_.fetch_add(1, std::memory_order_relaxed); }

  void finish() { finished_.fetch_add(1, std::memory_order_release); }

  // Calls function on ranges that cover [0, units), with the threads that have no group of their own.
  template <class Function>
  void share(int64_t driver, int64_t units, const Function& function) {
    const int64_t idle = idle_.load(std::memory_order_relaxed);
    if (idle == 0) {
      function(int64_t{0}, units);
      return;
    }
    const int64_t active = groups_ - finished_.load(std::memory_order_relaxed);  // this one, at least
    teams_[driver].run(units, 1 + (idle + active - 1) / active, function);
  }

  // By a thread that found no group: helps the others until all have finished.
  void help() {
    const int64_t number = idle_.fetch_add(1, std::memory_order_relaxed);
    const int64_t first = number % drivers_;
    const int preferred = static_cast<int>(std::min<int64_t>(1 + number / drivers_, Team::kMaxParts - 1));
    for (Spin spin; finished_.load(std::memory_order_acquire) < groups_;) {
      bool helped = false;
      for (int64_t i = 0; i < drivers_ && !helped; ++i) {
        helped = teams_[(first + i) % drivers_].help(preferred);
      }
      if (helped) {
        spin = Spin();
      } else {
        spin.wait();
      }
    }
  }

 private:
  const int64_t groups_, drivers_;
  std::vector<Team> teams_;
  alignas(64) std::atomic<int64_t> next_{0};
  std::atomic<int64_t> joined_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  std::atomic<int64_t> idle_{0};
};

// One sample on its way through the blocks.
class Walk {
 public:
  Walk(const PackedPlan& plan, Workspace& workspace, int64_t place, Crew& crew, int64_t driver)
      : plan_(plan),
        lanes_(plan.conv.lanes),
        w_(workspace.samples[place]),
        middle_(workspace.middle),
        hidden_(workspace.hidden),
        crew_(crew),
        driver_(driver) {}

  void enter(const WalkBatch& batch, int64_t sample) {
    load(batch, batch.x + sample * batch.stride_n);
    shape(w_.state, plan_.stem.vectors, plan_.plan.in_height, plan_.plan.in_width);
    run_conv(plan_.stem, 1, middle_, w_.state, false, true, true);
    pooled_ = false;
  }

  void pass(const WalkBatch& batch, int64_t sample, int64_t number) {
    const PackedBlock& block = plan_.blocks[number];
    const int64_t place = sample * plan_.blocks.size() + number;
    const bool execute = batch.paths == nullptr ? decide(block, batch.threshold) : batch.paths[place] != 0;
    batch.decisions[place] = execute;
    run_block(block, execute);
  }

  void leave(const WalkBatch& batch, int64_t sample) {
    pool();
    plan_.ops.linear(plan_.head, w_.pooled, batch.logits + sample * plan_.plan.num_classes);
  }

 private:
  int64_t row(const MapBuffer& map) const { return (map.width + 2) * lanes_; }
  int64_t plane(const MapBuffer& map) const { return (map.height + 2) * row(map); }
  char* at(const MapView& map, int64_t element) const {
    return static_cast<char*>(map.data) + element * plan_.element_bytes();
  }

  MapView whole(const MapBuffer& map) const { return {map.data, row(map), plane(map)}; }

  // Begins at pixel (0, 0), one row and one pixel behind the halo's first.
  MapView inside(const MapBuffer& map) const {
    return {at(whole(map), row(map) + lanes_), row(map), plane(map)};
  }

  // The halo stays zero while maps of the same shape are written, for whatever writes them writes inside it.
  void shape(MapBuffer& map, int64_t vectors, int64_t height, int64_t width) const {
    if (map.vectors == vectors && map.height == height && map.width == width) return;
    map.vectors = vectors;
    map.height = height;
    map.width = width;
    const MapView view = whole(map);
    const auto clear = [&](int64_t element, int64_t n) {
      std::memset(at(view, element), 0, n * plan_.element_bytes());
    };
    for (int64_t begin = 0; begin < vectors * view.plane; begin += view.plane) {
      clear(begin, view.row);
      for (int64_t y = 1; y <= height; ++y) {
        clear(begin + y * view.row, lanes_);
        clear(begin + (y + 1) * view.row - lanes_, lanes_);
      }
      clear(begin + (height + 1) * view.row, view.row);
    }
  }

  template <class Function>
  void share(int64_t units, const Function& function) const {
    crew_.share(driver_, units, function);
  }

  void load(const WalkBatch& batch, const float* x) const {
    const Plan& plan = plan_.plan;
    shape(middle_, (plan.in_channels + lanes_ - 1) / lanes_, plan.in_height, plan.in_width);
    const MapView map = inside(middle_);
    share(plan.in_height, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        if (plan_.precision == Precision::bfloat16) {
          char* last = at(map, (middle_.vectors - 1) * map.plane + y * map.row);
          std::memset(last, 0, plan.in_width * lanes_ * plan_.element_bytes());
        }
        for (int64_t c = 0; c < plan.in_channels; ++c) {
          const float* from = x + c * batch.stride_c + y * batch.stride_h;
          char* to = at(map, c / lanes_ * map.plane + y * map.row + c % lanes_);
          if (plan_.precision == Precision::float32) {
            put_channel(from, batch.stride_w, plan.in_width, lanes_, to, [](float value) { return value; });
          } else {
            put_channel(from, batch.stride_w, plan.in_width, lanes_, to, to_bfloat16);
          }
        }
      }
    });
  }

  void run_conv(const PackedConv& conv, int64_t stride, const MapBuffer& in, const MapBuffer& out,
                bool residual, bool relu, bool sums) const {
    Conv work{};
    work.in = conv.kernel == 3 ? whole(in) : inside(in);
    work.out = inside(out);
    work.weight = conv.weight;
    work.bias = conv.bias;
    work.cin = conv.cin;
    work.kernel = conv.kernel;
    work.stride = stride;
    work.height = out.height;
    work.width = out.width;
    work.cout = conv.cout;
    work.vectors = conv.vectors;
    work.residual = residual;
    work.relu = relu;
    work.row_sums = sums ? w_.row_sums : nullptr;
    share(plan_.conv.units(work),
          [work, run = plan_.conv.run](int64_t begin, int64_t end) { run(work, begin, end); });
  }

  // Its output needs no ReLU: a map that is padded holds nothing negative.
  void run_pad(const PlanBlock& block, const MapBuffer& in, const MapBuffer& out, bool sums) const {
    PadShortcut work{};
    work.in = inside(in);
    work.out = inside(out);
    work.cin = block.conv1.cin;
    work.cout = block.conv2.cout;
    work.pad_before = block.pad_before;
    work.stride = block.stride;
    work.height = out.height;
    work.width = out.width;
    work.row_sums = sums ? w_.row_sums : nullptr;
    share(out.height,
          [work, run = plan_.ops.pad_shortcut](int64_t begin, int64_t end) { run(work, begin, end); });
  }

  void pool() {
    if (pooled_) return;
    const MapBuffer& map = w_.state;
    plan_.ops.pool(w_.row_sums, map.height, map.vectors, map.height * map.width, w_.pooled);
    pooled_ = true;
  }

  bool decide(const PackedBlock& block, float threshold) {
    pool();
    plan_.ops.linear(block.router, w_.pooled, hidden_);
    return plan_.ops.margin(hidden_, block.router_weight2, block.router_bias2, block.router.outputs) >
           threshold;
  }

  void run_block(const PackedBlock& block, bool execute) {
    const PlanBlock& size = block.shape;
    const bool identity = size.shortcut == Shortcut::identity;
    if (identity && !execute) return;
    pooled_ = false;
    if (!identity) {
      shape(w_.spare, block.conv2.vectors, size.out_height, size.out_width);
      if (size.shortcut == Shortcut::pad) {
        run_pad(size, w_.state, w_.spare, !execute);
      } else {
        run_conv(block.projection, size.stride, w_.state, w_.spare, false, !execute, !execute);
      }
    }
    if (execute) {
      shape(middle_, block.conv1.vectors, size.out_height, size.out_width);
      run_conv(block.conv1, size.stride, w_.state, middle_, false, true, false);
      run_conv(block.conv2, 1, middle_, identity ? w_.state : w_.spare, true, true, true);
    }
    if (!identity) std::swap(w_.state, w_.spare);
  }

  const PackedPlan& plan_;
  const int64_t lanes_;
  Workspace::Sample& w_;
  MapBuffer& middle_;
  float* const hidden_;
  Crew& crew_;
  const int64_t driver_;
  bool pooled_ = false;  // w_.pooled is that of w_.state
};

}  // namespace

void walk(const PackedPlan& plan, const WalkBatch& batch, int threads) {
  require(batch.size >= 0, "batch: expected 0 or more, got " + std::to_string(batch.size));
  require(threads >= 1, "threads: expected 1 or more, got " + std::to_string(threads));
  if (batch.size == 0) return;
  require(batch.x != nullptr, "x: null pointer");
  require(batch.logits != nullptr, "logits: null pointer");
  require(batch.decisions != nullptr || plan.blocks.empty(), "decisions: null pointer");
  // Large enough to reuse weights, small enough that all threads end together.
  const int64_t share = batch.size / (2 * int64_t{threads});
  const int64_t size = std::clamp<int64_t>(share, 1, plan.workspace_samples());
  const int64_t groups = (batch.size + size - 1) / size;
  // Threads beyond what all teams can use would only wait.
  const int64_t workers = threads / Team::kMaxParts < groups ? threads : groups * Team::kMaxParts;
  Crew crew(groups, workers);
  std::vector<std::unique_ptr<Workspace>> workspaces = plan.take_workspaces(crew.drivers());
  // Each range is a worker. The first to come take the groups.
  parallel_for(workers, 1, static_cast<int>(workers), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      int64_t group = crew.next();
      if (group >= 0) {
        const int64_t driver = crew.join();
        std::vector<Walk> walks;
        for (int64_t i = 0; i < size; ++i) walks.emplace_back(plan, *workspaces[driver], i, crew, driver);
        for (; group >= 0; group = crew.next()) {
          const int64_t first = group * size, n = std::min(size, batch.size - first);
          for (int64_t i = 0; i < n; ++i) walks[i].enter(batch, first + i);
          for (size_t block = 0; block < plan.blocks.size(); ++block) {
            for (int64_t i = 0; i < n; ++i) walks[i].pass(batch, first + i, block);
          }
          for (int64_t i = 0; i < n; ++i) walks[i].leave(batch, first + i);
          crew.finish();
        }
      }
      crew.help();
    }
  });
  plan.give_back(std::move(workspaces));
}

}  // namespace spnet::cpu
