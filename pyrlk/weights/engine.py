"""Where received tensors go: an nn.Module's own tensors, or a load_weights callable.

check(layout, partial)    names, shapes, dtypes, aliases; raises before a byte is copied
apply(segment, bucket)    copies one bucket; with sums, proves what it copied
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from . import memory
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

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], object]
_Target = tuple[Tensor, Entry, int]  # where to, from where, and which sum of the bucket


class Engine(Protocol):
    """Where a receiver puts tensors."""

    names_from: str

    def check(self, layout: Layout, partial: bool) -> None: ...
    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None: ...
    def release(self) -> None: ...


class ModuleEngine:
    """Copies straight into the tensors of `module.state_dict()`, tied weights once."""

    names_from = "module"

    def __init__(self, module: nn.Module):
        self._module = module
        self._targets: list[list[_Target]] = []

    def check(self, layout: Layout, partial: bool) -> None:
        # Looked up anew at every update: an engine may rebind its parameters in between.
        table = {n: t for n, t in self._module.state_dict().items() if isinstance(t, Tensor)}
        places = {name: _place(tensor) for name, tensor in table.items()}
        check_names(layout, table, partial, places)
        sources: dict[tuple, Entry] = {}
        targets: list[list[_Target]] = []
        for bucket in layout.members:
            targets.append([])
            for piece, sharing in enumerate(bucket):
                for entry in (layout.entries[i] for i in sharing):
                    target = table[entry.name]
                    if target.device.type == "meta" or _overlaps_itself(target):
                        raise Unsupported(
                            f"{entry.name!r}: the engine's tensor has no memory of its own"
                        )
                    other = sources.setdefault(places[entry.name], entry)
                    if other is entry:
                        targets[-1].append((target, entry, piece))
                    elif (other.bucket, other.offset) != (entry.bucket, entry.offset):
                        raise Unsupported(
                            f"{other.name!r} and {entry.name!r} are tied in the engine but not "
                            "at the publisher: send one of them, or tie them there"
                        )
        self._targets = targets

    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None:
        targets = self._targets[bucket]
        placed = [(target, entry.offset) for target, entry, _ in targets]
        copied = segment.unpack(placed, checksum=bool(sums), threads=threads)
        segment.finish()
        # The copy went past autograd: tell it, so that a saved tensor is known to be outdated.
        torch.autograd.graph.increment_version([t for t, _ in placed if not t.is_inference()])
        for (_, entry, piece), got in zip(targets, copied, strict=False):
            if got != sums[piece]:
                raise mismatch(entry, sums[piece], got, "was copied", dirty=True)

    def release(self) -> None:
        self._targets = []


class CallableEngine:
    """Feeds load_weights with views of the staging memory, one call a bucket."""

    def __init__(self, load_weights: LoadWeights, expected: Mapping[str, Tensor] | None):
        self._load_weights = load_weights
        self._expected = expected
        self._layout: Layout | None = None
        self.names_from = "unchecked" if expected is None else "expected"

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
        try:
            self._load_weights(views)
        except Exception as error:
            raise ApplyFailed(
                f"load_weights raised {type(error).__name__}: {error}", dirty=True
            ) from error
        segment.finish()

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
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    shape = tuple(tensor.shape)
    return (tensor.device, tensor.data_ptr(), shape, tensor.stride(), tensor.dtype)


def _overlaps_itself(tensor: Tensor) -> bool:
    return any(z == 0 and n > 1 for n, z in zip(tensor.shape, tensor.stride(), strict=True))


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    text = ", ".join(repr(name) for name in names[:limit])
    return text + (", …" if len(names) > limit else "")
