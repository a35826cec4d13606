// Tells whether memory has changed, at the speed of reading it.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "fingerprint_loop.h"

namespace spnet::cpu {

struct Span {
  const void* data;
  int64_t bytes;
  int64_t part;  // of the whole that it belongs to, from 0
};

// What stood in spans of memory when this was made. Only the sums of mix_words are kept: one changed word of
// 8 bytes is always found, as many as one likes but for one chance in 2^128 per chain; it is not meant
// against an adversary. Reads by the level in use when it was made.
class Fingerprint {
 public:
  // Throws std::invalid_argument for a null pointer, a negative size or a part out of [0, parts).
  Fingerprint(const Span* spans, int64_t n, int64_t parts, int threads);

  // Whether every byte of the chosen parts, which must still be there to be read, is what it was. A part is
  // chosen where its char, of one for each, is not 0; another number of them throws std::invalid_argument.
  bool matches(std::string_view chosen, int threads) const;

 private:
  void read(int64_t range, uint64_t* sums) const;

  const MixWords& mix_;
  const size_t parts_;
  std::vector<Span> spans_;
  std::vector<int64_t> ends_;   // of the range that one thread reads at a time, among spans_
  std::vector<uint64_t> sums_;  // of the ranges, mix_.words each
};

}  // namespace spnet::cpu
