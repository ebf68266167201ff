// logprob = log π(a), entropy H, and their gradient from (g, h): statistics, then one gradient
// sweep.
#include "kernels.h"
#include "per_token.h"

namespace pyrlk {

int64_t token_logprobs(const Rows& z, const int64_t* tokens, KeptIds kept, Temperature tau,
                       void* logprob, void* entropy_out, void* stats, int threads) {
  const int64_t bad = first_bad_token(tokens, kept, nullptr, z);
  if (bad >= 0) return bad;
  const bool wide = z.dtype == DType::kFloat64;
  for_rows(z, kept, threads, [&](Distribution& row, int64_t t) {
    RowStats s;
    double lp = 0.0, h = 0.0, at = 0.0;
    if (tokens[t] != kIgnored) {
      const double temperature = temperature_at(tau, t, wide);
      row.select(t, tokens[t]);
      s = row.stats(temperature, entropy_out != nullptr);
      at = row.at_action();
      lp = log_prob(s, at, temperature);
      if (entropy_out != nullptr) h = entropy(s);
      // A row of −inf keeps its zeros: it may be the shard of a row that goes on elsewhere.
      if (s.nan || s.max == std::numeric_limits<double>::infinity()) {
        s.sum = s.energy = std::numeric_limits<double>::quiet_NaN();
      }
    }
    if (!row.leads()) return;
    put(logprob, t, lp, wide);
    if (entropy_out != nullptr) put(entropy_out, t, h, wide);
    const double four[4] = {s.max, s.sum, s.energy, at};
    for (int k = 0; k < 4; ++k) put(stats, 4 * t + k, four[k], wide);
  });
  return -1;
}

void token_logprobs_backward(const Rows& z, const int64_t* tokens, KeptIds kept, Temperature tau,
                             const void* stats, const void* grad_logprob, const void* grad_entropy,
                             const Rows& grad, int threads) {
  const bool wide = z.dtype == DType::kFloat64;
  for_rows(z, kept, threads, [&](Distribution& row, int64_t t) {
    const double g = get(grad_logprob, t, wide, 0.0), h = get(grad_entropy, t, wide, 0.0);
    if (tokens[t] == kIgnored || (g == 0.0 && h == 0.0)) {
      return row.fill(t, grad, 0, 0.0f);
    }
    RowStats s;
    s.max = get(stats, 4 * t, wide, 0.0);
    s.sum = get(stats, 4 * t + 1, wide, 0.0);
    s.energy = get(stats, 4 * t + 2, wide, 0.0);
    s.nan = s.sum != s.sum;
    const double temperature = temperature_at(tau, t, wide);
    const double lp = log_prob(s, get(stats, 4 * t + 3, wide, 0.0), temperature);
    row.select(t, tokens[t]);
    row.write_gradient(t, s, lp, g, h, temperature, grad);
  });
}

}  // namespace pyrlk
