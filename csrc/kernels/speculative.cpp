// Draft verification: which tokens of a draft the target accepts, and the token after them.
//
//   accept    x at depth i iff u·q(x) < p(x)         p the truncated target, q the draft
//   residual  at the first rejection, a draw from max(p − q, 0) renormalised
//   bonus     after n acceptances, a draw from p
//
// With p = w/Z and q = v/Y in the integer masses of kept_row.h the first is exact: u·v·Z <
// 2^64·w·Y. Residual masses are max(w·Y − v·Z, 0) in units of 2^shift, the least that leave their
// sum below 2^62. A draft without logits is one token of mass 1.
#include "kept_row.h"

namespace pyrlk {
namespace {

using Wide = unsigned __int128;

// floor(u·x / 2^64) for x < 2^126.
Wide high_product(uint64_t u, Wide x) { return u * (x >> 64) + (Wide(u) * uint64_t(x) >> 64); }

// Masses v of some ids, and their total Y over the whole row; Y = 0 where the row has no
// distribution.
struct Draft {
  std::vector<uint64_t> masses;
  uint64_t total = 0;
};

void draft_masses(const Rows& z, int64_t t, const Buffer<int32_t>& ids, int parts, Scratch& s,
                  Draft& out) {
  const RowKernels& ops = row_kernels();
  const KeptRow row = clean_row(z.row(t), z.dtype, z.vocab, nullptr, 1.0, parts, s);
  out.total = 0;
  if (!row.drawable()) return;
  s.tiles.resize(tile_count(z.vocab));
  out.total = ops.tile_masses(row.z, z.vocab, row.c, row.m, s.tiles.data());
  s.kept_logits.resize(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) s.kept_logits[i] = row.z[ids[i]];
  out.masses.resize(ids.size());
  ops.masses(s.kept_logits.data(), int64_t(ids.size()), row.c, row.m, out.masses.data());
}

int bit_length(uint64_t x) { return 64 - __builtin_clzll(x); }

// Position in s.ids of a draw from the residual; from the target where nothing is left of it.
int64_t draw_residual(uint64_t Z, const Draft& draft, uint64_t u, Scratch& s) {
  const int shift = std::max(0, bit_length(Z) + bit_length(draft.total) - 62);
  s.digit_masses.resize(s.masses.size());
  uint64_t total = 0;
  for (size_t i = 0; i < s.masses.size(); ++i) {
    const Wide target = Wide(s.masses[i]) * draft.total, proposed = Wide(draft.masses[i]) * Z;
    s.digit_masses[i] = target > proposed ? uint64_t((target - proposed) >> shift) : 0;
    total += s.digit_masses[i];
  }
  return total > 0 ? draw(u, s.digit_masses) : draw(u, s.masses);
}

}  // namespace

int64_t verify_draft(const VerifyArgs& a, int threads) {
  const Rows& z = a.target;
  const int64_t depth = a.depth, rows = z.count / (depth + 1);
  const Sharing share = sharing(z, rows, threads);
#pragma omp parallel num_threads(share.teams)
  {
    Scratch s, other;
    Draft draft;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < rows; ++b) {
      const Params p{a.temperature[b], a.top_p[b], a.min_p[b], a.top_k[b], false, false};
      bool going = true;
      a.accepted[b] = 0;
      for (int64_t i = 0; i <= depth; ++i) {
        const int64_t t = b * (depth + 1) + i;
        a.token[t] = -1;
        a.logprob[t] = a.full_logprob[t] = 0.0f;
        a.status[t] = 0;
        if (!going) continue;
        const auto uniform = [&](Stream stream) {
          return uniform_bits(a.seed[b], uint64_t(a.position[b]) + uint64_t(i), stream);
        };
        const KeptRow row = keep_row(z.row(t), z.dtype, z.vocab, nullptr, p, share.parts, s);
        a.status[t] = row.status;
        bool known = row.drawable();
        int64_t at = 0;
        if (known && i == depth) {
          at = draw(uniform(kDraw), s.masses);
          going = false;
        } else if (known) {
          const int64_t kept = int64_t(s.ids.size()), x = a.draft_tokens[b * depth + i];
          const uint64_t Z = std::accumulate(s.masses.begin(), s.masses.end(), uint64_t(0));
          at = std::lower_bound(s.ids.begin(), s.ids.end(), x) - s.ids.begin();
          const bool inside = at < kept && s.ids[at] == x;
          if (a.draft != nullptr) {
            draft_masses(*a.draft, b * depth + i, s.ids, share.parts, other, draft);
          } else {
            draft.masses.assign(kept, 0);
            if (inside) draft.masses[at] = 1;
            draft.total = 1;
          }
          known = draft.total > 0;
          // A token outside the kept set has p = 0: refused whatever q is.
          const bool accepted = known && inside &&
                                high_product(uniform(kAccept), Wide(draft.masses[at]) * Z) <
                                    Wide(s.masses[at]) * draft.total;
          a.accepted[b] += accepted;
          going = accepted;
          if (known && !accepted) at = draw_residual(Z, draft, uniform(kResidual), s);
          if (!known) a.status[t] |= kInvalid;
        }
        if (!known) {
          a.logprob[t] = a.full_logprob[t] = float(kNaN);
          going = false;
          continue;
        }
        const LogProbs logprob = log_probs(row, s.ids[at], z.vocab, s);
        a.token[t] = s.ids[at];
        a.logprob[t] = float(logprob.kept);
        a.full_logprob[t] = float(logprob.full);
        if (a.support != nullptr) a.support->set(t, s.ids.data(), int64_t(s.ids.size()));
      }
    }
  }
  for (int64_t b = 0; b < rows; ++b) {
    const Params p{a.temperature[b], a.top_p[b], a.min_p[b], a.top_k[b], false, false};
    if (!p.valid()) return b;
  }
  return -1;
}

}  // namespace pyrlk
