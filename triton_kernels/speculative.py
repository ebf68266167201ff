"""Draft verification: a prefix of each draft, and the token after it.

    accept    token x at depth i iff floor(u·v_x·Z / 2^64) < w_x·Y
    residual  at the first rejection, the first kept id whose running mass of
              r = floor(max(w·Y − v·Z, 0) / 2^shift) exceeds floor(u·Σr / 2^64)
    bonus     after n acceptances, the draw of sample.py from row n

w are the masses of the target's kept set and Z is their sum, v and Y those of the draft: integers
as in sample.py. Products take 128 bits; shift is the least that leaves Σr below 2^62. A draft
without logits is one token of mass 1.

1. sample     the kernels of sample.py on the B·(n + 1) rows of the target: kept sets, a draw each
2. tiles      one read of the B·n rows of the draft; exact only, a second one for Y
3. accept     one program a draft: depth after depth to the first rejection
4. residual   of the rows that refused their token: Σr of each tile
5. draw       one program a draft: the tile, the token in it, its log-probs

Every choice is made on one row of the target and one of the draft, in integers: no batch, and no
number of programs, changes a bit of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import row as _row
from . import sample as _sample
from .prefix import clean, fold, is_kept, key_of, load_entries, mass_of, mass_scale_of
from .row import load_tile, load_token_logit, logprob_of, row_offset, scale_of
from .sample import (
    ACCEPT,
    RESIDUAL,
    draw,
    load_masses,
    load_tiles,
    tile_of,
    uniform_bits,
    whole_sum,
)

_VARIES = {
    "do_not_specialize": [
        *("inner", "stride_outer", "stride_inner", "vocab_size", "depth", "tiles_per_program"),
        *("draft_inner", "draft_stride_outer", "draft_stride_inner"),
    ],
    "do_not_specialize_on_alignment": [
        *("draft_tokens_ptr", "temperature_ptr", "seed_ptr", "position_ptr"),
        *("token_ptr", "logprob_ptr", "full_logprob_ptr", "kept_ptr", "status_ptr", "accepted_ptr"),
    ],
}


# One warp: it decides, and a store of one depth is a load of no other warp.
ACCEPT_WARPS = 1


class Refused(NamedTuple):
    """What accept hands on."""

    depth: torch.Tensor  # int32 [B]: of the rejection, or −1
    masses: torch.Tensor  # int64 [B, T]: Σr of the tiles of that row


@triton.jit
def product(a, b):
    """(high, low) of a·b in 128 bits."""
    return tl.umulhi(a, b), a * b


@triton.jit
def below(high, low, other_high, other_low):
    """Whether one number of 128 bits is less than another."""
    return (high < other_high) | ((high == other_high) & (low < other_low))


@triton.jit
def accepts(bits, w, target_mass, v, draft_mass):
    """floor(bits·v·Z / 2^64) < w·Y."""
    high, low = product(v, target_mass)
    upper_high, upper_low = product(bits, high)
    scaled = upper_low + tl.umulhi(bits, low)
    carry = (scaled < upper_low).to(tl.uint64)
    goal_high, goal_low = product(w, draft_mass)
    return below(upper_high + carry, scaled, goal_high, goal_low)


@triton.jit
def bit_length(x):
    length = (x > 0).to(tl.int32)
    for k in tl.static_range(6):
        step = 32 >> k
        more = (x >> step) > 0
        length += tl.where(more, step, 0)
        x = tl.where(more, x >> step, x)
    return length


@triton.jit
def residual(w, target_mass, v, draft_mass):
    """floor(max(w·Y − v·Z, 0) / 2^shift) in int64."""
    shift = tl.maximum(bit_length(target_mass) + bit_length(draft_mass) - 62, 0)
    high, low = product(w, draft_mass)
    other_high, other_low = product(v, target_mass)
    more = below(other_high, other_low, high, low)
    high = high - other_high - (low < other_low).to(tl.uint64)
    low -= other_low
    # 0 ≤ shift ≤ 64, and a shift by 64 is none.
    down = tl.where(shift < 64, low >> tl.minimum(shift, 63).to(tl.uint64), 0)
    up = tl.where(shift > 0, high << (64 - tl.maximum(shift, 1)).to(tl.uint64), 0)
    return tl.where(more, (down | up).to(tl.int64), 0)


@triton.jit
def temperature_of(temperature_ptr, row):
    """(greedy, τ)."""
    tau = tl.load(temperature_ptr + row)
    return tau == 0.0, tl.where(tau == 0.0, 1.0, tau)


@triton.jit
def target_row(
    logits_ptr, tiles_ptr, masses_ptr, list_ptr, ids_ptr, found_ptr, row, inner, stride_outer,
    stride_inner, vocab_size, ALIGN: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
    MAX_TILES: tl.constexpr,
):  # fmt: skip
    """(z_ptr, list_ptr, ids_ptr, whether it holds +inf, m, Z, cut, last, listed, entries)."""
    tiles = (vocab_size + TILE - 1) // TILE
    tile_m, _, _, _, top_is_inf = load_tiles(tiles_ptr + row * tiles * 4, tiles, MAX_TILES)
    cut = tl.load(found_ptr + row * 3)
    last = tl.load(found_ptr + row * 3 + 1)
    length = tl.load(found_ptr + row * 3 + 2)
    listed = length >= 0
    length = tl.where(listed, length, vocab_size)
    mass = tl.sum(load_masses(masses_ptr + row * tiles, length, TILE, MAX_TILES), 0)
    z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
    list_ptr += row * CAPACITY
    ids_ptr += row * CAPACITY
    return (
        z_ptr, list_ptr, ids_ptr, top_is_inf, tl.max(tile_m, 0), mass.to(tl.uint64), cut, last,
        listed, length,
    )  # fmt: skip


@triton.jit
def draft_row(
    tiles_ptr, masses_ptr, row, vocab_size, EXACT: tl.constexpr, TILE: tl.constexpr,
    MAX_TILES: tl.constexpr,
):  # fmt: skip
    """(whether it holds +inf, m, Y) of a row of the draft; Y = 0: no distribution."""
    top_is_inf = False
    m = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 1, tl.int64)
    if tiles_ptr is not None:
        tiles = (vocab_size + TILE - 1) // TILE
        tiles_ptr += row * tiles * 4
        tile_m, tile_s, _, _, top_is_inf = load_tiles(tiles_ptr, tiles, MAX_TILES)
        m = tl.max(tile_m, 0)
        mass = tl.full([], 0, tl.int64)
        if m > float("-inf"):
            if EXACT:
                masses_ptr += row * tiles
                mass = tl.sum(load_masses(masses_ptr, vocab_size, TILE, MAX_TILES), 0)
            else:
                c = scale_of(tl.full([], 1.0, tl.float32))
                s = whole_sum(tiles_ptr, tiles, tile_s, top_is_inf, c)
                mass = (s.to(tl.float64) * 17592186044416.0).to(tl.int64)
    return top_is_inf, m, mass.to(tl.uint64)


@triton.jit
def draft_masses(z, top_is_inf, m):
    """v of logits of the draft."""
    c = mass_scale_of(tl.full([], 1.0, tl.float32))
    return mass_of(clean(z, top_is_inf), m, c).to(tl.uint64)


@triton.jit
def store_token(
    token_ptr, logprob_ptr, full_logprob_ptr, tiles_ptr, kept_sums_ptr, temperature_ptr, row, token,
    z, m, vocab_size, TILE: tl.constexpr, MAX_TILES: tl.constexpr,
):  # fmt: skip
    """A token of the target with its log-probs, as sample.py has them."""
    tiles = (vocab_size + TILE - 1) // TILE
    greedy, tau = temperature_of(temperature_ptr, row)
    tiles_ptr += row * tiles * 4
    _, tile_s, _, _, top_is_inf = load_tiles(tiles_ptr, tiles, MAX_TILES)
    s = whole_sum(tiles_ptr, tiles, tile_s, top_is_inf, scale_of(tau))
    kept_s = tl.load(kept_sums_ptr + row)
    logprob = tl.where(greedy, 0.0, logprob_of(m, kept_s, z, tau))
    full_logprob = tl.where(greedy, 0.0, logprob_of(m, s, z, tau))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, logprob.to(tl.float32))
    tl.store(full_logprob_ptr + row, full_logprob.to(tl.float32))


@triton.jit
def residuals(
    source, listed, start, length, m, c, cut, last, target_mass, q_ptr, x, draft_inf, draft_m,
    draft_mass, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(ids, r) of the entries from `start` on."""
    at, z = load_entries(source, listed, start, length, BLOCK)
    kept = is_kept(key_of(z, SHIFT), at, cut, last)
    w = tl.where(kept, mass_of(z, m, c), 0).to(tl.uint64)
    if q_ptr is None:
        v = (at == x).to(tl.uint64)
    else:
        if listed:
            q = tl.load(q_ptr + at, mask=kept, other=float("-inf")).to(tl.float32)
        else:
            q = load_tile(q_ptr, start, length, BLOCK)
        v = draft_masses(q, draft_inf, draft_m)
    return at, residual(w, target_mass, v, draft_mass)


@triton.jit(**_VARIES)
def verify_accept_fwd_kernel(
    logits_ptr,
    draft_logits_ptr,
    draft_tokens_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    tiles_ptr,
    masses_ptr,
    list_ptr,
    ids_ptr,
    found_ptr,
    kept_sums_ptr,
    draft_tiles_ptr,
    draft_masses_ptr,
    token_ptr,
    logprob_ptr,
    full_logprob_ptr,
    kept_ptr,
    status_ptr,
    accepted_ptr,
    refused_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    draft_inner: tl.int64,
    draft_stride_outer: tl.int64,
    draft_stride_inner: tl.int64,
    vocab_size: tl.int32,
    depth: tl.int32,
    EXACT: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    DRAFT_ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_TILES: tl.constexpr,
):
    draft = tl.program_id(0).to(tl.int64)
    accepted = tl.full([], 0, tl.int32)
    refused = tl.full([], -1, tl.int32)
    going = tl.full([], 1, tl.int32)
    for i in range(depth + 1):
        row = draft * (depth + 1) + i
        if going == 0:
            tl.store(token_ptr + row, -1)
            tl.store(logprob_ptr + row, 0.0)
            tl.store(full_logprob_ptr + row, 0.0)
            tl.store(kept_ptr + row, 0)
            tl.store(status_ptr + row, 0)
        else:
            # Row n and rows without a distribution stand as sample.py has left them.
            going = 0
            status = tl.load(status_ptr + row).to(tl.int32)
            if (i < depth) & ((status & 12) == 0):
                at = draft * depth + i
                x = tl.load(draft_tokens_ptr + at)
                z_ptr, _, _, top_is_inf, m, target_mass, cut, last, _, _ = target_row(
                    logits_ptr, tiles_ptr, masses_ptr, list_ptr, ids_ptr, found_ptr, row, inner,
                    stride_outer, stride_inner, vocab_size, ALIGN, TILE, CAPACITY, MAX_TILES,
                )  # fmt: skip
                _, tau = temperature_of(temperature_ptr, row)
                z = clean(load_token_logit(z_ptr, x, vocab_size), top_is_inf)
                kept = is_kept(key_of(z, SHIFT), x, cut, last)
                w = tl.where(kept, mass_of(z, m, mass_scale_of(tau)), 0).to(tl.uint64)
                draft_inf, draft_m, draft_mass = draft_row(
                    draft_tiles_ptr, draft_masses_ptr, at, vocab_size, EXACT, TILE, MAX_TILES
                )
                v = tl.full([], 1, tl.uint64)
                if draft_logits_ptr is not None:
                    q_ptr = draft_logits_ptr + row_offset(
                        at, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_ALIGN
                    )
                    v = draft_masses(load_token_logit(q_ptr, x, vocab_size), draft_inf, draft_m)
                bits = uniform_bits(tl.load(seed_ptr + row), tl.load(position_ptr + row), ACCEPT)
                if draft_mass == 0:
                    tl.store(token_ptr + row, -1)
                    tl.store(logprob_ptr + row, float("nan"))
                    tl.store(full_logprob_ptr + row, float("nan"))
                    tl.store(kept_ptr + row, 0)
                    tl.store(status_ptr + row, (status | 8).to(tl.uint8))
                elif accepts(bits, w, target_mass, v, draft_mass):
                    going = 1
                    accepted += 1
                    store_token(
                        token_ptr, logprob_ptr, full_logprob_ptr, tiles_ptr, kept_sums_ptr,
                        temperature_ptr, row, x, z, m, vocab_size, TILE, MAX_TILES,
                    )  # fmt: skip
                else:
                    refused = i
    tl.store(accepted_ptr + draft, accepted)
    tl.store(refused_ptr + draft, refused)


@triton.jit(**_VARIES)
def verify_residual_fwd_kernel(
    logits_ptr,
    draft_logits_ptr,
    draft_tokens_ptr,
    temperature_ptr,
    tiles_ptr,
    masses_ptr,
    list_ptr,
    ids_ptr,
    found_ptr,
    draft_tiles_ptr,
    draft_masses_ptr,
    refused_ptr,
    residual_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    draft_inner: tl.int64,
    draft_stride_outer: tl.int64,
    draft_stride_inner: tl.int64,
    vocab_size: tl.int32,
    depth: tl.int32,
    tiles_per_program: tl.int32,
    EXACT: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    DRAFT_ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draft = tl.program_id(0).to(tl.int64)
    i = tl.load(refused_ptr + draft)
    if i >= 0:
        tiles = (vocab_size + TILE - 1) // TILE
        row = draft * (depth + 1) + i
        z_ptr, list_ptr, ids_ptr, top_is_inf, m, target_mass, cut, last, listed, length = (
            target_row(
                logits_ptr, tiles_ptr, masses_ptr, list_ptr, ids_ptr, found_ptr, row, inner,
                stride_outer, stride_inner, vocab_size, ALIGN, TILE, CAPACITY, MAX_TILES,
            )
        )  # fmt: skip
        source = (z_ptr, None, vocab_size, list_ptr, ids_ptr, top_is_inf)
        _, tau = temperature_of(temperature_ptr, row)
        c = mass_scale_of(tau)
        at = draft * depth + i
        x = tl.load(draft_tokens_ptr + at)
        draft_inf, draft_m, draft_mass = draft_row(
            draft_tiles_ptr, draft_masses_ptr, at, vocab_size, EXACT, TILE, MAX_TILES
        )
        q_ptr = draft_logits_ptr
        if draft_logits_ptr is not None:
            q_ptr += row_offset(
                at, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_ALIGN
            )
        first = tl.program_id(1) * tiles_per_program * TILE
        for tile in range(first, tl.minimum(first + tiles_per_program * TILE, length), TILE):
            mass = tl.zeros([BLOCK // 4], tl.int64)
            for start in range(tile, tl.minimum(tile + TILE, length), BLOCK):
                _ids, r = residuals(
                    source, listed, start, length, m, c, cut, last, target_mass, q_ptr, x,
                    draft_inf, draft_m, draft_mass, BLOCK, SHIFT,
                )  # fmt: skip
                mass += fold(r)
            tl.store(residual_ptr + draft * tiles + tile // TILE, tl.sum(mass, 0))


@triton.jit(**_VARIES)
def verify_draw_fwd_kernel(
    logits_ptr,
    draft_logits_ptr,
    draft_tokens_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    tiles_ptr,
    masses_ptr,
    list_ptr,
    ids_ptr,
    found_ptr,
    kept_sums_ptr,
    draft_tiles_ptr,
    draft_masses_ptr,
    refused_ptr,
    residual_ptr,
    token_ptr,
    logprob_ptr,
    full_logprob_ptr,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    draft_inner: tl.int64,
    draft_stride_outer: tl.int64,
    draft_stride_inner: tl.int64,
    vocab_size: tl.int32,
    depth: tl.int32,
    EXACT: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    DRAFT_ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draft = tl.program_id(0).to(tl.int64)
    i = tl.load(refused_ptr + draft)
    if i >= 0:
        tiles = (vocab_size + TILE - 1) // TILE
        row = draft * (depth + 1) + i
        z_ptr, list_ptr, ids_ptr, top_is_inf, m, target_mass, cut, last, listed, length = (
            target_row(
                logits_ptr, tiles_ptr, masses_ptr, list_ptr, ids_ptr, found_ptr, row, inner,
                stride_outer, stride_inner, vocab_size, ALIGN, TILE, CAPACITY, MAX_TILES,
            )
        )  # fmt: skip
        source = (z_ptr, None, vocab_size, list_ptr, ids_ptr, top_is_inf)
        _, tau = temperature_of(temperature_ptr, row)
        c = mass_scale_of(tau)
        at = draft * depth + i
        x = tl.load(draft_tokens_ptr + at)
        draft_inf, draft_m, draft_mass = draft_row(
            draft_tiles_ptr, draft_masses_ptr, at, vocab_size, EXACT, TILE, MAX_TILES
        )
        q_ptr = draft_logits_ptr
        if draft_logits_ptr is not None:
            q_ptr += row_offset(
                at, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_ALIGN
            )
        bits = uniform_bits(tl.load(seed_ptr + row), tl.load(position_ptr + row), RESIDUAL)
        masses = load_masses(residual_ptr + draft * tiles, length, TILE, MAX_TILES)
        token = vocab_size
        if tl.sum(masses, 0) > 0:
            begin, running, goal = tile_of(masses, bits, TILE)
            for start in range(begin, tl.minimum(begin + TILE, length), BLOCK):
                ids, r = residuals(
                    source, listed, start, length, m, c, cut, last, target_mass, q_ptr, x,
                    draft_inf, draft_m, draft_mass, BLOCK, SHIFT,
                )  # fmt: skip
                beyond = running + tl.cumsum(r, 0) > goal
                token = tl.minimum(token, tl.min(tl.where(beyond, ids, vocab_size), 0))
                running += tl.sum(r, 0)
        else:
            # Nothing is left where neither gave its token anything and both agree on all others.
            token = draw(
                source, listed, length, m, c, cut, last, masses_ptr + row * tiles, bits, TILE,
                MAX_TILES, BLOCK, SHIFT,
            )  # fmt: skip
        z = clean(load_token_logit(z_ptr, token, vocab_size), top_is_inf)
        store_token(
            token_ptr, logprob_ptr, full_logprob_ptr, tiles_ptr, kept_sums_ptr, temperature_ptr,
            row, token, z, m, vocab_size, TILE, MAX_TILES,
        )  # fmt: skip


def verify_fwd(
    logits,
    draft_tokens,
    draft_logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    exact,
    token,
    accepted,
    logprob,
    full_logprob,
    kept,
    status,
):
    """Fill token int64, logprob, full_logprob float32, kept int32, status uint8, all [B·(n + 1)],
    and accepted int32 [B].

    logits [B, n + 1, V]; draft_tokens int64 [B, n]; draft_logits [B, n, V] or None; temperature,
    top_p, min_p float32, top_k, seed, position int64 [B·(n + 1)]: of the rows. exact: as in
    `sample.sample_fwd`. Returns what `sample.support_fwd` reads.
    """
    batch, depth, vocab = logits.shape[0], logits.shape[1] - 1, logits.shape[2]
    filters = temperature, top_k, top_p, min_p
    workspace = _sample.sample_fwd(
        logits, *filters, seed, position, None, False, False, exact, token, logprob, full_logprob,
        kept, status,
    )  # fmt: skip
    if batch == 0:
        return workspace
    swept, draft = workspace.swept, (None, None, None)
    target = proposal = _row.rows(logits)
    if depth == 0:
        draft_logits = None
    if draft_logits is not None:
        proposal = _row.rows(draft_logits)
        draft = _sample.sweep_fwd(draft_logits, None, (None,) * 4, False, exact)
    tiles = swept.tiles.shape[1]
    refused = Refused(torch.empty_like(accepted), swept.masses.new_empty((batch, tiles)))
    rows = (
        *(target.inner, target.stride_outer, target.stride_inner),
        *(proposal.inner, proposal.stride_outer, proposal.stride_inner),
        *(vocab, depth),
    )
    constants = {
        "EXACT": bool(exact),
        "SHIFT": _sample.SHIFT[logits.dtype],
        "ALIGN": target.align,
        "DRAFT_ALIGN": proposal.align,
        "TILE": _row.TILE,
        "CAPACITY": _sample.CAPACITY,
        "MAX_TILES": _sample.MAX_TILES,
    }
    launch = _row.launch(logits, **_sample.SEARCH)
    lists = workspace.logits, workspace.ids, workspace.found
    verify_accept_fwd_kernel[(batch,)](
        logits, draft_logits, draft_tokens, temperature, seed, position, swept.tiles, swept.masses,
        *lists, workspace.kept_sums, draft[0], draft[2], token, logprob, full_logprob, kept, status,
        accepted, refused.depth, *rows, **constants, **_row.launch(logits, ACCEPT_WARPS),
    )  # fmt: skip
    if depth == 0:
        return workspace
    per_program = triton.cdiv(tiles, _sample.programs_of_row(batch, tiles))
    verify_residual_fwd_kernel[(batch, triton.cdiv(tiles, per_program))](
        logits, draft_logits, draft_tokens, temperature, swept.tiles, swept.masses, *lists,
        draft[0], draft[2], *refused, *rows, per_program, **constants, BLOCK=_sample.CHUNK,
        **launch,
    )  # fmt: skip
    verify_draw_fwd_kernel[(batch,)](
        logits, draft_logits, draft_tokens, temperature, seed, position, swept.tiles, swept.masses,
        *lists, workspace.kept_sums, draft[0], draft[2], *refused, token, logprob, full_logprob,
        *rows, **constants, BLOCK=_sample.CHUNK, **launch,
    )  # fmt: skip
    return workspace
