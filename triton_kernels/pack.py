"""Many tensors → one buffer, or back, in one launch, with the sum of each tensor on the way.

    dst[k] = src[(k // run)·stride + k mod run]        k: the bytes of a tensor in logical order
    S      = Σ_i w_i · (2i + 1)  mod 2^64              w_i: their little-endian 32-bit words, the
                                                       last one padded with zeros

The sum is the one of csrc/memory/pack.h. A row of the table is a tensor: address of src, address of
dst, bytes, run, stride, first chunk; run 0 is one run. A chunk is CHUNK bytes of one tensor and the
work of one program; `owner` says which tensor. Where addresses, run and stride are multiples of 16
bytes, 16 go at a time, else one. Sums are integers: the order of the programs changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 1 << 16
# Groups of 16 bytes, and words, that a program takes at a time: four wide loads a thread.
BLOCK = 1024
WORDS = 256
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
_COLUMNS = tl.constexpr(6)


@triton.jit
def _source(src, k, run, stride):
    """Addresses of logical bytes."""
    address = src + k
    if run != 0:
        row = k // run
        address = src + row * stride + (k - row * run)
    return address


@triton.jit
def _copy_bytes(
    src, dst, begin, end, run, stride, WORDS: tl.constexpr, COPY: tl.constexpr, SUM: tl.constexpr
):
    """Logical bytes [begin, end) one at a time; their share of the sum. 4 divides begin."""
    total = tl.zeros([], tl.int64)
    byte = tl.arange(0, 4).to(tl.int64)[None, :]
    for start in range(begin, end, 4 * WORDS):
        word = start // 4 + tl.arange(0, WORDS).to(tl.int64)[:, None]
        k = word * 4 + byte
        inside = k < end
        source = _source(src, k, run, stride).to(tl.pointer_type(tl.uint8))
        data = tl.load(source, mask=inside, other=0)
        if COPY:
            tl.store((dst + k).to(tl.pointer_type(tl.uint8)), data, mask=inside)
        if SUM:
            total += tl.sum(tl.sum((data.to(tl.int64) << (8 * byte)) * (2 * word + 1), 1), 0)
    return total


@triton.jit
def _copy_groups(
    src, dst, begin, end, run, stride, BLOCK: tl.constexpr, COPY: tl.constexpr, SUM: tl.constexpr
):
    """The same, 16 bytes at a time: 16 divides all arguments."""
    sums = tl.zeros([BLOCK, 4], tl.int64)
    lane = tl.arange(0, 4)[None, :]
    for start in range(begin, end, 16 * BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64) * 16
        inside = (k < end)[:, None]
        source = _source(src, k, run, stride)[:, None].to(tl.pointer_type(tl.int32)) + lane
        words = tl.load(tl.multiple_of(source, [16, 16]), mask=inside, other=0)
        if COPY:
            place = (dst + k)[:, None].to(tl.pointer_type(tl.int32)) + lane
            tl.store(tl.multiple_of(place, [16, 16]), words, mask=inside)
        if SUM:
            weight = 2 * ((k // 4)[:, None] + lane) + 1
            sums += (words.to(tl.int64) & 0xFFFFFFFF) * weight
    return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def pack_fwd_kernel(
    table_ptr,
    owner_ptr,
    sums_ptr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    COPY: tl.constexpr,
    SUM: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    piece = tl.load(owner_ptr + chunk)
    row_ptr = table_ptr + piece.to(tl.int64) * _COLUMNS
    src, dst = tl.load(row_ptr), tl.load(row_ptr + 1)
    nbytes = tl.load(row_ptr + 2)
    run, stride = tl.load(row_ptr + 3), tl.load(row_ptr + 4)
    begin = (chunk - tl.load(row_ptr + 5)) * CHUNK
    end = tl.minimum(begin + CHUNK, nbytes)
    wide = begin
    total = tl.zeros([], tl.int64)
    if (src | dst | run | stride) % 16 == 0:
        wide = end // 16 * 16
        total += _copy_groups(src, dst, begin, wide, run, stride, BLOCK, COPY, SUM)
    total += _copy_bytes(src, dst, wide, end, run, stride, WORDS, COPY, SUM)
    if SUM:
        tl.atomic_add(sums_ptr + piece, total, sem="relaxed")


class Form(NamedTuple):
    """How the bytes of a tensor lie: `nbytes` in runs, `stride` bytes apart; run 0 is one run."""

    nbytes: int
    run: int = 0
    stride: int = 0


def form(tensor: torch.Tensor) -> Form | None:
    """None for a tensor that is more than rows of contiguous bytes."""
    run, outer = tensor.element_size(), None
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        stride *= tensor.element_size()
        if size == 1:
            continue
        if outer is None and stride == run:
            run *= size
        elif outer is None:
            outer = (size, stride)
        elif stride == outer[0] * outer[1]:
            outer = (outer[0] * size, outer[1])
        elif tensor.numel():
            return None
    if outer is None or not tensor.numel():
        return Form(tensor.nbytes)
    return Form(tensor.nbytes, run, outer[1])


def _table(numbers: Sequence) -> torch.Tensor:
    """Of the host, whatever the user's default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class Pieces:
    """Tensors of known forms; from launch to launch only addresses change."""

    def __init__(self, forms: Sequence[Form], device: torch.device):
        self._device = device
        self._on_device = torch.zeros(0, device="cpu")
        counts = _table([-(-f.nbytes // CHUNK) for f in forms])
        first = counts.cumsum(0) - counts
        self._table = _table([0] * _COLUMNS.value).repeat(len(forms), 1)
        self._table[:, 2:5] = _table(forms).reshape(-1, 3)
        self._table[:, 5] = first
        numbers = torch.arange(len(forms), dtype=torch.int32, device="cpu")
        self._owner = numbers.repeat_interleave(counts).to(device)

    def run(
        self, sources: Iterable[int], places: Iterable[int], *, copy: bool = True, sums: bool = True
    ) -> torch.Tensor | None:
        """Copy from and to these addresses, one launch on the current stream.

        Returns the sums, int64 [pieces] on the device, or None without `sums`.
        """
        self._table[:, 0] = _table(list(sources))
        self._table[:, 1] = _table(list(places))
        self._on_device = self._table.to(self._device)
        return self.launch(copy=copy, sums=sums)

    def launch(self, *, copy: bool = True, sums: bool = True) -> torch.Tensor | None:
        """The last `run` again."""
        table = self._on_device
        total = table.new_zeros(len(table))
        if self._owner.numel():
            with torch.cuda.device_of(table):
                pack_fwd_kernel[(self._owner.numel(),)](
                    table, self._owner, total, CHUNK, BLOCK, WORDS, copy, sums, **LAUNCH
                )
        return total if sums else None
