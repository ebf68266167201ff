"""Frames and manifests that nobody sent: refused, or read as what they say, never a crash.

A mutation knows the form: it flips bits, cuts, extends, overwrites a field with an extreme value,
splices two frames; half of the time the CRC is made right again, so that bodies are reached.
Accepted means: what was read, written again, gives the same bytes.
"""

import random
import struct
import zlib
from collections import Counter

import pytest
import torch

from pyrlk.weights import ProtocolError, layout, memory, wire
from pyrlk.weights.wire import Frame, Type

BODIES = {
    Type.HELLO: wire.Hello(b"n" * 16),
    Type.WELCOME: wire.Welcome(b"b" * 16, -1, False, "module"),
    Type.SEGMENT: wire.SegmentInfo(1, memory.Handle(memory.Kind.HOST, 4096, b"i" * 16)),
    Type.OPENED: wire.Opened(3),
    Type.RETIRE: wire.Retire(True),
    Type.BEGIN: wire.Begin(7, True, wire.Verify.ENGINE, b"d" * 32, 99),
    Type.BUCKET: wire.Bucket(2, 1, 5, (1, 2**64 - 1)),
    Type.ACK: wire.Ack(2, 1, 5),
    Type.APPLIED: wire.Applied(7, 0.5, 0.25),
    Type.FAILED: wire.Failed(2, True, "naïve"),
}
SEEDS = [Frame(kind, 3, body.encode()).encode() for kind, body in BODIES.items()]
SEEDS += [Frame(Type.CHECKED, 1).encode(), Frame(Type.CLOSE, 2**64 - 1).encode()]
KNOWN = frozenset(SEEDS)
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]

LAYOUT = layout.plan(
    [
        layout.Spec("model.embed.weight", (7, 5), torch.bfloat16),
        layout.Spec("head", (7, 5), torch.bfloat16, alias=0),
        layout.Spec("ß", (3,), torch.uint8),
        layout.Spec("empty", (0, 4), torch.float32),
        layout.Spec("big", (300,), torch.float32),
        layout.Spec("own", (9,), torch.float32, direct=(1, 4)),
        layout.Spec("part of it", (2,), torch.float32, direct=(1, 8)),
    ],
    512,
    segments=[100, 64],
)


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        kind = rng.randrange(6)
        at = rng.randrange(len(data) + 1)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            size, form = rng.choice(((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")))
            value = rng.choice(EXTREMES) % (1 << 8 * size)
            data[at : at + size] = struct.pack(form, value)
        elif kind == 4:
            data[at:] = rng.choice(seeds)[at:]
        else:
            data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


def with_right_crc(data: bytes) -> bytes:
    """As a frame of that length by someone who knows the form."""
    size = wire._HEADER.size
    if len(data) < size:
        return data
    magic, protocol, kind, transaction, _, _ = wire._HEADER.unpack_from(data)
    body = data[size:]
    head = (magic, protocol, kind, transaction, len(body))
    crc = zlib.crc32(body, zlib.crc32(wire._HEADER.pack(*head, 0)))
    return wire._HEADER.pack(*head, crc) + body


def read_frame(data: bytes, seen: Counter, forged: bool) -> None:
    try:
        frame = Frame.decode(data)
    except ProtocolError:
        seen["refused"] += 1
        return
    assert frame.encode() == data
    # By chance alone a wrong CRC fits once in four billion times.
    assert forged or data in KNOWN, "accepted a frame that nobody wrote"
    body = BODIES.get(frame.type)
    if body is None:
        seen["frame without a body"] += 1
        return
    try:
        message = type(body).decode(frame.body)
    except ProtocolError:
        seen["body refused"] += 1
        return
    seen["accepted"] += 1
    if not isinstance(message, wire.Failed):  # its text is free, and only shown
        assert message.encode() == frame.body


@pytest.mark.parametrize(
    "count",
    [20_000, pytest.param(1_000_000, marks=[pytest.mark.endurance, pytest.mark.timeout(7200)])],
)
def test_frames(count):
    rng = random.Random(count)
    seen: Counter = Counter()
    for i in range(count):
        data = mutate(rng, SEEDS)
        forged = i % 2 == 1
        read_frame(with_right_crc(data) if forged else data, seen, forged)
    print(dict(seen))
    assert sum(seen.values()) == count
    assert min(seen["refused"], seen["body refused"], seen["accepted"]) > count // 100


@pytest.mark.parametrize(
    "count",
    [5_000, pytest.param(200_000, marks=[pytest.mark.endurance, pytest.mark.timeout(7200)])],
)
def test_manifests(count):
    rng = random.Random(count)
    seeds = [LAYOUT.encoded, layout.plan([], 1).encoded]
    seen: Counter = Counter()
    for _ in range(count):
        data = mutate(rng, seeds)
        try:
            read = layout.decode(data)
        except ProtocolError:
            seen["refused"] += 1
            continue
        seen["accepted"] += 1
        assert read.encoded == data
        for entry in read.entries:
            end = entry.offset + entry.nbytes
            assert entry.nbytes == 0 or end <= read.buckets[entry.bucket]
    print(dict(seen))
    assert seen["refused"] > count // 2
    assert seen["accepted"] > count // 1000
