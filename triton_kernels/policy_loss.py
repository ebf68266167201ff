"""Fused policy loss: statistics, objective and gradient of one row of logits in one launch.

    ℓ_t = objective(log π(a_t), old_t, A_t) + kl_coef·KL_t − entropy_coef·H_t       (unweighted)
    grad_t = weight_t·(1/τ)·[ g·(e_a − π) − h·π·(log π + H) ], g = ∂ℓ/∂log π(a), h = −entropy_coef

logits [..., V]; tokens int64 [T]; old_logprobs, advantages, weight, ref_logprobs, loss, logprob,
entropy float32 [T]; grad like logits, or logits itself. Where weight is 0 the row is never read,
its outputs and its gradient are 0, and all else on it may be NaN. old_logprobs None: ratio 1.
With kept = (ids int32 [N], offsets int64 [T + 1]) π is over the kept set of each token: kept.py.
"""

import math

import triton
import triton.language as tl

from . import kept as _kept
from . import row as _row
from .kept import kept_statistics, write_kept_gradient
from .objective import log_ratio_of, token_loss
from .row import (
    entropy_of,
    load_tile,
    load_token_logit,
    logprob_of,
    row_offset,
    scale_of,
    statistics,
    store_tile,
    write_gradient,
    write_zeros,
)

_LENGTHS = [
    "capacity",
    "inner",
    "stride_outer",
    "stride_inner",
    "grad_inner",
    "grad_stride_outer",
    "grad_stride_inner",
    "vocab_size",
    "width",
]
_PER_TOKEN = [
    "tokens_ptr",
    "ids_ptr",
    "offsets_ptr",
    "old_logprobs_ptr",
    "advantages_ptr",
    "weight_ptr",
    "ref_logprobs_ptr",
    "temperature_ptr",
    "loss_ptr",
    "logprob_ptr",
    "entropy_ptr",
]


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_PER_TOKEN)
def policy_loss_fwd_kernel(
    logits_ptr,
    tokens_ptr,
    ids_ptr,
    offsets_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    weight_ptr,
    ref_logprobs_ptr,
    temperature_ptr,
    loss_ptr,
    logprob_ptr,
    entropy_ptr,
    grad_ptr,
    capacity: tl.int64,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    grad_inner: tl.int64,
    grad_stride_outer: tl.int64,
    grad_stride_inner: tl.int64,
    vocab_size: tl.int32,
    width: tl.int32,
    temperature,
    low,
    high,
    delta,
    dual_clip,
    kl_coef,
    entropy_coef,
    CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    weight = tl.load(weight_ptr + row)
    counted = (weight != 0.0) & (token != -100)
    tau = tl.full([], 1.0, tl.float32)
    m = tl.full([], 0.0, tl.float32)
    s = tl.full([], 1.0, tl.float32)
    e = tl.full([], 0.0, tl.float32)
    loss = tl.full([], 0.0, tl.float32)
    logprob = tl.full([], 0.0, tl.float64)
    entropy = tl.full([], 0.0, tl.float64)
    g = tl.full([], 0.0, tl.float32)
    h = tl.full([], 0.0, tl.float32)
    z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
    if counted:
        if temperature_ptr is not None:
            tau = tl.load(temperature_ptr + row)
        else:
            tau = tau * temperature
        c = scale_of(tau)
        if ids_ptr is not None:
            m, s, e, z_token = kept_statistics(
                z_ptr, ids_ptr, offsets_ptr, row, capacity, token, vocab_size, c, BLOCK, KEPT
            )
        else:
            # Before the statistics, whose reductions are barriers: in place, another warp may soon
            # overwrite z_a.
            z_token = load_token_logit(z_ptr, token, vocab_size)
            m, s, e = statistics(z_ptr, vocab_size, c, BLOCK)
        logprob = logprob_of(m, s, z_token, tau)
        log_ratio = tl.full([], 0.0, tl.float64)
        if old_logprobs_ptr is not None:
            log_ratio = log_ratio_of(logprob, tl.load(old_logprobs_ptr + row))
        else:
            # On-policy the ratio is 1, and NaN where the row is.
            log_ratio = logprob - logprob
            log_ratio = tl.where(logprob == float("-inf"), 0.0, log_ratio)
        to_ref = log_ratio
        if KL > 0:
            to_ref = logprob - tl.load(ref_logprobs_ptr + row).to(tl.float64)
        advantage = tl.load(advantages_ptr + row)
        loss, g = token_loss(
            logprob,
            log_ratio,
            advantage,
            to_ref,
            low,
            high,
            delta,
            dual_clip,
            kl_coef,
            CLIPPED,
            KL,
            KL_IMPORTANCE,
        )
        entropy = entropy_of(s, e)
        if ENTROPY_BONUS:
            loss -= entropy_coef * entropy.to(tl.float32)
            h -= entropy_coef
    tl.store(loss_ptr + row, loss)
    tl.store(logprob_ptr + row, logprob.to(tl.float32))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy.to(tl.float32))
    if grad_ptr is not None:
        to_ptr = grad_ptr + row_offset(
            row, grad_inner, grad_stride_outer, grad_stride_inner, GRAD_ALIGN
        )
        if (g == 0.0) & (h == 0.0):
            write_zeros(to_ptr, width, BLOCK)
        elif ids_ptr is not None:
            write_kept_gradient(
                z_ptr,
                to_ptr,
                ids_ptr,
                offsets_ptr,
                row,
                capacity,
                vocab_size,
                width,
                token,
                m,
                s,
                e,
                scale_of(tau),
                tau,
                weight * g,
                weight * h,
                BLOCK,
                KEPT,
            )
        else:
            write_gradient(
                z_ptr,
                to_ptr,
                vocab_size,
                width,
                token,
                m,
                s,
                e,
                scale_of(tau),
                tau,
                weight * g,
                weight * h,
                BLOCK,
            )


def policy_loss_fwd(
    logits,
    tokens,
    kept,
    old_logprobs,
    advantages,
    weight,
    ref_logprobs,
    temperature,
    vocab_size,
    terms,
    loss,
    logprob,
    entropy,
    grad,
):
    """Fill loss, logprob, entropy (unless None) and grad (unless None; may be logits itself).

    terms: the fields of pyrlk.objective.Terms; all run-time values except the choice of formula.
    """
    r = _row.rows(logits)
    to = r if grad is None else _row.rows(grad)
    if r.count == 0:
        return
    temperature_ptr, number = _row.split_temperature(temperature)
    ids, offsets, capacity = _kept.split(kept)
    policy_loss_fwd_kernel[(r.count,)](
        logits,
        tokens,
        ids,
        offsets,
        old_logprobs,
        advantages,
        weight,
        ref_logprobs,
        temperature_ptr,
        loss,
        logprob,
        entropy,
        grad,
        capacity,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        to.inner,
        to.stride_outer,
        to.stride_inner,
        vocab_size,
        logits.shape[-1],
        number,
        1.0 - terms.eps_low,
        1.0 + terms.eps_high,
        float(terms.delta),
        float(terms.dual_clip),
        float(terms.kl_coef),
        float(terms.entropy_coef),
        CLIPPED=bool(terms.clipped),
        KL=int(terms.kl) if terms.kl_coef != 0 else 0,
        KL_IMPORTANCE=bool(terms.kl_importance),
        ENTROPY_BONUS=terms.entropy_coef != 0,
        ALIGN=r.align,
        GRAD_ALIGN=to.align,
        BLOCK=_row.TILE,
        KEPT=_kept.TILE,
        **_row.LAUNCH,
    )


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_PER_TOKEN)
def reinforce_grad_fwd_kernel(
    logits_ptr,
    tokens_ptr,
    advantages_ptr,
    temperature_ptr,
    grad_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    grad_inner: tl.int64,
    grad_stride_outer: tl.int64,
    grad_stride_inner: tl.int64,
    vocab_size: tl.int32,
    temperature,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    to_ptr = grad_ptr + row_offset(
        row, grad_inner, grad_stride_outer, grad_stride_inner, GRAD_ALIGN
    )
    token = tl.load(tokens_ptr + row)
    advantage = tl.load(advantages_ptr + row, mask=token != -100, other=0.0)
    if advantage == 0.0:
        write_zeros(to_ptr, vocab_size, BLOCK)
    else:
        if temperature_ptr is not None:
            tau = tl.load(temperature_ptr + row)
        else:
            tau = tl.full([], 1.0, tl.float32) * temperature
        c = scale_of(tau)
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        m, s, e = statistics(z_ptr, vocab_size, c, BLOCK)
        h = tl.full([], 0.0, tl.float32)
        write_gradient(
            z_ptr, to_ptr, vocab_size, vocab_size, token, m, s, e, c, tau, -advantage, h, BLOCK
        )


def reinforce_grad(logits, tokens, advantages, temperature, out):
    """out = A·(π − e_a)/τ, zeros where the token is −100 or A is 0; out may be logits itself."""
    r, to = _row.rows(logits), _row.rows(out)
    if r.count == 0:
        return
    temperature_ptr, number = _row.split_temperature(temperature)
    reinforce_grad_fwd_kernel[(r.count,)](
        logits,
        tokens,
        advantages,
        temperature_ptr,
        out,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        to.inner,
        to.stride_outer,
        to.stride_inner,
        logits.shape[-1],
        number,
        ALIGN=r.align,
        GRAD_ALIGN=to.align,
        BLOCK=_row.TILE,
        **_row.LAUNCH,
    )


@triton.jit(
    do_not_specialize=["inner", "stride_outer", "stride_inner", "width"],
    do_not_specialize_on_alignment=["scale_ptr"],
)
def scale_fwd_kernel(
    x_ptr,
    scale_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    width: tl.int32,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        row = tl.program_id(0).to(tl.int64)
        at_ptr = x_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        for start in range(0, width, BLOCK):
            x = load_tile(at_ptr, start, width, BLOCK)
            store_tile(at_ptr, start, x * scale, width, BLOCK)


def scale_(x, scale):
    """x *= scale, a 0-d tensor on the device; x is not touched where scale is 1."""
    r = _row.rows(x)
    if math.prod(x.shape) == 0:
        return
    scale_fwd_kernel[(r.count,)](
        x,
        scale,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        x.shape[-1],
        ALIGN=r.align,
        BLOCK=_row.TILE,
        **_row.LAUNCH,
    )
