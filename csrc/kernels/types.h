// Element types of logits, and their exact conversions to and from float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyrlk {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

inline int64_t item_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest << 13 & 0x7fffff));
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + 0x38000000));
  return float_of(sign | bits_of(float(rest) * 5.9604644775390625e-8f));  // subnormal: rest · 2^-24
}

// Round to nearest even; NaN stays NaN.
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  const uint32_t u = bits_of(x);
  out->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, Half* out) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (rest >= 0x477ff000) {  // rounds to 65536 or more
    out->bits = uint16_t(sign | 0x7c00);
  } else if (rest >= 0x38800000) {
    out->bits = uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
  } else {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
    out->bits = uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  }
}

}  // namespace pyrlk
