// Compiled once per level (see level.h).
#include "fingerprint_loop.h"

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

using Words = uint64_t __attribute__((vector_size(4 * kLanes)));

constexpr int kChains = 4;  // enough to hide the latency; few enough for 16 registers with their temporaries
constexpr int kLine = 64;
constexpr int kAhead = 4096;  // bytes to fetch ahead, into L2: no hardware prefetcher crosses a page
constexpr int kStateBytes = kChains * sizeof(Words);

// One vector at a time: GCC copies a whole array through the stack.
inline Words load_words(const char* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

// A line for each chain.
inline void step(const char* from, int64_t stride, Words* a, Words* b) {
  for (size_t at = 0; at < kLine; at += sizeof(Words)) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      a[i] += load_words(from + i * stride + at);
      b[i] ^= a[i];
      a[i] = (a[i] << 25 | a[i] >> 39) + b[i];
    }
  }
}

void run(const void* data, int64_t bytes, uint64_t* state) {
  const char* from = static_cast<const char*>(data);
  Words a[kChains], b[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) {
    a[i] = load_words(reinterpret_cast<char*>(state) + i * sizeof(Words));
    b[i] = load_words(reinterpret_cast<char*>(state) + i * sizeof(Words) + kStateBytes);
  }
  // Each chain has its own quarter: the addresses of several pages are looked up at a time.
  const int64_t quarter = bytes / (kChains * kLine) * kLine;
  for (int64_t at = 0; at < quarter; at += kLine) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) __builtin_prefetch(from + i * quarter + at + kAhead, 0, 2);
    step(from + at, quarter, a, b);
  }
  if (const int64_t left = bytes - kChains * quarter; left > 0) {
    char rest[kChains * kLine] = {};
    std::memcpy(rest, from + kChains * quarter, left);
    step(rest, kLine, a, b);
  }
  std::memcpy(state, a, sizeof(a));
  std::memcpy(state + kStateBytes / 8, b, sizeof(b));
}

static_assert(2 * kStateBytes / 8 <= kMixWords);

}  // namespace

const MixWords mix_words = {2 * kStateBytes / 8, run};

}  // namespace spnet::cpu::SPNET_LEVEL
