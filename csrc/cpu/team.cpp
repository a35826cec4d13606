#include "team.h"

#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spnet::cpu {

void Spin::wait() {
  constexpr int kTurns = 2000;
  if (turns_ == kTurns) {
    std::this_thread::yield();
    return;
  }
  ++turns_;
#if defined(__x86_64__)
  _mm_pause();
#endif
}

bool Team::take(int preferred, int& part) {
  for (;;) {
    const uint32_t open = open_.load(std::memory_order_relaxed);
    if (open == 0) return false;
    for (int i = 0; i < kFunctionBytes; i += 64) __builtin_prefetch(copy_ + i);
    part = open >> preferred & 1 ? preferred : __builtin_ctz(open);
    const uint32_t bit = uint32_t{1} << part;
    if (open_.fetch_and(~bit, std::memory_order_acq_rel) & bit) return true;
  }
}

void Team::work(int part) { function_(copy_, units_ * part / parts_, units_ * (part + 1) / parts_); }

void Team::run(int64_t units, int parts, RangeFunction function) {
  function_ = function;
  units_ = units;
  parts_ = parts;
  done_.store(0, std::memory_order_relaxed);
  const uint32_t all = ~uint32_t{0} >> (kMaxParts - parts);
  open_.store(all & ~uint32_t{1}, std::memory_order_release);  // part 0 is the driver's

  work(0);
  int mine = 1;
  for (int part = 0; take(0, part); ++mine) work(part);
  for (Spin spin; done_.load(std::memory_order_acquire) + mine < parts;) spin.wait();
}

bool Team::help(int preferred) {
  int part = 0;
  if (!take(preferred, part)) return false;
  work(part);
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

}  // namespace spnet::cpu
