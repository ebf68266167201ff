// Which instruction set runs: the best one of this machine that was built; float64 rows run here.
#include <algorithm>
#include <cstdlib>
#include <cstring>

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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
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

}  // namespace

const RowKernels& row_kernels() { return *current(); }

RowStats row_stats(const void* z, DType dtype, int64_t n, double temperature, bool with_entropy) {
  if (dtype != DType::kFloat64) {
    return row_kernels().stats[int(dtype)](z, n, exponent_scale(temperature), with_entropy);
  }
  const double* row = static_cast<const double*>(z);
  const double c = 1.4426950408889634 / temperature;
  RowStats s;
  for (int64_t i = 0; i < n; ++i) {
    s.nan = s.nan || row[i] != row[i];
    s.max = row[i] > s.max ? row[i] : s.max;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double y = (row[i] - s.max) * c, e = std::exp2(y);
    s.sum += e;
    if (with_entropy && e > 0.0) s.energy += e * y;
  }
  return s;
}

void row_gradient(const void* z, DType dtype, int64_t n, double temperature, double max,
                  const RowSlope& slope, int64_t action, void* out) {
  if (dtype == DType::kFloat64) {
    const double* row = static_cast<const double*>(z);
    double* target = static_cast<double*>(out);
    const double c = 1.4426950408889634 / temperature;
    for (int64_t i = 0; i < n; ++i) {
      const double y = (row[i] - max) * c, e = std::exp2(y);
      target[i] = e > 0.0 ? e * (slope.k1 + slope.k2 * y) : 0.0;
    }
    if (action >= 0) target[action] = slope.at_action;
    return;
  }
  row_kernels().gradient[int(dtype)](z, n, exponent_scale(temperature), float(max), float(slope.k1),
                                     float(slope.k2), out);
  if (action >= 0) row_fill(out, dtype, action, action + 1, float(slope.at_action));
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
