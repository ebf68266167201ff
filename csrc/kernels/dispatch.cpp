// Which instruction set runs: the best one of this machine that was built; float64 rows run here.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../memory/threads.h"
#include "row.h"

namespace pyrlk {

extern const RowKernels k_base;
#if defined(__x86_64__)
extern const RowKernels k_avx2, k_avx512;
#endif

namespace {

const RowKernels* find(const char* name) {
  if (std::strcmp(name, "base") == 0) return &k_base;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (avx2 && std::strcmp(name, "avx2") == 0) return &k_avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && std::strcmp(name, "avx512") == 0) return &k_avx512;
#endif
  return nullptr;
}

const RowKernels* best() {
  if (const char* forced = std::getenv("PYRLK_CPU_ISA")) {
    if (const RowKernels* k = find(forced)) return k;
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (const RowKernels* k = find(name)) return k;
  }
  return &k_base;
}

const RowKernels*& current() {
  static const RowKernels* kernels = best();
  return kernels;
}

const void* at(const void* row, DType dtype, int64_t i) {
  return static_cast<const char*>(row) + i * item_size(dtype);
}

}  // namespace

const RowKernels& row_kernels() { return *current(); }

void tile_stats(const void* z, DType dtype, int64_t n, double temperature, bool with_entropy,
                int64_t first, int64_t last, RowStats* tiles) {
  const int64_t begin = first * kTile, end = std::min(n, last * kTile);
  if (dtype != DType::kFloat64) {
    row_kernels().stats[int(dtype)](at(z, dtype, begin), end - begin, exponent_scale(temperature),
                                    with_entropy, tiles + first);
    return;
  }
  const double c = exponent_scale(dtype, temperature);
  for (int64_t t = first; t < last; ++t) {
    const double* tile = static_cast<const double*>(z) + t * kTile;
    const int64_t size = std::min(kTile, n - t * kTile);
    RowStats s;
    for (int64_t i = 0; i < size; ++i) {
      s.nan = s.nan || tile[i] != tile[i];
      s.max = tile[i] > s.max ? tile[i] : s.max;
    }
    for (int64_t i = 0; i < size; ++i) {
      const double y = (tile[i] - s.max) * c, e = std::exp2(y);
      if (!(e > 0.0)) continue;
      s.sum += e;
      if (with_entropy) s.energy += e * y;
    }
    tiles[t] = s;
  }
}

// A tile without finite logits has sum 0 and changes nothing.
RowStats combine(const RowStats* tiles, int64_t count, DType dtype, double temperature) {
  const double c = exponent_scale(dtype, temperature);
  RowStats r;
  for (int64_t t = 0; t < count; ++t) {
    r.max = std::max(r.max, tiles[t].max);
    r.nan = r.nan || tiles[t].nan;
  }
  for (int64_t t = 0; t < count; ++t) {
    if (tiles[t].sum == 0.0) continue;
    const double shift = (tiles[t].max - r.max) * c;
    const double scale = shift == 0.0 ? 1.0 : std::exp2(shift);
    if (scale == 0.0) continue;
    r.sum += scale * tiles[t].sum;
    r.energy += scale * (tiles[t].energy + shift * tiles[t].sum);
  }
  return r;
}

RowStats row_stats(const void* z, DType dtype, int64_t n, double temperature, bool with_entropy,
                   int threads) {
  const int64_t count = tile_count(n);
  std::vector<RowStats> tiles(count);
  if (threads <= 1) {
    tile_stats(z, dtype, n, temperature, with_entropy, 0, count, tiles.data());
  } else {
#pragma omp parallel for schedule(static) num_threads(usable_threads(threads))
    for (int64_t t = 0; t < count; ++t) {
      tile_stats(z, dtype, n, temperature, with_entropy, t, t + 1, tiles.data());
    }
  }
  return combine(tiles.data(), count, dtype, temperature);
}

void tile_gradient(const void* z, DType dtype, int64_t n, double temperature, double max,
                   const RowSlope& slope, int64_t action, int64_t first, int64_t last, bool stream,
                   void* out) {
  const int64_t begin = first * kTile, end = std::min(n, last * kTile);
  if (dtype == DType::kFloat64) {
    const double* row = static_cast<const double*>(z);
    double* target = static_cast<double*>(out);
    const double c = exponent_scale(dtype, temperature);
    for (int64_t i = begin; i < end; ++i) {
      const double y = (row[i] - max) * c, e = std::exp2(y);
      target[i] = e > 0.0 ? e * (slope.k1 + slope.k2 * y) : 0.0;
    }
  } else {
    row_kernels().gradient[int(dtype)](
        at(z, dtype, begin), end - begin, exponent_scale(temperature), float(max), float(slope.k1),
        float(slope.k2), stream, const_cast<void*>(at(out, dtype, begin)));
  }
  if (begin <= action && action < end) {
    if (dtype == DType::kFloat64) {
      static_cast<double*>(out)[action] = slope.at_action;
    } else {
      row_fill(out, dtype, action, action + 1, float(slope.at_action));
    }
  }
}

void row_fill(void* out, DType dtype, int64_t from, int64_t to, float value) {
  switch (dtype) {
    case DType::kFloat32:
      std::fill(static_cast<float*>(out) + from, static_cast<float*>(out) + to, value);
      break;
    case DType::kFloat64:
      std::fill(static_cast<double*>(out) + from, static_cast<double*>(out) + to, double(value));
      break;
    case DType::kFloat16: {
      Half x;
      from_float(value, &x);
      std::fill(static_cast<Half*>(out) + from, static_cast<Half*>(out) + to, x);
      break;
    }
    case DType::kBFloat16: {
      BFloat16 x;
      from_float(value, &x);
      std::fill(static_cast<BFloat16*>(out) + from, static_cast<BFloat16*>(out) + to, x);
      break;
    }
  }
}

double row_at(const void* z, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(z)[i];
    case DType::kFloat64:
      return static_cast<const double*>(z)[i];
    case DType::kFloat16:
      return to_float(static_cast<const Half*>(z)[i]);
    default:
      return to_float(static_cast<const BFloat16*>(z)[i]);
  }
}

bool set_isa(const char* name) {
  const RowKernels* k = find(name);
  if (k != nullptr) current() = k;
  return k != nullptr;
}

}  // namespace pyrlk
