// Tells whether memory has changed, at the speed of reading it.
#pragma once

#include <cstdint>

namespace spnet::cpu {

struct Span {
  const void* data;
  int64_t bytes;
};

// A number that depends on every byte of the spans and on its place. Fletcher's checksum in 64-bit lanes: one
// addition for the values and one for their places, which vectorise; not meant against an adversary.
uint64_t fingerprint(const Span* spans, int64_t n);

}  // namespace spnet::cpu
