"""_C.Replay: casts and strided copies are torch's, bit for bit."""

from array import array

import pytest
import torch

from pyrlk import _C

FORMATS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def run(source, copies, threads=1):
    numbers = array("Q")
    for target, view in copies:
        same = target.dtype == view.dtype
        kinds = (0, 0) if same else (FORMATS[view.dtype], FORMATS[target.dtype])
        offset = view.data_ptr() - source.data_ptr()
        numbers.extend((target.data_ptr(), offset, view.element_size(), *kinds, target.ndim))
        for part in (target.shape, view.stride(), target.stride()):
            numbers.extend(part)
    replay = _C.Replay(array("Q"), numbers)
    return replay.run(source.data_ptr(), source.nbytes, False, threads)


def hard_values(dtype):
    """All of a 16-bit format; of float32 random bits, and the edges of float16's range."""
    if dtype != torch.float32:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 17,), generator=gen).to(torch.int32)
    near = torch.tensor([65504.0, 65519.996, 65520.0, 2**-14, 2**-24, 2**-25, 1.5 * 2**-25])
    steps = torch.arange(-3, 4).to(torch.int32)
    edges = (near.view(torch.int32)[:, None] + steps).flatten().view(torch.float32)
    small = torch.randn(1 << 16, generator=gen) * 2.0**-16
    return torch.cat([bits.view(torch.float32), edges, -edges, small])


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_casts_round_as_torch_does(dtype, to):
    source = hard_values(dtype)
    target = torch.empty(source.shape, dtype=to)
    run(source, [(target, source)])
    wanted = source.to(to)
    bits = torch.int32 if to == torch.float32 else torch.int16
    equal = (target.view(bits) == wanted.view(bits)) | (target.isnan() & wanted.isnan())
    assert equal.all()


# Rows, columns, a transpose, a broadcast, one element, and enough bytes for two threads.
VIEWS = {
    "rows": lambda t: t[3:40],
    "columns": lambda t: t[:, 5:21],
    "transpose": lambda t: t.t(),
    "steps": lambda t: t[::2, ::3],
    "broadcast": lambda t: t[7].expand(9, t.shape[1]),
    "one": lambda t: t[2, 3],
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_copies_go_where_copy_puts_them(view, dtype):
    source = (torch.arange(64 * 48).reshape(64, 48) % 251).to(dtype)
    part = VIEWS[view](source)
    home, wanted = (torch.full((2 * part.numel() + 7,), 99, dtype=dtype) for _ in range(2))
    target = home[3 : 3 + 2 * part.numel() : 2].view(part.shape)
    run(source, [(target, part)])
    wanted[3 : 3 + 2 * part.numel() : 2].view(part.shape).copy_(part)
    assert torch.equal(home, wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_copies_are_shared_by_threads(threads):
    source = torch.randint(0, 1 << 30, (3000, 1025), dtype=torch.int32)
    target = torch.zeros(2 * 3000, 1000, dtype=torch.int32)
    long = torch.zeros(3000 * 1025, dtype=torch.int32)
    copies = [(target[::2], source[:, 25:]), (long, source.view(-1))]
    run(source, copies, threads)
    assert torch.equal(target[::2], source[:, 25:])
    assert not target[1::2].any()
    assert torch.equal(long, source.view(-1))


def test_a_source_outside_the_buffer_is_refused():
    source = torch.zeros(100)
    target = torch.zeros(100)
    with pytest.raises(ValueError, match="leaves the buffer"):
        run(source[:99], [(target, source)])
    numbers = array("Q", [target.data_ptr(), 0, 4, 0, 1, 1, 4, 1, 1])
    with pytest.raises(ValueError, match="formats"):
        _C.Replay(array("Q"), numbers).run(source.data_ptr(), source.nbytes, False, 1)
    with pytest.raises(ValueError, match="cut short"):
        _C.Replay(array("Q"), numbers[:-1])
