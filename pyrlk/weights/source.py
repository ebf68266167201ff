"""What a trainer hands over, and how little of it must be looked at again at the next update.

form     type, dtype, device, shape, stride of a tensor
owner    the first tensor that begins at the same address (tied weights)
forms and owners as before: the layout stands, and only the addresses are new
"""

from __future__ import annotations

import abc
import functools
import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import layout as layouts
from . import memory
from .errors import Unsupported

try:
    # What a compiled graph asks of its inputs: every form in one call, a sixth of the time of a
    # Python function a tensor and property. Private to torch, so only ever a way to say yes sooner.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | nn.Module


class Table:
    """Named tensors, and what a plan that was made for them depends on.

    Nothing is kept a tensor in `fits`: thousands of new objects an update would set off the garbage
    collector, which looks at the whole process.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.names = list(tensors)
        self.tensors = list(tensors.values())
        self.addresses: list[int] = []

    def note(self) -> None:
        """Look at every tensor: forms, addresses, owners."""
        tensors = self.tensors
        self._types = list(map(type, tensors))
        self._dtypes = list(map(_DTYPE, tensors))
        self._layouts = list(map(_LAYOUT, tensors))
        self._devices = list(map(_DEVICE, tensors))
        self._check()
        # An engine may have sparse tensors; they cannot be written to, and have no strides.
        self._dense = all(layout is torch.strided for layout in self._layouts)
        if not self._dense:
            tensors = [t if t.layout is torch.strided else torch.empty(0) for t in tensors]
        self._shapes = list(map(Tensor.size, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self.addresses = list(map(Tensor.data_ptr, tensors))
        self._owners = _owners(self.addresses)
        self._guards = None
        if TensorGuards is not None and self._dense:
            sizes = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
            self._guards = TensorGuards(*tensors, **sizes)

    def fits(self, noted: Table) -> bool:
        """Whether a plan made for `noted` will do: everything is equal but the addresses."""
        if self.names != noted.names:
            return False
        guards = noted._guards
        if not (guards is not None and guards.check(*self.tensors)) and not self._alike(noted):
            return False
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        return self.addresses == noted.addresses or _owners(self.addresses) == noted._owners

    def _alike(self, noted: Table) -> bool:
        """The same forms. The guards also say no to what does not matter, gradients and modes."""
        tensors = self.tensors
        return (
            noted._dense
            and _equal(map(type, tensors), noted._types)
            and _equal(map(_LAYOUT, tensors), noted._layouts)
            and _equal(map(_DTYPE, tensors), noted._dtypes)
            and _equal(map(_DEVICE, tensors), noted._devices)
            and _equal(map(Tensor.size, tensors), noted._shapes)
            and _equal(map(Tensor.stride, tensors), noted._strides)
            and not any(map(Tensor.is_neg, tensors))
        )

    def take(self, other: Table) -> None:
        """The tensors of another table that fits."""
        self.tensors, self.addresses = other.tensors, other.addresses

    def forget_tensors(self) -> None:
        """Keep what `fits` compares, and no tensor alive."""
        self.tensors = []

    def _check(self) -> None:
        """An engine may hold any kind of tensor: its own are judged where they are written to."""


_DTYPE, _LAYOUT = operator.attrgetter("dtype"), operator.attrgetter("layout")
_DEVICE = operator.attrgetter("device")


def _equal(values: Iterable, wanted: list) -> bool:
    return all(map(operator.eq, values, wanted))


def _owners(addresses: list[int]) -> list[int]:
    """Of each tensor the first one that begins at its address."""
    first: dict[int, int] = {}
    return [first.setdefault(at, i) for i, at in enumerate(addresses)]


class Source(Table):
    """What a trainer hands over; nothing is copied."""

    def placement(self) -> torch.device:
        """Where to stage."""
        return memory.placement(zip(self.names, self.tensors, strict=True))

    @functools.cached_property
    def exports(self) -> tuple[memory.Exports, list[memory.Export | None]]:
        """Of each tensor, where an engine could read it without staging; empty for none at all."""
        found = memory.Exports()
        if not found.any_of_host and all(t.device.type == "cpu" for t in self.tensors):
            return found, []
        return found, [found.find(tensor) for tensor in self.tensors]

    def specs(self, direct: Sequence[tuple[int, int] | None] | None = None) -> list[layouts.Spec]:
        """Specs with aliases: the same memory, read the same way, is sent once."""
        owners: dict[tuple, int] = {}
        specs = []
        for index, (name, tensor) in enumerate(zip(self.names, self.tensors, strict=True)):
            shape = tuple(tensor.shape)
            key = (tensor.device, tensor.data_ptr(), shape, tensor.stride(), tensor.dtype)
            owner = owners.setdefault(key, index) if tensor.numel() else index
            alias = None if owner == index else owner
            place = direct[index] if direct else None
            specs.append(layouts.Spec(name, shape, tensor.dtype, alias, place))
        return specs

    def _check(self) -> None:
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if hasattr(tensor, "full_tensor"):
                raise Unsupported(f"{name!r} is a DTensor: pass weights.gather.dtensor(module)")
            if tensor.layout is not torch.strided or tensor.device.type == "meta":
                kind = "meta" if tensor.device.type == "meta" else str(tensor.layout)
                raise Unsupported(f"{name!r} is a {kind} tensor: pass a dense one with data")
            if not layouts.supported(tensor.dtype):
                raise Unsupported(
                    f"{name!r} has dtype {tensor.dtype}, which has no code on the wire"
                )
            if tensor.is_neg():
                raise Unsupported(
                    f"{name!r} is a negated view, whose memory has the other sign: pass "
                    "tensor.resolve_neg()"
                )
            if tensor.numel() and tensor.data_ptr() == 0:
                raise Unsupported(
                    f"{name!r} is a {type(tensor).__name__} without memory of its own: pass the "
                    "plain tensors that it is made of"
                )


def checked(
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> dict[str, Tensor]:
    """What a user calls named_tensors; what `ModuleState` has found need not be looked through."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _pairs(named_tensors):
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"named_tensors: {name!r} is a {type(tensor).__name__}, wanted a str and a Tensor"
            )
        if name in tensors:
            raise ValueError(f"named_tensors: {name!r} comes twice")
        tensors[name] = tensor
    return tensors


def _pairs(named_tensors: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(named_tensors, Tensor | str | bytes) or not isinstance(named_tensors, Iterable):
        raise TypeError(
            "named_tensors must be a mapping, an iterable of (name, tensor) or a module, got "
            f"{type(named_tensors).__name__}"
        )
    if isinstance(named_tensors, Mapping):
        yield from named_tensors.items()
        return
    for item in named_tensors:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"named_tensors must yield (name, tensor), got {item!r:.80}")
        yield item[0], item[1]


class Work(abc.ABC):
    """A bucket that is under way."""

    @abc.abstractmethod
    def wait(self, timeout: float) -> list[int] | None:
        """Until the bucket's bytes lie in `out`; the sum of each of its pieces.

        None on a rank that only contributes, and with `checksum=False`.

        Raises
        ------
        PeerLost
            Another rank is gone, or gave up.
        Timeout
            `timeout` seconds have passed.
        """


class Sharded(abc.ABC):
    """Weights whose tensors lie in parts on the ranks of a group, gathered bucket by bucket.

    Every rank calls the same methods in the same order: `specs` is equal on all of them, so the
    layout that is planned from it is too, and `start` is a collective for every bucket.

        layout = layouts.plan(source.specs(), bucket_bytes)
        work = source.start(layout, 0, out)        # returns at once
        sums = work.wait(timeout)                  # bytes of bucket 0 lie in `out`, as Segment.pack
                                                   # would have put them there

    The next bucket may be started before this one is waited for: two are in flight at most.
    """

    group: dist.ProcessGroup | None
    timeout: float  # of `start` with bucket 0, which may have something to agree on; to be set

    @abc.abstractmethod
    def specs(self) -> list[layouts.Spec]:
        """Whole tensors: names, shapes, dtypes; equal on every rank. Nothing moves."""

    @abc.abstractmethod
    def start(
        self,
        layout: layouts.Layout,
        bucket: int,
        out: memory.Segment | Tensor | None,
        *,
        checksum: bool = True,
    ) -> Work:
        """Begin the one collective of a bucket. Bucket 0 begins an update.

        Parameters
        ----------
        layout : Layout
            Of `specs()`.
        bucket : int
        out : Segment, flat uint8 tensor, or None
            This rank's memory for the bucket, None where it only contributes: for all buckets of an
            update alike.
        checksum : bool
            Sum each tensor on its way into `out`.

        Raises
        ------
        TypeError, ValueError, UpdateError
            What one rank finds wrong at the begin of an update is an error on all of them, and the
            next update may begin. PeerLost and Timeout are for good.
        """


class ModuleState:
    """`module.state_dict(keep_vars=True)`, asked for again and again.

    Walking thousands of modules takes as long as copying small weights, so the first walk notes
    where each tensor is kept; it is walked again when a module or a name came or went. A module
    whose hooks rename or replace its tensors is walked every time.
    """

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)
        self._names: list[str] = []
        self._places: list[tuple[dict, str]] = []  # of each: where it is kept, under which key
        self._tables: list[dict] = []  # of all modules: parameters, buffers, submodules
        self._sizes: list[int] = []
        self._modules: list[dict] = []  # submodules alone
        self._children: list[nn.Module] = []
        self._absent: list[tuple[dict, str]] = []

    def of(self, module: object) -> bool:
        return self._module() is module

    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None  # the caller holds it
        return module

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, tied weights under each of their names."""
        if self._names:
            found: list[Any] = [table.get(key) for table, key in self._places]
            if not any(map(operator.is_, found, itertools.repeat(None))) and self._unchanged():
                return dict(zip(self._names, found, strict=True))
        module = self.module()
        state = module.state_dict(keep_vars=True)
        state = {name: t for name, t in state.items() if isinstance(t, Tensor)}
        self._note(module, state)
        return state

    def _unchanged(self) -> bool:
        children = itertools.chain.from_iterable(map(dict.values, self._modules))
        return (
            list(map(len, self._tables)) == self._sizes
            and all(map(operator.is_, children, self._children))
            and not any(table.get(key) is not None for table, key in self._absent)
        )

    def _note(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        slots: dict[str, tuple[dict, str]] = {}
        owners = list(module.named_modules(remove_duplicate=False))
        self._modules = [owner._modules for _, owner in owners]
        self._children = [child for modules in self._modules for child in modules.values()]
        self._tables, self._absent = list(self._modules), []
        for prefix, owner in owners:
            for table in (owner._parameters, owner._buffers):
                self._tables.append(table)
                for key, tensor in table.items():
                    name = f"{prefix}.{key}" if prefix else key
                    if tensor is None:
                        self._absent.append((table, key))
                    elif state.get(name) is tensor:
                        slots[name] = table, key
        self._sizes = list(map(len, self._tables))
        renamed = slots.keys() != state.keys()
        self._names = [] if renamed else list(state)
        self._places = [slots[name] for name in self._names]
