// What every op over T tokens shares: per-token scalars, checking actions, one row as a
// distribution.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

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

// Position of an action in its kept set, or −1.
inline int64_t kept_index(KeptIds kept, int64_t t, int64_t action) {
  const int32_t *begin = kept.ids + kept.offsets[t], *end = kept.ids + kept.offsets[t + 1];
  const int32_t* at = std::lower_bound(begin, end, action);
  return at != end && *at == action ? at - begin : -1;
}

// The first token whose action is outside the vocabulary or its kept set, or −1. Rows of weight 0
// are not looked at.
inline int64_t first_bad_token(const int64_t* tokens, KeptIds kept, const void* weight,
                               const Rows& z) {
  const bool wide = z.dtype == DType::kFloat64;
  for (int64_t t = 0; t < z.count; ++t) {
    if (tokens[t] == kIgnored || get(weight, t, wide, 1.0) == 0.0) continue;
    if (tokens[t] < 0 || tokens[t] >= z.vocab) return t;
    if (kept.ids != nullptr && kept_index(kept, t, tokens[t]) < 0) return t;
  }
  return -1;
}

// The distribution of one token: the row itself, or its kept logits gathered into scratch memory.
class Distribution {
 public:
  Distribution(const Rows& z, KeptIds kept) : z_(z), kept_(kept) {}

  // Moves to token t; `action` becomes the position of the token in the distribution.
  void select(int64_t t, int64_t token) {
    row_ = z_.row(t);
    dtype_ = z_.dtype;
    size_ = z_.vocab;
    action_ = token;
    if (kept_.ids == nullptr) return;
    ids_ = kept_.ids + kept_.offsets[t];
    size_ = kept_.offsets[t + 1] - kept_.offsets[t];
    action_ = kept_index(kept_, t, token);
    if (z_.dtype == DType::kFloat64) {
      gather(doubles_);
    } else {
      dtype_ = DType::kFloat32;
      gather(floats_);
    }
  }

  RowStats stats(double temperature, bool with_entropy) const {
    return row_stats(row_, dtype_, size_, temperature, with_entropy);
  }
  double at_action() const { return row_at(row_, dtype_, action_); }

  // Writes the gradient row of (g, h); `grad` may be the logits themselves.
  void write_gradient(int64_t t, const RowStats& s, double logp, double g, double h,
                      double temperature, const Rows& grad) {
    void* out = grad.row(t);
    const bool valid = regular(s) && g == g && h == h;
    const float poison = std::numeric_limits<float>::quiet_NaN();
    if (kept_.ids != nullptr) {
      row_fill(out, grad.dtype, 0, grad.width, 0.0f);
      if (valid) write(s, logp, g, h, temperature, gathered_);
      for (int64_t i = 0; i < size_; ++i) {
        const double x = valid ? row_at(row_, dtype_, i) : poison;
        if (grad.dtype == DType::kFloat64) {
          static_cast<double*>(out)[ids_[i]] = x;
        } else {
          row_fill(out, grad.dtype, ids_[i], ids_[i] + 1, float(x));
        }
      }
      return;
    }
    if (valid) {
      write(s, logp, g, h, temperature, out);
    } else {
      row_fill(out, grad.dtype, 0, size_, poison);
    }
    if (grad.width > size_) row_fill(out, grad.dtype, size_, grad.width, 0.0f);
  }

 private:
  template <class T>
  void gather(std::vector<T>& buffer) {
    buffer.resize(size_);
    for (int64_t i = 0; i < size_; ++i) buffer[i] = T(row_at(row_, z_.dtype, ids_[i]));
    row_ = gathered_ = buffer.data();
  }

  void write(const RowStats& s, double logp, double g, double h, double temperature, void* out) {
    const RowSlope slope = row_slope(s, logp, g, h, temperature);
    tile_gradient(row_, dtype_, size_, temperature, s.max, slope, action_, 0, tile_count(size_),
                  out);
  }

  const Rows& z_;
  KeptIds kept_;
  const void* row_ = nullptr;
  void* gathered_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int64_t size_ = 0, action_ = -1;
  const int32_t* ids_ = nullptr;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

}  // namespace pyrlk
