// A small persistent pool of threads with a dynamic queue.
//
// Why not OpenMP: a second OpenMP runtime beside PyTorch's own would keep its threads spinning on the same
// cores.
#pragma once

#include <cstdint>

namespace spnet::cpu {

namespace detail {
using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end) noexcept;
using Function = void (*)(const void* context) noexcept;
void parallel_for(int64_t n, int64_t grain, int threads, RangeFunction function, const void* context,
                  Function first, const void* first_context);
}  // namespace detail

// Calls function(begin, end) on disjoint ranges of at most `grain` items that together cover [0, n).
// The caller works too, beside at most `threads - 1` workers; whoever is free takes the next range.
// With one thread, or with a single range, everything runs in the caller and no lock is taken.
// The functions must not throw. Workers compute in the caller's floating-point environment.
//
// With `first` the caller begins with first(), while the workers begin with the ranges; it is called once
// whatever n is, before the caller takes a range of its own.
//
// May be called from several threads at once, from inside a range, and in a child after fork() (which starts
// its own workers). Workers watch for more work for 0.2 ms, then sleep.
template <class Function, class First>
void parallel_for(int64_t n, int64_t grain, int threads, const Function& function, const First& first) {
  if (threads <= 1 || n <= grain) {
    first();
    if (n > 0) function(int64_t{0}, n);
    return;
  }
  const detail::RangeFunction call = [](const void* context, int64_t begin, int64_t end) noexcept {
    (*static_cast<const Function*>(context))(begin, end);
  };
  const detail::Function call_first = [](const void* context) noexcept {
    (*static_cast<const First*>(context))();
  };
  detail::parallel_for(n, grain, threads, call, &function, call_first, &first);
}

template <class Function>
void parallel_for(int64_t n, int64_t grain, int threads, const Function& function) {
  parallel_for(n, grain, threads, function, [] {});
}

}  // namespace spnet::cpu
