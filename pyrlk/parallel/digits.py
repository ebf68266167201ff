"""A draw from sharded rows in torch operations, for any device: on CUDA the one there is.

    mass w_i = floor(2^44·2^y_i), y = (z − m)·log2(e)/τ     key_i: ascending is logit descending
    top-k, top-p   the last key of the shortest prefix, 11, 11 and 10 bits at a time: the counts and
                   masses of the digits [B, 2, 2048], summed over the ranks, say which digit it has
    draw           first kept id, ascending, whose running mass exceeds u·Z/2^64

Masses are integers, so their sums over ranks are those of the whole row, and so is every choice
(csrc/kernels/sample.cpp). No logits travel. Collectives a call: one for the maxima, three a filter
of top-k and top-p, one for what each rank keeps, one for the token; one more for the support.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..support import Support
from . import vocab as _vocab
from .rows import Drawn, How, Parameters, check_total
from .vocab import Shard

NAN, INF, EMPTY, INVALID = 1, 2, 4, 8
_DIGITS = ((21, 11), (10, 11), (0, 10))  # shift and bits, the highest first
_NO_KEY = 1 << 32  # above every key
_ALL = 1 << 62
_LOW = 0xFFFFFFFF


class Prefix(NamedTuple):
    """The keys below `cut`, and of those at it the `ties` lowest ids; [B]."""

    cut: Tensor
    ties: Tensor


def scale_of(tau: Tensor) -> Tensor:
    """c = log2(e)/τ, divided as IEEE does: torch takes number / tensor for a product with 1/τ."""
    c = torch.full_like(tau, math.log2(math.e)) / tau
    return c.clamp(max=torch.finfo(torch.float32).max)


def sample(logits: Tensor, p: Parameters, how: How, allowed: Tensor | None, shard: Shard) -> Drawn:
    """From this rank's columns [..., V_local]; the same on every rank."""
    group = _vocab.process_group(shard)
    z, m, status, layout = _maxima(logits, p, allowed, shard)
    greedy = p.temperature == 0
    tau = torch.where(greedy, 1, p.temperature)
    c = scale_of(tau)
    whole = _row_masses(z, m, c)
    filters = _filters(p, m, tau, greedy, how, layout.total)
    z, ids = _candidates(z, filters, m, tau, p, layout)
    mass, key = masses(z, m[:, None], c[:, None]), _keys(z)
    kept = _kept_prefix(mass, key, whole - mass.sum(1), (m, c), filters, p, how, group)

    below = key < kept.cut[:, None]
    tied = (key == kept.cut[:, None]) & (key < _NO_KEY)
    each = masses(_logit(kept.cut), m, c)
    here = [below.sum(1), torch.where(below, mass, 0).sum(1), tied.sum(1), whole]
    counts, sums, ties, totals = _vocab.gathered(torch.stack(here), group).unbind(1)
    taken = (kept.ties - _before(ties)).clamp(min=0).minimum(ties)
    counts, sums = counts + taken, sums + taken * each
    rank = dist.get_rank(group)
    stays = below | (tied & (tied.cumsum(1) <= taken[rank][:, None]))

    left = _high_product(_uniform(p.seed, p.position), sums.sum(0)) - _before(sums)[rank]
    running = torch.where(stays, mass, 0).cumsum(1)
    mine = (left >= 0) & (left < sums[rank])
    at = (running <= left[:, None]).sum(1)
    token, logit = torch.zeros_like(at), torch.zeros_like(m)
    if z.shape[1]:
        at = at.clamp(max=z.shape[1] - 1)
        logit, token = z.gather(1, at[:, None])[:, 0], ids.gather(1, at[:, None])[:, 0]
    found = torch.stack([token, logit.view(torch.int32).long()]) * mine
    dist.all_reduce(found, group=group)
    token, logit = found[0], found[1].int().view(torch.float32)

    drawn = (status & (EMPTY | INVALID)) == 0
    logprob, full = (
        torch.where(greedy, 0, (logit - m).double() / tau - torch.log(total * 2.0**-44))
        for total in (sums.sum(0).double(), totals.sum(0).double())
    )
    logprob, full = (torch.where(drawn, x, math.nan).float() for x in (logprob, full))
    stays, counts = stays & drawn[:, None], torch.where(drawn, counts, 0)
    out = torch.where(drawn, token, -1), logprob, full, counts.sum(0).int(), status
    return Drawn(*out, _support(ids[stays].int(), counts, group) if how.support else None)


def _maxima(logits: Tensor, p: Parameters, allowed: Tensor | None, shard: Shard):
    """(z in float32 without NaN and +inf, m, status, layout); a row without a draw has z = −inf."""
    whole = logits.reshape(len(p.seed), logits.shape[-1]).float()
    clean = whole

    def fill(first: int, out: Tensor) -> None:
        nonlocal clean
        nan = whole.isnan()
        if allowed is not None:
            bad = _forbidden(allowed, first, whole.shape[1])
            nan = nan & ~bad
            clean = torch.where(bad, -math.inf, whole)
        clean = torch.where(clean.isnan(), -math.inf, clean)
        out.zero_()
        out[:, 0] = clean.amax(1) if whole.shape[1] else -math.inf
        out[:, 1] = nan.any(1)

    parts, layout, apart = _vocab.meet(fill, "seed", p.seed, 0, shard, whole.shape[1], whole)
    check_total(layout, allowed)
    m = parts[..., 0].amax(0)
    valid = (p.temperature >= 0) & (p.temperature < math.inf)
    for share in (p.top_p, p.min_p):
        valid = valid & (share >= 0) & (share <= 1)
    infinite, lost = m == math.inf, m == -math.inf
    if apart is not None:
        lost = lost | apart
    status = NAN * parts[..., 1].amax(0).to(torch.uint8) + INF * infinite + EMPTY * lost
    status = torch.where(valid, status, INVALID).to(torch.uint8)
    top = torch.zeros_like(clean).masked_fill_(clean != math.inf, -math.inf)
    z = torch.where(infinite[:, None], top, clean)
    m = torch.where(infinite | lost | ~valid, 0, m)
    return torch.where((lost | ~valid)[:, None], -math.inf, z), m, status, layout


def _forbidden(allowed: Tensor, first: int, width: int) -> Tensor:
    """bool [B, width]: ids from `first` on whose bit is 0; beyond the words, too."""
    ids = torch.arange(first, first + width, device=allowed.device)
    word = allowed[:, (ids // 32).clamp(max=max(0, allowed.shape[1] - 1))]
    return (word >> (ids % 32).to(torch.int32) & 1) == 0


def masses(z: Tensor, m: Tensor, c: Tensor) -> Tensor:
    """floor(2^44·2^y), int64: the polynomial of csrc/kernels/vec.h, an operation at a time."""
    y = ((z - m) * c).nan_to_num(nan=-127.0).clamp(min=-127.0)
    n = (y + 12582912.0) - 12582912.0
    f = y - n
    p = torch.full_like(f, 0.00015196693129837513)
    for a in (
        0.0013391304528340697,
        0.009619002230465412,
        0.055503588169813156,
        0.24022643268108368,
        0.6931471824645996,
        1.0,
    ):
        p = p * f
        p = p + a
    bits = p.view(torch.int32) + (n.to(torch.int32) << 23)
    return (bits.view(torch.float32) * 17592186044416.0).long()


def _row_masses(z: Tensor, m: Tensor, c: Tensor) -> Tensor:
    """[B]; on CPU a few rows at a time, whose intermediate results stay in cache."""
    size = len(z) if z.is_cuda else max(1, (1 << 17) // max(1, z.shape[1]))
    blocks = zip(z.split(size), m.split(size), c.split(size), strict=True)
    parts = [masses(a, b[:, None], s[:, None]).sum(1) for a, b, s in blocks]
    return torch.cat(parts) if parts else m.long()


def _keys(z: Tensor) -> Tensor:
    """Ascending is the logit descending; −0 equals +0, −inf is no key."""
    u = (z + 0.0).view(torch.int32).long() & _LOW
    key = torch.where(u >= 1 << 31, u, ~u & (_LOW >> 1))
    return torch.where(z == -math.inf, _NO_KEY, key)


def _logit(key: Tensor) -> Tensor:
    """The logit of a key."""
    u = torch.where(key >= 1 << 31, key, ~key & (_LOW >> 1))
    return torch.where(u >= 1 << 31, u - (1 << 32), u).int().view(torch.float32)


class Filters(NamedTuple):
    """Which rows have which filter [B], k with 1 for the greedy ones, and the logit of min-p."""

    by_k: Tensor
    by_p: Tensor
    by_min: Tensor
    of_top_k: Tensor  # top-p is of the mass that top-k left
    top_k: Tensor
    least: Tensor
    trims: Tensor  # top-k does, among equal logits


def _filters(p: Parameters, m, tau, greedy, how: How, total: int) -> Filters:
    top_k = torch.where(greedy, 1, p.top_k)
    by_k, by_p = (top_k > 0) & (top_k < total), (p.top_p < 1) & ~greedy
    least = m.double() + tau.double() * p.min_p.double().log()
    near = least.float()
    up = torch.nextafter(near, torch.full_like(near, math.inf))
    least = torch.where(near < least, up, near)
    of_top_k = by_k & by_p & (not how.joint)
    trims = greedy | (not how.keep_ties)
    return Filters(by_k, by_p, (p.min_p > 0) & ~greedy, of_top_k, top_k, least, trims)


def _candidates(z, f: Filters, m, tau, p: Parameters, layout) -> tuple[Tensor, Tensor]:
    """(logits, ids), ascending in a row, of a set that holds all kept tokens; the rest is −inf.

    The bounds of csrc/kernels/sample.cpp. On CUDA, where their number cannot be read, all.
    """
    ids = torch.arange(layout.first, layout.first + z.shape[1], device=z.device).expand(z.shape)
    if z.is_cuda or z.numel() == 0:
        return z, ids
    bound = torch.full_like(m, -torch.finfo(torch.float32).max)
    widest = int(torch.where(f.by_k, f.top_k, 0).max())
    if 0 < widest < z.shape[1]:
        at = z.topk(widest).values.gather(1, (f.top_k.clamp(1, widest) - 1)[:, None])[:, 0]
        bound = torch.where(f.by_k, bound.maximum(at), bound)
    tail = (layout.total / (1 - p.top_p.double())).log().add(1e-4).clamp(max=30.6)
    low = (m.double() - tau.double() * tail).clamp(min=-torch.finfo(torch.float32).max).float()
    low = torch.nextafter(low, torch.full_like(low, -math.inf))
    bound = torch.where(f.by_p & ~f.of_top_k, bound.maximum(low), bound)
    bound = torch.where(f.by_min & ~f.of_top_k, bound.maximum(f.least), bound)
    row, column = (z >= bound[:, None]).nonzero().unbind(1)
    counts = row.bincount(minlength=len(z))
    slot = torch.arange(len(row), device=row.device) - _before(counts)[row]
    size = (len(z), int(counts.max()))
    few, few_ids = z.new_full(size, -math.inf), ids.new_zeros(size)
    few[row, slot], few_ids[row, slot] = z[row, column], column + layout.first
    return few, few_ids


def _kept_prefix(mass, key, rest, scale, f: Filters, p: Parameters, how: How, group) -> Prefix:
    kept = Prefix(torch.full_like(p.top_k, _NO_KEY), torch.full_like(p.top_k, _ALL))
    pool = torch.full_like(p.top_k, -1)  # the mass of the top-k set
    if _any(f.by_k):
        found, inside = _shortest(mass, key, rest, scale, f.trims, group, count=f.top_k)
        kept = Prefix(*(torch.where(f.by_k, a, b) for a, b in zip(found, kept, strict=True)))
        pool = torch.where(f.of_top_k, inside, pool)
    if _any(f.by_p):
        trims = torch.full_like(f.trims, not how.keep_ties)
        found, _ = _shortest(mass, key, rest, scale, trims, group, share=p.top_p, pool=pool)
        kept = _shorter(kept, found, f.by_p)
    if _any(f.by_min):
        cut = _keys(f.least)
        kept = _shorter(kept, Prefix(cut, torch.full_like(cut, _ALL)), f.by_min)
    return kept


def _any(rows: Tensor) -> bool:
    """Whether a filter is on at all: read on CPU; on CUDA it always is."""
    return rows.is_cuda or bool(rows.any())


def _shorter(a: Prefix, b: Prefix, where: Tensor) -> Prefix:
    b_first = where & ((b.cut < a.cut) | ((b.cut == a.cut) & (b.ties < a.ties)))
    return Prefix(torch.where(b_first, b.cut, a.cut), torch.where(b_first, b.ties, a.ties))


def _shortest(mass, key, rest, scale, trims, group, *, count=None, share=None, pool=None):
    """(the shortest prefix of `count` keys, or of `share` of the mass, its mass) over all ranks.

    `share` is of `pool` [B], and of the whole row where that is negative: of the candidates and of
    the `rest` of this rank's mass.
    """
    by = 0 if share is None else 1
    weights = torch.stack([(key < _NO_KEY).long(), mass], 1)  # [B, 2, V_local]
    base = torch.zeros_like(trims, dtype=torch.int64)  # the digits of the cut so far
    below = at = everything = torch.zeros_like(base)[:, None].repeat(1, 2)
    need = base if count is None else count
    for shift, bits in _DIGITS:
        inside = (key >> (shift + bits)) == (base >> (shift + bits))[:, None]
        digit = (key >> shift) & ((1 << bits) - 1)
        part = weights * inside[:, None]
        flat = part.new_zeros(len(part), (2 << bits) + 1)
        flat[:, -1] = rest
        table = flat[:, :-1].view(-1, 2, 1 << bits)
        table.scatter_add_(2, digit[:, None].expand_as(part), part)
        dist.all_reduce(flat, group=group)
        if shift == _DIGITS[0][0]:
            everything = table.sum(2)
            everything[:, 1] += flat[:, -1]
            if share is not None:
                need = _share_of(share, torch.where(pool < 0, everything[:, 1], pool))
        running = table.cumsum(2) + below[..., None]
        found = (running[:, by] < need[:, None]).sum(1).clamp(max=(1 << bits) - 1)
        here = found[:, None, None].expand(-1, 2, 1)
        at = table.gather(2, here)[..., 0]
        below = running.gather(2, here)[..., 0] - at
        base = base | found << shift
    each = masses(_logit(base), *scale)
    unit = each.clamp(min=1) if by else torch.ones_like(each)
    ties = torch.where(trims, -((below[:, by] - need) // unit), _ALL)
    reached = everything[:, by] >= need
    prefix = Prefix(torch.where(reached, base, _NO_KEY), torch.where(reached, ties, _ALL))
    inside_of = below[:, 1] + each * ties.minimum(at[:, 0])
    return prefix, torch.where(reached, inside_of, everything[:, 1])


def _share_of(share: Tensor, total: Tensor) -> Tensor:
    """max(1, ceil(P·total / 2^32)) with P = floor(share·2^32), in pieces that fit 63 bits."""
    P = (share.double() * 4294967296.0).long()
    a, b = (total & _LOW) >> 16, total & 0xFFFF
    low = P * b
    middle = P * a + (low >> 16)
    rest = ((middle & 0xFFFF) != 0) | ((low & 0xFFFF) != 0)
    return (P * (total >> 32) + (middle >> 16) + rest).clamp(min=1)


def _uniform(seed: Tensor, position: Tensor) -> list[Tensor]:
    """The 64 bits of Philox4x32-10, stream 0, as four limbs of 16, the lowest first."""
    c = [position & _LOW, position >> 32 & _LOW, torch.zeros_like(seed), torch.zeros_like(seed)]
    k = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        a, b = (
            0xD2511F53 * c[0],
            0xCD9E8D57 * c[2],
        )  # the product of 64 bits wraps: its bits are right
        c = [(b >> 32 & _LOW) ^ c[1] ^ k[0], b & _LOW, (a >> 32 & _LOW) ^ c[3] ^ k[1], a & _LOW]
        k = [(k[0] + 0x9E3779B9) & _LOW, (k[1] + 0xBB67AE85) & _LOW]
    return [c[1] & 0xFFFF, c[1] >> 16, c[0] & 0xFFFF, c[0] >> 16]


def _high_product(limbs: list[Tensor], total: Tensor) -> Tensor:
    """floor(u·total / 2^64)."""
    others = [total >> 16 * i & 0xFFFF for i in range(4)]
    carry, high = torch.zeros_like(total), torch.zeros_like(total)
    for place in range(7):
        for i in range(max(0, place - 3), min(place, 3) + 1):
            carry = carry + limbs[i] * others[place - i]
        if place >= 4:
            high = high | (carry & 0xFFFF) << 16 * (place - 4)
        carry = carry >> 16
    return high | carry << 48


def _before(x: Tensor) -> Tensor:
    """The sum over the ranks before each."""
    return x.cumsum(0) - x


def _support(mine: Tensor, counts: Tensor, group) -> Support:
    """All ranks' kept ids as CSR, from [ranks, B] counts; ids of a row ascend in rank order."""
    sizes = counts.sum(1)
    padded = mine.new_zeros(int(sizes.max()))
    padded[: mine.numel()] = mine
    every = _vocab.gathered(padded, group)
    offsets = torch.nn.functional.pad(counts.sum(0).cumsum(0), (1, 0))
    ids = mine.new_empty(int(offsets[-1]))
    for r, part in enumerate(every):
        begin = offsets[:-1] + _before(counts)[r]
        shift = begin - _before(counts[r])
        slot = shift.repeat_interleave(counts[r]) + torch.arange(int(sizes[r]), device=ids.device)
        ids[slot] = part[: int(sizes[r])]
    return Support(ids, offsets)
