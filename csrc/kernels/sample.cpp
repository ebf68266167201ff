// One draw a row from the kept prefix of the order (logit descending, id ascending).
//
//   mass w_i = floor(2^44 · 2^y_i): integers, so that no order of summation changes a bit
//   top-p    the shortest prefix with mass ≥ max(1, ceil(P·Z / 2^32)), P = floor(p·2^32)
//   draw     u = 64 Philox bits; the first kept id, ascending, whose running mass exceeds u·Z /
//   2^64
//
// No sort of V: a bound on the logits of the kept set (top-k: from group maxima; top-p: tokens
// below m − τ·ln(n/(1−p)) weigh less than 1−p together; min-p: its definition) leaves few
// candidates.
#include <omp.h>

#include <algorithm>
#include <cmath>
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

// Ascending in this key is the total order: logit descending, then id ascending; −0 equals +0.
uint64_t order_key(float z, int32_t id) {
  uint32_t u = bits_of(z + 0.0f);
  u = u & 0x80000000u ? ~u : u | 0x80000000u;
  return uint64_t(~u) << 32 | uint32_t(id);
}

struct Candidate {
  uint64_t key, mass;
  bool operator<(const Candidate& other) const { return key < other.key; }
};

// Length of the shortest prefix (in order) of c[0, n) whose mass reaches `need`; reorders c so that
// this prefix comes first. All of c if its mass is short.
int64_t mass_prefix(Candidate* c, int64_t n, uint64_t need) {
  int64_t first = 0, last = n;
  uint64_t before = 0;
  while (last - first > 64) {
    const int64_t middle = first + (last - first) / 2;
    std::nth_element(c + first, c + middle, c + last);
    uint64_t half = 0;
    for (int64_t i = first; i < middle; ++i) half += c[i].mass;
    if (before + half >= need) {
      last = middle;
    } else {
      before += half;
      first = middle;
    }
  }
  std::sort(c + first, c + last);
  while (first < last) {
    before += c[first++].mass;
    if (before >= need) return first;
  }
  return last;
}

struct Params {
  float temperature, top_p, min_p;
  int64_t top_k;
  bool joint;
  bool valid() const {
    return temperature >= 0.0f && temperature < kInfinity && top_p >= 0.0f && top_p <= 1.0f &&
           min_p >= 0.0f && min_p <= 1.0f;
  }
};

// Buffers of one thread, reused from row to row.
struct Scratch {
  std::vector<float> row, group_max, sorted_max, kept_logits;
  std::vector<int32_t> ids;
  std::vector<uint64_t> masses, tiles;
  std::vector<Candidate> candidates;
};

// A float at or below x: thresholds only ever admit more candidates than needed.
float round_down(double x) {
  return std::nextafterf(float(std::max(x, -double(std::numeric_limits<float>::max()))),
                         -kInfinity);
}

// Ids of the kept set, ascending, into s.ids; z is the row in float32 without +inf.
void keep(const float* z, int64_t n, float m, float c, const Params& p, Scratch& s) {
  const RowKernels& ops = row_kernels();
  const int64_t groups = (n + kLanes - 1) / kLanes;
  s.group_max.resize(groups);
  s.ids.resize(n);
  ops.group_max(z, n, s.group_max.data());

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

  int64_t count = ops.select(z, n, s.group_max.data(), bound, s.ids.data());
  s.ids.resize(count);
  if (!top_k && !top_p && !min_p) return;

  s.candidates.resize(count);
  for (int64_t i = 0; i < count; ++i) s.candidates[i] = {order_key(z[s.ids[i]], s.ids[i]), 0};
  Candidate* first = s.candidates.data();
  if (top_p) {
    s.kept_logits.resize(count);
    s.masses.resize(count);
    for (int64_t i = 0; i < count; ++i) s.kept_logits[i] = z[s.ids[i]];
    ops.masses(s.kept_logits.data(), count, c, m, s.masses.data());
    for (int64_t i = 0; i < count; ++i) first[i].mass = s.masses[i];
  }
  if (top_k && count > p.top_k) {
    std::nth_element(first, first + p.top_k, first + count);
    count = p.top_k;
  }
  if (top_p) {
    uint64_t total = 0;
    if (pool_is_top_k) {
      for (int64_t i = 0; i < count; ++i) total += first[i].mass;
    } else {
      s.tiles.resize((n + kTile - 1) / kTile);
      total = ops.tile_masses(z, n, c, m, s.tiles.data());
    }
    count = mass_prefix(first, count, needed_mass(p.top_p, total));
  }
  if (min_p) {
    const auto inside = [&](const Candidate& x) { return z[uint32_t(x.key)] >= floor; };
    count = std::max<int64_t>(1, std::partition(first, first + count, inside) - first);
  }
  const uint64_t last = std::max_element(first, first + count)->key;
  const auto dropped = [&](int32_t id) { return order_key(z[id], id) > last; };
  s.ids.erase(std::remove_if(s.ids.begin(), s.ids.end(), dropped), s.ids.end());
}

struct RowDraw {
  int64_t token = -1;
  double logprob = kNaN, full_logprob = kNaN;
  int32_t kept = 0;
  uint8_t status = 0;
};

RowDraw sample_row(const void* logits, DType dtype, int64_t n, const Params& p, uint64_t seed,
                   uint64_t position, Scratch& s) {
  const RowKernels& ops = row_kernels();
  RowDraw draw;
  s.ids.clear();
  if (!p.valid()) {
    draw.status = kInvalid;
    return draw;
  }
  const float* z = static_cast<const float*>(logits);
  if (dtype != DType::kFloat32) {
    s.row.resize(n);
    if (dtype == DType::kFloat64) {
      std::copy_n(static_cast<const double*>(logits), n, s.row.data());
    } else {
      ops.widen[int(dtype)](logits, n, s.row.data());
    }
    z = s.row.data();
  }
  const bool greedy = p.temperature == 0.0f;
  const double tau = greedy ? 1.0 : p.temperature;
  RowStats full = row_stats(z, DType::kFloat32, n, tau, false);
  if (full.nan) draw.status |= kNan;
  if (full.max == kInfinity) {  // the +inf logits share the top equally; nothing else has mass
    draw.status |= kInf;
    s.row.resize(n);
    for (int64_t i = 0; i < n; ++i) s.row[i] = z[i] == kInfinity ? 0.0f : -kInfinity;
    z = s.row.data();
    full = row_stats(z, DType::kFloat32, n, tau, false);
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

  keep(z, n, m, c, p, s);
  const int64_t kept = int64_t(s.ids.size());
  s.kept_logits.resize(kept);
  for (int64_t i = 0; i < kept; ++i) s.kept_logits[i] = z[s.ids[i]];
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
#pragma omp parallel num_threads(row_threads(z, threads))
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < z.count; ++b) {
      const Params p{a.temperature[b], a.top_p[b], a.min_p[b], a.top_k[b], a.joint};
      const RowDraw draw = sample_row(z.row(b), z.dtype, z.vocab, p, uint64_t(a.seed[b]),
                                      uint64_t(a.position[b]), scratch);
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
