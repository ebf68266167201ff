"""Row statistics and row gradient over a kept set S ⊂ [0, V): what `row.py` is for whole rows.

    π_S(i) = 2^y_i / s on S, 0 outside      m = max_S z,  s = Σ_S 2^y,  E = Σ_S 2^y·y

S of token t is ids[offsets[t] : offsets[t+1]], ascending: ids int32 [N], offsets int64 [T + 1].
The sums are integers (2^40 is 1), so their bits depend on the set alone and not on where its
members lie: the sampler, which sweeps the row, and the scorer, which gathers, agree in every bit.
A set of all V columns has the statistics of the row itself. A token outside its set, ids that do
not ascend within [0, V), offsets outside [0, N]: m is NaN, and so is everything made of it.
"""

import triton
import triton.language as tl

from .row import element_gradient, load_token_logit, statistics

# Kept sets are tens of tokens: four members a thread, one step for nearly all.
TILE = 1024
# A thread's, of a kernel that also holds what a kept set needs; 64-bit sums are large.
REGISTERS = 192


def split(kept):
    """(ids, offsets, N) of a `kept` argument: (ids, offsets, …), or None."""
    return (None, None, 0) if kept is None else (kept[0], kept[1], kept[0].numel())


@triton.jit
def exact_sums(z, m, c):
    """(Σ e, Σ e·y, NaNs) in units of 2^−40 for any part of a kept set, given the whole set's m.

    int64 holds them for 2^23 tokens. −inf weighs 0; NaN, and +inf under m = +inf, are counted.
    """
    reference = tl.where(m == float("-inf"), 0.0, m)
    y = tl.maximum((z - reference) * c, -200.0, propagate_nan=tl.PropagateNan.ALL)
    regular = y == y
    y = tl.where(regular, y, -200.0)
    e = tl.exp2(y) * 1099511627776.0
    total, weighted = tl.sum(e.to(tl.int64), 0), tl.sum((e * y).to(tl.int64), 0)
    return total, weighted, tl.sum((regular == 0).to(tl.int32), 0)


@triton.jit
def sum_of(total):
    """An exact sum as float32."""
    return (total.to(tl.float64) * 9.094947017729282e-13).to(tl.float32)


@triton.jit
def kept_range(offsets_ptr, row, capacity, vocab_size):
    """(begin, count) of a row's ids; offsets that cannot be right give an empty set."""
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    right = (begin >= 0) & (begin <= end) & (end <= capacity) & (end - begin <= vocab_size)
    return tl.where(right, begin, 0), tl.where(right, end - begin, 0).to(tl.int32)


@triton.jit
def gather(z_ptr, ids_ptr, start, count, vocab_size, KEPT: tl.constexpr):
    """(ids, z, whether it is a column) of the members from `start` on; −inf beyond them."""
    slot = start + tl.arange(0, KEPT)
    ids = tl.load(ids_ptr + slot, mask=slot < count, other=-1)
    inside = (ids >= 0) & (ids < vocab_size)
    return ids, tl.load(z_ptr + ids, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def kept_statistics(
    z_ptr,
    ids_ptr,
    offsets_ptr,
    row,
    capacity,
    token,
    vocab_size,
    width,
    c,
    TAIL: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """(m, s, E, z_a) of the kept set of a row."""
    begin, count = kept_range(offsets_ptr, row, capacity, vocab_size)
    ids_ptr += begin
    m = tl.full([], float("-inf"), tl.float32)
    hits = tl.full([], 0, tl.int32)
    faults = tl.full([], 0, tl.int32)
    for start in range(0, count, KEPT):
        ids, z, inside = gather(z_ptr, ids_ptr, start, count, vocab_size, KEPT)
        slot = start + tl.arange(0, KEPT)
        before = tl.load(ids_ptr + slot - 1, mask=(slot > 0) & (slot < count), other=-1)
        faults += tl.sum(((slot < count) & ((inside == 0) | (ids <= before))).to(tl.int32), 0)
        hits += tl.sum((inside & (ids == token)).to(tl.int32), 0)
        m = tl.maximum(m, tl.max(tl.where(z == z, z, float("-inf")), 0))
    broken = (hits == 0) | (faults > 0)
    # Between reductions, which are barriers: in place, another warp may soon overwrite z_a.
    z_token = load_token_logit(z_ptr, tl.where(broken, -1, token), vocab_size)
    if count == vocab_size:
        m, s, e = statistics(z_ptr, vocab_size, width, c, TAIL, True, EVICT, BLOCK)
    else:
        total = tl.full([], 0, tl.int64)
        weighted = tl.full([], 0, tl.int64)
        irregular = tl.full([], 0, tl.int32)
        for start in range(0, count, KEPT):
            _, z, _ = gather(z_ptr, ids_ptr, start, count, vocab_size, KEPT)
            part, weighted_part, irregular_part = exact_sums(z, m, c)
            total += part
            weighted += weighted_part
            irregular += irregular_part
        s = tl.where(irregular > 0, float("nan"), sum_of(total))
        e = sum_of(weighted)
    nan = tl.full([], float("nan"), tl.float32)
    return tl.where(broken, nan, m), tl.where(broken, nan, s), tl.where(broken, nan, e), z_token


@triton.jit
def fill(grad_ptr, begin, end, value, BLOCK: tl.constexpr):
    """Columns [begin, end) of a row, in the row's own tiles so that whole ones stay aligned."""
    values = (tl.zeros([BLOCK], dtype=tl.float32) + value).to(grad_ptr.dtype.element_ty)
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if (start >= begin) & (start + BLOCK <= end):
            tl.store(grad_ptr + at, values)
        else:
            tl.store(grad_ptr + at, values, mask=(at >= begin) & (at < end))


@triton.jit
def write_kept_gradient(
    z_ptr,
    grad_ptr,
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
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """∂ℓ/∂z of a row, 0 outside its kept set; NaN in all columns where m is NaN.

    A step takes KEPT members into registers, then clears the columns from the first of them up to
    the first of the next step, then stores: `grad_ptr` may be `z_ptr`.
    """
    begin, count = kept_range(offsets_ptr, row, capacity, vocab_size)
    ids_ptr += begin
    count = tl.where(m == m, count, 0)
    outside = tl.where(m == m, 0.0, m)
    cleared = vocab_size - vocab_size
    for start in range(0, tl.maximum(count, 1), KEPT):
        ids, z, inside = gather(z_ptr, ids_ptr, start, count, vocab_size, KEPT)
        grad = element_gradient(z, m, c, k1, k2, ENTROPY)
        grad = tl.where(ids == token, at_token, grad)
        more = start + KEPT < count
        upto = tl.load(ids_ptr + start + KEPT, mask=more, other=0)
        upto = tl.where(more, upto, vocab_size)
        # Other warps clear what this one gathers, and clear what this one stores.
        tl.debug_barrier()
        fill(grad_ptr, cleared, upto, outside, BLOCK)
        tl.debug_barrier()
        tl.store(grad_ptr + ids, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        cleared = upto
    fill(grad_ptr, vocab_size, width, 0.0, BLOCK)
