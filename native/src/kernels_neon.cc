#include <arm_neon.h>

#include "kernels_impl.h"

namespace lorac {
namespace {

struct Neon {
  using Type = float32x4_t;
  static constexpr int kWidth = 4, kStrip = 4;

  template <typename T>
  static inline Type Pad(const T* data, int lanes) {
    T part[kWidth] = {};
    for (int i = 0; i < lanes; ++i) part[i] = data[i];
    return Load(part);
  }
  static inline Type Zero() { return vdupq_n_f32(0); }
  static inline Type Set(float value) { return vdupq_n_f32(value); }
  static inline Type Load(const float* data) { return vld1q_f32(data); }
  static inline Type Load(const Half* data) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(data))); }
  static inline Type LoadPart(const float* data, int lanes) { return Pad(data, lanes); }
  static inline Type LoadPart(const Half* data, int lanes) { return Pad(data, lanes); }
  static inline void Store(float* data, Type value) { vst1q_f32(data, value); }
  static inline void StorePart(float* data, int lanes, Type value) {
    float part[kWidth];
    vst1q_f32(part, value);
    for (int i = 0; i < lanes; ++i) data[i] = part[i];
  }
  static inline Type Add(Type a, Type b) { return vaddq_f32(a, b); }
  static inline Type Multiply(Type a, Type b) { return vmulq_f32(a, b); }
  static inline Type MultiplyAdd(Type a, Type b, Type c) { return vfmaq_f32(c, a, b); }
};

}  // namespace

const Kernels kNeon = {"neon", Down<Neon>, Up<Neon>};

}  // namespace lorac
