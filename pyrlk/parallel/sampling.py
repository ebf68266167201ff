"""One draw a row whose columns are sharded over ranks: the same token as from the whole row.

    rank r   candidates: what may be kept of its columns, whatever the others hold
    all      from the candidates of all ranks, the kept prefix and the draw, on every rank alike

One all-gather. A second one brings the mass of rows that top-p weighs whole; after it an all-reduce
the token where nothing is cut, or an all-gather all candidates where too few were sent. Masses are
integers, so that their sums over ranks are those of the whole row, and so is every choice
(csrc/kernels/sample_shards.cpp). On CUDA: digits.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C, _op, _warm
from ..support import Support
from . import digits
from . import vocab as _vocab
from .rows import MAX_VOCAB, Drawn, How, Parameters, check_total
from .vocab import Shard

_CANDIDATES = 512  # a rank and row, where top-k does not say how many
_MOST_CANDIDATES = 1024
_MOST_FLOATS = 1 << 25  # that arrive of overflown rows at a time
_COUNT = 4  # of the header of a row: how many candidates there are
_NEEDS_MASS, _UNFILTERED, _OVERFLOWN = 1, 2, 3  # csrc/kernels/kernels.h


def sample(logits: Tensor, p: Parameters, how: How, allowed: Tensor | None, shard: Shard) -> Drawn:
    """From this rank's columns [..., V_local]; the same on every rank."""
    by = _by_candidates if logits.is_cpu else digits.sample
    return by(logits, p, how, allowed, shard)


def _by_candidates(
    logits: Tensor, p: Parameters, how: How, allowed: Tensor | None, shard: Shard
) -> Drawn:
    group, rows = _vocab.process_group(shard), _Rows(logits, p, how, allowed)

    def fill(first: int, out: Tensor) -> None:
        rows.candidates(first, rows.all, (0, 0, MAX_VOCAB), out)

    like = logits.new_empty(0, dtype=torch.float32)
    numbers = _C.shard_header + 2 * _capacity(p)
    parts, layout, _ = _vocab.meet(fill, "seed", p.seed, 0, shard, rows.width, like, numbers)
    check_total(layout, allowed)
    found = _Selection(rows, None, parts, layout.total)
    found.select(None)
    late = found.state.nonzero()[:, 0]
    if len(late) == 0:
        return found.drawn._replace(support=found.support())

    drawn, many = found.drawn, found.state[late] == _OVERFLOWN
    known = found.max.data_ptr(), drawn.status.data_ptr(), layout.total
    mine = torch.zeros(
        (2, len(late)), dtype=torch.int64, device="cpu"
    )  # masses, and how many candidates are left
    rows.masses(layout.first, late, known, mine[0])
    if many.any():
        header = like.new_empty(int(many.sum()), _C.shard_header)
        rows.candidates(layout.first, late[many], known, header)
        mine[1, many] = header[:, _COUNT].long()
    every = _vocab.gathered(mine, group)
    mass = torch.zeros(len(rows.all), dtype=torch.int64, device="cpu")
    mass[late] = every[:, 0].sum(0)
    found.select(mass)

    free = late[found.state[late] == _UNFILTERED]
    if len(free):
        masses = every[:, 0, torch.searchsorted(late, free)].contiguous()
        token, logit = rows.placed(layout.first, free, found.max, masses, group)
        logprob = (logit - found.max[free]).double() / p.temperature[free] - found.log_sum[free]
        drawn.token[free] = token
        drawn.logprob[free] = drawn.full_logprob[free] = logprob.float()
    support = found.support()
    for some in _split(late[many], every[:, 1, many]):
        capacity = int(every[:, 1, torch.searchsorted(late, some)].max())
        part = like.new_empty(len(some), _C.shard_header + 2 * capacity)
        rows.candidates(layout.first, some, known, part)
        wide = _Selection(rows, some, _vocab.gathered(part, group), layout.total)
        wide.state.fill_(_NEEDS_MASS)
        wide.select(mass[some])
        for to, values in zip(drawn[:5], wide.drawn[:5], strict=True):
            to[some] = values
        more = wide.support()
        if support is not None and more is not None:
            support = _filled(support, some, more)
    return drawn._replace(support=support)


class _Rows:
    """Rows as the kernels take them: this rank's columns and the parameters, by address."""

    def __init__(self, logits: Tensor, p: Parameters, how: How, allowed: Tensor | None):
        self.logits, self.p, self.how, self.allowed = logits, p, how, allowed
        self.width, self.threads = logits.shape[-1], _op.threads()
        self.all = torch.arange(len(p.seed), device="cpu")

    def at(self, first: int, p: Parameters):
        """Of columns from `first` on."""
        words = 0 if self.allowed is None else self.allowed.shape[1]
        return (
            _op.rows(self.logits, self.width), first, p.temperature.data_ptr(),
            p.top_k.data_ptr(), p.top_p.data_ptr(), p.min_p.data_ptr(), p.seed.data_ptr(),
            p.position.data_ptr(), _op.address(self.allowed), words, self.how.joint,
            self.how.keep_ties,
        )  # fmt: skip

    def candidates(self, first: int, rows: Tensor, known, out: Tensor) -> None:
        """Into out [rows, shard_header + 2·capacity]."""
        capacity = (out.shape[-1] - _C.shard_header) // 2
        shard = self.at(first, self.p)
        where = rows.data_ptr(), len(rows)
        _C.shard_candidates(shard, *where, known, capacity, out.data_ptr(), self.threads)

    def masses(self, first: int, rows: Tensor, known, out: Tensor) -> None:
        """Of this rank's columns, into out [rows]."""
        shard = self.at(first, self.p)
        _C.shard_masses(shard, rows.data_ptr(), len(rows), known, out.data_ptr(), self.threads)

    def placed(self, first: int, rows: Tensor, m: Tensor, masses: Tensor, group):
        """(token, logit) of rows that nothing cuts, from the shards' masses [ranks, rows]."""
        at = torch.empty((len(rows), 2), dtype=torch.int64, device="cpu")
        _C.shard_draw(
            self.at(first, self.p), rows.data_ptr(), len(rows), m.data_ptr(), masses.data_ptr(),
            len(masses), dist.get_rank(group), at.data_ptr(), self.threads,
        )  # fmt: skip
        dist.all_reduce(at, group=group)
        return at[:, 0], at[:, 1].int().view(torch.float32)


class _Selection:
    """What the candidates of all ranks [ranks, rows, numbers] say of all rows, or of some."""

    def __init__(self, rows: _Rows, some: Tensor | None, parts: Tensor, total: int):
        self.rows, self.parts, self.total = rows, parts.contiguous(), total
        self.p = rows.p if some is None else Parameters(*(x[some] for x in rows.p))
        count = self.parts.shape[1]

        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device="cpu")

        token, kept, status = empty(torch.int64), empty(torch.int32), empty(torch.uint8)
        logprob, full = empty(torch.float32), empty(torch.float32)
        self.drawn = Drawn(token, logprob, full, kept, status, None)
        self.state, self.max = empty(torch.uint8), empty(torch.float32)
        self.log_sum = empty(torch.float64)
        self._kept = _C.KeptSets(count) if rows.how.support else None

    def select(self, row_mass: Tensor | None) -> None:
        """All rows; once their masses are known, those whose state says that they wait for them."""
        ranks, count, numbers = self.parts.shape
        drawn = self.drawn
        _C.shard_select(
            self.rows.at(0, self.p), self.parts.data_ptr(), ranks, count,
            (numbers - _C.shard_header) // 2, self.total, _op.address(row_mass),
            drawn.token.data_ptr(), drawn.logprob.data_ptr(), drawn.full_logprob.data_ptr(),
            drawn.kept.data_ptr(), drawn.status.data_ptr(), self.state.data_ptr(),
            self.max.data_ptr(), self.log_sum.data_ptr(), self._kept, self.rows.threads,
        )  # fmt: skip

    def support(self) -> Support | None:
        kept = self._kept
        if kept is None:
            return None
        ids = _warm.empty_ids(kept.total())
        offsets = torch.empty(len(self.state) + 1, dtype=torch.int64, device="cpu")
        status = self.drawn.status.data_ptr()
        where = ids.data_ptr(), ids.numel(), offsets.data_ptr()
        kept.write(*where, 0, 0, status, self.rows.threads)
        return Support(ids, offsets)


def _capacity(p: Parameters) -> int:
    """Candidates of a row that a rank sends; the ranks know it from what they have in common."""
    greedy = p.temperature == 0
    cut = greedy | (p.top_k > 0) | (p.top_p < 1) | (p.min_p > 0)
    if not cut.any():
        return 0
    by_k = torch.where(greedy, 1, torch.where(p.top_k > 0, p.top_k, _CANDIDATES))
    return int(torch.where(cut, by_k, 0).max().clamp(max=_MOST_CANDIDATES))


def _split(rows: Tensor, counts: Tensor) -> list[Tensor]:
    """Overflown rows, as many at a time as may arrive; alike on every rank."""
    if len(rows) == 0:
        return []
    floats = len(counts) * (_C.shard_header + 2 * int(counts.max()))
    return list(rows.split(max(1, _MOST_FLOATS // floats)))


def _filled(support: Support, rows: Tensor, rest: Support) -> Support:
    """`support`, whose `rows` are empty, with the rows of `rest` in their places."""
    counts = support.offsets.diff()
    counts[rows] = rest.offsets.diff()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    ids = support.ids.new_empty(int(offsets[-1]))
    late = torch.zeros(len(counts), dtype=torch.bool, device="cpu").index_fill_(0, rows, True)
    late = late.repeat_interleave(counts)
    ids[~late], ids[late] = support.ids, rest.ids
    return Support(ids, offsets)
