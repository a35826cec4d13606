// The walk of one thread block: it takes samples from a queue and carries each through all blocks of the
// network in shared memory.
//
// The source is one for the device and for the host. `Warp` gives the vocabulary: variables that differ
// between the lanes of a warp (Int, Word, Float, Bool), memory, tensor cores, barriers. Plain C++ variables
// are the same in all lanes, and so is control flow: what a lane must not do is masked. device_warp.h is the
// vocabulary on a GPU, emulated_warp.h on the host.
#pragma once

#include "../walk_batch.h"
#include "walk_layout.h"

#ifdef __CUDACC__
#define SPNET_DEVICE __device__ __forceinline__
#define SPNET_UNROLL _Pragma("unroll")
#define SPNET_NO_UNROLL _Pragma("unroll 1")
#else
#define SPNET_DEVICE inline
#define SPNET_UNROLL
#define SPNET_NO_UNROLL
#endif

namespace spnet::cuda {

// Zero before and after every launch: the last thread block that finds no sample resets it.
struct Queue {
  unsigned long long next, finished;
};

template <class Warp>
class Walk {
  using Int = typename Warp::Int;
  using Long = typename Warp::Long;
  using Word = typename Warp::Word;
  using Float = typename Warp::Float;
  using Bool = typename Warp::Bool;

  static constexpr int kNeurons = kLanes / 2, kQuads = 8;

 public:
  SPNET_DEVICE Walk(Warp& warp, const Network& net, const Block* blocks, const void* weights,
                    const float* floats, const WalkBatch& batch)
      : warp_(warp), net_(net), blocks_(blocks), weights_(weights), floats_(floats), batch_(batch) {}

  SPNET_DEVICE void run(Queue* queue, int thread_blocks) {
    for (;;) {
      if (warp_.index() == 0) warp_.store_sample(net_.scratch.sample, warp_.take_sample(queue));
      copy_block(0);
      next_phase();
      const int64_t sample = warp_.load_sample(net_.scratch.sample);
      if (sample >= batch_.size) break;
      run_sample(sample);
    }
    if (warp_.index() == 0) warp_.leave(queue, thread_blocks);
  }

 private:
  // --- One sample ------------------------------------------------------------------------------------------

  // Afterwards everything that was written or copied is there, and nothing is read any more.
  SPNET_DEVICE void next_phase() {
    warp_.wait_for_all_copies();
    warp_.barrier();
  }

  SPNET_DEVICE void run_sample(int64_t sample) {
    const bool forced = batch_.paths != nullptr;
    int clean = -1;  // the middle map whose halo is zero
    SPNET_NO_UNROLL
    for (int i = 0; i <= net_.n_blocks; ++i, next_phase()) {
      copy_block(i + 1);
      const Block& block = *warp_.template shared<Block>(place_of_block(i));
      const bool stem = i == 0, routed = !stem && !forced;
      const int64_t decision = sample * net_.n_blocks + i - 1;
      bool execute = stem || (forced && batch_.paths[decision] != 0);
      const Layer* layer = stem ? &block.second : &block.first;
      ring_ = block.ring;
      // The weights are on their way, behind the router's own, while it decides whether they are needed.
      Neuron hidden;
      if (routed) fetch_hidden(hidden, block, warp_.index() * kNeurons);
      if (execute || routed) start_stream(layer, stem ? 1 : 2, 0);
      if (stem) load(sample, block.second.sources[0].in);
      if (routed) execute = decide(block, hidden);
      if (!stem && warp_.index() == 0) warp_.store_byte(batch_.decisions + decision, execute);
      if (!execute) {
        if (block.identity) continue;
        if (routed) next_phase();
        layer = &block.second;
        if (layer->sources[1].chunks > 0) start_stream(layer, 1, 1);
      } else if (!stem && clean != block.middle) {
        clear_halo(block.first.out);
        clean = block.middle;
      }
      if (!block.identity) clear_halo(block.second.out);
      SPNET_NO_UNROLL
      for (; layer <= &block.second; ++layer) run_layer(*layer, execute ? 0 : 1);
      pool(block.second);
    }
    for (int first = warp_.index() * kNeurons; first < net_.head.outputs; first += kWarps * kNeurons) {
      Neuron logit;
      fetch(logit, net_.head, first);
      const Float value = linear(net_.head, logit);
      warp_.store_global(batch_.logits + sample * net_.head.outputs, logit.output, value,
                         logit.real & (warp_.lane() % 2 == 0));
    }
  }

  SPNET_DEVICE int place_of_block(int i) const { return net_.scratch.blocks + i % 2 * int{sizeof(Block)}; }

  SPNET_DEVICE void copy_block(int i) {
    if (i > net_.n_blocks || warp_.index() != 0) return;
    static_assert(sizeof(Block) % 16 == 0);
    constexpr int kUnits = sizeof(Block) / 16;
    for (int first = 0; first < kUnits; first += kLanes) {
      const Int unit = Int(first) + warp_.lane();
      warp_.copy_async(unit * 16 + place_of_block(i), blocks_ + i, unit, unit < kUnits);
    }
  }

  // --- Input, halo, pooling, routers -----------------------------------------------------------------------

  SPNET_DEVICE void load(int64_t sample, const Map& map) {
    clear_halo(map);
    const int64_t begin = sample * batch_.stride_n;
    const int pixels = map.height * map.width;
    const int channels = map.pixel_bytes / 2 - 8;
    for (int first = warp_.index() * kLanes; first < pixels; first += kThreads) {
      const Int pixel = Int(first) + warp_.lane();
      const Bool real = pixel < pixels;
      const Int y = pixel / map.width, x = pixel % map.width;
      const Long from = Long(begin) + Long(y) * batch_.stride_h + Long(x) * batch_.stride_w;
      const Int to = (y + 1) * map.row_bytes() + (x + 1) * map.pixel_bytes + map.offset;
      for (int chunk = 0; chunk < channels; chunk += kTile) {
        Word values[kTile];  // under way at once
        SPNET_UNROLL
        for (int i = 0; i < kTile; ++i) {
          const int c = chunk + i;
          values[i] = warp_.load_half(batch_.x, from + c * batch_.stride_c, real & (c < net_.in_channels));
        }
        SPNET_UNROLL
        for (int i = 0; i < kTile; i += 2) {
          warp_.store(to + 2 * (chunk + i), values[i] | values[i + 1] << 16, real);
        }
      }
    }
  }

  SPNET_DEVICE void clear_halo(const Map& map) {
    const int units = map.pixel_bytes / 16, row = map.width + 2;
    const int edge = 2 * row * units, all = edge + 2 * map.height * units;
    for (int first = warp_.index() * kLanes; first < all; first += kThreads) {
      const Int i = Int(first) + warp_.lane();
      const Int pixel = i / units, unit = i % units;
      const Int side = pixel - 2 * row;
      // The first and the last row, then both ends of every row between them.
      const Int y = Warp::select(i < edge, pixel / row * (map.height + 1), side / 2 + 1);
      const Int x = Warp::select(i < edge, pixel % row, side % 2 * (map.width + 1));
      warp_.store_zeros(y * map.row_bytes() + x * map.pixel_bytes + unit * 16 + map.offset, i < all);
    }
  }

  // From the sums of the strips, which add up in the order of the strips.
  SPNET_DEVICE void pool(const Layer& layer) {
    warp_.barrier();
    const int channels = layer.groups * kTile;
    for (int first = warp_.index() * kLanes; first < channels; first += kThreads) {
      const Int c = Int(first) + warp_.lane();
      const Bool real = c < channels;
      Float sum = 0.f;
      for (int strip = 0; strip < layer.strips.value; ++strip) {
        sum += warp_.load_float(c * 4 + (net_.scratch.partial_sums + strip * channels * 4), real);
      }
      warp_.store_float(c * 4 + net_.scratch.pooled, sum * layer.pool_scale, real);
    }
  }

  // An output of a linear layer, in two lanes, each for every other quad of inputs.
  struct Neuron {
    Int output;
    Bool real;
    Float bias, weight2;
    Float weight[kQuads][4];  // under way at once: what is waited for is L2
  };

  SPNET_DEVICE void fetch(Neuron& neuron, const Linear& linear, int first) {
    const Int output = warp_.lane() / 2 + first;
    neuron.real = output < linear.outputs;
    neuron.output = Warp::select(neuron.real, output, Int(0));
    fetch_quads(neuron, linear, 0);
    neuron.bias = warp_.load_global(floats_ + linear.bias, neuron.output);
  }

  SPNET_DEVICE void fetch_hidden(Neuron& neuron, const Block& block, int first) {
    fetch(neuron, block.router, first);
    neuron.weight2 = warp_.load_global(floats_ + block.router_weight2, neuron.output);
  }

  SPNET_DEVICE void fetch_quads(Neuron& neuron, const Linear& linear, int first) {
    const float* const from = floats_ + linear.weight;
    const int outputs = linear.outputs, quads = linear.quads;
    Int place = neuron.output + (warp_.lane() % 2 + first) * outputs;
    SPNET_UNROLL
    for (int i = 0; i < kQuads; ++i, place += 2 * outputs) {
      for (Float& weight : neuron.weight[i]) weight = 0.f;  // or registers are kept for what was there before
      if (first + 2 * i < quads) warp_.load_global(neuron.weight[i], from, place);
    }
  }

  SPNET_DEVICE Float linear(const Linear& linear, Neuron& neuron) {
    Float sum = 0.f;
    for (int first = 0;; fetch_quads(neuron, linear, first)) {
      SPNET_UNROLL
      for (int i = 0; i < kQuads; ++i) {
        const int quad = first + 2 * i;
        if (quad >= linear.quads) continue;
        Float value[4];
        warp_.load(value, warp_.lane() % 2 * 16 + (net_.scratch.pooled + quad * 16));
        SPNET_UNROLL
        for (int k = 0; k < 4; ++k) sum += neuron.weight[i][k] * value[k];
      }
      first += 2 * kQuads;
      if (first >= linear.quads) break;
    }
    return neuron.bias + (sum + warp_.shuffle_xor(sum, 1));
  }

  // hidden: the warp's first.
  SPNET_DEVICE bool decide(const Block& block, Neuron& hidden) {
    Float sum = 0.f;
    for (int first = warp_.index() * kNeurons; first < block.router.outputs;) {
      const Float term = hidden.weight2 * relu(linear(block.router, hidden));
      sum += Warp::select(hidden.real, term, Float(0.f));
      first += kWarps * kNeurons;
      if (first < block.router.outputs) fetch_hidden(hidden, block, first);
    }
    SPNET_UNROLL
    for (int distance = 16; distance > 1; distance /= 2) sum += warp_.shuffle_xor(sum, distance);
    warp_.store_float(Int(net_.scratch.warp_sums + warp_.index() * 4), sum, warp_.lane() == 0);
    warp_.barrier();
    float margin = block.router_bias2;
    SPNET_UNROLL
    for (int i = 0; i < kWarps; ++i) margin += *warp_.template shared<float>(net_.scratch.warp_sums + i * 4);
    return margin > batch_.threshold;
  }

  // Keeps NaN.
  SPNET_DEVICE static Float relu(Float value) { return Warp::select(value < 0.f, Float(0.f), value); }

  // --- Weights ---------------------------------------------------------------------------------------------

  // A slice, the weights that all warps need for a step, is a chunk of one source for the groups of one pass.
  // The stream loads the slices of `layers` in the order in which run_layer asks for them, kStages - 1 ahead.
  SPNET_DEVICE void start_stream(const Layer* layer, int layers, int from) {
    ahead_.layer = layer;
    ahead_.layers = layers;
    ahead_.from = from;
    ahead_.source = from;
    ahead_.unit = 0;
    ahead_.enter();
    fill_ = use_ = 0;
    for (int i = 0; i < kStages - 1; ++i) load_slice();
  }

  SPNET_DEVICE void load_slice() {
    if (ahead_.layers > 0) {
      const Int to = warp_.lane() * 16 + (ring_.offset + fill_ * ring_.stage_bytes);
      for (int i = warp_.index(); i < ahead_.fragments; i += kWarps) {
        warp_.copy_async(to + i * kFragmentBytes, weights_, Int((ahead_.begin + i) * kLanes) + warp_.lane(),
                         true);
      }
      ahead_.advance();
    }
    warp_.commit_copies();
    fill_ = fill_ + 1 == kStages ? 0 : fill_ + 1;
  }

  // Waits for the next slice and returns its place. All warps have finished with the one before.
  SPNET_DEVICE int next_slice() {
    warp_.template wait_for_copies<kStages - 2>();
    warp_.barrier();
    load_slice();
    const int place = ring_.offset + use_ * ring_.stage_bytes;
    use_ = use_ + 1 == kStages ? 0 : use_ + 1;
    return place;
  }

  struct Slice {
    const Layer* layer;
    int layers, from, source, unit, chunks;  // those that are left; of units the first of the pass
    int begin, fragments, stride;            // in the weights

    SPNET_DEVICE void enter() {
      const Source& now = layer->sources[source];
      const int units = layer->units();
      const int last = (unit + kWarps < units ? unit + kWarps : units) - 1;
      const int group = layer->strips.divide(unit);
      chunks = now.chunks;
      begin = now.weight + group * now.taps;
      fragments = (layer->strips.divide(last) - group + 1) * now.taps;
      stride = layer->groups * now.taps;
    }

    SPNET_DEVICE void advance() {
      begin += stride;
      if (--chunks > 0) return;
      if (source == 0 && layer->sources[1].chunks > 0) {
        source = 1;
      } else {
        source = from;
        unit += kWarps;
        if (unit >= layer->units()) {
          unit = 0;
          ++layer;
          if (--layers == 0) return;
        }
      }
      enter();
    }
  };

  // --- Layers ----------------------------------------------------------------------------------------------

  template <int kRows>
  struct Sums {
    Float at[kRows][2][4];  // row; 8 of the 16 channels; registers of a fragment
  };

  // A pixel column of a strip: `rows` rows from y down. Where the last band would reach beyond the map it
  // begins higher, and its first rows, above `valid`, are another strip's.
  struct Column {
    Int x, y, valid;
  };

  template <int kRows>
  SPNET_DEVICE static Column column(const Layer& layer, Int number) {
    const int width = layer.width.value, height = layer.out.height;
    const int columns = (height + kRows - 1) / kRows * width;
    const Bool real = number < columns;
    number = Warp::select(real, number, Int(0));
    const Int band = layer.width.divide(number), top = band * kRows;
    return {number - band * width, Warp::select(top + kRows <= height, top, Int(height - kRows)),
            Warp::select(real, top, Int(height))};
  }

  // from: the first source, 1 where the block is skipped.
  SPNET_DEVICE void run_layer(const Layer& layer, int from) {
    switch (layer.rows) {
      case 1:
        return run_layer<1>(layer, from);
      case 2:
        return run_layer<2>(layer, from);
      case 4:
        return run_layer<4>(layer, from);
      default:
        return run_layer<8>(layer, from);
    }
  }

  template <int kRows>
  SPNET_DEVICE void run_layer(const Layer& layer, int from) {
    const int units = layer.units();
    for (int first = 0; first < units; first += kWarps) {
      const int unit = first + warp_.index();
      const int group = layer.strips.divide(unit), strip = unit - group * layer.strips.value;
      const int fragments = group - layer.strips.divide(first);  // of the slice, before this unit's
      const Column column = this->template column<kRows>(layer, warp_.lane() % kTile + strip * kTile);
      Sums<kRows> sums;
      begin_sums(sums, floats_ + layer.bias[from], unit < units ? group : 0);
      for (int s = from; s < 2; ++s) {
        const Source source = layer.sources[s];  // in registers: behind a barrier it would be read again
        const int row_bytes = source.in.row_bytes(), pixel_bytes = source.in.pixel_bytes;
        Int pixels = column.y * (source.stride * row_bytes) + column.x * (source.stride * pixel_bytes) +
                     warp_.lane() / kTile * 16 + source.in.offset;
        for (int chunk = 0; chunk < source.chunks; ++chunk, pixels += 2 * kTile) {
          const Int weights = warp_.lane() * 16 + (next_slice() + fragments * source.taps * kFragmentBytes);
          if (unit >= units) continue;
          if (source.taps == 1) {
            add_tap(sums, pixels + row_bytes + pixel_bytes, source.stride * row_bytes, weights);
          } else if (source.stride == 1) {
            add_rolling(sums, pixels, row_bytes, pixel_bytes, weights);
          } else {
            SPNET_NO_UNROLL
            for (int tap = 0; tap < 9; ++tap) {
              add_tap(sums, pixels + (tap / 3 * row_bytes + tap % 3 * pixel_bytes), source.stride * row_bytes,
                      weights + tap * kFragmentBytes);
            }
          }
        }
      }
      if (unit < units) finish(layer, strip, group, sums);
    }
  }

  // With the bias, which comes while the first weights are waited for.
  template <int kRows>
  SPNET_DEVICE void begin_sums(Sums<kRows>& sums, const float* bias, int group) {
    SPNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Float value = warp_.load_global(bias, warp_.lane() % 4 * 2 + (group * kTile + i / 2 * 8 + i % 2));
      SPNET_UNROLL
      for (int row = 0; row < kRows; ++row) {
        sums.at[row][i / 2][i % 2] = sums.at[row][i / 2][i % 2 + 2] = value;
      }
    }
  }

  // One tap: each row of pixels is multiplied once.
  template <int kRows>
  SPNET_DEVICE void add_tap(Sums<kRows>& sums, Int pixels, int row_bytes, Int weights) {
    Word b[4];
    warp_.load(b, weights);
    SPNET_UNROLL
    for (int i = 0; i < kRows; ++i, pixels += row_bytes) {
      Word a[4];
      warp_.load_matrices(a, pixels);
      SPNET_UNROLL
      for (int n = 0; n < 2; ++n) warp_.multiply_add(sums.at[i][n], a, b[2 * n], b[2 * n + 1]);
    }
  }

  // Nine taps: a row of pixels, once read, is multiplied for all three output rows that see it.
  template <int kRows>
  SPNET_DEVICE void add_rolling(Sums<kRows>& sums, Int pixels, int row_bytes, int pixel_bytes, Int weights) {
    Word b[9][4];
    SPNET_UNROLL
    for (int tap = 0; tap < 9; ++tap) warp_.load(b[tap], weights + tap * kFragmentBytes);
    SPNET_UNROLL
    for (int row = 0; row < kRows + 2; ++row, pixels += row_bytes) {
      SPNET_UNROLL
      for (int dx = 0; dx < 3; ++dx) {
        Word a[4];
        warp_.load_matrices(a, pixels + dx * pixel_bytes);
        SPNET_UNROLL
        for (int dy = 0; dy < 3; ++dy) {
          const int i = row - dy;
          if (i < 0 || i >= kRows) continue;
          SPNET_UNROLL
          for (int n = 0; n < 2; ++n) {
            warp_.multiply_add(sums.at[i][n], a, b[dy * 3 + dx][2 * n], b[dy * 3 + dx][2 * n + 1]);
          }
        }
      }
    }
  }

  // Residual, ReLU, store, sums for pooling.
  template <int kRows>
  SPNET_DEVICE void finish(const Layer& layer, int strip, int group, Sums<kRows>& sums) {
    const Int channel = warp_.lane() % 4 * 2 + group * kTile;  // and the next, and 8 behind them
    Output<kRows> out;
    SPNET_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Column& column = out.columns[half] =
          this->template column<kRows>(layer, warp_.lane() / 4 + (strip * kTile + half * 8));
      out.places[half] = (column.y + 1) * layer.out.row_bytes() + (column.x + 1) * layer.out.pixel_bytes +
                         channel * 2 + layer.out.offset;
    }
    SPNET_UNROLL
    for (int n = 0; n < 2; ++n) {
      out.real[n] = Warp::select(channel + n * 8 < layer.channels, Word(0xffffu), Word(0u)) |
                    Warp::select(channel + (n * 8 + 1) < layer.channels, Word(0xffff0000u), Word(0u));
    }
    if (layer.pool_scale == 0.f) {
      store<kRows, false>(layer, sums, out);
      return;
    }
    if (layer.residual == Residual::in_place) {
      add_state(layer, sums, out);
    } else if (layer.residual == Residual::pad) {
      add_padded(layer, sums, out, channel);
    }
    store<kRows, true>(layer, sums, out);
    SPNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      Float total = out.totals[i / 2][i % 2];
      SPNET_UNROLL
      for (int distance = 4; distance < kLanes; distance *= 2) total += warp_.shuffle_xor(total, distance);
      const Int place = channel + (i / 2 * 8 + i % 2 + strip * layer.groups * kTile);
      warp_.store_float(place * 4 + net_.scratch.partial_sums, total, warp_.lane() < 4);
    }
  }

  // A lane's part of a unit: two columns, and two successive channels of either half of the tile.
  template <int kRows>
  struct Output {
    Column columns[2];
    Int places[2];
    Float totals[2][2];
    // The channels that there are. What is computed for those beyond is no zero where pixels are not finite.
    Word real[2];

    SPNET_DEVICE Bool valid(int half, int row) const { return columns[half].y + row >= columns[half].valid; }
  };

  template <int kRows, bool kPooled>
  SPNET_DEVICE void store(const Layer& layer, const Sums<kRows>& sums, Output<kRows>& out) {
    const int row_bytes = layer.out.row_bytes();
    SPNET_UNROLL
    for (int i = 0; i < 4; ++i) out.totals[i / 2][i % 2] = 0.f;
    SPNET_UNROLL
    for (int i = 0; i < kRows * 4; ++i) {
      const int row = i / 4, half = i / 2 % 2, n = i % 2;
      const Float* sum = &sums.at[row][n][2 * half];
      const Word pair = Warp::pack_relu(sum[0], sum[1]) & out.real[n];
      warp_.store(out.places[half] + (row * row_bytes + n * 16), pair, out.valid(half, row));
      if (!kPooled) continue;
      const Word counted = Warp::select(out.valid(half, row), pair, Word(0u));
      out.totals[n][0] += Warp::low(counted);
      out.totals[n][1] += Warp::high(counted);
    }
  }

  // The map that the output replaces.
  template <int kRows>
  SPNET_DEVICE void add_state(const Layer& layer, Sums<kRows>& sums, const Output<kRows>& out) {
    const int row_bytes = layer.out.row_bytes();
    SPNET_UNROLL
    for (int i = 0; i < kRows * 4; ++i) {
      const int row = i / 4, half = i / 2 % 2, n = i % 2;
      const Word state = warp_.load(out.places[half] + (row * row_bytes + n * 16), out.valid(half, row));
      sums.at[row][n][2 * half] += Warp::low(state);
      sums.at[row][n][2 * half + 1] += Warp::high(state);
    }
  }

  // The map before the block: every stride-th pixel, with zeros around its channels.
  template <int kRows>
  SPNET_DEVICE void add_padded(const Layer& layer, Sums<kRows>& sums, const Output<kRows>& out, Int channel) {
    const Source& shortcut = layer.sources[1];
    const int row_bytes = shortcut.stride * shortcut.in.row_bytes();
    SPNET_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int half = i / 4, n = i / 2 % 2, k = i % 2;
      const Column& column = out.columns[half];
      const Int c = channel + (n * 8 + k - layer.pad_before);
      const Bool real = (c >= 0) & (c < layer.pad_channels);
      const Int from = (column.y * shortcut.stride + 1) * shortcut.in.row_bytes() +
                       (column.x * shortcut.stride + 1) * shortcut.in.pixel_bytes + c * 2 +
                       shortcut.in.offset;
      SPNET_UNROLL
      for (int row = 0; row < kRows; ++row) {
        sums.at[row][n][2 * half + k] +=
            warp_.load_number(from + row * row_bytes, real & out.valid(half, row));
      }
    }
  }

  Warp& warp_;
  const Network& net_;
  const Block* const blocks_;
  const void* const weights_;
  const float* const floats_;
  const WalkBatch& batch_;
  Ring ring_{};
  Slice ahead_{};
  int fill_ = 0, use_ = 0;
};

}  // namespace spnet::cuda
