"""The pack kernel: the bytes and the sums of the C++ packer."""

import itertools
from array import array

import pytest
import torch

from pyrlk.triton_kernels import pack
from pyrlk.weights import memory

GUARD = 0xA5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of a few hundred bytes then cross blocks and chunks."""
    monkeypatch.setattr(pack, "CHUNK", 256)
    monkeypatch.setattr(pack, "BLOCK", 8)
    monkeypatch.setattr(pack, "WORDS", 16)


def noise(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype)[..., 0]


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def packed(tensors, offsets, nbytes):
    """The buffer and sums that the C++ packer makes of them."""
    segment = memory.Host(nbytes)
    segment.flat.fill_(GUARD)
    copies = memory.Copies(list(zip(tensors, offsets, strict=True)))
    return segment.flat.clone(), segment.pack(copies, checksum=True, threads=1), segment.flat


def check(tensors, align=256):
    sizes = [-(-t.nbytes // align) * align for t in tensors]
    offsets = [0, *itertools.accumulate(sizes)]
    total = max(offsets.pop(), 1)
    ours, sums, theirs = packed(tensors, offsets, total)
    forms = [pack.form(t) for t in tensors]
    assert None not in forms
    pieces = pack.Pieces(forms, torch.device("cpu"))
    sources = [t.data_ptr() for t in tensors]
    places = [ours.data_ptr() + offset for offset in offsets]
    got = pieces.run(sources, places)
    assert torch.equal(ours, theirs)  # the bytes between tensors too
    assert memory._numbers(list(got)) == sums
    # Sums alone leave the buffer as it is; a copy alone makes the same bytes.
    ours.fill_(GUARD)
    assert memory._numbers(list(pieces.run(sources, places, copy=False))) == sums
    assert bool((ours == GUARD).all())
    assert pieces.run(sources, places, sums=False) is None
    assert torch.equal(ours, theirs)


# Every residue of the word and of the 16-byte group, below and above a chunk; and nothing at all.
@pytest.mark.parametrize("sizes", [[*range(36)], [255, 256, 257, 0, 1023, 1040], [0], []])
def test_bytes_and_sums_are_the_packers(sizes):
    check([noise(size) for size in sizes])


# Heads that are off 16 bytes, for every dtype with such a view.
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_sources_off_their_alignment(dtype):
    whole = noise(700, dtype=dtype)
    check([whole[start : start + size] for start in (0, 1, 3, 8) for size in (1, 5, 300)])


def test_places_off_their_alignment():
    # Unpacking goes into tensors wherever they lie.
    check([noise(size) for size in (3, 300, 17, 33)], align=1)


# Rows of contiguous bytes: multiples of 16, not, and from a base that is off; then merged dims.
def test_rows_of_a_wider_tensor():
    wide = noise(40, 64, dtype=torch.bfloat16)
    odd = noise(40, 37, dtype=torch.float8_e4m3fn)
    check(
        [
            wide[:, :32],
            wide[:, 8:40],
            wide[::3, 3:20],
            odd[:, 5:30],
            odd[5:9, :1],
            wide.view(8, 5, 64)[:, :, 16:48],
            wide[3].expand(6, 64),
            torch.tensor(7.0),
            wide[:0, :4],
        ]
    )


def test_other_strides_are_left_to_torch():
    assert pack.form(noise(4, 5, 6).transpose(0, 2)) is None
    assert pack.form(noise(9, 7, 7)[:, ::2, 1:3]) is None
    assert pack.form(noise(5, 6).t()) is None


def test_high_words_and_positions_wrap_as_the_packers_do():
    check([torch.full((4096,), 255, dtype=torch.uint8), torch.full((77,), -1, dtype=torch.int64)])


def test_a_segment_of_a_gpu_is_packed_summed_and_unpacked_by_it(monkeypatch):
    """memory.Segment around the kernel; what it cannot take is torch's."""
    wide = noise(12, 40, dtype=torch.bfloat16)
    tensors = [noise(300), wide[:, 3:20], noise(6, 7).t(), noise(0), torch.tensor(3.0), wide]
    offsets = [0, 512, 1024, 1280, 1280, 1536]
    copies = memory.Copies(list(zip(tensors, offsets, strict=True)))
    host = memory.Host(4096)
    wanted = host.pack(copies, checksum=True, threads=1)
    handle = memory.Handle(memory.Kind.CUDA, 4096, bytes(16))
    segment = memory.Segment(handle, torch.zeros(4096, dtype=torch.uint8), lambda: None)
    launches = []
    run = pack.Pieces.run
    monkeypatch.setattr(memory, "_kernel_on", lambda device: pack)
    monkeypatch.setattr(
        pack.Pieces, "run", lambda self, *a, **k: launches.append(1) or run(self, *a, **k)
    )
    assert segment.pack(copies, checksum=True, threads=1) == wanted
    assert len(launches) == 1
    assert copies.launch(pack, segment.flat.device, packs=True)[0] == [0, 1, 3, 4, 5]
    assert torch.equal(segment.flat, host.flat)
    assert segment.pack(copies, checksum=False, threads=1) == []
    ranges = array("Q", [n for t, o in zip(tensors, offsets, strict=True) for n in (o, t.nbytes)])
    assert segment.sums(ranges, threads=1) == wanted
    targets = [torch.zeros_like(t) for t in tensors]
    targets[0] = torch.zeros(301, dtype=torch.uint8)[1:]
    targets[1] = torch.zeros(12, 20, dtype=torch.bfloat16)[:, :17]  # rows: torch's
    into = memory.Copies(list(zip(targets, offsets, strict=True)))
    assert segment.unpack(into, checksum=True, threads=1) == wanted
    assert all(raw(a) == raw(b) for a, b in zip(targets, tensors, strict=True))
    with pytest.raises(ValueError, match="leave a segment of 4096"):
        segment.pack(memory.Copies([(noise(16), 4090)]), checksum=False, threads=1)


def test_tables_are_the_hosts_whatever_the_default_device_is():
    with torch.device("meta"):
        pieces = pack.Pieces([pack.Form(8), pack.Form(100)], torch.device("cpu"))
    assert pieces._table.tolist() == [[0, 0, 8, 0, 0, 0], [0, 0, 100, 0, 0, 1]]
    assert pieces._owner.tolist() == [0, 1]
