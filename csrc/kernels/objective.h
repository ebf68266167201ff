// The scalar policy objective of one token: ℓ and g = ∂ℓ/∂logp. The same function, under the same
// names, as pyrlk/objective.py (token_loss) and triton_kernels/objective.py.
//
//   ratio r = exp(logp − old);  ℓ = −min( min(r, delta)·A, clip(r, 1−eps_low, 1+eps_high)·A ),
//   bounded for A < 0 by −dual_clip·A;  REINFORCE: ℓ = −A·logp;  + kl_coef·KL(logp, ref)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace pyrlk {

struct Terms {
  bool clipped = true;  // the clipped surrogate, else REINFORCE
  double eps_low = 0.2, eps_high = 0.28;
  double dual_clip = std::numeric_limits<double>::infinity();
  double delta = std::numeric_limits<double>::infinity();
  int kl = 3;  // k1, k2 or k3
  double kl_coef = 0.0;
  bool kl_importance = false;
  double entropy_coef = 0.0;
};

struct TokenLoss {
  double loss, g;
};

inline TokenLoss token_loss(double logp, double log_ratio, double advantage, double ref,
                            const Terms& t) {
  TokenLoss out{0.0, 0.0};
  const double ratio = std::exp(log_ratio);
  if (advantage != 0.0) {
    if (t.clipped) {
      const double low = 1.0 - t.eps_low, high = 1.0 + t.eps_high;
      const double unclipped = std::min(ratio, t.delta) * advantage;
      const double clipped = std::min(std::max(ratio, low), high) * advantage;
      double surrogate = unclipped <= clipped ? unclipped : clipped;
      bool slope = unclipped <= clipped ? ratio <= t.delta : low <= ratio && ratio <= high;
      if (advantage < 0.0 && surrogate < t.dual_clip * advantage) {
        surrogate = t.dual_clip * advantage;
        slope = false;
      }
      if (ratio != ratio)
        surrogate = ratio;  // a NaN log-prob must show, whatever the comparisons say
      out.loss = -surrogate;
      out.g = slope ? -ratio * advantage : 0.0;
      if (ratio != ratio) out.g = ratio;
    } else {
      out.loss = -advantage * logp;
      out.g = -advantage;
    }
  }
  if (t.kl_coef != 0.0) {
    const double d = logp - ref;
    double kl, slope;
    if (t.kl == 1) {
      kl = d;
      slope = 1.0;
    } else if (t.kl == 2) {
      kl = 0.5 * d * d;
      slope = d;
    } else {
      kl = std::expm1(-d) + d;
      slope = -std::expm1(-d);
    }
    if (t.kl_importance) {
      slope = ratio * (kl + slope);
      kl = ratio * kl;
    }
    out.loss += t.kl_coef * kl;
    out.g += t.kl_coef * slope;
  }
  return out;
}

}  // namespace pyrlk
