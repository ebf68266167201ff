"""Token log-probs and entropy, forward and backward, one row of logits a program.

    logp_t = log softmax(z_t/τ)[token_t]        H_t = −Σ π·log π
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ]

logits [..., V]; tokens int64 [T]; temperature a number or float32 [T]; logprob, entropy,
grad_logprob, grad_entropy float32 [T]; stats float32 [T, 4] = (m, s, E, z_a) of row.py.
Token −100: 0, and the row is never read. A token outside [0, vocab_size): NaN. With kept =
(ids int32 [N], offsets int64 [T + 1]) all of it is over the kept set of each token: kept.py.
"""

import triton
import triton.language as tl

from . import kept as _kept
from . import row as _row
from .kept import kept_statistics, write_kept_gradient
from .row import (
    entropy_of,
    load_token_logit,
    logprob_of,
    row_offset,
    scale_of,
    statistics,
    write_gradient,
    write_zeros,
)


@triton.jit(
    do_not_specialize=["capacity", "inner", "stride_outer", "stride_inner", "vocab_size"],
    do_not_specialize_on_alignment=[
        "tokens_ptr",
        "ids_ptr",
        "offsets_ptr",
        "temperature_ptr",
        "logprob_ptr",
        "entropy_ptr",
    ],
)
def token_logprobs_fwd_kernel(
    logits_ptr,
    tokens_ptr,
    ids_ptr,
    offsets_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    stats_ptr,
    capacity: tl.int64,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    vocab_size: tl.int32,
    temperature,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    if token == -100:
        tl.store(logprob_ptr + row, 0.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, 0.0)
        tl.store(stats_ptr + row * 4, 0.0)
        tl.store(stats_ptr + row * 4 + 1, 1.0)
        tl.store(stats_ptr + row * 4 + 2, 0.0)
        tl.store(stats_ptr + row * 4 + 3, 0.0)
    else:
        if temperature_ptr is not None:
            tau = tl.load(temperature_ptr + row)
        else:
            tau = tl.full([], 1.0, tl.float32) * temperature
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        c = scale_of(tau)
        if ids_ptr is not None:
            m, s, e, z_token = kept_statistics(
                z_ptr, ids_ptr, offsets_ptr, row, capacity, token, vocab_size, c, BLOCK, KEPT
            )
        else:
            z_token = load_token_logit(z_ptr, token, vocab_size)
            m, s, e = statistics(z_ptr, vocab_size, c, BLOCK)
        tl.store(logprob_ptr + row, logprob_of(m, s, z_token, tau).to(tl.float32))
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy_of(s, e).to(tl.float32))
        tl.store(stats_ptr + row * 4, m)
        tl.store(stats_ptr + row * 4 + 1, s)
        tl.store(stats_ptr + row * 4 + 2, e)
        tl.store(stats_ptr + row * 4 + 3, z_token)


def token_logprobs_fwd(logits, tokens, kept, temperature, vocab_size, logprob, entropy, stats):
    """Fill logprob, entropy (unless None) and stats."""
    r = _row.rows(logits)
    if r.count == 0:
        return
    temperature_ptr, number = _row.split_temperature(temperature)
    ids, offsets, capacity = _kept.split(kept)
    token_logprobs_fwd_kernel[(r.count,)](
        logits,
        tokens,
        ids,
        offsets,
        temperature_ptr,
        logprob,
        entropy,
        stats,
        capacity,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        vocab_size,
        number,
        ALIGN=r.align,
        BLOCK=_row.TILE,
        KEPT=_kept.TILE,
        **_row.LAUNCH,
    )


@triton.jit(
    do_not_specialize=[
        "capacity",
        "inner",
        "stride_outer",
        "stride_inner",
        "grad_inner",
        "grad_stride_outer",
        "grad_stride_inner",
        "vocab_size",
        "width",
    ],
    do_not_specialize_on_alignment=[
        "tokens_ptr",
        "ids_ptr",
        "offsets_ptr",
        "temperature_ptr",
        "grad_logprob_ptr",
        "grad_entropy_ptr",
    ],
)
def token_logprobs_bwd_kernel(
    logits_ptr,
    tokens_ptr,
    ids_ptr,
    offsets_ptr,
    temperature_ptr,
    stats_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
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
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    to_ptr = grad_ptr + row_offset(
        row, grad_inner, grad_stride_outer, grad_stride_inner, GRAD_ALIGN
    )
    token = tl.load(tokens_ptr + row)
    counted = token != -100
    g = tl.load(grad_logprob_ptr + row, mask=counted, other=0.0)
    h = tl.full([], 0.0, tl.float32)
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + row, mask=counted, other=0.0)
    if (g == 0.0) & (h == 0.0):
        write_zeros(to_ptr, width, BLOCK)
    else:
        if temperature_ptr is not None:
            tau = tl.load(temperature_ptr + row)
        else:
            tau = tl.full([], 1.0, tl.float32) * temperature
        m = tl.load(stats_ptr + row * 4)
        s = tl.load(stats_ptr + row * 4 + 1)
        e = tl.load(stats_ptr + row * 4 + 2)
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        c = scale_of(tau)
        if ids_ptr is not None:
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
                c,
                tau,
                g,
                h,
                BLOCK,
                KEPT,
            )
        else:
            write_gradient(z_ptr, to_ptr, vocab_size, width, token, m, s, e, c, tau, g, h, BLOCK)


def token_logprobs_bwd(
    logits, tokens, kept, temperature, vocab_size, stats, grad_logprob, grad_entropy, grad
):
    """Fill grad, of the shape and dtype of logits, from the stats of the forward."""
    r, to = _row.rows(logits), _row.rows(grad)
    if r.count == 0:
        return
    temperature_ptr, number = _row.split_temperature(temperature)
    ids, offsets, capacity = _kept.split(kept)
    token_logprobs_bwd_kernel[(r.count,)](
        logits,
        tokens,
        ids,
        offsets,
        temperature_ptr,
        stats,
        grad_logprob,
        grad_entropy,
        grad,
        capacity,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        to.inner,
        to.stride_outer,
        to.stride_inner,
        vocab_size,
        grad.shape[-1],
        number,
        ALIGN=r.align,
        GRAD_ALIGN=to.align,
        BLOCK=_row.TILE,
        KEPT=_kept.TILE,
        **_row.LAUNCH,
    )
