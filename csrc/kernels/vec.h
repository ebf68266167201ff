// Sixteen float32 lanes, on the instruction set that the including file is compiled for.
//
// Every operation is the IEEE one that is written, so base, AVX2 and AVX-512 return the same bits.
// exp2(y) = 2^n · p(f), n = round(y), f = y − n, p of degree 6 with p(0) = 1: 0.8 ulp on [−127, 0],
// and exactly 0 at and below −127. −inf and NaN give 0.
#pragma once

#include "types.h"

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
inline void store(BFloat16* p, Vec a) {
  const __m512i u = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // a > b ? a : b
inline Vec scale_by_exponent(Vec p, Vec t) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}
inline Mask nothing() { return {0}; }
inline Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask operator|(Mask a, Mask b) { return {__mmask16(a.m | b.m)}; }
inline uint32_t bits(Mask a) { return a.m; }
inline Mask at_least(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
// Writes first + lane for every lane of the mask, ascending; returns how many. May write 16
// entries.
inline int store_lanes(int32_t* out, Mask a, int32_t first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i id = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(a.m, id));
  return __builtin_popcount(a.m);
}

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
inline __m256i round_bf16(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_srli_epi32(r, 16);
}
inline void store(BFloat16* p, Vec a) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(a.lo), round_bf16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
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
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline __m256 scale_by_exponent(__m256 p, __m256 t) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
inline Vec scale_by_exponent(Vec p, Vec t) {
  return {scale_by_exponent(p.lo, t.lo), scale_by_exponent(p.hi, t.hi)};
}
inline Mask nothing() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Mask is_nan(Vec a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline Mask operator|(Mask a, Mask b) {
  return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)};
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
inline Mask nothing() {
  return test([](int) { return false; });
}
inline Mask is_nan(const Vec& a) {
  return test([&](int i) { return a.x[i] != a.x[i]; });
}
inline Mask operator|(const Mask& a, const Mask& b) {
  return test([&](int i) { return a.x[i] | b.x[i]; });
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

#if !defined(__AVX512F__)
// Writes first + lane for every lane of the mask, ascending; returns how many.
inline int store_lanes(int32_t* out, const Mask& a, int32_t first) {
  int count = 0;
  for (uint32_t hit = bits(a); hit != 0; hit &= hit - 1) {
    out[count++] = first + int32_t(__builtin_ctz(hit));
  }
  return count;
}
#endif

// y clipped below at −127, where exp2 is exactly 0; NaN (−inf − −inf) becomes −127 as well.
inline Vec exponent(Vec z, Vec m, Vec c) { return max((z - m) * c, splat(-127.0f)); }

inline Vec exp2(Vec y) {
  const Vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const Vec t = y + magic;
  const Vec f = y - (t - magic);
  Vec p = splat(0.00015196693129837513f);
  p = p * f + splat(0.0013391304528340697f);
  p = p * f + splat(0.009619002230465412f);
  p = p * f + splat(0.055503588169813156f);
  p = p * f + splat(0.24022643268108368f);
  p = p * f + splat(0.6931471824645996f);
  p = p * f + splat(1.0f);
  return scale_by_exponent(p, t);  // the low bits of t hold n
}

}  // namespace
}  // namespace pyrlk
