"""Plan mode: one request wakes our loader in every worker; bytes and answers take our own socket.

    POST /update_weights_from_tensor (control payload)  ──▶  load() in each rank
    ATTACH of all ranks → BEGIN → CHECKED of all
    per bucket: pack once → BUCKET → ACK of all
    APPLIED of all

No rank copies a byte before every rank has said CHECKED. The staging ring is the one of `Local`; a
slot is free again when the last rank has read it. A rank is one process, whatever models it runs:
those of a speculating server are counted once, by a request that only asks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import layout as layouts
from . import manifest, memory, sglang_payload, wire
from .errors import (
    ApplyFailed,
    MissingName,
    PeerLost,
    ProtocolError,
    StagingError,
    Timeout,
    Unsupported,
    UpdateError,
)
from .packing import Plan
from .report import Clock, Outcome
from .sglang_hand_over import HandOver
from .sglang_loader import Payload
from .sglang_server import LOADER, Info, Server
from .sglang_session import ServerSession, Settings
from .staging import Staging, closed_by
from .wire import Frame, Type


class PlanSession(ServerSession):
    """The loader in each worker, through a socket of ours."""

    mode = "plan"
    jointly = True
    engine_checks = True

    def __init__(self, settings: Settings, server: Server, info: Info, timeout: float):
        super().__init__(settings, server, info)
        # The loader runs on the scheduler's thread: its waits end before the server's watchdog.
        # They are longer than ours: it may wait while another engine of the update is given up.
        self.timeout = min(timeout, 0.4 * info.watchdog)
        self._patience = min(4 * self.timeout, 0.8 * info.watchdog)
        self._folder = tempfile.mkdtemp(prefix="pyrlk-")
        self._path = os.path.join(self._folder, "plan.sock")
        self._listener = wire.listen(self._path)
        self._links: list[_Link] = []
        self._post: _Post | None = None
        self.staging = Staging()
        self.buffers = 0
        self._reading: dict[int, tuple[int, set[_Link]]] = {}  # by slot: generation, who still does
        self._transaction = 0
        self._runners: dict[str, int] = {}  # models in a process, by selector

    def _opened(
        self, layout: layouts.Layout, version: int, partial: bool, verify: wire.Verify
    ) -> None:
        """Wake the loaders and let each rank judge the manifest."""
        self._transaction += 1
        try:
            if self._selector not in self._runners:
                self._runners[self._selector] = self._count_runners()
            nonce = self._request(self._runners[self._selector])
            self._gather(nonce)
            # What the engine holds is asked over HTTP.
            verify = min(verify, wire.Verify.COPY)
            begin = wire.Begin(version, partial, verify, layout.digest, 0)
            for link in self._links:
                link.begin(begin, layout, self._transaction, self._deadline())
            self._collect(Type.CHECKED)
            self._judge(layout, partial)
        except BaseException:
            self._hang_up()
            raise

    def stage(self, plan: Plan, buffers: int) -> None:
        """The ring is one of all engines of an update; see `HandOver`."""
        self.buffers = buffers

    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied:
        (result,) = self.send_all([self], plan, verify, False, clock)
        if isinstance(result, UpdateError):
            raise result
        return result

    @staticmethod
    def send_all(
        sessions: list[PlanSession], plan: Plan, verify: bool, isolate: bool, clock: Clock
    ) -> list[wire.Applied | UpdateError]:
        """Hand every bucket to all engines at once; what became of each."""
        return HandOver(sessions, plan, isolate).run(verify, clock)

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def gpus(self) -> set[bytes]:
        """Those of its processes."""
        return {link.gpu for link in self._links}

    def retire(self) -> None:
        """Have the ranks close the ring: the importers, before the exporter frees."""
        for link in self._links:
            link.retire(self._transaction, self._deadline())

    def open(self, staging: Staging) -> None:
        """Have the ranks open the slots that they have not open yet."""
        if staging is not self.staging:
            self.retire()
            self.staging = staging
        for link in self._links:
            link.open(staging, self._transaction, self._deadline())

    def announce(self, message: wire.Bucket) -> None:
        """A bucket lies in its slot."""
        body = message.encode()
        self._reading[message.slot] = message.generation, set(self._links)
        self.handed_over = True
        for link in self._links:
            self._send(link, Type.BUCKET, body)

    def await_reads(self, slot: int, deadline: float) -> None:
        """Wait until every rank has read the slot."""
        while self._reading[slot][1]:
            for link in self._ready(self._links, deadline, "ACK"):
                if link is not None:
                    self._take(link, link.channel.recv(0.0), None)

    def await_applied(self) -> None:
        """Wait until every rank has all buckets, and SGLang has answered."""
        self._collect(Type.APPLIED)
        assert self._post is not None
        self._post.join(self.timeout)

    def finish(self, plan: Plan) -> wire.Applied:
        self._finish(plan)
        applied = [link.applied for link in self._links if link.applied is not None]
        return wire.Applied(
            self._version,
            max((a.verify_seconds for a in applied), default=0.0),
            max((a.copy_seconds for a in applied), default=0.0),
        )

    def give_up(self, error: UpdateError) -> UpdateError:
        self._hang_up()  # before anything is taken back: the loaders must return
        return super().give_up(error)

    def outcome(self, layout: layouts.Layout) -> Outcome:
        assert self._sent is not None
        names = [entry.name for entry in self._sent[1].entries]
        fallback: dict[str, str] = {}
        for link in self._links:
            for name, code in zip(names, link.status, strict=False):
                if code >= wire.Status.FALLBACK:
                    reason = link.reasons.get(code, "load_weights")
                    fallback.setdefault(name, reason)
        return Outcome(
            mode=self.mode,
            names_from=self._names().source,
            tensors=len(names),
            planned=len(names) - len(fallback),
            fallback=fallback,
        )

    def release_staging(self) -> None:
        """The loaders listen only while SGLang calls them: have them called, for no update."""
        if not any(link.opened and link.channel.alive() for link in self._links):
            self._hang_up()
            return
        version = self._server.version()
        self.settled = self.handed_over = self._begun = False
        with self._undoing(version):
            try:
                self._enter("in_place", recover=False)
                self._transaction += 1
                self._gather(self._request(self._runners[self._selector]))
                self.retire()
                self._dismiss()
                self._leave_staging(may_be_read=False)
            except BaseException:
                self._hang_up()
                raise
            self._leave(version)

    def _dismiss(self) -> None:
        """The loaders return, and come anew with the next update."""
        for link in self._links:
            self._send(link, Type.CLOSE)
        self._collect(Type.CLOSED)
        assert self._post is not None
        self._post.join(self.timeout)
        self._post = None
        while self._links:
            self._links.pop().channel.close()

    def cancel(self) -> None:
        self._hang_up()
        super().cancel()

    def abandon(self) -> None:
        self._hang_up()
        self._listener.close()
        with contextlib.suppress(OSError):
            wire.unlink(self._path)
            os.rmdir(self._folder)
        super().abandon()

    def _restarted(self, info: Info) -> None:
        super()._restarted(info)
        self._runners.clear()
        self._hang_up()

    def _request(self, runners: int) -> bytes:
        """Have SGLang call load() everywhere; returns the nonce that the calls name."""
        nonce = secrets.token_bytes(16)
        payloads = [
            Payload(rank, runners, self._patience, nonce, self._path).encode()
            for rank in range(self._info.tp_size)
        ]
        encoded = list(map(sglang_payload.control_payload, payloads))
        self._post = _Post(self._server, encoded, self._selector, self._info.watchdog)
        return nonce

    def _count_runners(self) -> int:
        """How many models the selector means in each process."""
        if not self._info.drafts:
            return 1
        nonce = self._request(runners=0)
        assert self._post is not None
        calls: Counter[int] = Counter()
        deadline = self._deadline()
        while True:
            poller = select.poll()
            poller.register(self._listener, select.POLLIN)
            poller.register(self._post.done, select.POLLIN)
            left = deadline - time.monotonic()
            ready = {fd for fd, _ in poller.poll(max(0.0, left) * 1000)}
            if not ready:
                raise Timeout(f"{self._server.url}: no answer within {self.timeout:g} s")
            if self._listener.fileno() not in ready:
                break  # the request has ended, and nobody is left to be let in
            sock, _ = self._listener.accept()
            channel = wire.Channel(sock)
            try:
                frame = wire.accept(channel.recv(deadline), Type.ATTACH, 0)
            finally:
                channel.close()
            attach = wire.Attach.decode(frame.body)
            if attach.nonce == nonce:
                calls[attach.rank] += 1
        self._post.join(self.timeout)
        self._post = None
        counts = {calls[rank] for rank in range(self._info.tp_size)}
        count, rest = divmod(max(counts), self._info.pp_size)
        if max(counts) == 0:
            raise ApplyFailed(self._unheard("ATTACH"))
        if len(counts) > 1 or rest:
            raise Unsupported(
                f"{self._server.url}: its processes run different numbers of models "
                f'({dict(calls)} calls a rank): use mode="bucket"'
            )
        return count

    def _unheard(self, what: str) -> str:
        return (
            f"{self._server.url} answered, but {LOADER} was not heard of: {what} is missing. "
            "Is this the machine, the user and the mount namespace of the server?"
        )

    def _gather(self, nonce: bytes) -> None:
        """ATTACH of every rank, on a kept connection or a new one."""
        waiting = list(self._links)
        attached: list[_Link] = []
        wanted = self._info.tp_size * self._info.pp_size
        deadline = self._deadline()
        while len(attached) < wanted:
            for link in self._ready(waiting, deadline, f"{len(attached)} of {wanted} ranks"):
                if link is None:
                    sock, _ = self._listener.accept()
                    waiting.append(_Link(wire.Channel(sock)))
                    continue
                try:
                    frame = link.channel.recv(0.0)
                except PeerLost:
                    waiting.remove(link)  # of the update before; the rank comes again
                    link.channel.close()
                    continue
                attach = wire.Attach.decode(wire.accept(frame, Type.ATTACH, frame.transaction).body)
                waiting.remove(link)
                if attach.nonce != nonce:
                    link.channel.close()
                    continue
                link.rank = attach.rank
                attached.append(link)
        for link in waiting:
            link.channel.close()
        self._links = sorted(attached, key=lambda link: link.rank)
        for link in self._links:
            link.greet(deadline)
        if not any(link.opened for link in self._links):
            closed_by({self.url})

    def _judge(self, layout: layouts.Layout, partial: bool) -> None:
        """Names, where only the engine knows them: read by some rank, and nothing left out."""
        if self._names().source != "engine":
            return
        unread = [
            entry.name
            for index, entry in enumerate(layout.entries)
            if entry.nbytes
            and all(link.status[index] == wire.Status.UNREAD for link in self._links)
        ]
        if unread:
            raise manifest.unread(unread)
        missing = [link.reasons[0] for link in self._links if 0 in link.reasons]
        if missing and not partial:
            raise MissingName(
                f"nothing in the update is written to {missing[0]} of the engine's parameters: "
                "send all, or pass partial=True to keep those weights"
            )

    def _collect(self, kind: Type) -> None:
        """Wait until every rank has sent `kind`; the first error of a rank is raised."""
        left = set(self._links)
        errors: list[UpdateError] = []
        while left:
            for link in self._ready(left, self._deadline(), kind.name):
                if link is None:
                    continue
                try:
                    if self._take(link, link.channel.recv(0.0), kind):
                        left.discard(link)
                except UpdateError as error:
                    # The others are heard out: none is left in the middle of a copy.
                    errors.append(error)
                    left.discard(link)
        if errors:
            raise errors[0]

    def _take(self, link: _Link, frame: Frame, kind: Type | None) -> bool:
        """Handle one frame of a rank; True if it is the one that is waited for."""
        if frame.type is Type.STATUS:
            link.note_status(wire.Status.decode(frame.body))
        elif frame.type is Type.REASON:
            reason = wire.Reason.decode(frame.body)
            link.reasons[reason.number] = reason.text
        elif frame.type is Type.ACK:
            ack = wire.Ack.decode(wire.accept(frame, Type.ACK, self._transaction).body)
            generation, readers = self._reading.get(ack.slot, (0, set()))
            if link not in readers or ack.generation != generation:
                raise ProtocolError(f"rank {link.rank} acknowledged slot {ack.slot}: never sent")
            readers.discard(link)
        else:
            wanted = kind if kind is not None else Type.ACK
            with link.named():
                wire.accept(frame, wanted, self._transaction)
            if wanted is Type.APPLIED:
                link.applied = wire.Applied.decode(frame.body)
            return True
        return False

    def _ready(
        self, links: list[_Link] | set[_Link], deadline: float, what: str
    ) -> list[_Link | None]:
        """Links with something to read, and None where a rank wants to connect."""
        poller = select.poll()
        owners: dict[int, _Link] = {}
        for link in links:
            for fd in link.channel.watched():
                owners[fd] = link
                poller.register(fd, select.POLLIN)
        poller.register(self._listener, select.POLLIN)
        assert self._post is not None
        poller.register(self._post.done, select.POLLIN)
        left = deadline - time.monotonic()
        ready = {fd for fd, _ in poller.poll(max(0.0, left) * 1000)}
        if not ready:
            raise Timeout(f"{self._server.url}: no {what} within {self.timeout:g} s")
        out: list[_Link | None] = list(dict.fromkeys(owners[fd] for fd in ready & owners.keys()))
        if self._listener.fileno() in ready:
            out.append(None)
        if not out:
            # The request has ended, and nobody has anything more to say.
            self._post.join(0.0)
            raise ApplyFailed(self._unheard(what))
        return out

    def _send(self, link: _Link, kind: Type, body: bytes = b"") -> None:
        with link.named():
            link.channel.send(Frame(kind, self._transaction, body), self._deadline())

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout

    def _hang_up(self) -> None:
        """Drop all connections: a loader that waits gives up at once, and its request ends."""
        self._leave_staging(
            may_be_read=any(link.opened and link.channel.alive() for link in self._links)
        )
        for link in self._links:
            link.channel.close()
        self._links = []
        if self._post is not None:
            # Only what is about to be taken back needs the loaders to have returned.
            with contextlib.suppress(UpdateError):
                self._post.join(min(1.0, self.timeout) if self.handed_over else self.timeout)
            self._post = None

    def _leave_staging(self, *, may_be_read: bool) -> None:
        staging, self.staging = self.staging, Staging()
        self._reading.clear()
        with contextlib.suppress(StagingError):  # it is tried again
            staging.leave(self.url, may_be_read=may_be_read)


@dataclass(eq=False)
class _Link:
    """One rank."""

    channel: wire.Channel
    rank: int = -1
    status: bytearray = field(default_factory=bytearray)
    reasons: dict[int, str] = field(default_factory=dict)
    applied: wire.Applied | None = None
    _digest: bytes = b""
    opened: int = 0  # segments of the ring
    gpu: bytes = memory.NO_GPU
    _greeted: bool = False

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """An error says which rank's it is."""
        try:
            yield
        except UpdateError as error:
            error.args = (f"rank {self.rank}: {error}",)
            raise

    def greet(self, deadline: float) -> None:
        """HELLO on a new connection."""
        if not self._greeted:
            hello = wire.Hello(secrets.token_bytes(16))
            self.channel.send(Frame(Type.HELLO, 0, hello.encode()), deadline)
            welcome = wire.accept(self.channel.recv(deadline), Type.WELCOME, 0)
            self.gpu = wire.Welcome.decode(welcome.body).gpu
            self._greeted = True

    def begin(
        self, begin: wire.Begin, layout: layouts.Layout, transaction: int, deadline: float
    ) -> None:
        """BEGIN, with the manifest where it is new."""
        self.status = bytearray(len(layout.entries))
        self.reasons = {}
        self.applied = None
        fds = []
        count = 0
        if self._digest != layout.digest:
            count = len(layout.encoded)
            fds = [wire.manifest_fd(layout.encoded)]
        message = wire.Begin(begin.version, begin.partial, begin.verify, begin.digest, count)
        try:
            self.channel.send(Frame(Type.BEGIN, transaction, message.encode(), fds), deadline)
        finally:
            for fd in fds:
                os.close(fd)
        self._digest = layout.digest

    def note_status(self, status: wire.Status) -> None:
        end = status.first + len(status.codes)
        if end > len(self.status):
            raise ProtocolError(f"STATUS of {end} tensors, sent {len(self.status)}")
        self.status[status.first : end] = status.codes

    def retire(self, transaction: int, deadline: float) -> None:
        if self.opened:
            retire = wire.Retire(direct_only=False).encode()
            self.channel.send(Frame(Type.RETIRE, transaction, retire), deadline)
            wire.accept(self.channel.recv(deadline), Type.RETIRED, transaction)
            self.opened = 0

    def open(self, staging: Staging, transaction: int, deadline: float) -> None:
        for info, fds in itertools.islice(staging.opens(self.gpu), self.opened, None):
            frame = Frame(Type.SEGMENT, transaction, info.encode(), fds)
            self.channel.send(frame, deadline)
            wire.accept(self.channel.recv(deadline), Type.OPENED, transaction)
            self.opened += 1


class _Post:
    """The one request, in a thread of its own; it returns when every rank's load() has."""

    def __init__(self, server: Server, payloads: list[str], selector: str, timeout: float):
        self._server = Server(server.url, server.http.api_key, timeout)
        self._server.sessions, self._server.ranks = server.sessions, server.ranks
        self._error: UpdateError | None = None
        self.done, self._write = socket.socketpair()
        self._thread = threading.Thread(
            target=self._run, args=(payloads, selector), name="pyrlk-post", daemon=True
        )
        self._thread.start()

    def _run(self, payloads: list[str], selector: str) -> None:
        try:
            self._server.update(payloads, LOADER, selector)
        except UpdateError as error:
            self._error = error
        finally:
            self._server.close()
            self._write.close()

    def join(self, timeout: float) -> None:
        """Wait for the answer; its error is raised."""
        self._thread.join(timeout if timeout else None)
        if self._thread.is_alive():
            raise Timeout(f"{self._server.url} did not end the update within {timeout:g} s")
        self.done.close()
        if self._error is not None:
            raise self._error
