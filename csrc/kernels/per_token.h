// What every op over T tokens shares: per-token scalars, checking actions, one row as a
// distribution.
#pragma once

#include <omp.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../memory/threads.h"
#include "kernels.h"

namespace pyrlk {

constexpr int64_t kIgnored = -100;

// The threads that share a row: each has tiles of its own. A thread alone is a team of one.
class Team {
 public:
  Team(int rank, int size, std::vector<RowStats>* tiles)
      : rank_(rank), size_(size), tiles_(tiles) {}

  bool leads() const { return rank_ == 0; }
  int64_t first(int64_t count) const { return count * rank_ / size_; }
  int64_t last(int64_t count) const { return count * (rank_ + 1) / size_; }
  // Room for the statistics of a row. Two rows alternate: a thread that is ahead writes those of
  // the next row while another still reads these.
  RowStats* tiles(int64_t count) {
    turn_ = 1 - turn_;
    if (size_ == 1) tiles_->resize(2 * count);
    return tiles_->data() + turn_ * count;
  }
  void wait() const {
    if (size_ == 1) return;
#pragma omp barrier
  }

 private:
  int rank_, size_, turn_ = 0;
  std::vector<RowStats>* tiles_;
};

// Threads for these rows: on busy cores a barrier costs more than a small region's work.
inline int row_threads(const Rows& z, int requested) {
  constexpr int64_t kElementsAThread = 1 << 15;
  const int64_t useful = z.count * z.vocab / kElementsAThread;
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
  Distribution(const Rows& z, KeptIds kept, const Team& team) : z_(z), kept_(kept), team_(team) {}

  // Is this the thread that reports the row?
  bool leads() const { return team_.leads(); }

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

  // Also reads the action's logit: once all have passed here, the gradient may overwrite the row.
  RowStats stats(double temperature, bool with_entropy) {
    at_action_ = row_at(row_, dtype_, action_);
    const int64_t count = tile_count(size_);
    RowStats* tiles = team_.tiles(count);
    tile_stats(row_, dtype_, size_, temperature, with_entropy, team_.first(count),
               team_.last(count), tiles);
    team_.wait();
    return combine(tiles, count, dtype_, temperature);
  }
  double at_action() const { return at_action_; }

  // Writes the gradient row of (g, h); `grad` may be the logits themselves.
  void write_gradient(int64_t t, const RowStats& s, double logp, double g, double h,
                      double temperature, const Rows& grad) {
    const bool valid = regular(s) && g == g && h == h;
    const float poison = std::numeric_limits<float>::quiet_NaN();
    const RowSlope slope = row_slope(s, logp, g, h, temperature);
    const int64_t count = tile_count(size_);
    if (kept_.ids != nullptr) {
      fill(t, grad, 0, 0.0f);
      if (valid) {
        tile_gradient(row_, dtype_, size_, temperature, s.max, slope, action_, 0, count, false,
                      gathered_);
      }
      for (int64_t i = 0; i < size_; ++i) {
        const double x = valid ? row_at(row_, dtype_, i) : poison;
        if (grad.dtype == DType::kFloat64) {
          reinterpret_cast<double*>(grad.row(t))[ids_[i]] = x;
        } else {
          row_fill(grad.row(t), grad.dtype, ids_[i], ids_[i] + 1, float(x));
        }
      }
      return;
    }
    if (!valid) return fill(t, grad, size_, poison);
    constexpr int64_t kStream = 32 << 20;
    const bool stream =
        grad.data != z_.data && grad.count * grad.width * item_size(grad.dtype) >= kStream;
    tile_gradient(row_, dtype_, size_, temperature, s.max, slope, action_, team_.first(count),
                  team_.last(count), stream, grad.row(t));
    if (leads() && grad.width > size_) {
      row_fill(grad.row(t), grad.dtype, size_, grad.width, 0.0f);
    }
  }

  // Row t of the gradient: `value` in the columns before `padding`, 0 in the others.
  void fill(int64_t t, const Rows& grad, int64_t padding, float value) const {
    const int64_t count = tile_count(grad.width);
    const int64_t begin = team_.first(count) * kTile;
    const int64_t end = std::min(grad.width, team_.last(count) * kTile);
    row_fill(grad.row(t), grad.dtype, begin, std::clamp(padding, begin, end), value);
    row_fill(grad.row(t), grad.dtype, std::clamp(padding, begin, end), end, 0.0f);
  }

 private:
  template <class T>
  void gather(std::vector<T>& buffer) {
    buffer.resize(size_);
    for (int64_t i = 0; i < size_; ++i) buffer[i] = T(row_at(row_, z_.dtype, ids_[i]));
    row_ = gathered_ = buffer.data();
  }

  const Rows& z_;
  KeptIds kept_;
  Team team_;
  const void* row_ = nullptr;
  void* gathered_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int64_t size_ = 0, action_ = -1;
  double at_action_ = 0.0;
  const int32_t* ids_ = nullptr;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

// Calls work(row, t) for every row: whole rows by threads, or, where few rows would not spread
// evenly, the tiles of each row by all threads.
template <class Work>
void for_rows(const Rows& z, KeptIds kept, int requested, Work work) {
  const int threads = row_threads(z, requested);
  const int64_t tiles = tile_count(z.vocab);
  const bool uneven = z.count < 2 * threads && z.count % threads != 0;
  if (uneven && kept.ids == nullptr && tiles >= 2 * threads) {
    std::vector<RowStats> shared(2 * tiles);
#pragma omp parallel num_threads(threads)
    {
      Distribution row(z, kept, Team(omp_get_thread_num(), omp_get_num_threads(), &shared));
      for (int64_t t = 0; t < z.count; ++t) work(row, t);
    }
    return;
  }
#pragma omp parallel num_threads(std::min<int64_t>(threads, std::max<int64_t>(z.count, 1)))
  {
    std::vector<RowStats> own;
    Distribution row(z, kept, Team(0, 1, &own));
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < z.count; ++t) work(row, t);
  }
}

}  // namespace pyrlk
