#include <immintrin.h>

#include "kernels_impl.h"

namespace lorac {
namespace {

struct Avx512 {
  using Type = __m512;
  static constexpr int kWidth = 16, kStrip = 4;

  static inline __mmask16 Mask(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }
  static inline Type Zero() { return _mm512_setzero_ps(); }
  static inline Type Set(float value) { return _mm512_set1_ps(value); }
  static inline Type Load(const float* data) { return _mm512_loadu_ps(data); }
  static inline Type Load(const Half* data) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  }
  static inline Type LoadPart(const float* data, int lanes) { return _mm512_maskz_loadu_ps(Mask(lanes), data); }
  static inline Type LoadPart(const Half* data, int lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Mask(lanes), data));
  }
  static inline void Store(float* data, Type value) { _mm512_storeu_ps(data, value); }
  static inline void StorePart(float* data, int lanes, Type value) {
    _mm512_mask_storeu_ps(data, Mask(lanes), value);
  }
  static inline Type Add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static inline Type Multiply(Type a, Type b) { return _mm512_mul_ps(a, b); }
  static inline Type MultiplyAdd(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const Kernels kAvx512 = {"avx512", Down<Avx512>, Up<Avx512>};

}  // namespace lorac
