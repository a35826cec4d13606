#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

#include "team.h"

namespace spnet::cpu {
namespace {

// One call of parallel_for. It lives on the caller's stack, so the caller leaves only when `inside` is 0.
struct Job {
  int64_t n;
  int64_t grain;
  detail::RangeFunction function;
  const void* context;
  std::fenv_t environment{};  // the caller's: whether it flushes subnormal numbers, and how it rounds
  std::atomic<int64_t> next{0};

  // Guarded by Pool::mutex.
  int places = 0;  // workers that may still join
  std::atomic<int> inside{0};
  bool listed = true;
  std::condition_variable left{};

  void work() noexcept {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      function(context, begin, std::min(begin + grain, n));
    }
  }
};

// Before a thread sleeps: what it waits for often comes sooner than it would be woken.
template <class Condition>
void watch_for(const Condition& condition) {
  constexpr auto kMost = std::chrono::microseconds(200);
  const auto begin = std::chrono::steady_clock::now();
  for (Spin spin; !condition() && std::chrono::steady_clock::now() - begin < kMost;) spin.wait();
}

class Pool {
 public:
  void run(Job& job, detail::Function first, const void* first_context) {
    const int helpers = job.places;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers(helpers);
      jobs_.push_back(&job);
      listed_ += 1;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    first(first_context);
    job.work();

    watch_for([&] { return job.inside == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    unlist(job);
    job.left.wait(lock, [&] { return job.inside == 0; });
  }

 private:
  void unlist(Job& job) {
    if (!job.listed) return;
    jobs_.remove(&job);
    job.listed = false;
    listed_ -= 1;
  }

  // Signals stay with the threads of the host program: one that Python's main thread waits for must reach it.
  void start_workers(int wanted) {
    if (workers_ >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { worker(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: the caller and the workers there are do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void worker() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (jobs_.empty()) {
        lock.unlock();
        watch_for([&] { return listed_ > 0; });
        lock.lock();
      }
      wake_.wait(lock, [&] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      ++job.inside;
      if (--job.places == 0) unlist(job);
      lock.unlock();
      std::fesetenv(&job.environment);
      job.work();
      lock.lock();
      unlist(job);
      if (--job.inside == 0) job.left.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Job*> jobs_;
  std::atomic<int> listed_{0};  // their number
  int workers_ = 0;
};

std::atomic<Pool*> shared_pool{nullptr};

// The pool is never destroyed: its detached workers sleep on it until the process ends, so that exit waits
// for nobody and a thread still computing at exit finds its pool alive. A child of fork() has none of the
// workers, so it forgets the pool and makes another at its first use.
Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); }); });
  Pool* current = shared_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (shared_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

void detail::parallel_for(int64_t n, int64_t grain, int threads, RangeFunction function, const void* context,
                          Function first, const void* first_context) {
  grain = std::max<int64_t>(grain, 1);
  const int64_t ranges = (n + grain - 1) / grain;
  Job job{n, grain, function, context};
  std::fegetenv(&job.environment);
  job.places = static_cast<int>(std::min<int64_t>(threads, ranges) - 1);
  pool().run(job, first, first_context);
}

}  // namespace spnet::cpu
