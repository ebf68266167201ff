"""Hand-over to a `Receiver` on this machine, over its socket.

hello     once; handles are opened once a session, not once a bucket
BEGIN     version, names, shapes, dtypes: judged before a byte is packed
a bucket  free slot → pack and sum (C++) → BUCKET(slot, generation, sums) → ACK frees the slot
APPLIED   the receiver's version is the new one
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import layout as layouts
from . import memory, wire
from .errors import ProtocolError, StagingError, Unsupported, UpdateError
from .packing import Plan
from .report import Clock, Outcome
from .session import Session, Target
from .staging import Staging, closed_by
from .wire import Frame, Type


@dataclass(frozen=True)
class Local(Target):
    """A `Receiver` on this machine, by the path of its socket."""

    socket_path: str | os.PathLike[str]
    direct: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        wire.check_path(self.socket_path)

    @property
    def address(self) -> str:
        return wire.check_path(self.socket_path)

    def open(self, patience: float, timeout: float) -> Session:
        return LocalSession(self.address, patience, timeout)


_MODES = {
    (True, False): "bucket",
    (False, True): "direct",
    (True, True): "direct+bucket",
    (False, False): "bucket",
}


class LocalSession:
    """A connection and the staging ring that the other side has opened."""

    jointly = False

    def __init__(self, path: str, patience: float, timeout: float):
        self._path, self._timeout = path, timeout
        self.channel = wire.connect(path, time.monotonic() + patience)
        self.settled = True  # nothing of a transaction is under way
        self.handed_over = False  # the receiver may have begun to copy
        self._staging = Staging()
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
        with contextlib.suppress(StagingError):  # tried again
            closed_by({path})  # by a session before: a receiver has one at a time

    @property
    def boot(self) -> bytes:
        return self.welcome.boot

    def alive(self) -> bool:
        return self.channel.alive()

    def holds(self, version: int) -> bool:
        return self.alive()

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
        self,
        layout: layouts.Layout,
        version: int,
        partial: bool,
        verify: wire.Verify,
        selector: str,
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

    def stage(self, plan: Plan, buffers: int) -> None:
        """Have slots that are large enough, on the right device, open on both sides."""
        need = plan.need(buffers, [self._path], [self.welcome.gpu])
        if self._staging.fits(need):
            return
        if self._staging.ring.slots:
            # The importer closes before the exporter frees.
            self._send(Type.RETIRE, wire.Retire(direct_only=False).encode())
            self._expect(Type.RETIRED)
            self._opened = []
        self._staging.build(need)
        for info, fds in self._staging.opens(self.welcome.gpu):
            self._send(Type.SEGMENT, info.encode(), fds)
            self._expect(Type.OPENED)

    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied:
        """Pack and hand over every bucket; returns when the receiver serves the new version."""
        threads = torch.get_num_threads()
        self._announce(plan.segments)
        ring = self._staging.ring
        for bucket in range(plan.layout.staged):
            slot = ring.free_slot()
            while slot is None:
                self._await_ack()
                slot = ring.free_slot()
            clock.lap("wait")
            slot.fill()
            sums = plan.start(bucket, slot.segment, verify).wait(self._timeout)
            slot.ready()
            message = wire.Bucket(bucket, slot.index, slot.generation, tuple(sums or ()))
            self.handed_over = True
            self._send(Type.BUCKET, message.encode())
            clock.lap("pack")
        for bucket in range(plan.layout.staged, len(plan.layout.buckets)):
            self._hand_over(plan, bucket, verify, threads)
            clock.lap("sum")
        while self._handed or any(s.state is memory.State.READY for s in ring.slots):
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
        if not self._staging.ring.slots or self._retiring:
            return
        self._send(Type.RETIRE, wire.Retire(direct_only=False).encode())
        self._retiring = True
        self._opened = []
        if self._staging.on_gpu:
            self._await_retired()  # the importer closes before the exporter frees
        self._leave_staging()

    def _await_retired(self) -> None:
        """The answer to `release_staging`, which an engine gives when it polls."""
        if self._retiring:
            self._expect(Type.RETIRED)
            self._retiring = False

    def close(self) -> None:
        """End politely: the receiver closes its handles first."""
        if not self.settled:
            self.abandon()
            return
        with contextlib.suppress(UpdateError):
            cuda = self._staging.on_gpu
            if cuda:
                self._await_retired()
            self._transaction += 1
            self._send(Type.CLOSE)
            if cuda:
                self._expect(Type.CLOSED)
        self.channel.close()
        self._leave_staging()

    def cancel(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Drop the connection; the receiver notices at once."""
        alive = self.channel.alive()
        self.channel.close()
        with contextlib.suppress(StagingError):  # there is a first error
            self._leave_staging(may_be_read=alive and not self.settled)

    def _leave_staging(self, *, may_be_read: bool = False) -> None:
        staging, self._staging = self._staging, Staging()
        staging.leave(self._path, may_be_read=may_be_read)

    def _await_ack(self) -> None:
        ack = wire.Ack.decode(self._expect(Type.ACK).body)
        if ack.slot < wire.MAX_SLOTS:
            self._staging.ring.ack(ack.slot, ack.generation)
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
