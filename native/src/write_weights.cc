// Writes into weights, for swaps of adapters in place. Nothing here needs ONNX Runtime.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parts.h"

namespace {

// Each store waits for its line of memory; asking for lines early keeps many of them on their way.
template <typename T>
void Scatter(void* into, const int64_t* positions, const void* from, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 32;
  T* memory = static_cast<T*>(into);
  const T* values = static_cast<const T*>(from);
  for (int64_t i = begin; i < end; ++i) {
    __builtin_prefetch(memory + positions[std::min(i + kAhead, end - 1)], 1);
    memory[positions[i]] = values[i];
  }
}

}  // namespace

#define LORAC_EXPORT extern "C" __attribute__((visibility("default")))

// memories[w][positions[w][i]] = values[w][i] for the counts[w] items, of `item_bytes` (1, 2, 4 or 8), of each of
// `writes`. Positions ascend; writes into one memory are next to each other, and a later one goes over an earlier one.
//
// A part is a piece of one memory: what a later write needs of it is then still in a cache.
LORAC_EXPORT void LoracNativeWriteSparse(
    void* const* memories, const int64_t* const* positions, const void* const* values, const int64_t* counts,
    int64_t writes, int64_t item_bytes, int64_t threads) {
  struct Piece {
    int64_t first, last;  // the writes into its memory
    int64_t begin, end;   // positions
  };
  constexpr int64_t kItems = 2048;  // of the longest write, in a piece
  std::vector<Piece> pieces;
  for (int64_t first = 0, last; first < writes; first = last) {
    int64_t longest = first;
    for (last = first; last < writes && memories[last] == memories[first]; ++last) {
      if (counts[last] > counts[longest]) longest = last;
    }
    int64_t begin = 0;
    for (int64_t item = kItems; item < counts[longest]; item += kItems) {
      pieces.push_back({first, last, begin, positions[longest][item]});
      begin = positions[longest][item];
    }
    pieces.push_back({first, last, begin, INT64_MAX});
  }
  const auto scatter = item_bytes == 1   ? Scatter<uint8_t>
                       : item_bytes == 2 ? Scatter<uint16_t>
                       : item_bytes == 4 ? Scatter<uint32_t>
                                         : Scatter<uint64_t>;
  lorac::RunParts(pieces.size(), threads, [&](int64_t part) {
    const Piece& piece = pieces[part];
    for (int64_t write = piece.first; write < piece.last; ++write) {
      const int64_t* at = positions[write];
      const int64_t begin = std::lower_bound(at, at + counts[write], piece.begin) - at;
      const int64_t end = std::lower_bound(at + begin, at + counts[write], piece.end) - at;
      scatter(memories[write], at, values[write], begin, end);
    }
  });
}

// out = weight + left right, for (rows, columns), (rows, rank) and (rank, columns). The factors may be transposed: then
// (rank, rows) and (columns, rank) lie there. Blocks of rows never depend on the number of threads, and so neither does
// the order of sums.
LORAC_EXPORT void LoracNativeWriteProduct(
    const float* weight, const float* left, bool left_transposed, const float* right, bool right_transposed, float* out,
    int64_t rows, int64_t rank, int64_t columns, int64_t threads) {
  constexpr int64_t kPart = 16 * lorac::kRows;
  std::unique_ptr<float[]> upright;
  if (right_transposed) {
    upright.reset(new float[rank * columns]);
    lorac::RunParts((columns + kPart - 1) / kPart, threads, [&](int64_t part) {
      for (int64_t column = part * kPart; column < std::min(columns, (part + 1) * kPart); ++column) {
        for (int64_t k = 0; k < rank; ++k) upright[k * columns + column] = right[column * rank + k];
      }
    });
    right = upright.get();
  }
  const lorac::Kernels& kernels = lorac::ChooseKernels();
  lorac::RunParts((rows + kPart - 1) / kPart, threads, [=, &kernels](int64_t part) {
    const int64_t begin = part * kPart, end = std::min(rows, begin + kPart);
    const float* factors = left + begin * rank;  // of this part's rows
    std::unique_ptr<float[]> own;
    if (left_transposed) {
      own.reset(new float[(end - begin) * rank]);
      for (int64_t k = 0; k < rank; ++k) {
        for (int64_t row = begin; row < end; ++row) own[(row - begin) * rank + k] = left[k * rows + row];
      }
      factors = own.get();
    }
    for (int64_t row = begin; row < end; row += lorac::kRows) {
      const int64_t count = std::min<int64_t>(lorac::kRows, end - row);
      const lorac::Block block = {factors + (row - begin) * rank, rank, right, rank, columns, count, 0, columns,
                                  out + row * columns, columns};
      kernels.up(block, false, {weight + row * columns, columns, nullptr, nullptr, nullptr, true});
    }
  });
}
