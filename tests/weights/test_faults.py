"""Every fault: a typed error within the deadline, old weights or a dirty mark, and a next update.

The receiver serves in a forked process; a publisher is here, or in another one. One that survives
its fault goes on to the next case, so that a case costs at most one fork. `make test-endurance`
runs each case a hundred times and prints what the kinds took.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pyrlk import _C, weights
from pyrlk.weights import memory, wire
from pyrlk.weights.receiver import _Session
from pyrlk.weights.wire import State, Type

pytestmark = pytest.mark.distributed

FORK = multiprocessing.get_context("fork")
# Seconds: the deadline of a wait that is going to fail. On a busy machine an earlier wait may fail
# of it; the case is then tried again with twice as much.
PATIENCE = 0.01
LONG = 10.0  # the deadline of a wait that is not going to fail
# Three buckets of one tensor each through two slots.
SHAPES = {"a": (37,), "b": (5, 9), "c": (64,)}
OPTIONS = {"bucket_bytes": 256, "buffers": 2}


class Model(nn.Module):
    def __init__(self, seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def digest(self) -> str:
        data = b"".join(
            bytes(p.data.view(-1).view(torch.uint8).tolist()) for p in self.parameters()
        )
        return hashlib.sha256(data).hexdigest()


class Twins(Model):
    """Its first and last bucket hold the same bytes, and share a slot: a recording stays true."""

    def __init__(self, seed: int):
        super().__init__(seed, SHAPES | {"a": SHAPES["c"]})
        self.c.data = self.a.data.clone()


class Status(NamedTuple):
    version: int
    dirty: bool
    digest: str
    error: str  # the class of the receiver's last error


class Engine:
    """A receiver in a process of its own."""

    def __init__(self, path: str, kind: type[Model] = Model):
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_serve, args=(path, theirs, kind), daemon=True)
        self.process.start()
        theirs.close()
        assert self._pipe.recv() == "listening"

    def status(self, command: str = "status", argument: object = None) -> Status:
        self._pipe.send((command, argument))
        assert self._pipe.poll(20), "the receiver hangs"
        return Status(*self._pipe.recv())

    def error_within(self, seconds: float) -> Status:
        """The status as soon as there is an error in it."""
        end = time.monotonic() + seconds
        while not (status := self.status()).error and time.monotonic() < end:
            time.sleep(0.001)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


def _serve(path: str, pipe, kind: type[Model]) -> None:
    torch.set_num_threads(1)
    model = kind(0)
    receiver = weights.Receiver(model, path, timeout=LONG)
    pipe.send("listening")
    while True:
        receiver.poll(0.001)
        while pipe.poll():
            try:
                command, argument = pipe.recv()
            except EOFError:
                os._exit(0)
            if command == "forget the error":
                receiver.last_error = None
            elif command == "few descriptors":
                let_go(receiver)  # it would give its own back
                few_descriptors(argument)
            elif command in FATES:
                let_go(receiver)  # it may have reached that state
                at(argument, FATES[command])
            elif command == "wait at most":
                receiver._timeout = argument
            error = "" if receiver.last_error is None else type(receiver.last_error).__name__
            pipe.send((receiver.version, receiver.dirty, model.digest(), error))


def let_go(receiver: weights.Receiver) -> None:
    """Serves to the end of the last publisher's session."""
    while receiver._session is not None:
        receiver.poll(0.001)


def at(state: wire.State, action: Callable[[], object]) -> None:
    """In this process: act before the next step of a connection that has reached `state`."""

    def wrap(step):
        def stepping(channel, *args):
            if channel.state is state:
                action()
            return step(channel, *args)

        return stepping

    wire.Channel.send = wrap(wire.Channel.send)
    wire.Channel.recv = wrap(wire.Channel.recv)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FATES = {"die": die, "freeze": freeze}


def publish(
    path: str, version: int, *, seed: int, partial: bool = False, timeout: float = LONG
) -> None:
    """One update by a publisher of its own; raises what it raises."""
    model = Model(seed)
    tensors = {"a": model.a} if partial else model
    with weights.Publisher(weights.Local(path), timeout=timeout, **OPTIONS) as publisher:
        publisher.update(tensors, version=version, partial=partial)


def publisher_process(path: str, version: int, before: Callable[[], None]):
    """A publisher in a process of its own, started."""

    def run() -> None:
        torch.set_num_threads(1)
        before()
        with contextlib.suppress(weights.UpdateError):
            publish(path, version, seed=version)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


@contextlib.contextmanager
def frames_through(change: Callable[[wire.Frame, bytes], list[bytes]]) -> Iterator[None]:
    """Here: what is sent instead of each frame; an exception ends the connection."""
    send = wire.Channel.send

    def sending(channel, frame, deadline):
        whole = frame.encode()
        for data in change(frame, whole):
            send(channel, _Raw(frame, data), deadline)

    wire.Channel.send = sending
    try:
        yield
    finally:
        wire.Channel.send = send


class _Raw(wire.Frame):
    """A frame with bytes of its own."""

    def __init__(self, frame: wire.Frame, data: bytes):
        super().__init__(frame.type, frame.transaction, frame.body, frame.fds)
        self._data = data

    def encode(self) -> bytes:
        return self._data


# What a connection passes through in an update of three buckets through two slots.
STATES = [
    State.CONNECTED,
    State.GREETING,
    State.GREETED,
    State.JUDGING,
    State.CHECKED,
    State.OPENING,
    State.OPENED,
    State.COPYING,
    State.COPIED,
    State.APPLIED,
]
SLACK = 4.0  # seconds that a busy machine may add to a deadline


class Bench:
    """One engine that goes from case to case; every case ends with a good update."""

    def __init__(self, path: str):
        self.path = path
        self.engine = Engine(path)
        self.version = 0
        self.seconds: list[float] = []
        publish(path, self.next(), seed=1)

    def replace_engine(self) -> None:
        self.engine.kill()
        self.engine = Engine(self.path)

    def next(self) -> int:
        self.version += 1
        return self.version

    @contextlib.contextmanager
    def case(self, *errors: str, completes: bool = False) -> Iterator[None]:
        """Around a fault: the engine before and after it, and a good update at the end.

        errors: what the engine may report, none if it never notices. completes: the update may
        have gone through, seen from the engine.
        """
        begin = time.perf_counter()
        before = self.engine.status("forget the error")
        yield
        after = self.engine.error_within(SLACK if errors and not completes else 0.0)
        assert after.error in (*errors, "") if completes or not errors else after.error in errors
        if after.dirty:
            with pytest.raises(weights.EngineDirty):
                publish(self.path, self.next(), seed=1, partial=True)
        elif completes and after.version != before.version:
            assert after.digest == Model(after.version).digest()
        else:
            assert (after.version, after.digest) == (before.version, before.digest)
        self.good_update()
        self.seconds.append(time.perf_counter() - begin)

    def good_update(self) -> None:
        good = self.next()
        publish(self.path, good, seed=good)
        status = self.engine.status()
        assert (status.version, status.dirty) == (good, False)
        assert status.digest == Model(good).digest()

    def fails(self, *errors: type[weights.UpdateError], timeout: float = LONG) -> None:
        """An update from here ends in one of the errors, in time."""
        version = self.next()
        begin = time.monotonic()
        with pytest.raises(errors):
            publish(self.path, version, seed=version, timeout=timeout)
        assert time.monotonic() - begin < min(timeout, SLACK) + SLACK


@pytest.fixture
def bench(socket_path, request, record_cases):
    bench = Bench(socket_path)
    yield bench
    bench.engine.kill()
    record_cases(request.node.originalname, bench.seconds)


@pytest.fixture(params=[3, pytest.param(100, marks=pytest.mark.endurance)], ids=["few", "often"])
def times(request):
    return range(request.param)


by_state = pytest.mark.parametrize("state", STATES, ids=lambda s: s.name)


@by_state
def test_a_publisher_is_killed(bench, times, state):
    for _ in times:
        with bench.case("PeerLost", completes=state is State.APPLIED):
            process = publisher_process(bench.path, bench.next(), lambda: at(state, die))
            process.join(10)
            assert process.exitcode == -signal.SIGKILL


@by_state
def test_a_publisher_stands_still(bench, times, state):
    # Outside an update a publisher may be silent for ever; then it is its death that is noticed.
    waits = state in {State.CHECKED, State.OPENED, State.COPIED}
    for _ in times:
        with bench.case("Timeout" if waits else "PeerLost", completes=state is State.APPLIED):
            for patience in patiences(waits):
                bench.engine.status("forget the error")
                bench.engine.status("wait at most", patience)
                process = publisher_process(bench.path, bench.next(), lambda: at(state, freeze))
                if stands_still(process.pid):
                    break
                process.join()
            if waits:
                assert bench.engine.error_within(patience + SLACK).error == "Timeout"
            process.kill()
            process.join()
            bench.engine.status("wait at most", LONG)


@by_state
def test_a_receiver_is_killed(bench, times, state):
    for _ in times:
        begin = time.perf_counter()
        bench.engine.status("die", state)
        if state is State.APPLIED:  # the update was over
            bench.version += 1
            with contextlib.suppress(weights.PeerLost):
                publish(bench.path, bench.version, seed=2)
        else:
            bench.fails(weights.PeerLost)
        bench.replace_engine()
        bench.good_update()
        bench.seconds.append(time.perf_counter() - begin)


@by_state
def test_a_receiver_stands_still(bench, times, state):
    for _ in times:
        for patience in patiences(state is not State.APPLIED):
            begin = time.perf_counter()
            bench.engine.status("freeze", state)
            if state is State.APPLIED:
                bench.version += 1
                publish(bench.path, bench.version, seed=2)
            else:
                bench.fails(weights.Timeout, timeout=patience)
            reached = stands_still(bench.engine.process.pid, wait=state is State.APPLIED)
            bench.replace_engine()
            bench.good_update()
            if reached:
                break
        bench.seconds.append(time.perf_counter() - begin)


def patiences(waits: bool) -> Iterator[float]:
    """Deadlines to try, until one is not met by a machine that is merely busy."""
    if not waits:
        yield LONG
        return
    yield from (PATIENCE * 2**attempt for attempt in range(8))
    pytest.fail("the state was never reached")


def stands_still(pid: int, wait: bool = True) -> bool:
    """Whether a child has been stopped; with `wait`, as soon as it is or has ended."""
    how = os.WSTOPPED | os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)
    what = os.waitid(os.P_PID, pid, how)
    return what is not None and what.si_code == os.CLD_STOPPED


HEADER_BITS = 8 * wire._HEADER.size


# BEGIN judges, BUCKET copies; each bit of both headers.
@pytest.mark.parametrize("kind", [Type.HELLO, Type.BEGIN, Type.SEGMENT, Type.BUCKET, Type.CLOSE])
def test_a_bit_of_a_header_is_flipped(bench, times, kind):
    step = 1 if len(times) > 3 else 7
    for _ in range(0, len(times), 5):  # five kinds: a bit is flipped a hundred times
        for bit in range(0, HEADER_BITS, step):
            with (
                bench.case("ProtocolError", completes=kind is Type.CLOSE),
                frames_through(lambda f, data: [flipped(data, bit) if f.type is kind else data]),  # noqa: B023
            ):
                if kind is Type.CLOSE:
                    version = bench.next()
                    publish(bench.path, version, seed=version)
                else:
                    bench.fails(weights.ProtocolError)


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


@pytest.mark.parametrize("bucket", range(3))
def test_a_sum_is_wrong(bench, times, bucket, monkeypatch):
    pack = memory.Segment.pack
    for _ in times:
        count = iter(range(9))

        def wrong(self, sources, **kwargs):
            sums = pack(self, sources, **kwargs)
            return [sums[0] ^ 1] if next(count) == bucket else sums  # noqa: B023

        with monkeypatch.context() as patch, bench.case("ChecksumMismatch"):
            patch.setattr(memory.Segment, "pack", wrong)
            version = bench.next()
            with pytest.raises(weights.ChecksumMismatch):
                publish(bench.path, version, seed=version)
            patch.undo()


@pytest.mark.parametrize("version", [-1, 0])
def test_a_version_is_stale(bench, times, version):
    for _ in times:
        with bench.case("StaleVersion"), pytest.raises(weights.StaleVersion):
            publish(bench.path, bench.version + version, seed=3)


def test_a_version_is_skipped(bench, times):
    for _ in times:
        begin = time.perf_counter()
        bench.version += 1000
        bench.good_update()
        bench.seconds.append(time.perf_counter() - begin)


@pytest.mark.parametrize("kind", [Type.HELLO, Type.BEGIN, Type.SEGMENT, Type.BUCKET, Type.CLOSE])
def test_a_frame_is_replayed(bench, times, kind):
    for _ in times:
        with (
            bench.case("ProtocolError", "PeerLost", completes=kind is Type.CLOSE),
            frames_through(lambda f, data: [data] * (1 + (f.type is kind))),
        ):
            version = bench.next()
            with contextlib.ExitStack() as stack:
                if kind is not Type.CLOSE:
                    stack.enter_context(pytest.raises(weights.UpdateError))
                publish(bench.path, version, seed=version)


def test_the_receiver_has_no_descriptor_left(bench, times):
    for _ in times:
        begin = time.perf_counter()
        # Enough for the connection, none for what comes with it.
        before = bench.engine.status("few descriptors", 2)
        bench.fails(weights.UpdateError)
        status = bench.engine.error_within(SLACK)
        assert status.error in {"ProtocolError", "StagingError", "PeerLost"}
        assert status.digest == before.digest or status.dirty
        bench.replace_engine()
        bench.good_update()
        bench.seconds.append(time.perf_counter() - begin)


# Missing then: the socket; the manifest's (twice: a pidfd is optional); the second segment's.
@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_the_publisher_has_no_descriptor_left(bench, times, spare):
    for _ in times:
        with bench.case("PeerLost", "ProtocolError", completes=True):
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            model = Model(bench.next())
            publisher = weights.Publisher(weights.Local(bench.path), timeout=LONG, **OPTIONS)
            few_descriptors(spare)
            try:
                with pytest.raises(weights.UpdateError):
                    publisher.update(model, version=bench.version)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                publisher.close()
                release_held()


def few_descriptors(spare: int) -> None:
    """Leave room for exactly `spare` more in this process."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    while (fd := os.open("/dev/null", os.O_RDONLY)) <= highest:
        _HELD.append(fd)  # a hole
    os.close(fd)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + spare, hard))


_HELD: list[int] = []


def release_held() -> None:
    while _HELD:
        os.close(_HELD.pop())


@pytest.mark.parametrize("step", ["segment", "manifest"])
def test_there_is_no_space_left(bench, times, step, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in times:
        errors = ("PeerLost",) if step == "segment" else ("PeerLost", "")
        with bench.case(*errors, completes=step == "manifest"), monkeypatch.context() as patch:
            if step == "segment":
                patch.setattr(_C, "segment_create", full)
            else:
                patch.setattr(os, "write", full)
            version = bench.next()
            with pytest.raises(weights.StagingError, match="No space left"):
                publish(bench.path, version, seed=version)
            patch.undo()


def test_a_segment_is_opened_twice(bench, times):
    def twice(frame, data):
        if frame.type is not Type.SEGMENT:
            return [data]
        again = wire.SegmentInfo.decode(frame.body)
        again = wire.SegmentInfo(again.index + 1, again.handle)
        return [data, wire.Frame(frame.type, frame.transaction, again.encode()).encode()]

    for _ in times:
        with bench.case("ProtocolError"), frames_through(twice):
            bench.fails(weights.ProtocolError, weights.PeerLost)


def test_a_segment_is_announced_after_it_was_closed(bench, times, monkeypatch):
    send = wire.Channel.send

    def closed(channel, frame, deadline):
        if frame.type is Type.SEGMENT:
            frame.fds = []
        send(channel, frame, deadline)

    for _ in times:
        with bench.case("ProtocolError"), monkeypatch.context() as patch:
            patch.setattr(wire.Channel, "send", closed)
            bench.fails(weights.ProtocolError, weights.PeerLost)
            patch.undo()


def test_a_bucket_names_a_slot_that_was_retired(bench, times):
    def retire(frame, data):
        if frame.type is not Type.BUCKET:
            return [data]
        return [
            wire.Frame(Type.RETIRE, frame.transaction, wire.Retire(False).encode()).encode(),
            data,
        ]

    for _ in times:
        with bench.case("ProtocolError"), frames_through(retire):
            bench.fails(weights.ProtocolError)


def test_a_session_breaks_off_at_every_byte(bench, times):
    """A publisher that goes in the middle of its bytes, seen from both sides."""
    total = []
    with frames_through(lambda f, data: total.append(len(data)) or [data]):
        version = bench.next()
        publish(bench.path, version, seed=version)
    for offset in range(0, sum(total), 1 if len(times) > 3 else 11):
        with bench.case("PeerLost", "ProtocolError", completes=True):
            breaks_off(bench, offset)


def breaks_off(bench: Bench, offset: int) -> None:
    """An update whose connection ends after `offset` bytes."""
    left = offset

    def cut(frame, data):
        nonlocal left
        if left >= len(data):
            left -= len(data)
            return [data]
        part, left = data[:left], 0
        raise _Cut(part)

    send = wire.Channel.send
    with frames_through(cut):
        sending = wire.Channel.send

        def ending(channel, frame, deadline):
            try:
                sending(channel, frame, deadline)
            except _Cut as end:
                if end.part:
                    send(channel, _Raw(frame, end.part), deadline)
                channel._sock.shutdown(2)
                raise weights.PeerLost("cut") from None

        wire.Channel.send = ending
        version = bench.next()
        with contextlib.suppress(weights.PeerLost):
            publish(bench.path, version, seed=version)


class _Cut(Exception):
    def __init__(self, part: bytes):
        super().__init__()
        self.part = part


def test_recorded_bytes_end_at_every_offset(socket_path, times, request, record_cases):
    """The same a hundred times: recorded sessions, a receiver in a forked process, no publisher."""
    engine = Engine(socket_path, Twins)
    sessions = [recorded(socket_path, seed) for seed in (1, 2)]
    engine.kill()
    pipe, theirs = FORK.Pipe()
    work = (theirs, socket_path, sessions, len(times))
    process = FORK.Process(target=_cut_everywhere, args=work, daemon=True)
    process.start()
    theirs.close()
    seconds, broken = pipe.recv()
    process.join()
    for frame in itertools.chain(*sessions):
        frame.close_fds()
    assert len(seconds) == len(times) * len(offsets(sessions[0], times))
    assert broken > len(times)  # cuts between the first copy and the last
    record_cases(request.node.originalname, seconds)


def offsets(frames: list[wire.Frame], times: range) -> range:
    return range(0, sum(len(f.encode()) for f in frames), 1 if len(times) > 3 else 7)


def recorded(path: str, seed: int) -> list[wire.Frame]:
    """The frames of one session, with descriptors that stay open."""
    frames: list[wire.Frame] = []
    send = wire.Channel.send

    def sending(channel, frame, deadline):
        fds = [os.dup(fd) for fd in frame.fds]
        frames.append(wire.Frame(frame.type, frame.transaction, frame.body, fds))
        send(channel, frame, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire.Channel, "send", sending)
        with weights.Publisher(weights.Local(path), timeout=LONG, **OPTIONS) as publisher:
            publisher.update(Twins(seed), version=seed)
    return frames


def _cut_everywhere(pipe, path: str, sessions: list[list[wire.Frame]], times: int) -> None:
    """Update after update, each broken off once and then sent whole.

    Says how long each took and how many left the receiver dirty.
    """
    torch.set_num_threads(1)
    model = Twins(1)
    digests = [Twins(seed).digest() for seed in (1, 2)]
    receiver = weights.Receiver(model, path, timeout=LONG)
    now, version, broken, seconds = 0, 0, 0, []
    for offset in list(offsets(sessions[0], range(times))) * times:
        begin = time.perf_counter()
        before, receiver.last_error = receiver.version, None
        now, version = 1 - now, version + 1
        feed(receiver, sessions[now], version, offset)
        if receiver.version == version:  # the cut came after the last byte of the update
            assert (model.digest(), receiver.dirty) == (digests[now], False)
        else:
            assert type(receiver.last_error) in (weights.PeerLost, weights.ProtocolError)
            assert receiver.version == before
            assert receiver.dirty or model.digest() == digests[1 - now]
        if receiver.dirty:
            broken += 1
            answers = feed(receiver, sessions[now], version, partial=True)
            refused = wire.Failed.decode(next(f.body for f in answers if f.type is Type.FAILED))
            assert refused.code == weights.EngineDirty.code
            assert receiver.dirty
        version += 1
        feed(receiver, sessions[now], version)
        assert (receiver.version, receiver.dirty) == (version, False)
        assert model.digest() == digests[now]
        seconds.append(time.perf_counter() - begin)
    pipe.send((seconds, broken))


def feed(
    receiver: weights.Receiver,
    frames: list[wire.Frame],
    version: int,
    count: int = 1 << 30,
    partial: bool = False,
) -> list[wire.Frame]:
    """The first `count` bytes of a session, then the end of the connection; all answers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver._session = _Session(wire.Channel(theirs))
    for frame in frames:
        if frame.type is Type.BEGIN:
            body = dataclasses.replace(
                wire.Begin.decode(frame.body), version=version, partial=partial
            ).encode()
            frame = wire.Frame(frame.type, frame.transaction, body, frame.fds)
        data = frame.encode()[:count]
        count -= len(data)
        if data:
            socket.send_fds(ours, [data], frame.fds)
    ours.shutdown(socket.SHUT_WR)
    while receiver._session is not None:
        receiver.poll()  # everything is there
    channel, answers = wire.Channel(ours), []
    with contextlib.suppress(weights.PeerLost):
        while True:
            answers.append(channel.recv(0.0))
    channel.close()
    return answers
