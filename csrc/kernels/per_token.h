// What every op over T tokens shares: reading per-token scalars, checking actions, writing a
// gradient row.
#pragma once

#include <algorithm>
#include <limits>

#include "../memory/threads.h"
#include "kernels.h"

namespace pyrlk {

constexpr int64_t kIgnored = -100;

// Threads for these rows: on busy cores a barrier costs more than a small region's work.
inline int row_threads(const Rows& z, int requested) {
  constexpr int64_t kElementsAThread = 1 << 15;
  const int64_t useful = std::min(z.count, z.count * z.vocab / kElementsAThread);
  return usable_threads(int(std::min<int64_t>(requested, std::max<int64_t>(useful, 1))));
}

// Per-token arrays are float, or double beside float64 logits.
inline double get(const void* p, int64_t i, bool wide, double missing) {
  if (p == nullptr) return missing;
  return wide ? static_cast<const double*>(p)[i] : double(static_cast<const float*>(p)[i]);
}
inline void put(void* p, int64_t i, double x, bool wide) {
  if (wide) {
    static_cast<double*>(p)[i] = x;
  } else {
    static_cast<float*>(p)[i] = float(x);
  }
}
inline double temperature_at(Temperature tau, int64_t t, bool wide) {
  // float32 like the sampler's: equal arguments, equal bits.
  return get(tau.per_token, t, wide, wide ? tau.value : double(float(tau.value)));
}

// The first token whose action is outside the vocabulary, or −1. Rows of weight 0 are not looked
// at.
inline int64_t first_bad_token(const int64_t* tokens, const void* weight, const Rows& z) {
  const bool wide = z.dtype == DType::kFloat64;
  for (int64_t t = 0; t < z.count; ++t) {
    if (tokens[t] == kIgnored || get(weight, t, wide, 1.0) == 0.0) continue;
    if (tokens[t] < 0 || tokens[t] >= z.vocab) return t;
  }
  return -1;
}

// The gradient row of (g, h), from the row's statistics. `grad` may be the logits themselves.
inline void write_gradient(const Rows& z, int64_t t, int64_t action, const RowStats& s, double logp,
                           double g, double h, double temperature, const Rows& grad) {
  void* out = grad.row(t);
  if (!regular(s) || g != g || h != h) {
    row_fill(out, grad.dtype, 0, z.vocab, std::numeric_limits<float>::quiet_NaN());
  } else {
    row_gradient(z.row(t), z.dtype, z.vocab, temperature, s.max,
                 row_slope(s, logp, g, h, temperature), action, out);
  }
  if (grad.width > z.vocab) row_fill(out, grad.dtype, z.vocab, grad.width, 0.0f);
}

}  // namespace pyrlk
