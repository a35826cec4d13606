// Tells whether memory has changed, at the speed of reading it.
#pragma once

#include <cstdint>
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

  int64_t parts() const { return parts_; }

  // Ranges of bytes, each in a single part and read by one thread at a time, in the order of the spans.
  int64_t ranges() const { return ranges_.size(); }
  int64_t part(int64_t range) const { return ranges_[range].part; }
  int64_t bytes(int64_t range) const { return ranges_[range].bytes; }

  // Whether every byte of a range, which must still be there to be read, is what it was.
  bool matches(int64_t range) const;

 private:
  struct Range {
    int64_t begin, end;  // among the spans
    int64_t bytes;
    int64_t part;
  };

  void read(int64_t range, uint64_t* sums) const;

  const MixWords& mix_;
  const int64_t parts_;
  std::vector<Span> spans_;  // none of more bytes than a range
  std::vector<Range> ranges_;
  std::vector<uint64_t> sums_;  // of the ranges, mix_.words each
};

}  // namespace spnet::cpu
