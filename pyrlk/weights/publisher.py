"""The trainer's side: plan → pack into staging → hand over by handle → wait until it is applied.

connect   once; handles are opened once a session, not once a bucket
check     version, names, shapes, dtypes: before a byte is packed
per bucket: free slot → pack and sum (C++) → BUCKET(slot, generation, sums) → ACK frees the slot
APPLIED   the receiver's version is the new one
"""

from __future__ import annotations

import abc
import contextlib
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from . import layout as layouts
from . import memory, wire
from .errors import EngineDirty, PeerLost, Timeout, Unsupported, UpdateError
from .wire import Frame, Type

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | nn.Module


SELECTORS = ("all", "target", "draft")


@dataclass(frozen=True)
class Outcome:
    """How an engine took the tensors of an update; see UpdateReport."""

    mode: str
    names_from: str
    tensors: int
    planned: int
    fallback: dict[str, str]


class Session(Protocol):
    """A connection to an engine. In an update: begin, stage, send; each may raise."""

    settled: bool  # nothing of a transaction is under way
    handed_over: bool  # the engine may have begun to copy

    @property
    def boot(self) -> bytes: ...  # another one means a restarted engine
    def alive(self) -> bool: ...
    def begin(
        self, layout: layouts.Layout, version: int, partial: bool, verify: bool, selector: str
    ) -> None: ...
    def stage(self, layout: layouts.Layout, device: torch.device, buffers: int) -> None: ...
    def send(
        self, layout: layouts.Layout, tensors: list[tuple[str, Tensor]], verify: bool, clock: Clock
    ) -> wire.Applied: ...
    def outcome(self, layout: layouts.Layout) -> Outcome: ...
    def close(self) -> None: ...  # politely
    def abandon(self) -> None: ...  # at once


class Target(abc.ABC):
    """Where weights go."""

    @abc.abstractmethod
    def open(self, patience: float, timeout: float) -> Session:
        """Connect, waiting up to `patience` seconds for an engine that is still starting."""


@dataclass(frozen=True)
class Local(Target):
    """A `Receiver` on this machine, by the path of its socket."""

    socket_path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        wire.check_path(self.socket_path)

    def open(self, patience: float, timeout: float) -> Session:
        return _Session(wire.check_path(self.socket_path), patience, timeout)


@dataclass
class UpdateReport:
    """What one update did; `str()` is a table.

    Attributes
    ----------
    version : of the engine now
    tensors : names sent, aliases included
    planned : tensors copied straight into the engine's own
    fallback : tensors that went through the engine's load_weights instead, with the reason
    bytes : handed over; an alias counts once
    buckets : staging buckets they took
    seconds : by stage; `verify` and `copy` were spent by the receiver, inside `wait`
    mode : "bucket": packed into staging buckets; "plan": and replayed by SGLang's loader
    names_from : what names were checked against: "module", "expected", "expect", "checkpoint",
        "engine" or "unchecked"
    """

    version: int
    tensors: int
    planned: int
    fallback: dict[str, str]
    bytes: int
    buckets: int
    seconds: dict[str, float] = field(default_factory=dict)
    mode: str = "bucket"
    names_from: str = "module"

    def __str__(self) -> str:
        rate = self.bytes / self.seconds["total"] / 1e9 if self.seconds.get("total") else 0.0
        rows = [
            ("version", str(self.version)),
            ("tensors", f"{self.tensors} ({self.planned} planned, {len(self.fallback)} fallback)"),
            ("names from", self.names_from),
            ("mode", self.mode),
            ("buckets", str(self.buckets)),
            ("bytes", f"{self.bytes:,} ({rate:.2f} GB/s)"),
            *((stage, f"{value * 1e3:.2f} ms") for stage, value in self.seconds.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class Publisher:
    """Hands the trainer's weights to an engine, one version at a time.

    Parameters
    ----------
    target : Local or SGLang
        The engine.
    bucket_bytes : int
        Largest staging bucket; a larger tensor gets a bucket of its own.
    buffers : int
        Staging buckets in flight. An update of at most this many buckets is all or nothing.
    verify : {"copy", "off"}
        "copy": a 64-bit sum of every tensor is made while packing, checked by the receiver before
        it copies, and again over what it copied. "off": neither.
    timeout : float
        Seconds that any single wait may take.

    Notes
    -----
    A context manager; `close()` releases the staging memory. Not for use in a forked child.
    """

    def __init__(
        self,
        target: Target,
        *,
        bucket_bytes: int = 512 << 20,
        buffers: int = 2,
        verify: str = "copy",
        timeout: float = 30.0,
    ):
        if not isinstance(target, Target):
            raise TypeError(
                f"target must be weights.Local or weights.SGLang, got {type(target).__name__}"
            )
        _check_int("bucket_bytes", bucket_bytes, 1, 1 << 46)
        _check_int("buffers", buffers, 1, wire.MAX_SLOTS)
        if verify not in ("copy", "off"):
            raise ValueError(f'verify must be "copy" or "off", got {verify!r}')
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self._target = target
        self._bucket_bytes = bucket_bytes
        self._buffers = buffers
        self._verify = verify == "copy"
        self._timeout = float(timeout)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._layout: tuple[list[layouts.Spec], layouts.Layout] | None = None
        self._boot: bytes | None = None  # of the engine that took our last update
        self._holder: list[Session] = []  # at most one; shared with the finalizer
        self._finalizer = weakref.finalize(self, _close_sessions, self._holder, self._pid)

    def update(
        self,
        named_tensors: NamedTensors,
        *,
        version: int,
        partial: bool = False,
        selector: str = "all",
    ) -> UpdateReport:
        """Make the engine's weights equal to `named_tensors`, under the number `version`.

        Parameters
        ----------
        named_tensors : mapping, iterable of (name, tensor), or nn.Module
            A module stands for its `state_dict()`. Tensors that share memory are sent once.
        version : int
            Must rise from update to update.
        partial : bool
            Allow names to be left out; the engine keeps those weights.
        selector : {"all", "target", "draft"}
            Which models of a speculating SGLang take the tensors.

        Raises
        ------
        UnknownName, MissingName, ShapeMismatch, DtypeMismatch, StaleVersion, EngineDirty
            Found before any byte was copied; the engine goes on with its old version.
        ChecksumMismatch, ApplyFailed, PeerLost, Timeout, ProtocolError, StagingError, Unsupported
            `error.dirty` says whether the engine may hold a mixture and needs a full update.
        TypeError, ValueError
            An argument is not what it should be.
        """
        _check_int("version", version, 0, 1 << 62)
        if not isinstance(partial, bool):
            raise TypeError(f"partial must be a bool, got {type(partial).__name__}")
        if selector not in SELECTORS:
            raise ValueError(f"selector must be one of {SELECTORS}, got {selector!r}")
        with self._lock:
            self._check_usable()
            clock = Clock()
            tensors = _collect(named_tensors)
            device = memory.placement(tensors)
            layout = self._plan(tensors)
            clock.lap("plan")
            session = self._connected()
            clock.lap("connect")
            if partial and self._boot not in (None, session.boot):
                raise EngineDirty(
                    "the engine was restarted and has lost its version: send a full update first"
                )
            try:
                session.begin(layout, version, partial, self._verify, selector)
                clock.lap("check")
                session.stage(layout, device, self._buffers)
                clock.lap("stage")
                applied = session.send(layout, tensors, self._verify, clock)
            except BaseException as error:
                if not session.settled:
                    self._drop(session)
                if isinstance(error, PeerLost | Timeout):
                    error.dirty = session.handed_over  # nobody is left to ask
                raise
            self._boot = session.boot
            clock.seconds["verify"] = applied.verify_seconds
            clock.seconds["copy"] = applied.copy_seconds
            return self._report(layout, session, version, clock)

    def close(self) -> None:
        """End the session and free the staging memory; idempotent."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError("this Publisher is closed")
        if os.getpid() != self._pid:
            raise RuntimeError("a Publisher cannot be used in a forked child: make one there")

    def _plan(self, tensors: list[tuple[str, Tensor]]) -> layouts.Layout:
        specs = _specs(tensors)
        if self._layout is None or self._layout[0] != specs:
            self._layout = specs, layouts.plan(specs, self._bucket_bytes)
        return self._layout[1]

    def _connected(self) -> Session:
        if self._holder and not self._holder[0].alive():
            self._drop(self._holder[0])
        if not self._holder:
            # A first engine may still be starting; one that was here and is gone is an error now.
            patience = self._timeout if self._boot is None else 0.0
            self._holder.append(self._target.open(patience, self._timeout))
        return self._holder[0]

    def _drop(self, session: Session) -> None:
        self._holder.clear()
        session.abandon()

    def _report(
        self, layout: layouts.Layout, session: Session, version: int, clock: Clock
    ) -> UpdateReport:
        outcome = session.outcome(layout)
        clock.seconds["total"] = clock.total()
        return UpdateReport(
            version=version,
            tensors=outcome.tensors,
            planned=outcome.planned,
            fallback=outcome.fallback,
            bytes=layout.nbytes,
            buckets=len(layout.buckets),
            seconds=clock.seconds,
            mode=outcome.mode,
            names_from=outcome.names_from,
        )


class _Session:
    """A connection and the staging ring that the other side has opened."""

    def __init__(self, path: str, patience: float, timeout: float):
        self._timeout = timeout
        self.channel = wire.connect(path, time.monotonic() + patience)
        self.settled = True  # nothing of a transaction is under way
        self.handed_over = False  # the receiver may have begun to copy
        self._ring = memory.Ring([])
        self._device = torch.device("cpu")
        self._transaction = 0
        self._digest = b""
        try:
            hello = wire.Hello(secrets.token_bytes(16))
            self._send(Type.HELLO, hello.encode())
            self.welcome = wire.Welcome.decode(self._expect(Type.WELCOME).body)
        except UpdateError:
            self.channel.close()
            raise

    @property
    def boot(self) -> bytes:
        return self.welcome.boot

    def alive(self) -> bool:
        return self.channel.alive()

    def outcome(self, layout: layouts.Layout) -> Outcome:
        straight = self.welcome.names_from == "module"
        names = [entry.name for entry in layout.entries]
        return Outcome(
            mode="bucket",
            names_from=self.welcome.names_from,
            tensors=len(names),
            planned=len(names) if straight else 0,
            fallback={} if straight else dict.fromkeys(names, "the receiver has a load_weights"),
        )

    def begin(
        self, layout: layouts.Layout, version: int, partial: bool, verify: bool, selector: str
    ) -> None:
        """Let the receiver judge the manifest; raises what it found."""
        if selector != "all":
            raise Unsupported(f"a Receiver has one model: selector {selector!r} is SGLang's")
        self._transaction += 1
        self.settled = self.handed_over = False
        fds = []
        count = 0
        if layout.digest != self._digest:
            count = len(layout.encoded)
            fds = [wire.manifest_fd(layout.encoded)]
        begin = wire.Begin(version, partial, verify, layout.digest, count)
        try:
            self._send(Type.BEGIN, begin.encode(), fds)
        finally:
            for fd in fds:
                os.close(fd)
        frame = self.channel.recv(self._deadline())
        if frame.type is Type.FAILED and frame.transaction == self._transaction:
            # Refused as a whole: the connection stays, and so does the receiver's last manifest.
            self.settled = True
            self._digest = b""
            raise wire.Failed.decode(frame.body).error()
        self._accept(frame, Type.CHECKED)
        self._digest = layout.digest

    def stage(self, layout: layouts.Layout, device: torch.device, buffers: int) -> None:
        """Have slots that are large enough, on the right device, open on both sides."""
        wanted = min(buffers, len(layout.buckets))
        slots = self._ring.slots
        large = all(slot.segment.nbytes >= layout.slot_bytes for slot in slots)
        if len(slots) >= wanted and large and (device == self._device or not wanted):
            return
        nbytes = max([layout.slot_bytes, *(slot.segment.nbytes for slot in slots)])
        if slots:
            # The importer closes before the exporter frees.
            self._send(Type.RETIRE)
            self._expect(Type.RETIRED)
            self._ring.close()
        self._device = device
        self._ring = memory.Ring([])
        segments: list[memory.Segment] = []
        try:
            for index in range(max(wanted, len(slots))):
                segment = memory.create(device, nbytes)
                segments.append(segment)
                info = wire.SegmentInfo(index, segment.handle)
                fds = [] if segment.fd is None else [segment.fd]
                self._send(Type.SEGMENT, info.encode(), fds)
                self._expect(Type.OPENED)
        finally:
            self._ring = memory.Ring(segments)

    def send(
        self,
        layout: layouts.Layout,
        tensors: list[tuple[str, Tensor]],
        verify: bool,
        clock: Clock,
    ) -> wire.Applied:
        """Pack and hand over every bucket; returns when the receiver serves the new version."""
        threads = torch.get_num_threads()
        for bucket, pieces in enumerate(layout.pieces):
            slot = self._ring.free_slot()
            while slot is None:
                self._await_ack()
                slot = self._ring.free_slot()
            clock.lap("wait")
            slot.fill()
            sources = [(tensors[i][1], layout.entries[i].offset) for i in pieces]
            sums = slot.segment.pack(sources, checksum=verify, threads=threads)
            slot.segment.finish()
            slot.ready()
            message = wire.Bucket(bucket, slot.index, slot.generation, tuple(sums))
            self.handed_over = True
            self._send(Type.BUCKET, message.encode())
            clock.lap("pack")
        while any(slot.state is memory.State.READY for slot in self._ring.slots):
            self._await_ack()
        applied = wire.Applied.decode(self._expect(Type.APPLIED).body)
        self.settled = True
        clock.lap("wait")
        return applied

    def close(self) -> None:
        """End politely: the receiver closes its handles first."""
        if self.settled:
            with contextlib.suppress(UpdateError):
                self._transaction += 1
                self._send(Type.CLOSE)
                if self._device.type == "cuda":
                    self._expect(Type.CLOSED)
        self.abandon()

    def abandon(self) -> None:
        """Drop the connection; the receiver notices at once."""
        alive = self.channel.alive()
        self.channel.close()
        if alive and self._device.type == "cuda" and not self.settled:
            # The receiver may still read: freeing now would be undefined. It is freed with the
            # process.
            _LEAKED.append(self._ring)
            return
        self._ring.close()

    def _await_ack(self) -> None:
        ack = wire.Ack.decode(self._expect(Type.ACK).body)
        self._ring.ack(ack.slot, ack.generation)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _send(self, kind: Type, body: bytes = b"", fds: Iterable[int] = ()) -> None:
        self.channel.send(Frame(kind, self._transaction, body, list(fds)), self._deadline())

    def _expect(self, kind: Type) -> Frame:
        return self._accept(self.channel.recv(self._deadline()), kind)

    def _accept(self, frame: Frame, kind: Type) -> Frame:
        return wire.accept(frame, kind, self._transaction)


_LEAKED: list[memory.Ring] = []


def _close_sessions(holder: list[Session], pid: int) -> None:
    if os.getpid() == pid:
        while holder:
            holder.pop().close()


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start


def _collect(named_tensors: NamedTensors) -> list[tuple[str, Tensor]]:
    """Names and tensors, each checked; nothing is copied."""
    if isinstance(named_tensors, Tensor | str | bytes):
        raise TypeError(
            "named_tensors must be a mapping, an iterable of (name, tensor) or a module, got "
            f"{type(named_tensors).__name__}"
        )
    out: list[tuple[str, Tensor]] = []
    seen: set[str] = set()
    for name, tensor in _pairs(named_tensors):
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"named_tensors: {name!r} is a {type(tensor).__name__}, wanted a str and a Tensor"
            )
        if name in seen:
            raise ValueError(f"named_tensors: {name!r} comes twice")
        seen.add(name)
        if hasattr(tensor, "full_tensor"):
            raise Unsupported(f"{name!r} is a DTensor: pass tensor.full_tensor()")
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            kind = "meta" if tensor.device.type == "meta" else str(tensor.layout)
            raise Unsupported(f"{name!r} is a {kind} tensor: pass a dense one with data")
        if not layouts.supported(tensor.dtype):
            raise Unsupported(f"{name!r} has dtype {tensor.dtype}, which has no code on the wire")
        out.append((name, tensor.detach()))
    return out


def _pairs(named_tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    if isinstance(named_tensors, nn.Module):
        named_tensors = named_tensors.state_dict()
    if isinstance(named_tensors, Mapping):
        yield from named_tensors.items()
        return
    for item in named_tensors:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"named_tensors must yield (name, tensor), got {item!r:.80}")
        yield item[0], item[1]


def _specs(tensors: list[tuple[str, Tensor]]) -> list[layouts.Spec]:
    """Specs with aliases: the same memory, read the same way, is sent once."""
    owners: dict[tuple, int] = {}
    specs = []
    for index, (name, tensor) in enumerate(tensors):
        shape = tuple(tensor.shape)
        key = (tensor.device, tensor.data_ptr(), shape, tensor.stride(), tensor.dtype)
        owner = owners.setdefault(key, index) if tensor.numel() else index
        specs.append(layouts.Spec(name, shape, tensor.dtype, None if owner == index else owner))
    return specs


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
