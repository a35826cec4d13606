#include "fingerprint.h"

#include <algorithm>
#include <atomic>
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
  switch (level()) {
#define SPNET_CASE(name) \
  case Level::name:      \
    return name::mix_words;
    SPNET_FOR_EACH_LEVEL(SPNET_CASE)
#undef SPNET_CASE
  }
  throw std::logic_error("unknown level");
}

}  // namespace

Fingerprint::Fingerprint(const Span* spans, int64_t n, int64_t parts, int threads)
    : mix_(mix_words()), parts_(parts) {
  if (n < 0 || (n > 0 && spans == nullptr))
    throw std::invalid_argument("spans: a null pointer or fewer than 0");
  int64_t room = 0;
  for (Span left : std::vector<Span>(spans, spans + n)) {
    if (left.bytes < 0 || (left.bytes > 0 && left.data == nullptr)) {
      throw std::invalid_argument("spans: a null pointer or fewer than 0 bytes");
    }
    if (left.part < 0 || left.part >= parts) {
      throw std::invalid_argument("spans: part " + std::to_string(left.part) + " of " +
                                  std::to_string(parts));
    }
    while (left.bytes > 0) {
      if (room == 0 || spans_.back().part != left.part) {
        ends_.push_back(spans_.size());
        room = kRangeBytes;
      }
      const int64_t bytes = std::min(left.bytes, room);
      spans_.push_back({left.data, bytes, left.part});
      ends_.back() = spans_.size();
      left = {static_cast<const char*>(left.data) + bytes, left.bytes - bytes, left.part};
      room -= bytes;
    }
  }
  sums_.resize(ends_.size() * mix_.words);
  parallel_for(ends_.size(), 1, threads, [this](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) read(range, &sums_[range * mix_.words]);
  });
}

void Fingerprint::read(int64_t range, uint64_t* sums) const {
  for (int64_t i = range == 0 ? 0 : ends_[range - 1]; i < ends_[range]; ++i) {
    mix_.run(spans_[i].data, spans_[i].bytes, sums);
  }
}

bool Fingerprint::matches(std::string_view chosen, int threads) const {
  if (chosen.size() != parts_) {
    throw std::invalid_argument("chosen: expected " + std::to_string(parts_) + " parts, got " +
                                std::to_string(chosen.size()));
  }
  std::vector<int64_t> ranges;
  for (size_t range = 0; range < ends_.size(); ++range) {
    if (chosen[spans_[ends_[range] - 1].part]) ranges.push_back(range);
  }
  std::atomic<bool> same{true};
  const auto compare = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      const int64_t range = ranges[i];
      uint64_t sums[kMixWords] = {};
      read(range, sums);
      if (std::memcmp(sums, &sums_[range * mix_.words], mix_.words * sizeof(uint64_t)) != 0) same = false;
    }
  };
  parallel_for(ranges.size(), 1, threads, compare);
  return same.load(std::memory_order_relaxed);
}

}  // namespace spnet::cpu
