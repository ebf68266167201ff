// Included by lines_<isa>.cpp alone, once each; everything is local to the object file, so that the
// linker never takes an AVX-512 copy for the base one.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "memory/lines.h"

namespace pyrlk {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#elif defined(__AVX2__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
constexpr int kLine = 64;
constexpr int kParts = kLine / kWidth;
constexpr int kLanes = kWidth / 8;
// The processor's own prefetch stops at the end of a page; asking one page ahead gave 1.3 times the
// copy and 1.4 times the sum of 512 MiB (Sapphire Rapids). An address past the end is ignored.
constexpr std::size_t kAhead = 4096;

typedef std::uint64_t Vec __attribute__((vector_size(kWidth), may_alias));

inline Vec load(const char* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <bool STREAM>
inline void store(char* p, Vec v) {
#if defined(__x86_64__)
  if (STREAM) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
    return;
  }
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

// A lane keeps A = Σ w_t and B = Σ_t (n − t)·w_t over n lines by additions alone:  A += w, B += A.
// With i = first + 16t + l this gives  Σ w(2i+1) = (2·first + 2l + 1)·A + 32·(n·A − B).
struct Sums {
  Vec a_even[kParts] = {}, b_even[kParts] = {}, a_odd[kParts] = {}, b_odd[kParts] = {};

  inline __attribute__((always_inline)) void add(int part, Vec v) {
    a_even[part] += v & 0xffffffffu;
    b_even[part] += a_even[part];
    a_odd[part] += v >> 32;
    b_odd[part] += a_odd[part];
  }

  std::uint64_t total(std::uint64_t n, std::uint64_t first) const {
    std::uint64_t sum = 0;
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const std::uint64_t word = first + 2 * (part * kLanes + lane);
        sum += (2 * word + 1 + 32 * n) * a_even[part][lane] - 32 * b_even[part][lane];
        sum += (2 * word + 3 + 32 * n) * a_odd[part][lane] - 32 * b_odd[part][lane];
      }
    }
    return sum;
  }
};

template <bool SUM, bool COPY, bool STREAM>
std::uint64_t run(char* dst, const char* src, std::size_t bytes, std::uint64_t first,
                  const char* next) {
  const std::size_t lines = bytes / kLine;
  const std::size_t tail = bytes % kLine;
  Sums sums;
  const auto line = [&](std::size_t t, const char* ahead) {
    __builtin_prefetch(ahead);
    for (int part = 0; part < kParts; ++part) {
      const Vec v = load(src + t * kLine + part * kWidth);
      if (SUM) sums.add(part, v);
      if (COPY) store<STREAM>(dst + t * kLine + part * kWidth, v);
    }
  };
  const std::size_t last = lines - std::min(lines, kAhead / kLine);
  for (std::size_t t = 0; t < last; ++t) line(t, src + t * kLine + kAhead);
  // Many tensors are a few pages: the end of one fetches the beginning of the next.
  for (std::size_t t = last; t < lines; ++t) line(t, next + (t - last) * kLine);
  if (tail != 0) {
    char rest[kLine] = {};
    __builtin_memcpy(rest, src + lines * kLine, tail);
    for (int part = 0; SUM && part < kParts; ++part) sums.add(part, load(rest + part * kWidth));
    if (COPY) __builtin_memcpy(dst + lines * kLine, rest, tail);
  }
#if defined(__x86_64__)
  if (STREAM) _mm_sfence();
#endif
  return SUM ? sums.total(lines + (tail != 0), first) : 0;
}

std::uint64_t sum(const char* src, std::size_t bytes, std::uint64_t first, const char* next) {
  return run<true, false, false>(nullptr, src, bytes, first, next);
}

constexpr LineOps kOps{sum, run<true, true, false>, run<true, true, true>, run<false, true, true>};

}  // namespace
}  // namespace pyrlk
