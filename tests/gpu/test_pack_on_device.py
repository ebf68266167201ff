"""The pack kernel on a device: bytes and sums of the C++ packer, one launch, strided and odd.

A dry run of it needs the fake driver too (PYRLK_LIBCUDA).
"""

import os

import pytest
import torch
from dry_device import DRY, size

pytest.importorskip("triton")

from pyrlk.weights import memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(DRY and "PYRLK_LIBCUDA" not in os.environ, reason="no driver"),
]


def noise(*shape, dtype=torch.uint8):
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)[..., 0]


def raw(tensor):
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


# Below and above a chunk, off 16 bytes, rows, other strides, nothing, a tensor of the host.
@pytest.mark.parametrize("checksum", [True, False])
def test_a_segment_is_what_the_cpu_packs(checksum):
    torch.manual_seed(0)
    wide = noise(300, 1024, dtype=torch.bfloat16)
    sources = [
        noise(size(1 << 22, 1 << 17)),
        noise((1 << 16) + 7, dtype=torch.float8_e4m3fn),
        noise(1001, dtype=torch.bfloat16)[1:],
        wide[:, :512],
        wide[::3, 3:20],
        noise(33, 65, dtype=torch.float64).t(),
        noise(0),
        torch.tensor(3.5),
        noise(77),
    ]
    offsets, end = [], 0
    for tensor in sources:
        offsets.append(end)
        end += -(-tensor.nbytes // 256) * 256
    # Views stay views: `cuda()` of a slice would make it dense.
    moved = {id(wide): wide.cuda()}
    there = [t.cuda() for t in sources]
    there[2] = torch.nn.functional.pad(sources[2], (1, 0)).cuda()[1:]
    there[3], there[4] = moved[id(wide)][:, :512], moved[id(wide)][::3, 3:20]
    there[5] = sources[5].t().contiguous().cuda().t()
    there[-1] = sources[-1]
    host = memory.Host(end)
    wanted = host.pack(
        memory.Copies(list(zip(sources, offsets, strict=True))), checksum=checksum, threads=1
    )
    segment = memory.Cuda(0, end)
    copies = memory.Copies(list(zip(there, offsets, strict=True)))
    try:
        assert segment.pack(copies, checksum=checksum, threads=1) == wanted
        for tensor, offset in zip(sources, offsets, strict=True):
            place = segment.flat[offset : offset + tensor.nbytes]
            assert torch.equal(raw(place), raw(tensor))
        targets = [torch.zeros_like(t) for t in there]
        into = memory.Copies(list(zip(targets, offsets, strict=True)))
        assert segment.unpack(into, checksum=checksum, threads=1) == wanted
        segment.finish()
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(targets, sources, strict=True))
    finally:
        segment.close()


@pytest.mark.skipif(DRY, reason="nothing is timed")
def test_packing_runs_at_the_speed_of_a_copy():
    """18,867 tensors in buckets of 4,096, against one copy of the same bytes."""
    tensors = [torch.empty(48 << 10, dtype=torch.uint8, device="cuda") for _ in range(4096)]
    copies = memory.Copies([(t, i * (48 << 10)) for i, t in enumerate(tensors)])
    nbytes = 4096 * (48 << 10)
    segment = memory.Cuda(0, nbytes)
    plain, other = (torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))

    def milliseconds(run):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(20):
            begin.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end))
        return best

    try:
        kernel, device = memory._kernel_on(segment.flat.device), segment.flat.device
        _, pieces = copies.launch(kernel, device, packs=True)
        there = [t.data_ptr() for t in tensors]
        here = [segment.flat.data_ptr() + offset for offset in copies.offsets]
        pieces.run(there, here)
        launch = milliseconds(pieces.launch)
        assert launch <= milliseconds(lambda: plain.copy_(other)) / 0.9
    finally:
        segment.close()
