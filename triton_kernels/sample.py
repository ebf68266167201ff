"""Draw one token a row from a truncated softmax: every choice is made on integer masses.

    order    (logit descending, id ascending); a kept set is a prefix of it: prefix.py
    top-k    min(k, finite logits) tokens            min-p    logit ≥ m + τ·ln(min_p)
    top-p    shortest prefix with mass ≥ max(ceil(floor(p·2^32)·Z / 2^32), 1),
             Z the mass of the top-k set or, joint, of the row
    draw     first kept id whose running mass exceeds floor(u·Z_kept / 2^64),
             u the 64 bits of Philox4x32-10 at (seed, position)

1. tiles    one read of the logits: (m, s) of each tile of 4096, the maximum of each span of 64
   masses   exact only: the mass of each tile, given the maximum of its row
2. select   one program a row. Groups whose maximum reaches a lower bound of the kept set hold all
            candidates: the k-th largest span maximum; m − τ·ln(n/(1−p)), below which n tokens weigh
            less than 1 − p together; the floor of min-p. 4096 candidates fit a list, and the search
            goes over the list; flatter rows are searched themselves.
3. support  the kept ids as CSR, or as bits where the buffer ends

Not exact, the mass of a whole row or tile is its float32 statistics of row.py: no second read. All
else is the same. Reported log-probs come from row.py and, over the kept set, from kept.py, so they
are the scorer's bits. logits [B, V]; parameters, seed, position and outputs [B]; status bits below.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import row as _row
from .kept import exact_sums, sum_of
from .prefix import (
    clean,
    collect,
    fold,
    is_kept,
    key_of,
    load_allowed,
    load_entries,
    lowest_key,
    mass_of,
    mass_scale_of,
    prefix_mass,
    search,
    span_bound,
    stricter,
)
from .row import (
    GROUP,
    combine,
    combine_tiles,
    load_token_logit,
    logprob_of,
    no_statistics,
    row_offset,
    scale_of,
    tile_sums,
)

NAN, INF, EMPTY, INVALID, OVERFLOW = 1, 2, 4, 8, 16
# Independent uses of one (seed, position): the third word of Philox's counter.
DRAW, ACCEPT, RESIDUAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Bits of a float32 key that are the same for every logit of a dtype; a search need not visit them.
SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

SPAN = 64  # columns that share a maximum: a list of candidates is found at 1/64 of a read
CHUNK = 512  # entries of a step over a list, or over a row that is searched itself
CAPACITY = 4096  # candidates of a list
MAX_TILES = 128  # of a row: V ≤ 2^19
# Integers decide in a search, so four warps give the bits of eight; more rows fit a device.
# They are few, and hold 64-bit masses: registers matter more than programs side by side.
SEARCH = {"num_warps": 4, "registers": 192}
# Of two warps, that a launch over tiles aims at: several times what a device holds.
_PROGRAMS = 8192

# Arguments that change from call to call: lengths, and slices of per-row tensors.
LENGTHS = ["inner", "stride_outer", "stride_inner", "allowed_stride", "vocab_size"]
_FILTERS = ["allowed_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"]
_OVER_TILES = {
    "do_not_specialize": [*LENGTHS, "tiles_per_program"],
    "do_not_specialize_on_alignment": _FILTERS,
}


class Swept(NamedTuple):
    """What the reads of whole rows leave. T tiles, G spans (of whole tiles)."""

    # float32 [B, T, 4]: m, s, finite logits (of rows that no filter cuts), NaNs. s of a tile that
    # holds +inf is their number.
    tiles: torch.Tensor
    spans: torch.Tensor  # [B, G] in the dtype of the logits
    masses: torch.Tensor  # int64 [B, T]


class Workspace(NamedTuple):
    """What the selection leaves. K = CAPACITY. The masses are now those of the kept set."""

    swept: Swept
    hits: torch.Tensor  # int32 [B, G]
    logits: torch.Tensor  # [B, K]: the list
    ids: torch.Tensor  # int32 [B, K]
    found: torch.Tensor  # int32 [B, 3]: cut, last, length of the list or −1
    kept_sums: torch.Tensor  # float32 [B]: s over the kept set


@triton.jit
def parameters(row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr):
    """(valid, greedy, τ, k, p, min_p) of a row; τ = 0 is top-k of 1 at any temperature.

    Without pointers the row is as it is: τ = 1, and nothing cuts.
    """
    tau = tl.full([], 1.0, tl.float32)
    top_k = tl.full([], 0, tl.int64)
    top_p = tl.full([], 1.0, tl.float32)
    min_p = tl.full([], 0.0, tl.float32)
    if temperature_ptr is not None:
        tau = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row).to(tl.int64)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
    valid = (tau >= 0.0) & (tau < float("inf"))
    valid = valid & (top_p >= 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    greedy = tau == 0.0
    return valid, greedy, tl.where(greedy, 1.0, tau), tl.where(greedy, 1, top_k), top_p, min_p


@triton.jit
def tiles_of_program(vocab_size, tiles_per_program, BLOCK: tl.constexpr):
    """(first, end, tiles): what a program of a launch over tiles takes of the tiles of a row."""
    tiles = (vocab_size + BLOCK - 1) // BLOCK
    first = tl.program_id(1) * tiles_per_program
    return first, tl.minimum(first + tiles_per_program, tiles), tiles


@triton.jit
def load_tiles(tiles_ptr, count, MAX_TILES: tl.constexpr):
    """(m, s, finite logits, NaNs, whether the row holds +inf) of the tiles of a row, cleaned."""
    tile = tl.arange(0, MAX_TILES)
    inside = tile < count
    m = tl.load(tiles_ptr + tile * 4, mask=inside, other=float("-inf"))
    s = tl.load(tiles_ptr + tile * 4 + 1, mask=inside, other=0.0)
    finite = tl.load(tiles_ptr + tile * 4 + 2, mask=inside, other=0.0)
    nan = tl.load(tiles_ptr + tile * 4 + 3, mask=inside, other=0.0)
    top_is_inf = tl.max(m, 0) == float("inf")
    s = tl.where(top_is_inf, tl.where(m == float("inf"), s, 0.0), s)
    finite = tl.where(top_is_inf, s, finite)
    return clean(m, top_is_inf), s, finite, nan, top_is_inf


@triton.jit
def combined(tiles_ptr, count, c):
    """s of a row without +inf: its tiles as row.statistics combines them."""
    m, s, e = no_statistics()
    for first in range(0, count, GROUP):
        # Tiles beyond the row change nothing.
        tile = first + tl.arange(0, GROUP)
        tile_m = tl.load(tiles_ptr + tile * 4, mask=tile < count, other=float("-inf"))
        tile_s = tl.load(tiles_ptr + tile * 4 + 1, mask=tile < count, other=0.0)
        m, s, e = combine(m, s, e, tile_m, tile_s, e, c, False)
    _m, s, _e = combine_tiles(m, s, e, c, False)
    return s


@triton.jit
def whole_sum(tiles_ptr, count, tile_s, top_is_inf, c):
    """s of a row; of one with +inf, their number."""
    s = tl.sum(tile_s, 0)
    if top_is_inf == 0:
        s = combined(tiles_ptr, count, c)
    return s


@triton.jit
def load_masses(masses_ptr, length, TILE: tl.constexpr, MAX_TILES: tl.constexpr):
    """The masses of the tiles of `length` entries, 0 beyond."""
    tile = tl.arange(0, MAX_TILES)
    return tl.load(masses_ptr + tile, mask=tile * TILE < length, other=0)


@triton.jit
def keeps_all(top_k, top_p, min_p, vocab_size):
    """Whether no filter cuts the row."""
    return ((top_k <= 0) | (top_k >= vocab_size)) & (top_p >= 1.0) & (min_p <= 0.0)


@triton.jit
def pools_row(top_k, top_p, vocab_size, JOINT: tl.constexpr):
    """Whether top-p applies to the mass of the whole row."""
    return (top_p < 1.0) & (JOINT | (top_k <= 0) | (top_k >= vocab_size))


@triton.jit
def span_maxima(z, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """The maximum of every span of a tile."""
    return tl.max(tl.reshape(z, [BLOCK // SPAN, SPAN]), 1)


@triton.jit
def count_of(found):
    """How many elements [·, ·] of a tile are true, as float32."""
    return tl.sum(tl.sum(found.to(tl.float32), 0), 0)


@triton.jit(**_OVER_TILES)
def sample_tiles_fwd_kernel(
    logits_ptr,
    allowed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tiles_ptr,
    spans_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    allowed_stride: tl.int64,
    vocab_size: tl.int32,
    tiles_per_program: tl.int32,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, end, tiles = tiles_of_program(vocab_size, tiles_per_program, BLOCK)
    z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
    if allowed_ptr is not None:
        allowed_ptr += row * allowed_stride
    tiles_ptr += row * tiles * 4
    spans_ptr += row * tiles * (BLOCK // SPAN)
    _, _, tau, top_k, top_p, min_p = parameters(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr
    )
    c = scale_of(tau)
    # Of all other rows the search finds it.
    counted = keeps_all(top_k, top_p, min_p, vocab_size)
    for tile in range(first, end):
        z = load_allowed(z_ptr, allowed_ptr, tile * BLOCK, vocab_size, BLOCK, True)
        top = span_maxima(z, BLOCK, SPAN)
        m = tl.max(top, 0)
        s, _energy = tile_sums(z, m, c, False, 0)
        nan = tl.full([], 0.0, tl.float32)
        # A row of finite logits pays nothing for those that are not, no register either: they make
        # s NaN, and are read once more.
        if s != s:
            nan = count_of(z != z)
            z = clean(z, False)
            top = span_maxima(z, BLOCK, SPAN)
            m = tl.max(top, 0)
            s, _energy = tile_sums(z, m, c, False, 0)
            if m == float("inf"):
                s = count_of(z == float("inf"))
        finite = tl.full([], BLOCK, tl.float32)
        if counted:
            finite = count_of(z > float("-inf"))
        tl.store(tiles_ptr + tile * 4, m)
        tl.store(tiles_ptr + tile * 4 + 1, s)
        tl.store(tiles_ptr + tile * 4 + 2, finite)
        tl.store(tiles_ptr + tile * 4 + 3, nan)
        span = tile * (BLOCK // SPAN) + tl.arange(0, BLOCK // SPAN)
        tl.store(spans_ptr + span, top.to(spans_ptr.dtype.element_ty))


@triton.jit(**_OVER_TILES)
def sample_masses_fwd_kernel(
    logits_ptr,
    allowed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tiles_ptr,
    masses_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    allowed_stride: tl.int64,
    vocab_size: tl.int32,
    tiles_per_program: tl.int32,
    JOINT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, end, tiles = tiles_of_program(vocab_size, tiles_per_program, BLOCK)
    z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
    if allowed_ptr is not None:
        allowed_ptr += row * allowed_stride
    valid, _, tau, top_k, top_p, min_p = parameters(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr
    )
    tile_m, _, _, _, top_is_inf = load_tiles(tiles_ptr + row * tiles * 4, tiles, MAX_TILES)
    m = tl.max(tile_m, 0)
    read = keeps_all(top_k, top_p, min_p, vocab_size)
    read = read | pools_row(top_k, top_p, vocab_size, JOINT)
    if valid & (m > float("-inf")) & read:
        c = mass_scale_of(tau)
        for tile in range(first, end):
            z = load_allowed(z_ptr, allowed_ptr, tile * BLOCK, vocab_size, BLOCK)
            mass = tl.sum(fold(mass_of(clean(z, top_is_inf), m, c)), 0)
            tl.store(masses_ptr + row * tiles + tile, mass)


@triton.jit
def needed_mass(top_p, pool):
    """max(ceil(floor(p·2^32)·pool / 2^32), 1) in 128 bits."""
    share = (top_p.to(tl.float64) * 4294967296.0).to(tl.int64).to(tl.uint64)
    pool = pool.to(tl.uint64)
    lower = share * pool
    rest = ((lower & 0xFFFFFFFF) != 0).to(tl.int64)
    upper = tl.umulhi(share, pool)
    return tl.maximum(((upper << 32) | (lower >> 32)).to(tl.int64) + rest, 1)


@triton.jit
def min_p_key(m, tau, min_p, SHIFT: tl.constexpr):
    """The least key of a logit ≥ m + τ·ln(min_p), compared in float64."""
    floor = m.to(tl.float64) + tau.to(tl.float64) * tl.log(min_p.to(tl.float64))
    rounded = floor.to(tl.float32)
    key = key_of(rounded, 0).to(tl.int64) + (rounded.to(tl.float64) < floor).to(tl.int64)
    # The bits that SHIFT drops are 0 in positive keys of the dtype, 1 in negative ones.
    return ((key + tl.where(key >= 0, (1 << SHIFT) - 1, 0)) >> SHIFT).to(tl.int32)


@triton.jit
def nucleus_key(m, tau, top_p, vocab_size, SHIFT: tl.constexpr):
    """A key below which all tokens together weigh less than 1 − p of the row, or nothing."""
    rest = 1.0 - top_p.to(tl.float64)
    tail = tl.minimum(tl.log(vocab_size.to(tl.float64) / rest) + 1e-4, 30.6)
    bound = tl.maximum(m.to(tl.float64) - tau.to(tl.float64) * tail, -3.4028234663852886e38)
    # One key lower for the rounding of the bound.
    return key_of(bound.to(tl.float32), SHIFT) - 1


@triton.jit
def uniform_bits(seed, position, stream: tl.constexpr):
    """64 random bits of a stream at (seed, position)."""
    position = position.to(tl.uint64)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low ^ low
    a, b, _, _ = tl.philox(seed, low, high, zero + stream, zero)
    return (a.to(tl.uint64) << 32) | b.to(tl.uint64)


@triton.jit
def kept_statistics(
    source, listed, length, m, c, mass_c, cut, last, masses_ptr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(s, number) of the kept set, which has the maximum m of the row; s as in kept.py.

    Writes the kept mass of each tile of entries.
    """
    total = tl.full([], 0, tl.int64)
    number = tl.full([], 0, tl.int32)
    for tile in range(0, length, TILE):
        mass = tl.full([], 0, tl.int64)
        for start in range(tile, tl.minimum(tile + TILE, length), BLOCK):
            at, z = load_entries(source, listed, start, length, BLOCK)
            kept = is_kept(key_of(z, SHIFT), at, cut, last)
            z = tl.where(kept, z, float("-inf"))
            number += tl.sum(kept.to(tl.int32), 0)
            mass += tl.sum(fold(mass_of(z, m, mass_c)), 0)
            part, _, _ = exact_sums(z, m, c)
            total += part
        tl.store(masses_ptr + tile // TILE, mass)
    return sum_of(total), number


@triton.jit
def tile_of(masses, bits, TILE: tl.constexpr):
    """(its first entry, the mass before it, floor(bits·Z / 2^64)) of the tile that a draw is in."""
    target = tl.umulhi(bits, tl.sum(masses, 0).to(tl.uint64)).to(tl.int64)
    before = tl.cumsum(masses, 0) <= target
    running = tl.sum(tl.where(before, masses, 0), 0)
    return tl.sum(before.to(tl.int32), 0) * TILE, running, target


@triton.jit
def draw(
    source, listed, length, m, c, cut, last, masses_ptr, bits, TILE: tl.constexpr,
    MAX_TILES: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """First id of the kept set whose running mass exceeds floor(bits·Z_kept / 2^64)."""
    vocab_size = source[2]
    masses = load_masses(masses_ptr, length, TILE, MAX_TILES)
    begin, running, target = tile_of(masses, bits, TILE)
    token = vocab_size
    heavy = tl.full([], -1, tl.int32)
    for start in range(begin, tl.minimum(begin + TILE, length), BLOCK):
        at, z = load_entries(source, listed, start, length, BLOCK)
        kept = is_kept(key_of(z, SHIFT), at, cut, last)
        weight = tl.where(kept, mass_of(z, m, c), 0)
        beyond = running + tl.cumsum(weight, 0) > target
        token = tl.minimum(token, tl.min(tl.where(beyond, at, vocab_size), 0))
        heavy = tl.maximum(heavy, tl.max(tl.where(weight > 0, at, -1), 0))
        running += tl.sum(weight, 0)
    # The float32 mass of a tile can exceed that of its tokens by rounding.
    return tl.where(token < vocab_size, token, heavy)


@triton.jit(
    do_not_specialize=LENGTHS,
    do_not_specialize_on_alignment=[
        *_FILTERS,
        "seed_ptr",
        "position_ptr",
        "token_ptr",
        "logprob_ptr",
        "full_logprob_ptr",
        "kept_ptr",
        "status_ptr",
    ],
)
def sample_fwd_kernel(
    logits_ptr,
    allowed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    tiles_ptr,
    spans_ptr,
    masses_ptr,
    hits_ptr,
    list_ptr,
    ids_ptr,
    found_ptr,
    kept_sums_ptr,
    token_ptr,
    logprob_ptr,
    full_logprob_ptr,
    kept_ptr,
    status_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    allowed_stride: tl.int64,
    vocab_size: tl.int32,
    JOINT: tl.constexpr,
    KEEP_TIES: tl.constexpr,
    EXACT: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    MAX_TILES: tl.constexpr,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    valid, greedy, tau, top_k, top_p, min_p = parameters(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr
    )
    token = tl.full([], -1, tl.int32)
    logprob = tl.full([], float("nan"), tl.float64)
    full_logprob = tl.full([], float("nan"), tl.float64)
    kept = tl.full([], 0, tl.int32)
    kept_s = tl.full([], float("nan"), tl.float32)
    status = tl.full([], 8, tl.int32)
    lowest = lowest_key(SHIFT)
    cut = lowest
    last = vocab_size
    listed = False
    length = vocab_size
    if valid:
        tiles = (vocab_size + TILE - 1) // TILE
        spans = tiles * (TILE // SPAN)
        tiles_ptr += row * tiles * 4
        masses_ptr += row * tiles
        spans_ptr += row * spans
        hits_ptr += row * spans
        list_ptr += row * CAPACITY
        ids_ptr += row * CAPACITY
        tile_m, tile_s, tile_finite, tile_nan, top_is_inf = load_tiles(tiles_ptr, tiles, MAX_TILES)
        m = tl.max(tile_m, 0)
        finite = tl.sum(tile_finite, 0).to(tl.int32)
        nan = tl.max(tile_nan, 0) > 0.0
        empty = m == float("-inf")
        status = nan.to(tl.int32) + top_is_inf.to(tl.int32) * 2 + empty.to(tl.int32) * 4
        if m > float("-inf"):
            z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
            if allowed_ptr is not None:
                allowed_ptr += row * allowed_stride
            source = (z_ptr, allowed_ptr, vocab_size, list_ptr, ids_ptr, top_is_inf)
            c = scale_of(tau)
            mass_c = mass_scale_of(tau)
            s = whole_sum(tiles_ptr, tiles, tile_s, top_is_inf, c)

            if EXACT == 0:
                # The masses of tiles, which a draw from the whole row goes by.
                weight = tl.exp2(tl.maximum((tile_m - m) * c, -200.0)) * tile_s
                weight = tl.where(mass_of(tile_m, m, mass_c) > 0, weight, 0.0)
                tile = tl.arange(0, MAX_TILES)
                masses = (weight * 17592186044416.0).to(tl.int64)
                tl.store(masses_ptr + tile, masses, mask=tile < tiles)

            by_k = (top_k > 0) & (top_k < vocab_size)
            all_kept = keeps_all(top_k, top_p, min_p, vocab_size)
            whole_pool = pools_row(top_k, top_p, vocab_size, JOINT)
            trim = greedy | (KEEP_TIES == 0)
            highest = key_of(m, SHIFT)
            floor = lowest
            if min_p > 0.0:
                floor = min_p_key(m, tau, min_p, SHIFT)
            # Below `low` lies nothing that is kept, nor anything of the mass that top-p applies to.
            low = lowest
            if by_k & (top_k <= spans):
                low = span_bound(spans_ptr, spans, top_is_inf, low, highest, top_k, BLOCK, SHIFT)
            if whole_pool:
                low = tl.maximum(low, nucleus_key(m, tau, top_p, vocab_size, SHIFT))
            if (top_p >= 1.0) | whole_pool:
                low = tl.maximum(low, floor)
            if (all_kept == 0) | (finite <= CAPACITY):
                number = collect(
                    source, spans_ptr, hits_ptr, spans, low, highest, SPAN, CAPACITY, BLOCK, SHIFT
                )
                listed = number <= CAPACITY
                length = tl.where(listed, number, vocab_size)

            # First top-k, then top-p: two turns of one loop, so that the search is compiled once.
            for turn in range(2):
                by_mass = turn == 1
                need = top_k
                if by_mass & (top_p < 1.0):
                    pool = tl.full([], 0, tl.int64)
                    if whole_pool == 0:
                        pool = prefix_mass(
                            source, listed, length, m, mass_c, cut, last, BLOCK, SHIFT
                        )
                    elif EXACT:
                        pool = tl.sum(load_masses(masses_ptr, vocab_size, TILE, MAX_TILES), 0)
                    else:
                        pool = (s.to(tl.float64) * 17592186044416.0).to(tl.int64)
                    need = needed_mass(top_p, pool)
                if (by_mass & (top_p < 1.0)) | (by_k & (turn == 0)):
                    new_cut, new_last = search(
                        source, spans_ptr, hits_ptr, spans, listed, length, m, mass_c, by_mass,
                        low, highest, need, trim, SPAN, CAPACITY, BLOCK, SHIFT,
                    )  # fmt: skip
                    cut, last = stricter(cut, last, new_cut, new_last)
            cut, last = stricter(cut, last, floor, vocab_size)

            kept_s = s
            kept = finite
            if (all_kept == 0) | listed | (finite < vocab_size):
                kept_s, kept = kept_statistics(
                    source, listed, length, m, c, mass_c, cut, last, masses_ptr, TILE, BLOCK, SHIFT
                )
                kept_s = tl.where(kept == vocab_size, s, kept_s)
            # Other warps read the masses that one has written.
            tl.debug_barrier()
            bits = uniform_bits(tl.load(seed_ptr + row), tl.load(position_ptr + row), DRAW)
            token = draw(
                source, listed, length, m, mass_c, cut, last, masses_ptr, bits, TILE, MAX_TILES,
                BLOCK, SHIFT,
            )  # fmt: skip
            z_token = clean(load_token_logit(z_ptr, token, vocab_size), top_is_inf)
            full_logprob = tl.where(greedy, 0.0, logprob_of(m, s, z_token, tau))
            logprob = tl.where(greedy, 0.0, logprob_of(m, kept_s, z_token, tau))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, logprob.to(tl.float32))
    tl.store(full_logprob_ptr + row, full_logprob.to(tl.float32))
    tl.store(kept_ptr + row, kept)
    tl.store(status_ptr + row, status.to(tl.uint8))
    tl.store(found_ptr + row * 3, cut)
    tl.store(found_ptr + row * 3 + 1, last)
    tl.store(found_ptr + row * 3 + 2, tl.where(listed, length, -1))
    tl.store(kept_sums_ptr + row, kept_s)


def sweep_fwd(logits, allowed, filters, joint, exact) -> Swept:
    """One read of the rows, two where `exact`. filters: temperature, top_k, top_p, min_p; or Nones,
    and the rows are as they are."""
    r = _row.rows(logits)
    vocab = logits.shape[-1]
    tiles = triton.cdiv(vocab, _row.TILE)
    if tiles > MAX_TILES:
        raise ValueError(f"logits must have V ≤ {MAX_TILES * _row.TILE}, got {vocab}")
    swept = Swept(
        logits.new_empty((r.count, tiles, 4), dtype=torch.float32),
        logits.new_empty((r.count, tiles * (_row.TILE // SPAN))),
        logits.new_empty((r.count, tiles), dtype=torch.int64),
    )
    if r.count == 0:
        return swept
    strides = r.inner, r.stride_outer, r.stride_inner, 0 if allowed is None else allowed.stride(0)
    per_program = triton.cdiv(tiles, programs_of_row(r.count, tiles))
    grid = (r.count, triton.cdiv(tiles, per_program))
    sample_tiles_fwd_kernel[grid](
        logits,
        allowed,
        *filters,
        swept.tiles,
        swept.spans,
        *strides,
        vocab,
        per_program,
        ALIGN=r.align,
        BLOCK=_row.TILE,
        SPAN=SPAN,
        **tiles_options(_row.capability(logits)),
    )
    if exact:
        sample_masses_fwd_kernel[grid](
            logits,
            allowed,
            *filters,
            swept.tiles,
            swept.masses,
            *strides,
            vocab,
            per_program,
            JOINT=bool(joint),
            ALIGN=r.align,
            BLOCK=_row.TILE,
            MAX_TILES=MAX_TILES,
            **_row.launch(logits),
        )
    return swept


def tiles_options(capability: int) -> dict:
    """Two warps share a tile, as in row.py; alone they need not wait for those of other tiles."""
    # ptxas makes more of a register on Hopper than on Blackwell, where it would spill.
    return _row.options(capability, num_warps=2, registers=128 if capability < 100 else 176)


def programs_of_row(rows: int, tiles: int) -> int:
    return min(tiles, triton.cdiv(_PROGRAMS, rows))


def sample_fwd(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    allowed,
    joint,
    keep_ties,
    exact,
    token,
    logprob,
    full_logprob,
    kept,
    status,
):
    """Fill token int64, logprob, full_logprob float32, kept int32, status uint8, all [B].

    temperature, top_p, min_p float32 [B]; top_k, seed, position int64 [B]; allowed int32
    [B, ceil(V/32)] or None; joint: Z of the row; keep_ties: of a cut; exact: integer mass for all.
    Returns what `support_fwd` reads.
    """
    r = _row.rows(logits)
    filters = temperature, top_k, top_p, min_p
    swept = sweep_fwd(logits, allowed, filters, joint, exact)
    w = Workspace(
        swept,
        hits=torch.empty_like(swept.spans, dtype=torch.int32),
        logits=logits.new_empty((r.count, CAPACITY)),
        ids=logits.new_empty((r.count, CAPACITY), dtype=torch.int32),
        found=logits.new_empty((r.count, 3), dtype=torch.int32),
        kept_sums=logits.new_empty(r.count, dtype=torch.float32),
    )
    if r.count == 0:
        return w
    sample_fwd_kernel[(r.count,)](
        logits,
        allowed,
        *filters,
        seed,
        position,
        swept.tiles,
        swept.spans,
        swept.masses,
        w.hits,
        w.logits,
        w.ids,
        w.found,
        w.kept_sums,
        token,
        logprob,
        full_logprob,
        kept,
        status,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        0 if allowed is None else allowed.stride(0),
        logits.shape[-1],
        JOINT=bool(joint),
        KEEP_TIES=bool(keep_ties),
        EXACT=bool(exact),
        SHIFT=SHIFT[logits.dtype],
        ALIGN=r.align,
        TILE=_row.TILE,
        MAX_TILES=MAX_TILES,
        SPAN=SPAN,
        CAPACITY=CAPACITY,
        BLOCK=CHUNK,
        **_row.launch(logits, **SEARCH),
    )
    return w


@triton.jit(
    do_not_specialize=[*LENGTHS, "capacity"],
    do_not_specialize_on_alignment=[
        "allowed_ptr",
        "kept_ptr",
        "status_ptr",
        "support_ids_ptr",
        "offsets_ptr",
        "bits_ptr",
    ],
)
def support_fwd_kernel(
    logits_ptr,
    allowed_ptr,
    list_ptr,
    ids_ptr,
    found_ptr,
    kept_ptr,
    status_ptr,
    support_ids_ptr,
    offsets_ptr,
    bits_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    allowed_stride: tl.int64,
    capacity: tl.int64,
    vocab_size: tl.int32,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Every program adds the rows before its own: no launch, and no order, between them.
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, row, BLOCK):
        before = start + tl.arange(0, BLOCK)
        sums += tl.load(kept_ptr + before, mask=before < row, other=0)
    begin = tl.sum(sums, 0)
    end = begin + tl.load(kept_ptr + row)
    tl.store(offsets_ptr + row + 1, end)
    if row == 0:
        tl.store(offsets_ptr, begin)
    if end > begin:
        cut = tl.load(found_ptr + row * 3)
        last = tl.load(found_ptr + row * 3 + 1)
        length = tl.load(found_ptr + row * 3 + 2)
        status = tl.load(status_ptr + row)
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        if allowed_ptr is not None:
            allowed_ptr += row * allowed_stride
        source = (
            z_ptr, allowed_ptr, vocab_size, list_ptr + row * CAPACITY, ids_ptr + row * CAPACITY,
            (status & 2) != 0,
        )  # fmt: skip
        if end <= capacity:
            listed = length >= 0
            length = tl.where(listed, length, vocab_size)
            for entry in range(0, length, BLOCK):
                at, z = load_entries(source, listed, entry, length, BLOCK)
                kept = is_kept(key_of(z, SHIFT), at, cut, last)
                rank = tl.cumsum(kept.to(tl.int32), 0)
                tl.store(support_ids_ptr + begin + rank - 1, at, mask=kept)
                begin += tl.sum(kept.to(tl.int32), 0)
        else:
            tl.store(status_ptr + row, status | 16)
            if bits_ptr is not None:
                words = (vocab_size + 31) // 32
                for column in range(0, vocab_size, BLOCK):
                    at, z = load_entries(source, False, column, vocab_size, BLOCK)
                    kept = is_kept(key_of(z, SHIFT), at, cut, last)
                    bit = kept.to(tl.int32) << (at % 32)
                    word = column // 32 + tl.arange(0, BLOCK // 32)
                    packed = tl.sum(tl.reshape(bit, [BLOCK // 32, 32]), 1)
                    tl.store(bits_ptr + row * words + word, packed, mask=word < words)


def support_fwd(logits, allowed, workspace, kept, status, ids, offsets, bits=None):
    """Fill ids int32 [capacity] and offsets int64 [B + 1] with the kept sets of `sample_fwd`.

    Ids ascend in a row. offsets are those of a buffer without end; a row that ends beyond the
    capacity has OVERFLOW set in status and its set in its row of bits int32 [B, ceil(V/32)], unless
    None: bit i of word w is token 32·w + i. Other rows of bits are not written.
    """
    r = _row.rows(logits)
    if r.count == 0:
        offsets.zero_()
        return
    support_fwd_kernel[(r.count,)](
        logits,
        allowed,
        workspace.logits,
        workspace.ids,
        workspace.found,
        kept,
        status,
        ids,
        offsets,
        bits,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        0 if allowed is None else allowed.stride(0),
        ids.numel(),
        logits.shape[-1],
        SHIFT=SHIFT[logits.dtype],
        ALIGN=r.align,
        CAPACITY=CAPACITY,
        BLOCK=_row.TILE // 2,
        **_row.launch(logits),
    )
