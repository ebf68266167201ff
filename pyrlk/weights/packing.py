"""What the publisher keeps from update to update: the layout, and how each bucket is filled.

tensors   of this process: copied into a segment, summed on the way
sharded   over the ranks of a group: one collective a bucket, straight into the segment
"""

from __future__ import annotations

import abc
import hashlib
import weakref
from array import array
from collections.abc import Iterable
from typing import Any

import torch

from . import layout as layouts
from . import memory
from .errors import PeerLost, StaleVersion, Timeout, UpdateError
from .ranks import Ranks
from .references import References
from .source import Sharded, Source, Work
from .staging import Mirrors, Need


class Plan(abc.ABC):
    """An update's layout, and the filling of its staged buckets."""

    def __init__(self, layout: layouts.Layout, device: torch.device):
        self.layout = layout
        self.device = device  # where to stage
        self.segments: list[memory.Segment] = []  # the trainer's own, of buckets not staged
        self.failure: UpdateError | None = None  # ours, whichever engine it came up at
        self.same_sums = False  # ensure(): the weights must be those of the update before
        self.references = References()
        self.mirrors: Mirrors | None = None  # on the other ranks, where they gather too
        self._sums: dict[int, list[int]] = {}  # of each bucket, as last filled and summed

    def need(self, buffers: int, engines: Iterable[str], readers: Iterable[bytes]) -> Need:
        """What these engines' readers need of a ring of at most so many slots."""
        return Need(
            self.device,
            min(buffers, self.layout.staged),
            self.layout.slot_bytes,
            frozenset(engines),
            frozenset(readers),
            self.mirrors,
        )

    @abc.abstractmethod
    def start(self, bucket: int, segment: memory.Segment, verify: bool) -> Work:
        """Begin to fill; `wait` returns the sums of the bucket's pieces, none without `verify`."""

    def serve(self, what: dict[str, Any], timeout: float) -> None:
        """On a rank that does not lead: its part of one bucket."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to gather")

    @abc.abstractmethod
    def form(self) -> str:
        """Equal for two ranks that publish the same tensors."""

    def note_sums(self, bucket: int, sums: list[int]) -> None:
        if self.same_sums and sums and self._sums.get(bucket, sums) != sums:
            self.failure = StaleVersion("the weights have changed since that version: send another")
            raise self.failure
        self._sums[bucket] = sums

    def content(self) -> bytes:
        """Equal for two updates whose tensors were filled and summed to the same bytes."""
        whole = hashlib.sha256(self.layout.digest)
        for bucket in range(self.layout.staged):
            whole.update(array("Q", self._sums[bucket]).tobytes())
        return whole.digest()

    @abc.abstractmethod
    def forget_tensors(self) -> None:
        """Between updates no tensor of the trainer is kept alive."""


class TensorPlan(Plan):
    """Tensors of this process; of the copies only the addresses change."""

    def __init__(self, source: Source, bucket_bytes: int, in_place: bool):
        source.note()
        self.source = source
        self._found, self._exports = source.exports if in_place else (memory.Exports(), [])
        segments: list[memory.Segment] = []
        specs = source.specs(self._direct(segments))
        layout = layouts.plan(specs, bucket_bytes, [s.nbytes for s in segments])
        super().__init__(layout, source.placement())
        self.segments = segments
        self._form = ""
        entries = layout.entries
        self._copies = [
            memory.Copies([(source.tensors[i], entries[i].offset) for i in pieces])
            for pieces in layout.pieces[: layout.staged]
        ]

    def start(self, bucket: int, segment: memory.Segment, verify: bool) -> Work:
        return _Packing(self, bucket, segment, self._copies[bucket], verify)

    def form(self) -> str:
        if not self._form:
            names = [(e.name, e.shape, str(e.dtype)) for e in self.layout.entries]
            self._form = _form(len(names), repr(names).encode())
        return self._form

    def _direct(self, segments: list[memory.Segment]) -> list[tuple[int, int] | None]:
        """Of each exportable tensor, its segment and offset."""
        numbers: dict[bytes, int] = {}
        places: list[tuple[int, int] | None] = []
        for tensor, export in zip(self.source.tensors, self._exports, strict=False):
            if export is None or len(numbers) == layouts.MAX_DIRECT:
                places.append(None)
                continue
            handle, offset = export
            if handle.id not in numbers:
                numbers[handle.id] = len(segments)
                address = tensor.data_ptr() - offset
                segments.append(memory.exporting(handle, address, tensor.device))
            places.append((numbers[handle.id], offset))
        return places

    def fits(self, source: Source, in_place: bool) -> bool:
        """Whether tensors have the forms of these, and what is read in place lies where it did."""
        if not source.fits(self.source):
            return False
        same = source.addresses == self.source.addresses or self._found.empty
        if not in_place or (same and self._found.hold()):
            return True
        self._found, exports = source.exports
        return exports == self._exports

    def take(self, source: Source) -> None:
        """Another update of the same form."""
        self.source.take(source)
        for copies, pieces in zip(self._copies, self.layout.pieces, strict=False):
            addresses = [source.addresses[i] for i in pieces]
            copies.refill([source.tensors[i] for i in pieces], addresses)

    def forget_tensors(self) -> None:
        self.source.forget_tensors()
        for copies in self._copies:
            copies.clear()


class ShardedPlan(Plan):
    """Tensors that lie in parts on the ranks of a group; the leading rank gets them whole."""

    def __init__(
        self, source: Sharded, specs: list[layouts.Spec], bucket_bytes: int, ranks: Ranks | None
    ):
        super().__init__(layouts.plan(specs, bucket_bytes), _device_of(source))
        self.ranks = ranks
        self._specs = specs
        self._known = weakref.ref(source)
        self._source: Sharded | None = source

    def fits(self, source: Sharded, specs: list[layouts.Spec]) -> bool:
        return self._known() is source and self._specs == specs

    def take(self, source: Sharded) -> None:
        self._source = source

    def forget_tensors(self) -> None:
        self._source = None

    def start(self, bucket: int, segment: memory.Segment, verify: bool) -> Work:
        if self.ranks is not None:
            self.ranks.order({"bucket": bucket, "into": segment.handle.id.hex()})
        work = self._gather(bucket, segment, verify)
        return _Gathering(self, bucket, segment, work)

    def serve(self, what: dict[str, Any], timeout: float) -> None:
        out = None if self.mirrors is None else self.mirrors.slot(what["into"])
        self._gather(what["bucket"], out, False).wait(timeout)
        if out is not None:
            out.finish()

    def form(self) -> str:
        return _form(len(self._specs), self.layout.encoded)

    def _gather(self, bucket: int, out: memory.Segment | None, verify: bool) -> Work:
        assert self._source is not None  # inside an update
        return self._source.start(self.layout, bucket, out, checksum=verify)


class _Packing(Work):
    def __init__(
        self,
        plan: Plan,
        bucket: int,
        segment: memory.Segment,
        copies: memory.Copies,
        verify: bool,
    ):
        self._plan, self._bucket, self._segment = plan, bucket, segment
        self._copies, self._verify = copies, verify

    def wait(self, timeout: float) -> list[int]:
        threads = torch.get_num_threads()
        sums = self._segment.pack(self._copies, checksum=self._verify, threads=threads)
        self._segment.finish()
        self._plan.note_sums(self._bucket, sums)
        return sums


class _Gathering(Work):
    def __init__(self, plan: ShardedPlan, bucket: int, segment: memory.Segment, work: Work):
        self._plan, self._bucket, self._segment, self._work = plan, bucket, segment, work

    def wait(self, timeout: float) -> list[int]:
        try:
            sums = self._gathered(timeout)
        except UpdateError as error:
            self._plan.failure = error
            raise
        self._segment.finish()
        self._plan.note_sums(self._bucket, sums)
        return sums

    def _gathered(self, timeout: float) -> list[int]:
        ranks = self._plan.ranks
        try:
            sums = self._work.wait(timeout) or []
        except (PeerLost, Timeout):
            if ranks is not None:
                ranks.blame()
            raise
        if ranks is not None:
            ranks.answers()
        return sums


def _device_of(source: Sharded) -> torch.device:
    device = getattr(source, "device", None)
    return torch.device("cpu") if device is None else torch.device(device)


def _form(count: int, what: bytes) -> str:
    return f"{count} tensors, {hashlib.sha256(what).hexdigest()[:32]}"
