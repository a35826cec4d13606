#include "speed.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "packed_plan.h"
#include "pool.h"

namespace spnet::cpu {
namespace {

// Each thread repeats work(), whose operations are `flops`, for `seconds`; the sum of their best spans, so
// that whatever else the machine does counts little.
template <class MakeWork>
double measure(int threads, double seconds, double flops, MakeWork make_work) {
  using Clock = std::chrono::steady_clock;
  std::mutex mutex;
  double total = 0;
  parallel_for(threads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto work = make_work();
      double best = 0;
      const auto start = Clock::now();
      for (auto now = start; std::chrono::duration<double>(now - start).count() < seconds;) {
        const auto before = Clock::now();
        work();
        now = Clock::now();
        best = std::max(best, flops / std::chrono::duration<double>(now - before).count());
      }
      std::lock_guard<std::mutex> lock(mutex);
      total += best;
    }
  });
  return total / 1e9;
}

}  // namespace

double fma_gflops(int threads, double seconds, Precision precision) {
  constexpr int64_t kRepetitions = 20'000;
  const FmaLoop& loop = kernels(precision).fma_loop;
  volatile float sink = 0;
  return measure(threads, seconds, loop.flops * kRepetitions,
                 [&] { return [&] { sink = loop.run(kRepetitions); }; });
}

double conv_gflops(int64_t channels, int64_t height, int64_t width, int threads, double seconds,
                   Precision precision) {
  if (channels < 1 || height < 1 || width < 1 || threads < 1) {
    throw std::invalid_argument("conv_gflops: expected sizes and threads of 1 or more");
  }
  PlanConv shape{};
  shape.cin = shape.cout = channels;
  shape.kernel = 3;
  shape.stride = shape.groups = 1;
  shape.out_height = height;
  shape.out_width = width;
  const ConvLayout layout = lay_out(kernels(precision), shape);
  const ConvFunctions& functions = *layout.functions;
  const int64_t lanes = functions.lanes_of(channels), row = functions.row(width + 2, lanes);
  const int64_t plane = (height + 2) * row;
  const AlignedFloats bias(functions.padded(channels));
  std::deque<AlignedFloats> maps, scratch;
  for (int i = 0; i < 2 * threads; ++i)
    maps.emplace_back(functions.map(channels, height, width) / functions.word_channels);
  for (int i = 0; i < threads; ++i)
    scratch.emplace_back(functions.side > 1 ? functions.scratch(channels) : 0);
  std::atomic<int> next{0};
  return measure(threads, seconds, 18.0 * channels * channels * height * width, [&] {
    const int i = next.fetch_add(2);
    float* const out = maps[i + 1].get() + (row + lanes) / functions.word_channels;
    Conv conv{};
    conv.in = {maps[i].get(), row, plane, lanes};
    conv.out = {out, row, plane, lanes};
    conv.bundles = layout.bundles.data();
    conv.bias = bias.get();
    conv.kernel = 3;
    conv.stride = 1;
    conv.height = height;
    conv.width = width;
    conv.cout = channels;
    conv.vectors = functions.padded(channels) / functions.vector;
    conv.residual = conv.relu = true;
    conv.scratch = scratch[i / 2].get();
    return [conv, &functions, bundles = static_cast<int64_t>(layout.bundles.size())] {
      functions.run(conv, {0, bundles, 0, conv.height});
    };
  });
}

}  // namespace spnet::cpu
