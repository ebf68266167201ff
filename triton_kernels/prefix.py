"""A prefix of the order (logit descending, id ascending) of a row, found without sorting it.

    key      int32 in the order of the logits            mass   w = floor(2^44·2^y),  y = (z − m)·c
    prefix   (cut, last): the keys > cut, and those ids ≤ last whose key is the cut

The shortest prefix that measures ≥ need, in tokens or in mass, is found by narrowing an interval of
keys: a sweep over the entries measures three thresholds and leaves a quarter of the interval. Once
few entries are left in it they are collected into a list, and sweeps go over the list alone.
Masses are integers, V < 2^19: no order of summation changes a bit, on any device.

A `source` is (z_ptr, allowed_ptr, vocab_size, list_ptr, ids_ptr, top_is_inf): entries are those of
the list (logits and ids ascending in id) where `listed`, and else the columns of the row.
"""

import triton
import triton.language as tl

from .row import load_tile


@triton.jit
def clean(z, top_is_inf):
    """NaN counts as −inf; where a row holds +inf those share the top (0) and the rest weighs 0."""
    z = tl.where(z == z, z, float("-inf"))
    return tl.where(top_is_inf, tl.where(z == float("inf"), 0.0, float("-inf")), z)


@triton.jit
def lowest_key(SHIFT: tl.constexpr):
    """The least key of a finite logit: −inf lies one below."""
    return tl.full([], -2139095040 >> SHIFT, tl.int32)


@triton.jit
def key_of(z, SHIFT: tl.constexpr):
    """int32 in the order of the logits, without the SHIFT bits that are the same in their dtype.

    −0 equals +0.
    """
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def logit_of(key, SHIFT: tl.constexpr):
    """The logit of a key."""
    bits = key << SHIFT
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) & (-1 << SHIFT)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mass_scale_of(tau):
    """c = log2(e)/τ in IEEE float32, finite for every τ > 0."""
    c = tl.div_rn(tl.full([], 1.4426950408889634, tl.float32), tau)
    return tl.minimum(c, 3.4028234663852886e38)


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
def fold(x):
    """Sums of four neighbours: additions inside a thread, without a barrier."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@triton.jit
def load_allowed(
    z_ptr, allowed_ptr, start, vocab_size, BLOCK: tl.constexpr, SPREAD: tl.constexpr = False
):
    """`load_tile` with −inf where the bit of a token is 0; `start` is a multiple of 32."""
    z = load_tile(z_ptr, start, vocab_size, BLOCK, SPREAD)
    if allowed_ptr is not None:
        word = start // 32 + tl.arange(0, BLOCK // 32)
        words = tl.load(allowed_ptr + word, mask=word * 32 < vocab_size, other=0)
        bit = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
        by_word = tl.reshape(z, [BLOCK // 32, 32])
        z = tl.reshape(tl.where(bit != 0, by_word, float("-inf")), z.shape)
    return z


@triton.jit
def load_entries(source, listed, start, length, BLOCK: tl.constexpr):
    """(ids, cleaned logits) of the entries from `start` on; −inf beyond their `length`."""
    z_ptr, allowed_ptr, vocab_size, list_ptr, ids_ptr, top_is_inf = source
    slot = start + tl.arange(0, BLOCK)
    if listed:
        inside = slot < length
        at = tl.load(ids_ptr + slot, mask=inside, other=vocab_size)
        z = tl.load(list_ptr + slot, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        at = slot
        z = load_allowed(z_ptr, allowed_ptr, start, vocab_size, BLOCK)
    return at, clean(z, top_is_inf)


@triton.jit
def is_kept(key, at, cut, last):
    return (key > cut) | ((key == cut) & (at <= last))


@triton.jit
def measure(
    source, listed, length, m, c, mass, t1, t2, t3, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):
    """Numbers of the entries with key ≥ t1 < t2 < t3; then their masses, or where not `mass` those
    numbers again."""
    n1 = tl.zeros([BLOCK // 4], tl.int32)
    n2 = tl.zeros([BLOCK // 4], tl.int32)
    n3 = tl.zeros([BLOCK // 4], tl.int32)
    w1 = tl.zeros([BLOCK // 4], tl.int64)
    w2 = tl.zeros([BLOCK // 4], tl.int64)
    w3 = tl.zeros([BLOCK // 4], tl.int64)
    for start in range(0, length, BLOCK):
        _, z = load_entries(source, listed, start, length, BLOCK)
        key = key_of(z, SHIFT)
        n1 += fold((key >= t1).to(tl.int32))
        n2 += fold((key >= t2).to(tl.int32))
        n3 += fold((key >= t3).to(tl.int32))
        if mass:
            w = mass_of(z, m, c)
            w1 += fold(tl.where(key >= t1, w, 0))
            w2 += fold(tl.where(key >= t2, w, 0))
            w3 += fold(tl.where(key >= t3, w, 0))
    n1, n2, n3 = tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
    f1, f2, f3 = n1.to(tl.int64), n2.to(tl.int64), n3.to(tl.int64)
    if mass:
        f1, f2, f3 = tl.sum(w1, 0), tl.sum(w2, 0), tl.sum(w3, 0)
    return n1, n2, n3, f1, f2, f3


@triton.jit
def quarter(low, high, part, by_value, SHIFT: tl.constexpr):
    """A key in (low, high], `part` quarters of the way up: by value or by number of keys."""
    a = logit_of(low, SHIFT).to(tl.float64)
    b = logit_of(high, SHIFT).to(tl.float64)
    value = key_of((a + (b - a) * (part * 0.25)).to(tl.float32), SHIFT)
    number = low + (((high.to(tl.int64) - low) * part + 3) >> 2).to(tl.int32)
    return tl.minimum(tl.maximum(tl.where(by_value, value, number), low + 1), high)


@triton.jit
def narrow(low, high, need, t1, t2, t3, n1, n2, n3, f1, f2, f3, n_low, n_high, beyond):
    """The quarter of [low, high] that holds the largest key whose prefix measures ≥ need.

    f: measures of the keys ≥ t; beyond: of the keys > high; n_low, n_high: numbers of both ends.
    """
    at1, at2, at3 = f1 >= need, f2 >= need, f3 >= need
    new_low = tl.where(at3, t3, tl.where(at2, t2, tl.where(at1, t1, low)))
    new_high = tl.where(at3, high, tl.where(at2, t3 - 1, tl.where(at1, t2 - 1, t1 - 1)))
    beyond = tl.where(at3, beyond, tl.where(at2, f3, tl.where(at1, f2, f1)))
    n_high = tl.where(at3, n_high, tl.where(at2, n3, tl.where(at1, n2, n1)))
    n_low = tl.where(at3, n3, tl.where(at2, n2, tl.where(at1, n1, n_low)))
    found = tl.where(at3, f3, tl.where(at2, f2, f1))
    return new_low, new_high, n_low, n_high, beyond, found == need


@triton.jit
def span_bound(spans_ptr, spans, top_is_inf, low, high, k, BLOCK: tl.constexpr,
                SHIFT: tl.constexpr):  # fmt: skip
    """A key that at least k spans of columns reach, so that at least k tokens do."""
    source = (spans_ptr, None, spans, spans_ptr, spans_ptr, top_is_inf)
    step = 0
    enough = False
    zero = tl.full([], 0, tl.int64)
    while (low < high) & (enough == 0):
        t1 = quarter(low, high, 1, step % 2 == 1, SHIFT)
        t2 = quarter(low, high, 2, step % 2 == 1, SHIFT)
        t3 = quarter(low, high, 3, step % 2 == 1, SHIFT)
        n1, n2, n3, f1, f2, f3 = measure(
            source, False, spans, 0.0, 0.0, False, t1, t2, t3, BLOCK, SHIFT
        )
        low, high, _, _, _, enough = narrow(
            low, high, k, t1, t2, t3, n1, n2, n3, f1, f2, f3, n1, n1, zero
        )
        step += 1
    return low


@triton.jit
def collect(
    source, spans_ptr, hits_ptr, spans, low, high, SPAN: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Write the columns with keys in [low, high] to the list, and return their number.

    Only spans whose maximum reaches `low` are read. Ends, with a number > CAPACITY, as soon as the
    list is full.
    """
    z_ptr, allowed_ptr, vocab_size, list_ptr, ids_ptr, top_is_inf = source
    # Other warps may still read the list of before.
    tl.debug_barrier()
    hits = tl.full([], 0, tl.int32)
    for start in range(0, spans, BLOCK):
        z = clean(load_tile(spans_ptr, start, spans, BLOCK), top_is_inf)
        hit = key_of(z, SHIFT) >= low
        rank = hits + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(hits_ptr + rank, start + tl.arange(0, BLOCK), mask=hit)
        hits += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    number = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while (start < hits) & (number <= CAPACITY):
        slot = start + tl.arange(0, BLOCK) // SPAN
        span = tl.load(hits_ptr + slot, mask=slot < hits, other=spans)
        at = span * SPAN + tl.arange(0, BLOCK) % SPAN
        z = tl.load(z_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
        if allowed_ptr is not None:
            word = tl.load(allowed_ptr + at // 32, mask=at < vocab_size, other=0)
            z = tl.where(((word >> (at % 32)) & 1) != 0, z, float("-inf"))
        key = key_of(clean(z, top_is_inf), SHIFT)
        inside = (key >= low) & (key <= high)
        rank = number + tl.cumsum(inside.to(tl.int32), 0) - 1
        fits = inside & (rank < CAPACITY)
        tl.store(ids_ptr + rank, at, mask=fits)
        tl.store(list_ptr + rank, z.to(list_ptr.dtype.element_ty), mask=fits)
        number += tl.sum(inside.to(tl.int32), 0)
        start += BLOCK // SPAN
    tl.debug_barrier()
    return number


@triton.jit
def search(
    source, spans_ptr, hits_ptr, spans, listed, length, m, c, mass, low, high, need, trim,
    SPAN: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(cut, last) of the shortest prefix whose mass, or number of tokens, is ≥ need ≥ 1.

    low ≤ cut ≤ high; all entries of keys ≥ low where even those fall short. Ties of the cut stay
    together unless `trim`. Overwrites the list unless it is `listed`.
    """
    vocab_size = source[2]
    n_low = length
    n_high = length - length
    beyond = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int64)
    exact = False
    step = 0
    while (low < high) & (exact == 0):
        if (listed == 0) & (n_low - n_high <= CAPACITY):
            length = collect(
                source, spans_ptr, hits_ptr, spans, low, high, SPAN, CAPACITY, BLOCK, SHIFT
            )
            listed = True
            above = beyond
        t1 = quarter(low, high, 1, step % 2 == 1, SHIFT)
        t2 = quarter(low, high, 2, step % 2 == 1, SHIFT)
        t3 = quarter(low, high, 3, step % 2 == 1, SHIFT)
        n1, n2, n3, f1, f2, f3 = measure(
            source, listed, length, m, c, mass, t1, t2, t3, BLOCK, SHIFT
        )
        f1, f2, f3 = above + f1, above + f2, above + f3
        low, high, n_low, n_high, beyond, exact = narrow(
            low, high, need, t1, t2, t3, n1, n2, n3, f1, f2, f3, n_low, n_high, beyond
        )
        step += 1
    # An exact threshold keeps all it passes, whether or not a logit lies on it. Otherwise those
    # ties of the cut stay before which mass is missing: they weigh the same.
    last = vocab_size
    if (exact == 0) & trim:
        weight = tl.full([], 1, tl.int64)
        if mass:
            weight = mass_of(logit_of(low, SHIFT), m, c)
        last = tl.full([], -1, tl.int32)
        seen = tl.full([], 0, tl.int32)
        for start in range(0, length, BLOCK):
            at, z = load_entries(source, listed, start, length, BLOCK)
            tied = key_of(z, SHIFT) == low
            before = seen + tl.cumsum(tied.to(tl.int32), 0) - 1
            stays = tied & (before * weight < need - beyond)
            last = tl.maximum(last, tl.max(tl.where(stays, at, -1), 0))
            seen += tl.sum(tied.to(tl.int32), 0)
    return low, last


@triton.jit
def stricter(cut, last, other_cut, other_last):
    """The shorter of two prefixes."""
    tied = tl.where(cut == other_cut, tl.minimum(last, other_last), last)
    return tl.maximum(cut, other_cut), tl.where(other_cut > cut, other_last, tied)


@triton.jit
def prefix_mass(source, listed, length, m, c, cut, last, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """Mass of the entries in a prefix."""
    total = tl.zeros([BLOCK // 4], tl.int64)
    for start in range(0, length, BLOCK):
        at, z = load_entries(source, listed, start, length, BLOCK)
        kept = is_kept(key_of(z, SHIFT), at, cut, last)
        total += fold(tl.where(kept, mass_of(z, m, c), 0))
    return tl.sum(total, 0)
