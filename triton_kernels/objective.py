"""The scalar objective of one token and its derivative: pyrlk/objective.py's `token_loss`, by hand.

    ratio r = exp(log_ratio)          log_ratio = logp − old       A advantage       d = logp − ref
    clipped surrogate   ℓ = −min( min(r, delta)·A, clip(r, low, high)·A ), ≤ −dual_clip·A if A < 0
    REINFORCE           ℓ = −A·logp
    KL                  k1 = d, k2 = d²/2, k3 = e^−d + d − 1; times r with KL_IMPORTANCE

`token_loss` returns (ℓ + kl_coef·KL, g) with g its derivative by logp. Bounds are inclusive: a
ratio on a bound still has its gradient. Where A = 0 the policy term is 0, whatever the ratio is.
"""

import triton
import triton.language as tl


@triton.jit
def log_ratio_of(logprob, old):
    """logp − old in float64, from the unrounded log-prob; 0 where its float32 bits are old's.

    Without the exception the ratio of a token scored twice would miss 1 by the rounding of `old`.
    """
    same = logprob.to(tl.float32) == old
    return tl.where(same, 0.0, logprob - old.to(tl.float64))


@triton.jit
def token_loss(
    logprob,
    log_ratio,
    advantage,
    to_ref,
    low,
    high,
    delta,
    dual_clip,
    kl_coef,
    CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
):
    """(loss, g) in float32; logprob, log_ratio and to_ref = logp − ref are float64."""
    active = advantage != 0.0
    if CLIPPED:
        ratio = tl.exp(tl.where(active, log_ratio, 0.0)).to(tl.float32)
        # Comparisons instead of min and max: those drop a NaN.
        unclipped = tl.where(ratio > delta, delta, ratio) * advantage
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
        slope = ratio * advantage
        free = unclipped <= clipped
        surrogate = tl.where(free, unclipped, clipped)
        inside = tl.where(free, ratio <= delta, (ratio >= low) & (ratio <= high))
        bounded = (advantage < 0.0) & (surrogate < dual_clip * advantage)
        loss = -tl.where(bounded, dual_clip * advantage, surrogate)
        g = tl.where(active & inside & (bounded == 0), -slope, 0.0)
        g = tl.where(ratio == ratio, g, float("nan"))
    else:
        loss = -advantage * tl.where(active, logprob, 0.0).to(tl.float32)
        g = -advantage
    if KL > 0:
        # float64: k3 cancels near d = 0.
        if KL == 1:
            kl = to_ref
            kl_slope = tl.full([], 1.0, tl.float64)
        elif KL == 2:
            kl = to_ref * to_ref * 0.5
            kl_slope = to_ref
        else:
            inverse = tl.exp(-to_ref)
            kl = inverse + to_ref - 1.0
            kl_slope = -inverse + 1.0
        if KL_IMPORTANCE:
            importance = tl.exp(log_ratio)
            kl_slope = importance * (kl + kl_slope)
            kl = importance * kl
        loss += kl_coef * kl.to(tl.float32)
        g += kl_coef * kl_slope.to(tl.float32)
    return loss, g
