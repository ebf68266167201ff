"""Draw one token a row from a truncated softmax, exactly: every choice is made on integer masses.

    order    (logit descending, id ascending); a kept set is a prefix of it
    mass     w = floor(2^44·2^y),  y = (z − m)·c,  c = log2(e)/τ;  int64: V < 2^19
    top-k    min(k, finite logits) tokens            min-p    logit ≥ m + τ·ln(min_p)
    top-p    shortest prefix with mass ≥ max(ceil(floor(p·2^32)·Z / 2^32), 1),
             Z the mass of the top-k set or, joint, of the row
    draw     first kept id whose running mass exceeds floor(u·Z_kept / 2^64),
             u the 64 bits of Philox4x32-10 at (seed, position)

A prefix is two numbers: the key of the last logit it keeps (`cut`, an integer in logit order) and
the last id it keeps among the ties of that logit, found by bisection over keys, one sweep a step;
nothing is sorted. Reported log-probs come from row.py and, over the kept set, from kept.py, so
they are the scorer's bits.
logits [B, V]; parameters, seed, position and outputs [B]; status bits as below.
"""

import torch
import triton
import triton.language as tl

from . import row as _row
from .kept import exact_sums, sum_of
from .row import (
    GROUP,
    combine,
    load_tile,
    load_token_logit,
    logprob_of,
    no_statistics,
    row_offset,
    scale_of,
    tile_statistics,
)

NAN, INF, EMPTY, INVALID, OVERFLOW = 1, 2, 4, 8, 16

# Bits of a float32 key that are the same for every logit of a dtype; bisection need not visit them.
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def clean(z, top_is_inf):
    """NaN counts as −inf; where a row holds +inf those share the top (0) and the rest weighs 0."""
    z = tl.where(z == z, z, float("-inf"))
    return tl.where(top_is_inf, tl.where(z == float("inf"), 0.0, float("-inf")), z)


@triton.jit
def key_of(z, SHIFT: tl.constexpr):
    """int32 in the order of the logits; −0 equals +0."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def mass_of(z, m, c):
    """floor(2^44·2^y) in int64, by separate multiplies and adds: the same bits on every device."""
    y = tl.maximum((z - m) * c, -127.0)
    n = (y + 12582912.0) - 12582912.0
    f = y - n
    p = f * 0.00015196693129837513 + 0.0013391304528340697
    p = p * f + 0.009619002230465412
    p = p * f + 0.055503588169813156
    p = p * f + 0.24022643268108368
    p = p * f + 0.6931471824645996
    p = p * f + 1.0
    bits = p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)
    return (bits.to(tl.float32, bitcast=True) * 17592186044416.0).to(tl.int64)


@triton.jit
def is_kept(key, column, cut, last):
    return (key > cut) | ((key == cut) & (column <= last))


@triton.jit
def measure(
    z_ptr,
    vocab_size,
    m,
    c,
    top_is_inf,
    cut,
    last,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Mass, or number, of the tokens in the prefix (cut, last)."""
    column = tl.arange(0, BLOCK)
    total = tl.full([], 0, tl.int64)
    for start in range(0, vocab_size, BLOCK):
        at = start + column
        z = clean(load_tile(z_ptr, start, vocab_size, BLOCK), top_is_inf)
        kept = is_kept(key_of(z, SHIFT), at, cut, last)
        if MASS:
            total += tl.sum(tl.where(kept, mass_of(z, m, c), 0), 0)
        else:
            total += tl.sum(kept.to(tl.int32), 0)
    return total


@triton.jit
def prefix(
    z_ptr,
    vocab_size,
    m,
    c,
    top_is_inf,
    low,
    need,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """(cut, last) of the shortest prefix that measures ≥ need ≥ 1, which the keys ≥ `low` do."""
    high = key_of(m, SHIFT)
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    above = tl.full([], 0, tl.int64)
    exact = tl.full([], 0, tl.int32)
    while (low < high) & (exact == 0):
        middle = (low + high + 1) >> 1
        found = measure(
            z_ptr, vocab_size, m, c, top_is_inf, middle.to(tl.int32), vocab_size, MASS, BLOCK, SHIFT
        )
        enough = found >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        above = tl.where(enough, above, found)
        exact = (found == need).to(tl.int32)
    cut = low.to(tl.int32)
    last = vocab_size
    # An exact threshold keeps all it passes, whether or not a logit lies on it. Otherwise some ties
    # of the cut stay; `above` measures the keys beyond it: the last refused threshold was cut + 1.
    if exact == 0:
        for start in range(0, vocab_size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = clean(load_tile(z_ptr, start, vocab_size, BLOCK), top_is_inf)
            tied = key_of(z, SHIFT) == cut
            if MASS:
                weight = tl.where(tied, mass_of(z, m, c), 0)
            else:
                weight = tied.to(tl.int64)
            total = tl.sum(weight, 0)
            if (above < need) & (above + total >= need):
                reached = above + tl.cumsum(weight, 0) >= need
                last = tl.min(tl.where(reached, at, vocab_size), 0)
            above += total
    return cut, last


@triton.jit
def full_statistics(z_ptr, vocab_size, c, BLOCK: tl.constexpr):
    """(m, s, finite, infinite, nan): row.statistics of the cleaned row, and what it is made of."""
    m, s, e = no_statistics()
    finite = tl.full([], 0, tl.int32)
    infinite = tl.full([], 0, tl.int32)
    nan = tl.full([], 0, tl.int32)
    # Tiles make groups and groups the row, as in row.statistics: the same bits.
    for first in range(0, vocab_size, GROUP * BLOCK):
        group_m, group_s, group_e = no_statistics()
        for start in range(first, tl.minimum(first + GROUP * BLOCK, vocab_size), BLOCK):
            z = load_tile(z_ptr, start, vocab_size, BLOCK)
            finite += tl.sum((tl.abs(z) < float("inf")).to(tl.int32), 0)
            infinite += tl.sum((z == float("inf")).to(tl.int32), 0)
            nan += tl.sum((z != z).to(tl.int32), 0)
            tile_m, tile_s, tile_e = tile_statistics(clean(z, False), c)
            group_m, group_s, group_e = combine(
                group_m, group_s, group_e, tile_m, tile_s, tile_e, c
            )
        m, s, e = combine(m, s, e, group_m, group_s, group_e, c)
    return m, s, finite, infinite, nan


@triton.jit
def kept_statistics(
    z_ptr,
    vocab_size,
    m,
    c,
    mass_c,
    top_is_inf,
    cut,
    last,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """(s, number, mass) of the kept set, which has the maximum m of the row; s as in kept.py."""
    total = tl.full([], 0, tl.int64)
    number = tl.full([], 0, tl.int32)
    mass = tl.full([], 0, tl.int64)
    for start in range(0, vocab_size, BLOCK):
        z = clean(load_tile(z_ptr, start, vocab_size, BLOCK), top_is_inf)
        kept = is_kept(key_of(z, SHIFT), start + tl.arange(0, BLOCK), cut, last)
        z = tl.where(kept, z, float("-inf"))
        number += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(mass_of(z, m, mass_c), 0)
        part, _, _ = exact_sums(z, m, c)
        total += part
    return sum_of(total), number, mass


@triton.jit
def uniform_bits(seed, position):
    """64 random bits of stream 0 at (seed, position)."""
    position = position.to(tl.uint64)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low ^ low
    a, b, _, _ = tl.philox(seed, low, high, zero, zero)
    return (a.to(tl.uint64) << 32) | b.to(tl.uint64)


@triton.jit
def draw(
    z_ptr, vocab_size, m, c, top_is_inf, cut, last, target, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):
    """First id of the prefix (cut, last) whose running mass exceeds the target."""
    column = tl.arange(0, BLOCK)
    running = tl.full([], 0, tl.int64)
    token = vocab_size
    for start in range(0, vocab_size, BLOCK):
        at = start + column
        z = clean(load_tile(z_ptr, start, vocab_size, BLOCK), top_is_inf)
        kept = is_kept(key_of(z, SHIFT), at, cut, last)
        weight = tl.where(kept, mass_of(z, m, c), 0)
        total = tl.sum(weight, 0)
        if (running <= target) & (running + total > target):
            beyond = running + tl.cumsum(weight, 0) > target
            token = tl.min(tl.where(beyond, at, vocab_size), 0)
        running += total
    return token


@triton.jit(
    do_not_specialize=["inner", "stride_outer", "stride_inner"],
    do_not_specialize_on_alignment=[
        "temperature_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "min_p_ptr",
        "seed_ptr",
        "position_ptr",
        "token_ptr",
        "logprob_ptr",
        "full_logprob_ptr",
        "kept_ptr",
        "status_ptr",
        "bounds_ptr",
    ],
)
def sample_fwd_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    full_logprob_ptr,
    kept_ptr,
    status_ptr,
    bounds_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    vocab_size: tl.int32,
    JOINT: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tau = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row).to(tl.int64)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    valid = (tau >= 0.0) & (tau < float("inf"))
    valid = valid & (top_p >= 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)

    token = tl.full([], -1, tl.int32)
    logprob = tl.full([], float("nan"), tl.float64)
    full_logprob = tl.full([], float("nan"), tl.float64)
    kept = tl.full([], 0, tl.int32)
    status = tl.full([], 8, tl.int32)
    # The least key of a finite logit: −inf lies one below.
    cut = tl.full([], -2139095040 >> SHIFT, tl.int32)
    last = vocab_size
    if valid:
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        # τ = 0 is top-k of 1 at any temperature.
        greedy = tau == 0.0
        tau = tl.where(greedy, 1.0, tau)
        top_k = tl.where(greedy, 1, top_k)
        c = scale_of(tau)
        m, s, finite, infinite, nan = full_statistics(z_ptr, vocab_size, c, BLOCK)
        top_is_inf = infinite > 0
        m = tl.where(top_is_inf, 0.0, m)
        s = tl.where(top_is_inf, infinite.to(tl.float32), s)
        finite = tl.where(top_is_inf, infinite, finite)
        status = (
            (nan > 0).to(tl.int32) + top_is_inf.to(tl.int32) * 2 + (finite == 0).to(tl.int32) * 4
        )
        if finite > 0:
            lowest = cut
            mass_c = tl.div_rn(tl.full([], 1.4426950408889634, tl.float32), tau)
            mass_c = tl.minimum(mass_c, 3.4028234663852886e38)
            if (top_k > 0) & (top_k < finite):
                cut, last = prefix(
                    z_ptr, vocab_size, m, mass_c, top_is_inf, lowest, top_k, False, BLOCK, SHIFT
                )
            if top_p < 1.0:
                if JOINT:
                    pool = measure(
                        z_ptr,
                        vocab_size,
                        m,
                        mass_c,
                        top_is_inf,
                        lowest,
                        vocab_size,
                        True,
                        BLOCK,
                        SHIFT,
                    )
                else:
                    pool = measure(
                        z_ptr, vocab_size, m, mass_c, top_is_inf, cut, last, True, BLOCK, SHIFT
                    )
                share = (top_p * 4294967296.0).to(tl.int64).to(tl.uint64)
                upper = tl.umulhi(share, pool.to(tl.uint64))
                lower = share * pool.to(tl.uint64)
                rest = ((lower & 0xFFFFFFFF) != 0).to(tl.int64)
                need = ((upper << 32) | (lower >> 32)).to(tl.int64) + rest
                need = tl.maximum(need, 1)
                p_cut, p_last = prefix(
                    z_ptr, vocab_size, m, mass_c, top_is_inf, lowest, need, True, BLOCK, SHIFT
                )
                last = tl.where(
                    p_cut > cut, p_last, tl.where(p_cut == cut, tl.minimum(last, p_last), last)
                )
                cut = tl.maximum(cut, p_cut)
            if min_p > 0.0:
                # The least float32 that is ≥ the float64 floor, as a key.
                floor = m.to(tl.float64) + tau.to(tl.float64) * tl.log(min_p.to(tl.float64))
                rounded = floor.to(tl.float32)
                floor_key = key_of(rounded, 0).to(tl.int64)
                floor_key += (rounded.to(tl.float64) < floor).to(tl.int64)
                # The bits that SHIFT drops are 0 in positive keys of the dtype, 1 in negative ones.
                floor_key += tl.where(floor_key >= 0, (1 << SHIFT) - 1, 0)
                floor_cut = (floor_key >> SHIFT).to(tl.int32)
                last = tl.where(floor_cut > cut, vocab_size, last)
                cut = tl.maximum(cut, floor_cut)
            kept_s, kept, pool = kept_statistics(
                z_ptr, vocab_size, m, c, mass_c, top_is_inf, cut, last, BLOCK, SHIFT
            )
            kept_s = tl.where(kept == vocab_size, s, kept_s)
            bits = uniform_bits(tl.load(seed_ptr + row), tl.load(position_ptr + row))
            target = tl.umulhi(bits, pool.to(tl.uint64)).to(tl.int64)
            token = draw(z_ptr, vocab_size, m, mass_c, top_is_inf, cut, last, target, BLOCK, SHIFT)
            z_token = clean(load_token_logit(z_ptr, token, vocab_size), top_is_inf)
            full_logprob = tl.where(greedy, 0.0, logprob_of(m, s, z_token, tau))
            logprob = tl.where(greedy, 0.0, logprob_of(m, kept_s, z_token, tau))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, logprob.to(tl.float32))
    tl.store(full_logprob_ptr + row, full_logprob.to(tl.float32))
    tl.store(kept_ptr + row, kept)
    tl.store(status_ptr + row, status.to(tl.uint8))
    if bounds_ptr is not None:
        tl.store(bounds_ptr + row * 2, cut.to(tl.int64))
        tl.store(bounds_ptr + row * 2 + 1, tl.full([], 0, tl.int64) + last)


def sample_fwd(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    joint,
    token,
    logprob,
    full_logprob,
    kept,
    status,
    bounds=None,
):
    """Fill token int64, logprob, full_logprob float32, kept int32, status uint8, all [B].

    temperature, top_p, min_p float32 [B]; top_k, seed, position int64 [B]; joint: Z of the row.
    bounds int64 [B, 2], unless None, receives the kept set in the form that `support_fwd` reads.
    """
    r = _row.rows(logits)
    if r.count == 0:
        return
    sample_fwd_kernel[(r.count,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        token,
        logprob,
        full_logprob,
        kept,
        status,
        bounds,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        logits.shape[-1],
        JOINT=bool(joint),
        SHIFT=_SHIFT[logits.dtype],
        ALIGN=r.align,
        BLOCK=_row.TILE,
        **_row.LAUNCH,
    )


@triton.jit(
    do_not_specialize=["inner", "stride_outer", "stride_inner", "capacity"],
    do_not_specialize_on_alignment=["bounds_ptr", "offsets_ptr", "status_ptr", "ids_ptr"],
)
def support_fwd_kernel(
    logits_ptr,
    bounds_ptr,
    offsets_ptr,
    status_ptr,
    ids_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    capacity: tl.int64,
    vocab_size: tl.int32,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    status = tl.load(status_ptr + row)
    if end > capacity:
        if end > begin:
            tl.store(status_ptr + row, status | 16)
    elif end > begin:
        cut = tl.load(bounds_ptr + row * 2).to(tl.int32)
        last = tl.load(bounds_ptr + row * 2 + 1).to(tl.int32)
        top_is_inf = (status & 2) != 0
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        column = tl.arange(0, BLOCK)
        for start in range(0, vocab_size, BLOCK):
            at = start + column
            z = clean(load_tile(z_ptr, start, vocab_size, BLOCK), top_is_inf)
            kept = is_kept(key_of(z, SHIFT), at, cut, last)
            rank = tl.cumsum(kept.to(tl.int32), 0)
            tl.store(ids_ptr + begin + rank - 1, at, mask=kept)
            begin += tl.sum(kept.to(tl.int32), 0)


def support_fwd(logits, bounds, kept, status, ids, offsets):
    """Fill ids int32 [capacity] and offsets int64 [B + 1] with the kept sets of `sample_fwd`.

    Ids ascend in a row. offsets are those of a buffer without end; a row that ends beyond the
    capacity is not written and has OVERFLOW set in status.
    """
    r = _row.rows(logits)
    offsets[:1].zero_()
    if r.count == 0:
        return
    torch.cumsum(kept, 0, dtype=torch.int64, out=offsets[1:])
    support_fwd_kernel[(r.count,)](
        logits,
        bounds,
        offsets,
        status,
        ids,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        ids.numel(),
        logits.shape[-1],
        SHIFT=_SHIFT[logits.dtype],
        ALIGN=r.align,
        BLOCK=_row.TILE,
        **_row.LAUNCH,
    )
