"""Where received tensors go: an nn.Module's own tensors, or a load_weights callable.

check(layout, partial)    names, shapes, dtypes, aliases; raises before a byte is copied
apply(segment, bucket)    copies one bucket; with sums, proves what it copied
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from . import gather, memory
from .errors import (
    ApplyFailed,
    ChecksumMismatch,
    DtypeMismatch,
    MissingName,
    ShapeMismatch,
    UnknownName,
    Unsupported,
)
from .layout import Entry, Layout
from .source import ModuleState, Table

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], object]


class Engine(Protocol):
    """Where a receiver puts tensors."""

    names_from: str
    sums_copies: bool  # what went into the engine is compared with the sums too
    reads_back: bool  # what the engine holds in the end can be summed

    def gpu(self) -> bytes: ...  # UUID of the one that its tensors lie on
    def check(self, layout: Layout, partial: bool) -> None: ...
    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None: ...
    def read_back(self, sums: Sequence[tuple[int, ...]], threads: int) -> None: ...
    def release(self) -> None: ...


class ModuleEngine:
    """Copies straight into the tensors of `module.state_dict()`, tied weights once."""

    names_from = "module"
    sums_copies = reads_back = True

    def __init__(self, module: nn.Module):
        self._state = ModuleState(module)
        self._module = module
        self._checkpoint = gather.Checkpoint(module) if gather.is_hf(module) else None
        self._plan: _Plan | None = None

    def gpu(self) -> bytes:
        return memory.gpu_of(self._module.parameters())

    @torch.no_grad()
    def check(self, layout: Layout, partial: bool) -> None:
        # Looked up anew at every update: an engine may rebind its parameters in between.
        table = Table(self._tensors(layout))
        plan = self._plan
        if plan is not None and plan.fits(table, layout, partial):
            plan.take(table)
            return
        self._plan = None
        self._plan = _Plan(table, layout, partial)

    def _tensors(self, layout: Layout) -> dict[str, Tensor]:
        """The module's tensors, by its own names or, if those were sent, by its checkpoint's."""
        own = self._state.tensors()
        if self._checkpoint is None or all(entry.name in own for entry in layout.entries):
            return own
        return self._checkpoint.tensors()

    @torch.no_grad()
    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None:
        assert self._plan is not None  # check() comes first
        copies = self._plan.copies[bucket]
        copied = segment.unpack(copies, checksum=bool(sums), threads=threads)
        segment.finish()
        # The copy went past autograd: tell it, so that a saved tensor is known to be outdated.
        changed = [t for t in copies.tensors if not t.is_inference()]
        torch.autograd.graph.increment_version(changed)
        for (entry, piece), got in zip(self._plan.sources[bucket], copied, strict=False):
            if got != sums[piece]:
                raise mismatch(entry, sums[piece], got, "was copied", dirty=True)

    def read_back(self, sums: Sequence[tuple[int, ...]], threads: int) -> None:
        """Sum the module's own tensors after the last copy: a later one may have hit an earlier."""
        assert self._plan is not None
        for copies, source, sent in zip(self._plan.copies, self._plan.sources, sums, strict=True):
            for tensor, (entry, piece) in zip(copies.tensors, source, strict=True):
                got = memory.tensor_sum(tensor, threads=threads)
                if got != sent[piece]:
                    raise mismatch(entry, sent[piece], got, "is in the engine", dirty=True)

    def release(self) -> None:
        if self._plan is not None:
            self._plan.forget_tensors()


class _Plan:
    """Which of the engine's tensors take which ranges; made once for a layout and its forms."""

    def __init__(self, table: Table, layout: Layout, partial: bool):
        table.note()
        tensors = dict(zip(table.names, table.tensors, strict=True))
        places = {name: _place(tensor) for name, tensor in tensors.items()}
        check_names(layout, tensors, partial, places)
        self.table, self.layout, self.partial = table, layout, partial
        self.sources: list[list[tuple[Entry, int]]] = []  # from where, and which sum of the bucket
        first: dict[tuple, Entry] = {}
        for bucket in layout.members:
            self.sources.append([])
            for piece, sharing in enumerate(bucket):
                for entry in (layout.entries[i] for i in sharing):
                    target = tensors[entry.name]
                    if not _is_place(target):
                        raise Unsupported(
                            f"{entry.name!r}: the engine's tensor has no memory of its own"
                        )
                    other = first.setdefault(places[entry.name], entry)
                    if other is entry:
                        self.sources[-1].append((entry, piece))
                    elif (other.bucket, other.offset) != (entry.bucket, entry.offset):
                        raise Unsupported(
                            f"{other.name!r} and {entry.name!r} are tied in the engine but not "
                            "at the publisher: send one of them, or tie them there"
                        )
        number = {name: i for i, name in enumerate(table.names)}
        self._targets = [[number[entry.name] for entry, _ in s] for s in self.sources]
        self.copies = [
            memory.Copies([(tensors[entry.name], entry.offset) for entry, _ in source])
            for source in self.sources
        ]

    def fits(self, table: Table, layout: Layout, partial: bool) -> bool:
        return layout is self.layout and partial is self.partial and table.fits(self.table)

    def take(self, table: Table) -> None:
        """Another update of the same layout, onto tensors of the same forms."""
        self.table.take(table)
        for copies, targets in zip(self.copies, self._targets, strict=True):
            addresses = [table.addresses[i] for i in targets]
            copies.refill([table.tensors[i] for i in targets], addresses)

    def forget_tensors(self) -> None:
        self.table.forget_tensors()
        for copies in self.copies:
            copies.clear()


class CallableEngine:
    """Feeds load_weights with views of the staging memory, one call a bucket."""

    sums_copies = reads_back = False

    def __init__(self, load_weights: LoadWeights, expected: Mapping[str, Tensor] | None):
        self._load_weights = load_weights
        self._expected = expected
        self._layout: Layout | None = None
        self.names_from = "unchecked" if expected is None else "expected"

    def gpu(self) -> bytes:
        return memory.gpu_of((self._expected or {}).values())

    def check(self, layout: Layout, partial: bool) -> None:
        if self._expected is not None:
            places = {name: _place(tensor) for name, tensor in self._expected.items()}
            check_names(layout, self._expected, partial, places)
        self._layout = layout

    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None:
        assert self._layout is not None  # check() comes first
        entries = self._layout.entries
        views = [
            (entries[i].name, segment.view(entries[i].offset, entries[i].shape, entries[i].dtype))
            for sharing in self._layout.members[bucket]
            for i in sharing
        ]
        if bucket == 0:  # empty tensors lie in no bucket, and are names all the same
            empty = (e for e in entries if not e.nbytes)
            views += [(e.name, segment.view(0, e.shape, e.dtype)) for e in empty]
        try:
            self._load_weights(views)
        except Exception as error:
            raise ApplyFailed(
                f"load_weights raised {type(error).__name__}: {error}", dirty=True
            ) from error
        segment.finish()

    def read_back(self, sums: Sequence[tuple[int, ...]], threads: int) -> None:
        raise Unsupported("a load_weights hides where it puts its tensors")

    def release(self) -> None:
        self._layout = None


def check_names(
    layout: Layout, table: Mapping[str, Tensor], partial: bool, places: Mapping[str, tuple]
) -> None:
    """Compare a manifest with the engine's tensors; the first difference is raised."""
    for entry in layout.entries:
        target = table.get(entry.name)
        if target is None:
            raise UnknownName(
                f"{entry.name!r} is not a tensor of the engine; it has {_some(table)}. "
                "Send the engine's own names (its state_dict keys)"
            )
        if tuple(target.shape) != entry.shape:
            raise ShapeMismatch(
                f"{entry.name!r} has shape {tuple(entry.shape)}, the engine's has "
                f"{tuple(target.shape)}"
            )
        if target.dtype != entry.dtype:
            raise DtypeMismatch(
                f"{entry.name!r} has dtype {entry.dtype}, the engine's has {target.dtype}: "
                f"send tensor.to({target.dtype})"
            )
    if partial:
        return
    sent = {entry.name for entry in layout.entries}
    covered = {places[name] for name in sent}
    missing = [name for name in table if name not in sent and places[name] not in covered]
    if missing:
        raise MissingName(
            f"the update lacks {_some(missing)} ({len(missing)} of the engine's {len(table)} "
            "tensors): send all, or pass partial=True to keep those weights"
        )


def mismatch(
    entry: Entry, want: int, got: int, what: str, *, dirty: bool = False
) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{entry.name!r}: sum {want:016x} was packed, {got:016x} {what}; send the update again",
        dirty=dirty,
    )


def _place(tensor: Tensor) -> tuple:
    """Equal for two names of one memory (tied weights), and for nothing else."""
    if tensor.numel() == 0 or not _is_place(tensor):
        return (id(tensor),)
    shape = tuple(tensor.shape)
    return (tensor.device, tensor.data_ptr(), shape, tensor.stride(), tensor.dtype)


def _is_place(tensor: Tensor) -> bool:
    """Whether values can be copied in: memory of its own, no element twice."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return not any(step == 0 and size > 1 for size, step in strides)


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    text = ", ".join(repr(name) for name in names[:limit])
    return text + (", …" if len(names) > limit else "")
