#include "walk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
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
template <class From, class Convert>
void put_channel(const void* from, int64_t step, int64_t width, int64_t lanes, void* to, Convert convert) {
  const auto* value = static_cast<const From*>(from);
  auto* pixel = static_cast<decltype(convert(*value))*>(to);
  for (int64_t i = 0; i < width; ++i) pixel[i * lanes] = convert(value[i * step]);
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

  // Threads that would share a phase of this driver now: itself and those that have no group of their own.
  int64_t parts() const {
    const int64_t idle = idle_.load(std::memory_order_relaxed);
    if (idle == 0) return 1;
    const int64_t active = groups_ - finished_.load(std::memory_order_relaxed);  // this one, at least
    return 1 + (idle + active - 1) / active;
  }

  // Calls function on ranges that cover [0, units), with the threads that have no group of their own.
  template <class Function>
  void share(int64_t driver, int64_t units, const Function& function) {
    const int64_t n = parts();
    if (n == 1) {
      function(int64_t{0}, units);
    } else {
      teams_[driver].run(units, n, function);
    }
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

// What a convolution reads and writes of one sample.
struct Place {
  void *in, *out;
  bool relu;
  float* row_sums;
};

// What the thread that runs a phase computes in, whoever's sample it is.
thread_local float* own_scratch = nullptr;

// Some rows of a convolution, for one sample or several.
struct ConvPhase {
  Conv conv;            // of the first sample
  const Place* places;  // of all samples where they are several
  int64_t samples, bundles, first_row, last_row;
  int64_t step;  // rows that are computed together
  void (*run)(const Conv& conv, const Part& part);
  // The smaller of weights and maps stays in cache while the other streams by: all samples for a bundle of
  // output channels, or all output channels for a row.
  bool by_bundle;

  int64_t steps() const { return (last_row - first_row + step - 1) / step; }
  int64_t units() const { return (by_bundle ? bundles : 1) * samples * steps(); }

  void operator()(int64_t begin, int64_t end) const {
    Conv work = conv;
    work.scratch = own_scratch;
    const int64_t most = steps();
    for (int64_t n; begin < end; begin += n) {
      const int64_t first = begin % most, sample = begin / most % samples, bundle = begin / most / samples;
      n = std::min(end - begin, most - first);
      if (samples > 1) {
        work.in.data = places[sample].in;
        work.out.data = places[sample].out;
        work.relu = places[sample].relu;
        work.row_sums = places[sample].row_sums;
      }
      run(work, {by_bundle ? bundle : 0, by_bundle ? bundle + 1 : bundles, first_row + first * step,
                 std::min(first_row + (first + n) * step, last_row)});
    }
  }
};

// Some samples on their way through the blocks.
class Walk {
 public:
  Walk(const PackedPlan& plan, bool is_bfloat16, Workspace& workspace, Crew& crew, int64_t driver)
      : plan_(plan), is_bfloat16_(is_bfloat16), workspace_(workspace), crew_(crew), driver_(driver) {}

  void enter(const WalkBatch& batch, int64_t first, int64_t samples) {
    first_ = first;
    samples_ = samples;
    for (int64_t i = 0; i < samples; ++i) {
      load(batch, (first + i) * batch.stride_n);
      run_stem(workspace_.samples[i]);
      pooled_[i] = false;
    }
  }

  void pass(const WalkBatch& batch, int64_t number) {
    const PackedBlock& block = plan_.blocks[number];
    run_chain(block.before);
    uint8_t* decisions = batch.decisions + first_ * plan_.blocks.size() + number;
    const int64_t step = plan_.blocks.size();
    if (batch.paths == nullptr) decide(block, batch.threshold, decisions);
    int64_t executing[kMostSamples], all[kMostSamples], n = 0;
    bool skips[kMostSamples];
    for (int64_t i = 0; i < samples_; ++i) {
      uint8_t& decision = decisions[i * step];
      if (batch.paths != nullptr) decision = batch.paths[&decision - batch.decisions] != 0;
      all[i] = i;
      skips[i] = !decision;
      if (decision) executing[n++] = i;
    }
    const bool identity = block.shape.shortcut == Shortcut::identity;
    if (!identity) {
      for (int64_t i = 0; i < samples_; ++i) {
        shape(workspace_.samples[i].spare, block.shape.cout(), block.shape.out_height(),
              block.shape.out_width());
        // That of a sample whose body goes strip by strip is computed with it.
        if (!block.is_heavy && (skips[i] || block.averages()))
          run_shortcut(block, &i, 1, 0, block.shape.out_height(), skips);
      }
      if (block.is_heavy) run_shortcut(block, all, samples_, 0, block.shape.out_height(), skips);
    }
    const int64_t together = block.is_heavy ? n : 1;
    for (int64_t i = 0; i < n; i += together) run_body(block, executing + i, together);
    for (int64_t i = 0; i < samples_; ++i) {
      if (!identity) std::swap(workspace_.samples[i].state, workspace_.samples[i].spare);
      pooled_[i] &= identity && skips[i];
    }
  }

  void leave(const WalkBatch& batch) {
    run_chain(plan_.after);
    const int64_t classes = plan_.plan.num_classes;
    Vectors vectors{};
    for (int64_t i = 0; i < samples_; ++i) {
      pool(i);
      vectors.in[i] = workspace_.samples[i].pooled;
      vectors.out[i] = batch.logits + (first_ + i) * classes;
    }
    run_linear(plan_.head, vectors, samples_);
  }

 private:
  struct Vectors {
    const float* in[kMostSamples];
    float* out[kMostSamples];
  };

  int64_t row(const MapBuffer& map) const { return plan_.conv.row(map.width + 2 * map.halo, map.lanes); }
  int64_t plane(const MapBuffer& map) const { return (map.height + 2 * map.halo) * row(map); }
  char* at(const MapView& map, int64_t element) const {
    return static_cast<char*>(map.data) + element * plan_.element_bytes();
  }

  // Begins `border` rows and pixels in front of pixel (0, 0).
  MapView view(const MapBuffer& map, int64_t border) const {
    const MapView whole{map.data, row(map), plane(map), map.lanes};
    return {at(whole, (map.halo - border) * (whole.row + map.lanes)), whole.row, whole.plane, map.lanes};
  }

  // The halo stays zero while maps of the same shape are written, for whatever writes them writes inside it.
  // So does what lies behind the map: another sample's numbers there might be no numbers.
  void shape(MapBuffer& map, int64_t planes, int64_t lanes, int64_t halo, int64_t height,
             int64_t width) const {
    const MapBuffer wanted{map.data, planes, lanes, halo, height, width};
    if (std::memcmp(&map, &wanted, sizeof(map)) == 0) return;
    map = wanted;
    const MapView whole = view(map, halo);
    const auto clear = [&](int64_t element, int64_t n) {
      std::memset(at(whole, element), 0, n * plan_.element_bytes());
    };
    for (int64_t begin = 0; begin < planes * whole.plane; begin += whole.plane) {
      clear(begin, halo * whole.row);
      for (int64_t y = halo; y < halo + height; ++y) {
        clear(begin + y * whole.row, halo * lanes);
        clear(begin + y * whole.row + (halo + width) * lanes, whole.row - (halo + width) * lanes);
      }
      clear(begin + (halo + height) * whole.row, halo * whole.row);
    }
    clear(planes * whole.plane, kSlackPixels * lanes);
  }

  void shape(MapBuffer& map, int64_t channels, int64_t height, int64_t width) const {
    shape(map, plan_.conv.planes_of(channels), plan_.conv.lanes_of(channels), 1, height, width);
  }

  template <class Function>
  void share(int64_t units, const Function& function) const {
    crew_.share(driver_, units, function);
  }

  void load(const WalkBatch& batch, int64_t first) const {
    const Plan& plan = plan_.plan;
    MapBuffer& image = workspace_.middles[0][0];
    const int64_t halo = plan.stem[0].kernel / 2;
    const int64_t lanes = halo > 1 ? kImageLanes : plan_.conv.lanes_of(plan.in_channels);
    shape(image, (plan.in_channels + lanes - 1) / lanes, lanes, halo, plan.in_height, plan.in_width);
    const MapView map = view(image, 0);
    share(plan.in_height, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        if (plan_.precision == Precision::bfloat16) {
          char* last = at(map, (image.planes - 1) * map.plane + y * map.row);
          std::memset(last, 0, plan.in_width * lanes * plan_.element_bytes());
        }
        for (int64_t c = 0; c < plan.in_channels; ++c) {
          const int64_t offset = first + c * batch.stride_c + y * batch.stride_h;
          const void* from = static_cast<const char*>(batch.x) + offset * (is_bfloat16_ ? 2 : 4);
          char* to = at(map, c / lanes * map.plane + y * map.row + c % lanes);
          const auto put = [&](auto zero, auto convert) {
            put_channel<decltype(zero)>(from, batch.stride_w, plan.in_width, lanes, to, convert);
          };
          if (is_bfloat16_) {
            put(uint16_t{}, [](uint16_t value) { return value; });
          } else if (plan_.precision == Precision::float32) {
            put(0.f, [](float value) { return value; });
          } else {
            put(0.f, to_bfloat16);
          }
        }
      }
    });
  }

  struct Maps {
    const MapBuffer &in, &out;
    bool relu;
    float* row_sums;
  };

  // Rows [begin, end) of the output, of `n` samples, for each of which maps(i) says what is read and written.
  template <class OfSample>
  void run_conv(const PackedConv& conv, int64_t n, int64_t begin, int64_t end, bool residual,
                const OfSample& maps) const {
    if (begin == end) return;
    Place places[kMostSamples];
    for (int64_t i = 0; i < n; ++i) {
      const Maps each = maps(i);
      places[i] = {view(each.in, conv.shape.kernel / 2).data, view(each.out, 0).data, each.relu,
                   each.row_sums};
    }
    const Maps first = maps(0);
    ConvPhase phase{};
    Conv& work = phase.conv;
    work.in = view(first.in, conv.shape.kernel / 2);
    work.out = view(first.out, 0);
    work.bundles = conv.bundles.data();
    work.bias = conv.bias;
    work.kernel = conv.shape.kernel;
    work.stride = conv.shape.stride;
    work.height = first.out.height;
    work.width = first.out.width;
    work.cout = conv.shape.cout;
    work.vectors = conv.vectors;
    work.residual = residual;
    work.relu = first.relu;
    work.row_sums = first.row_sums;
    phase.places = places;
    phase.samples = n;
    phase.first_row = begin;
    phase.last_row = end;
    phase.bundles = conv.bundles.size();
    phase.step = conv.functions->side;
    phase.run = conv.functions->run;
    // Winograd's transformation of the inputs is work that only the bundles of one part share.
    phase.by_bundle = conv.functions->side > 1
                          ? crew_.parts() > n * phase.steps() || (conv.streams && n > 1)
                          : conv.bytes > n * first.in.planes * plane(first.in) * plan_.element_bytes();
    share(phase.units(), phase);
  }

  // Of all samples, from state to state.
  void run_chain(const std::vector<PackedConv>& chain) {
    for (const PackedConv& conv : chain) {
      const PlanConv& to = conv.shape;
      for (int64_t i = 0; i < samples_; ++i) {
        shape(workspace_.samples[i].spare, to.cout, to.out_height, to.out_width);
        pooled_[i] = false;
      }
      run_conv(conv, samples_, 0, to.out_height, false, [&](int64_t i) {
        const Workspace::Sample& sample = workspace_.samples[i];
        return Maps{sample.state, sample.spare, to.relu, sample.row_sums};
      });
      for (int64_t i = 0; i < samples_; ++i) {
        std::swap(workspace_.samples[i].state, workspace_.samples[i].spare);
      }
    }
  }

  void run_stem(Workspace::Sample& sample) const {
    Workspace::Middle& middle = workspace_.middles[0];
    const int64_t last = plan_.stem.size() - 1;
    for (int64_t i = 0; i < last; ++i) {
      const PlanConv& conv = plan_.stem[i].shape;
      MapBuffer& out = middle[(i + 1) % 2];
      shape(out, conv.cout, conv.out_height, conv.out_width);
      run_conv(plan_.stem[i], 1, 0, conv.out_height, false,
               [&](int64_t) { return Maps{middle[i % 2], out, conv.relu, nullptr}; });
    }
    const PlanConv& stem = plan_.stem[last].shape;
    const PlanPool& pool = plan_.plan.pool;
    const MapBuffer& in = middle[last % 2];
    if (pool.kernel == 0) {
      shape(sample.state, stem.cout, stem.out_height, stem.out_width);
      run_conv(plan_.stem[last], 1, 0, stem.out_height, false,
               [&](int64_t) { return Maps{in, sample.state, stem.relu, sample.row_sums}; });
      return;
    }
    shape(sample.spare, stem.cout, stem.out_height, stem.out_width);
    shape(sample.state, stem.cout, plan_.plan.height, plan_.plan.width);
    MaxPool work{};
    work.in = view(sample.spare, 0);
    work.out = view(sample.state, 0);
    work.kernel = pool.kernel;
    work.stride = pool.stride;
    work.padding = pool.padding;
    work.in_height = stem.out_height;
    work.in_width = stem.out_width;
    work.width = plan_.plan.width;
    work.vectors = plan_.stem[last].vectors;
    work.row_sums = sample.row_sums;
    const int64_t strip = plan_.stem_strip * crew_.parts();
    for (int64_t begin = 0, end, done = 0; begin < plan_.plan.height; begin = end) {
      end = std::min(begin + strip, plan_.plan.height);
      const int64_t needed = std::min((end - 1) * pool.stride + pool.kernel - pool.padding, stem.out_height);
      run_conv(plan_.stem[last], 1, done, needed, false,
               [&](int64_t) { return Maps{in, sample.spare, stem.relu, nullptr}; });
      done = needed;
      share(end - begin, [work, begin, run = plan_.ops.max_pool](int64_t first, int64_t last) {
        run(work, begin + first, begin + last);
      });
    }
  }

  // Rows [begin, end). Its output needs no ReLU: where one follows, a map that is padded holds nothing
  // negative.
  void run_pad(const PlanBlock& block, const MapBuffer& in, const MapBuffer& out, int64_t channels,
               int64_t begin, int64_t end, float* row_sums) const {
    PadShortcut work{};
    work.in = view(in, 0);
    work.out = view(out, 0);
    work.cin = block.cin();
    work.cout = channels;
    work.pad_before = block.pad_before;
    work.stride = block.stride;
    work.width = block.out_width();
    work.row_sums = row_sums;
    share(end - begin, [work, begin, run = plan_.ops.pad_shortcut](int64_t first, int64_t last) {
      run(work, begin + first, begin + last);
    });
  }

  void run_means(const PlanBlock& block, const MapBuffer& in, const MapBuffer& out) const {
    Means work{};
    work.in = view(in, 0);
    work.out = view(out, 0);
    work.stride = block.stride;
    work.in_height = in.height;
    work.in_width = in.width;
    work.width = out.width;
    work.vectors = out.planes * out.lanes / plan_.conv.vector;
    share(out.height, [work, run = plan_.ops.means](int64_t first, int64_t last) { run(work, first, last); });
  }

  // Rows [begin, end) of the spare maps of some samples; for those that skip the body they are the block's
  // result.
  void run_shortcut(const PackedBlock& block, const int64_t* samples, int64_t n, int64_t begin, int64_t end,
                    const bool* skips) const {
    const auto sums = [&](int64_t sample) {
      return skips[sample] ? workspace_.samples[sample].row_sums : nullptr;
    };
    if (block.shape.is_projection()) {
      const PackedConv& conv = block.projection;
      const bool gathers = block.gathers();
      if (gathers) {
        for (int64_t i = 0; i < n; ++i) {
          const MapBuffer& state = workspace_.samples[samples[i]].state;
          MapBuffer& gathered = workspace_.middles[i][0];
          shape(gathered, conv.shape.cin, conv.shape.out_height, conv.shape.out_width);
          if (block.averages()) {
            run_means(block.shape, state, gathered);
          } else {
            run_pad(block.shape, state, gathered, conv.shape.cin, begin, end, nullptr);
          }
        }
      }
      run_conv(conv, n, begin, end, false, [&](int64_t i) {
        const Workspace::Sample& sample = workspace_.samples[samples[i]];
        const MapBuffer& in = gathers ? workspace_.middles[i][0] : sample.state;
        return Maps{in, sample.spare, block.shape.relu && skips[samples[i]], sums(samples[i])};
      });
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const Workspace::Sample& sample = workspace_.samples[samples[i]];
        run_pad(block.shape, sample.state, sample.spare, block.shape.cout(), begin, end, sums(samples[i]));
      }
    }
  }

  void pool(int64_t i) {
    if (pooled_[i]) return;
    pool(workspace_.samples[i], workspace_.samples[i].state);
    pooled_[i] = true;
  }

  void pool(const Workspace::Sample& sample, const MapBuffer& map) const {
    const int64_t vectors = map.planes * map.lanes / plan_.conv.vector;
    plan_.ops.pool(sample.row_sums, map.height, vectors, map.height * map.width, sample.pooled);
  }

  // Every channel of a map that is whole times a number computed from its row sums, which are there. The last
  // one of a body is added to the shortcut. The pooled vector of the state gives way: it is to change.
  void squeeze_and_excite(const PackedBlock& block, int64_t number, const int64_t* samples, int64_t n,
                          const MapBuffer* const* in, const MapBuffer* const* out) const {
    const PackedConv& conv = block.body[number];
    const bool is_last = number + 1 == static_cast<int64_t>(block.body.size());
    Vectors first{}, second{};
    for (int64_t i = 0; i < n; ++i) {
      const Workspace::Sample& sample = workspace_.samples[samples[i]];
      pool(sample, *in[i]);
      first.in[i] = second.out[i] = sample.pooled;
      second.in[i] = first.out[i] = sample.hidden;
    }
    run_linear(conv.squeeze, first, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < conv.squeeze.outputs; ++j) {
        if (first.out[i][j] < 0) first.out[i][j] = 0;
      }
    }
    run_linear(conv.excite, second, n);
    for (int64_t i = 0; i < n; ++i) {
      Scale work{};
      for (int64_t j = 0; j < conv.excite.outputs; ++j) {
        second.out[i][j] = 1 / (1 + std::exp(-second.out[i][j]));
      }
      work.in = view(*in[i], 0);
      work.out = view(*out[i], 0);
      work.factors = second.out[i];
      work.width = in[i]->width;
      work.vectors = conv.vectors;
      work.adds = is_last;
      work.relu = is_last && block.shape.relu;
      work.row_sums = is_last ? workspace_.samples[samples[i]].row_sums : nullptr;
      share(in[i]->height,
            [work, run = plan_.ops.scale](int64_t begin, int64_t end) { run(work, begin, end); });
    }
  }

  void run_linear(const Linear& linear, const Vectors& vectors, int64_t n) const {
    share(plan_.ops.linear_columns(linear),
          [&linear, &vectors, n, run = plan_.ops.linear](int64_t begin, int64_t end) {
            run(linear, vectors.in, vectors.out, n, begin, end);
          });
  }

  void decide(const PackedBlock& block, float threshold, uint8_t* decisions) {
    Vectors vectors{};
    for (int64_t i = 0; i < samples_; ++i) {
      pool(i);
      vectors.in[i] = workspace_.samples[i].pooled;
      vectors.out[i] = workspace_.samples[i].hidden;
    }
    plan_.ops.linear(block.router, vectors.in, vectors.out, samples_, 0,
                     plan_.ops.linear_columns(block.router));
    for (int64_t i = 0; i < samples_; ++i) {
      const float margin =
          plan_.ops.margin(vectors.out[i], block.router_weight2, block.router_bias2, block.router.outputs);
      decisions[i * plan_.blocks.size()] = margin > threshold;
    }
  }

  // `n` samples together, strip by strip of rows: each convolution goes as far as the next one needs it.
  void run_body(const PackedBlock& block, const int64_t* samples, int64_t n) {
    const std::vector<PlanConv>& body = block.shape.body;
    const bool identity = block.shape.shortcut == Shortcut::identity;
    const int64_t last = body.size() - 1, height = block.shape.out_height();
    const bool skips[kMostSamples] = {};
    const int64_t strip = block.is_heavy ? height : block.strip * crew_.parts();
    int64_t done[kMaxBody] = {}, needed[kMaxBody];
    while (done[last] < height) {
      needed[last] = std::min(done[last] + strip, height);
      for (int64_t j = last; j > 0; --j) {
        const int64_t side = block.body[j - 1].functions->side;
        // The last row, counted from 0; by matrix registers a stride of 2 may also read the next one's first
        // pixels, which have weights of zero and so must be numbers.
        const bool beyond = plan_.conv.tiles && body[j].stride > 1;
        const int64_t last_row = (needed[j] - 1) * body[j].stride + body[j].kernel / 2 + beyond;
        const int64_t rows = (last_row / side + 1) * side;
        needed[j - 1] = block.squeezes ? body[j - 1].out_height : std::min(rows, body[j - 1].out_height);
      }
      for (int64_t j = 0; j <= last; ++j) {
        if (j == last && !identity && !block.is_heavy && !block.averages()) {
          run_shortcut(block, samples, n, done[j], needed[j], skips);
        }
        const bool squeezes = body[j].squeeze.width > 0, adds = j == last && !squeezes;
        MapBuffer *outs[kMostSamples], *results[kMostSamples];
        for (int64_t i = 0; i < n; ++i) {
          Workspace::Sample& sample = workspace_.samples[samples[i]];
          MapBuffer& middle = workspace_.middles[i][j % kMiddles];
          results[i] = j < last ? &middle : identity ? &sample.state : &sample.spare;
          outs[i] = adds ? results[i] : &middle;
          if (!adds) shape(middle, body[j].cout, body[j].out_height, body[j].out_width);
        }
        run_conv(block.body[j], n, done[j], needed[j], adds, [&](int64_t i) {
          const Workspace::Sample& sample = workspace_.samples[samples[i]];
          const MapBuffer& in = j == 0 ? sample.state : workspace_.middles[i][(j - 1) % kMiddles];
          const bool relu = adds ? block.shape.relu : body[j].relu;
          return Maps{in, *outs[i], relu, adds || squeezes ? sample.row_sums : nullptr};
        });
        if (squeezes) squeeze_and_excite(block, j, samples, n, outs, results);
        done[j] = needed[j];
      }
    }
  }

  const PackedPlan& plan_;
  const bool is_bfloat16_;  // the input
  Workspace& workspace_;
  Crew& crew_;
  const int64_t driver_;
  int64_t first_ = 0, samples_ = 0;
  bool pooled_[kMostSamples] = {};  // the pooled vector is that of the state
};

// Samples that a thread takes together.
int64_t group_size(const PackedPlan& plan, int64_t batch, int64_t threads) {
  const int64_t most = plan.workspace_samples();
  // Large enough to reuse weights, small enough that all threads end together.
  if (!plan.is_heavy) return std::clamp<int64_t>(batch / (2 * threads), 1, most);
  // As large as can be where weights come from memory; threads help each other to the end.
  const int64_t turns = (batch + threads * most - 1) / (threads * most);
  return (batch + threads * turns - 1) / (threads * turns);
}

}  // namespace

void walk(const PackedPlan& plan, const WalkBatch& batch, bool is_bfloat16, int threads) {
  check_batch(batch, plan.blocks.size());
  require(threads >= 1, "threads: expected 1 or more, got " + std::to_string(threads));
  require(!is_bfloat16 || plan.precision == Precision::bfloat16, "x: expected float32, got bfloat16");
  if (batch.size == 0) return;
  const int64_t size = group_size(plan, batch.size, threads);
  const int64_t groups = (batch.size + size - 1) / size;
  // Threads beyond what all teams can use would only wait.
  const int64_t workers = threads / Team::kMaxParts < groups ? threads : groups * Team::kMaxParts;
  Crew crew(groups, workers);
  std::vector<std::unique_ptr<Workspace>> workspaces = plan.take_workspaces(crew.drivers(), size);
  std::vector<AlignedFloats> scratch = plan.take_scratch(workers);
  // Each range is a worker. The first to come take the groups.
  parallel_for(workers, 1, static_cast<int>(workers), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      own_scratch = scratch[worker].get();
      int64_t group = crew.next();
      if (group >= 0) {
        const int64_t driver = crew.join();
        Walk walk(plan, is_bfloat16, *workspaces[driver], crew, driver);
        for (; group >= 0; group = crew.next()) {
          walk.enter(batch, group * size, std::min(size, batch.size - group * size));
          for (size_t block = 0; block < plan.blocks.size(); ++block) walk.pass(batch, block);
          walk.leave(batch);
          crew.finish();
        }
      }
      crew.help();
    }
  });
  plan.give_back(std::move(workspaces), std::move(scratch));
}

}  // namespace spnet::cpu
