#include "rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "add_row.h"
#include "level.h"
#include "pool.h"

namespace spnet::cpu {
namespace {

// One range of work: large enough that taking it from the queue costs nothing, small enough to balance.
constexpr int64_t kRangeBytes = 64 * 1024;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_sizes(int64_t batch, int64_t n, int64_t row_bytes) {
  if (batch >= 0 && n >= 0 && row_bytes >= 0) return;
  throw std::invalid_argument("sizes: expected none below 0, got batch " + std::to_string(batch) + ", n " +
                              std::to_string(n) + ", row bytes " + std::to_string(row_bytes));
}

void check_rows(const void* src, const void* dst, int64_t n, int64_t row_bytes) {
  require(n == 0 || row_bytes == 0 || (src != nullptr && dst != nullptr), "rows: null pointer");
}

// Returns whether the list ascends strictly, in which case no index stands twice.
bool check_index(const int64_t* index, int64_t n, int64_t batch) {
  require(n == 0 || index != nullptr, "index: null pointer");
  bool ascending = true;
  int64_t previous = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = index[i];
    if (row < 0 || row >= batch) {
      throw std::out_of_range("index: expected values in [0, " + std::to_string(batch) + "), got " +
                              std::to_string(row) + " at position " + std::to_string(i));
    }
    ascending &= row > previous;
    previous = row;
  }
  return ascending;
}

void check_distinct(const int64_t* index, int64_t n, int64_t batch) {
  std::vector<bool> seen(static_cast<size_t>(batch));
  for (int64_t i = 0; i < n; ++i) {
    if (seen[index[i]]) {
      throw std::invalid_argument("index: expected each row once, got " + std::to_string(index[i]) +
                                  " again at position " + std::to_string(i));
    }
    seen[index[i]] = true;
  }
}

// Calls function(position, begin, length), in elements of a row, on pieces that cover n rows; a large row is
// shared between threads.
template <class Function>
void for_each_piece(int64_t n, int64_t row_elems, int64_t elem_bytes, int threads, Function function) {
  if (n * row_elems * elem_bytes < kSmallBytes) threads = 1;
  const int64_t piece = threads == 1 ? row_elems : std::min(row_elems, kRangeBytes / elem_bytes);
  if (piece == 0) return;
  const int64_t per_row = (row_elems + piece - 1) / piece;
  const int64_t grain = std::max<int64_t>(kRangeBytes / (piece * elem_bytes), 1);
  parallel_for(n * per_row, grain, threads, [&](int64_t first, int64_t last) {
    int64_t position = first / per_row;
    int64_t begin = (first - position * per_row) * piece;
    for (int64_t i = first; i < last; ++i) {
      function(position, begin, std::min(piece, row_elems - begin));
      begin += piece;
      if (begin >= row_elems) {
        begin = 0;
        ++position;
      }
    }
  });
}

const AddRowFunctions& add_row_functions() {
#define SPNET_FUNCTIONS(level) &level::add_row_functions,
  constexpr const AddRowFunctions* kOfLevel[] = {SPNET_FOR_EACH_LEVEL(SPNET_FUNCTIONS)};
#undef SPNET_FUNCTIONS
  return *kOfLevel[static_cast<int>(level())];
}

}  // namespace

int64_t compact(const uint8_t* mask, int64_t batch, int64_t* out) {
  check_sizes(batch, 0, 0);
  require(batch == 0 || (mask != nullptr && out != nullptr), "mask: null pointer");
  int64_t count = 0;
  for (int64_t i = 0; i < batch; ++i) {
    out[count] = i;  // always stored, kept only if selected: no branch to mispredict
    count += mask[i] != 0;
  }
  return count;
}

void gather_rows(const void* src, int64_t batch, const int64_t* index, int64_t n, void* dst,
                 int64_t row_bytes, int threads) {
  check_sizes(batch, n, row_bytes);
  check_index(index, n, batch);
  check_rows(src, dst, n, row_bytes);
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  for_each_piece(n, row_bytes, 1, threads, [=](int64_t position, int64_t begin, int64_t length) {
    std::memcpy(to + position * row_bytes + begin, from + index[position] * row_bytes + begin, length);
  });
}

void scatter_add_rows(void* dst, int64_t batch, const int64_t* index, int64_t n, const void* src,
                      int64_t row_elems, Dtype dtype, bool relu, int threads) {
  const AddRowFunctions& functions = add_row_functions();
  const AddRow* choice = nullptr;
  int64_t elem_bytes = 0;
  switch (dtype) {
    case Dtype::float32:
      choice = functions.float32, elem_bytes = 4;
      break;
    case Dtype::float64:
      choice = functions.float64, elem_bytes = 8;
      break;
    case Dtype::bfloat16:
      choice = functions.bfloat16, elem_bytes = 2;
      break;
    case Dtype::float16:
      choice = functions.float16, elem_bytes = 2;
      break;
  }
  require(choice != nullptr, "dtype: unknown");
  const int64_t row_bytes = row_elems * elem_bytes;
  check_sizes(batch, n, row_bytes);
  if (!check_index(index, n, batch)) check_distinct(index, n, batch);
  check_rows(src, dst, n, row_bytes);
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  require(from + n * row_bytes <= to || to + batch * row_bytes <= from || n * row_bytes == 0,
          "src: expected memory apart from dst, got an overlap");

  const AddRow add = choice[relu];
  for_each_piece(n, row_elems, elem_bytes, threads, [=](int64_t position, int64_t begin, int64_t length) {
    add(to + index[position] * row_bytes + begin * elem_bytes,
        from + position * row_bytes + begin * elem_bytes, length);
  });
}

}  // namespace spnet::cpu
