"""Rows whose columns are sharded over ranks: each sends 4 floats a token, and knows the whole row.

    rank r    m_r = max z,  s_r = Σ 2^y,  E_r = Σ 2^y·y,  y = (z − m_r)·c,  c = log2(e)/τ,  z_a
    the row   m = max m_r,  d_r = (m_r − m)·c,  s = Σ 2^{d_r}·s_r,  E = Σ 2^{d_r}·(E_r + d_r·s_r)
    logprob = (z_a − m)/τ − ln s          H = ln s − ln2·E/s

One all-gather a call. The sums run in rank order in float64, so every rank has the same bits, from
run to run; what is kept for backward is (m, s, E, z_a) of the row, and the gradient is local.
Columns are numbered in rank order. z_a is −inf on the ranks that do not hold the token.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check, _op
from .. import support as _support
from .._rows import Actions, check_tokens, wrong_tokens

_HEADER = 8  # floats before those of the tokens
_DIGEST = 5  # the last number of the header
_INTEGERS = 1 << 24  # what a float of the header holds exactly


class Shard(NamedTuple):
    """Whose columns are here, in the order of the schemas; no group: all are."""

    group: str
    guess: int  # first id of this rank's columns where the ranks have not met; −1: of equal shards

    @property
    def sharded(self) -> bool:
        return self.group != ""


WHOLE = Shard("", 0)


class Layout(NamedTuple):
    """The columns [first, first + width) of this rank, of `total` on all ranks."""

    first: int
    total: int


# By group, then by the width of this rank's shard and the guess.
_layouts: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], Layout]] = (
    weakref.WeakKeyDictionary()
)


def find(name: str, x: Any, dim: int, group: Any) -> tuple[Any, Shard]:
    """(the local tensor, its shard) of logits or a weight with the vocabulary in dimension `dim`.

    A DTensor sharded on the vocabulary names its own group; one that is replicated is whole.
    """
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}; a process outside of the group must not call"
        )
    if _is_dtensor(x):
        return _local(name, x, dim, group)
    if group is None:
        return x, WHOLE
    return x, Shard(group.group_name, -1)


def replicated(name: str, x: Any) -> Any:
    """The tensor itself of a DTensor that every rank has whole; others as they are."""
    if not _is_dtensor(x):
        return x
    if not all(p.is_replicate() for p in x.placements):
        raise ValueError(f"{name} must be a tensor or a replicated DTensor, got {x.placements}")
    return x.to_local()


def _is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
    return module is not None and isinstance(x, module.DTensor)


def _local(name: str, x: Any, dim: int, group: Any) -> tuple[Tensor, Shard]:
    dim = dim % x.dim()
    over = [i for i, p in enumerate(x.placements) if not p.is_replicate()]
    on_vocabulary = all(
        p.is_shard() and p.dim % x.dim() == dim for p in (x.placements[i] for i in over)
    )
    if len(over) > 1 or not on_vocabulary:
        raise ValueError(
            f"{name}, a DTensor, must be Shard({dim}) on at most one dimension of its mesh and "
            f"Replicate on the others, got {x.placements}"
        )
    local = x.to_local()
    if not over:
        if group is not None:
            raise ValueError(f"group must be None: {name} is a replicated DTensor")
        return local, WHOLE
    own = x.device_mesh.get_group(over[0])
    if group is not None and group.group_name != own.group_name:
        raise ValueError(f"group must be None or the group of the mesh of {name}")
    even = -(-x.shape[dim] // dist.get_world_size(own))
    return local, Shard(own.group_name, min(dist.get_rank(own) * even, x.shape[dim]))


def vocab_size(x: Any, local: Tensor, dim: int, shard: Shard) -> int:
    """The vocab_size argument; 0 for None where the ranks must meet to know the total."""
    if not shard.sharded:
        return _check.vocab_size(x, local, dim)
    if x is None:
        return 0
    if not 1 <= _check.integer("vocab_size", x) < _INTEGERS:
        raise ValueError(f"vocab_size must lie in [1, 2^24) where sharded, got {x}")
    return x


def columns(at: Actions, first: int, width: int) -> Actions:
    """`at` for the columns [first, first + width) alone: token −1 where it is none of them."""
    end = first + width if at.vocab == 0 else min(first + width, max(at.vocab, first))
    here = (at.tokens >= first) & (at.tokens < end)
    kept = None if at.kept is None else _support.columns(at.kept, first, end)
    if kept is not None:
        here = here & _support.holds(kept, at.tokens - first)
    tokens = torch.where(here, at.tokens - first, torch.where(at.tokens == -100, -100, -1))
    return at._replace(tokens=tokens, kept=kept, vocab=end - first)


def mine(at: Actions, first: Tensor, width: int) -> Actions:
    """`at` for the columns of this rank, which begin at the id `first`; −1: it has all."""
    start = int(first)  # on the host
    return at if start < 0 else columns(at, start, width)


def score(
    local: Callable[[Actions, Tensor], None], at: Actions, shard: Shard, width: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [T], entropy [T], statistics [T, 4] of the whole rows, this rank's first id).

    ``local(at, out)`` writes the statistics of this rank's columns into out [T, 4]. An error that
    a value inside a tensor causes is raised after the ranks have met, so that all raise it.
    """
    if not like.is_cuda:
        _support.check_values(at.kept, at.vocab or (1 << 31) - 1)

    def fill(first: int, out: Tensor) -> None:
        statistics_of(local, columns(at, first, width), out)

    parts, layout, wrong = meet(fill, "tokens", at.tokens, at.vocab, shard, width, like)
    at = at._replace(vocab=at.vocab or layout.total)
    if wrong is None:
        check_tokens(at.tokens, at.kept, at.tokens != -100, at.vocab)
    else:
        wrong = wrong | wrong_tokens(at.tokens, at.kept, at.vocab)
    tau, c = _temperature(at, like)
    m, s, e, z = combine(parts.double(), c)
    s = torch.where((m == -math.inf) if wrong is None else (m == -math.inf) | wrong, math.nan, s)
    ignored = at.tokens == -100
    logprob = torch.where(ignored, 0, (z - m) / tau - s.log())
    entropy = torch.where(ignored, 0, s.log() - e / s * math.log(2))
    whole = torch.stack([m, s, e, z if wrong is None else torch.where(wrong, math.nan, z)], -1)
    logprob, entropy, whole = (x.to(parts.dtype) for x in (logprob, entropy, whole))
    return logprob, entropy, whole, torch.tensor(layout.first, device="cpu")


def summed(x: Tensor, shard: Shard) -> Tensor:
    """Σ of `x` over the ranks, in float32 where x is of 16 bits: rounded once."""
    total = x.to(_op.compute_dtype(x))
    dist.all_reduce(total, group=process_group(shard))
    return total.to(x.dtype)


def meet(
    fill: Callable[[int, Tensor], None],
    name: str,
    common: Tensor,
    vocab: int,
    shard: Shard,
    width: int,
    like: Tensor,
    numbers: int = 4,
) -> tuple[Tensor, Layout, Tensor | None]:
    """(parts [ranks, T, numbers], layout, on CUDA whether the ranks disagree) by one all-gather.

    ``fill(first, out)`` writes this rank's part [T, numbers] where its columns begin at `first`.
    `common` [T], which errors call `name`, and `vocab` must be the same on all ranks. A first call
    may need a second all-gather: where unequal shards begin is known when the ranks have met. On
    CUDA the host reads it then and never again.
    """
    group = process_group(shard)
    known, key = _layouts.setdefault(group, {}), (width, shard.guess)
    trusted = key in known and like.is_cuda
    if like.is_cuda and not trusted and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call once with this group before the capture: the ranks have not met")
    guess = dist.get_rank(group) * width if shard.guess < 0 else shard.guess
    layout, shape = known.get(key, Layout(guess, 0)), (common.numel(), numbers)
    while True:
        payload = _payload(common, vocab, width, layout.first, trusted, like, numbers)
        fill(layout.first, payload[_HEADER:].view(*shape))
        table = payload.new_empty((dist.get_world_size(group), *payload.shape))
        dist.all_gather(list(table.unbind(0)), payload, group=group)
        headers, parts = table[:, :_HEADER], table[:, _HEADER:].unflatten(1, shape)
        if trusted:
            break
        layout, agreed = _layout(headers, dist.get_rank(group), name)
        if agreed:
            known[key] = layout
            break
    if vocab > layout.total:
        raise ValueError(f"vocab_size must lie in [1, {layout.total}], got {vocab}")
    return parts, layout, ~_agree(headers) if like.is_cuda else None


def gathered(x: Tensor, group: Any) -> Tensor:
    """[ranks, …], in rank order."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
    return out


def process_group(shard: Shard) -> Any:
    name: Any = shard.group
    return dist.distributed_c10d._resolve_process_group(name)


def _payload(
    common: Tensor, vocab: int, width: int, first: int, trusted: bool, like: Tensor, numbers: int
) -> Tensor:
    """[header; part] with the header written: what the ranks must know or have in common."""
    count = common.numel()
    payload = like.new_empty(_HEADER + count * numbers, dtype=_op.compute_dtype(like))
    header = payload[:_HEADER]
    for i, value in enumerate((width, first, trusted, vocab, count, 0, 0, 0)):
        if value >= _INTEGERS:
            raise ValueError(f"a sharded vocabulary must have less than 2^24 ids, got {value}")
        header[i].fill_(value)
    order = 2 * torch.arange(count, device=like.device) + 1
    header[_DIGEST] = (common * order).sum() % (_INTEGERS - 3)
    return payload


def _layout(table: Tensor, rank: int, common: str) -> tuple[Layout, bool]:
    """(this rank's layout, whether every rank had assumed its own), read on the host."""
    headers = table.tolist()
    for i, name in ((3, "vocab_size"), (4, f"the number of {common}"), (_DIGEST, common)):
        if any(header[i] != headers[0][i] for header in headers):
            raise ValueError(f"{name} must be the same on every rank of group")
    widths = [int(header[0]) for header in headers]
    firsts = [sum(widths[:r]) for r in range(len(widths))]
    agreed = all(header[1] == first for header, first in zip(headers, firsts, strict=True))
    if not agreed and any(header[2] for header in headers):
        raise ValueError("a shard of this width was part of another layout of the same group")
    if sum(widths) == 0:
        raise ValueError("the vocabulary has no columns on any rank of group")
    return Layout(firsts[rank], sum(widths)), agreed


def _agree(headers: Tensor) -> Tensor:
    """Whether the ranks still have the layout and the tokens in common, on the device."""
    widths, firsts, common = headers[:, 0], headers[:, 1], headers[:, 3 : _DIGEST + 1]
    return (firsts == widths.cumsum(0) - widths).all() & (common == common[0]).all()


def statistics_of(local, at: Actions, out: Tensor) -> None:
    """Writes (m, s, E, z_a) of this rank's columns; (−inf, 0, 0, −inf) where it has none."""
    if at.vocab == 0:
        out.fill_(-math.inf)[:, 1:3] = 0
        return
    local(_anywhere(at), out)
    out[:, 3].masked_fill_(at.tokens == -1, -math.inf)
    if at.kept is not None:
        nothing = at.kept.offsets.diff() == 0
        out[:, 0].masked_fill_(nothing, -math.inf)
        out[:, 1:3].masked_fill_(nothing[:, None], 0)


def _anywhere(at: Actions) -> Actions:
    """Any column in place of a token of another rank: its logit is not used."""
    other = torch.zeros_like(at.tokens)
    if at.kept is not None:
        ids, offsets = at.kept.ids, at.kept.offsets
        start = offsets[:-1]
        some = ids[start.clamp(max=ids.numel() - 1)].long() if ids.numel() else other
        other = torch.where(offsets[1:] > start, some, -100)
    return at._replace(tokens=torch.where(at.tokens == -1, other, at.tokens))


def _temperature(at: Actions, like: Tensor) -> tuple[Tensor, Tensor]:
    """(τ, c) of the rows in float64, rounded as the kernels round them."""
    tau = at.temperatures
    if tau is None:
        tau = torch.full((), at.temperature, dtype=_op.compute_dtype(like), device=like.device)
    c = (math.log2(math.e) / tau.double()).to(tau.dtype).clamp(max=torch.finfo(tau.dtype).max)
    return tau.double(), c.double()


def combine(parts: Tensor, c: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, s, E, z_a) of whole rows from those of the shards [ranks, T, 4]."""
    ms, sums, energies, zs = parts.unbind(-1)
    m = ms.amax(0)
    shift = ((ms - m) * c).clamp(min=-1100.0)  # 2^−1100 is 0, and so is its product with y
    weight = torch.where(sums == 0, 0, shift.exp2())
    shift = torch.where(sums == 0, 0, shift)
    return m, in_order(weight * sums), in_order(weight * (energies + shift * sums)), zs.amax(0)


def in_order(x: Tensor) -> Tensor:
    """Σ over the ranks, in their order."""
    return functools.reduce(torch.add, x.unbind(0))
