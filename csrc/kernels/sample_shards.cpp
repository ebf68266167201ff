// A draw from rows whose columns lie on several ranks: kept_row.h on each of them, and once on what
// they found.
//
//   rank r   candidates: a set that holds what is kept of its columns, whatever the others hold
//            (its own maximum is at most that of the row, its k-th largest logit at most the k-th)
//   all      the candidates of all ranks, ascending; masses relative to the maximum of all; the
//            kept prefix, the draw: every rank does the same
//
// Masses are integers: the sums over ranks are those of the row, and so is every choice. Two
// kinds of rows need more than candidates: where top-p weighs the whole row, its mass; where
// nothing is cut, the place of the draw.
#include "kept_row.h"

namespace pyrlk {
namespace {

Params row_params(const ShardArgs& a, int64_t b) {
  Params p{a.temperature[b], a.top_p[b], a.min_p[b], a.top_k[b], a.joint, a.keep_ties};
  // Argmax, the lowest id among ties, is the first token of the order.
  if (p.temperature == 0.0f) p = {1.0f, 1.0f, 0.0f, 1, false, false};
  return p;
}

// The bits of this rank's columns, from its first one on; ids beyond the words are forbidden.
const uint32_t* own_bits(const ShardArgs& a, int64_t b, std::vector<uint32_t>& words) {
  if (a.allowed == nullptr) return nullptr;
  const uint32_t* row = a.allowed + b * a.words;
  words.assign((a.logits.vocab + 31) / 32, 0);
  const int64_t skip = a.first / 32, shift = a.first % 32;
  for (int64_t i = 0; i < int64_t(words.size()); ++i) {
    const uint32_t low = skip + i < a.words ? row[skip + i] : 0;
    const uint32_t high = skip + i + 1 < a.words ? row[skip + i + 1] : 0;
    words[i] = shift == 0 ? low : low >> shift | high << (32 - shift);
  }
  return words.data();
}

KeptRow own_row(const ShardArgs& a, int64_t b, double tau, std::vector<uint32_t>& words,
                Scratch& s) {
  const uint32_t* allowed = own_bits(a, b, words);
  if (a.logits.vocab > 0) {
    return clean_row(a.logits.row(b), a.logits.dtype, a.logits.vocab, allowed, tau, 1, s);
  }
  KeptRow row;
  row.status = kEmpty;
  row.m = -kInfinity;
  return row;
}

// A rank without +inf has no part in a row that has one elsewhere.
bool has_part(const KeptRow& row, uint8_t whole) {
  return row.drawable() && ((whole & kInf) == 0 || (row.status & kInf) != 0);
}

}  // namespace

void shard_candidates(const ShardArgs& a, const int64_t* rows, int64_t count, Known known,
                      int64_t capacity, float* out, int threads) {
  const Rows& z = a.logits;
#pragma omp parallel num_threads(sharing(z, count, threads).teams)
  {
    Scratch s;
    std::vector<uint32_t> words;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = rows[i];
      float* to = out + i * (kShardHeader + 2 * capacity);
      std::fill_n(to, kShardHeader + 2 * capacity, 0.0f);
      to[0] = -kInfinity;
      const Params p = row_params(a, b);
      if (!p.valid()) continue;
      const KeptRow row = own_row(a, b, p.temperature, words, s);
      to[3] = float(row.status & (kNan | kInf));
      if (!has_part(row, known.max == nullptr ? 0 : known.status[b])) continue;
      const float m = known.max == nullptr ? row.m : known.max[b];
      Filters f(p, known.vocab, m);
      f.top_k = f.top_k && p.top_k < z.vocab;  // else all of these columns may be of the k
      int64_t found = select(row.z, z.vocab, candidate_bound(f, p, known.vocab, m, s), 1, s);
      if (f.top_k && found > p.top_k) {
        s.masses.resize(found + kSlack);  // moved, not read
        take_keys(found, s);
        keep_prefix(
            shortest_prefix(s.keys.data(), nullptr, found, uint64_t(p.top_k), p.keep_ties, s),
            found, s);
        found = int64_t(s.ids.size());
      }
      const int64_t sent = std::min(found, capacity);
      to[0] = row.m;
      to[1] = float(row.full.sum);
      to[2] = float(row.full.sum - double(to[1]));
      to[4] = float(found);
      std::copy_n(s.kept_logits.data(), sent, to + kShardHeader);
      for (int64_t j = 0; j < sent; ++j) {
        to[kShardHeader + capacity + j] = float(a.first + s.ids[j]);
      }
    }
  }
}

void shard_select(const ShardArgs& a, const SelectArgs& all, int threads) {
  const int64_t size = kShardHeader + 2 * all.capacity;
  const int teams = useful_parts(all.rows * all.ranks * all.capacity * 16, usable_threads(threads));
#pragma omp parallel num_threads(teams)
  {
    Scratch s;
    std::vector<RowStats> stats(all.ranks);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < all.rows; ++b) {
      if (all.row_mass != nullptr && all.state[b] != kNeedsMass) continue;
      const auto part = [&](int64_t r) { return all.parts + (r * all.rows + b) * size; };
      const Params p = row_params(a, b);
      const bool greedy = a.temperature[b] == 0.0f;
      uint8_t status = p.valid() ? 0 : kInvalid;
      for (int64_t r = 0; r < all.ranks; ++r) status |= uint8_t(part(r)[3]);
      s.ids.clear();
      s.kept_logits.clear();
      int64_t kept = 0;
      bool overflown = false;
      for (int64_t r = 0; r < all.ranks; ++r) {
        const float* from = part(r);
        stats[r] = {};
        const int64_t count = int64_t(from[4]);
        const bool beside_inf = (status & kInf) != 0 && (uint8_t(from[3]) & kInf) == 0;
        if (from[0] == -kInfinity || beside_inf) continue;
        stats[r].max = from[0];
        stats[r].sum = double(from[1]) + double(from[2]);
        kept += count;
        overflown = overflown || count > all.capacity;
        if (overflown) continue;
        s.kept_logits.insert(s.kept_logits.end(), from + kShardHeader, from + kShardHeader + count);
        const float* ids = from + kShardHeader + all.capacity;
        for (int64_t i = 0; i < count; ++i) s.ids.push_back(int32_t(ids[i]));
      }
      const double tau = p.temperature;
      const RowStats whole = combine(stats.data(), all.ranks, DType::kFloat32, tau);
      if (status != kInvalid && kept == 0) status |= kEmpty;
      const bool drawable = (status & (kEmpty | kInvalid)) == 0;
      const float m = drawable ? float(whole.max) : 0.0f;
      all.status[b] = status;
      all.state[b] = kDone;
      all.max[b] = m;
      all.log_sum[b] = drawable ? log_sum(whole) : 0.0;
      all.token[b] = -1;
      all.kept[b] = 0;
      all.logprob[b] = all.full_logprob[b] = float(kNaN);
      if (all.support != nullptr) all.support->set(b, nullptr, 0);
      if (!drawable) continue;
      const Filters f(p, all.vocab, m);
      if (overflown) {
        all.state[b] = f.any() || all.support != nullptr ? kOverflown : kUnfiltered;
        all.kept[b] = int32_t(kept);
        continue;
      }
      if (f.weighs_row() && all.row_mass == nullptr) {
        all.state[b] = kNeedsMass;
        continue;
      }
      s.ids.resize(kept + kSlack);
      s.kept_logits.resize(kept + kSlack);
      s.masses.resize(kept + kSlack);
      row_kernels().masses(s.kept_logits.data(), kept, exponent_scale(tau), m, s.masses.data());
      prune(f, p, kept, [&] { return all.row_mass[b]; }, s);
      const int64_t at = draw(uniform_bits(a.seed[b], a.position[b], kDraw), s.masses);
      all.token[b] = s.ids[at];
      all.kept[b] = int32_t(s.ids.size());
      if (greedy) {
        all.logprob[b] = all.full_logprob[b] = 0.0f;
      } else {
        const int64_t left = int64_t(s.ids.size());
        const double z = s.kept_logits[at], full = log_prob(whole, z, tau);
        all.full_logprob[b] = float(full);
        all.logprob[b] =
            float(left == all.vocab
                      ? full
                      : log_prob(row_stats(s.kept_logits.data(), DType::kFloat32, left, tau, false),
                                 z, tau));
      }
      if (all.support != nullptr) all.support->set(b, s.ids.data(), int64_t(s.ids.size()));
    }
  }
}

void shard_masses(const ShardArgs& a, const int64_t* rows, int64_t count, Known known,
                  uint64_t* mass, int threads) {
  const Rows& z = a.logits;
#pragma omp parallel num_threads(sharing(z, count, threads).teams)
  {
    Scratch s;
    std::vector<uint32_t> words;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = rows[i];
      const double tau = row_params(a, b).temperature;
      const KeptRow row = own_row(a, b, tau, words, s);
      const float m = known.max[b];
      mass[i] = has_part(row, known.status[b]) ? row_mass(row.z, z.vocab, m, row.c, 1, s) : 0;
    }
  }
}

void shard_draw(const ShardArgs& a, const int64_t* rows, int64_t count, const float* max,
                const uint64_t* masses, int64_t ranks, int64_t rank, int64_t* found, int threads) {
  const Rows& z = a.logits;
#pragma omp parallel num_threads(sharing(z, count, threads).teams)
  {
    Scratch s;
    std::vector<uint32_t> words;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = rows[i];
      found[2 * i] = found[2 * i + 1] = 0;
      uint64_t total = 0, before = 0;
      for (int64_t r = 0; r < ranks; ++r) {
        if (r < rank) before += masses[r * count + i];
        total += masses[r * count + i];
      }
      uint64_t left = high_product(uniform_bits(a.seed[b], a.position[b], kDraw), total);
      if (left < before || left - before >= masses[rank * count + i]) continue;
      left -= before;
      const KeptRow row = own_row(a, b, row_params(a, b).temperature, words, s);
      row_mass(row.z, z.vocab, max[b], row.c, 1, s);
      int64_t tile = 0;
      while (left >= s.tiles[tile]) left -= s.tiles[tile++];
      const int64_t begin = tile * kTile, size = std::min(kTile, z.vocab - begin);
      s.masses.resize(size);
      row_kernels().masses(row.z + begin, size, row.c, max[b], s.masses.data());
      int64_t at = 0;
      while (left >= s.masses[at]) left -= s.masses[at++];
      found[2 * i] = a.first + begin + at;
      found[2 * i + 1] = int64_t(bits_of(row.z[begin + at]));
    }
  }
}

}  // namespace pyrlk
