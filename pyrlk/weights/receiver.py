"""The engine's side: take a new version when the engine asks for it, wholly or not at all.

    poll   accept → HELLO → BEGIN: check names, shapes, dtypes, version
           per bucket: sum the mapped, read-only memory → compare → copy, summing again → ACK
           last byte → version := new → APPLIED

An update that fits into the staging ring is checked as a whole before its first byte is copied. A
larger one is copied bucket by bucket: `dirty` is True from its first byte to its last.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import layout as layouts
from . import memory, wire
from .engine import CallableEngine, Engine, LoadWeights, ModuleEngine, mismatch
from .errors import (
    ApplyFailed,
    Busy,
    EngineDirty,
    PeerLost,
    ProtocolError,
    StagingError,
    StaleVersion,
    Unsupported,
    UpdateError,
)
from .wire import Frame, Type

_PATIENCE = 1.0


class Receiver:
    """Takes weights from a `Publisher` into a model of this process.

    Weights change only inside `poll()` (or `serve()`), never behind the engine's back: an engine
    calls `poll()` between two rollouts.

    Parameters
    ----------
    model_or_load_weights : nn.Module or callable
        A module: tensors are copied into its `state_dict()`. A callable: called once a bucket with
        a list of (name, tensor); the tensors are views of read-only memory that is reused after the
        call, so copy, do not keep.
    socket_path : path
        Where to listen; its directory has mode 0700 and is made where it is missing.
    expected : mapping of name to tensor, optional
        For a callable: what names, shapes and dtypes are checked against.
    timeout : float
        Seconds that any single wait inside an update may take.

    Attributes
    ----------
    version : int
        The last fully applied version; −1 before the first.
    dirty : bool
        Part of another version has been copied: take a full update before serving.
    last_error : UpdateError or None
        Why the last update was not applied.

    Raises
    ------
    ValueError
        The path is too long, its directory is open to others, or another receiver listens there.
    """

    def __init__(
        self,
        model_or_load_weights: nn.Module | LoadWeights,
        socket_path: str | os.PathLike[str],
        *,
        expected: Mapping[str, Tensor] | None = None,
        timeout: float = 30.0,
    ):
        self._engine: Engine
        if isinstance(model_or_load_weights, nn.Module):
            if expected is not None:
                raise ValueError("expected goes with a load_weights callable; a module has names")
            self._engine = ModuleEngine(model_or_load_weights)
        elif callable(model_or_load_weights):
            if not (expected is None or isinstance(expected, Mapping)):
                raise TypeError(
                    f"expected must map names to tensors, got {type(expected).__name__}"
                )
            self._engine = CallableEngine(model_or_load_weights, expected)
        else:
            raise TypeError(
                "model_or_load_weights must be an nn.Module or a callable, got "
                f"{type(model_or_load_weights).__name__}"
            )
        self._start(wire.check_timeout(timeout))
        self._path = wire.check_path(socket_path)
        self._listener: socket.socket | None = wire.listen(self._path)

    def _start(self, timeout: float) -> None:
        self.version = -1
        self.dirty = False
        self.last_error: UpdateError | None = None
        self._timeout = timeout
        self._boot = secrets.token_bytes(16)
        self._path = ""
        self._listener = None  # until there is one; a subclass may connect by itself
        self._session: _Session | None = None
        self._stop = threading.Event()
        self._closed = False

    def poll(self, timeout: float = 0.0) -> bool:
        """Apply an update if one begins within `timeout` seconds; True if there is a new version.

        An update that has begun is carried to its end. One that fails ends the call at once and
        leaves its reason in `last_error` and, if bytes were copied, sets `dirty`.
        """
        if self._closed:
            raise ValueError("this Receiver is closed")
        end = time.monotonic() + min(timeout, wire.MAX_TIMEOUT)
        deadline = end
        while True:
            try:
                frame = self._next_frame(deadline)
                if frame is None:
                    return False
                with _owned(frame):
                    if frame.type is Type.BEGIN:
                        return self._update(frame)
                    self._greet(frame)
                # A publisher that has just said HELLO is about to begin: see its update through.
                deadline = end if self._session is None else max(end, time.monotonic() + _PATIENCE)
            except UpdateError as error:
                self._give_up(error)
                return False

    def serve(self, until: Callable[[], bool] | None = None) -> None:
        """`poll()` until `until()` is true or `stop()` is called from another thread."""
        while not self._stop.is_set() and not (until is not None and until()):
            self.poll(0.05)
        self._stop.clear()

    def stop(self) -> None:
        """End `serve()`, within 50 ms or after the update that is under way."""
        self._stop.set()

    def close(self) -> None:
        """Stop listening and unmap all staging memory; idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._listener is not None:
            self._listener.close()
            wire.unlink(self._path)

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _next_frame(self, deadline: float) -> Frame | None:
        """The next frame of the publisher; None when the deadline passes without one."""
        while self._listener is not None or self._session is not None:
            poller = select.poll()
            if self._listener is not None:
                poller.register(self._listener, select.POLLIN)
            if self._session is not None:
                for fd in self._session.channel.watched():
                    poller.register(fd, select.POLLIN)
            left = max(0.0, deadline - time.monotonic())
            ready = {fd for fd, _ in poller.poll(left * 1000)}
            if not ready:
                return None
            if self._session is not None and ready & set(self._session.channel.watched()):
                return self._session.channel.recv(0.0)
            if not self._accept():
                return None
        return None  # nobody is left to be heard

    def _accept(self) -> bool:
        """Let a publisher in, or tell it that there is one; False if that cannot be done now."""
        if self._listener is None:
            raise PeerLost("the publisher is gone")
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return True
        except OSError as full:
            # Out of descriptors: whoever knocks goes on waiting, and so does this side, a little.
            self.last_error = StagingError(f"no socket: {full.strerror} (ulimit -n)")
            time.sleep(0.01)
            return False
        channel = wire.Channel(sock)
        if self._session is not None:
            busy = Busy(f"{self._session.channel.peer} is this engine's publisher")
            with contextlib.suppress(UpdateError):
                failed = Frame(Type.FAILED, 0, wire.Failed.of(busy).encode())
                channel.send(failed, time.monotonic())
            channel.close()
            return True
        self._session = _Session(channel)
        return True

    def _greet(self, frame: Frame) -> None:
        """Answer what comes outside a transaction."""
        session = self._session
        assert session is not None
        if frame.type is Type.HELLO and frame.transaction == 0 and not session.greeted:
            wire.Hello.decode(frame.body)
            engine = self._engine
            welcome = wire.Welcome(
                self._boot, self.version, self.dirty, engine.names_from, engine.gpu()
            )
            self._send(Type.WELCOME, 0, welcome.encode())
            session.greeted = True
        elif frame.type is Type.RETIRE and session.greeted:
            session.retire(wire.Retire.decode(frame.body))
            self._send(Type.RETIRED, frame.transaction)
        elif frame.type is Type.CLOSE:
            session.close_segments()
            with contextlib.suppress(UpdateError):  # a publisher need not wait for the answer
                self._send(Type.CLOSED, frame.transaction)
            self._drop(None)
        else:
            raise ProtocolError(f"{frame.type.name} outside an update")

    def _update(self, frame: Frame) -> bool:
        session = self._session
        assert session is not None
        transaction = frame.transaction
        try:
            if not session.greeted or transaction <= session.transaction:
                raise ProtocolError(f"BEGIN of transaction {transaction} out of order")
            session.transaction = transaction
            begin = wire.Begin.decode(frame.body)
            layout = session.manifest(begin, frame.fds)
            self._check(begin, layout)
        except ProtocolError:
            raise
        except UpdateError as error:
            # Refused as a whole; the publisher may try another update on this connection.
            self.last_error = error
            session.forget_manifest()
            self._send(Type.FAILED, transaction, wire.Failed.of(error).encode())
            return False
        try:
            self._send(Type.CHECKED, transaction)
            seconds = self._receive(session, begin, layout)
        except UpdateError as error:
            error.dirty = self.dirty
            raise
        except Exception as error:
            raise ApplyFailed(f"{type(error).__name__}: {error}", dirty=self.dirty) from error
        finally:
            self._engine.release()
        # The one line that makes the new version visible.
        self.version, self.dirty, self.last_error = begin.version, False, None
        try:
            self._send(Type.APPLIED, transaction, wire.Applied(begin.version, *seconds).encode())
        except UpdateError as error:
            self._drop(error)  # the publisher left before it heard, but the version stands
        return True

    def _check(self, begin: wire.Begin, layout: layouts.Layout) -> None:
        if begin.version <= self.version:
            raise StaleVersion(
                f"version {begin.version} is not above {self.version}, which the engine serves"
            )
        if begin.partial and self.dirty:
            raise EngineDirty(
                "an update broke off in this engine and left parts of two versions: send a full "
                "update before a partial one"
            )
        if begin.verify is wire.Verify.ENGINE and not self._engine.reads_back:
            raise Unsupported(
                'verify="engine": this receiver has a load_weights, which hides where it puts its '
                'tensors; use verify="copy", or give the Receiver the module'
            )
        self._engine.check(layout, begin.partial)

    def _receive(
        self, session: _Session, begin: wire.Begin, layout: layouts.Layout
    ) -> tuple[float, float]:
        """Take all buckets; returns the seconds spent on sums and on copies."""
        threads = torch.get_num_threads()
        verify_seconds = copy_seconds = 0.0
        waiting: list[tuple[wire.Bucket, memory.Segment]] = []
        sums: list[tuple[int, ...]] = []
        for number in range(len(layout.buckets)):
            bucket = self._next_bucket(session)
            segment = session.take(bucket, number, layout, bool(begin.verify))
            start = time.perf_counter()
            # A direct bucket is the trainer's memory itself: nothing lies in between, and what goes
            # into the engine is summed on the way.
            if begin.verify and not (layout.segments[number] and self._engine.sums_copies):
                self._verify(segment, layout, bucket, threads)
            verify_seconds += time.perf_counter() - start
            waiting.append((bucket, segment))
            sums.append(bucket.sums)
            # All or nothing where the ring holds everything; else a slot must come free.
            if layout.staged <= len(session.segments) and number + 1 < layout.staged:
                continue
            start = time.perf_counter()
            for ready, memory_of in waiting:
                self.dirty = True
                self._engine.apply(memory_of, ready.bucket, ready.sums, threads)
                ack = wire.Ack(ready.bucket, ready.slot, ready.generation)
                self._send(Type.ACK, session.transaction, ack.encode())
            waiting.clear()
            copy_seconds += time.perf_counter() - start
        if begin.verify is wire.Verify.ENGINE:
            start = time.perf_counter()
            self._engine.read_back(sums, threads)
            verify_seconds += time.perf_counter() - start
        # torch may free a GPU's memory as soon as the trainer goes on.
        session.close_direct(memory.Kind.CUDA)
        return verify_seconds, copy_seconds

    def _verify(
        self, segment: memory.Segment, layout: layouts.Layout, bucket: wire.Bucket, threads: int
    ) -> None:
        """Sum what arrived, before any of it is copied."""
        verify(segment, layout, bucket, layout.pieces[bucket.bucket], threads)

    def _next_bucket(self, session: _Session) -> wire.Bucket:
        """The next BUCKET; segments that are announced on the way are opened."""
        while True:
            frame = session.channel.recv(time.monotonic() + self._timeout)
            with _owned(frame):
                if frame.transaction != session.transaction:
                    raise ProtocolError(f"{frame.type.name} of another transaction")
                if frame.type is Type.BUCKET:
                    return wire.Bucket.decode(frame.body)
                if frame.type is Type.RETIRE:
                    session.retire(wire.Retire.decode(frame.body))
                    self._send(Type.RETIRED, session.transaction)
                elif frame.type is Type.SEGMENT:
                    index = session.open(wire.SegmentInfo.decode(frame.body), frame.fds)
                    self._send(Type.OPENED, session.transaction, wire.Opened(index).encode())
                else:
                    raise ProtocolError(f"{frame.type.name} inside an update")

    def _send(self, kind: Type, transaction: int, body: bytes = b"") -> None:
        assert self._session is not None
        frame = Frame(kind, transaction, body)
        self._session.channel.send(frame, time.monotonic() + self._timeout)

    def _give_up(self, error: UpdateError) -> None:
        """Tell the publisher why, if it is there, and drop it."""
        session = self._session
        if session is not None and not isinstance(error, PeerLost):
            failed = Frame(Type.FAILED, session.transaction, wire.Failed.of(error).encode())
            with contextlib.suppress(UpdateError):  # the first error is the one to keep
                session.channel.send(failed, time.monotonic())
        self._drop(error)

    def _drop(self, error: UpdateError | None) -> None:
        if error is not None:
            self.last_error = error
        if self._session is not None:
            self._session.close()
            self._session = None


class _Session:
    """One publisher: its connection, its open segments, its last manifest."""

    def __init__(self, channel: wire.Channel):
        self.channel = channel
        self.greeted = False
        self.transaction = 0
        self.segments: list[memory.Segment] = []
        self.direct: list[memory.Segment] = []  # the trainer's own
        self._generations: dict[int, int] = {}  # by number
        self._manifest: tuple[bytes, layouts.Layout] | None = None

    def manifest(self, begin: wire.Begin, fds: list[int]) -> layouts.Layout:
        """The layout that a BEGIN names, read only when its digest is new."""
        if begin.manifest_bytes == 0 and not fds:
            if self._manifest is None or self._manifest[0] != begin.digest:
                raise ProtocolError("BEGIN without a manifest")
            return self._manifest[1]
        if len(fds) != 1:
            raise ProtocolError("BEGIN with a manifest comes with one descriptor")
        layout = layouts.decode(wire.read_manifest(fds[0], begin.manifest_bytes))
        if layout.digest != begin.digest:
            raise ProtocolError("manifest: wrong digest")
        self._manifest = begin.digest, layout
        return layout

    def forget_manifest(self) -> None:
        self._manifest = None

    def open(self, info: wire.SegmentInfo, fds: list[int]) -> int:
        segments, first = self._row(info.index)
        if info.index - first != len(segments):
            raise ProtocolError(f"SEGMENT {info.index}, wanted {first + len(segments)}")
        if any(one.handle.id == info.handle.id for one in (*self.segments, *self.direct)):
            raise ProtocolError("SEGMENT opened twice")
        segments.append(memory.open_segment(info.handle, fds))
        self._generations[info.index] = 0
        return info.index

    def _row(self, index: int) -> tuple[list[memory.Segment], int]:
        """The list that a segment number belongs to, and the number of its first."""
        if index < wire.MAX_SLOTS:
            return self.segments, 0
        return self.direct, wire.MAX_SLOTS

    def take(
        self, bucket: wire.Bucket, number: int, layout: layouts.Layout, verify: bool
    ) -> memory.Segment:
        """The segment of a bucket, after every number in the message has been checked."""
        wanted_sums = len(layout.pieces[number]) if verify else 0
        segments, first = self._row(bucket.slot)
        own = layout.segments[number]
        if (
            bucket.bucket != number
            or bucket.slot - first >= len(segments)
            or (bucket.slot != wire.MAX_SLOTS + own - 1 if own else bucket.slot >= wire.MAX_SLOTS)
            or bucket.generation <= self._generations[bucket.slot]
            or len(bucket.sums) != wanted_sums
            or layout.buckets[number] > segments[bucket.slot - first].nbytes
        ):
            raise ProtocolError(
                f"BUCKET {bucket.bucket} (wanted {number}), slot {bucket.slot}, generation "
                f"{bucket.generation}, {len(bucket.sums)} sums (wanted {wanted_sums})"
            )
        self._generations[bucket.slot] = bucket.generation
        return segments[bucket.slot - first]

    def retire(self, what: wire.Retire) -> None:
        if what.direct_only:
            self.close_direct()
        else:
            self.close_segments()

    def close_segments(self) -> None:
        self._generations.clear()
        try:
            memory.close_all(self.segments)
        finally:
            self.close_direct()

    def close_direct(self, kind: memory.Kind | None = None) -> None:
        """All of the trainer's own segments, or none if the first is of another kind."""
        if self.direct and kind in (None, self.direct[0].handle.kind):
            memory.close_all(self.direct)

    def close(self) -> None:
        with contextlib.suppress(StagingError):  # nobody is left to be told
            self.close_segments()
        self.channel.close()


class _owned:
    """Closes the descriptors of a frame when its handling ends."""

    def __init__(self, frame: Frame):
        self._frame = frame

    def __enter__(self) -> Frame:
        return self._frame

    def __exit__(self, *exc: object) -> None:
        self._frame.close_fds()


def verify(
    segment: memory.Segment,
    layout: layouts.Layout,
    bucket: wire.Bucket,
    indices: Sequence[int],
    threads: int,
) -> None:
    """Compare the sums of some entries of a bucket with those that were sent."""
    if not indices:
        return
    sent = dict(zip(layout.pieces[bucket.bucket], bucket.sums, strict=True))
    pieces = [layout.entries[i] for i in indices]
    ranges = array("Q", [number for e in pieces for number in (e.offset, e.nbytes)])
    if len(pieces) == len(sent):
        ranges = layout.ranges[bucket.bucket]
    sums = segment.sums(ranges, threads=threads)
    for index, entry, got in zip(indices, pieces, sums, strict=True):
        if sent[index] != got:
            raise mismatch(entry, sent[index], got, "arrived")
