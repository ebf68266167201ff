// The bodies behind RowKernels, compiled once an instruction set by row_{base,avx2,avx512}.cpp.
#pragma once

#include <algorithm>

#include "row.h"
#include "vec.h"

namespace pyrlk {
namespace {

constexpr int kWidth = 16;
constexpr int kVecs = kLanes / kWidth;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Calls body(offset, vectors) for every group of 64 elements of z[0, n); lanes past the end are
// −inf.
template <class T, class Body>
inline void for_groups(const T* z, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec v[kVecs];
    for (int k = 0; k < kVecs; ++k) v[k] = load(z + i + k * kWidth);
    body(i, v);
  }
  if (i < n) {
    float rest[kLanes];
    std::fill_n(rest, kLanes, kNegInf);
    for (int64_t j = i; j < n; ++j) rest[j - i] = to_float(z[j]);
    Vec v[kVecs];
    for (int k = 0; k < kVecs; ++k) v[k] = load(rest + k * kWidth);
    body(i, v);
  }
}

inline double sum_lanes(const Vec (&acc)[kVecs]) {
  float x[kLanes];
  for (int k = 0; k < kVecs; ++k) store(x + k * kWidth, acc[k]);
  double r[8] = {};
  for (int i = 0; i < kLanes; ++i) r[i & 7] += x[i];
  return ((r[0] + r[4]) + (r[2] + r[6])) + ((r[1] + r[5]) + (r[3] + r[7]));
}

inline float max_lanes(const Vec (&acc)[kVecs]) {
  float x[kWidth];
  store(x, max(max(acc[0], acc[1]), max(acc[2], acc[3])));
  return *std::max_element(x, x + kWidth);
}

template <class T, bool kEntropy>
RowStats tile_stats(const T* z, int64_t n, Vec c) {
  Vec top[kVecs];
  Mask bad = nothing();
  for (Vec& v : top) v = splat(kNegInf);
  for_groups(z, n, [&](int64_t, const Vec(&v)[kVecs]) {
    for (int k = 0; k < kVecs; ++k) {
      top[k] = max(v[k], top[k]);  // a NaN loses the comparison
      bad = bad | is_nan(v[k]);
    }
  });
  const float highest = max_lanes(top);
  RowStats s;
  s.max = highest;
  s.nan = bits(bad) != 0;
  const Vec m = splat(highest);
  Vec sum[kVecs], energy[kVecs];
  for (int k = 0; k < kVecs; ++k) sum[k] = energy[k] = splat(0.0f);
  for_groups(z, n, [&](int64_t, const Vec(&v)[kVecs]) {
    for (int k = 0; k < kVecs; ++k) {
      const Vec y = exponent(v[k], m, c);
      const Vec e = exp2(y);
      sum[k] = sum[k] + e;
      if (kEntropy) energy[k] = energy[k] + e * y;
    }
  });
  s.sum = sum_lanes(sum);
  if (kEntropy) s.energy = sum_lanes(energy);
  return s;
}

template <class T, bool kEntropy>
RowStats row_stats(const T* z, int64_t n, float c) {
  const Vec scale = splat(c);
  RowStats total;
  for (int64_t i = 0; i < n; i += kTile) {
    const RowStats tile = tile_stats<T, kEntropy>(z + i, std::min(kTile, n - i), scale);
    total = i == 0 ? tile : combine(total, tile, c);
  }
  return total;
}

template <class T>
RowStats stats(const void* z, int64_t n, float c, bool with_entropy) {
  const T* row = static_cast<const T*>(z);
  return with_entropy ? row_stats<T, true>(row, n, c) : row_stats<T, false>(row, n, c);
}

template <class T, bool kEntropy>
void gradient_row(const T* z, int64_t n, Vec c, Vec m, Vec k1, Vec k2, T* out) {
  for_groups(z, n, [&](int64_t i, const Vec(&v)[kVecs]) {
    Vec g[kVecs];
    for (int k = 0; k < kVecs; ++k) {
      const Vec y = exponent(v[k], m, c);
      const Vec e = exp2(y);
      g[k] = kEntropy ? e * (k1 + k2 * y) : e * k1;
    }
    if (i + kLanes <= n) {
      for (int k = 0; k < kVecs; ++k) store(out + i + k * kWidth, g[k]);
    } else {
      float rest[kLanes];
      for (int k = 0; k < kVecs; ++k) store(rest + k * kWidth, g[k]);
      for (int64_t j = i; j < n; ++j) from_float(rest[j - i], out + j);
    }
  });
}

template <class T>
void gradient(const void* z, int64_t n, float c, float m, float k1, float k2, void* out) {
  const T* row = static_cast<const T*>(z);
  T* target = static_cast<T*>(out);
  const Vec vc = splat(c), vm = splat(m), v1 = splat(k1), v2 = splat(k2);
  if (k2 != 0.0f) {
    gradient_row<T, true>(row, n, vc, vm, v1, v2, target);
  } else {
    gradient_row<T, false>(row, n, vc, vm, v1, v2, target);
  }
}

template <class T>
void widen_row(const void* z, int64_t n, float* out) {
  const T* row = static_cast<const T*>(z);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(row + i));
  for (; i < n; ++i) out[i] = to_float(row[i]);
}

void group_max(const float* z, int64_t n, float* out) {
  for_groups(z, n, [&](int64_t i, const Vec(&v)[kVecs]) {
    Vec top[kVecs];
    for (int k = 0; k < kVecs; ++k) top[k] = max(v[k], splat(kNegInf));
    out[i / kLanes] = max_lanes(top);
  });
}

int64_t select_row(const float* z, int64_t n, const float* highest, float threshold, int32_t* out) {
  const Vec limit = splat(threshold);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    if (!(highest[i / kLanes] >= threshold)) continue;
    for_groups(z + i, std::min<int64_t>(kLanes, n - i), [&](int64_t, const Vec(&v)[kVecs]) {
      for (int k = 0; k < kVecs; ++k) {
        count += store_lanes(out + count, at_least(v[k], limit), int32_t(i + k * kWidth));
      }
    });
  }
  return count;
}

// 2^44 · 2^y is exact in float32, so that the truncating conversion is the floor.
inline void group_masses(const Vec (&v)[kVecs], Vec c, Vec m, uint64_t* out) {
  const Vec unit = splat(17592186044416.0f);
  float w[kLanes];
  for (int k = 0; k < kVecs; ++k) store(w + k * kWidth, exp2(exponent(v[k], m, c)) * unit);
  for (int k = 0; k < kLanes; ++k) out[k] = uint64_t(int64_t(w[k]));
}

void masses(const float* z, int64_t n, float c, float m, uint64_t* out) {
  const Vec vc = splat(c), vm = splat(m);
  for_groups(z, n, [&](int64_t i, const Vec(&v)[kVecs]) {
    uint64_t w[kLanes];
    group_masses(v, vc, vm, w);
    std::copy_n(w, std::min<int64_t>(kLanes, n - i), out + i);
  });
}

uint64_t tile_masses(const float* z, int64_t n, float c, float m, uint64_t* out) {
  const Vec vc = splat(c), vm = splat(m);
  uint64_t total = 0;
  for (int64_t t = 0; t * kTile < n; ++t) {
    uint64_t sum[kLanes] = {};
    for_groups(z + t * kTile, std::min(kTile, n - t * kTile), [&](int64_t, const Vec(&v)[kVecs]) {
      uint64_t w[kLanes];
      group_masses(v, vc, vm, w);
      for (int k = 0; k < kLanes; ++k) sum[k] += w[k];
    });
    out[t] = 0;
    for (uint64_t x : sum) out[t] += x;
    total += out[t];
  }
  return total;
}

constexpr RowKernels kernels(const char* name) {
  return {name,
          {stats<float>, stats<Half>, stats<BFloat16>},
          {gradient<float>, gradient<Half>, gradient<BFloat16>},
          {widen_row<float>, widen_row<Half>, widen_row<BFloat16>},
          group_max,
          select_row,
          masses,
          tile_masses};
}

}  // namespace
}  // namespace pyrlk
