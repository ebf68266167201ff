// The fused policy loss: statistics → objective → gradient of one row while it sits in cache.
#include "../memory/threads.h"
#include "kernels.h"
#include "per_token.h"

namespace pyrlk {

int64_t policy_loss(const PolicyLossArgs& a, int threads) {
  const Rows& z = a.logits;
  const int64_t bad = first_bad_token(a.tokens, a.kept, a.weight, z);
  if (bad >= 0) return bad;
  const bool wide = z.dtype == DType::kFloat64, with_entropy = a.entropy != nullptr;
  for_rows(z, a.kept, threads, [&](Distribution& row, int64_t t) {
    const double weight = get(a.weight, t, wide, 0.0);
    TokenLoss token{0.0, 0.0};
    double lp = 0.0, h = 0.0;
    bool zero = true;
    if (weight != 0.0 && a.tokens[t] != kIgnored) {
      const double temperature = temperature_at(a.tau, t, wide);
      row.select(t, a.tokens[t]);
      const RowStats s = row.stats(temperature, with_entropy);
      lp = log_prob(s, row.at_action(), temperature);
      const double old = get(a.old_logprobs, t, wide, lp);
      // A token scored twice has the ratio 1, not 1 give or take the rounding of `old`.
      const bool same = old == lp || (!wide && old == double(float(lp)));
      token = token_loss(lp, same ? 0.0 : lp - old, get(a.advantages, t, wide, 0.0),
                         get(a.ref_logprobs, t, wide, 0.0), a.terms);
      if (with_entropy) {
        h = entropy(s);
        token.loss -= a.terms.entropy_coef == 0.0 ? 0.0 : a.terms.entropy_coef * h;
      }
      const double g = weight * token.g, slope_h = -weight * a.terms.entropy_coef;
      zero = g == 0.0 && slope_h == 0.0 && regular(s);
      if (a.grad != nullptr && !zero) {
        row.write_gradient(t, s, lp, g, slope_h, temperature, *a.grad);
      }
      if (!regular(s)) token.loss = std::numeric_limits<double>::quiet_NaN();
    }
    if (a.grad != nullptr && zero) row.fill(t, *a.grad, 0, 0.0f);
    if (!row.leads()) return;
    put(a.loss, t, token.loss, wide);
    put(a.logprob, t, lp, wide);
    if (with_entropy) put(a.entropy, t, h, wide);
  });
  return -1;
}

int64_t reinforce_grad(const Rows& z, const int64_t* tokens, const void* advantages,
                       Temperature tau, const Rows& out, int threads) {
  const KeptIds all{nullptr, nullptr};
  const int64_t bad = first_bad_token(tokens, all, nullptr, z);
  if (bad >= 0) return bad;
  const bool wide = z.dtype == DType::kFloat64;
  for_rows(z, all, threads, [&](Distribution& row, int64_t t) {
    const double advantage = get(advantages, t, wide, 0.0);
    if (tokens[t] == kIgnored || advantage == 0.0) {
      return row.fill(t, out, 0, 0.0f);
    }
    const double temperature = temperature_at(tau, t, wide);
    row.select(t, tokens[t]);
    const RowStats s = row.stats(temperature, false);
    const double lp = log_prob(s, row.at_action(), temperature);
    row.write_gradient(t, s, lp, -advantage, 0.0, temperature, out);
  });
  return -1;
}

namespace {

template <class T>
void scale_range(T* x, int64_t n, float factor, int threads) {
#pragma omp parallel for schedule(static) num_threads(usable_threads(threads))
  for (int64_t i = 0; i < n; ++i) from_float(to_float(x[i]) * factor, x + i);
}

}  // namespace

void scale(void* x, DType dtype, int64_t n, double factor, int threads) {
  if (factor == 1.0) return;
  switch (dtype) {
    case DType::kFloat32:
      return scale_range(static_cast<float*>(x), n, float(factor), threads);
    case DType::kFloat16:
      return scale_range(static_cast<Half*>(x), n, float(factor), threads);
    case DType::kBFloat16:
      return scale_range(static_cast<BFloat16*>(x), n, float(factor), threads);
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(x)[i] *= factor;
  }
}

}  // namespace pyrlk
