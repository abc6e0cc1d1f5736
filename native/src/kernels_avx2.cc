#include <immintrin.h>

#include "kernels_impl.h"

namespace lorac {
namespace {

struct Avx2 {
  using Type = __m256;
  static constexpr int kWidth = 8, kStrip = 2;

  static inline __m256i Mask(int lanes) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline Type Zero() { return _mm256_setzero_ps(); }
  static inline Type Set(float value) { return _mm256_set1_ps(value); }
  static inline Type Load(const float* data) { return _mm256_loadu_ps(data); }
  static inline Type Load(const Half* data) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
  }
  static inline Type LoadPart(const float* data, int lanes) { return _mm256_maskload_ps(data, Mask(lanes)); }
  static inline Type LoadPart(const Half* data, int lanes) {
    alignas(16) Half part[kWidth] = {};
    for (int i = 0; i < lanes; ++i) part[i] = data[i];
    return Load(part);
  }
  static inline void Store(float* data, Type value) { _mm256_storeu_ps(data, value); }
  static inline void StorePart(float* data, int lanes, Type value) {
    _mm256_maskstore_ps(data, Mask(lanes), value);
  }
  static inline Type Add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static inline Type Multiply(Type a, Type b) { return _mm256_mul_ps(a, b); }
  static inline Type MultiplyAdd(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const Kernels kAvx2 = {"avx2", Down<Avx2>, Up<Avx2>};

}  // namespace lorac
