// A checksum that depends on every word of memory and on its place.
#pragma once

#include <cstdint>

#include "level.h"

namespace spnet::cpu {

constexpr int64_t kMixWords = 64;  // the most that any level keeps

struct MixWords {
  int64_t words;  // of a state

  // Mixes memory, padded with zeros to whole vectors, into a state that begins as zeros.
  //
  // A lane keeps two words (a, b); a word w of memory makes them
  //   a' = a + w, b' = b ^ a', a'' = rotate(a') + b'.
  // For given w this maps states one to one, and from a given state each w leads to another one. So two
  // memories that differ in one word of a lane end in different states, and a second difference would have to
  // meet what the rotations and carries have made of the first.
  void (*run)(const void* data, int64_t bytes, uint64_t* state);
};

#define SPNET_DECLARE(level)       \
  namespace level {                \
  extern const MixWords mix_words; \
  }
SPNET_FOR_EACH_BUILD(SPNET_DECLARE)
#undef SPNET_DECLARE

}  // namespace spnet::cpu
