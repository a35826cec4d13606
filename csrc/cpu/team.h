// A few threads that share the short phases of one long computation.
//
// One thread, the driver, decides what comes next; whoever has nothing to do helps with its phases. Nothing
// depends on a helper being there: it takes a part only while it runs, and parts that nobody took are done by
// the driver. So a busy machine makes a team slower, never stuck, and every phase costs one hand-over, not a
// lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <type_traits>

namespace spnet::cpu {

class Team {
 public:
  static constexpr int kMaxParts = 32;

  // By the driver: calls function(begin, end) on up to `parts` disjoint ranges that together cover [0,
  // units), and returns when all are done. The function is copied next to what the helpers wait for, so it
  // should hold its data by value: every cache line that they must get from another core delays them.
  template <class Function>
  void run(int64_t units, int64_t parts, const Function& function) {
    static_assert(std::is_trivially_copyable_v<Function> && sizeof(Function) <= kFunctionBytes);
    const RangeFunction call = [](const void* copy, int64_t begin, int64_t end) {
      (*static_cast<const Function*>(copy))(begin, end);
    };
    parts = parts < units ? parts : units;
    if (parts <= 1) {
      if (units > 0) function(int64_t{0}, units);
      return;
    }
    new (copy_) Function(function);
    run(units, static_cast<int>(parts < kMaxParts ? parts : kMaxParts), call);
  }

  // By any other thread: does a part that nobody has taken, if there is one; `preferred` if that is free. A
  // helper that prefers the same part in every phase finds the rows that it computed before in its own cache.
  bool help(int preferred);

 private:
  using RangeFunction = void (*)(const void* copy, int64_t begin, int64_t end);
  static constexpr int kFunctionBytes = 256;

  void run(int64_t units, int parts, RangeFunction function);
  void work(int part);
  bool take(int preferred, int& part);

  // The phase: written by the driver while no part is open, read by those who took one.
  alignas(64) unsigned char copy_[kFunctionBytes];
  alignas(64) RangeFunction function_ = nullptr;
  int64_t units_ = 0;
  int parts_ = 0;
  std::atomic<uint32_t> open_{0};  // bit i: nobody has taken part i yet

  alignas(64) std::atomic<int> done_{0};  // parts of this phase that helpers have done
};

// Waits for other threads: at first without giving the core away, for a phase lasts microseconds.
class Spin {
 public:
  void wait();

 private:
  int turns_ = 0;
};

}  // namespace spnet::cpu
