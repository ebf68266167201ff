import array
import os
import socket
import stat
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyrlk import weights
from pyrlk.weights import ProtocolError, memory, wire
from pyrlk.weights.wire import Frame, Type

FRAMES = st.builds(Frame, st.sampled_from(Type), st.integers(0, 2**64 - 1), st.binary(max_size=300))
BODIES = [
    wire.Hello,
    wire.Welcome,
    wire.SegmentInfo,
    wire.Opened,
    wire.Retire,
    wire.Begin,
    wire.Bucket,
    wire.Ack,
    wire.Applied,
    wire.Failed,
]
GOOD = [
    wire.Hello(b"n" * 16),
    wire.Welcome(b"b" * 16, -1, False, "module"),
    wire.SegmentInfo(1, memory.Handle(memory.Kind.HOST, 4096, b"i" * 16)),
    wire.Opened(3),
    wire.Retire(True),
    wire.Begin(7, True, wire.Verify.ENGINE, b"d" * 32, 99),
    wire.Bucket(2, 1, 5, (1, 2**64 - 1)),
    wire.Ack(2, 1, 5),
    wire.Applied(7, 0.5, 0.25),
    wire.Failed(2, True, "naïve"),
]


@given(FRAMES)
def test_a_frame_reads_back_as_it_was_written(frame):
    assert Frame.decode(frame.encode()) == frame


@given(FRAMES, st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_frame_is_never_accepted(frame, data):
    good = frame.encode()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    cut = good[: data.draw(st.integers(0, len(good) - 1))]
    for damaged in (bytes(bad), cut, good + b"\0"):
        with pytest.raises(ProtocolError):
            Frame.decode(damaged)


@given(st.binary(max_size=200))
def test_noise_is_no_frame(data):
    with pytest.raises(ProtocolError):
        Frame.decode(data)


@pytest.mark.parametrize("message", GOOD, ids=lambda m: type(m).__name__)
def test_a_body_reads_back_as_it_was_written(message):
    assert type(message).decode(message.encode()) == message


@pytest.mark.parametrize("kind", BODIES, ids=lambda k: k.__name__)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_body_is_refused_or_means_what_it_says(kind, data):
    good = next(m for m in GOOD if type(m) is kind).encode()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    for body in (bytes(bad), good[:-1], data.draw(st.binary(max_size=150))):
        try:
            read = kind.decode(body)
        except ProtocolError:
            continue
        if kind is not wire.Failed:  # its text is free, and only shown
            assert read.encode() == body


def test_the_socket_is_private(tmp_path):
    path = str(tmp_path / "new" / "s")
    with weights.Receiver(nn.Linear(1, 1), path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o700
        with pytest.raises(ValueError, match="in use"):
            weights.Receiver(nn.Linear(1, 1), path)
    assert not os.path.exists(path)


def test_a_directory_that_is_open_to_others_is_refused(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ValueError, match=r"mode 0755 .* use a directory of mode 0700"):
        weights.Receiver(nn.Linear(1, 1), folder / "s")


def test_a_long_path_is_refused_on_both_sides(tmp_path):
    path = tmp_path / ("x" * 108)
    with pytest.raises(ValueError, match="at most 107 bytes"):
        weights.Receiver(nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match="at most 107 bytes"):
        weights.Publisher(weights.Local(path))


def test_a_file_that_is_no_socket_stays(socket_path):
    with open(socket_path, "w") as file:
        file.write("keep")
    with pytest.raises(ValueError, match="in use"):
        weights.Receiver(nn.Linear(1, 1), socket_path)
    assert os.path.getsize(socket_path) == 4


def test_a_socket_left_behind_is_replaced(socket_path):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(socket_path)
    dead.close()
    weights.Receiver(nn.Linear(1, 1), socket_path).close()


def test_another_user_is_refused(monkeypatch):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(ProtocolError, match=f"runs as uid {uid}"):
        wire.Channel(left)
    right.close()


def test_surplus_descriptors_are_closed_not_leaked():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = wire.Channel(left)
    before = len(os.listdir("/proc/self/fd"))
    fds = array.array("i", [0, 1, 2])
    data = Frame(Type.CLOSE).encode()
    right.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(ProtocolError):
        channel.recv(time.monotonic() + 1)
    assert len(os.listdir("/proc/self/fd")) == before
    right.close()
    channel.close()


def test_a_wait_ends_at_its_deadline():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = wire.Channel(left)
    start = time.monotonic()
    with pytest.raises(weights.Timeout):
        channel.recv(start + 0.1)
    assert 0.1 <= time.monotonic() - start < 1.0
    right.close()
    with pytest.raises(weights.PeerLost):
        channel.recv(time.monotonic() + 5)
    channel.close()


@pytest.mark.parametrize("ours", [True, False])
def test_a_channel_closed_by_either_side_is_not_alive(ours):
    left, right = (
        wire.Channel(s) for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    )
    assert left.alive()
    assert right.alive()
    (left if ours else right).close()
    assert not left.alive()
    assert not right.alive()
    left.close()
    right.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"x" * 40,
        Frame(Type.BUCKET, 1, wire.Bucket(0, 0, 1, ()).encode()).encode(),
        Frame(
            Type.BEGIN, 1, wire.Begin(1, False, wire.Verify.COPY, b"d" * 32, 0).encode()
        ).encode(),
        Frame(Type.HELLO, 0, b"short").encode(),
        b"x" * 70000,
    ],
    ids=["noise", "bucket first", "begin first", "short hello", "too long"],
)
def test_a_receiver_drops_a_stranger_and_goes_on(socket_path, serving, noise):
    model, wanted = nn.Linear(4, 4), nn.Linear(4, 4)
    with serving(weights.Receiver(model, socket_path)) as receiver:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(socket_path)
            stranger.send(noise)
            stranger.settimeout(5)
            assert Frame.decode(stranger.recv(70000)).type is Type.FAILED
            assert stranger.recv(70000) == b""
        assert isinstance(receiver.last_error, ProtocolError)
        with weights.Publisher(weights.Local(socket_path)) as publisher:
            publisher.update(wanted, version=1)
    assert torch.equal(model.weight, wanted.weight)


def test_a_manifest_that_could_change_is_refused():
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"abcd")
    with pytest.raises(ProtocolError, match="sealed: False"):
        wire.read_manifest(fd, 4)
    os.close(fd)
    fd = wire.manifest_fd(b"abcd")
    assert wire.read_manifest(fd, 4) == b"abcd"
    with pytest.raises(ProtocolError, match="4 bytes of 5"):
        wire.read_manifest(fd, 5)
    os.close(fd)


def test_every_frame_leads_to_a_state():
    assert set(wire._STATE_AFTER) == set(Type)
    reached = {wire.State.CONNECTED, *wire._STATE_AFTER.values()}
    assert reached == set(wire.State)
