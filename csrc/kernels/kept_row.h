// The kept prefix of a row in the order (logit descending, id ascending), and a draw from it.
//
//   mass w_i = floor(2^44 · 2^y_i): integers, so that no order of summation changes a bit
//   top-p    the shortest prefix with mass ≥ max(1, ceil(P·Z / 2^32)), P = floor(p·2^32)
//   draw     u = 64 Philox bits; the first kept id, ascending, whose running mass exceeds u·Z/2^64
//
// No sort of V: a bound on the logits of the kept set (top-k: from group maxima; top-p: tokens
// below m − τ·ln(n/(1−p)) weigh less than 1−p together; min-p: its definition) leaves few
// candidates. A prefix is then found digit by digit of its last key, with one histogram of counts
// or masses a digit, so that rows where the bound leaves everything cost a few sweeps more.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "per_token.h"

namespace pyrlk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Independent uses of one (seed, position): the third word of Philox's counter.
enum Stream : uint32_t { kDraw = 0, kAccept = 1, kResidual = 2 };

inline uint64_t uniform_bits(uint64_t seed, uint64_t position, Stream stream) {  // Philox4x32-10
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), stream, 0};
  uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b),
                              uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
    std::copy_n(next, 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return uint64_t(c[0]) << 32 | c[1];
}

inline uint64_t high_product(uint64_t a, uint64_t b) {
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
}

// ceil(P·Z / 2^32) with P = floor(p·2^32), at least 1.
inline uint64_t needed_mass(float p, uint64_t total) {
  const uint64_t P = uint64_t(double(p) * 4294967296.0);
  const unsigned __int128 product = static_cast<unsigned __int128>(P) * total;
  return std::max<uint64_t>(1, uint64_t((product + 0xffffffffu) >> 32));
}

// A prefix of the order: the keys below `cut`, and of those at it the `ties` lowest ids.
struct Prefix {
  uint32_t cut = std::numeric_limits<uint32_t>::max();
  int64_t ties = std::numeric_limits<int64_t>::max();
};
inline Prefix shorter(Prefix a, Prefix b) {
  return std::pair(a.cut, a.ties) < std::pair(b.cut, b.ties) ? a : b;
}

struct Params {
  float temperature, top_p, min_p;
  int64_t top_k;
  bool joint, keep_ties;
  bool valid() const {
    return temperature >= 0.0f && temperature < kInfinity && top_p >= 0.0f && top_p <= 1.0f &&
           min_p >= 0.0f && min_p <= 1.0f;
  }
};

// A vector whose resize() leaves new elements as they are: rows of V are written, never zeroed.
template <class T>
struct Uninitialized : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = Uninitialized<U>;
  };
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
};
template <class T>
using Buffer = std::vector<T, Uninitialized<T>>;

// Buffers of one row at a time, reused from row to row.
struct Scratch {
  Buffer<float> row, group_max, sorted_max, kept_logits;
  Buffer<int32_t> ids;
  Buffer<uint32_t> keys, digit_keys;
  Buffer<uint64_t> masses, digit_masses, histogram, tiles;
  std::vector<RowStats> tile_stats;
  std::vector<std::pair<uint32_t, uint64_t>> sample;
};

// Entries that moves may write beyond the end of what they return (row.h).
constexpr int64_t kSlack = 16;

// Parts worth a thread each: waking a thread costs as much as 10^5 elements.
inline int useful_parts(int64_t elements, int parts) {
  constexpr int64_t kElementsAThread = 1 << 17;
  return int(std::clamp<int64_t>(elements / kElementsAThread, 1, parts));
}

// How a batch is computed: few rows are shared among the threads one after the other (`parts` a
// row), many are dealt out to them (`teams` at a time).
struct Sharing {
  int parts, teams;
};
inline Sharing sharing(const Rows& z, int64_t rows, int threads) {
  const int within = useful_parts(z.vocab, usable_threads(threads));
  if (within > rows) return {within, 1};
  return {1, int(std::clamp<int64_t>(rows, 1, row_threads(z, threads)))};
}

// Calls body(begin, end, part) on `parts` ranges of whole tiles that make up [0, n), each by a
// thread.
template <class Body>
inline void in_parts(int64_t n, int parts, Body body) {
  const int64_t tiles = tile_count(n);
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
  for (int part = 0; part < parts; ++part) {
    const int64_t begin = tiles * part / parts * kTile;
    const int64_t end = std::min(n, tiles * (part + 1) / parts * kTile);
    if (begin < end) body(begin, end, part);
  }
}

// Keys that hold, in all likelihood, the one at which the mass reaches `need`: the quantile of a
// sample, and four standard deviations of its rank on each side.
struct KeyRange {
  uint32_t low, high;
};
inline KeyRange likely_range(const uint32_t* keys, const uint64_t* mass, int64_t n, uint64_t need,
                             Scratch& s) {
  constexpr int64_t kSample = 512, kMargin = 45;  // 2·√512
  const int64_t step = n / kSample;
  s.sample.resize(kSample);
  for (int64_t i = 0; i < kSample; ++i) {
    s.sample[i] = {keys[i * step], mass != nullptr ? mass[i * step] : 1};
  }
  std::sort(s.sample.begin(), s.sample.end());
  int64_t rank = 0;
  for (double seen = 0; rank < kSample - 1; ++rank) {
    seen += double(s.sample[rank].second) * double(step);
    if (seen >= double(need)) break;
  }
  KeyRange range{0, std::numeric_limits<uint32_t>::max()};
  if (rank >= kMargin) range.low = s.sample[rank - kMargin].first;
  if (rank + kMargin < kSample) range.high = s.sample[rank + kMargin].first;
  return range;
}

// The shortest prefix of keys[0, n), in any order, whose mass reaches `need` ≥ 1; all if none does.
// A null mass counts 1 a key.
inline Prefix shortest_prefix(const uint32_t* keys, const uint64_t* mass, int64_t n, uint64_t need,
                              bool keep_ties, Scratch& s) {
  const RowKernels& ops = row_kernels();
  s.digit_keys.resize(n + kSlack);
  s.digit_masses.resize(mass != nullptr ? n + kSlack : 0);
  uint64_t before = 0;  // mass of the keys below those left
  const auto narrow = [&](uint32_t low, uint32_t width) {
    n = ops.keys_within(keys, mass, n, low, width, s.digit_keys.data(), s.digit_masses.data());
    keys = s.digit_keys.data();
    if (mass != nullptr) mass = s.digit_masses.data();
  };
  if (n >= 1 << 14) {
    const KeyRange range = likely_range(keys, mass, n, need, s);
    const uint64_t below = ops.mass_below(keys, mass, n, range.low);
    if (below < need) {
      const auto [all_keys, all_mass, all] = std::tuple(keys, mass, n);
      narrow(range.low, range.high - range.low);
      const uint64_t inside =
          mass != nullptr ? std::accumulate(mass, mass + n, uint64_t(0)) : uint64_t(n);
      if (below + inside >= need) {
        before = below;
      } else {
        std::tie(keys, mass, n) = std::tuple(all_keys, all_mass, all);
      }
    }
  }
  while (n > 0) {
    uint32_t low = keys[0], high = keys[0];
    for (int64_t i = 0; i < n; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    if (low == high) {
      const uint64_t each = mass != nullptr ? mass[0] : 1;
      if (before + uint64_t(n) * each < need) return {};
      return {low, keep_ties ? Prefix{}.ties : int64_t((need - before + each - 1) / each)};
    }
    const int digit_bits = n < 64 ? 5 : n < 2048 ? 8 : 11;
    const int shift = std::max(0, 32 - __builtin_clz(high - low) - digit_bits);
    s.histogram.assign(((high - low) >> shift) + 1, 0);
    uint64_t* h = s.histogram.data();
    if (mass != nullptr) {
      for (int64_t i = 0; i < n; ++i) h[(keys[i] - low) >> shift] += mass[i];
    } else {
      for (int64_t i = 0; i < n; ++i) ++h[(keys[i] - low) >> shift];
    }
    const uint32_t digits = uint32_t(s.histogram.size());
    uint32_t digit = 0;
    while (digit < digits && before + h[digit] < need) before += h[digit++];
    if (digit == digits) return {};
    narrow(low + (digit << shift), (1u << shift) - 1);
  }
  return {};
}

// Mass of a prefix of keys[0, n).
inline uint64_t mass_of(const Prefix& prefix, const uint32_t* keys, const uint64_t* mass,
                        int64_t n) {
  const uint64_t below = row_kernels().mass_below(keys, mass, n, prefix.cut);
  const int64_t tied = std::count(keys, keys + n, prefix.cut);
  if (tied == 0) return below;
  const uint64_t each = mass[std::find(keys, keys + n, prefix.cut) - keys];
  return below + each * uint64_t(std::min(tied, prefix.ties));
}

// A float at or below x: thresholds only ever admit more candidates than needed.
inline float round_down(double x) {
  return std::nextafterf(float(std::max(x, -double(std::numeric_limits<float>::max()))),
                         -kInfinity);
}
// The least float at or above x.
inline float round_up(double x) {
  const float y = float(x);
  return y < x ? std::nextafterf(y, kInfinity) : y;
}

// Ids and logits of z_i ≥ bound, ascending, into s.ids and s.kept_logits; returns how many.
inline int64_t select(const float* z, int64_t n, float bound, int parts, Scratch& s) {
  const auto above = std::count_if(s.group_max.begin(), s.group_max.end(),
                                   [&](float group) { return group >= bound; });
  parts = useful_parts(above * kLanes, parts);
  // A part writes where its range begins, and up to kSlack entries beyond its end.
  s.ids.resize(n + parts * kLanes);
  s.kept_logits.resize(n + parts * kLanes);
  std::vector<std::pair<int64_t, int64_t>> found(parts, {0, 0});
  in_parts(n, parts, [&](int64_t begin, int64_t end, int part) {
    const int64_t at = begin + part * kLanes;
    int32_t* ids = s.ids.data() + at;
    const int64_t count =
        row_kernels().select(z + begin, end - begin, s.group_max.data() + begin / kLanes, bound,
                             ids, s.kept_logits.data() + at);
    if (begin > 0) {
      for (int64_t i = 0; i < count; ++i) ids[i] += int32_t(begin);
    }
    found[part] = {at, count};
  });
  int64_t total = found[0].second;
  for (int part = 1; part < parts; ++part) {
    const auto [at, count] = found[part];
    std::copy_n(s.ids.data() + at, count, s.ids.data() + total);
    std::copy_n(s.kept_logits.data() + at, count, s.kept_logits.data() + total);
    total += count;
  }
  return total;
}

// Which filters act on a row of n with the maximum m, and the logit of min-p.
struct Filters {
  bool top_k, top_p, min_p, pool_is_top_k;  // top-p is of the mass that top-k left
  double floor;

  Filters(const Params& p, int64_t n, float m)
      : top_k(p.top_k > 0 && p.top_k < n),
        top_p(p.top_p < 1.0f),
        min_p(p.min_p > 0.0f),
        pool_is_top_k(top_k && !p.joint),
        floor(min_p ? m + double(p.temperature) * std::log(double(p.min_p)) : -double(kInfinity)) {}

  bool any() const { return top_k || top_p || min_p; }
  // Does the last kept token depend on the mass of the whole row?
  bool weighs_row() const { return top_p && !pool_is_top_k; }
};

// A bound on the logits of the kept set of a row of n, from the maxima of its groups.
inline float candidate_bound(const Filters& f, const Params& p, int64_t n, float m, Scratch& s) {
  float bound = -std::numeric_limits<float>::max();
  if (f.top_k && p.top_k <= int64_t(s.group_max.size())) {
    // k groups have a maximum ≥ the k-th largest of the maxima
    s.sorted_max = s.group_max;
    std::nth_element(s.sorted_max.begin(), s.sorted_max.begin() + (p.top_k - 1), s.sorted_max.end(),
                     std::greater<float>());
    bound = std::max(bound, s.sorted_max[p.top_k - 1]);
  }
  if (f.weighs_row()) {
    const double tail = std::min(30.6, std::log(double(n) / (1.0 - double(p.top_p))) + 1e-4);
    bound = std::max(bound, round_down(m - double(p.temperature) * tail));
  }
  if (f.min_p && !(f.top_p && f.pool_is_top_k)) bound = std::max(bound, round_down(f.floor));
  return bound;
}

// Candidates [0, size) alone are left.
inline void keep_first(int64_t size, Scratch& s) {
  s.ids.resize(size);
  s.kept_logits.resize(size);
  s.masses.resize(size);
}

// Of `count` candidates, ascending, with their keys, those of a prefix.
inline void keep_prefix(const Prefix& kept, int64_t count, Scratch& s) {
  keep_first(row_kernels().keep_prefix(s.keys.data(), count, kept.cut, kept.ties, s.ids.data(),
                                       s.kept_logits.data(), s.masses.data()),
             s);
}

inline void take_keys(int64_t count, Scratch& s) {
  s.keys.resize(count + kSlack);
  row_kernels().order_keys(s.kept_logits.data(), count, s.keys.data());
}

// From `count` candidates with ids, logits and masses (and kSlack entries more) to the kept set;
// row_mass() is the mass of the whole row.
template <class RowMass>
inline void prune(const Filters& f, const Params& p, int64_t count, RowMass row_mass, Scratch& s) {
  if (!f.any()) return keep_first(count, s);
  take_keys(count, s);
  const uint32_t* keys = s.keys.data();
  const uint64_t* masses = s.masses.data();
  Prefix kept;
  if (f.top_k && count > p.top_k) {
    kept = shortest_prefix(keys, nullptr, count, uint64_t(p.top_k), p.keep_ties, s);
  }
  if (f.top_p) {
    const uint64_t total = f.pool_is_top_k ? mass_of(kept, keys, masses, count) : row_mass();
    kept = shorter(
        kept, shortest_prefix(keys, masses, count, needed_mass(p.top_p, total), p.keep_ties, s));
  }
  if (f.min_p) kept = shorter(kept, {order_key(round_up(f.floor)), Prefix{}.ties});
  keep_prefix(kept, count, s);
}

// The mass of all of a row.
inline uint64_t row_mass(const float* z, int64_t n, float m, float c, int parts, Scratch& s) {
  s.tiles.resize(tile_count(n));
  in_parts(n, parts, [&](int64_t begin, int64_t end, int) {
    row_kernels().tile_masses(z + begin, end - begin, c, m, s.tiles.data() + begin / kTile);
  });
  return std::accumulate(s.tiles.begin(), s.tiles.end(), uint64_t(0));
}

// The kept set, ascending: ids into s.ids, logits into s.kept_logits, masses into s.masses; z is
// the row in float32 without +inf.
inline void keep(const float* z, int64_t n, float m, float c, const Params& p, int parts,
                 Scratch& s) {
  const Filters f(p, n, m);
  const int64_t count = select(z, n, candidate_bound(f, p, n, m, s), parts, s);
  s.masses.resize(count + kSlack);
  in_parts(count, useful_parts(count, parts), [&](int64_t begin, int64_t end, int) {
    row_kernels().masses(s.kept_logits.data() + begin, end - begin, c, m, s.masses.data() + begin);
  });
  const auto whole = [&] {
    return count == n ? std::accumulate(s.masses.data(), s.masses.data() + n, uint64_t(0))
                      : row_mass(z, n, m, c, parts, s);
  };
  prune(f, p, count, whole, s);
}

// out[begin, begin + size) of the row in float32.
inline void to_floats(const void* logits, DType dtype, int64_t begin, int64_t size, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      std::copy_n(static_cast<const float*>(logits) + begin, size, out + begin);
      break;
    case DType::kFloat64:
      std::copy_n(static_cast<const double*>(logits) + begin, size, out + begin);
      break;
    default:
      row_kernels().widen[int(dtype)](static_cast<const uint16_t*>(logits) + begin, size,
                                      out + begin);
  }
}

// −inf where a bit of `allowed` is 0; begin is a multiple of 32.
inline void forbid(const uint32_t* allowed, int64_t begin, int64_t size, float* z) {
  const int64_t end = begin + size;
  for (int64_t i = begin; i < end; i += 32) {
    const uint32_t word = allowed[i / 32];
    if (word == 0xffffffffu) continue;
    for (int64_t j = i; j < std::min(i + 32, end); ++j) {
      if ((word >> (j - i) & 1) == 0) z[j] = -kInfinity;
    }
  }
}

// One sweep over a row: its float32 form z (−inf where a bit of `allowed` is 0; the row itself
// where it is that already), the maxima of its groups, and its statistics as row_stats() has them.
struct Sweep {
  const float* z;
  RowStats stats;
};
inline Sweep sweep(const void* logits, DType dtype, int64_t n, const uint32_t* allowed, double tau,
                   int parts, Scratch& s) {
  const bool copied = dtype != DType::kFloat32 || allowed != nullptr;
  if (copied) s.row.resize(n);
  const float* z = copied ? s.row.data() : static_cast<const float*>(logits);
  s.group_max.resize((n + kLanes - 1) / kLanes);
  s.tile_stats.resize(tile_count(n));
  in_parts(n, parts, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t size = std::min(kTile, end - i);
      if (copied) to_floats(logits, dtype, i, size, s.row.data());
      if (allowed != nullptr) forbid(allowed, i, size, s.row.data());
      const int64_t tile = i / kTile;
      tile_stats(z, DType::kFloat32, n, tau, false, tile, tile + 1, s.tile_stats.data());
      row_kernels().group_max(z + i, size, s.group_max.data() + i / kLanes);
    }
  });
  return {z, combine(s.tile_stats.data(), tile_count(n), DType::kFloat32, tau)};
}

// A row whose kept set is known: ids, logits and masses are in Scratch. Without a distribution
// (status kEmpty or kInvalid) it has no ids.
struct KeptRow {
  uint8_t status = 0;
  const float* z = nullptr;  // float32, without NaN and +inf that matter
  RowStats full;
  float m = 0.0f, c = 0.0f;
  double tau = 1.0;
  bool greedy = false;

  bool drawable() const { return (status & (kEmpty | kInvalid)) == 0; }
};

// A row as a distribution: NaN counts as −inf; +inf logits share the top equally, and nothing else
// has mass beside them.
inline KeptRow clean_row(const void* logits, DType dtype, int64_t n, const uint32_t* allowed,
                         double tau, int parts, Scratch& s) {
  KeptRow row;
  row.tau = tau;
  row.c = exponent_scale(tau);
  Sweep swept = sweep(logits, dtype, n, allowed, tau, parts, s);
  if (swept.stats.nan) row.status |= kNan;
  if (swept.stats.max == kInfinity) {
    row.status |= kInf;
    s.row.resize(n);
    for (int64_t i = 0; i < n; ++i) s.row[i] = swept.z[i] == kInfinity ? 0.0f : -kInfinity;
    swept = sweep(s.row.data(), DType::kFloat32, n, nullptr, tau, parts, s);
  }
  swept.stats.nan = false;
  if (swept.stats.max == -kInfinity) row.status |= kEmpty;
  row.z = swept.z;
  row.full = swept.stats;
  row.m = float(swept.stats.max);
  return row;
}

inline KeptRow keep_row(const void* logits, DType dtype, int64_t n, const uint32_t* allowed,
                        const Params& p, int parts, Scratch& s) {
  s.ids.clear();
  KeptRow row;
  if (!p.valid()) {
    row.status = kInvalid;
    return row;
  }
  const bool greedy = p.temperature == 0.0f;
  row = clean_row(logits, dtype, n, allowed, greedy ? 1.0 : p.temperature, parts, s);
  row.greedy = greedy;
  if (!row.drawable()) return row;
  if (greedy) {
    s.ids.assign(1, int32_t(std::find(row.z, row.z + n, row.m) - row.z));
    s.kept_logits.assign(1, row.m);
    s.masses.assign(1, 1);
  } else {
    keep(row.z, n, row.m, row.c, p, parts, s);
  }
  return row;
}

// The first position whose running mass exceeds u·(sum of all)/2^64.
inline int64_t draw(uint64_t u, const Buffer<uint64_t>& masses) {
  uint64_t left = high_product(u, std::accumulate(masses.begin(), masses.end(), uint64_t(0)));
  int64_t i = 0;
  while (left >= masses[i]) left -= masses[i++];
  return i;
}

// Log-prob of a kept id over the kept set and over the row of n: the scorer's bits.
struct LogProbs {
  double kept, full;
};
inline LogProbs log_probs(const KeptRow& row, int32_t id, int64_t n, const Scratch& s) {
  if (row.greedy) return {0.0, 0.0};
  const double at = row.z[id], full = log_prob(row.full, at, row.tau);
  const int64_t kept = int64_t(s.ids.size());
  if (kept == n) return {full, full};
  const RowStats stats = row_stats(s.kept_logits.data(), DType::kFloat32, kept, row.tau, false);
  return {log_prob(stats, at, row.tau), full};
}

}  // namespace pyrlk
