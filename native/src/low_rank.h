// y_i = r_i + (c_i * base_i + h_i * (((x A_i) * g_i) B_i)), for the layers i that read one x.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lorac {

// One of the layers whose products lie side by side in `base`.
//
// A (places, K, R) and B (places, R, N) are row-major. A layer without an adapter has rank 0.
struct Layer {
  const void* a = nullptr;
  const void* b = nullptr;
  const float* g = nullptr;  // (places, R), or null
  const float* h = nullptr;  // (places, N), or null
  const float* c = nullptr;  // (places, N), or null
  const float* r = nullptr;  // (rows, N), or null
  float* y = nullptr;        // (rows, N)
  int64_t stride = 0;        // between the rows of y; 0: N
  int64_t rank = 0;
  int64_t width = 0;  // N
};

// Rows are cut into as many segments as there are places, and segment d reads place d.
struct Update {
  const float* x = nullptr;     // (rows, K)
  const float* base = nullptr;  // (rows, sum of N)
  int64_t rows = 0;
  int64_t features = 0;  // K
  int64_t places = 1;
  std::vector<int64_t> segments;  // the rows of each place; empty where all have as many
  bool half = false;  // whether A and B are float16
  std::vector<Layer> layers;
};

// Calls function(data, i) for every i below total, on whatever threads.
class Parallel {
 public:
  virtual void For(size_t total, void (*function)(void*, size_t), void* data) const = 0;

 protected:
  ~Parallel() = default;
};

// Results do not depend on how Parallel divides the work. The y of all layers, side by side, may be where base is.
void Compute(const Update& update, const Parallel& parallel);

}  // namespace lorac
