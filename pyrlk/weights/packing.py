"""What the publisher keeps from update to update: the layout, and the copies of each bucket."""

from __future__ import annotations

from . import layout as layouts
from . import memory
from .errors import StaleVersion
from .source import Source


class Plan:
    """What stays from update to update: the layout, and each bucket's copies but for addresses."""

    def __init__(self, source: Source, bucket_bytes: int, exports: list[memory.Export | None]):
        source.note()
        self.source = source
        self.exports = exports
        self.sums: dict[int, list[int]] = {}  # of each bucket, as last packed with verify="copy"
        self.same_sums = False  # ensure(): the weights must be those of the update before
        self.device = source.placement()
        self.segments: list[memory.Segment] = []  # the trainer's own
        self.layout = layouts.plan(
            source.specs(self._direct()), bucket_bytes, [s.nbytes for s in self.segments]
        )
        entries = self.layout.entries
        self.copies = [
            memory.Copies([(source.tensors[i], entries[i].offset) for i in pieces])
            for pieces in self.layout.pieces[: self.layout.staged]
        ]

    def _direct(self) -> list[tuple[int, int] | None]:
        """Of each exportable tensor, its segment and offset."""
        numbers: dict[bytes, int] = {}
        places: list[tuple[int, int] | None] = []
        for tensor, export in zip(self.source.tensors, self.exports, strict=False):
            if export is None or len(numbers) == layouts.MAX_DIRECT:
                places.append(None)
                continue
            handle, offset = export
            if handle.id not in numbers:
                numbers[handle.id] = len(self.segments)
                address = tensor.data_ptr() - offset
                self.segments.append(memory.exporting(handle, address, tensor.device))
            places.append((numbers[handle.id], offset))
        return places

    def take(self, source: Source) -> None:
        """Another update of the same form."""
        self.source.take(source)
        for copies, pieces in zip(self.copies, self.layout.pieces, strict=False):
            addresses = [source.addresses[i] for i in pieces]
            copies.refill([source.tensors[i] for i in pieces], addresses)

    def note_sums(self, bucket: int, sums: list[int]) -> None:
        if self.same_sums and sums and self.sums.get(bucket, sums) != sums:
            raise StaleVersion("the weights have changed since that version: send a new one")
        self.sums[bucket] = sums

    def forget_tensors(self) -> None:
        """Between updates no tensor of the trainer is kept alive."""
        self.source.forget_tensors()
        for copies in self.copies:
            copies.clear()
