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
from . import schedule as _schedule
from .kept import kept_statistics, write_kept_gradient
from .row import (
    GROUP,
    entropy_of,
    load_temperature,
    load_token_logit,
    logprob_of,
    row_offset,
    scale_of,
    slopes,
    statistics,
    store_token_gradient,
    write_group_gradient,
    write_zeros,
)
from .schedule import Schedule, collect


@triton.jit(
    do_not_specialize=[
        "parts",
        "capacity",
        "inner",
        "stride_outer",
        "stride_inner",
        "vocab_size",
        "width",
    ],
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
    exchange_ptr,
    parts: tl.int32,
    capacity: tl.int64,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    vocab_size: tl.int32,
    width: tl.int32,
    temperature,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
):
    ENTROPY: tl.constexpr = entropy_ptr is not None
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
        tau = load_temperature(temperature_ptr, temperature, row)
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        c = scale_of(tau)
        if ids_ptr is not None:
            m, s, e, z_token = kept_statistics(
                z_ptr,
                ids_ptr,
                offsets_ptr,
                row,
                capacity,
                token,
                vocab_size,
                width,
                c,
                TAIL,
                "evict_first",
                BLOCK,
                KEPT,
            )
        elif exchange_ptr is not None:
            m, s, e, z_token = collect(exchange_ptr, row, parts, c, ENTROPY)
        else:
            z_token = load_token_logit(z_ptr, token, vocab_size)
            m, s, e = statistics(
                z_ptr, vocab_size, width, c, TAIL, ENTROPY, "evict_first", BLOCK, STAGES
            )
        tl.store(logprob_ptr + row, logprob_of(m, s, z_token, tau).to(tl.float32))
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy_of(s, e).to(tl.float32))
        tl.store(stats_ptr + row * 4, m)
        tl.store(stats_ptr + row * 4 + 1, s)
        tl.store(stats_ptr + row * 4 + 2, e)
        tl.store(stats_ptr + row * 4 + 3, z_token)


def token_logprobs_fwd(
    logits,
    tokens,
    kept,
    temperature,
    vocab_size,
    logprob,
    entropy,
    stats,
    schedule: Schedule | None = None,
):
    """Fill logprob, entropy (unless None) and stats, whose E is 0 where entropy is None.

    schedule None: `schedule.choose`; rows are taken one a program, or split.
    """
    r = _row.rows(logits)
    if r.count == 0:
        return
    width = logits.shape[-1]
    parts = _row.parts(width)
    temperature_ptr, number = _row.split_temperature(temperature)
    ids, offsets, capacity = _kept.split(kept)
    if schedule is None:
        schedule = _schedule.choose(r.count, parts, _schedule.processors(logits))
    exchange = None
    if schedule.kind != "rows" and kept is None:
        exchange = _schedule.group_statistics_fwd(
            logits, tokens, None, temperature, vocab_size, entropy is not None
        )
    token_logprobs_fwd_kernel[(r.count,)](
        logits,
        tokens,
        ids,
        offsets,
        temperature_ptr,
        logprob,
        entropy,
        stats,
        exchange,
        parts,
        capacity,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        vocab_size,
        width,
        number,
        ALIGN=r.align,
        TAIL=r.tail,
        BLOCK=_row.TILE,
        KEPT=_kept.TILE,
        STAGES=schedule.stages,
        **_row.launch(logits, registers=128 if kept is None else _kept.REGISTERS),
    )


@triton.jit(
    do_not_specialize=[
        "parts",
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
    parts: tl.int32,
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
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    # Programs of a row take its groups in turn.
    ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    row = (tl.program_id(0) // parts).to(tl.int64)
    begin = tl.program_id(0) % parts * GROUP * BLOCK
    step = parts * GROUP * BLOCK
    to_ptr = grad_ptr + row_offset(
        row, grad_inner, grad_stride_outer, grad_stride_inner, GRAD_ALIGN
    )
    token = tl.load(tokens_ptr + row)
    counted = token != -100
    g = tl.load(grad_logprob_ptr + row, mask=counted, other=0.0)
    h = tl.full([], 0.0, tl.float32)
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + row, mask=counted, other=0.0)
    if (g == 0.0) & (h == 0.0):
        for start in range(begin, width, step):
            write_zeros(to_ptr, start, start + 1, width, TAIL, BLOCK)
    else:
        tau = load_temperature(temperature_ptr, temperature, row)
        c = scale_of(tau)
        m = tl.load(stats_ptr + row * 4)
        s = tl.load(stats_ptr + row * 4 + 1)
        e = tl.load(stats_ptr + row * 4 + 2)
        z_token = tl.load(stats_ptr + row * 4 + 3)
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        k1, k2, at_token = slopes(m, s, e, z_token, c, tau, g, h, ENTROPY)
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
                c,
                k1,
                k2,
                at_token,
                ENTROPY,
                BLOCK,
                KEPT,
            )
        else:
            for start in range(begin, width, step):
                write_group_gradient(
                    z_ptr, to_ptr, start, vocab_size, width, m, c, k1, k2, TAIL, ENTROPY, BLOCK
                )
                store_token_gradient(
                    to_ptr, token, vocab_size, start, start + GROUP * BLOCK, at_token
                )


def token_logprobs_bwd(
    logits, tokens, kept, temperature, vocab_size, stats, grad_logprob, grad_entropy, grad
):
    """Fill grad, of the shape and dtype of logits, from the stats of the forward."""
    r, to = _row.rows(logits), _row.rows(grad)
    if r.count == 0:
        return
    width = grad.shape[-1]
    temperature_ptr, number = _row.split_temperature(temperature)
    ids, offsets, capacity = _kept.split(kept)
    # Few rows are shared: each program can write any group of a row whose statistics are known.
    shared = _row.parts(width) if kept is None else 1
    parts = max(1, min(shared, 4 * _schedule.processors(logits) // r.count))
    token_logprobs_bwd_kernel[(r.count * parts,)](
        logits,
        tokens,
        ids,
        offsets,
        temperature_ptr,
        stats,
        grad_logprob,
        grad_entropy,
        grad,
        parts,
        capacity,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        to.inner,
        to.stride_outer,
        to.stride_inner,
        vocab_size,
        width,
        number,
        ALIGN=r.align,
        GRAD_ALIGN=to.align,
        TAIL=r.tail,
        BLOCK=_row.TILE,
        KEPT=_kept.TILE,
        **_row.launch(logits),
    )
