// The vocabulary of walk_kernel.h on the host: a register is an array of one value for each lane, a warp is a
// thread. Fragments lie in registers as the PTX ISA says for ldmatrix and mma.m16n8k16.
//
// It is stricter than a GPU. Shared memory is a heap buffer of exactly the size asked for and begins as NaN,
// and so does what cp.async has not yet delivered, which is delivered no earlier than it is waited for. An
// access outside of it, or not aligned, is noted and does nothing. Noted too is a race: what one lane writes
// and another one, of the same warp or not, touches with no barrier between; a touch of what cp.async has
// under way; and a read of what nobody wrote.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "half.h"
#include "walk_kernel.h"

namespace spnet::cuda {

template <class T>
struct Lanes {
  T at[kLanes];

  Lanes() = default;
  Lanes(T value) { std::fill(at, at + kLanes, value); }
  template <class From>
  explicit Lanes(const Lanes<From>& from) {
    std::copy(from.at, from.at + kLanes, at);
  }

#define SPNET_OPERATOR(op)                                              \
  friend Lanes operator op(const Lanes& a, const Lanes& b) {            \
    Lanes result;                                                       \
    for (int i = 0; i < kLanes; ++i) result.at[i] = a.at[i] op b.at[i]; \
    return result;                                                      \
  }                                                                     \
  static_assert(true)
#define SPNET_COMPARISON(op)                                            \
  friend Lanes<bool> operator op(const Lanes& a, const Lanes& b) {      \
    Lanes<bool> result;                                                 \
    for (int i = 0; i < kLanes; ++i) result.at[i] = a.at[i] op b.at[i]; \
    return result;                                                      \
  }                                                                     \
  static_assert(true)
  SPNET_OPERATOR(+);
  SPNET_OPERATOR(-);
  SPNET_OPERATOR(*);
  SPNET_OPERATOR(/);
  SPNET_OPERATOR(%);
  SPNET_OPERATOR(&);
  SPNET_OPERATOR(|);
  SPNET_OPERATOR(<<);
  SPNET_OPERATOR(>>);
  SPNET_COMPARISON(<);
  SPNET_COMPARISON(<=);
  SPNET_COMPARISON(>=);
  SPNET_COMPARISON(==);
#undef SPNET_OPERATOR
#undef SPNET_COMPARISON

  Lanes& operator+=(const Lanes& other) { return *this = *this + other; }
};

// All warps of a thread block, and what they share.
class EmulatedBlock {
 public:
  explicit EmulatedBlock(int64_t shared_bytes)
      : bytes_(shared_bytes),
        shared_(new (std::align_val_t(16)) char[shared_bytes]),
        touched_((shared_bytes + 3) / 4) {
    std::memset(shared_, 0xff, bytes_);
  }
  ~EmulatedBlock() { operator delete[](shared_, std::align_val_t(16)); }
  EmulatedBlock(const EmulatedBlock&) = delete;
  EmulatedBlock& operator=(const EmulatedBlock&) = delete;

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turn_;
    if (++waiting_ == kWarps) {
      waiting_ = 0;
      ++turn_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return turn_ != turn; });
    }
  }

  // Null, and a note, for what the hardware would refuse.
  char* place(int64_t offset, int64_t size) {
    if (offset >= 0 && offset + size <= bytes_ && offset % size == 0) return shared_ + offset;
    note("access to " + std::to_string(size) + " bytes at " + std::to_string(offset) + " of " +
         std::to_string(bytes_) + " bytes of shared memory");
    return nullptr;
  }

  // A thread between two barriers; kAll stands for all threads, none of which writes.
  struct Moment {
    static constexpr uint32_t kAll = 511;
    uint32_t barriers, thread;

    uint32_t stamp() const { return (barriers + 1) << 9 | thread; }
    bool races(uint32_t other) const { return other >> 9 == stamp() >> 9 && other != stamp(); }
  };

  void reads(int64_t offset, int64_t size, Moment now) {
    for (Touched& word : words(offset, size)) {
      const uint32_t written = word.written.load(kRelaxed), read = word.read.load(kRelaxed);
      if (written == 0) note(offset, "read, but never written");
      if (written == kUnderWay) note(offset, "read while a copy is under way");
      if (now.races(written)) note(offset, "written and read with no barrier between");
      const Moment both = {now.barriers, Moment::kAll};
      word.read.store(now.races(read) ? both.stamp() : now.stamp(), kRelaxed);
    }
  }
  void writes(int64_t offset, int64_t size, Moment now) {
    for (Touched& word : words(offset, size)) {
      const uint32_t written = word.written.load(kRelaxed);
      if (written == kUnderWay) note(offset, "written while a copy is under way");
      if (now.races(written)) note(offset, "written twice with no barrier between");
      if (now.races(word.read.load(kRelaxed))) note(offset, "read and written with no barrier between");
      word.written.store(now.stamp(), kRelaxed);
    }
  }
  void copies(int64_t offset, int64_t size, Moment now) {
    writes(offset, size, now);
    for (Touched& word : words(offset, size)) word.written.store(kUnderWay, kRelaxed);
  }
  void copied(int64_t offset, int64_t size, Moment now) {
    for (Touched& word : words(offset, size)) word.written.store(now.stamp(), kRelaxed);
  }

  void note(const std::string& fault) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (fault_.empty()) fault_ = fault;
  }

  const std::string& fault() const { return fault_; }

 private:
  // Of four bytes: by whom last, and when.
  struct Touched {
    std::atomic<uint32_t> written{0}, read{0};
  };
  struct Words {
    Touched *first, *last;
    Touched* begin() const { return first; }
    Touched* end() const { return last; }
  };
  static constexpr uint32_t kUnderWay = ~0u;
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;

  // None under the thread sanitizer, which would take five times as long and sees races between warps itself.
  Words words([[maybe_unused]] int64_t offset, [[maybe_unused]] int64_t size) {
#ifdef __SANITIZE_THREAD__
    return {nullptr, nullptr};
#else
    return {&touched_[offset / 4], &touched_[(offset + size - 1) / 4] + 1};
#endif
  }
  void note(int64_t offset, const char* fault) {
    note("shared memory at " + std::to_string(offset) + " " + fault);
  }

  const int64_t bytes_;
  char* const shared_;
  std::vector<Touched> touched_;
  std::mutex mutex_;
  std::condition_variable all_here_;
  int waiting_ = 0;
  int64_t turn_ = 0;
  std::string fault_;
};

template <class Element>
class EmulatedWarp {
 public:
  using Int = Lanes<int>;
  using Long = Lanes<int64_t>;
  using Word = Lanes<uint32_t>;
  using Float = Lanes<float>;
  using Bool = Lanes<bool>;

  EmulatedWarp(EmulatedBlock& block, int index) : block_(block), index_(index) {}

  int index() const { return index_; }
  Int lane() const {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane.at[i] = i;
    return lane;
  }

  template <class T>
  static Lanes<T> select(const Bool& condition, const Lanes<T>& yes, const Lanes<T>& no) {
    Lanes<T> result;
    for (int i = 0; i < kLanes; ++i) result.at[i] = condition.at[i] ? yes.at[i] : no.at[i];
    return result;
  }

  void barrier() {
    block_.barrier();
    ++barriers_;
  }

  Float shuffle_xor(const Float& value, int mask) const {
    Float result;
    for (int i = 0; i < kLanes; ++i) result.at[i] = value.at[i ^ mask];
    return result;
  }

  // --- Queue -----------------------------------------------------------------------------------------------

  static int64_t take_sample(Queue* queue) { return __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED); }
  static void leave(Queue* queue, int thread_blocks) {
    const uint64_t left = __atomic_add_fetch(&queue->finished, 1, __ATOMIC_ACQ_REL);
    if (left == static_cast<uint64_t>(thread_blocks)) *queue = Queue{};
  }
  void store_sample(int offset, int64_t sample) { write(offset, sample, 0); }
  int64_t load_sample(int offset) { return *shared<int64_t>(offset); }

  // --- Shared memory: offsets in bytes ---------------------------------------------------------------------

  template <class T>
  const T* shared(int offset) {
    const bool inside = block_.place(offset, 4) && block_.place(offset + sizeof(T) - 4, 4);
    static const T nothing{};
    if (inside) block_.reads(offset, sizeof(T), {barriers_, EmulatedBlock::Moment::kAll});
    return inside ? reinterpret_cast<const T*>(block_.place(offset, 4)) : &nothing;
  }

  Word load(const Int& offset, const Bool& where) { return read<uint32_t>(offset, where); }
  void store(const Int& offset, const Word& value, const Bool& where) { write(offset, value, where); }
  Float load_float(const Int& offset, const Bool& where) { return read<float>(offset, where); }
  void store_float(const Int& offset, const Float& value, const Bool& where) { write(offset, value, where); }
  Float load_number(const Int& offset, const Bool& where) {
    const Lanes<uint16_t> half = read<uint16_t>(offset, where);
    Float result;
    for (int i = 0; i < kLanes; ++i) result.at[i] = Element::widen(half.at[i]);
    return result;
  }
  void store_zeros(const Int& offset, const Bool& where) { write(offset, Lanes<Unit>(Unit{}), where); }

  template <class T>
  void load(Lanes<T> (&value)[4], const Int& offset) {
    unpack(read<Unit>(offset, true), value);
  }

  // Eight successive lanes say where the rows of a matrix [8 x 8] begin.
  void load_matrices(Word (&matrices)[4], const Int& offset) {
    const Lanes<Unit> rows = read<Unit>(offset, true);
    for (int m = 0; m < 4; ++m) {
      for (int lane = 0; lane < kLanes; ++lane) {
        matrices[m].at[lane] = rows.at[m * 8 + lane / 4].words[lane % 4];
      }
    }
    for (int first = 0; first < kLanes; first += 8) {
      unsigned banks = 0;
      for (int lane = first; lane < first + 8; ++lane) banks |= 1u << offset.at[lane] / 16 % 8;
      bank_conflicts_ += 8 - __builtin_popcount(banks);
    }
  }

  // --- Global memory ---------------------------------------------------------------------------------------

  static Float load_global(const float* from, const Int& index) {
    Float result;
    for (int i = 0; i < kLanes; ++i) result.at[i] = from[index.at[i]];
    return result;
  }
  void load_global(Float (&value)[4], const float* from, const Int& index) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* unit = from + int64_t{index.at[lane]} * 4;
      require_aligned(unit);
      for (int i = 0; i < 4; ++i) value[i].at[lane] = unit[i];
    }
  }
  static void store_global(float* to, const Int& index, const Float& value, const Bool& where) {
    for (int i = 0; i < kLanes; ++i) {
      if (where.at[i]) to[index.at[i]] = value.at[i];
    }
  }
  static void store_byte(uint8_t* to, bool value) { *to = value; }
  static Word load_half(const void* from, const Long& index, const Bool& where) {
    Word result = 0u;
    for (int i = 0; i < kLanes; ++i) {
      if (where.at[i]) result.at[i] = static_cast<const uint16_t*>(from)[index.at[i]];
    }
    return result;
  }

  // --- Asynchronous copies of 16 bytes ---------------------------------------------------------------------

  void copy_async(const Int& offset, const void* from, const Int& index, const Bool& where) {
    for (int i = 0; i < kLanes; ++i) {
      if (!where.at[i]) continue;
      char* to = block_.place(offset.at[i], sizeof(Unit));
      if (to == nullptr) continue;
      const Unit* unit = static_cast<const Unit*>(from) + index.at[i];
      require_aligned(unit);
      block_.copies(offset.at[i], sizeof(Unit), now(i));
      std::memset(to, 0xff, sizeof(Unit));
      under_way_.push_back({to, unit, groups_, offset.at[i], i});
    }
  }
  void commit_copies() { ++groups_; }
  template <int kGroups>
  void wait_for_copies() {
    deliver([&](const Copy& copy) { return copy.group < groups_ - kGroups; });
  }
  void wait_for_all_copies() {
    deliver([](const Copy&) { return true; });
  }

  // --- Arithmetic ------------------------------------------------------------------------------------------

  static Float low(const Word& pair) { return widen(pair, 0); }
  static Float high(const Word& pair) { return widen(pair, 16); }
  static Word pack_relu(const Float& low, const Float& high) {
    Word result;
    for (int i = 0; i < kLanes; ++i) {
      result.at[i] = round_relu(low.at[i]) | uint32_t{round_relu(high.at[i])} << 16;
    }
    return result;
  }

  static void multiply_add(Float (&sums)[4], const Word (&a)[4], const Word& b0, const Word& b1) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) {
          left[group + r % 2 * 8][pair + r / 2 * 8 + e] = Element::widen(a[r].at[lane] >> 16 * e & 0xffff);
        }
        right[pair + e][group] = Element::widen(b0.at[lane] >> 16 * e & 0xffff);
        right[pair + 8 + e][group] = Element::widen(b1.at[lane] >> 16 * e & 0xffff);
      }
    }
    float product[16][8] = {};
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) product[m][n] += left[m][k] * right[k][n];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < 4; ++r) sums[r].at[lane] += product[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    }
  }

  // Of rows that ldmatrix read, those that waited for another one.
  int64_t bank_conflicts() const { return bank_conflicts_; }

 private:
  struct alignas(16) Unit {
    uint32_t words[4];
  };
  struct Copy {
    char* to;
    const Unit* from;
    int64_t group, offset;
    int lane;
  };

  void require_aligned(const void* unit) {
    if (reinterpret_cast<std::uintptr_t>(unit) % sizeof(Unit) != 0)
      block_.note("global memory read in unaligned units");
  }

  EmulatedBlock::Moment now(int lane) const {
    return {barriers_, static_cast<uint32_t>(index_ * kLanes + lane)};
  }

  template <class T>
  T read(int64_t offset, int lane) {
    T value{};
    if (const char* from = block_.place(offset, sizeof(T))) {
      block_.reads(offset, sizeof(T), now(lane));
      std::memcpy(&value, from, sizeof(T));
    }
    return value;
  }
  template <class T>
  void write(int64_t offset, const T& value, int lane) {
    if (char* to = block_.place(offset, sizeof(T))) {
      block_.writes(offset, sizeof(T), now(lane));
      std::memcpy(to, &value, sizeof(T));
    }
  }
  template <class T>
  Lanes<T> read(const Int& offset, const Bool& where) {
    Lanes<T> result = T{};
    for (int i = 0; i < kLanes; ++i) {
      if (where.at[i]) result.at[i] = read<T>(offset.at[i], i);
    }
    return result;
  }
  template <class T>
  void write(const Int& offset, const Lanes<T>& value, const Bool& where) {
    for (int i = 0; i < kLanes; ++i) {
      if (where.at[i]) write(offset.at[i], value.at[i], i);
    }
  }

  template <class T>
  static void unpack(const Lanes<Unit>& units, Lanes<T> (&value)[4]) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) value[i].at[lane] = bits<T>(units.at[lane].words[i]);
    }
  }

  template <class Due>
  void deliver(const Due& due) {
    const auto later = std::stable_partition(under_way_.begin(), under_way_.end(), due);
    for (auto copy = under_way_.begin(); copy != later; ++copy) {
      *reinterpret_cast<Unit*>(copy->to) = *copy->from;
      block_.copied(copy->offset, sizeof(Unit), now(copy->lane));
    }
    under_way_.erase(under_way_.begin(), later);
  }

  static Float widen(const Word& pair, int shift) {
    Float result;
    for (int i = 0; i < kLanes; ++i) result.at[i] = Element::widen(pair.at[i] >> shift & 0xffff);
    return result;
  }
  static uint16_t round_relu(float value) { return Element::round(value < 0 ? 0.f : value); }

  EmulatedBlock& block_;
  const int index_;
  std::vector<Copy> under_way_;
  uint32_t barriers_ = 0;
  int64_t groups_ = 0, bank_conflicts_ = 0;
};

}  // namespace spnet::cuda
