#include "fingerprint.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "level.h"
#include "pool.h"

namespace spnet::cpu {
namespace {

// One range: large enough that taking it from the queue costs nothing, small enough to balance.
constexpr int64_t kRangeBytes = 128 * 1024;

const MixWords& mix_words() {
#define SPNET_FUNCTIONS(level) &level::mix_words,
  constexpr const MixWords* kOfLevel[] = {SPNET_FOR_EACH_LEVEL(SPNET_FUNCTIONS)};
#undef SPNET_FUNCTIONS
  return *kOfLevel[static_cast<int>(level())];
}

}  // namespace

Fingerprint::Fingerprint(const Span* spans, int64_t n, int64_t parts, int threads)
    : mix_(mix_words()), parts_(parts) {
  if (n < 0 || (n > 0 && spans == nullptr))
    throw std::invalid_argument("spans: a null pointer or fewer than 0");
  for (Span left : std::vector<Span>(spans, spans + n)) {
    if (left.bytes < 0 || (left.bytes > 0 && left.data == nullptr)) {
      throw std::invalid_argument("spans: a null pointer or fewer than 0 bytes");
    }
    if (left.part < 0 || left.part >= parts) {
      throw std::invalid_argument("spans: part " + std::to_string(left.part) + " of " +
                                  std::to_string(parts));
    }
    while (left.bytes > 0) {
      if (ranges_.empty() || ranges_.back().bytes == kRangeBytes || ranges_.back().part != left.part) {
        const int64_t begin = spans_.size();
        ranges_.push_back({begin, begin, 0, left.part});
      }
      Range& range = ranges_.back();
      const int64_t bytes = std::min(left.bytes, kRangeBytes - range.bytes);
      spans_.push_back({left.data, bytes, left.part});
      range.end += 1;
      range.bytes += bytes;
      left = {static_cast<const char*>(left.data) + bytes, left.bytes - bytes, left.part};
    }
  }
  sums_.resize(ranges_.size() * mix_.words);
  parallel_for(ranges_.size(), 1, threads, [this](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) read(range, &sums_[range * mix_.words]);
  });
}

void Fingerprint::read(int64_t range, uint64_t* sums) const {
  for (int64_t i = ranges_[range].begin; i < ranges_[range].end; ++i) {
    mix_.run(spans_[i].data, spans_[i].bytes, sums);
  }
}

bool Fingerprint::matches(int64_t range) const {
  uint64_t sums[kMixWords] = {};
  read(range, sums);
  return std::memcmp(sums, &sums_[range * mix_.words], mix_.words * sizeof(uint64_t)) == 0;
}

}  // namespace spnet::cpu
