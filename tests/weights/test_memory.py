import gc
import os
import subprocess
import sys
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlk import _C
from pyrlk.weights import ProtocolError, StagingError, Unsupported, memory


def truth(data: bytes) -> int:
    """The sum of csrc/memory/pack.h, in Python's own integers."""
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    return sum(w * (2 * i + 1) for i, w in enumerate(words)) % 2**64


# Every residue of the 64-byte line and the 4-byte word.
@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_cpp_torch_and_definition_agree_on_the_sum(data):
    tensor = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    assert _C.checksum(tensor.data_ptr(), len(data), array("Q", [0, len(data)]), 1) == [truth(data)]
    assert memory._numbers([memory._sum_of(tensor)]) == [truth(data)]


def test_the_torch_sum_crosses_its_chunks(monkeypatch):
    monkeypatch.setattr(memory, "_SUM_WORDS", 7)
    data = torch.randint(0, 256, (1001,), dtype=torch.uint8)
    assert memory._numbers([memory._sum_of(data)]) == [truth(bytes(data.tolist()))]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """torch cannot compare float8."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


# Contiguous, transposed, sliced, expanded, 0-d and empty sources of mixed dtypes.
def test_strided_tensors_arrive_as_their_values():
    sources = [
        torch.randn(7, 9),
        torch.randn(33, 65, dtype=torch.float64).t(),
        torch.randn(20, 40).to(torch.bfloat16)[::2, 3:30],
        torch.arange(6, dtype=torch.int64).expand(5, 6),
        torch.tensor(3.5, dtype=torch.float16),
        torch.zeros(0, 4),
        torch.randn(3, 4, 5, 6).permute(2, 0, 3, 1),
        torch.rand(50) > 0.5,
        torch.randn(13, 7).to(torch.float8_e4m3fn),
        torch.randint(0, 256, (11, 5), dtype=torch.uint8).t(),
    ]
    segment = memory.Host(1 << 20)
    offsets = [k << 16 for k in range(len(sources))]
    placed = list(zip(sources, offsets, strict=True))
    sums = segment.pack(memory.Copies(placed), checksum=True, threads=2)
    for (source, offset), got in zip(placed, sums, strict=True):
        view = segment.view(offset, tuple(source.shape), source.dtype)
        assert torch.equal(_plain(view), _plain(source))
        raw = source.contiguous().view(-1).view(torch.uint8) if source.numel() else source
        assert got == truth(bytes(raw.tolist()))
    # Back into strided destinations, with the same sums.
    targets = [torch.empty_strided(s.shape, s.stride(), dtype=s.dtype) for s in sources]
    targets[3] = torch.empty(5, 6, dtype=torch.int64)
    assert (
        segment.unpack(
            memory.Copies(list(zip(targets, offsets, strict=True))), checksum=True, threads=2
        )
        == sums
    )
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(_plain(target), _plain(source))
    segment.close()


def test_a_slot_is_freed_by_its_own_generation_only():
    ring = memory.Ring([memory.Host(4096), memory.Host(4096)])
    first = ring.free_slot()
    assert first is ring.slots[0]
    first.fill()
    with pytest.raises(ProtocolError):
        ring.ack(0, 1)  # not READY yet
    first.ready()
    for index, generation in [(0, 0), (0, 2), (1, 0), (5, 1)]:
        with pytest.raises(ProtocolError, match="never sent"):
            ring.ack(index, generation)
    assert ring.free_slot() is ring.slots[1]
    ring.ack(0, 1)
    with pytest.raises(ProtocolError):
        ring.ack(0, 1)
    first.fill()
    assert first.generation == 2
    ring.close()


def maps() -> int:
    with open("/proc/self/maps") as file:
        return sum("pyrlk-weights" in line for line in file)


def test_memory_is_unmapped_when_the_last_view_dies():
    gc.collect()
    before, fds = maps(), len(os.listdir("/proc/self/fd"))
    segment = memory.Host(1 << 16)
    opened = memory.open_segment(segment.handle, [segment.fd])
    view = opened.view(0, (4,), torch.float32)
    segment.pack(memory.Copies([(torch.arange(4.0), 0)]), checksum=False, threads=1)
    assert maps() == before + 2
    opened.close()
    segment.close()
    assert view.tolist() == [0, 1, 2, 3]  # still safe to read
    del view
    gc.collect()
    assert maps() == before
    assert len(os.listdir("/proc/self/fd")) == fds
    with pytest.raises(StagingError, match="closed"):
        _ = segment.flat


def test_what_does_not_fit_into_memory_is_an_error():
    with pytest.raises(StagingError, match=r"more than the free memory.*; lower bucket_bytes"):
        memory.Host(1 << 50)


def test_a_full_file_system_is_an_error_not_a_signal():
    # RLIMIT_FSIZE stands for the full tmpfs: posix_fallocate meets it before any byte is written.
    code = (
        "import resource; from pyrlk.weights import memory, StagingError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try: memory.Host(1 << 20)\n"
        "except StagingError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "posix_fallocate of 1048576 bytes" in out.stdout
    assert out.returncode == 0


def test_a_wrong_descriptor_is_refused():
    segment = memory.Host(8192)
    for fds in ([], [segment.fd, segment.fd]):
        with pytest.raises(ProtocolError, match="one descriptor"):
            memory.open_segment(segment.handle, fds)
    fd = os.memfd_create("x")
    os.truncate(fd, 8192)
    with pytest.raises(ProtocolError, match="not sealed"):
        memory.open_segment(segment.handle, [fd])
    os.close(fd)
    short = memory.Host(4096)
    with pytest.raises(ProtocolError, match="has 4096 bytes, announced are 8192"):
        memory.open_segment(segment.handle, [short.fd])
    short.close()
    segment.close()


def test_a_device_that_cannot_be_staged_is_named():
    tensors = [("a", torch.zeros(1)), ("b", torch.zeros(1, device="meta"))]
    with pytest.raises(Unsupported, match="'b' lies on meta"):
        memory.placement(tensors)
    assert memory.placement(tensors[:1]) == torch.device("cpu")
