// One row of V logits z at temperature τ, action a: the statistics and the gradient of every loss.
//
//   statistics   m = max z,  y = (z − m)·c,  c = log2(e)/τ,  S = Σ 2^y,  E = Σ 2^y·y
//   gradient     ∂ℓ/∂z_i = (1/τ)·[ g·(1[i=a] − π_i) − h·π_i·(log π_i + H) ],  π = 2^y / S
//
// Fixed 4096-wide tiles, 64 lanes a tile, tiles combined in index order in double: equal logits
// give equal bits in any batch, thread count and instruction set, and the tiles of one row may be
// computed by several threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "types.h"

namespace pyrlk {

constexpr int64_t kTile = 4096;
constexpr int kLanes = 64;

inline int64_t tile_count(int64_t n) { return (n + kTile - 1) / kTile; }

struct RowStats {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0.0;     // S
  double energy = 0.0;  // E, only where entropy was asked for
  bool nan = false;     // a NaN among the logits (it counts as −inf above)
};

// log2(e)/τ in float32; capped so that 0·c stays 0 for a τ near the smallest float.
inline float exponent_scale(double temperature) {
  const float c = 1.4426950408889634f / float(temperature);
  return c < std::numeric_limits<float>::max() ? c : std::numeric_limits<float>::max();
}

inline double exponent_scale(DType dtype, double temperature) {
  return dtype == DType::kFloat64 ? 1.4426950408889634 / temperature : exponent_scale(temperature);
}

// Does the row have a distribution? A NaN, a +inf or nothing but −inf makes log-probs NaN.
// Ascending in this key is the order of the logits, descending; −0 equals +0.
inline uint32_t order_key(float z) {
  const uint32_t u = bits_of(z + 0.0f);
  return ~(u & 0x80000000u ? ~u : u | 0x80000000u);
}

inline bool regular(const RowStats& s) { return !s.nan && std::isfinite(s.max); }

inline double log_sum(const RowStats& s) { return std::log(s.sum); }

inline double log_prob(const RowStats& s, double z, double temperature) {
  if (!regular(s)) return std::numeric_limits<double>::quiet_NaN();
  return (z - s.max) / temperature - log_sum(s);
}

inline double entropy(const RowStats& s) {
  if (!regular(s)) return std::numeric_limits<double>::quiet_NaN();
  return log_sum(s) - 0.6931471805599453 * s.energy / s.sum;
}

// Scalars of the gradient sweep: out_i = 2^y_i · (k1 + k2·y_i), plus `at_action` in its own column.
struct RowSlope {
  double k1, k2, at_action;
};

// From g = ∂ℓ/∂log π(a) and h = ∂ℓ/∂H. p_a − 1 comes from expm1: near 0 the difference would
// cancel.
inline RowSlope row_slope(const RowStats& s, double logp, double g, double h, double temperature) {
  const double log_s = log_sum(s), scale = 1.0 / temperature;
  RowSlope r{-g * scale / s.sum, 0.0, -g * std::expm1(logp) * scale};
  if (h != 0.0) {
    const double H = entropy(s), p = std::exp(logp);
    r.k1 -= h * (H - log_s) * scale / s.sum;
    r.k2 = -h * 0.6931471805599453 * scale / s.sum;
    if (p > 0.0) r.at_action -= h * p * (logp + H) * scale;
  }
  return r;
}

// Statistics of one row of any type, by up to `threads` threads (the bits do not depend on it).
RowStats row_stats(const void* z, DType dtype, int64_t n, double temperature, bool with_entropy,
                   int threads = 1);

// The same in parts, for threads that share a row: tiles [first, last), one entry each …
void tile_stats(const void* z, DType dtype, int64_t n, double temperature, bool with_entropy,
                int64_t first, int64_t last, RowStats* tiles);
// … and all of them together, in index order.
RowStats combine(const RowStats* tiles, int64_t count, DType dtype, double temperature);

// The gradient of tiles [first, last); `action` may lie in any tile, or be −1. `stream`: the
// gradient is too large to be found in a cache later, so write around it.
void tile_gradient(const void* z, DType dtype, int64_t n, double temperature, double max,
                   const RowSlope& slope, int64_t action, int64_t first, int64_t last, bool stream,
                   void* out);
// Fills [from, to) of a row.
void row_fill(void* out, DType dtype, int64_t from, int64_t to, float value);
double row_at(const void* z, DType dtype, int64_t i);

// The row operations of one instruction set, indexed by DType (float32, float16, bfloat16).
struct RowKernels {
  const char* name;
  // Tiles of n elements in all, the last one perhaps short.
  void (*stats[3])(const void* z, int64_t n, float c, bool with_entropy, RowStats* tiles);
  void (*gradient[3])(const void* z, int64_t n, float c, float m, float k1, float k2, bool stream,
                      void* out);
  // The row as float32.
  void (*widen[3])(const void* z, int64_t n, float* out);
  // Maximum of every 64 elements.
  void (*group_max)(const float* z, int64_t n, float* out);
  // Indices and values of z_i ≥ threshold, ascending; a group whose maximum is below it is not
  // read. Up to 16 entries beyond the last may be written.
  int64_t (*select)(const float* z, int64_t n, const float* group_max, float threshold,
                    int32_t* ids, float* logits);
  // w_i = floor(2^44 · 2^y_i), y_i = (z_i − m)·c: the exact mass of the sampler.
  void (*masses)(const float* z, int64_t n, float c, float m, uint64_t* out);
  // Their sums, one a tile of 4096; returns the total.
  uint64_t (*tile_masses)(const float* z, int64_t n, float c, float m, uint64_t* out);
  void (*order_keys)(const float* z, int64_t n, uint32_t* out);
  // Keys and masses of n candidates. Masses may be null: 1 each in a sum, not moved. The two
  // that move read and write up to 16 entries beyond the end of an array.
  uint64_t (*mass_below)(const uint32_t* keys, const uint64_t* masses, int64_t n, uint32_t limit);
  // Those with a key in [low, low + width]; returns how many.
  int64_t (*keys_within)(const uint32_t* keys, const uint64_t* masses, int64_t n, uint32_t low,
                         uint32_t width, uint32_t* keys_out, uint64_t* masses_out);
  // Moves those with a key below `cut`, and the first `ties` of those at it, to the front.
  int64_t (*keep_prefix)(const uint32_t* keys, int64_t n, uint32_t cut, int64_t ties, int32_t* ids,
                         float* logits, uint64_t* masses);
  // Positions of the `count` bits that are set, ascending; nothing is written beyond them.
  void (*ids_of_bits)(const uint32_t* bits, int64_t count, int32_t* ids);
};

// The kernels in use: the best this machine has, unless PYRLK_CPU_ISA or set_isa() says otherwise.
const RowKernels& row_kernels();
// "base", "avx2" or "avx512"; false if this machine or build lacks it.
bool set_isa(const char* name);

}  // namespace pyrlk
