"""Messages between publisher and receiver: one frame a datagram on a Unix SOCK_SEQPACKET socket.

    frame := "PRLK"  u16 protocol  u16 type  u64 transaction  u32 length  u32 crc   body
    crc   := CRC-32 over the header, with crc = 0, and the body

    publisher → receiver                          receiver → publisher
    HELLO    nonce                                WELCOME  boot nonce, version, dirty, names, GPU
    SEGMENT  index, handle [+ descriptor]         OPENED   index
    RETIRE   all segments, or the trainer's own   RETIRED
    BEGIN    version, flags, digest [+ manifest]  CHECKED  | FAILED
    BUCKET   bucket, slot, generation, sums       ACK      bucket, slot, generation
                                                  APPLIED  version, …  | FAILED code, dirty, message
    CLOSE                                         CLOSED

    SGLang's loader connects to the publisher instead, once an update or on a kept connection:
                                                  ATTACH   nonce, boot nonce, rank
                                                  REASON   number, text     before CHECKED, APPLIED
                                                  STATUS   first, one byte a tensor

Bodies have fixed forms; descriptors travel by SCM_RIGHTS; nothing is ever evaluated.
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import memory
from .errors import PeerLost, ProtocolError, StagingError, Timeout, UpdateError, from_code
from .layout import MAX_DIRECT, MAX_MANIFEST, MAX_PIECES

PROTOCOL = 2
MAX_BODY = 60 << 10
MAX_SLOTS = 64  # segments numbered from here on are the trainer's own (direct)
_MAGIC = b"PRLK"
_HEADER = struct.Struct("<4sHHQII")
_MAX_FDS = 1


class Type(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    SEGMENT = 3
    OPENED = 4
    RETIRE = 5
    RETIRED = 6
    BEGIN = 7
    CHECKED = 8
    BUCKET = 9
    ACK = 10
    APPLIED = 11
    FAILED = 12
    CLOSE = 13
    CLOSED = 14
    ATTACH = 15
    STATUS = 16
    REASON = 17


class State(enum.Enum):
    """How far a connection has come, as each side sees it: named by the last frame."""

    CONNECTED = "nothing was said yet"
    ATTACHED = "a loader has called; it is one of the publisher's ranks"
    GREETING = "HELLO is under way"
    GREETED = "the receiver has named itself; between updates"
    JUDGING = "BEGIN is under way: names, shapes, dtypes, version"
    CHECKED = "the update fits"
    OPENING = "a segment is announced"
    OPENED = "a segment is mapped by the receiver"
    RETIRING = "segments are about to be closed"
    RETIRED = "no segment is mapped"
    COPYING = "a bucket is announced: the receiver may be copying it"
    COPIED = "a bucket is in the engine"
    APPLIED = "the version is the new one"
    REFUSED = "the update is off"
    REPORTING = "a loader says what it did with which tensor"
    CLOSING = "the publisher takes its leave"
    CLOSED = "nothing is left"


# ATTACH, STATUS and REASON only add to the state in which they are sent.
_STATE_AFTER = {
    Type.ATTACH: State.ATTACHED,
    Type.HELLO: State.GREETING,
    Type.WELCOME: State.GREETED,
    Type.SEGMENT: State.OPENING,
    Type.OPENED: State.OPENED,
    Type.RETIRE: State.RETIRING,
    Type.RETIRED: State.RETIRED,
    Type.BEGIN: State.JUDGING,
    Type.CHECKED: State.CHECKED,
    Type.BUCKET: State.COPYING,
    Type.ACK: State.COPIED,
    Type.APPLIED: State.APPLIED,
    Type.FAILED: State.REFUSED,
    Type.STATUS: State.REPORTING,
    Type.REASON: State.REPORTING,
    Type.CLOSE: State.CLOSING,
    Type.CLOSED: State.CLOSED,
}


@dataclass
class Frame:
    """One message. The receiver of a frame owns its descriptors."""

    type: Type
    transaction: int = 0
    body: bytes = b""
    fds: list[int] = field(default_factory=list)

    def encode(self) -> bytes:
        head = (_MAGIC, PROTOCOL, self.type, self.transaction, len(self.body))
        crc = zlib.crc32(self.body, zlib.crc32(_HEADER.pack(*head, 0)))
        return _HEADER.pack(*head, crc) + self.body

    @classmethod
    def decode(cls, data: bytes) -> Frame:
        """Raises ProtocolError on anything that `encode` would not have written."""
        if not _HEADER.size <= len(data) <= _HEADER.size + MAX_BODY:
            raise ProtocolError(f"frame: {len(data)} bytes")
        magic, protocol, kind, transaction, length, crc = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if magic != _MAGIC or length != len(body):
            raise ProtocolError(f"frame: magic {magic!r}, length {length} of {len(body)}")
        head = _HEADER.pack(magic, protocol, kind, transaction, length, 0)
        if zlib.crc32(body, zlib.crc32(head)) != crc:
            raise ProtocolError("frame: wrong CRC")
        if protocol != PROTOCOL:
            raise ProtocolError(
                f"the other side speaks protocol {protocol}, this one {PROTOCOL}: "
                "install the same pyrlk on both"
            )
        try:
            return cls(Type(kind), transaction, body)
        except ValueError:
            raise ProtocolError(f"frame: unknown type {kind}") from None

    def close_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def _unpack(form: struct.Struct, body: bytes, what: str) -> tuple:
    if len(body) != form.size:
        raise ProtocolError(f"{what}: {len(body)} bytes, wanted {form.size}")
    return form.unpack(body)


def _flag(value: int, what: str) -> bool:
    if value > 1:
        raise ProtocolError(f"{what}: flag {value}")
    return bool(value)


NAMES_FROM = ("module", "expected", "unchecked")


@dataclass(frozen=True)
class Hello:
    nonce: bytes

    _form = struct.Struct("<16s")

    def encode(self) -> bytes:
        return self._form.pack(self.nonce)

    @classmethod
    def decode(cls, body: bytes) -> Hello:
        return cls(*_unpack(cls._form, body, "HELLO"))


@dataclass(frozen=True)
class Welcome:
    boot: bytes  # drawn once a receiver: another one means a restarted engine
    version: int
    dirty: bool
    names_from: str
    gpu: bytes = memory.NO_GPU  # that its weights lie on

    _form = struct.Struct("<16sqBB16s")

    def encode(self) -> bytes:
        names = NAMES_FROM.index(self.names_from)
        return self._form.pack(self.boot, self.version, self.dirty, names, self.gpu)

    @classmethod
    def decode(cls, body: bytes) -> Welcome:
        boot, version, dirty, names, gpu = _unpack(cls._form, body, "WELCOME")
        if names >= len(NAMES_FROM):
            raise ProtocolError(f"WELCOME: names_from {names}")
        return cls(boot, version, _flag(dirty, "WELCOME"), NAMES_FROM[names], gpu)


@dataclass(frozen=True)
class SegmentInfo:
    index: int
    handle: memory.Handle

    _form = struct.Struct("<HBQ16s16s64sQ")

    def encode(self) -> bytes:
        h = self.handle
        return self._form.pack(self.index, h.kind, h.nbytes, h.id, h.uuid, h.ipc, h.offset)

    @classmethod
    def decode(cls, body: bytes) -> SegmentInfo:
        index, kind, nbytes, ident, uuid, ipc, offset = _unpack(cls._form, body, "SEGMENT")
        if (
            index >= MAX_SLOTS + MAX_DIRECT
            or kind not in (0, 1)
            or not 0 < nbytes < 1 << 62
            or offset >> 62
        ):
            raise ProtocolError(f"SEGMENT: index {index}, kind {kind}, {nbytes} bytes, +{offset}")
        handle = memory.Handle(memory.Kind(kind), nbytes, ident, uuid, ipc, offset)
        return cls(index, handle)


@dataclass(frozen=True)
class Opened:
    index: int

    _form = struct.Struct("<H")

    def encode(self) -> bytes:
        return self._form.pack(self.index)

    @classmethod
    def decode(cls, body: bytes) -> Opened:
        return cls(*_unpack(cls._form, body, "OPENED"))


@dataclass(frozen=True)
class Retire:
    direct_only: bool

    _form = struct.Struct("<B")

    def encode(self) -> bytes:
        return self._form.pack(self.direct_only)

    @classmethod
    def decode(cls, body: bytes) -> Retire:
        (direct_only,) = _unpack(cls._form, body, "RETIRE")
        return cls(_flag(direct_only, "RETIRE"))


class Verify(enum.IntEnum):
    """What is proven of an update; each level holds the one before it."""

    OFF = 0
    COPY = 1  # sums of what arrived and of what was copied
    ENGINE = 2  # and, after the last copy, of what the engine then holds


@dataclass(frozen=True)
class Begin:
    version: int
    partial: bool
    verify: Verify
    digest: bytes
    manifest_bytes: int  # 0: the one of the update before

    _form = struct.Struct("<qBB32sI")

    def encode(self) -> bytes:
        return self._form.pack(
            self.version, self.partial, self.verify, self.digest, self.manifest_bytes
        )

    @classmethod
    def decode(cls, body: bytes) -> Begin:
        version, partial, verify, digest, count = _unpack(cls._form, body, "BEGIN")
        if version < 0 or count > MAX_MANIFEST or verify > max(Verify):
            raise ProtocolError(
                f"BEGIN: version {version}, manifest of {count} bytes, verify {verify}"
            )
        return cls(version, _flag(partial, "BEGIN"), Verify(verify), digest, count)


@dataclass(frozen=True)
class Bucket:
    bucket: int
    slot: int
    generation: int
    sums: tuple[int, ...]  # one a piece, or none with verify off

    _form = struct.Struct("<IHQI")

    def encode(self) -> bytes:
        head = self._form.pack(self.bucket, self.slot, self.generation, len(self.sums))
        return head + struct.pack(f"<{len(self.sums)}Q", *self.sums)

    @classmethod
    def decode(cls, body: bytes) -> Bucket:
        if len(body) < cls._form.size:
            raise ProtocolError(f"BUCKET: {len(body)} bytes")
        bucket, slot, generation, count = cls._form.unpack_from(body)
        if count > MAX_PIECES or len(body) != cls._form.size + 8 * count:
            raise ProtocolError(f"BUCKET: {count} sums in {len(body)} bytes")
        sums = struct.unpack_from(f"<{count}Q", body, cls._form.size)
        return cls(bucket, slot, generation, sums)


@dataclass(frozen=True)
class Ack:
    bucket: int
    slot: int
    generation: int

    _form = struct.Struct("<IHQ")

    def encode(self) -> bytes:
        return self._form.pack(self.bucket, self.slot, self.generation)

    @classmethod
    def decode(cls, body: bytes) -> Ack:
        return cls(*_unpack(cls._form, body, "ACK"))


@dataclass(frozen=True)
class Applied:
    version: int
    verify_seconds: float
    copy_seconds: float

    _form = struct.Struct("<qdd")

    def encode(self) -> bytes:
        return self._form.pack(self.version, self.verify_seconds, self.copy_seconds)

    @classmethod
    def decode(cls, body: bytes) -> Applied:
        return cls(*_unpack(cls._form, body, "APPLIED"))


@dataclass(frozen=True)
class Failed:
    code: int
    dirty: bool
    message: str

    _form = struct.Struct("<HB")

    def encode(self) -> bytes:
        # A message is cut, never refused: it must arrive.
        text = self.message.encode()[:4096].decode(errors="ignore").encode()
        return self._form.pack(self.code, self.dirty) + text

    @classmethod
    def decode(cls, body: bytes) -> Failed:
        if len(body) < cls._form.size:
            raise ProtocolError(f"FAILED: {len(body)} bytes")
        code, dirty = cls._form.unpack_from(body)
        text = body[cls._form.size :].decode(errors="replace")
        return cls(code, _flag(dirty, "FAILED"), text)

    @classmethod
    def of(cls, error: UpdateError) -> Failed:
        return cls(error.code, error.dirty, str(error))

    def error(self) -> UpdateError:
        return from_code(self.code, self.message, dirty=self.dirty)


@dataclass(frozen=True)
class Attach:
    """SGLang's loader was called in a worker; `nonce` is the one of its payload."""

    nonce: bytes
    boot: bytes
    rank: int

    _form = struct.Struct("<16s16sH")

    def encode(self) -> bytes:
        return self._form.pack(self.nonce, self.boot, self.rank)

    @classmethod
    def decode(cls, body: bytes) -> Attach:
        return cls(*_unpack(cls._form, body, "ATTACH"))


@dataclass(frozen=True)
class Status:
    """How tensors [first, first + len(codes)) of the manifest are taken, one byte each."""

    first: int
    codes: bytes

    UNREAD = 0
    PLANNED = 1
    FALLBACK = 2  # and above: the reason of that number

    _form = struct.Struct("<I")

    def encode(self) -> bytes:
        return self._form.pack(self.first) + self.codes

    @classmethod
    def decode(cls, body: bytes) -> Status:
        if len(body) < cls._form.size:
            raise ProtocolError(f"STATUS: {len(body)} bytes")
        return cls(cls._form.unpack_from(body)[0], body[cls._form.size :])


@dataclass(frozen=True)
class Reason:
    """Text of a status; number 0: the engine's parameters that nothing writes."""

    number: int
    text: str

    def encode(self) -> bytes:
        return bytes([self.number]) + self.text.encode()[:4096].decode(errors="ignore").encode()

    @classmethod
    def decode(cls, body: bytes) -> Reason:
        if not body:
            raise ProtocolError("REASON: empty")
        return cls(body[0], body[1:].decode(errors="replace"))


class Channel:
    """One end of a connection. Every wait has a deadline; a dead peer ends it at once."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self.state = State.CONNECTED
        sock.setblocking(False)
        pid, uid, _ = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        self.peer = f"process {pid}"
        if uid != os.geteuid():
            sock.close()
            raise ProtocolError(f"{self.peer} runs as uid {uid}, this one as uid {os.geteuid()}")
        # The socket alone would miss a peer whose forked child still holds it.
        self._pidfd: int | None = None
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._sock.fileno()

    def watched(self) -> list[int]:
        """Descriptors that become readable when there is something to see to."""
        fds = [self._sock.fileno()]
        return fds if self._pidfd is None else [*fds, self._pidfd]

    def alive(self) -> bool:
        """Whether both sides have it open."""
        if self._sock.fileno() < 0:
            return False
        poller = select.poll()
        poller.register(self._sock, 0)
        if self._pidfd is not None:
            poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def send(self, frame: Frame, deadline: float) -> None:
        """Raises PeerLost or Timeout; the descriptors stay the caller's."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", frame.fds))]
        data = frame.encode()
        while True:
            try:
                self._sock.sendmsg([data], rights if frame.fds else [], socket.MSG_NOSIGNAL)
                self.state = _STATE_AFTER.get(frame.type, self.state)
                return
            except (BlockingIOError, InterruptedError):
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                lost = PeerLost(f"{self.peer} is gone ({error.strerror})")
                raise self._last_words() or lost from None

    def recv(self, deadline: float) -> Frame:
        """Raises PeerLost, Timeout or ProtocolError."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _HEADER.size + MAX_BODY + 1,
                    socket.CMSG_SPACE(4 * (_MAX_FDS + 1)),
                    socket.MSG_CMSG_CLOEXEC,
                )
                break
            except (BlockingIOError, InterruptedError):
                self._wait(select.POLLIN, deadline)
            except ConnectionResetError:
                # The peer closed with messages of ours unread; its own last words still wait here.
                continue
            except OSError as error:
                raise PeerLost(f"{self.peer} is gone ({error.strerror})") from None
        fds = _descriptors(ancillary)
        try:
            if not data:
                raise PeerLost(f"{self.peer} is gone (it closed the connection)")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > _MAX_FDS:
                raise ProtocolError("frame: too long, or with too many descriptors")
            frame = Frame.decode(data)
        except UpdateError:
            for fd in fds:
                os.close(fd)
            raise
        frame.fds = fds
        self.state = _STATE_AFTER.get(frame.type, self.state)
        return frame

    def close(self) -> None:
        self._sock.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _last_words(self) -> UpdateError | None:
        """The error that the peer sent before it closed, if it did."""
        with contextlib.suppress(UpdateError):
            while True:
                frame = self.recv(0.0)
                frame.close_fds()
                if frame.type is Type.FAILED:
                    return Failed.decode(frame.body).error()
        return None

    def _wait(self, events: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._sock, events)
        if self._pidfd is not None:
            poller.register(self._pidfd, select.POLLIN)
        left = deadline - time.monotonic()
        ready = {fd for fd, _ in poller.poll(max(0.0, left) * 1000)}
        if self._sock.fileno() in ready:
            return
        if ready:
            raise PeerLost(f"{self.peer} has died")
        if left <= 0:
            raise Timeout(
                f"{self.peer} did not answer within timeout; an engine must call receiver.poll()"
            )


def accept(frame: Frame, kind: Type, transaction: int) -> Frame:
    """The frame, if it is the wanted one; a FAILED one is raised as its error."""
    if frame.fds:
        frame.close_fds()
        raise ProtocolError(f"{frame.type.name} came with a descriptor")
    if frame.type is Type.FAILED:
        raise Failed.decode(frame.body).error()
    if frame.type is not kind or frame.transaction != transaction:
        raise ProtocolError(
            f"{frame.type.name} of transaction {frame.transaction}, "
            f"wanted {kind.name} of {transaction}"
        )
    return frame


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


MAX_TIMEOUT = 1e6  # seconds; poll takes its milliseconds in 32 bits


def check_timeout(timeout: float) -> float:
    """Seconds that a wait may take."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds, got {type(timeout).__name__}")
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(
            f"timeout must be a number of seconds above 0, at most {MAX_TIMEOUT:g}, got {timeout}"
        )
    return float(timeout)


def check_path(socket_path: str | os.PathLike[str]) -> str:
    """An absolute socket path that the kernel can take."""
    try:
        given = os.fsdecode(socket_path)
    except TypeError:
        kind = type(socket_path).__name__
        raise TypeError(f"socket_path must be a str or a path, got {kind}") from None
    if not given or "\0" in given:
        raise ValueError(f"socket_path must name a file, got {given!r}")
    path = os.path.abspath(given)
    if len(os.fsencode(path)) > 107:
        raise ValueError(f"socket_path: a Unix socket path has at most 107 bytes, got {path!r}")
    return path


def listen(path: str) -> socket.socket:
    """A listening socket of mode 0600 in a directory of mode 0700 (made where it is missing).

    Raises
    ------
    ValueError
        The directory belongs to or is open to others, or another receiver listens there.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.stat(folder)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(
            f"socket_path: {folder} has mode {stat.S_IMODE(status.st_mode):04o} and owner "
            f"{status.st_uid}; use a directory of mode 0700 of your own (tempfile.mkdtemp())"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _answers(path):
                raise
            os.unlink(path)  # left behind by a receiver that was killed
            sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(8)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ValueError(f"socket_path: {path}: {error.strerror}") from None
    return sock


def _answers(path: str) -> bool:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True


def connect(path: str, deadline: float) -> Channel:
    """Reach a receiver, waiting for one until the deadline.

    Raises
    ------
    PeerLost
        Nobody listens.
    """
    while True:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise StagingError(f"no socket: {error.strerror} (ulimit -n)") from None
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(path)
            return Channel(sock)
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError) as error:
            sock.close()
            if time.monotonic() >= deadline:
                raise PeerLost(
                    f"no receiver listens at {path} ({error.strerror or 'timed out'}): "
                    "start weights.Receiver(model, socket_path) and call its poll() or serve()"
                ) from None
            time.sleep(0.01)
        except UpdateError:
            raise
        except OSError as error:
            sock.close()
            raise PeerLost(f"{path}: {error.strerror}") from None


_MANIFEST_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def manifest_fd(data: bytes) -> int:
    """A sealed memfd that holds the manifest: any length, and nobody can change it later."""
    try:
        fd = os.memfd_create("pyrlk-manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise StagingError(f"manifest: {error.strerror} (ulimit -n)") from None
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _MANIFEST_SEALS | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise StagingError(f"manifest: {error.strerror}") from None
    return fd


def read_manifest(fd: int, count: int) -> bytes:
    """The bytes of a manifest descriptor; ProtocolError unless sealed and `count` bytes long."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _MANIFEST_SEALS == _MANIFEST_SEALS
        size = os.fstat(fd).st_size
    except OSError as error:
        raise ProtocolError(f"manifest: {error.strerror}") from None
    if not sealed or size != count or count > MAX_MANIFEST:
        raise ProtocolError(f"manifest: {size} bytes of {count}, sealed: {sealed}")
    parts = []
    at = 0
    while at < count:
        part = os.pread(fd, count - at, at)
        if not part:
            raise ProtocolError("manifest: shorter than its size")
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def unlink(path: str) -> None:
    """Remove a socket file; a missing one is fine."""
    Path(path).unlink(missing_ok=True)
