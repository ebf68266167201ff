"""Where buckets are staged: the ring of one session, and its mirrors on the GPUs of other ranks.

    a reader on GPU x opens the ring of the trainer's rank on GPU x, else that of rank 0

A slot is one slot in all of its mirrors: one collective fills them, and it is free when its last
reader has read. Between GPUs, weights then travel in that collective alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import memory, wire
from .errors import StagingError
from .ranks import Ranks

if TYPE_CHECKING:
    from .packing import Plan


class Staging:
    """The ring of one session with `engine`, empty at first."""

    def __init__(self, engine: str):
        self.ring = memory.Ring([])
        self._engine = engine
        self._device = torch.device("cpu")
        self._gpus: frozenset[bytes] = frozenset()  # of the readers, that are to have a mirror
        self._mirrors: Mirrors | None = None
        self._handles: dict[bytes, list[memory.Handle]] = {}  # of the mirrors, by GPU

    @property
    def on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def fits(self, plan: Plan, buffers: int, readers: Collection[bytes]) -> bool:
        """Whether the slots are enough for a plan, large enough, and where its readers are.

        Parameters
        ----------
        plan : Plan
        buffers : int
            Slots at most.
        readers : collection of bytes
            UUIDs of the GPUs of the engine's processes, `memory.NO_GPU` for one on the host.
        """
        slots = self.ring.slots
        wanted = min(buffers, plan.layout.staged)
        if len(slots) < wanted or any(s.segment.nbytes < plan.layout.slot_bytes for s in slots):
            return False
        if not wanted:
            return True
        same = plan.mirrors is self._mirrors and _others(plan, readers) == self._gpus
        return same and plan.device == self._device

    def build(self, plan: Plan, buffers: int, readers: Collection[bytes]) -> None:
        """Slots for a plan. No reader has one of the engine's older ones open.

        Raises
        ------
        StagingError
            Too little memory, here or where a mirror should be.
        """
        slots = self.ring.slots
        count = max(len(slots), min(buffers, plan.layout.staged))
        nbytes = max([plan.layout.slot_bytes, *(slot.segment.nbytes for slot in slots)])
        self.close()
        self._device = plan.device
        segments: list[memory.Segment] = []
        try:
            for _ in range(count):
                segments.append(memory.create(plan.device, nbytes))
        finally:
            self.ring = memory.Ring(segments)
        if plan.mirrors is not None or self._mirrors is not None:
            self._mirror(segments, plan.mirrors, _others(plan, readers))

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

    def free(self) -> None:
        """Give the memory back everywhere, in step with the other ranks; nobody reads any more."""
        self.close()
        self._mirror([], None, frozenset())

    def close(self) -> None:
        """Give this process's memory back; nobody reads any more."""
        self.ring.close()
        self.ring = memory.Ring([])

    def abandon(self, *, may_be_read: bool) -> None:
        """The session broke. What may still be read is kept: freeing it would be undefined."""
        if may_be_read and self.on_gpu and self.ring.slots:
            _ABANDONED.setdefault(self._engine, []).append(self.ring)
            self.ring = memory.Ring([])
            return
        with contextlib.suppress(StagingError):  # there is a first error
            self.close()

    def _mirror(
        self, segments: list[memory.Segment], mirrors: Mirrors | None, gpus: frozenset[bytes]
    ) -> None:
        known, self._mirrors, self._gpus = self._mirrors, mirrors, gpus
        had, self._handles = bool(self._handles), {}
        mirrors = mirrors or known
        if mirrors is not None and (gpus or had):
            self._handles = mirrors.make(self._engine, segments, gpus)


# By engine: rings that it may have had open when a session broke.
_ABANDONED: dict[str, list[memory.Ring]] = {}


def free_abandoned(engine: str) -> None:
    """An engine that has come anew has closed what sessions before had it open."""
    for ring in _ABANDONED.pop(engine, []):
        with contextlib.suppress(StagingError):
            ring.close()


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
        self, engine: str, segments: list[memory.Segment], gpus: Collection[bytes]
    ) -> dict[bytes, list[memory.Handle]]:
        """Rank 0: mirrors of `segments` on those of `gpus` that a rank has; by GPU.

        The engine's older mirrors are freed, which it must have closed.
        """
        if self._places is None:
            self._ranks.order({"mirror": "where"})
            answers = self._ranks.answers()
            self._places = {bytes.fromhex(a["gpu"]): rank for rank, a in answers.items()}
        places = {gpu: self._places[gpu] for gpu in gpus if gpu in self._places}
        order = {
            "mirror": engine,
            "slots": [[s.handle.id.hex(), s.nbytes] for s in segments],
            "ranks": sorted(places.values()),
        }
        self._ranks.order(order)
        answers = self._ranks.answers()
        return {
            gpu: [wire.SegmentInfo.decode(bytes.fromhex(one)).handle for one in answers[r]["slots"]]
            for gpu, r in places.items()
        }

    def serve(self, order: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Another rank, whose weights lie on `device`: what it answers."""
        engine = order["mirror"]
        if "slots" not in order:
            return {"gpu": memory.gpu(device).hex()}
        mirror = _MIRRORS.pop(engine, {})
        memory.close_all(list(mirror.values()))
        if self._ranks.rank not in order["ranks"]:
            return {}
        mirror = _MIRRORS[engine] = {}
        for name, nbytes in order["slots"]:
            mirror[name] = memory.create(device, nbytes)
        infos = [wire.SegmentInfo(i, s.handle) for i, s in enumerate(mirror.values())]
        return {"slots": [info.encode().hex() for info in infos]}

    def slot(self, name: str) -> memory.Segment | None:
        """Another rank: its mirror of a slot of rank 0, if it has one."""
        return next((mirror[name] for mirror in _MIRRORS.values() if name in mirror), None)


# By engine: what this process mirrors for it, by what rank 0 calls the slot. A publisher that is
# closed leaves it, since the engine may have it open.
_MIRRORS: dict[str, dict[str, memory.Segment]] = {}


def _others(plan: Plan, readers: Collection[bytes]) -> frozenset[bytes]:
    """The readers' GPUs that rank 0's memory is not on."""
    if plan.mirrors is None or plan.device.type != "cuda":
        return frozenset()
    return frozenset(readers) - {memory.NO_GPU, memory.gpu(plan.device)}
