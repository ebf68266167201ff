"""Who holds what: each rank's table of parts, and the whole tensors that all of them make.

part      a box [start, start + size) of the grid of a whole tensor, and a strided view of one of
          this rank's tensors; equal boxes on several ranks are replicas
covered   the boxes of a tensor are the product of intervals that tile each of its dimensions
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import layout as layouts
from ..errors import Unsupported
from ..source import Table
from .checkpoint import extent

Index = tuple[int, ...]


class Held(NamedTuple):
    """What this rank has of one whole tensor."""

    name: str
    shape: Index
    dtype: torch.dtype
    grid: Index  # `shape`, its dimensions split as far as it takes for every part to be a box
    parts: list[tuple[Index, Tensor]]  # where in the grid, and a view of one of `tensors()`
    alias: str | None = None  # the name whose memory it shares


class Shards(Protocol):
    """One rank's share of a model."""

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors of this rank, as they are now; asked once an update."""

    def held(self, tensors: dict[str, Tensor]) -> list[Held]:
        """What they are parts of; asked once."""


class Box(NamedTuple):
    start: Index
    size: Index


@dataclass
class Whole:
    """A tensor of the checkpoint and the ranks that hold its parts."""

    name: str
    shape: Index
    dtype: torch.dtype
    grid: Index
    alias: str | None
    boxes: dict[Box, list[int]] = field(default_factory=dict)


class Own(NamedTuple):
    """A part on this rank as a view of one of its tensors."""

    tensor: int  # its place in the table
    offset: int  # elements from the start of it
    size: Index
    stride: Index
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


@torch.no_grad()
def describe(shards: Shards) -> tuple[dict, dict[tuple[str, Box], Own], Table]:
    """What this rank tells the others, where its parts lie, and the forms of its tensors."""
    tensors = shards.tensors()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise Unsupported(f"{name!r}: only dense tensors with data can be gathered")
    noted = Table(tensors)
    noted.note()
    places = {name: i for i, name in enumerate(tensors)}
    storages: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    parts: dict[tuple[str, Box], Own] = {}
    entries = []
    for held in shards.held(tensors):
        if not layouts.supported(held.dtype):
            raise Unsupported(
                f"{held.name!r} has dtype {held.dtype}, which has no code on the wire"
            )
        # Dimensions of size 1 mean nothing here; a number is a vector of one.
        kept = [d for d, size in enumerate(held.grid) if size != 1]
        boxes = []
        for start, view in held.parts:
            if not view.numel():
                continue
            at = tuple(start[d] for d in kept) or (0,)
            size = tuple(view.shape[d] for d in kept) or (1,)
            stride = tuple(view.stride(d) for d in kept) or (1,)
            name, offset = _within(held.name, view, storages, tensors)
            box = Box(at, size)
            parts[held.name, box] = Own(places[name], offset, size, stride, held.dtype)
            boxes.append(box)
        grid = tuple(held.grid[d] for d in kept) or (1,)
        code = layouts.DTYPES.index(held.dtype)
        entries.append((held.name, code, held.shape, grid, held.alias, boxes))
    noted.forget_tensors()
    device = next((t.device.type for t in tensors.values()), None)
    return {"device": device, "tensors": entries}, parts, noted


def _within(
    what: str, view: Tensor, storages: dict[int, list[str]], tensors: dict[str, Tensor]
) -> tuple[str, int]:
    for name in storages.get(view.untyped_storage().data_ptr(), []):
        tensor = tensors[name]
        offset = int(view.storage_offset()) - int(tensor.storage_offset())
        if offset >= 0 and offset + extent(view) <= extent(tensor) and view.dtype == tensor.dtype:
            return name, offset
    raise Unsupported(f"{what!r}: a part must be a view of one of this rank's tensors")


def merged(tables: list[dict]) -> dict[str, Whole]:
    """The whole tensors, in the order in which the ranks name them.

    Raises
    ------
    ValueError
        Two ranks disagree on a tensor, or no rank holds a part of it.
    """
    wholes: dict[str, Whole] = {}
    first: dict[str, int] = {}
    for rank, table in enumerate(tables):
        for name, code, shape, grid, alias, boxes in table["tensors"]:
            one = Whole(name, tuple(shape), layouts.DTYPES[code], tuple(grid), alias)
            known = wholes.setdefault(name, one)
            first.setdefault(name, rank)
            if known is not one and _form(known) != _form(one):
                raise ValueError(
                    f"module: {name!r} is {_form(known)} on rank {first[name]} and {_form(one)} on "
                    f"rank {rank}"
                )
            for start, size in boxes:
                known.boxes.setdefault(Box(tuple(start), tuple(size)), []).append(rank)
    for whole in wholes.values():
        if whole.alias is None:
            _check_covered(whole)
        elif wholes.get(whole.alias) is None or wholes[whole.alias].alias is not None:
            raise ValueError(
                f"module: {whole.name!r} is tied to {whole.alias!r}, which is not sent"
            )
    order = list(wholes)  # an owner comes before its aliases
    order.sort(key=lambda name: wholes[name].alias is not None)
    return {name: wholes[name] for name in order}


def _form(whole: Whole) -> str:
    tied = "" if whole.alias is None else f" tied to {whole.alias!r}"
    split = "" if whole.grid == whole.shape else f" as {list(whole.grid)}"
    return f"{list(whole.shape)} {str(whole.dtype).removeprefix('torch.')}{split}{tied}"


def _check_covered(whole: Whole) -> None:
    if math.prod(whole.grid) != math.prod(whole.shape):
        raise ValueError(f"module: {whole.name!r} of shape {whole.shape} in a grid of {whole.grid}")
    if not math.prod(whole.shape):
        return
    intervals = [
        {(box.start[d], box.start[d] + box.size[d]) for box in whole.boxes}
        for d in range(len(whole.grid))
    ]
    for dim, (of_dim, size) in enumerate(zip(intervals, whole.grid, strict=True)):
        end = 0
        for start, stop in sorted(of_dim):
            if start != end:
                break
            end = stop
        if end != size:
            held = ", ".join(f"[{start}, {stop})" for start, stop in sorted(of_dim))
            raise ValueError(
                f"module: the ranks hold {held or 'nothing'} of dimension {dim} of {whole.name!r}, "
                f"wanted [0, {size}), once"
            )
    if len(whole.boxes) != math.prod(map(len, intervals)):
        raise ValueError(f"module: some parts of {whole.name!r} are on no rank")
