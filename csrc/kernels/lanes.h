// Some of sixteen lanes, as bits: which keys lie in a range, and moves of the chosen ones to the
// front. A move may write sixteen entries, whatever it returns; within one array it is safe towards
// the front.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyrlk {
namespace {  // one copy an instruction set, as in vec.h

constexpr int kWidth = 16;

// Lanes whose key is in [low, low + width].
inline uint32_t in_range(const uint32_t* keys, uint32_t low, uint32_t width) {
#if defined(__AVX512F__)
  const __m512i above = _mm512_sub_epi32(_mm512_loadu_si512(keys), _mm512_set1_epi32(int(low)));
  return _mm512_cmple_epu32_mask(above, _mm512_set1_epi32(int(width)));
#elif defined(__AVX2__)
  uint32_t lanes = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys) + half);
    const __m256i above = _mm256_sub_epi32(k, _mm256_set1_epi32(int(low)));
    const __m256i inside =
        _mm256_cmpeq_epi32(_mm256_min_epu32(above, _mm256_set1_epi32(int(width))), above);
    lanes |= uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(inside))) << 8 * half;
  }
  return lanes;
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kWidth; ++i) lanes |= uint32_t(keys[i] - low <= width) << i;
  return lanes;
#endif
}

// first + lane for each of the lanes, ascending; returns how many.
inline int place_lanes(uint32_t lanes, int32_t first, int32_t* out) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i id = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(lanes), id));
  return __builtin_popcount(lanes);
#else
  int count = 0;
  for (; lanes != 0; lanes &= lanes - 1) out[count++] = first + int32_t(__builtin_ctz(lanes));
  return count;
#endif
}

// in[lane] for each of the lanes, ascending; returns how many.
template <class T>
inline int move_lanes(uint32_t lanes, const T* in, T* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i x = _mm512_loadu_si512(in);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(lanes), x));
  } else {
    const __m512i low = _mm512_loadu_si512(in), high = _mm512_loadu_si512(in + 8);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(__mmask8(lanes), low));
    _mm512_storeu_si512(out + __builtin_popcount(lanes & 0xff),
                        _mm512_maskz_compress_epi64(__mmask8(lanes >> 8), high));
  }
  return __builtin_popcount(lanes);
#else
  int count = 0;
  for (; lanes != 0; lanes &= lanes - 1) out[count++] = in[__builtin_ctz(lanes)];
  return count;
#endif
}

}  // namespace
}  // namespace pyrlk
