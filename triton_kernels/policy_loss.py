"""Fused policy loss: statistics, objective and gradient of one row of logits in one launch.

    ℓ_t = objective(log π(a_t), old_t, A_t) + kl_coef·KL_t − entropy_coef·H_t       (unweighted)
    grad_t = weight_t·(1/τ)·[ g·(e_a − π) − h·π·(log π + H) ], g = ∂ℓ/∂log π(a), h = −entropy_coef

logits [..., V]; tokens int64 [T]; old_logprobs, advantages, weight, ref_logprobs, loss, logprob,
entropy float32 [T]; grad like logits, or logits itself. Where weight is 0 the row is never read,
its outputs and its gradient are 0, and all else on it may be NaN. old_logprobs None: ratio 1.
With kept = (ids int32 [N], offsets int64 [T + 1]) π is over the kept set of each token: kept.py.
"""

import math
import types

import torch
import triton
import triton.language as tl

from . import kept as _kept
from . import row as _row
from . import schedule as _schedule
from .kept import kept_statistics, write_kept_gradient
from .objective import log_ratio_of, token_loss
from .row import (
    GROUP,
    columns,
    entropy_of,
    group_statistics,
    load_group,
    load_group_statistics,
    load_temperature,
    load_token_logit,
    logprob_of,
    row_offset,
    scale_of,
    slopes,
    statistics,
    store_group,
    store_group_gradient,
    store_token_gradient,
    write_gradient,
    write_group_gradient,
    write_zeros,
)
from .schedule import Schedule, collect, meet, publish

_LENGTHS = [
    "rows",
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
    exchange_ptr,
    arrived_ptr,
    rows: tl.int32,
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
    low,
    high,
    delta,
    dual_clip,
    kl_coef,
    entropy_coef,
    CLIPPED: tl.constexpr,
    KL: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    SCHEDULE: tl.constexpr,
    STAGES: tl.constexpr,
):
    EVICT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    for item in range(tl.program_id(0), rows * parts, tl.num_programs(0)):
        row = (item // parts).to(tl.int64)
        start = item % parts * GROUP * BLOCK
        token = tl.load(tokens_ptr + row)
        weight = tl.load(weight_ptr + row)
        counted = (weight != 0.0) & (token != -100)
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        m = tl.full([], 0.0, tl.float32)
        s = tl.full([], 1.0, tl.float32)
        e = tl.full([], 0.0, tl.float32)
        z_token = tl.full([], 0.0, tl.float32)
        tau = tl.full([], 1.0, tl.float32)
        c = tl.full([], 1.0, tl.float32)
        loss = tl.full([], 0.0, tl.float32)
        logprob = tl.full([], 0.0, tl.float64)
        entropy = tl.full([], 0.0, tl.float64)
        g = tl.full([], 0.0, tl.float32)
        h = tl.full([], 0.0, tl.float32)
        # What a program keeps from its first read to its write: a group without a mask.
        whole = False
        if SCHEDULE == "cooperative":
            whole = start + GROUP * BLOCK <= vocab_size
            z = tl.zeros_like(columns(z_ptr, start, BLOCK)).to(logits_ptr.dtype.element_ty)
        if counted:
            tau = load_temperature(temperature_ptr, temperature, row)
            c = scale_of(tau)
            # In place z_a is read before the statistics, whose reductions are barriers: another
            # warp, or another program of the row, may soon overwrite it.
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
                    EVICT,
                    BLOCK,
                    KEPT,
                )
            elif SCHEDULE == "rows":
                z_token = load_token_logit(z_ptr, token, vocab_size)
                m, s, e = statistics(
                    z_ptr, vocab_size, width, c, TAIL, ENTROPY, EVICT, BLOCK, STAGES
                )
            else:
                if SCHEDULE == "cooperative":
                    z_token = load_token_logit(z_ptr, token, vocab_size)
                    if whole:
                        z = load_group(
                            z_ptr, start, vocab_size, width, TAIL, "evict_first", True, BLOCK
                        )
                        tile_m, tile_s, tile_e = group_statistics(z, c, ENTROPY)
                    else:
                        tile_m, tile_s, tile_e = load_group_statistics(
                            z_ptr, start, vocab_size, width, c, TAIL, ENTROPY, EVICT, BLOCK
                        )
                    group = row * parts + item % parts
                    publish(exchange_ptr, group, tile_m, tile_s, tile_e, z_token)
                    meet(arrived_ptr, row, parts)
                m, s, e, z_token = collect(exchange_ptr, row, parts, c, ENTROPY)
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
            advantage = tl.full([], 1.0, tl.float32)
            if advantages_ptr is not None:
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
            if ENTROPY:
                entropy = entropy_of(s, e)
            if ENTROPY_BONUS:
                loss -= entropy_coef * entropy.to(tl.float32)
                h -= entropy_coef
        if start == 0:
            if loss_ptr is not None:
                tl.store(loss_ptr + row, loss)
            if logprob_ptr is not None:
                tl.store(logprob_ptr + row, logprob.to(tl.float32))
            if entropy_ptr is not None:
                tl.store(entropy_ptr + row, entropy.to(tl.float32))
        if grad_ptr is not None:
            to_ptr = grad_ptr + row_offset(
                row, grad_inner, grad_stride_outer, grad_stride_inner, GRAD_ALIGN
            )
            end = width
            if SCHEDULE != "rows":
                end = tl.minimum(start + GROUP * BLOCK, width)
            if (g == 0.0) & (h == 0.0):
                write_zeros(to_ptr, start, end, width, TAIL, BLOCK)
            else:
                k1, k2, at_token = slopes(
                    m, s, e, z_token, c, tau, weight * g, weight * h, ENTROPY_BONUS
                )
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
                        ENTROPY_BONUS,
                        BLOCK,
                        KEPT,
                    )
                elif SCHEDULE == "rows":
                    write_gradient(
                        z_ptr,
                        to_ptr,
                        vocab_size,
                        width,
                        token,
                        m,
                        c,
                        k1,
                        k2,
                        at_token,
                        TAIL,
                        ENTROPY_BONUS,
                        BLOCK,
                    )
                else:
                    if SCHEDULE == "cooperative" and whole:
                        store_group_gradient(
                            to_ptr,
                            z,
                            start,
                            vocab_size,
                            width,
                            m,
                            c,
                            k1,
                            k2,
                            TAIL,
                            ENTROPY_BONUS,
                            True,
                            BLOCK,
                        )
                    else:
                        write_group_gradient(
                            z_ptr,
                            to_ptr,
                            start,
                            vocab_size,
                            width,
                            m,
                            c,
                            k1,
                            k2,
                            TAIL,
                            ENTROPY_BONUS,
                            BLOCK,
                        )
                    store_token_gradient(to_ptr, token, vocab_size, start, end, at_token)


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
    schedule: Schedule | None = None,
):
    """Fill loss, logprob, entropy and grad (unless None; grad may be logits itself).

    terms: the fields of pyrlk.objective.Terms; all run-time values except the choice of formula.
    advantages None: 1. schedule None: `schedule.choose`; kept sets have one program a row.
    """
    r = _row.rows(logits)
    to = r if grad is None else _row.rows(grad)
    if r.count == 0:
        return
    width = logits.shape[-1]
    parts = _row.parts(width)
    temperature_ptr, number = _row.split_temperature(temperature)
    ids, offsets, capacity = _kept.split(kept)
    bonus = terms.entropy_coef != 0
    with_entropy = bonus or entropy is not None
    if kept is not None:
        schedule = Schedule("rows")
    elif schedule is None:
        schedule = _schedule.choose(r.count, parts, _schedule.processors(logits))
    exchange = arrived = None
    registers = _schedule.registers(schedule) if kept is None else _kept.REGISTERS
    launch = _row.launch(logits, registers=registers)
    if schedule.kind == "rows":
        parts = 1
    elif schedule.kind == "split":
        exchange = _schedule.group_statistics_fwd(
            logits, tokens, weight, temperature, vocab_size, with_entropy
        )
    else:
        exchange = _schedule.empty_exchange(logits)
        arrived = torch.zeros(r.count, dtype=torch.int32, device=logits.device)
        launch["launch_cooperative_grid"] = True
    policy_loss_fwd_kernel[(_schedule.programs(schedule, r.count, parts, logits),)](
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
        exchange,
        arrived,
        r.count,
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
        1.0 - terms.eps_low,
        1.0 + terms.eps_high,
        float(terms.delta),
        float(terms.dual_clip),
        float(terms.kl_coef),
        float(terms.entropy_coef),
        CLIPPED=bool(terms.clipped),
        KL=int(terms.kl) if terms.kl_coef != 0 else 0,
        KL_IMPORTANCE=bool(terms.kl_importance),
        ENTROPY=with_entropy,
        ENTROPY_BONUS=bonus,
        ALIGN=r.align,
        GRAD_ALIGN=to.align,
        TAIL=r.tail,
        BLOCK=_row.TILE,
        KEPT=_kept.TILE,
        SCHEDULE=schedule.kind,
        STAGES=schedule.stages,
        **launch,
    )


# The terms of −A·log π(a) alone.
_REINFORCE = types.SimpleNamespace(
    clipped=False,
    eps_low=0.0,
    eps_high=0.0,
    dual_clip=0.0,
    delta=0.0,
    kl=0,
    kl_coef=0.0,
    kl_importance=False,
    entropy_coef=0.0,
)


def reinforce_grad(logits, tokens, advantages, temperature, out, schedule: Schedule | None = None):
    """out = A·(π − e_a)/τ, zeros where the token is −100 or A is 0; out may be logits itself."""
    policy_loss_fwd(
        logits,
        tokens,
        None,
        None,
        None,
        advantages,  # A·(−log π(a)): its weight is A, its advantage 1
        None,
        temperature,
        logits.shape[-1],
        _REINFORCE,
        None,
        None,
        None,
        out,
        schedule,
    )


@triton.jit(
    do_not_specialize=["items", "parts", "inner", "stride_outer", "stride_inner", "width"],
    do_not_specialize_on_alignment=["scale_ptr"],
)
def scale_fwd_kernel(
    x_ptr,
    scale_ptr,
    items: tl.int32,
    parts: tl.int32,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    width: tl.int32,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            row = (item // parts).to(tl.int64)
            start = item % parts * GROUP * BLOCK
            at_ptr = x_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
            if start + GROUP * BLOCK <= width:
                x = load_group(at_ptr, start, width, width, TAIL, "evict_first", True, BLOCK)
                store_group(at_ptr, start, x.to(tl.float32) * scale, width, TAIL, True, BLOCK)
            else:
                x = load_group(at_ptr, start, width, width, TAIL, "evict_first", False, BLOCK)
                store_group(at_ptr, start, x.to(tl.float32) * scale, width, TAIL, False, BLOCK)


def scale_(x, scale):
    """x *= scale, a 0-d tensor on the device; x is not touched where scale is 1."""
    r, parts = _row.rows(x), _row.parts(x.shape[-1])
    if math.prod(x.shape) == 0:
        return
    # As many programs as run at once: where scale is 1 they are all there is to pay for.
    items = r.count * parts
    scale_fwd_kernel[(min(items, 4 * _schedule.processors(x)),)](
        x,
        scale,
        items,
        parts,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        x.shape[-1],
        ALIGN=r.align,
        TAIL=r.tail,
        BLOCK=_row.TILE,
        **_row.launch(x),
    )
