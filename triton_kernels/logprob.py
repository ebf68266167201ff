"""Token log-probs and entropy, forward and backward, one row of logits a program.

    logp_t = log softmax(z_t/τ)[token_t]        H_t = −Σ π·log π
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ]

logits [..., V]; tokens int64 [T]; temperature a number or float32 [T]; logprob, entropy,
grad_logprob, grad_entropy float32 [T]; stats float32 [T, 4] = (m, s, E, z_a) of row.py.
Token −100: 0, and the row is never read. A token outside [0, vocab_size): NaN.
"""

import triton
import triton.language as tl

from . import row as _row
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
    do_not_specialize=["inner", "stride_outer", "stride_inner", "vocab_size"],
    do_not_specialize_on_alignment=["tokens_ptr", "temperature_ptr", "logprob_ptr", "entropy_ptr"],
)
def token_logprobs_fwd_kernel(
    logits_ptr,
    tokens_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    stats_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    vocab_size: tl.int32,
    temperature,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
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
        z_token = load_token_logit(z_ptr, token, vocab_size)
        m, s, e = statistics(z_ptr, vocab_size, scale_of(tau), BLOCK)
        tl.store(logprob_ptr + row, logprob_of(m, s, z_token, tau).to(tl.float32))
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy_of(s, e).to(tl.float32))
        tl.store(stats_ptr + row * 4, m)
        tl.store(stats_ptr + row * 4 + 1, s)
        tl.store(stats_ptr + row * 4 + 2, e)
        tl.store(stats_ptr + row * 4 + 3, z_token)


def token_logprobs_fwd(logits, tokens, temperature, vocab_size, logprob, entropy, stats):
    """Fill logprob, entropy (unless None) and stats."""
    r = _row.rows(logits)
    if r.count == 0:
        return
    temperature_ptr, number = _row.split_temperature(temperature)
    token_logprobs_fwd_kernel[(r.count,)](
        logits,
        tokens,
        temperature_ptr,
        logprob,
        entropy,
        stats,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        vocab_size,
        number,
        ALIGN=r.align,
        BLOCK=_row.TILE,
        **_row.LAUNCH,
    )


@triton.jit(
    do_not_specialize=[
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
        "temperature_ptr",
        "grad_logprob_ptr",
        "grad_entropy_ptr",
    ],
)
def token_logprobs_bwd_kernel(
    logits_ptr,
    tokens_ptr,
    temperature_ptr,
    stats_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_ptr,
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
        write_gradient(
            z_ptr, to_ptr, vocab_size, width, token, m, s, e, scale_of(tau), tau, g, h, BLOCK
        )


def token_logprobs_bwd(
    logits, tokens, temperature, vocab_size, stats, grad_logprob, grad_entropy, grad
):
    """Fill grad, of the shape and dtype of logits, from the stats of the forward."""
    r, to = _row.rows(logits), _row.rows(grad)
    if r.count == 0:
        return
    temperature_ptr, number = _row.split_temperature(temperature)
    token_logprobs_bwd_kernel[(r.count,)](
        logits,
        tokens,
        temperature_ptr,
        stats,
        grad_logprob,
        grad_entropy,
        grad,
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
        **_row.LAUNCH,
    )
