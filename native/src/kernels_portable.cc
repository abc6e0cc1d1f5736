#include <cstring>

#include "kernels_impl.h"

namespace lorac {
namespace {

struct Portable {
  static constexpr int kWidth = 4, kStrip = 2;
  struct Type {
    float lane[kWidth];
  };

  static inline float Widen(float value) { return value; }
  static inline float Widen(Half value) {
    // A half's exponent and mantissa, moved into place, are a float that is 2^112 times smaller, subnormals included.
    constexpr uint32_t kScale = (254u - 15u) << 23, kInfinity = 255u << 23;
    const uint32_t sign = (value & 0x8000u) << 16, magnitude = (value & 0x7fffu) << 13;
    float scaled = FromBits(magnitude) * FromBits(kScale);
    if ((value & 0x7c00u) == 0x7c00u) scaled = FromBits(magnitude | kInfinity);
    return sign ? -scaled : scaled;
  }
  static inline float FromBits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  template <typename T>
  static inline Type LoadPart(const T* data, int lanes) {
    Type value = {};
    for (int i = 0; i < lanes; ++i) value.lane[i] = Widen(data[i]);
    return value;
  }
  template <typename T>
  static inline Type Load(const T* data) {
    return LoadPart(data, kWidth);
  }
  static inline Type Zero() { return {}; }
  static inline Type Set(float value) { return {{value, value, value, value}}; }
  static inline void StorePart(float* data, int lanes, Type value) {
    for (int i = 0; i < lanes; ++i) data[i] = value.lane[i];
  }
  static inline void Store(float* data, Type value) { StorePart(data, kWidth, value); }
  static inline Type Add(Type a, Type b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static inline Type Multiply(Type a, Type b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static inline Type MultiplyAdd(Type a, Type b, Type c) { return Add(Multiply(a, b), c); }
};

}  // namespace

const Kernels kPortable = {"portable", Down<Portable>, Up<Portable>};

}  // namespace lorac
