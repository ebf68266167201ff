"""Staging memory that another process opens by handle, and the ring that reuses it.

    host   memfd, sealed SHRINK | GROW | FUTURE_WRITE | SEAL; the handle is a descriptor
    cuda   cuMemAlloc (outside torch's allocator); the handle is a cudaIpcMemHandle and an offset

    slot:  FREE ─fill→ FILLING ─ready→ READY(generation) ─ack of that generation→ FREE

`Host` and `Cuda` are the publisher's side (pack), `open_segment` the receiver's (sum, unpack).
Sums are those of csrc/memory/pack.h, equal on every device.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import enum
import functools
import hashlib
import itertools
import math
import os
import secrets
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrlk import _C

from .errors import ProtocolError, StagingError, Unsupported
from .layout import aligned

NO_GPU = bytes(16)
Placed = tuple[Tensor, int]  # a tensor and its offset in the segment


class Copies:
    """Tensors and their places in a segment: all that a copy needs, worked out once.

    From update to update only addresses change: `refill` takes other tensors of the same forms.
    """

    def __init__(self, placed: Sequence[Placed]):
        self.tensors = [tensor for tensor, _ in placed]
        self.offsets = [offset for _, offset in placed]
        self.on_host = all(tensor.device.type == "cpu" for tensor in self.tensors)
        self.forms = array("Q")  # see csrc/bindings.cpp
        for tensor, offset in placed:
            if tensor.is_contiguous():
                self.forms.extend((offset, 1, 1, tensor.nbytes, 1))
            else:
                self.forms.extend((offset, tensor.element_size(), tensor.ndim))
                self.forms.extend(tensor.shape)
                self.forms.extend(tensor.stride())
        self.addresses = array("Q")
        if self.on_host:
            self.addresses.extend(tensor.data_ptr() for tensor in self.tensors)
        self.end = max((tensor.nbytes + offset for tensor, offset in placed), default=0)
        self._launches: dict[tuple[torch.device, bool], tuple[list[int], Any]] = {}

    def refill(self, tensors: list[Tensor], addresses: Iterable[int]) -> None:
        self.tensors = tensors
        self.addresses = array("Q", addresses)

    def clear(self) -> None:
        """Keep no tensor alive."""
        self.tensors = []

    def launch(self, kernel: Any, device: torch.device, *, packs: bool) -> tuple[list[int], Any]:
        """Which tensors one launch on `device` can take, and the `Pieces` that takes them.

        They lie there; to be packed they are rows of contiguous bytes, to be unpacked one such row.
        """
        key = device, packs
        if key not in self._launches:
            forms = {i: kernel.form(t) for i, t in enumerate(self.tensors) if t.device == device}
            taken = [i for i, form in forms.items() if form is not None and (packs or not form.run)]
            self._launches[key] = taken, kernel.Pieces([forms[i] for i in taken], device)
        return self._launches[key]


class Kind(enum.IntEnum):
    """What a handle is."""

    HOST = 0
    CUDA = 1


@dataclass(frozen=True)
class Handle:
    """All that a second process needs, beside the descriptor, to open a segment."""

    kind: Kind
    nbytes: int
    id: bytes  # 128 random bits; a process id is never an identity
    uuid: bytes = NO_GPU
    ipc: bytes = bytes(64)
    offset: int = 0  # of the segment in the exported allocation


class Segment:
    """`nbytes` of staging memory, seen as one flat uint8 tensor."""

    handle: Handle
    fd: int | None = None

    def __init__(self, handle: Handle, flat: Tensor, release: Callable[[], None]):
        self.handle = handle
        self._flat: Tensor | None = flat
        self._release = release
        self._summed: dict[int, tuple[weakref.ref[array[int]], Any]] = {}  # by id of its ranges

    @property
    def nbytes(self) -> int:
        return self.handle.nbytes

    @property
    def flat(self) -> Tensor:
        if self._flat is None:
            raise StagingError("this staging segment is closed")
        return self._flat

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the segment's memory."""
        return _view(self.flat, offset, shape, dtype)

    def pack(self, sources: Copies, *, checksum: bool, threads: int) -> list[int]:
        """Copy tensors in; the sum of each, or an empty list."""
        if self._on_host and sources.on_host:
            forms, addresses = sources.forms, sources.addresses
            return _C.pack(self.flat.data_ptr(), self.nbytes, forms, addresses, checksum, threads)
        return self._move(sources, checksum, packs=True)

    def sums(self, ranges: array[int], *, threads: int) -> list[int]:
        """Sums of ranges, nothing copied; offset and bytes of each one after the other."""
        if self._on_host:
            return _C.checksum(self.flat.data_ptr(), self.nbytes, ranges, threads)
        kernel = _kernel_on(self.flat.device)
        if kernel is None:
            return sums_of(self.flat, ranges)
        # A layout's ranges are the same object in every update, and a segment stays where it is.
        known = self._summed.get(id(ranges))
        if known is not None and known[0]() is ranges:
            return _unsigned(known[1].launch(copy=False))
        pieces, sums = _summing(kernel, self.flat, ranges)
        self._summed = {key: one for key, one in self._summed.items() if one[0]() is not None}
        self._summed[id(ranges)] = weakref.ref(ranges), pieces
        return sums

    def unpack(self, targets: Copies, *, checksum: bool, threads: int) -> list[int]:
        """Copy into tensors; the sum of what each one received, or an empty list."""
        if self._on_host and targets.on_host:
            forms, addresses = targets.forms, targets.addresses
            return _C.unpack(self.flat.data_ptr(), self.nbytes, forms, addresses, checksum, threads)
        return self._move(targets, checksum, packs=False)

    def _move(self, copies: Copies, checksum: bool, *, packs: bool) -> list[int]:
        """Copy on a GPU: one launch for what the kernel can take, torch for the rest."""
        if copies.end > self.nbytes:
            raise ValueError(f"{copies.end} bytes leave a segment of {self.nbytes}")
        sums: dict[int, int] = {}
        kernel = _kernel_on(self.flat.device)
        if kernel is not None:
            taken, pieces = copies.launch(kernel, self.flat.device, packs=packs)
            there = [copies.tensors[i].data_ptr() for i in taken]
            here = [self.flat.data_ptr() + copies.offsets[i] for i in taken]
            found = pieces.run(*((there, here) if packs else (here, there)), sums=checksum)
            sums = dict.fromkeys(taken, 0)
            if checksum:
                sums = dict(zip(taken, _unsigned(found), strict=True))
        rest = [i for i in range(len(copies.tensors)) if i not in sums]
        totals = []
        for i in rest:
            tensor, offset = copies.tensors[i], copies.offsets[i]
            place = self.view(offset, tuple(tensor.shape), tensor.dtype)
            if packs:
                place.copy_(tensor)
            else:
                tensor.copy_(place)
            if checksum:
                # Of what arrived: in the segment, or in the tensor.
                whole = place if packs else tensor.contiguous()
                totals.append(_sum_of(whole.view(-1).view(torch.uint8)))
        sums.update(zip(rest, _numbers(totals), strict=False))
        return [sums[i] for i in range(len(copies.tensors))] if checksum else []

    @property
    def _on_host(self) -> bool:
        """Whether the C++ side can reach it; torch copies what lies on a GPU."""
        return self.handle.kind is Kind.HOST

    def finish(self) -> None:
        """Return when every queued copy into or out of the segment is done."""

    def forget_flat(self) -> None:
        """Keep the handle and the descriptor; the memory lives as long as its tensors."""
        self._flat = None

    def close(self) -> None:
        """Give the memory back; idempotent. After an error it may be tried again."""
        if self._flat is not None:
            self._release()
            self._flat = None
            self._summed = {}


def _view(flat: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    return flat[offset : offset + nbytes].view(dtype).view(shape)


class Host(Segment):
    """Shared memory of this machine."""

    def __init__(self, nbytes: int, *, inherit: bool = False):
        try:
            fd, address = _C.segment_create(nbytes, inherit)
        except OSError as error:
            raise StagingError(
                f"staging memory: {error.strerror}; lower bucket_bytes or buffers"
            ) from None
        handle = Handle(Kind.HOST, nbytes, secrets.token_bytes(16))
        super().__init__(handle, _host_tensor(address, nbytes), self._close_fd)
        self.fd = fd

    def _close_fd(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


# Segments that hold tensors of this process, by address: what the hand-over need not stage.
_SHARED: dict[int, Segment] = {}
_FLAT_BYTES = 4 << 30  # of an allocation of `share` on a GPU


@torch.no_grad()
def share(module: nn.Module) -> nn.Module:
    """Move a module's tensors into memory that an engine can map: no staging, one copy.

    Each parameter and buffer stays the same Python object; its data moves. Tensors of the CPU get
    one segment of shared memory, which processes forked from this one share. Tensors of a GPU could
    be read where they are, but every allocation costs its handle and its messages: they move into
    few allocations of torch's, of at most 4 GiB, one of which is needed on top while they move.
    The memory is freed with the last tensor on it.

    Raises
    ------
    StagingError
        Too little memory.
    """
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type in ("cpu", "cuda") and tensor.numel():
            by_device.setdefault(tensor.device, {}).setdefault(id(tensor), tensor)
    for device, tensors in by_device.items():
        if device.type == "cpu":
            _share_host(list(tensors.values()))
        else:
            _share_gpu(list(tensors.values()), device)
    return module


def _share_host(tensors: list[Tensor]) -> None:
    places, end = _side_by_side(tensors)
    segment = Host(end, inherit=True)
    _move(tensors, segment.flat, places)
    address = segment.flat.data_ptr()
    _SHARED[address] = segment
    weakref.finalize(segment.flat.untyped_storage(), _unshare, address).atexit = False
    segment.forget_flat()


def _share_gpu(tensors: list[Tensor], device: torch.device) -> None:
    for part in _portions(tensors, _FLAT_BYTES):
        places, end = _side_by_side(part)
        try:
            flat = torch.empty(end, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise StagingError(f"shared memory of {device}: {error}") from None
        _move(part, flat, places)
    torch.cuda.empty_cache()  # where they were


def _side_by_side(tensors: Iterable[Tensor]) -> tuple[list[int], int]:
    """Aligned offsets of tensors in one piece of memory, and its bytes."""
    ends = list(itertools.accumulate((aligned(t.nbytes) for t in tensors), initial=0))
    return ends[:-1], ends[-1]


def _portions(tensors: Iterable[Tensor], nbytes: int) -> Iterator[list[Tensor]]:
    """Tensors in order, in lists of at most so many bytes; a larger one is alone."""
    part: list[Tensor] = []
    end = 0
    for tensor in tensors:
        if part and end + aligned(tensor.nbytes) > nbytes:
            yield part
            part, end = [], 0
        part.append(tensor)
        end += aligned(tensor.nbytes)
    if part:
        yield part


def _move(tensors: Iterable[Tensor], flat: Tensor, places: Iterable[int]) -> None:
    """Give tensors the memory of `flat`, with what they hold."""
    for tensor, offset in zip(tensors, places, strict=True):
        view = _view(flat, offset, tuple(tensor.shape), tensor.dtype)
        view.copy_(tensor)
        tensor.data = view


def _unshare(address: int) -> None:
    segment = _SHARED.pop(address, None)
    if segment is not None and segment.fd is not None:
        os.close(segment.fd)


class Export(NamedTuple):
    """Where a tensor lies in memory that another process can open."""

    handle: Handle
    offset: int


class Exports:
    """Looks tensors up; an allocation of a GPU is asked for its handle once."""

    def __init__(self) -> None:
        self._shared = _shared_now()
        self._starts: list[int] = []  # of allocations of a GPU, ascending
        self._allocations: dict[int, _Allocation] = {}  # by their starts

    @property
    def any_of_host(self) -> bool:
        """Whether any tensor of the host could be exported; see `share`."""
        return bool(self._shared)

    @property
    def empty(self) -> bool:
        """Whether nothing that was looked up could be exported."""
        return not self._shared and not self._allocations

    def hold(self) -> bool:
        """Whether what was found is still so: every allocation is there and the same."""
        known = self._allocations.items()
        return self._shared == _shared_now() and all(
            one.handle == _exported(one.device, first)[1] for first, one in known
        )

    def find(self, tensor: Tensor) -> Export | None:
        """None for what has to be staged: strided, misaligned, or not exportable."""
        device = tensor.device.type
        if not (self._shared or device == "cuda") or not tensor.is_contiguous():
            return None
        address = tensor.data_ptr()
        first, end, handle = self._of_host(address) if device == "cpu" else self._of_gpu(tensor)
        offset = address - first
        if handle is None or not tensor.numel() or address + tensor.nbytes > end:
            return None
        return None if offset % tensor.element_size() else Export(handle, offset)

    def _of_host(self, address: int) -> tuple[int, int, Handle | None]:
        found = (one for one in self._shared if one[0] <= address < one[1])
        return next(found, (address, address, None))

    def _of_gpu(self, tensor: Tensor) -> tuple[int, int, Handle | None]:
        address = tensor.data_ptr()
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            first = self._starts[at]
            known = self._allocations[first]
            if address < known.end:
                return first, known.end, known.handle
        device = tensor.device.index or 0
        first, handle = _exported(device, address)
        if handle is not None:
            end = first + handle.nbytes
        else:
            storage = tensor.untyped_storage()
            first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if first not in self._allocations:
            bisect.insort(self._starts, first)
        self._allocations[first] = _Allocation(end, handle, device)
        return first, end, handle


class _Allocation(NamedTuple):
    """Of a GPU; without a handle it is staged."""

    end: int
    handle: Handle | None
    device: int


def _exported(device: int, address: int) -> tuple[int, Handle | None]:
    """(start, handle) of the allocation at an address; None of an allocator that cannot export."""
    try:
        ipc, offset, nbytes = _C.cuda_ipc_export(device, address)
        uuid = _C.cuda_device_uuid(device)
    except _C.CudaError:
        return address, None
    return address - offset, Handle(Kind.CUDA, nbytes, hashlib.sha256(ipc).digest()[:16], uuid, ipc)


def _shared_now() -> list[tuple[int, int, Handle]]:
    """(begin, end, handle) of the host's segments that hold tensors."""
    return [(at, at + s.nbytes, s.handle) for at, s in _SHARED.items()]


def exporting(handle: Handle, address: int, device: torch.device) -> Segment:
    """This process's own memory behind a handle, for sums; `address` is its first byte."""
    if handle.kind is Kind.CUDA:
        return _Own(handle, _cuda_tensor(address, handle.nbytes, device.index or 0), device)
    segment = _Own(handle, _borrowed(address, handle.nbytes), device)
    segment.fd = _SHARED[address].fd
    return segment


class _Own(Segment):
    """A trainer's memory: nothing of it is released here."""

    def __init__(self, handle: Handle, flat: Tensor, device: torch.device):
        super().__init__(handle, flat, lambda: None)
        self._device = device

    def finish(self) -> None:
        if self.handle.kind is Kind.CUDA:
            with _driver("waiting for copies"):
                _C.cuda_synchronize(self._device.index or 0)


def _borrowed(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


class Cuda(Segment):
    """Memory of one GPU, allocated by the driver so that any torch allocator setting will do."""

    def __init__(self, device: int, nbytes: int):
        self._device = device
        self._address: int | None = None
        try:
            self._address = _C.cuda_alloc(device, nbytes)
            ipc, offset, _ = _C.cuda_ipc_export(device, self._address)
            uuid = _C.cuda_device_uuid(device)
        except _C.CudaError as error:
            with contextlib.suppress(StagingError):  # the first error is the one to keep
                self._free()
            raise StagingError(f"CUDA staging memory: {error}") from None
        handle = Handle(Kind.CUDA, nbytes, secrets.token_bytes(16), uuid, ipc, offset)
        super().__init__(handle, _cuda_tensor(self._address, nbytes, device), self._free)

    def finish(self) -> None:
        with _driver("waiting for copies"):
            _C.cuda_synchronize(self._device)

    def _free(self) -> None:
        if self._address is not None:
            with _driver("freeing staging memory"):
                _C.cuda_free(self._device, self._address)
            self._address = None


@contextlib.contextmanager
def _driver(doing: str) -> Iterator[None]:
    """The driver's errors as ours."""
    try:
        yield
    except _C.CudaError as error:
        raise StagingError(f"{doing}: {error}") from None


class _OpenCuda(Segment):
    def __init__(self, handle: Handle):
        try:
            self._device = _C.cuda_device_by_uuid(handle.uuid)
            base = _C.cuda_ipc_open(self._device, handle.ipc)
        except _C.CudaError as error:
            raise StagingError(f"CUDA handle: {error}") from None
        flat = _cuda_tensor(base + handle.offset, handle.nbytes, self._device)
        super().__init__(handle, flat, self._close_handle)
        self._base = base

    def _close_handle(self) -> None:
        with _driver("closing a handle"):
            _C.cuda_ipc_close(self._device, self._base)

    def finish(self) -> None:
        with _driver("waiting for copies"):
            _C.cuda_synchronize(self._device)

    def close(self) -> None:
        if self._flat is not None:
            self.finish()
        super().close()


def tensor_sum(tensor: Tensor, *, threads: int) -> int:
    """The sum of a tensor's bytes in logical order."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = array("Q", [0, flat.numel()])
    if flat.device.type == "cpu":
        return _C.checksum(flat.data_ptr(), flat.numel(), whole, threads)[0]
    return sums_of(flat, whole)[0]


def gpu(device: torch.device) -> bytes:
    """UUID of a GPU; NO_GPU for the host, and where no driver says."""
    if device.type == "cuda":
        with contextlib.suppress(_C.CudaError):
            return _C.cuda_device_uuid(device.index or 0)
    return NO_GPU


def gpu_of(tensors: Iterable[Tensor]) -> bytes:
    """UUID of the one GPU that tensors lie on; NO_GPU if it is none, or several."""
    devices = {tensor.device for tensor in tensors}
    return gpu(devices.pop()) if len(devices) == 1 else NO_GPU


def create(device: torch.device, nbytes: int) -> Segment:
    """Staging memory where `device` says."""
    if device.type == "cuda":
        return Cuda(device.index or 0, nbytes)
    return Host(nbytes)


def open_segment(handle: Handle, fds: Sequence[int]) -> Segment:
    """Open another process's segment: seals and size are checked, host memory is mapped read-only.

    `fds` stay the caller's to close.
    """
    if handle.kind == Kind.CUDA:
        if fds:
            raise ProtocolError(f"a CUDA handle comes without descriptors, got {len(fds)}")
        return _OpenCuda(handle)
    if len(fds) != 1:
        raise ProtocolError(f"a host segment comes with one descriptor, got {len(fds)}")
    try:
        address = _C.segment_open(fds[0], handle.nbytes)
    except OSError as error:
        raise ProtocolError(f"segment: {error.strerror}") from None
    return Segment(handle, _host_tensor(address, handle.nbytes), lambda: None)


def placement(tensors: Iterable[tuple[str, Tensor]]) -> torch.device:
    """Where to stage: the one GPU that holds tensors, else the host."""
    found = torch.device("cpu")
    for name, tensor in tensors:
        device = tensor.device
        if device.type == "cpu" or device == found:
            continue
        if device.type != "cuda" or found.type == "cuda":
            raise Unsupported(
                f"{name!r} lies on {device}: an update takes tensors of the CPU and of one CUDA "
                "device; move it, or send one update a device with partial=True"
            )
        found = device
    return found


class State(enum.Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"


@dataclass
class Slot:
    """One segment of the ring. `generation` rises with every fill."""

    index: int
    segment: Segment
    state: State = State.FREE
    generation: int = 0

    def fill(self) -> None:
        self._expect(State.FREE)
        self.state = State.FILLING
        self.generation += 1

    def ready(self) -> None:
        self._expect(State.FILLING)
        self.state = State.READY

    def _expect(self, state: State) -> None:
        if self.state is not state:
            raise RuntimeError(
                f"staging slot {self.index} is {self.state.value}, not {state.value}"
            )


class Ring:
    """The staging slots of one session with one receiver."""

    def __init__(self, segments: Sequence[Segment]):
        self.slots = [Slot(i, segment) for i, segment in enumerate(segments)]

    def free_slot(self) -> Slot | None:
        return next((slot for slot in self.slots if slot.state is State.FREE), None)

    def ack(self, index: int, generation: int) -> None:
        """Free a slot; only the receiver's word on this very generation does."""
        slot = self.slots[index] if index < len(self.slots) else None
        if slot is None or slot.state is not State.READY or slot.generation != generation:
            raise ProtocolError(f"acknowledged slot {index}, generation {generation}: never sent")
        slot.state = State.FREE

    def close(self) -> None:
        close_all([slot.segment for slot in self.slots])


def close_all(segments: list[Segment]) -> None:
    """Close and forget segments, the last one first. One that fails stays; the others do not."""
    errors: list[StagingError] = []
    for index in reversed(range(len(segments))):
        try:
            segments[index].close()
            del segments[index]
        except StagingError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@functools.cache
def _pack_kernel() -> Any:
    try:
        from ..triton_kernels import pack
    except ImportError:  # torch does the same, in some launches a tensor
        return None
    return pack


def _kernel_on(device: torch.device) -> Any:
    """The pack kernel where it runs, else None."""
    return _pack_kernel() if device.type == "cuda" else None


_SUM_WORDS = 1 << 22
_MASK = (1 << 64) - 1


def _sum_of(data: Tensor) -> Tensor:
    """The sum of pack.h over a flat uint8 tensor, in torch: int64 arithmetic wraps mod 2^64."""
    whole = data.numel() // 4 * 4
    parts = [data[:whole].view(torch.int32)] if whole else []
    if whole != data.numel():
        tail = data.new_zeros(4)
        tail[: data.numel() - whole] = data[whole:]
        parts.append(tail.view(torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    first = 0
    for part in parts:
        for words in part.split(_SUM_WORDS):
            count = words.numel()
            weight = torch.arange(first, first + count, device=data.device) * 2 + 1
            total += ((words.to(torch.int64) & 0xFFFFFFFF) * weight).sum()
            first += count
    return total


def sums_of(flat: Tensor, ranges: array[int]) -> list[int]:
    """Sums of ranges of memory that the C++ side cannot reach; see `Segment.sums`."""
    kernel = _kernel_on(flat.device)
    if kernel is not None:
        return _summing(kernel, flat, ranges)[1]
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return _numbers([_sum_of(flat[at : at + count]) for at, count in pairs])


def _summing(kernel: Any, flat: Tensor, ranges: array[int]) -> tuple[Any, list[int]]:
    """What sums these ranges in one launch, and their sums."""
    pieces = kernel.Pieces([kernel.Form(count) for count in ranges[1::2]], flat.device)
    places = [flat.data_ptr() + at for at in ranges[::2]]
    return pieces, _unsigned(pieces.run(places, places, copy=False))


def _numbers(sums: Sequence[Tensor]) -> list[int]:
    if not sums:
        return []
    device = sums[0].device
    return _unsigned(torch.stack([s.to(device) for s in sums]))


def _unsigned(sums: Tensor) -> list[int]:
    return [value & _MASK for value in sums.tolist()]


def _host_tensor(address: int, nbytes: int) -> Tensor:
    mapping = (ctypes.c_ubyte * nbytes).from_address(address)
    # The last view unmaps: a tensor that outlives its session must not point into nothing.
    weakref.finalize(mapping, _C.segment_close, address, nbytes).atexit = False
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _cuda_tensor(address: int, nbytes: int, device: int) -> Tensor:
    class Memory:
        __cuda_array_interface__ = {  # noqa: RUF012 (numba's protocol wants a plain dict)
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device=torch.device("cuda", device))
