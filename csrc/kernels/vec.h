// Sixteen float32 lanes, on the instruction set that the including file is compiled for.
//
// Every operation is the IEEE one that is written, so base, AVX2 and AVX-512 return the same bits.
// exp2(y) = 2^n · p(f), n = round(y), f = y − n, p of degree 6 with p(0) = 1: 0.8 ulp on [−127, 0],
// and exactly 0 at and below −127. −inf and NaN give 0. Two forms: fused multiply-adds for the row
// statistics and gradients, separate ones for the exact masses that other devices repeat bit by
// bit.
#pragma once

#include <cmath>
#include <cstddef>
#include <iterator>

#include "lanes.h"
#include "row.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyrlk {
namespace {  // one copy an instruction set: internal linkage keeps the linker from mixing them

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // a > b ? a : b
inline Vec scale_by_exponent(Vec p, Vec t) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}
inline Mask everything() { return {0xffff}; }
inline Mask and_ordered(Mask m, Vec a, Vec b) {
  return {_mm512_mask_cmp_ps_mask(m.m, a.v, b.v, _CMP_ORD_Q)};
}
inline uint32_t bits(Mask a) { return a.m; }
inline Mask at_least(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }

#elif defined(__AVX2__)

struct Vec {
  __m256 lo, hi;
};
struct Mask {
  __m256 lo, hi;
};
inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline Vec load(const BFloat16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
inline Vec load(const Half* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store(Half* p, Vec a) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline __m256 scale_by_exponent(__m256 p, __m256 t) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
inline Vec scale_by_exponent(Vec p, Vec t) {
  return {scale_by_exponent(p.lo, t.lo), scale_by_exponent(p.hi, t.hi)};
}
inline Mask everything() {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {all, all};
}
inline Mask and_ordered(Mask m, Vec a, Vec b) {
  return {_mm256_and_ps(m.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_ORD_Q)),
          _mm256_and_ps(m.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_ORD_Q))};
}
inline uint32_t bits(Mask a) {
  return uint32_t(_mm256_movemask_ps(a.lo)) | uint32_t(_mm256_movemask_ps(a.hi)) << 8;
}
inline Mask at_least(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
}

#else

struct Vec {
  float x[16];
};
struct Mask {
  uint32_t x[16];
};
template <class F>
inline Vec lanes(F f) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.x[i] = f(i);
  return r;
}
inline Vec splat(float x) {
  return lanes([&](int) { return x; });
}
template <class T>
inline Vec load(const T* p) {
  return lanes([&](int i) { return to_float(p[i]); });
}
template <class T>
inline void store(T* p, const Vec& a) {
  for (int i = 0; i < 16; ++i) from_float(a.x[i], p + i);
}
inline Vec operator+(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.x[i] + b.x[i]; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.x[i] - b.x[i]; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.x[i] * b.x[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return lanes([&](int i) { return std::fma(a.x[i], b.x[i], c.x[i]); });
}
inline Vec max(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
inline Vec scale_by_exponent(const Vec& p, const Vec& t) {
  return lanes([&](int i) { return float_of(bits_of(p.x[i]) + (bits_of(t.x[i]) << 23)); });
}
template <class F>
inline Mask test(F f) {
  Mask r;
  for (int i = 0; i < 16; ++i) r.x[i] = f(i) ? 1u : 0u;
  return r;
}
inline Mask everything() {
  return test([](int) { return true; });
}
inline Mask and_ordered(const Mask& m, const Vec& a, const Vec& b) {
  return test([&](int i) { return m.x[i] != 0 && a.x[i] == a.x[i] && b.x[i] == b.x[i]; });
}
inline uint32_t bits(const Mask& a) {
  uint32_t r = 0;
  for (int i = 0; i < 16; ++i) r |= a.x[i] << i;
  return r;
}
inline Mask at_least(const Vec& a, const Vec& b) {
  return test([&](int i) { return a.x[i] >= b.x[i]; });
}

#endif

constexpr int kVecs = kLanes / kWidth;

// 64 neighbours in four vectors. bfloat16 comes apart into even and odd elements (a shift and a
// mask, no shuffle); sums over a lane do not notice, and in_order() undoes it.
struct Group {
  Vec v[kVecs];
};

template <class T>
inline Group load_group(const T* p) {
  return {{load(p), load(p + kWidth), load(p + 2 * kWidth), load(p + 3 * kWidth)}};
}
// kStream: past the cache where the type can, to an address on a 64-byte line; stream_end() before
// another thread may read it.
template <bool kStream, class T>
inline void store_group(T* p, const Group& g) {
  for (int k = 0; k < kVecs; ++k) store(p + k * kWidth, g.v[k]);
}
template <class T>
inline void in_order(const Group& g, const T*, float* x) {
  for (int k = 0; k < kVecs; ++k) store(x + k * kWidth, g.v[k]);
}

#if defined(__AVX512F__)

template <bool kStream>
inline void store_line(void* p, __m512i x) {
  kStream ? _mm512_stream_si512(static_cast<__m512i*>(p), x) : _mm512_storeu_si512(p, x);
}
inline void stream_end() { _mm_sfence(); }
template <bool kStream>
inline void store_group(float* p, const Group& g) {
  for (int k = 0; k < kVecs; ++k) {
    store_line<kStream>(p + k * kWidth, _mm512_castps_si512(g.v[k].v));
  }
}
inline Group load_group(const BFloat16* p) {
  Group g;
  for (int k = 0; k < kVecs; k += 2) {
    const __m512i both = _mm512_loadu_si512(p + k * kWidth);
    g.v[k] = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    g.v[k + 1] = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))};
  }
  return g;
}
inline __m512i rounded_bf16(Vec a) {  // in the upper halves; ties to even
  const __m512i u = _mm512_castps_si512(a.v), r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  return _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
}
template <bool kStream>
inline void store_group(BFloat16* p, const Group& g) {
  for (int k = 0; k < kVecs; k += 2) {
    const __m512i even = _mm512_srli_epi32(rounded_bf16(g.v[k]), 16);
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded_bf16(g.v[k + 1]));
    store_line<kStream>(p + k * kWidth, both);
  }
}
inline void in_order(const Group& g, const BFloat16*, float* x) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int k = 0; k < kVecs; k += 2) {
    store(x + k * kWidth, {_mm512_permutex2var_ps(g.v[k].v, low, g.v[k + 1].v)});
    store(x + (k + 1) * kWidth, {_mm512_permutex2var_ps(g.v[k].v, high, g.v[k + 1].v)});
  }
}

#elif defined(__AVX2__)

template <bool kStream>
inline void store_line(void* p, __m256i x) {
  __m256i* q = static_cast<__m256i*>(p);
  kStream ? _mm256_stream_si256(q, x) : _mm256_storeu_si256(q, x);
}
inline void stream_end() { _mm_sfence(); }
template <bool kStream>
inline void store_group(float* p, const Group& g) {
  for (int k = 0; k < kVecs; ++k) {
    store_line<kStream>(p + k * kWidth, _mm256_castps_si256(g.v[k].lo));
    store_line<kStream>(p + k * kWidth + 8, _mm256_castps_si256(g.v[k].hi));
  }
}
inline Group load_group(const BFloat16* p) {
  Group g;
  for (int k = 0; k < kVecs; ++k) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + k * kWidth));
    g.v[k].lo = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    g.v[k].hi = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
  }
  return g;
}
inline __m256i rounded_bf16(__m256 a) {  // in the upper halves; ties to even
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
template <bool kStream>
inline void store_group(BFloat16* p, const Group& g) {
  for (int k = 0; k < kVecs; ++k) {
    const __m256i even = _mm256_srli_epi32(rounded_bf16(g.v[k].lo), 16);
    const __m256i both = _mm256_blend_epi16(even, rounded_bf16(g.v[k].hi), 0xaa);
    store_line<kStream>(p + k * kWidth, both);
  }
}
inline void in_order(const Group& g, const BFloat16*, float* x) {
  for (int k = 0; k < kVecs; ++k) {
    const __m256 a = _mm256_unpacklo_ps(g.v[k].lo, g.v[k].hi);  // 0 … 3, 8 … 11
    const __m256 b = _mm256_unpackhi_ps(g.v[k].lo, g.v[k].hi);  // 4 … 7, 12 … 15
    _mm256_storeu_ps(x + k * kWidth, _mm256_permute2f128_ps(a, b, 0x20));
    _mm256_storeu_ps(x + k * kWidth + 8, _mm256_permute2f128_ps(a, b, 0x31));
  }
}

#else

inline void stream_end() {}

#endif

// y clipped below at −127, where exp2 is exactly 0; NaN (−inf − −inf) becomes −127 as well.
inline Vec exponent(Vec z, Vec m, Vec c) { return max((z - m) * c, splat(-127.0f)); }

// How 2^f is computed on [−1/2, 1/2]; the relative error of each in brackets.
struct Separate {  // degree 6, separate multiplies and adds [5e-8]
  static Vec step(Vec p, Vec f, Vec a) { return p * f + a; }
  static constexpr float kCoefficients[] = {0.00015196693129837513f, 0.0013391304528340697f,
                                            0.009619002230465412f,   0.055503588169813156f,
                                            0.24022643268108368f,    0.6931471824645996f};
};
struct Fused : Separate {  // the same, fused [5e-8]
  static Vec step(Vec p, Vec f, Vec a) { return fma(p, f, a); }
};
struct Rough {  // degree 4, fused, for results that are rounded to 8 bits [3e-6]
  static Vec step(Vec p, Vec f, Vec a) { return fma(p, f, a); }
  static constexpr float kCoefficients[] = {0.009585382416844368f, 0.05590662732720375f,
                                            0.24024038016796112f, 0.6931241750717163f};
};

template <class Form>
inline Vec exp2(Vec y) {
  const Vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const Vec t = y + magic;
  const Vec f = y - (t - magic);
  Vec p = splat(Form::kCoefficients[0]);
  for (std::size_t k = 1; k < std::size(Form::kCoefficients); ++k) {
    p = Form::step(p, f, splat(Form::kCoefficients[k]));
  }
  p = Form::step(p, f, splat(1.0f));
  return scale_by_exponent(p, t);  // the low bits of t hold n
}

}  // namespace
}  // namespace pyrlk
