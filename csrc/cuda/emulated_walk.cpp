#include "emulated_walk.h"

#include <atomic>
#include <deque>
#include <stdexcept>
#include <thread>
#include <vector>

#include "emulated_warp.h"

namespace spnet::cuda {

template <class Element>
int64_t emulate_walk(const WalkLayout& layout, const WalkBatch& batch, int thread_blocks) {
  check_batch(batch, layout.network.n_blocks);
  if (thread_blocks < 1) throw std::invalid_argument("walk: thread_blocks: expected 1 or more");
  Queue queue{};
  std::deque<EmulatedBlock> blocks;
  std::vector<std::thread> threads;
  std::atomic<int64_t> conflicts{0};
  for (int b = 0; b < thread_blocks; ++b) {
    EmulatedBlock& block = blocks.emplace_back(layout.network.shared_bytes);
    for (int index = 0; index < kWarps; ++index) {
      threads.emplace_back([&, index] {
        EmulatedWarp<Element> warp(block, index);
        Walk(warp, layout.network, layout.blocks.data(), layout.weights.data(), layout.floats.data(), batch)
            .run(&queue, thread_blocks);
        conflicts += warp.bank_conflicts();
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const EmulatedBlock& block : blocks) {
    if (!block.fault().empty()) throw std::runtime_error("emulated walk: " + block.fault());
  }
  if (queue.next != 0 || queue.finished != 0)
    throw std::runtime_error("emulated walk: the queue is not reset");
  return conflicts;
}

template int64_t emulate_walk<Float16>(const WalkLayout&, const WalkBatch&, int);
template int64_t emulate_walk<BFloat16>(const WalkLayout&, const WalkBatch&, int);

}  // namespace spnet::cuda
