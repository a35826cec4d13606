// A small persistent pool of threads with a dynamic queue.
//
// Why not OpenMP: a second OpenMP runtime beside PyTorch's own would keep its threads spinning on the same
// cores.
#pragma once

#include <cstdint>

namespace spnet::cpu {

namespace detail {
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end) noexcept;
void parallel_for(int64_t n, int64_t grain, int threads, RangeFunction function, void* context);
}  // namespace detail

// Calls function(begin, end) on disjoint ranges of at most `grain` items that together cover [0, n).
// The caller works too, beside at most `threads - 1` workers; whoever is free takes the next range.
// With one thread, or with a single range, everything runs in the caller and no lock is taken.
// The function must not throw.
//
// May be called from several threads at once, from inside a range, and in a child after fork() (which starts
// its own workers). Workers sleep when there is nothing to do.
template <class Function>
void parallel_for(int64_t n, int64_t grain, int threads, Function&& function) {
  if (n <= 0) return;
  if (threads <= 1 || n <= grain) {
    function(int64_t{0}, n);
    return;
  }
  const detail::RangeFunction call = [](void* context, int64_t begin, int64_t end) noexcept {
    (*static_cast<Function*>(context))(begin, end);
  };
  detail::parallel_for(n, grain, threads, call, &function);
}

}  // namespace spnet::cpu
