"""FSDP2 and DTensor: each rank holds boxes of a tensor, told by its placements.

Shard(d) on a mesh dimension of m ranks      chunk r of m along dimension d (torch.chunk)
_StridedShard(d, f)                          chunk r of m of each of f chunks along d
Replicate()                                  the whole

applied from the first mesh dimension to the last; a rank's rows of d are then a few intervals.
FSDP over tensor parallelism is (_StridedShard(0, f=tp), Shard(0)).
Source: torch.distributed.tensor.placement_types, torch 2.13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import Unsupported
from ..source import ModuleState
from .checkpoint import BUFFERS, View, is_hf, views
from .exchange import Gathered
from .table import Held, Index


def dtensor(
    module: nn.Module,
    *,
    group: dist.ProcessGroup | None = None,
    buffers: Sequence[str] = BUFFERS,
    wanted_by: Callable[[str], Collection[int] | None] | None = None,
    timeout: float = 30.0,
) -> Gathered:
    """The whole tensors of a module whose parameters are DTensors (FSDP2, tensor parallelism).

    Collective over `group`: every rank calls it, once; pass the result to `Publisher.update` as
    often as the weights change.

    Parameters
    ----------
    module : nn.Module
        Its parameters may be DTensors on any mesh of Shard and Replicate, even or uneven, and plain
        tensors, which every rank holds alike: one rank sends them. A transformers model goes by its
        checkpoint names as with `gather.hf`, others by their state_dict.
    group : ProcessGroup, optional
        Ranks that together hold every part at least once. Default: all.
    buffers : sequence of str
        Persistent buffers of a transformers model that come too, by the last part of their name.
    wanted_by : callable, optional
        name → ranks of the group that need this tensor, or None for all: an expert can go to its
        owner alone. Ranks without bucket memory get nothing in any case. Equal on every rank.
    timeout : float
        Seconds for each collective of the set-up.

    Raises
    ------
    TypeError
        `module` is no module.
    Unsupported
        A placement (Partial), or a checkpoint name that is no view of the module's tensors.
    ValueError
        Ranks disagree on a tensor, or no rank of the group holds a part of it.
    UpdateError
        Another rank could not take part; PeerLost, Timeout: it is gone, or silent.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    return Gathered(_Module(module, buffers), group, wanted_by, timeout)


class Interval(NamedTuple):
    """Indices [start, start + size) of a dimension, and where they begin in the local tensor."""

    start: int
    size: int
    local: int


class _Module:
    """`Shards` of a module."""

    def __init__(self, module: nn.Module, buffers: Sequence[str]):
        self._module = module
        self._state = ModuleState(module)
        self._buffers = tuple(buffers)

    def tensors(self) -> dict[str, Tensor]:
        return {name: _local(tensor) for name, tensor in self._sharded().items()}

    def held(self, tensors: dict[str, Tensor]) -> list[Held]:
        state = self._sharded()
        twins: dict[int, Tensor] = {}  # the whole tensors, without data
        whole = {
            name: twins.setdefault(id(t), torch.empty(t.shape, dtype=t.dtype, device="meta"))
            for name, t in state.items()
        }
        if is_hf(self._module):
            found = views(self._module, whole, self._buffers)
        else:
            found = {name: View(name, 0, t.size(), t.stride()) for name, t in whole.items()}
        first: dict[tuple, str] = {}
        out = []
        for name, view in found.items():
            tensor = whole[view.source]
            key = (id(twins[id(state[view.source])]), *view[1:])
            owner = first.setdefault(key, name)
            alias = None if owner == name or not tensor.numel() else owner
            parts = []
            if alias is None:
                held = intervals_of(view.source, state[view.source])
                parts = parts_of(name, view, tuple(tensor.shape), held, tensors[view.source])
            shape = tuple(view.size)
            out.append(Held(name, shape, tensor.dtype, shape, parts, alias))
        return out

    def _sharded(self) -> dict[str, Tensor]:
        """The state as it lies between two steps; FSDP keeps its root unsharded after a forward."""
        from torch.distributed.fsdp import FSDPModule

        for one in self._module.modules():
            if isinstance(one, FSDPModule):
                one.reshard()
        return self._state.tensors()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "full_tensor") else tensor


def intervals_of(name: str, tensor: Any) -> list[list[Interval]]:
    """Of each dimension, the indices that this rank holds."""
    lengths: list[list[tuple[int, int]]] = [[(0, size)] for size in tensor.shape]
    if not hasattr(tensor, "full_tensor"):
        return [[Interval(0, size, 0)] for size in tensor.shape]
    place = tensor.device_mesh.get_coordinate()
    if place is None:  # not on its mesh
        return [[] for _ in tensor.shape]
    for placement, count, rank in zip(
        tensor.placements, tensor.device_mesh.shape, place, strict=True
    ):
        if placement.is_partial():
            raise Unsupported(f"{name!r} is {placement}: redistribute it to Shard or Replicate")
        if placement.is_replicate():
            continue
        dim = placement.dim
        factor = getattr(placement, "split_factor", 1)
        lengths[dim] = [
            kept for chunk in _chunks(lengths[dim], factor) for kept in _chunks(chunk, count)[rank]
        ]
    local = _local(tensor)
    sizes = [sum(size for _, size in of_dim) for of_dim in lengths]
    if sizes != list(local.shape) and math.prod(sizes) + local.numel():
        raise Unsupported(
            f"{name!r} holds {list(local.shape)} here, but its placements {tensor.placements} "
            f"give {sizes}"
        )
    out = []
    for of_dim in lengths:
        ends = itertools.accumulate((size for _, size in of_dim), initial=0)
        out.append([Interval(*one, end) for one, end in zip(of_dim, ends, strict=False)])
    return out


def _chunks(intervals: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """`count` chunks of indices as torch.chunk makes them; the last ones may be empty."""
    step = -(-sum(size for _, size in intervals) // count)
    out: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    at = 0  # indices so far
    for start, size in intervals:
        done = 0
        while done < size:
            chunk = at // step
            take = min(size - done, (chunk + 1) * step - at)
            out[chunk].append((start + done, take))
            done, at = done + take, at + take
    return out


def parts_of(
    name: str, view: View, shape: Index, held: list[list[Interval]], local: Tensor
) -> list[tuple[Index, Tensor]]:
    """What a view of a whole tensor has in common with the boxes that this rank holds of it."""
    if held == [[Interval(0, size, 0)] for size in shape] and local.is_contiguous():
        at = int(local.storage_offset()) + view.offset
        return [((0,) * len(view.size), local.as_strided(view.size, view.stride, at))]
    axes, first = _axes(name, view, shape)
    out = []
    for box in itertools.product(*held):
        start, size, stride = [0] * len(view.size), list(view.size), [1] * len(view.size)
        at, empty = int(local.storage_offset()), False
        for dim, (interval, begin) in enumerate(zip(box, first, strict=True)):
            axis, step = axes.get(dim, (None, 1))
            count = 1 if axis is None else view.size[axis]
            low = min(max(-((begin - interval.start) // step), 0), count)
            high = min(max(-((begin - interval.start - interval.size) // step), 0), count)
            empty |= low >= high
            inside = begin + low * step - interval.start
            at += (interval.local + inside) * local.stride(dim)
            if axis is not None:
                start[axis], size[axis] = low, high - low
                stride[axis] = step * local.stride(dim)
        if not empty:
            out.append((tuple(start), local.as_strided(size, stride, at)))
    return out


def _axes(name: str, view: View, shape: Index) -> tuple[dict[int, tuple[int, int]], Index]:
    """Dimension of the whole → (dimension of the view, step); and the view's first index."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    first, rest = [], view.offset
    for stride in strides:
        first.append(rest // stride)
        rest %= stride
    axes: dict[int, tuple[int, int]] = {}
    for axis, (size, stride) in enumerate(zip(view.size, view.stride, strict=True)):
        if size == 1:
            continue
        fitting = [
            dim
            for dim, of_dim in enumerate(strides)
            if shape[dim] > 1
            and stride % of_dim == 0
            and first[dim] + (size - 1) * (stride // of_dim) < shape[dim]
            and dim not in axes
        ]
        if not fitting:
            raise Unsupported(
                f"{name!r} is no box of {view.source!r}, which is sharded: {list(view.size)} with "
                f"strides {list(view.stride)} of {list(shape)}"
            )
        dim = fitting[0]
        axes[dim] = axis, stride // strides[dim]
    return axes, tuple(first)
