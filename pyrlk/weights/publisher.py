"""The trainer's side: plan → pack into staging → hand over by handle → wait until it is applied.

connect   once; handles are opened once a session, not once a bucket
check     version, names, shapes, dtypes: before a byte is packed
per bucket: free slot → pack and sum (C++) → BUCKET(slot, generation, sums) → ACK frees the slot
APPLIED   the receiver's version is the new one
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from . import gather, memory, wire
from . import layout as layouts
from .errors import (
    EngineDirty,
    PeerLost,
    ProtocolError,
    StaleVersion,
    Timeout,
    Unsupported,
    UpdateError,
)
from .source import ModuleState, NamedTensors, Source
from .wire import Frame, Type

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
    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied: ...
    def outcome(self, layout: layouts.Layout) -> Outcome: ...
    def release_staging(self) -> None: ...  # between updates
    def close(self) -> None: ...  # politely
    def abandon(self) -> None: ...  # at once


class Target(abc.ABC):
    """Where weights go."""

    direct = False  # can read the trainer's own memory

    @abc.abstractmethod
    def open(self, patience: float, timeout: float) -> Session:
        """Connect, waiting up to `patience` seconds for an engine that is still starting."""


@dataclass(frozen=True)
class Local(Target):
    """A `Receiver` on this machine, by the path of its socket."""

    socket_path: str | os.PathLike[str]
    direct: ClassVar[bool] = True  # type: ignore[misc]

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
    mode : "bucket": packed into staging buckets; "plan": and replayed by SGLang's loader;
        "direct": read from the trainer's own memory, nothing packed; "direct+bucket": some of it
    names_from : what names were checked against: "module", "expected", "expect", "checkpoint",
        "engine" or "unchecked"
    engines : with a list of targets, what became of each; the figures above are of the first that
        has the new version
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
    engines: list[EngineReport] = field(default_factory=list)

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
            *(
                (str(e.target), "updated" if e.error is None else repr(e.error))
                for e in self.engines
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@dataclass
class EngineReport:
    """One of several engines: `report` if it has the new version, else `error` says why not."""

    target: Target
    report: UpdateReport | None = None
    error: UpdateError | None = None


class Publisher:
    """Hands the trainer's weights to its engines, one version at a time.

    Parameters
    ----------
    target : Local, SGLang, or a list of them
        The engine, or several.
    group : None
        One process publishes: gather sharded tensors first.
    bucket_bytes : int
        Largest staging bucket; a larger tensor gets a bucket of its own.
    buffers : int
        Staging buckets in flight. An update of at most this many buckets is all or nothing.
    verify : {"copy", "off"}
        "copy": a 64-bit sum of every tensor is made while packing, checked by the receiver before
        it copies, and again over what it copied. "off": neither.
    timeout : float
        Seconds that any single wait may take.
    on_failure : {"isolate", "all"}
        Of several engines one fails. "isolate": the others are updated, `report.engines` tells, and
        only if all fail the first error is raised. "all": no engine is updated unless every one
        accepts, and the first error is raised; an engine that has the version by then keeps it.

    Notes
    -----
    A context manager; `close()` releases the staging memory. Not for use in a forked child.
    """

    def __init__(
        self,
        target: Target | Sequence[Target],
        *,
        group: None = None,
        bucket_bytes: int = 512 << 20,
        buffers: int = 2,
        verify: str = "copy",
        timeout: float = 30.0,
        on_failure: str = "isolate",
    ):
        targets: list[Any] = list(target) if isinstance(target, list | tuple) else [target]
        for one in targets:
            if not isinstance(one, Target):
                raise TypeError(
                    "target must be weights.Local or weights.SGLang, or a list of them, got "
                    f"{type(one).__name__}"
                )
        if not targets or len(set(map(repr, targets))) != len(targets):
            raise ValueError("target: a list must not be empty and not name an engine twice")
        if group is not None:
            raise Unsupported("group: one process publishes; gather sharded tensors to it first")
        if on_failure not in ("isolate", "all"):
            raise ValueError(f'on_failure must be "isolate" or "all", got {on_failure!r}')
        _check_int("bucket_bytes", bucket_bytes, 1, 1 << 46)
        _check_int("buffers", buffers, 1, wire.MAX_SLOTS)
        if verify not in ("copy", "off"):
            raise ValueError(f'verify must be "copy" or "off", got {verify!r}')
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self._bucket_bytes = bucket_bytes
        self._buffers = buffers
        self._verify = verify == "copy"
        self._timeout = float(timeout)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._plan: Plan | None = None  # of the last update
        self._module: gather.Checkpoint | ModuleState | None = None
        self._last: _Last | None = None
        self._direct = all(one.direct for one in targets)
        self._several = isinstance(target, list | tuple)
        self._all_or_none = on_failure == "all"
        self._engines = [_Engine(one, self._timeout) for one in targets]
        self._finalizer = weakref.finalize(self, _close_sessions, self._engines, self._pid)

    @torch.no_grad()
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
            A module stands for its `state_dict()`, a transformers model for `gather.hf(module)`:
            the names of its checkpoint. Tensors that share memory are sent once.
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
            plan = self._plan_of(named_tensors)
            clock.lap("plan")
            order = _Order(version, partial, self._verify, selector, self._buffers)
            source = self._remembered(named_tensors)
            try:
                report = self._publish(self._engines, plan, order, clock)
            finally:
                plan.forget_tensors()
            self._last = _Last(order, source)
            return report

    @torch.no_grad()
    def ensure(self, version: int) -> UpdateReport | None:
        """Bring engines that missed the last update, or were restarted since, up to it.

        Parameters
        ----------
        version : int
            Of the last update; the weights must not have changed since. That update was a full one,
            and its module or tensors are still there.

        Returns
        -------
        UpdateReport or None
            None where every engine has the version.

        Raises
        ------
        ValueError
            Another version, or tensors that are gone.
        StaleVersion
            The weights have changed since `version`: send them under a new one. Found by the sums
            of the packed tensors, before they are handed over (not with verify="off").
        UpdateError
            As `update`.
        """
        _check_int("version", version, 0, 1 << 62)
        with self._lock:
            self._check_usable()
            last = self._last
            if last is None or last.order.version != version:
                known = "none" if last is None else str(last.order.version)
                raise ValueError(
                    f"version must be that of the last update ({known}), got {version}"
                )
            late = [engine for engine in self._engines if not engine.has(version)]
            if not late:
                return None
            if last.order.partial:
                raise EngineDirty(f"version {version} was partial: send a full update")
            clock = Clock()
            plan = self._plan_of(last.source())
            clock.lap("plan")
            plan.same_sums = True
            try:
                return self._publish(late, plan, last.order, clock)
            finally:
                plan.same_sums = False
                plan.forget_tensors()

    def release_staging(self) -> None:
        """Give the staging memory back until the next update, which allocates it anew.

        An engine unmaps its side when it polls next.
        """
        with self._lock:
            self._check_usable()
            for engine in self._engines:
                if engine.session is not None and engine.session.alive():
                    engine.session.release_staging()

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

    def _plan_of(self, named_tensors: NamedTensors) -> Plan:
        if isinstance(named_tensors, nn.Module):
            if self._module is None or not self._module.of(named_tensors):
                known = gather.is_hf(named_tensors)
                self._module = (gather.Checkpoint if known else ModuleState)(named_tensors)
            named_tensors = self._module.tensors()
        source = Source(named_tensors)
        exports = source.exports() if self._direct else []
        plan = self._plan
        if plan is not None and source.fits(plan.source) and exports == plan.exports:
            plan.take(source)
        else:
            self._plan = None  # an error below must not leave the old one
            self._plan = plan = Plan(source, self._bucket_bytes, exports)
        return plan

    def _publish(
        self, engines: list[_Engine], plan: Plan, order: _Order, clock: Clock
    ) -> UpdateReport:
        """Carry an order out on each engine."""
        entries = [EngineReport(engine.target) for engine in engines]
        begun: list[_Engine] = []
        try:
            if self._all_or_none:
                for engine in engines:
                    begun.append(engine)
                    engine.begin(plan, order, clock)
            for engine, entry in zip(engines, entries, strict=True):
                own = clock.copy()
                try:
                    if not self._all_or_none:
                        engine.begin(plan, order, own)
                    entry.report = engine.send(plan, order, own)
                except UpdateError as error:
                    if self._all_or_none or not self._several:
                        raise
                    entry.error = error
        except BaseException:
            for engine in begun:
                engine.cancel()
            raise
        done = [entry.report for entry in entries if entry.report is not None]
        if not done:
            raise next(entry.error for entry in entries if entry.error is not None)
        return dataclasses.replace(done[0], engines=entries) if self._several else done[0]

    def _remembered(self, named_tensors: NamedTensors) -> Callable[[], NamedTensors]:
        """Where `ensure` finds the tensors of an update; nothing is kept alive for it."""
        if isinstance(named_tensors, nn.Module):
            module = weakref.ref(named_tensors)
            return lambda: _still_there(module())
        assert self._plan is not None
        names = self._plan.source.names
        references = list(map(weakref.ref, self._plan.source.tensors))
        return lambda: [(n, _still_there(r())) for n, r in zip(names, references, strict=True)]


@dataclass(frozen=True)
class _Order:
    """What an update asks of every engine."""

    version: int
    partial: bool
    verify: bool
    selector: str
    buffers: int


@dataclass(frozen=True)
class _Last:
    """The last update, for `ensure`."""

    order: _Order
    source: Callable[[], NamedTensors]


def _still_there(thing: Any) -> Any:
    if thing is None:
        raise ValueError("version: its tensors are gone; call update with the weights")
    return thing


class _Engine:
    """One target: its session, and what was last published to it."""

    def __init__(self, target: Target, timeout: float):
        self.target = target
        self.session: Session | None = None
        self._timeout = timeout
        self._boot: bytes | None = None  # of the engine that took our last update
        self._version = -1

    def begin(self, plan: Plan, order: _Order, clock: Clock) -> None:
        """Connect, let the engine judge the update, and have staging memory ready."""
        session = self._connected()
        clock.lap("connect")
        if order.partial and self._boot not in (None, session.boot):
            raise EngineDirty(
                "the engine was restarted and has lost its version: send a full update first"
            )
        with self._dropping(session):
            session.begin(plan.layout, order.version, order.partial, order.verify, order.selector)
            clock.lap("check")
            session.stage(plan.layout, plan.device, order.buffers)
            clock.lap("stage")

    def send(self, plan: Plan, order: _Order, clock: Clock) -> UpdateReport:
        session = self.session
        assert session is not None  # begin() comes first
        with self._dropping(session):
            applied = session.send(plan, order.verify, clock)
        self._boot, self._version = session.boot, order.version
        outcome = session.outcome(plan.layout)
        clock.seconds["verify"] = applied.verify_seconds
        clock.seconds["copy"] = applied.copy_seconds
        clock.seconds["total"] = clock.total()
        return UpdateReport(
            version=order.version,
            tensors=outcome.tensors,
            planned=outcome.planned,
            fallback=outcome.fallback,
            bytes=plan.layout.nbytes,
            buckets=len(plan.layout.buckets),
            seconds=clock.seconds,
            mode=outcome.mode,
            names_from=outcome.names_from,
        )

    def cancel(self) -> None:
        """Leave an update that was begun and not sent: the engine goes on as it was."""
        if self.session is not None and not self.session.settled:
            self._drop(self.session)

    def has(self, version: int) -> bool:
        """Whether the engine took that version from us and still runs."""
        if self.session is None or not self.session.alive() or self._version != version:
            return False
        return self.session.boot == self._boot

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None

    @contextlib.contextmanager
    def _dropping(self, session: Session) -> Iterator[None]:
        """An error inside a transaction ends the session."""
        try:
            yield
        except BaseException as error:
            if not session.settled:
                self._drop(session)
            if isinstance(error, PeerLost | Timeout):
                error.dirty = session.handed_over  # nobody is left to ask
            raise

    def _connected(self) -> Session:
        if self.session is not None and not self.session.alive():
            self._drop(self.session)
        if self.session is None:
            # A first engine may still be starting; one that was here and is gone is an error now.
            patience = self._timeout if self._boot is None else 0.0
            self.session = self.target.open(patience, self._timeout)
        return self.session

    def _drop(self, session: Session) -> None:
        self.session = None
        session.abandon()


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


_MODES = {
    (True, False): "bucket",
    (False, True): "direct",
    (True, True): "direct+bucket",
    (False, False): "bucket",
}


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
        self._opened: list[bytes] = []  # the trainer's own segments, as the receiver has them
        self._handed: dict[int, int] = {}  # of those, generation by number, not acknowledged yet
        self._generation = 0
        self._retiring = False  # RETIRE was sent, RETIRED has not come yet
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
            mode=_MODES[bool(layout.staged), layout.staged < len(layout.buckets)],
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
        self._await_retired()
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
        wanted = min(buffers, layout.staged)
        slots = self._ring.slots
        large = all(slot.segment.nbytes >= layout.slot_bytes for slot in slots)
        if len(slots) >= wanted and large and (device == self._device or not wanted):
            return
        nbytes = max([layout.slot_bytes, *(slot.segment.nbytes for slot in slots)])
        if slots:
            # The importer closes before the exporter frees.
            self._send(Type.RETIRE, wire.Retire(direct_only=False).encode())
            self._expect(Type.RETIRED)
            self._ring.close()
            self._opened = []
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

    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied:
        """Pack and hand over every bucket; returns when the receiver serves the new version."""
        threads = torch.get_num_threads()
        self._announce(plan.segments)
        for bucket, copies in enumerate(plan.copies):
            slot = self._ring.free_slot()
            while slot is None:
                self._await_ack()
                slot = self._ring.free_slot()
            clock.lap("wait")
            slot.fill()
            sums = slot.segment.pack(copies, checksum=verify, threads=threads)
            slot.segment.finish()
            plan.note_sums(bucket, sums)
            slot.ready()
            message = wire.Bucket(bucket, slot.index, slot.generation, tuple(sums))
            self.handed_over = True
            self._send(Type.BUCKET, message.encode())
            clock.lap("pack")
        for bucket in range(plan.layout.staged, len(plan.layout.buckets)):
            self._hand_over(plan, bucket, verify, threads)
            clock.lap("sum")
        while self._handed or any(s.state is memory.State.READY for s in self._ring.slots):
            self._await_ack()
        applied = wire.Applied.decode(self._expect(Type.APPLIED).body)
        self.settled = True
        clock.lap("wait")
        return applied

    def _announce(self, segments: list[memory.Segment]) -> None:
        """Have the trainer's own segments open on the other side, and no others."""
        wanted = [segment.handle.id for segment in segments]
        if wanted == self._opened:
            return
        if self._opened:
            self._send(Type.RETIRE, wire.Retire(direct_only=True).encode())
            self._expect(Type.RETIRED)
        self._opened = []
        for number, segment in enumerate(segments):
            info = wire.SegmentInfo(wire.MAX_SLOTS + number, segment.handle)
            fds = [] if segment.fd is None else [segment.fd]
            self._send(Type.SEGMENT, info.encode(), fds)
            self._expect(Type.OPENED)
        # The receiver closes memory of a GPU at the end of each update.
        cuda = any(segment.handle.kind is memory.Kind.CUDA for segment in segments)
        self._opened = [] if cuda else wanted

    def _hand_over(self, plan: Plan, bucket: int, verify: bool, threads: int) -> None:
        """A bucket that lies in the trainer's own memory: the engine copies from there."""
        number = plan.layout.segments[bucket] - 1
        segment = plan.segments[number]
        sums = segment.sums(plan.layout.ranges[bucket], threads=threads) if verify else []
        segment.finish()
        plan.note_sums(bucket, sums)
        self._generation += 1
        slot = wire.MAX_SLOTS + number
        while slot in self._handed:  # another bucket of the same segment
            self._await_ack()
        self._handed[slot] = self._generation
        self.handed_over = True
        message = wire.Bucket(bucket, slot, self._generation, tuple(sums))
        self._send(Type.BUCKET, message.encode())

    def release_staging(self) -> None:
        if not self._ring.slots or self._retiring:
            return
        self._send(Type.RETIRE, wire.Retire(direct_only=False).encode())
        self._retiring = True
        self._opened = []
        if self._device.type == "cuda":
            self._await_retired()  # the importer closes before the exporter frees
        self._ring.close()
        self._ring = memory.Ring([])

    def _await_retired(self) -> None:
        """The answer to `release_staging`, which an engine gives when it polls."""
        if self._retiring:
            self._expect(Type.RETIRED)
            self._retiring = False

    def close(self) -> None:
        """End politely: the receiver closes its handles first."""
        if self.settled:
            with contextlib.suppress(UpdateError):
                cuda = self._device.type == "cuda"
                if cuda:
                    self._await_retired()
                self._transaction += 1
                self._send(Type.CLOSE)
                if cuda:
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
        if ack.slot < wire.MAX_SLOTS:
            self._ring.ack(ack.slot, ack.generation)
        elif self._handed.pop(ack.slot, None) != ack.generation:
            raise ProtocolError(f"acknowledged segment {ack.slot}: never sent")

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _send(self, kind: Type, body: bytes = b"", fds: Iterable[int] = ()) -> None:
        self.channel.send(Frame(kind, self._transaction, body, list(fds)), self._deadline())

    def _expect(self, kind: Type) -> Frame:
        return self._accept(self.channel.recv(self._deadline()), kind)

    def _accept(self, frame: Frame, kind: Type) -> Frame:
        return wire.accept(frame, kind, self._transaction)


_LEAKED: list[memory.Ring] = []


def _close_sessions(engines: list[_Engine], pid: int) -> None:
    if os.getpid() == pid:
        for engine in engines:
            engine.close()


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

    def copy(self) -> Clock:
        """With the same past: what follows is one engine's own."""
        other = Clock()
        other._start, other._last = self._start, self._last
        other.seconds = dict(self.seconds)
        return other


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
