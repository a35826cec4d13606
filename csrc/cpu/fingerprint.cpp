#include "fingerprint.h"

#include <cstring>

namespace spnet::cpu {

namespace {
constexpr int kLanes = 8;
constexpr uint64_t kMix = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio: odd, with its bits spread
}  // namespace

uint64_t fingerprint(const Span* spans, int64_t n) {
  uint64_t result = 0;
  for (int64_t s = 0; s < n; ++s) {
    uint64_t values[kLanes] = {}, places[kLanes] = {}, words[kLanes];
    const char* p = static_cast<const char*>(spans[s].data);
    int64_t left = spans[s].bytes;
    for (; left >= int64_t{sizeof words}; left -= sizeof words, p += sizeof words) {
      std::memcpy(words, p, sizeof words);
      for (int i = 0; i < kLanes; ++i) {
        values[i] += words[i];
        places[i] += values[i];
      }
    }
    std::memset(words, 0, sizeof words);
    if (left > 0) std::memcpy(words, p, left);
    for (int i = 0; i < kLanes; ++i) {
      values[i] += words[i];
      places[i] += values[i];
      result = (result ^ values[i]) * kMix;
      result = (result ^ places[i]) * kMix;
    }
  }
  return result;
}

}  // namespace spnet::cpu
