"""What a model's load_weights does, recorded once and replayed as one copy a bucket.

    record    load_weights over tensors of reserved, unwritten memory; every write to the model is
              noted and held back, so nothing changes and an exception costs nothing
    plan      source (tensor, offset, strides) → destination (parameter, offset, strides), and fills
    replay    _C.Replay, one call a bucket

A tensor is planned if all that load_weights does with it are views and copies (casting ones too)
into the model's own tensors. Any other goes through load_weights, for the reason that the plan
keeps.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import mmap
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrlk import _C

from .errors import ApplyFailed
from .layout import Layout

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], object]

_FORMATS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class Place:
    """A strided part of one of the model's tensors, found again by name after every begin."""

    name: str
    offset: int  # bytes from the tensor's first element
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def of(self, tensor: Tensor) -> Tensor:
        offset = tensor.storage_offset() + self.offset // tensor.element_size()
        return torch.as_strided(tensor.detach(), self.shape, self.strides, offset)


@dataclass(frozen=True)
class Copy:
    """One copy_ of load_weights. `offset` and `strides` are the source's, within its tensor."""

    entry: int
    offset: int  # bytes
    strides: tuple[int, ...]  # elements
    to: Place


@dataclass(frozen=True)
class Fill:
    """One fill_ or zero_ of a constant: padding."""

    to: Place
    value: float


@dataclass
class Plan:
    """The record of one manifest on one model.

    Attributes
    ----------
    copies : planned, in order
    fills : constants, run after the last bucket
    fallback : of each tensor that is not planned, why
    unread : tensors that load_weights does not look at
    uncovered : parameters that some byte of is written by nothing
    post : replay ends with the model's post_load_weights
    disabled : why nothing at all is planned; empty if that is not so
    """

    copies: list[Copy] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    fallback: dict[int, str] = field(default_factory=dict)
    unread: set[int] = field(default_factory=set)
    uncovered: list[str] = field(default_factory=list)
    post: bool = False
    disabled: str = ""


class Tensors:
    """The tensors that a model can reach, by name: parameters, buffers, and those in attributes."""

    def __init__(self, model: nn.Module):
        self.by_name: dict[str, Tensor] = {}
        self.parameters: set[str] = set()
        for name, parameter in model.named_parameters():
            self.by_name[name] = parameter
            self.parameters.add(name)
        seen = {id(tensor) for tensor in self.by_name.values()}
        for prefix, module in model.named_modules():
            dot = f"{prefix}." if prefix else ""
            for name, value in (*module._buffers.items(), *vars(module).items()):
                if name in ("_parameters", "_buffers"):
                    continue
                for key, tensor in _tensors_in(value):
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        self.by_name[f"{dot}{name}{key}"] = tensor

    def addresses(self) -> tuple[tuple[str, int], ...]:
        return tuple((n, t.data_ptr()) for n, t in self.by_name.items() if t.device.type != "meta")

    def signature(self) -> tuple:
        """Equal where a plan of one fits the other."""
        return tuple(
            (n, tuple(t.shape), t.stride(), t.dtype, str(t.device)) for n, t in self.by_name.items()
        )

    def versions(self) -> dict[str, int]:
        return {n: t._version for n, t in self.by_name.items() if not t.is_inference()}


def record(model: nn.Module, load_weights: LoadWeights, layout: Layout) -> Plan:
    """Run load_weights over a manifest without data; the model is as it was.

    Raises
    ------
    ApplyFailed
        load_weights raised; the message names the tensor.
    """
    tensors = Tensors(model)
    before = tensors.addresses()
    kept = {name: tensor.detach() for name, tensor in tensors.by_name.items()}
    versions = tensors.versions()
    with _Reserved(layout) as sources, _inline_threads(), torch.no_grad():
        recorder = _Recorder(tensors, sources, layout)
        post = _Watch(model, "post_load_weights", recorder)
        last = ""

        def named() -> Iterator[tuple[str, Tensor]]:
            nonlocal last
            for index, entry in enumerate(layout.entries):
                last = entry.name
                yield entry.name, sources.tensor(index)

        try:
            with post, recorder:
                load_weights(named())
        except (Exception, SystemExit) as error:
            _restore(tensors, kept)
            raise ApplyFailed(
                f"load_weights raised {type(error).__name__} at {last!r}: {error}"
            ) from error
    plan = recorder.plan()
    rebound = _restore(tensors, kept)
    after = Tensors(model)
    if rebound:
        plan.disabled = f"load_weights rebinds {rebound}"
    elif after.addresses() != before:
        if not post.called:
            plan.disabled = "load_weights replaces tensors of the model"
        plan.post = True
    # A held back write still counts as one, so only those that the recorder never saw are left.
    after_versions = tensors.versions().items()
    written = [n for n, v in after_versions if versions.get(n) != v and n not in recorder.seen]
    if written:
        # It went past the recorder (C++, another thread): it was not held back either.
        raise ApplyFailed(f"load_weights writes {written[0]!r} unseen", dirty=True)
    if not plan.disabled:
        plan.uncovered = _uncovered(plan, tensors, layout)
    return plan


class Replay:
    """A plan bound to the addresses of a model's tensors."""

    def __init__(self, plan: Plan, tensors: Tensors, layout: Layout):
        self._plan = plan  # the model itself is not kept: who keeps a Replay is kept by the model
        self._addresses = tensors.addresses()
        self._tensors = tensors
        count = len(layout.buckets)
        self._copies: list[list[tuple[Copy, Tensor]]] = [[] for _ in range(count)]
        dense = [array("Q") for _ in range(count)]
        strided = [array("Q") for _ in range(count)]
        self._plain: list[list[tuple[Copy, Tensor]]] = [[] for _ in range(count)]
        self.summed: list[list[int]] = [[] for _ in range(count)]  # entries, beside the sums
        for copy in plan.copies:
            if copy.entry in plan.fallback:
                continue
            entry = layout.entries[copy.entry]
            target = copy.to.of(tensors.by_name[copy.to.name])
            self._copies[entry.bucket].append((copy, target))
            same = target.dtype == entry.dtype
            at = entry.offset + copy.offset
            if target.device.type != "cpu":
                self._plain[entry.bucket].append((copy, target))
            elif (
                same
                and target.nbytes == entry.nbytes
                and target.is_contiguous()
                and (_dense(copy.to.shape, copy.strides))
            ):
                dense[entry.bucket].extend((target.data_ptr(), at, 1, 1, target.nbytes, 1))
                self.summed[entry.bucket].append(copy.entry)
            elif same or (entry.dtype in _FORMATS and target.dtype in _FORMATS):
                kinds = (0, 0) if same else (_FORMATS[entry.dtype], _FORMATS[target.dtype])
                strided[entry.bucket].extend(
                    (target.data_ptr(), at, entry.dtype.itemsize, *kinds, target.ndim)
                )
                for numbers in (target.shape, copy.strides, target.stride()):
                    strided[entry.bucket].extend(numbers)
            else:
                self._plain[entry.bucket].append((copy, target))
        self._run = [_C.Replay(d, s) for d, s in zip(dense, strided, strict=True)]

    def fits(self, tensors: Tensors) -> bool:
        """Whether the model's tensors lie where they lay."""
        return tensors.addresses() == self._addresses

    def run(
        self, bucket: int, flat: Tensor, layout: Layout, checksum: bool, threads: int
    ) -> list[int]:
        """Copy one bucket; the sum of each of `summed`, or an empty list."""
        on_host = flat.device.type == "cpu"
        if on_host:
            sums = self._run[bucket].run(flat.data_ptr(), flat.nbytes, checksum, threads)
            left = self._plain[bucket]
        else:
            sums, left = [], self._copies[bucket]
        if left:
            torch._foreach_copy_(
                [target for _, target in left],
                [_source(copy, target, flat, layout) for copy, target in left],
            )
        written = [t for _, t in self._copies[bucket] if not t.is_inference()]
        if written:
            torch.autograd.graph.increment_version(written)
        return sums

    def finish(self, model: nn.Module) -> None:
        """After the last bucket: padding and derived tensors."""
        for fill in self._plan.fills:
            fill.to.of(self._tensors.by_name[fill.to.name]).fill_(fill.value)
        if self._plan.post:
            model.post_load_weights()  # type: ignore[operator]

    def poison(self, bucket: int) -> None:
        """Make every byte that a replay must write wrong."""
        for _, target in self._copies[bucket]:
            wrong = torch.nan if target.dtype in (*_FORMATS, torch.float64) else 1
            target.fill_(wrong)

    def touched(self, bucket: int) -> list[Tensor]:
        """The model's tensors that a bucket goes into, whole."""
        names = dict.fromkeys(copy.to.name for copy, _ in self._copies[bucket])
        return [self._tensors.by_name[name].detach() for name in names]


class _Reserved:
    """Tensors of a manifest on memory that is reserved and never written: all zeros, no cost."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._starts = [0]
        for nbytes in layout.buckets:
            # A page between buckets, so that no view reaches into the next.
            self._starts.append(self._starts[-1] + nbytes + mmap.PAGESIZE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._map = mmap.mmap(-1, max(self._starts[-1], mmap.PAGESIZE), flags)
        self._flat: Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)
        self._base = self._flat.data_ptr()
        self._end = self._base + len(self._map)
        spans = [
            (self._starts[e.bucket] + e.offset, i)
            for i, e in enumerate(layout.entries)
            if e.nbytes and i not in _aliases(layout)
        ]
        spans.sort()
        self._spans = spans
        self._keys = [start for start, _ in spans]
        self._names: dict[int, int] = {}

    def tensor(self, index: int) -> Tensor:
        entry = self._layout.entries[index]
        assert self._flat is not None
        start = self._starts[entry.bucket] + entry.offset if entry.nbytes else 0
        self._names[start] = index  # of aliases, the one that was yielded last
        return self._flat[start : start + entry.nbytes].view(entry.dtype).view(entry.shape)

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """(entry, byte offset in it) of a view of a source; None for anything else."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        at = tensor.data_ptr()
        if not self._base <= at < self._end:
            return None
        start, index = self._spans[bisect.bisect_right(self._keys, at - self._base) - 1]
        return self._names.get(start, index), at - self._base - start

    def __enter__(self) -> _Reserved:
        return self

    def __exit__(self, *exc: object) -> None:
        self._flat = None
        # A loader that keeps a tensor keeps the mapping: it is then freed with that tensor.
        with contextlib.suppress(BufferError):
            self._map.close()


class _Recorder(TorchDispatchMode):
    """Notes what happens to sources; holds back what would write to the model."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import all of torch._dynamo, seconds, at the first update

    def __init__(self, tensors: Tensors, sources: _Reserved, layout: Layout):
        super().__init__()
        self._sources = sources
        self._layout = layout
        self._copies: list[Copy] = []
        self._fills: list[Fill] = []
        self._fallback: dict[int, str] = {}
        self._read: set[int] = set()
        self._derived: dict[int, tuple[set[int], Tensor]] = {}  # by storage; kept alive
        self._homes: dict[int, list[tuple[int, int, str, Tensor]]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._foreign = ""
        self._post = False
        self.inside_post = False
        self.seen: set[str] = set()  # names of the model's tensors that something wrote to
        for name, tensor in tensors.by_name.items():
            if tensor.device.type == "meta" or not tensor.numel():
                continue
            start = tensor.data_ptr()
            self._dtypes[name] = tensor.dtype
            home = self._homes.setdefault(tensor.untyped_storage().data_ptr(), [])
            home.append((start, start + _extent(tensor), name, tensor))

    def plan(self) -> Plan:
        read = self._read | self._fallback.keys()
        unread = {i for i, e in enumerate(self._layout.entries) if e.nbytes and i not in read}
        for bucket in self._layout.members:
            for sharing in bucket:
                if read.intersection(sharing):
                    unread.difference_update(sharing)  # a tied name, taken by its other one
        for i in unread:
            self._fallback[i] = "load_weights does not read it"
        return Plan(
            copies=self._copies,
            fills=self._fills,
            fallback=self._fallback,
            unread=unread,
            post=self._post,
            disabled=self._foreign,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _mutated(func, args, kwargs)
        sources: set[int] = set()
        for tensor in _all_tensors((args, list(kwargs.values()))):
            found = self._sources.find(tensor)
            if found is not None:
                sources.add(found[0])
            elif tensor.device.type != "meta" and tensor.numel():
                sources |= self._derived.get(_storage(tensor), (set(), tensor))[0]
        if written:
            held = [t for t in written if self._place(t) is not None]
            if held:
                self.seen.update(p.name for p in map(self._place, held) if p is not None)
                self._note(func, held, args, sources)
                return args[0] if len(held) == 1 and held[0] is args[0] else written[0]
            if any(self._sources.find(t) is not None for t in written):
                self._fall_back(sources, f"load_weights changes it in place ({func})")
                return written[0]
        result = func(*args, **kwargs)
        if sources and not (_is_view(func) and not written):
            for index in sources:
                self._read.add(index)
            self._fall_back(sources, f"load_weights computes with it ({func})")
            for tensor in _all_tensors((result, written)):
                if tensor.device.type != "meta" and tensor.numel():
                    known, _ = self._derived.get(_storage(tensor), (set(), tensor))
                    self._derived[_storage(tensor)] = (known | sources, tensor)
        return result

    def _note(self, func: Any, held: list[Tensor], args: tuple, sources: set[int]) -> None:
        place = self._place(held[0])
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if len(held) == 1 and place is not None:
            if name == "copy_" and isinstance(args[1], Tensor):
                found = self._sources.find(args[1])
                if found is not None:
                    index, offset = found
                    self._read.add(index)
                    strides = args[1].expand(held[0].shape).stride()
                    self._copies.append(Copy(index, offset, strides, place))
                    if not _plain(held[0]):
                        self._fall_back({index}, "its destination overlaps itself")
                    home = self._dtypes[place.name]
                    if args[1].dtype != self._layout.entries[index].dtype or place.dtype != home:
                        self._fall_back({index}, "it is copied under another dtype")
                    return
            if name in ("fill_", "zero_") and not sources:
                value = 0 if name == "zero_" else args[1]
                if isinstance(value, int | float):
                    self._fills.append(Fill(place, value))
                    return
        if sources:
            self._read |= sources
            self._fall_back(sources, f"load_weights computes with it ({func})")
        elif self.inside_post:
            self._post = True
        else:
            self._foreign = f"load_weights writes {place and place.name!r} from elsewhere ({func})"

    def _place(self, tensor: Tensor) -> Place | None:
        """Where a view lies in the model; None outside it."""
        if tensor.device.type == "meta" or not tensor.numel():
            return None
        at = tensor.data_ptr()
        for start, end, name, home in self._homes.get(_storage(tensor), ()):
            if start <= at < end and (at - start) % home.element_size() == 0:
                return Place(name, at - start, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        return None

    def _fall_back(self, entries: Iterable[int], reason: str) -> None:
        for index in entries:
            self._fallback.setdefault(index, reason)


class _Watch:
    """Tells the recorder when a method of the model is at work."""

    def __init__(self, model: nn.Module, name: str, recorder: _Recorder):
        self.called = False
        self._model, self._name, self._recorder = model, name, recorder

    def __enter__(self) -> None:
        method = getattr(self._model, self._name, None)
        self._found = method is not None
        if method is None:
            return

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.called = self._recorder.inside_post = True
            try:
                return method(*args, **kwargs)
            finally:
                self._recorder.inside_post = False

        self._model.__dict__[self._name] = watched

    def __exit__(self, *exc: object) -> None:
        if self._found:
            del self._model.__dict__[self._name]


_INLINE: set[int] = set()  # threads whose submissions run inline
_PATCHING = threading.Lock()
_SUBMIT = concurrent.futures.ThreadPoolExecutor.submit


@contextlib.contextmanager
def _inline_threads() -> Iterator[None]:
    """A dispatch mode is its thread's own: what a loader hands to a pool runs here instead.

    Pools of other threads go on as they are, and two threads may be in here at once.
    """
    pool, thread = concurrent.futures.ThreadPoolExecutor, threading.get_ident()

    def submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() not in _INLINE:
            return _SUBMIT(self, fn, *args, **kwargs)
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    with _PATCHING:
        _INLINE.add(thread)
        pool.submit = submit  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _PATCHING:
            _INLINE.discard(thread)
            if not _INLINE:
                pool.submit = _SUBMIT  # type: ignore[method-assign]


def _restore(tensors: Tensors, kept: dict[str, Tensor]) -> str:
    """Undo an exchange of `.data`; the name of the first tensor that had one."""
    rebound = ""
    for name, tensor in tensors.by_name.items():
        if tensor.device.type != "meta" and tensor.data_ptr() != kept[name].data_ptr():
            rebound = rebound or name
            tensor.data = kept[name]
    return rebound


def _uncovered(plan: Plan, tensors: Tensors, layout: Layout) -> list[str]:
    """Parameters with elements that no copy, fill or fallback writes."""
    written: dict[str, dict[tuple, int]] = {}
    for to in (*(c.to for c in plan.copies), *(f.to for f in plan.fills)):
        count = 1
        for size in to.shape:
            count *= size
        written.setdefault(to.name, {})[(to.offset, to.shape, to.strides)] = count
    if any(i not in plan.unread for i in plan.fallback):
        return []  # what goes through load_weights may write anything
    return [
        name
        for name, tensor in tensors.by_name.items()
        if name in tensors.parameters
        and sum(written.get(name, {}).values()) < tensor.numel()
        and tensor.device.type != "meta"
    ]


def _source(copy: Copy, target: Tensor, flat: Tensor, layout: Layout) -> Tensor:
    entry = layout.entries[copy.entry]
    whole = flat[entry.offset : entry.offset + entry.nbytes].view(entry.dtype)
    return torch.as_strided(
        whole,
        copy.to.shape,
        copy.strides,
        whole.storage_offset() + copy.offset // entry.dtype.itemsize,
    )


def _aliases(layout: Layout) -> set[int]:
    """Entries that share their range with an earlier one."""
    return {i for bucket in layout.members for sharing in bucket for i in sharing[1:]}


def _mutated(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    out: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        if info is None or not info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        out.extend(_all_tensors(value))
    return out


def _is_view(func: Any) -> bool:
    """Whether the result only looks at its argument's memory."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _all_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all_tensors(item)


def _tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an attribute, one container deep."""
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", t) for i, t in enumerate(value) if isinstance(t, Tensor))
    elif isinstance(value, dict):
        yield from ((f"[{k!r}]", t) for k, t in value.items() if isinstance(t, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    reach = sum((n - 1) * z for n, z in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    want = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != want:
            return False
        want *= size
    return True


def _plain(tensor: Tensor) -> bool:
    """No element twice."""
    return all(z or n == 1 for n, z in zip(tensor.shape, tensor.stride(), strict=True))
