"""Parts of tensors on many ranks → whole tensors in bucket memory; one collective a bucket.

    whole[start + i] = part[i]            a part is a box of the whole, on one or several ranks

    rank s                                                     rank d, a receiver
    parts that d wants and has not ─ pack ─▶ send ═ all_to_all ═▶ receive ─┐ assemble,
    parts that d has itself ───────────────────────────────────────────────┴ and sum ─▶ bucket

memory of a rank = buffers · largest bucket, on a receiver
                 + 2 · (largest send + largest receive), two buckets being in flight
beside the buckets: one collective at set-up carries every rank's table of parts, one at the begin
of an update the digest of the layout, who receives, and an error that keeps all ranks from going on
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import struct
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyrlk import _C

from .. import layout as layouts
from .. import memory
from ..errors import PeerLost, Timeout, Unsupported, UpdateError
from ..source import Sharded, Table, Work
from .table import Box, Index, Own, Shards, Whole, describe, merged

_ALIGN = 64  # of a part in a send buffer
_IN_FLIGHT = 2
_LENGTH = struct.Struct("<Q")
_TEXT = 512  # of an error that is told to the other ranks
_PLANS = 8
# Renamed in torch 2.13.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Gathered(Sharded):
    """Weights that lie in parts on the ranks of `group`; what `gather.dtensor` and the like return.

    Attributes
    ----------
    group : ProcessGroup or None
        None where one process holds everything.
    rank, ranks : int
        This one's place in the group, and how many there are.
    """

    def __init__(
        self,
        shards: Shards,
        group: dist.ProcessGroup | None,
        wanted_by: Callable[[str], Collection[int] | None] | None = None,
        timeout: float = 30.0,
    ):
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        self._shards = shards
        self._wanted_by = wanted_by
        self._timeout = timeout
        self._own: dict[tuple[str, Box], Own] = {}
        self._local: Table | None = None  # of this update
        self._noted = Table({})
        self._plans: dict[tuple[bytes, frozenset[int]], _Plan] = {}
        self._plan: _Plan | None = None  # of this update
        self._buffers: list[_Buffers] = []
        self._failure: UpdateError | None = None
        self._wholes, self.device = self._meet()

    def specs(self) -> list[layouts.Spec]:
        index = {name: i for i, name in enumerate(self._wholes)}
        return [
            layouts.Spec(w.name, w.shape, w.dtype, None if w.alias is None else index[w.alias])
            for w in self._wholes.values()
        ]

    def peak_bytes(
        self, bucket_bytes: int, *, receivers: Collection[int] | None = None, buffers: int = 2
    ) -> int:
        """Memory that an update needs on this rank, beside the weights; nothing is allocated.

        Parameters
        ----------
        bucket_bytes, buffers : int
            As for `Publisher`.
        receivers : collection of int, optional
            Ranks with bucket memory; all of them by default.
        """
        layout = layouts.plan(self.specs(), bucket_bytes)
        ranks = frozenset(range(self.ranks) if receivers is None else receivers)
        plan = _Plan(layout, self._moves(layout, ranks), self, self.rank in ranks)
        return plan.exchange_bytes + (layout.peak_bytes(buffers) if self.rank in ranks else 0)

    @torch.no_grad()
    def start(
        self,
        layout: layouts.Layout,
        bucket: int,
        out: memory.Segment | Tensor | None,
        *,
        checksum: bool = True,
    ) -> Work:
        self._check_usable()
        if bucket == 0:
            self._begin(layout, out)
        if self._plan is None or self._plan.layout.digest != layout.digest:
            raise ValueError("layout: an update begins with bucket 0, and has one layout")
        flat = _flat(out, layout.buckets[bucket])
        if (flat is not None) != self._plan.receives:
            raise ValueError("out: a rank has memory for every bucket of an update, or for none")
        return _Bucket(self, self._plan, bucket, flat, checksum)

    def _begin(self, layout: layouts.Layout, out: memory.Segment | Tensor | None) -> None:
        """An update: every rank says how it takes part, so that all of them go on, or none."""
        self._drain()
        self._local = self._plan = None
        failure: Exception | None = None
        try:
            if layout.staged < len(layout.buckets):
                raise Unsupported("layout: gathered weights are staged, never direct")
            _flat(out, layout.buckets[0])
            self._look()
        except (TypeError, ValueError, UpdateError) as error:
            failure = error
        receives = out is not None
        receivers = frozenset({0} if receives else ())
        if self.group is not None:
            text = "" if failure is None else str(failure) or type(failure).__name__
            said = self._all_gather(
                layout.digest + bytes([receives]) + text.encode()[:_TEXT],
                len(layout.digest) + 1 + _TEXT,
            )
            if failure is None:
                receivers = self._heard(said, len(layout.digest))
        if failure is not None:
            raise failure
        key = layout.digest, receivers
        if key not in self._plans:
            if len(self._plans) == _PLANS:
                self._plans.clear()
            moves = self._moves(layout, receivers)
            self._plans[key] = _Plan(layout, moves, self, self.rank in receivers)
        self._plan = self._plans[key]

    def _heard(self, said: list[bytes], digest: int) -> frozenset[int]:
        """Who receives, if all ranks have the same layout and none has failed."""
        for rank, one in enumerate(said):
            text = one[digest + 1 :].rstrip(b"\0").decode(errors="replace")
            if text:
                raise UpdateError(f"rank {rank}: {text}")
        for rank, one in enumerate(said):
            if one[:digest] != said[0][:digest]:
                raise ValueError(
                    f"layout: rank {rank} has another one than rank 0; bucket_bytes must be equal "
                    "on every rank"
                )
        return frozenset(rank for rank, one in enumerate(said) if one[digest])

    def stream(
        self, bucket_bytes: int = 512 << 20, *, receive: bool = True, timeout: float = 30.0
    ) -> Iterator[dict[str, Tensor]]:
        """Gather without a publisher: the tensors of one bucket after another.

        A collective: every rank runs through it. The next bucket is under way while the caller
        uses this one; its tensors are overwritten by the one after the next.

        Parameters
        ----------
        bucket_bytes : int
        receive : bool
            False where the rank only contributes; it is given empty mappings.
        timeout : float
            Seconds for a bucket.
        """
        layout = layouts.plan(self.specs(), bucket_bytes)
        count = min(_IN_FLIGHT, len(layout.buckets)) if receive else 0
        outs = [
            torch.empty(layout.slot_bytes, dtype=torch.uint8, device=self.device)
            for _ in range(count)
        ]

        def start(bucket: int) -> Work:
            out = outs[bucket % _IN_FLIGHT] if receive else None
            return self.start(layout, bucket, out, checksum=False)

        works = {0: start(0)} if layout.buckets else {}
        empty = [i for i, entry in enumerate(layout.entries) if not entry.nbytes]
        for bucket, members in enumerate(layout.members):
            if bucket + 1 < len(layout.buckets):
                works[bucket + 1] = start(bucket + 1)
            works.pop(bucket).wait(timeout)
            tensors = {}
            if receive:
                flat = outs[bucket % _IN_FLIGHT]
                for index in sorted(itertools.chain(*members)):
                    entry = layout.entries[index]
                    if self._wants(entry.name, self.rank):
                        tensors[entry.name] = _view(flat, entry)
                if bucket == 0:
                    tensors |= {
                        layout.entries[i].name: _view(flat, layout.entries[i]) for i in empty
                    }
            yield tensors

    def release_staging(self) -> None:
        """Give the exchange buffers back until the next update."""
        self._drain()
        self._buffers = []

    # set-up

    def _meet(self) -> tuple[dict[str, Whole], torch.device]:
        """Tell every rank what this one holds; the whole tensors, the same on every rank."""
        failure: Exception | None = None
        said: dict = {"tensors": []}
        try:
            said, self._own, self._noted = describe(self._shards)
        except (TypeError, ValueError, UpdateError) as error:
            failure = error
            said["error"] = str(error)
        tables = [said] if self.group is None else self._all_say(said)
        if failure is not None:
            raise failure
        for rank, table in enumerate(tables):
            if "error" in table:
                raise UpdateError(f"rank {rank}: {table['error']}")
        kinds = {table["device"] for table in tables if table["device"]}
        if len(kinds) > 1:
            raise Unsupported(f"module: its tensors lie on {' and '.join(sorted(kinds))}")
        return merged(tables), self._device(kinds.pop() if kinds else "cpu")

    def _all_say(self, said: dict) -> list[dict]:
        """One all-gather, two where a table is beyond a page."""
        text = zlib.compress(json.dumps(said).encode(), 1)
        page = min(max((8 << 20) // self.ranks, 64 << 10), 1 << 20) - _LENGTH.size
        heads = self._all_gather(_LENGTH.pack(len(text)) + text[:page], page + _LENGTH.size)
        lengths = [_LENGTH.unpack_from(head)[0] for head in heads]
        texts = [head[_LENGTH.size :] for head in heads]
        if max(lengths) > page:
            rests = self._all_gather(text[page:], max(lengths) - page)
            texts = [head + rest for head, rest in zip(texts, rests, strict=True)]
        return [
            json.loads(zlib.decompress(text[:length]))
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _all_gather(self, data: bytes, nbytes: int) -> list[bytes]:
        kinds = {kind.type for kind in self.group._device_types}  # type: ignore[union-attr]
        device = self._device("cpu" if "cpu" in kinds else "cuda")
        mine = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        every = torch.empty(self.ranks * nbytes, dtype=torch.uint8, device=device)
        self.complete(
            lambda: _all_gather_single(every, mine, self.group, async_op=True),
            self._timeout,
        )
        return [bytes(row.tolist()) for row in every.view(self.ranks, nbytes).cpu()]

    def _device(self, kind: str) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if kind == "cuda"
            else (torch.device(kind))
        )

    def _wants(self, name: str, rank: int) -> bool:
        ranks = None if self._wanted_by is None else self._wanted_by(name)
        return ranks is None or rank in ranks

    def _moves(self, layout: layouts.Layout, receivers: Collection[int]) -> list[list[_Move]]:
        """Of each bucket: which rank gives which part to which receiver, the same on every rank.

        A receiver that has a part gives it to itself; else the rank that gives least so far.
        """
        moves: list[list[_Move]] = []
        for pieces in layout.pieces:
            given = [0] * self.ranks
            of_bucket = []
            for piece, index in enumerate(pieces):
                entry = layout.entries[index]
                whole = self._wholes.get(entry.name)
                if whole is None or (whole.shape, whole.dtype) != (entry.shape, entry.dtype):
                    raise ValueError(f"layout: {entry.name!r} is not as in specs()")
                # An alias is wanted where any of its names is.
                wanting = [
                    rank
                    for rank in sorted(receivers)
                    if any(
                        self._wants(layout.entries[i].name, rank)
                        for i in layout.members[len(moves)][piece]
                    )
                ]
                for box, holders in whole.boxes.items():
                    nbytes = math.prod(box.size) * whole.dtype.itemsize
                    for to in wanting:
                        if to in holders:
                            of_bucket.append(_Move(piece, whole, box, to, to))
                            continue
                        giver = min(holders, key=lambda rank: given[rank])
                        given[giver] += nbytes
                        of_bucket.append(_Move(piece, whole, box, giver, to))
            moves.append(of_bucket)
        return moves

    # an update

    def _look(self) -> None:
        """Take the tensors as they are now."""
        table = Table(self._shards.tensors())
        if not table.fits(self._noted):
            raise ValueError(
                "module: its tensors are others in name, shape, stride, dtype or place than when "
                "this gather was made: make a new one, on every rank"
            )
        self._local = table

    def addresses(self, keys: Sequence[int], offsets: Sequence[int]) -> list[int]:
        """Of parts of this rank: table entries and byte offsets."""
        assert self._local is not None
        at = self._local.addresses
        return [at[key] + offset for key, offset in zip(keys, offsets, strict=True)]

    def part(self, own: Own) -> Tensor:
        assert self._local is not None
        tensor = self._local.tensors[own.tensor]
        return tensor.detach().as_strided(
            own.size, own.stride, int(tensor.storage_offset()) + own.offset
        )

    def own(self, name: str, box: Box) -> Own:
        return self._own[name, box]

    def take_buffers(self, plan: _Plan) -> _Buffers:
        free = next((b for b in self._buffers if b.work is None), None)
        if free is None:
            if len(self._buffers) == _IN_FLIGHT:
                raise RuntimeError("two buckets are in flight: wait for the first")
            free = _Buffers()
            self._buffers.append(free)
        free.fit(plan, self.device)
        return free

    def forget_tensors(self) -> None:
        """Between updates no tensor of the trainer is kept alive."""
        self._local = None

    def _drain(self) -> None:
        """Await what an update that broke off has left in flight."""
        for buffers in self._buffers:
            if buffers.work is not None:
                buffers.work.drop(self._timeout)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(
                f"this gather failed before ({self._failure}): its ranks are out of step; make a "
                "new group and a new gather"
            )

    def complete(self, begin: Callable[[], dist.Work | None], timeout: float) -> None:
        """Begin a collective, or take one that has begun, and await it."""
        try:
            work = begin()
            if work is not None:
                work.wait(datetime.timedelta(seconds=max(timeout, 1e-3)))
        except RuntimeError as error:
            self._failure = self._typed(error, timeout)
            raise self._failure from error

    def _typed(self, error: RuntimeError, timeout: float) -> UpdateError:
        text = str(error).splitlines()[0][:200]
        if "timeout" in text.lower() or "timed out" in text.lower():
            return Timeout(
                f"gather: some rank of the group of {self.ranks} did not take part within "
                f"{timeout:g} s (rank {self.rank}: {text})"
            )
        return PeerLost(
            f"gather: a rank of the group of {self.ranks} is gone (rank {self.rank}: {text})"
        )


class _Move(NamedTuple):
    """A part on its way: of piece number `piece` of the bucket."""

    piece: int
    whole: Whole
    box: Box
    giver: int
    to: int


class _Step:
    """One bucket on one rank: what is packed, exchanged and put together."""

    def __init__(self, owner: Gathered, moves: list[_Move], layout: layouts.Layout, bucket: int):
        rank, ranks = owner.rank, owner.ranks
        entries = [layout.entries[i] for i in layout.pieces[bucket]]
        self.pieces = len(entries)
        sends: list[list[_Move]] = [[] for _ in range(ranks)]
        receives: list[list[_Move]] = [[] for _ in range(ranks)]
        parts: dict[int, list[_Move]] = {}
        for move in moves:
            if move.giver == rank and move.to != rank:
                sends[move.to].append(move)
            if move.to == rank:
                parts.setdefault(move.piece, []).append(move)
                if move.giver != rank:
                    receives[move.giver].append(move)
        self.send_splits, places = _offsets(sends)
        self.receive_splits, arrived = _offsets(receives)

        # pack: parts of this rank, dense, one destination after the other
        self.sent = [
            (owner.own(move.whole.name, move.box), places[id(move)])
            for moves in sends
            for move in moves
        ]
        self.send_forms = array("Q")
        for own, at in self.sent:
            self.send_forms.extend((at, own.dtype.itemsize, len(own.size), *own.size, *own.stride))
        self.send_keys = [own.tensor for own, _ in self.sent]
        self.send_offsets = [own.offset * own.dtype.itemsize for own, _ in self.sent]

        # assemble: of every wanted piece its parts, from the receive buffer or from this rank
        self.wanted = sorted(parts)
        self.forms = array("Q")
        self.sources: list[Own | int] = []  # a part of this rank, or an offset
        self.ranges = array("Q")
        self.targets: list[tuple[layouts.Entry, Index, list[Box]]] = []
        for piece in self.wanted:
            entry, grid = entries[piece], parts[piece][0].whole.grid
            self.forms.extend((entry.offset, entry.dtype.itemsize, len(grid), len(parts[piece])))
            self.forms.extend(grid)
            for move in parts[piece]:
                if move.giver == rank:
                    own = owner.own(move.whole.name, move.box)
                    self.sources.append(own)
                    stride = own.stride
                else:
                    self.sources.append(arrived[id(move)])
                    stride = _dense(move.box.size)
                self.forms.extend((*move.box.start, *move.box.size, *stride))
            self.targets.append((entry, grid, [move.box for move in parts[piece]]))
            self.ranges.extend((entry.offset, entry.nbytes))
        owned = [s for s in self.sources if isinstance(s, Own)]
        self.own_keys = [own.tensor for own in owned]
        self.own_offsets = [own.offset * own.dtype.itemsize for own in owned]


class _Plan:
    """What stays from update to update."""

    def __init__(
        self, layout: layouts.Layout, moves: list[list[_Move]], owner: Gathered, receives: bool
    ):
        self.layout, self.receives = layout, receives
        self.steps = [_Step(owner, of, layout, bucket) for bucket, of in enumerate(moves)]
        self.send_bytes = max((sum(s.send_splits) for s in self.steps), default=0)
        self.receive_bytes = max((sum(s.receive_splits) for s in self.steps), default=0)
        in_flight = min(_IN_FLIGHT, len(self.steps))
        self.exchange_bytes = in_flight * (self.send_bytes + self.receive_bytes)


class _Buffers:
    """A send and a receive buffer; `work`: the bucket that uses them."""

    def __init__(self) -> None:
        self.work: _Bucket | None = None
        self.send = torch.empty(0, dtype=torch.uint8)
        self.receive = torch.empty(0, dtype=torch.uint8)

    def fit(self, plan: _Plan, device: torch.device) -> None:
        if self.send.numel() < plan.send_bytes or self.send.device != device:
            self.send = torch.empty(plan.send_bytes, dtype=torch.uint8, device=device)
        if self.receive.numel() < plan.receive_bytes or self.receive.device != device:
            self.receive = torch.empty(plan.receive_bytes, dtype=torch.uint8, device=device)


class _Bucket(Work):
    """One bucket between `start` and `wait`."""

    def __init__(
        self, owner: Gathered, plan: _Plan, bucket: int, out: Tensor | None, checksum: bool
    ):
        self._owner, self._step, self._out, self._checksum = (
            owner,
            plan.steps[bucket],
            out,
            checksum,
        )
        self._last = bucket + 1 == len(plan.steps)
        self._done = False
        self._sums: list[int] | None = None
        self._buffers = owner.take_buffers(plan)
        self._handle: dist.Work | None = None
        if owner.group is None or owner.ranks == 1:
            self._buffers.work = self
            return
        step = self._step
        send = self._buffers.send[: sum(step.send_splits)]
        self._receive = self._buffers.receive[: sum(step.receive_splits)]
        self._pack(send)

        def begin() -> None:
            self._handle = dist.all_to_all_single(
                self._receive, send, step.receive_splits, step.send_splits, owner.group, True
            )

        owner.complete(begin, 0)  # which may find a lost peer at once
        self._buffers.work = self

    def wait(self, timeout: float) -> list[int] | None:
        if not self._done:
            self._owner.complete(lambda: self._handle, timeout)
            with torch.no_grad():
                self._assemble()
            self._finish()
            if self._last:
                self._owner.forget_tensors()
        return self._sums

    def drop(self, timeout: float) -> None:
        """Await it for nothing: the update is over."""
        self._owner.complete(lambda: self._handle, timeout)
        self._finish()

    def _finish(self) -> None:
        self._done = True
        self._buffers.work = self._handle = self._out = None

    def _pack(self, send: Tensor) -> None:
        step, owner = self._step, self._owner
        if send.device.type == "cpu":
            addresses = array("Q", owner.addresses(step.send_keys, step.send_offsets))
            threads = torch.get_num_threads()
            _C.pack(send.data_ptr(), send.numel(), step.send_forms, addresses, False, threads)
            return
        for own, at in step.sent:
            place = send[at : at + own.nbytes].view(own.dtype).view(own.size)
            place.copy_(owner.part(own))

    def _assemble(self) -> None:
        """Parts to their places in `out`; the sum of each piece, 0 for one not wanted here."""
        if self._out is None:
            return
        step, out = self._step, self._out
        if out.device.type == "cpu" and self._owner.device.type == "cpu":
            sums = self._assemble_on_host(out)
        else:
            sums = self._assemble_by_torch(out)
        if self._checksum:
            self._sums = [0] * step.pieces
            for piece, value in zip(step.wanted, sums, strict=True):
                self._sums[piece] = value

    def _assemble_on_host(self, out: Tensor) -> list[int]:
        step = self._step
        base = self._receive.data_ptr() if self._handle is not None else 0
        own = iter(self._owner.addresses(step.own_keys, step.own_offsets))
        addresses = array("Q")
        for source in step.sources:
            addresses.append(base + source if isinstance(source, int) else next(own))
        threads = torch.get_num_threads()
        return _C.assemble(
            out.data_ptr(), out.numel(), step.forms, addresses, self._checksum, threads
        )

    def _assemble_by_torch(self, out: Tensor) -> list[int]:
        step = self._step
        sources = iter(step.sources)
        for entry, grid, boxes in step.targets:
            flat = out[entry.offset : entry.offset + entry.nbytes]
            place_of = flat.view(entry.dtype).view(grid)
            for box in boxes:
                source = next(sources)
                place = place_of[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))]
                if isinstance(source, int):
                    data = self._receive[source : source + place.nbytes]
                    place.copy_(data.view(entry.dtype).view(box.size))
                else:
                    place.copy_(self._owner.part(source))
        return memory.sums_of(out, step.ranges) if self._checksum else []


def _flat(out: memory.Segment | Tensor | None, nbytes: int) -> Tensor | None:
    flat = out.flat if isinstance(out, memory.Segment) else out
    if flat is None:
        return None
    if not isinstance(flat, Tensor) or flat.dtype != torch.uint8 or not flat.is_contiguous():
        raise TypeError("out must be a Segment or a flat, contiguous uint8 tensor, or None")
    if flat.numel() < nbytes:
        raise ValueError(f"out has {flat.numel()} bytes, the bucket has {nbytes}")
    return flat


def _offsets(moves: list[list[_Move]]) -> tuple[list[int], dict[int, int]]:
    """Bytes for each peer, and where each part begins: dense but for alignment."""
    splits, places, end = [], {}, 0
    for of_peer in moves:
        begin = end
        for move in of_peer:
            places[id(move)] = end
            nbytes = math.prod(move.box.size) * move.whole.dtype.itemsize
            end += (nbytes + _ALIGN - 1) // _ALIGN * _ALIGN
        splits.append(end - begin)
    return splits, places


def _dense(size: Index) -> Index:
    """Strides, in elements, of a tensor without gaps."""
    return tuple(math.prod(size[d + 1 :]) for d in range(len(size)))


def _view(flat: Tensor, entry: layouts.Entry) -> Tensor:
    return flat[entry.offset : entry.offset + entry.nbytes].view(entry.dtype).view(entry.shape)
