// Writes into weights, for swaps of adapters in place. Nothing here needs ONNX Runtime.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

// Calls function(begin, end) for equal parts of [0, count), each of at least `least`, on threads of their own.
template <typename Function>
void RunParts(int64_t count, int64_t least, int64_t threads, const Function& function) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count / least));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < parts; ++i) others.emplace_back(function, count * i / parts, count * (i + 1) / parts);
  function(0, count / parts);
  for (std::thread& other : others) other.join();
}

// Each store waits for its line of memory; asking for lines early keeps many of them on their way.
template <typename T>
void Scatter(void* into, const int64_t* positions, const void* from, int64_t count, int64_t threads) {
  constexpr int64_t kAhead = 32, kLeast = 8192;
  T* memory = static_cast<T*>(into);
  const T* values = static_cast<const T*>(from);
  RunParts(count, kLeast, threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      __builtin_prefetch(memory + positions[std::min(i + kAhead, end - 1)], 1);
      memory[positions[i]] = values[i];
    }
  });
}

}  // namespace

#define LORAC_EXPORT extern "C" __attribute__((visibility("default")))

// memory[positions[i]] = values[i] for `count` items of `item_bytes` (1, 2, 4 or 8). Positions differ.
LORAC_EXPORT void LoracNativeScatter(
    void* memory, const int64_t* positions, const void* values, int64_t count, int64_t item_bytes, int64_t threads) {
  if (item_bytes == 1) Scatter<uint8_t>(memory, positions, values, count, threads);
  if (item_bytes == 2) Scatter<uint16_t>(memory, positions, values, count, threads);
  if (item_bytes == 4) Scatter<uint32_t>(memory, positions, values, count, threads);
  if (item_bytes == 8) Scatter<uint64_t>(memory, positions, values, count, threads);
}

// out = weight + left right, for (rows, columns), (rows, rank) and (rank, columns). Blocks of rows never depend on the
// number of threads, and so neither does the order of sums.
LORAC_EXPORT void LoracNativeAddProduct(
    const float* weight, const float* left, const float* right, float* out, int64_t rows, int64_t rank, int64_t columns,
    int64_t threads) {
  constexpr int64_t kLeast = 16;
  const lorac::Kernels& kernels = lorac::ChooseKernels();
  RunParts((rows + lorac::kRows - 1) / lorac::kRows, kLeast, threads, [=, &kernels](int64_t begin, int64_t end) {
    for (int64_t row = begin * lorac::kRows; row < std::min(rows, end * lorac::kRows); row += lorac::kRows) {
      const int64_t count = std::min<int64_t>(lorac::kRows, rows - row);
      const lorac::Block block = {left + row * rank, rank, right, rank, columns, count, 0, columns, out + row * columns,
                                  columns};
      kernels.up(block, false, {weight + row * columns, columns, nullptr, nullptr, true});
    }
  });
}
