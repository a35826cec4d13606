// Compiled once per level (see level.h).
#include "fingerprint_loop.h"

#include "vec.h"

namespace spnet::cpu::SPNET_LEVEL {
namespace {

using Words = uint64_t __attribute__((vector_size(4 * kLanes)));

constexpr int kChains = 4;  // enough to hide the latency; few enough for 16 registers with their temporaries
constexpr int kStepBytes = kChains * sizeof(Words);
constexpr int kAhead = 4096;  // bytes to fetch ahead, into L2: no hardware prefetcher crosses a page

// One vector at a time: GCC copies a whole array through the stack.
inline Words load_words(const char* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

inline void step(const char* from, Words* a, Words* b) {
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) {
    a[i] += load_words(from + i * sizeof(Words));
    b[i] ^= a[i];
    a[i] = (a[i] << 25 | a[i] >> 39) + b[i];
  }
}

void run(const void* data, int64_t bytes, uint64_t* state) {
  const char* from = static_cast<const char*>(data);
  Words a[kChains], b[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) {
    a[i] = load_words(reinterpret_cast<char*>(state) + i * sizeof(Words));
    b[i] = load_words(reinterpret_cast<char*>(state) + i * sizeof(Words) + kStepBytes);
  }
  for (; bytes >= kStepBytes; bytes -= kStepBytes, from += kStepBytes) {
    for (int i = 0; i < kStepBytes; i += 64) __builtin_prefetch(from + kAhead + i, 0, 2);
    step(from, a, b);
  }
  if (bytes > 0) {
    char rest[kStepBytes] = {};
    std::memcpy(rest, from, bytes);
    step(rest, a, b);
  }
  std::memcpy(state, a, sizeof(a));
  std::memcpy(state + kStepBytes / 8, b, sizeof(b));
}

static_assert(2 * kStepBytes / 8 <= kMixWords);

}  // namespace

const MixWords mix_words = {2 * kStepBytes / 8, run};

}  // namespace spnet::cpu::SPNET_LEVEL
