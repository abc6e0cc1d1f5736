// The kernels as templates over a vector of floats V, for the files kernels_*.cc, each built for an instruction set.
//
// Everything is in an unnamed namespace, and no other header has code here: a function that several files share would be
// linked once, and might be the one of an instruction set that the processor lacks.
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#define LORAC_UNROLL _Pragma("unroll")
#else
#define LORAC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lorac {
namespace {

using Half = uint16_t;

// Sums of products for a block of R rows and C vectors of columns.
template <typename V, int R, int C>
struct Sums {
  typename V::Type at[R][C];

  inline void Clear() {
    LORAC_UNROLL
    for (int r = 0; r < R; ++r) {
      LORAC_UNROLL
      for (int c = 0; c < C; ++c) at[r][c] = V::Zero();
    }
  }
  template <typename T>
  inline void Add(const float* x, int64_t x_stride, const T* matrix, int lanes) {
    typename V::Type m[C];
    LORAC_UNROLL
    for (int c = 0; c < C; ++c) {
      // One row is computed as fast as the matrix is read: ask early for the columns behind these, or, where there are
      // few, for rows below.
      constexpr int64_t kAhead = C > 1 ? C * V::kWidth * sizeof(T) : 1536;
      if constexpr (R == 1) __builtin_prefetch(reinterpret_cast<const char*>(matrix + c * V::kWidth) + kAhead);
      m[c] = lanes ? V::LoadPart(matrix, lanes) : V::Load(matrix + c * V::kWidth);
    }
    LORAC_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename V::Type factor = V::Set(x[r * x_stride]);
      LORAC_UNROLL
      for (int c = 0; c < C; ++c) at[r][c] = V::MultiplyAdd(factor, m[c], at[r][c]);
    }
  }
  inline void Add(const Sums& other) {
    LORAC_UNROLL
    for (int r = 0; r < R; ++r) {
      LORAC_UNROLL
      for (int c = 0; c < C; ++c) at[r][c] = V::Add(at[r][c], other.at[r][c]);
    }
  }
};

// The product of R rows with C vectors of columns from `column` on; with S independent sums, which hide the latency of
// each addition. `lanes` is 0, or the number of columns that are left for a vector, if they do not fill it.
template <typename V, typename T, int R, int C, int S>
inline void Multiply(const Block& block, const float* x, int64_t column, int lanes, Sums<V, R, C>& result) {
  const T* matrix = static_cast<const T*>(block.matrix) + column;
  Sums<V, R, C> sums[S];
  LORAC_UNROLL
  for (int s = 0; s < S; ++s) sums[s].Clear();
  int64_t k = 0;
  for (; k + S <= block.depth; k += S) {
    LORAC_UNROLL
    for (int s = 0; s < S; ++s) sums[s].Add(x + k + s, block.x_stride, matrix + (k + s) * block.width, lanes);
  }
  for (; k < block.depth; ++k) sums[0].Add(x + k, block.x_stride, matrix + k * block.width, lanes);
  LORAC_UNROLL
  for (int s = S / 2; s > 0; s /= 2) {
    LORAC_UNROLL
    for (int i = 0; i < s; ++i) sums[i].Add(sums[i + s]);
  }
  result = sums[0];
}

template <typename V>
inline typename V::Type Load(const float* data, int lanes) {
  return lanes ? V::LoadPart(data, lanes) : V::Load(data);
}

template <typename V>
inline void Store(float* data, int lanes, typename V::Type value) {
  if (lanes) {
    V::StorePart(data, lanes, value);
  } else {
    V::Store(data, value);
  }
}

// Computes one strip of columns for R rows from `row` on, and gives each vector to `store`.
template <typename V, typename T, int R, int C, int S, typename Sink>
inline void Strip(const Block& block, int64_t row, int64_t column, int lanes, const Sink& store) {
  Sums<V, R, C> sums;
  Multiply<V, T, R, C, S>(block, block.x + row * block.x_stride, column, lanes, sums);
  LORAC_UNROLL
  for (int r = 0; r < R; ++r) {
    LORAC_UNROLL
    for (int c = 0; c < C; ++c) store(row + r, column + c * V::kWidth, lanes, sums.at[r][c]);
  }
}

// All columns of R rows: as wide strips as the registers hold, then single vectors, then a part of one.
template <typename V, typename T, int R, typename Sink>
inline void Columns(const Block& block, int64_t row, const Sink& store) {
  constexpr int kWide = R == 1 ? 8 : V::kStrip;
  constexpr int64_t width = V::kWidth;
  int64_t column = block.begin;
  for (; column + kWide * width <= block.end; column += kWide * width) {
    Strip<V, T, R, kWide, 1>(block, row, column, 0, store);
  }
  for (; column + width <= block.end; column += width) {
    Strip<V, T, R, 1, R == 1 ? 8 : 2>(block, row, column, 0, store);
  }
  if (column < block.end) {
    Strip<V, T, R, 1, R == 1 ? 8 : 2>(block, row, column, static_cast<int>(block.end - column), store);
  }
}

template <typename V, typename T, typename Sink>
inline void Rows(const Block& block, const Sink& store) {
  if (block.rows == kRows) {
    Columns<V, T, kRows>(block, 0, store);
    return;
  }
  for (int64_t row = 0; row < block.rows; ++row) Columns<V, T, 1>(block, row, store);
}

template <typename V, typename Sink>
inline void Product(const Block& block, bool half, const Sink& store) {
  if (half) {
    Rows<V, Half>(block, store);
  } else {
    Rows<V, float>(block, store);
  }
}

template <typename V>
void Down(const Block& block, bool half, bool add) {
  Product<V>(block, half, [&](int64_t row, int64_t column, int lanes, typename V::Type sum) {
    float* y = block.y + row * block.y_stride + column;
    Store<V>(y, lanes, add ? V::Add(Load<V>(y, lanes), sum) : sum);
  });
}

template <typename V>
void Up(const Block& block, bool half, const Finish& finish) {
  Product<V>(block, half, [&](int64_t row, int64_t column, int lanes, typename V::Type sum) {
    if (finish.far) {
      __builtin_prefetch(finish.base + (row + kRows) * finish.base_stride + column, 0);
      __builtin_prefetch(block.y + (row + kRows) * block.y_stride + column, 1);
    }
    typename V::Type base = Load<V>(finish.base + row * finish.base_stride + column, lanes);
    if (finish.c != nullptr) base = V::Multiply(base, Load<V>(finish.c + column, lanes));
    if (finish.h != nullptr) sum = V::Multiply(sum, Load<V>(finish.h + column, lanes));
    sum = V::Add(base, sum);
    if (finish.r != nullptr) sum = V::Add(Load<V>(finish.r + row * block.width + column, lanes), sum);
    Store<V>(block.y + row * block.y_stride + column, lanes, sum);
  });
}

}  // namespace
}  // namespace lorac
