// The bodies behind RowKernels, compiled once an instruction set by row_{base,avx2,avx512}.cpp.
#pragma once

#include <algorithm>

#include "row.h"
#include "vec.h"

namespace pyrlk {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Calls body(offset, group) for every group of 64 elements of z[0, n); lanes past the end are −inf.
template <class T, class Body>
inline void for_groups(const T* z, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, load_group(z + i));
  if (i < n) {
    T rest[kLanes], end;
    from_float(kNegInf, &end);
    std::fill(std::copy(z + i, z + n, rest), rest + kLanes, end);
    body(i, load_group(rest));
  }
}

template <class T>
inline double sum_lanes(const Group& acc, const T* type) {
  float x[kLanes];
  in_order(acc, type, x);
  double r[8] = {};
  for (int i = 0; i < kLanes; ++i) r[i & 7] += x[i];
  return ((r[0] + r[4]) + (r[2] + r[6])) + ((r[1] + r[5]) + (r[3] + r[7]));
}

inline float max_lanes(const Group& acc) {
  float x[kWidth];
  store(x, max(max(acc.v[0], acc.v[1]), max(acc.v[2], acc.v[3])));
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0] + 0.0f;  // one zero, whichever came first
}

inline Group splat_group(float x) { return {{splat(x), splat(x), splat(x), splat(x)}}; }

template <class T, bool kEntropy>
RowStats stats_of_tile(const T* z, int64_t n, Vec c) {
  Group top = splat_group(kNegInf);
  Mask ordered[2] = {everything(), everything()};
  for_groups(z, n, [&](int64_t, const Group& g) {
    for (int k = 0; k < kVecs; ++k) top.v[k] = max(g.v[k], top.v[k]);  // a NaN loses the comparison
    for (int k = 0; k < 2; ++k) ordered[k] = and_ordered(ordered[k], g.v[2 * k], g.v[2 * k + 1]);
  });
  RowStats s;
  const float highest = max_lanes(top);
  s.max = highest;
  s.nan = (bits(ordered[0]) & bits(ordered[1])) != bits(everything());
  const Vec m = splat(highest);
  Group sum = splat_group(0.0f), energy = sum;
  for_groups(z, n, [&](int64_t, const Group& g) {
    for (int k = 0; k < kVecs; ++k) {
      const Vec y = exponent(g.v[k], m, c);
      const Vec e = exp2<Fused>(y);
      sum.v[k] = sum.v[k] + e;
      if (kEntropy) energy.v[k] = fma(e, y, energy.v[k]);
    }
  });
  s.sum = sum_lanes(sum, z);
  if (kEntropy) s.energy = sum_lanes(energy, z);
  return s;
}

template <class T>
void stats(const void* z, int64_t n, float c, bool with_entropy, RowStats* tiles) {
  const Vec scale = splat(c);
  for (int64_t i = 0; i < n; i += kTile) {
    const T* tile = static_cast<const T*>(z) + i;
    const int64_t size = std::min(kTile, n - i);
    tiles[i / kTile] = with_entropy ? stats_of_tile<T, true>(tile, size, scale)
                                    : stats_of_tile<T, false>(tile, size, scale);
  }
}

template <class T>
struct GradientExp {
  using Form = Fused;
};
template <>
struct GradientExp<BFloat16> {
  using Form = Rough;
};

template <class T, bool kEntropy, bool kStream>
void gradient_row(const T* z, int64_t n, Vec c, Vec m, Vec k1, Vec k2, T* out) {
  for_groups(z, n, [&](int64_t i, const Group& logits) {
    Group g;
    for (int k = 0; k < kVecs; ++k) {
      const Vec y = exponent(logits.v[k], m, c);
      const Vec e = exp2<typename GradientExp<T>::Form>(y);
      g.v[k] = e * (kEntropy ? fma(k2, y, k1) : k1);
    }
    if (i + kLanes <= n) {
      store_group<kStream>(out + i, g);
    } else {
      T rest[kLanes];
      store_group<false>(rest, g);
      std::copy_n(rest, n - i, out + i);
    }
  });
  if (kStream) stream_end();
}

template <class T>
void gradient(const void* z, int64_t n, float c, float m, float k1, float k2, bool stream,
              void* out) {
  const bool on_line = reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const auto body =
      k2 != 0.0f ? stream && on_line ? gradient_row<T, true, true> : gradient_row<T, true, false>
      : stream && on_line ? gradient_row<T, false, true>
                          : gradient_row<T, false, false>;
  body(static_cast<const T*>(z), n, splat(c), splat(m), splat(k1), splat(k2), static_cast<T*>(out));
}

template <class T>
void widen_row(const void* z, int64_t n, float* out) {
  const T* row = static_cast<const T*>(z);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(row + i));
  for (; i < n; ++i) out[i] = to_float(row[i]);
}

void group_max(const float* z, int64_t n, float* out) {
  for_groups(z, n, [&](int64_t i, const Group& g) {
    Group top;
    for (int k = 0; k < kVecs; ++k) top.v[k] = max(g.v[k], splat(kNegInf));
    out[i / kLanes] = max_lanes(top);
  });
}

int64_t select_row(const float* z, int64_t n, const float* highest, float threshold, int32_t* ids,
                   float* logits) {
  const Vec limit = splat(threshold);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    if (!(highest[i / kLanes] >= threshold)) continue;
    for_groups(z + i, std::min<int64_t>(kLanes, n - i), [&](int64_t, const Group& g) {
      for (int k = 0; k < kVecs; ++k) {
        const uint32_t lanes = bits(at_least(g.v[k], limit));
        float x[kWidth];
        store(x, g.v[k]);
        move_lanes(lanes, x, logits + count);
        count += place_lanes(lanes, int32_t(i + k * kWidth), ids + count);
      }
    });
  }
  return count;
}

void order_keys(const float* z, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = order_key(z[i]);
}

uint64_t mass_below(const uint32_t* keys, const uint64_t* masses, int64_t n, uint32_t limit) {
  uint64_t sum = 0;
  if (masses != nullptr) {
    for (int64_t i = 0; i < n; ++i) sum += keys[i] < limit ? masses[i] : 0;
  } else {
    for (int64_t i = 0; i < n; ++i) sum += keys[i] < limit;
  }
  return sum;
}

// Calls body(i, lanes) for every sixteen keys; lanes past the end are none.
template <class Body>
inline void for_keys(int64_t n, Body body) {
  constexpr uint32_t kAll = (1u << kWidth) - 1;
  for (int64_t i = 0; i < n; i += kWidth)
    body(i, n - i < kWidth ? kAll >> (kWidth - (n - i)) : kAll);
}

int64_t keys_within(const uint32_t* keys, const uint64_t* masses, int64_t n, uint32_t low,
                    uint32_t width, uint32_t* keys_out, uint64_t* masses_out) {
  int64_t count = 0;
  for_keys(n, [&](int64_t i, uint32_t lanes) {
    lanes &= in_range(keys + i, low, width);
    if (masses != nullptr) move_lanes(lanes, masses + i, masses_out + count);
    count += move_lanes(lanes, keys + i, keys_out + count);
  });
  return count;
}

int64_t keep_prefix(const uint32_t* keys, int64_t n, uint32_t cut, int64_t ties, int32_t* ids,
                    float* logits, uint64_t* masses) {
  int64_t count = 0;
  for_keys(n, [&](int64_t i, uint32_t lanes) {
    uint32_t tied = lanes & in_range(keys + i, cut, 0);
    while (__builtin_popcount(tied) > ties) tied ^= 1u << (31 - __builtin_clz(tied));
    ties -= __builtin_popcount(tied);
    lanes &= tied | (cut > 0 ? in_range(keys + i, 0, cut - 1) : 0);
    move_lanes(lanes, ids + i, ids + count);
    move_lanes(lanes, logits + i, logits + count);
    count += move_lanes(lanes, masses + i, masses + count);
  });
  return count;
}

void ids_of_bits(const uint32_t* bits, int64_t count, int32_t* ids) {
  int64_t done = 0;
  for (int32_t first = 0; done < count; first += kWidth) {
    uint32_t lanes = bits[first / 32] >> (first % 32) & ((1u << kWidth) - 1);
    if (done + kWidth <= count) {
      done += place_lanes(lanes, first, ids + done);
    } else {  // the next row's ids begin where these end
      for (; lanes != 0; lanes &= lanes - 1) ids[done++] = first + int32_t(__builtin_ctz(lanes));
    }
  }
}

// 2^44 · 2^y is exact in float32, so that the truncating conversion is the floor.
inline void group_masses(const Group& g, Vec c, Vec m, uint64_t* out) {
  const Vec unit = splat(17592186044416.0f);
  float w[kLanes];
  for (int k = 0; k < kVecs; ++k) {
    store(w + k * kWidth, exp2<Separate>(exponent(g.v[k], m, c)) * unit);
  }
  for (int k = 0; k < kLanes; ++k) out[k] = uint64_t(int64_t(w[k]));
}

void masses(const float* z, int64_t n, float c, float m, uint64_t* out) {
  const Vec vc = splat(c), vm = splat(m);
  for_groups(z, n, [&](int64_t i, const Group& g) {
    uint64_t w[kLanes];
    group_masses(g, vc, vm, w);
    std::copy_n(w, std::min<int64_t>(kLanes, n - i), out + i);
  });
}

uint64_t tile_masses(const float* z, int64_t n, float c, float m, uint64_t* out) {
  const Vec vc = splat(c), vm = splat(m);
  uint64_t total = 0;
  for (int64_t t = 0; t * kTile < n; ++t) {
    uint64_t sum[kLanes] = {};
    for_groups(z + t * kTile, std::min(kTile, n - t * kTile), [&](int64_t, const Group& g) {
      uint64_t w[kLanes];
      group_masses(g, vc, vm, w);
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
          tile_masses,
          order_keys,
          mass_below,
          keys_within,
          keep_prefix,
          ids_of_bits};
}

}  // namespace
}  // namespace pyrlk
