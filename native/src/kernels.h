// The loops over one block of rows, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace lorac {

constexpr int kRows = 4;  // the rows of a block

// A part of a product of `rows` rows (1 to kRows): columns [begin, end) of the second factor.
struct Block {
  const float* x;    // (rows, depth), the first factor
  int64_t x_stride;  // between its rows
  const void* matrix;  // (depth, width), the second factor
  int64_t depth;
  int64_t width;
  int64_t rows;
  int64_t begin;
  int64_t end;
  float* y;  // (rows, width)
  int64_t y_stride;
};

// What is done to a product before it is stored: y = r + (c * base + h * product).
struct Finish {
  const float* base;  // (rows, width)
  int64_t base_stride;
  const float* h;  // (width), or null
  const float* c;  // (width), or null
  const float* r;  // (rows, width), or null
  bool far;        // base and y are not in a cache: lines of the next rows are asked for early
};

struct Kernels {
  const char* name;
  // y += x matrix, or y = x matrix where `add` is false.
  void (*down)(const Block&, bool half, bool add);
  void (*up)(const Block&, bool half, const Finish&);
};

// Those of an instruction set; each is in a file of its own, which exists where the architecture has it.
extern const Kernels kPortable, kAvx2, kAvx512, kNeon;

// The best that this processor runs, or what the environment variable LORAC_NATIVE_KERNELS names, if it runs here.
const Kernels& ChooseKernels();

}  // namespace lorac
