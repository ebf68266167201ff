// One draw a row from the kept prefix of the order (logit descending, id ascending).
//
//   mass w_i = floor(2^44 · 2^y_i): integers, so that no order of summation changes a bit
//   top-p    the shortest prefix with mass ≥ max(1, ceil(P·Z / 2^32)), P = floor(p·2^32)
//   draw     u = 64 Philox bits; the first kept id, ascending, whose running mass exceeds u·Z/2^64
//
// No sort of V: a bound on the logits of the kept set (top-k: from group maxima; top-p: tokens
// below m − τ·ln(n/(1−p)) weigh less than 1−p together; min-p: its definition) leaves few
// candidates. A prefix is then found digit by digit of its last key, with one histogram of counts
// or masses a digit, so that rows where the bound leaves everything cost a few sweeps more.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels.h"
#include "per_token.h"

namespace pyrlk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

uint64_t uniform_bits(uint64_t seed, uint64_t position) {  // Philox4x32-10, stream 0
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
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

uint64_t high_product(uint64_t a, uint64_t b) {
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
}

// ceil(P·Z / 2^32) with P = floor(p·2^32), at least 1.
uint64_t needed_mass(float p, uint64_t total) {
  const uint64_t P = uint64_t(double(p) * 4294967296.0);
  const unsigned __int128 product = static_cast<unsigned __int128>(P) * total;
  return std::max<uint64_t>(1, uint64_t((product + 0xffffffffu) >> 32));
}

// Ascending in this key is the order of the logits, descending; −0 equals +0.
uint32_t order_key(float z) {
  const uint32_t u = bits_of(z + 0.0f);
  return ~(u & 0x80000000u ? ~u : u | 0x80000000u);
}

// A prefix of the order: the keys below `cut`, and of those at it the `ties` lowest ids.
struct Prefix {
  uint32_t cut = std::numeric_limits<uint32_t>::max();
  int64_t ties = std::numeric_limits<int64_t>::max();
};
Prefix shorter(Prefix a, Prefix b) {
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

// Buffers of one row at a time, reused from row to row.
struct Scratch {
  std::vector<float> row, group_max, sorted_max, kept_logits;
  std::vector<int32_t> ids;
  std::vector<uint32_t> keys, digit_keys;
  std::vector<uint64_t> masses, digit_masses, histogram, tiles;
  std::vector<RowStats> tile_stats;
};

// Parts worth a thread each: on busy cores a barrier costs more than a small region's work.
int useful_parts(int64_t elements, int parts) {
  constexpr int64_t kElementsAThread = 1 << 15;
  return int(std::clamp<int64_t>(elements / kElementsAThread, 1, parts));
}

// Calls body(begin, end, part) on `parts` ranges of whole tiles that make up [0, n), each by a
// thread.
template <class Body>
void in_parts(int64_t n, int parts, Body body) {
  const int64_t tiles = (n + kTile - 1) / kTile;
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
  for (int part = 0; part < parts; ++part) {
    const int64_t begin = tiles * part / parts * kTile;
    const int64_t end = std::min(n, tiles * (part + 1) / parts * kTile);
    if (begin < end) body(begin, end, part);
  }
}

// The shortest prefix of keys[0, n), in any order, whose mass reaches `need` ≥ 1; all if none does.
// A null mass counts 1 a key.
Prefix shortest_prefix(const uint32_t* keys, const uint64_t* mass, int64_t n, uint64_t need,
                       bool keep_ties, Scratch& s) {
  if (n == 0) return {};
  uint32_t low = keys[0], high = keys[0];
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  s.digit_keys.resize(n);
  s.digit_masses.resize(mass != nullptr ? n : 0);
  uint64_t before = 0;  // mass of the keys below low
  for (;;) {
    const int wanted = n < 2048 ? 8 : 11, width = high == low ? 0 : 32 - __builtin_clz(high - low);
    const int shift = std::max(0, width - wanted);
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
    if (shift == 0) {
      const uint32_t cut = low + digit;
      if (keep_ties) return {cut, Prefix{}.ties};
      const uint64_t each = mass != nullptr ? mass[std::find(keys, keys + n, cut) - keys] : 1;
      return {cut, int64_t((need - before + each - 1) / each)};
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool inside = (keys[i] - low) >> shift == digit;
      s.digit_keys[count] = keys[i];
      if (mass != nullptr) s.digit_masses[count] = mass[i];
      count += inside;
    }
    n = count;
    keys = s.digit_keys.data();
    if (mass != nullptr) mass = s.digit_masses.data();
    low += digit << shift;
    high = low + (1u << shift) - 1;
  }
}

// Mass of a prefix of keys[0, n).
uint64_t mass_of(const Prefix& prefix, const uint32_t* keys, const uint64_t* mass, int64_t n) {
  uint64_t below = 0, each = 0;
  int64_t tied = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] < prefix.cut) below += mass[i];
    if (keys[i] == prefix.cut) {
      ++tied;
      each = mass[i];
    }
  }
  return below + each * uint64_t(std::min(tied, prefix.ties));
}

// A float at or below x: thresholds only ever admit more candidates than needed.
float round_down(double x) {
  return std::nextafterf(float(std::max(x, -double(std::numeric_limits<float>::max()))),
                         -kInfinity);
}
// The least float at or above x.
float round_up(double x) {
  const float y = float(x);
  return y < x ? std::nextafterf(y, kInfinity) : y;
}

// Ids of z_i ≥ bound, ascending, into s.ids.
void select(const float* z, int64_t n, float bound, int parts, Scratch& s) {
  const auto above = std::count_if(s.group_max.begin(), s.group_max.end(),
                                   [&](float group) { return group >= bound; });
  parts = useful_parts(above * kLanes, parts);
  // A part writes where its range begins, and may write up to kLanes entries of no meaning more.
  s.ids.resize(n + parts * kLanes);
  std::vector<std::pair<int32_t*, int64_t>> found(parts, {s.ids.data(), 0});
  in_parts(n, parts, [&](int64_t begin, int64_t end, int part) {
    int32_t* out = s.ids.data() + begin + part * kLanes;
    const float* group_max = s.group_max.data() + begin / kLanes;
    const int64_t count = row_kernels().select(z + begin, end - begin, group_max, bound, out);
    for (int64_t i = 0; i < count; ++i) out[i] += int32_t(begin);
    found[part] = {out, count};
  });
  int64_t total = found[0].second;
  for (int part = 1; part < parts; ++part) {
    std::copy_n(found[part].first, found[part].second, s.ids.data() + total);
    total += found[part].second;
  }
  s.ids.resize(total);
}

// The kept set, ascending: ids into s.ids, logits into s.kept_logits; z is the row in float32
// without +inf.
void keep(const float* z, int64_t n, float m, float c, const Params& p, int parts, Scratch& s) {
  const RowKernels& ops = row_kernels();
  const int64_t groups = int64_t(s.group_max.size());
  const double tau = p.temperature;
  const bool top_k = p.top_k > 0 && p.top_k < n, top_p = p.top_p < 1.0f, min_p = p.min_p > 0.0f;
  const bool pool_is_top_k = top_k && !p.joint;
  const double floor = min_p ? m + tau * std::log(double(p.min_p)) : -double(kInfinity);
  float bound = -std::numeric_limits<float>::max();
  if (top_k && p.top_k <= groups) {  // k groups have a maximum ≥ the k-th largest of the maxima
    s.sorted_max = s.group_max;
    std::nth_element(s.sorted_max.begin(), s.sorted_max.begin() + (p.top_k - 1), s.sorted_max.end(),
                     std::greater<float>());
    bound = std::max(bound, s.sorted_max[p.top_k - 1]);
  }
  if (top_p && !pool_is_top_k) {
    const double tail = std::min(30.6, std::log(double(n) / (1.0 - double(p.top_p))) + 1e-4);
    bound = std::max(bound, round_down(m - tau * tail));
  }
  if (min_p && !(top_p && pool_is_top_k)) bound = std::max(bound, round_down(floor));
  select(z, n, bound, parts, s);

  const int64_t count = int64_t(s.ids.size());
  s.kept_logits.resize(count);
  for (int64_t i = 0; i < count; ++i) s.kept_logits[i] = z[s.ids[i]];
  if (!top_k && !top_p && !min_p) return;

  s.keys.resize(count);
  for (int64_t i = 0; i < count; ++i) s.keys[i] = order_key(s.kept_logits[i]);
  Prefix kept;
  if (top_k && count > p.top_k) {
    kept = shortest_prefix(s.keys.data(), nullptr, count, uint64_t(p.top_k), p.keep_ties, s);
  }
  if (top_p) {
    s.masses.resize(count);
    in_parts(count, useful_parts(count, parts), [&](int64_t begin, int64_t end, int) {
      ops.masses(s.kept_logits.data() + begin, end - begin, c, m, s.masses.data() + begin);
    });
    uint64_t total = 0;
    if (pool_is_top_k || count == n) {
      const Prefix pool = pool_is_top_k ? kept : Prefix{};
      total = mass_of(pool, s.keys.data(), s.masses.data(), count);
    } else {
      s.tiles.resize((n + kTile - 1) / kTile);
      in_parts(n, parts, [&](int64_t begin, int64_t end, int) {
        ops.tile_masses(z + begin, end - begin, c, m, s.tiles.data() + begin / kTile);
      });
      total = std::accumulate(s.tiles.begin(), s.tiles.end(), uint64_t(0));
    }
    kept = shorter(kept, shortest_prefix(s.keys.data(), s.masses.data(), count,
                                         needed_mass(p.top_p, total), p.keep_ties, s));
  }
  if (min_p) kept = shorter(kept, {order_key(round_up(floor)), Prefix{}.ties});

  int64_t size = 0, tied = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = s.keys[i];
    const bool stays = key < kept.cut || (key == kept.cut && tied < kept.ties);
    tied += key == kept.cut;
    s.ids[size] = s.ids[i];
    s.kept_logits[size] = s.kept_logits[i];
    size += stays;
  }
  s.ids.resize(size);
  s.kept_logits.resize(size);
}

// out[begin, begin + size) of the row in float32.
void to_floats(const void* logits, DType dtype, int64_t begin, int64_t size, float* out) {
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
void forbid(const uint32_t* allowed, int64_t begin, int64_t size, float* z) {
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
Sweep sweep(const void* logits, DType dtype, int64_t n, const uint32_t* allowed, double tau,
            int parts, Scratch& s) {
  const RowKernels& ops = row_kernels();
  const float c = exponent_scale(tau);
  const bool copied = dtype != DType::kFloat32 || allowed != nullptr;
  if (copied) s.row.resize(n);
  const float* z = copied ? s.row.data() : static_cast<const float*>(logits);
  s.group_max.resize((n + kLanes - 1) / kLanes);
  s.tile_stats.resize((n + kTile - 1) / kTile);
  in_parts(n, parts, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t size = std::min(kTile, end - i);
      if (copied) to_floats(logits, dtype, i, size, s.row.data());
      if (allowed != nullptr) forbid(allowed, i, size, s.row.data());
      ops.stats[0](z + i, size, c, false, &s.tile_stats[i / kTile]);
      ops.group_max(z + i, size, s.group_max.data() + i / kLanes);
    }
  });
  return {z, combine(s.tile_stats.data(), int64_t(s.tile_stats.size()), DType::kFloat32, tau)};
}

struct RowDraw {
  int64_t token = -1;
  double logprob = kNaN, full_logprob = kNaN;
  int32_t kept = 0;
  uint8_t status = 0;
};

RowDraw sample_row(const void* logits, DType dtype, int64_t n, const uint32_t* allowed,
                   const Params& p, uint64_t seed, uint64_t position, int parts, Scratch& s) {
  const RowKernels& ops = row_kernels();
  RowDraw draw;
  s.ids.clear();
  if (!p.valid()) {
    draw.status = kInvalid;
    return draw;
  }
  const bool greedy = p.temperature == 0.0f;
  const double tau = greedy ? 1.0 : p.temperature;
  auto [z, full] = sweep(logits, dtype, n, allowed, tau, parts, s);
  if (full.nan) draw.status |= kNan;
  if (full.max == kInfinity) {  // the +inf logits share the top equally; nothing else has mass
    draw.status |= kInf;
    s.row.resize(n);
    for (int64_t i = 0; i < n; ++i) s.row[i] = z[i] == kInfinity ? 0.0f : -kInfinity;
    const Sweep top = sweep(s.row.data(), DType::kFloat32, n, nullptr, tau, parts, s);
    z = top.z;
    full = top.stats;
  }
  full.nan = false;
  if (full.max == -kInfinity) {
    draw.status |= kEmpty;
    return draw;
  }
  const float m = float(full.max), c = exponent_scale(tau);
  if (greedy) {
    draw.token = std::find(z, z + n, m) - z;
    draw.logprob = draw.full_logprob = 0.0;
    draw.kept = 1;
    s.ids.assign(1, int32_t(draw.token));
    return draw;
  }

  keep(z, n, m, c, p, parts, s);
  const int64_t kept = int64_t(s.ids.size());
  s.tiles.resize((kept + kTile - 1) / kTile);
  uint64_t left = high_product(uniform_bits(seed, position),
                               ops.tile_masses(s.kept_logits.data(), kept, c, m, s.tiles.data()));
  int64_t tile = 0;
  while (left >= s.tiles[tile]) left -= s.tiles[tile++];
  const int64_t begin = tile * kTile, size = std::min(kTile, kept - begin);
  s.masses.resize(size);
  ops.masses(s.kept_logits.data() + begin, size, c, m, s.masses.data());
  int64_t i = 0;
  while (left >= s.masses[i]) left -= s.masses[i++];

  draw.token = s.ids[begin + i];
  draw.kept = int32_t(kept);
  const double at = z[draw.token];
  draw.full_logprob = log_prob(full, at, tau);
  draw.logprob = draw.full_logprob;
  if (kept < n) {
    draw.logprob =
        log_prob(row_stats(s.kept_logits.data(), DType::kFloat32, kept, tau, false), at, tau);
  }
  return draw;
}

}  // namespace

int64_t sample(const SampleArgs& a, int threads) {
  const Rows& z = a.logits;
  // Few rows are shared among the threads one after the other, many are dealt out to them.
  const int within = useful_parts(z.vocab, usable_threads(threads));
  const int parts = within > z.count ? within : 1;
  const int64_t words = (z.vocab + 31) / 32;
#pragma omp parallel num_threads(parts > 1 ? 1 : row_threads(z, threads))
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < z.count; ++b) {
      const Params p{a.temperature[b], a.top_p[b], a.min_p[b], a.top_k[b], a.joint, a.keep_ties};
      const uint32_t* allowed = a.allowed == nullptr ? nullptr : a.allowed + b * words;
      const RowDraw draw = sample_row(z.row(b), z.dtype, z.vocab, allowed, p, uint64_t(a.seed[b]),
                                      uint64_t(a.position[b]), parts, scratch);
      a.token[b] = draw.token;
      a.logprob[b] = float(draw.logprob);
      a.full_logprob[b] = float(draw.full_logprob);
      a.kept[b] = draw.kept;
      a.status[b] = draw.status;
      if (a.support != nullptr) a.support[b] = scratch.ids;
    }
  }
  for (int64_t b = 0; b < z.count; ++b) {
    if (a.status[b] & kInvalid) return b;
  }
  return -1;
}

}  // namespace pyrlk
