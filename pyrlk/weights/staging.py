"""Where buckets are staged: a ring of slots, and its mirrors on the GPUs of other ranks.

    a reader on GPU x opens the ring of the trainer's rank on GPU x, else that of rank 0

A slot is one slot in all of its mirrors: one collective fills them, and it is free when its last
reader has read. Between GPUs, weights then travel in that collective alone. Memory of a GPU is
freed when no engine has it open any more, also that of a session that broke.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import memory, wire
from .errors import StagingError
from .ranks import Ranks


@dataclass(frozen=True)
class Need:
    """What an update needs of a ring.

    device : where rank 0 stages
    slots, slot_bytes : how many, and of how many bytes at least
    engines : addresses of those that read
    readers : UUIDs of the GPUs of their processes, `memory.NO_GPU` for one on the host
    mirrors : where other ranks gather too
    """

    device: torch.device
    slots: int
    slot_bytes: int
    engines: frozenset[str]
    readers: frozenset[bytes]
    mirrors: Mirrors | None = None

    @property
    def gpus(self) -> frozenset[bytes]:
        """Where a mirror should be: the readers' GPUs that rank 0's memory is not on."""
        if self.mirrors is None or self.device.type != "cuda":
            return frozenset()
        return self.readers - {memory.NO_GPU, memory.gpu(self.device)}


class Staging:
    """The ring of one or several engines, empty at first."""

    def __init__(self) -> None:
        self.ring = memory.Ring([])
        self._held = _Held(set(), {})
        self._need = Need(torch.device("cpu"), 0, 0, frozenset(), frozenset())
        self._handles: dict[bytes, list[memory.Handle]] = {}  # of the mirrors, by GPU

    @property
    def on_gpu(self) -> bool:
        return self._need.device.type == "cuda"

    def fits(self, need: Need) -> bool:
        """Whether the slots are enough, large enough, and where their readers are."""
        slots = self.ring.slots
        if len(slots) < need.slots or any(s.segment.nbytes < need.slot_bytes for s in slots):
            return False
        if not need.slots:
            return True
        same = need.device == self._need.device and need.mirrors is self._need.mirrors
        return same and need.gpus == self._need.gpus and self._held.engines >= need.engines

    def build(self, need: Need) -> None:
        """New slots. The engines have none of ours open: those of theirs are freed.

        Raises
        ------
        StagingError
            Too little memory, here or where a mirror should be.
        """
        slots = self.ring.slots
        count = max(len(slots), need.slots)
        nbytes = max([need.slot_bytes, *(slot.segment.nbytes for slot in slots)])
        self.ring = memory.Ring([])
        closed_by(need.engines)
        mirrored, self._handles, self._need = bool(self._handles), {}, need
        self._held = _hold(need.engines)
        segments = [self._held.create(need.device, nbytes) for _ in range(count)]
        if need.mirrors is not None and (need.gpus or mirrored):
            self._handles = need.mirrors.make(need.engines, segments, need.gpus)
        self.ring = memory.Ring(segments)

    def opens(self, reader: bytes) -> Iterator[tuple[wire.SegmentInfo, list[int]]]:
        """What a reader on that GPU is told of each slot, and the descriptor that goes with it."""
        handles = self._handles.get(reader)
        for slot in self.ring.slots:
            segment = slot.segment
            if handles is None:
                fds = [] if segment.fd is None else [segment.fd]
                yield wire.SegmentInfo(slot.index, segment.handle), fds
            else:
                yield wire.SegmentInfo(slot.index, handles[slot.index]), []

    def leave(self, engine: str, *, may_be_read: bool = False) -> None:
        """An engine's session is over. What it may still read is kept: freeing is undefined."""
        if not (may_be_read and self.on_gpu):
            closed_by({engine})


@dataclass(eq=False)
class _Held:
    """Segments that engines may have open, by name."""

    engines: set[str]
    segments: dict[str, memory.Segment]

    def create(self, device: torch.device, nbytes: int, name: str = "") -> memory.Segment:
        segment = memory.create(device, nbytes)
        self.segments[name or segment.handle.id.hex()] = segment
        return segment


_HELD: list[_Held] = []  # of this process


def _hold(engines: Collection[str]) -> _Held:
    held = _Held(set(engines), {})
    _HELD.append(held)
    return held


def closed_by(engines: Collection[str]) -> None:
    """These engines have none of our segments open any more: free what no other has.

    Raises
    ------
    StagingError
        Some could not be freed; they will be tried again.
    """
    errors: list[StagingError] = []
    for held in list(_HELD):
        held.engines.difference_update(engines)
        if held.engines:
            continue
        for name, segment in list(held.segments.items()):
            try:
                segment.close()
                del held.segments[name]
            except StagingError as error:
                errors.append(error)
        if not held.segments:
            _HELD.remove(held)
    if errors:
        raise errors[0]


class Mirrors:
    """Rings of rank 0 again on other ranks, each on its own GPU.

    Rank 0 asks for them, in the middle of a `Ranks.run`; the others `serve`.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._places: dict[bytes, int] | None = None  # rank 0: GPU → rank

    def make(
        self, engines: Collection[str], segments: list[memory.Segment], gpus: Collection[bytes]
    ) -> dict[bytes, list[memory.Handle]]:
        """Rank 0: mirrors of `segments` on those of `gpus` that a rank has; by GPU.

        The engines have closed all older ones.
        """
        if self._places is None:
            self._ranks.order({"mirror": "where"})
            answers = self._ranks.answers()
            self._places = {bytes.fromhex(a["gpu"]): rank for rank, a in answers.items()}
        places = {gpu: self._places[gpu] for gpu in gpus if gpu in self._places}
        self._ranks.order(
            {
                "mirror": "make",
                "engines": sorted(engines),
                "slots": [[s.handle.id.hex(), s.nbytes] for s in segments],
                "ranks": sorted(places.values()),
            }
        )
        answers = self._ranks.answers()
        return {
            gpu: [wire.SegmentInfo.decode(bytes.fromhex(one)).handle for one in answers[r]["slots"]]
            for gpu, r in places.items()
        }

    def free(self, engines: Collection[str]) -> None:
        """Rank 0: the engines have closed all mirrors."""
        self.make(engines, [], ())

    def serve(self, order: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Another rank, whose weights lie on `device`: what it answers."""
        if order["mirror"] == "where":
            return {"gpu": memory.gpu(device).hex()}
        closed_by(order["engines"])
        if self._ranks.rank not in order["ranks"]:
            return {}
        held = _hold(order["engines"])
        segments = [held.create(device, nbytes, name) for name, nbytes in order["slots"]]
        infos = [wire.SegmentInfo(i, s.handle) for i, s in enumerate(segments)]
        return {"slots": [info.encode().hex() for info in infos]}

    def slot(self, name: str) -> memory.Segment | None:
        """Another rank: its mirror of a slot of rank 0, if it has one."""
        return next((held.segments[name] for held in _HELD if name in held.segments), None)
