// One draw a row from its kept set, with both log-probs: kept_row.h, for every row of a batch.
#include "kept_row.h"

namespace pyrlk {

int64_t sample(const SampleArgs& a, int threads) {
  const Rows& z = a.logits;
  const Sharing share = sharing(z, z.count, threads);
  const int64_t words = (z.vocab + 31) / 32;
#pragma omp parallel num_threads(share.teams)
  {
    Scratch s;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < z.count; ++b) {
      const Params p{a.temperature[b], a.top_p[b], a.min_p[b], a.top_k[b], a.joint, a.keep_ties};
      const uint32_t* allowed = a.allowed == nullptr ? nullptr : a.allowed + b * words;
      const KeptRow row = keep_row(z.row(b), z.dtype, z.vocab, allowed, p, share.parts, s);
      int64_t token = -1;
      LogProbs logprob{kNaN, kNaN};
      if (row.drawable()) {
        token = s.ids[draw(uniform_bits(a.seed[b], a.position[b], kDraw), s.masses)];
        logprob = log_probs(row, int32_t(token), z.vocab, s);
      }
      a.token[b] = token;
      a.logprob[b] = float(logprob.kept);
      a.full_logprob[b] = float(logprob.full);
      a.kept[b] = int32_t(s.ids.size());
      a.status[b] = row.status;
      if (a.support != nullptr) a.support->set(b, s.ids.data(), int64_t(s.ids.size()));
    }
  }
  for (int64_t b = 0; b < z.count; ++b) {
    if (a.status[b] & kInvalid) return b;
  }
  return -1;
}

}  // namespace pyrlk
