"""Kept sets as CSR: what a sampler kept is what the trainer's distribution is over.

Truncated sampling draws from π restricted to a kept set S and renormalised. Replayed on S,
    log π_S(a) = z_a/τ − logsumexp_{i∈S} z_i/τ,   H_S, and gradients that are 0 outside S
make ratios of new and old policy unbiased; on the whole vocabulary they are not.
"""

from __future__ import annotations

import itertools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check


class Support(NamedTuple):
    """Kept token ids as CSR: row b keeps ids[offsets[b] : offsets[b + 1]], ascending.

    ids: int32 [N]; offsets: int64 [B + 1]. On CUDA `ids` is a buffer of host-known size, of which
    offsets[-1] entries are in use. bits: int32 [B, ceil(V/32)] or None; a row that ends beyond the
    buffer, offsets[b + 1] > N, is there instead (status OVERFLOW): bit i of word w is token
    32·w + i. `trim()` turns these rows into ids. On the CPU the losses and log-probs do so by
    themselves; on CUDA, where that would wait for the device, such a row gives NaN until you have
    called it, and under PYRLK_CHECK=1 a ValueError.
    """

    ids: Tensor
    offsets: Tensor
    bits: Tensor | None = None

    def rows(self) -> list[list[int]]:
        """The kept ids of every row, on the host: the format of vLLM, SGLang and slime."""
        ids, offsets, _ = self.trim()
        flat, ends = ids.tolist(), offsets.tolist()
        return [flat[a:b] for a, b in itertools.pairwise(ends)]

    def counts(self) -> Tensor:
        """int64 [B]: how many tokens each row keeps."""
        return self.offsets.diff()

    def to_mask(self, vocab_size: int) -> Tensor:
        """bool [B, V]: True where a token was kept."""
        if _check.integer("vocab_size", vocab_size) < 1:
            raise ValueError(f"vocab_size must be ≥ 1, got {vocab_size}")
        capacity, count = self.ids.numel(), self.offsets.numel() - 1
        slots = torch.arange(capacity, device=self.ids.device)
        row = torch.searchsorted(self.offsets[1:], slots, right=True)
        ends = torch.nn.functional.pad(self.offsets[1:], (0, 1), value=capacity + 1)
        used = ends[row] <= capacity
        ids = torch.where(used, self.ids, 0)
        if ids.is_cpu and capacity and ids.max() >= vocab_size:
            raise ValueError(f"vocab_size must exceed every id, got {vocab_size}")
        mask = torch.zeros(count + 1, vocab_size, dtype=torch.bool, device=ids.device)
        mask[torch.where(used, row, count), ids] = True
        mask = mask[:count]
        if self.bits is None:
            return mask
        return torch.where(self._in_bits()[:, None], _unpack(self.bits, vocab_size), mask)

    def to_padded(self, width: int | None = None, fill: int = -1) -> Tensor:
        """int32 [B, width]: the ids of a row, then `fill`. Width: that of the longest row."""
        ids, offsets, _ = self.trim()
        counts = offsets.diff()
        longest = int(counts.max()) if counts.numel() else 0
        if width is None:
            width = longest
        elif _check.integer("width", width) < longest:
            raise ValueError(f"width must be at least {longest} (the longest row), got {width}")
        at = torch.arange(width, device=ids.device)
        padded = torch.full((counts.numel(), width), fill, dtype=torch.int32, device=ids.device)
        padded[at < counts[:, None]] = ids
        return padded

    def to_bits(self, vocab_size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """int32 [B, ceil(V/32)] (xgrammar, SGLang) or uint8 [B, ceil(V/8)] (vLLM, numpy).

        Bit i of word w is token 32·w + i (8·w + i).
        """
        if dtype not in (torch.int32, torch.uint8):
            raise TypeError(f"dtype must be torch.int32 or torch.uint8, got {dtype}")
        mask, size = self.to_mask(vocab_size), 8 * dtype.itemsize
        octets = torch.nn.functional.pad(mask, (0, -vocab_size % size)).unflatten(-1, (-1, 8))
        weights = 1 << torch.arange(8, device=mask.device, dtype=torch.uint8)
        return (octets * weights).sum(-1, dtype=torch.uint8).view(dtype)

    def trim(self) -> Support:
        """The same as ids alone, without unused entries. On CUDA this synchronises."""
        used = self.offsets[1:] <= self.ids.numel()
        first = int(used.sum())  # the rows beyond the buffer are the last ones
        begin = int(self.offsets[first])
        if self.bits is None or first == used.numel():
            return Support(self.ids[: int(self.offsets[-1])], self.offsets)
        there = _unpack(self.bits[first:], 32 * self.bits.shape[1])
        there &= self._in_bits()[first:, None]
        return Support(torch.cat([self.ids[:begin], _ids(there)]), self.offsets)

    def _in_bits(self) -> Tensor:
        return (self.offsets[1:] > self.ids.numel()) & (self.counts() > 0)

    @staticmethod
    def from_lists(rows, device=None) -> Support:
        """From one list of ids a row, in any order (the answers of vLLM, SGLang, slime)."""
        try:
            ascending = [sorted(operator.index(i) for i in row) for row in rows]
        except TypeError as error:
            raise TypeError(f"rows must be lists of integer ids, one a row: {error}") from None
        for b, row in enumerate(ascending):
            if len(set(row)) != len(row) or (row and not 0 <= row[0] <= row[-1] < 1 << 31):
                raise ValueError(f"rows[{b}] must hold distinct ids in [0, 2^31), got {row}")
        offsets = torch.tensor([0, *(len(row) for row in ascending)], dtype=torch.int64).cumsum(0)
        ids = torch.tensor([i for row in ascending for i in row], dtype=torch.int32)
        return Support(ids.to(device), offsets.to(device))

    @staticmethod
    def from_flat(ids, *, offsets=None, lengths=None, device=None) -> Support:
        """From the ids of all rows in a row, in any order within one.

        Tensors, numpy arrays or lists. Where a row ends is told by offsets [B + 1], beginning with
        0 (vLLM's and slime's `token_ids`, `offsets`), or by lengths [B] (SGLang's `lengths`,
        `token_ids`).
        """
        if (offsets is None) == (lengths is None):
            raise TypeError("from_flat wants either offsets or lengths")
        ids = _integers("ids", ids, device)
        if offsets is None:
            offsets = _offsets(_integers("lengths", lengths, ids.device))
        offsets = _integers("offsets", offsets, ids.device)
        if offsets.numel() < 1 or int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must rise from 0 (lengths must be ≥ 0)")
        if int(offsets[-1]) != ids.numel():
            raise ValueError(f"offsets must end at {ids.numel()} (ids), got {int(offsets[-1])}")
        outside = (ids < 0) | (ids > _LAST)
        if bool(outside.any()):
            raise ValueError(f"ids must lie in [0, 2^31), got {int(ids[outside][0])}")
        row = torch.searchsorted(
            offsets[1:], torch.arange(ids.numel(), device=ids.device), right=True
        )
        ordered = (row << 32 | ids).sort().values
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError("ids must be distinct within a row")
        return Support((ordered & 0xFFFFFFFF).to(torch.int32), offsets)

    @staticmethod
    def from_padded(ids: Tensor) -> Support:
        """From padded ids [..., K], −1 where there is none, in any order; one row a token."""
        flat = _rows("ids", ids)
        if flat.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be int64 or int32, got {flat.dtype}")
        if flat.is_cpu and bool((flat > _LAST).any()):
            raise ValueError(f"ids must be less than 2^31, got {int(flat.max())}")
        present = flat >= 0
        return _csr(torch.where(present, flat, _LAST).sort(-1).values, present.sum(-1))

    @staticmethod
    def from_mask(mask: Tensor) -> Support:
        """From a bool mask [..., V]; one row a token."""
        flat = _rows("mask", mask)
        if flat.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {flat.dtype}")
        return Support(_ids(flat), _offsets(flat.sum(-1)))

    @staticmethod
    def from_bits(bits: Tensor, vocab_size: int) -> Support:
        """From int32 [..., ceil(V/32)] or uint8 [..., ceil(V/8)]: as `to_bits` makes them."""
        words = _rows("bits", bits)
        if _check.integer("vocab_size", vocab_size) < 1:
            raise ValueError(f"vocab_size must be ≥ 1, got {vocab_size}")
        size = 8 * words.dtype.itemsize
        if words.dtype not in (torch.int32, torch.uint8) or size * words.shape[-1] < vocab_size:
            raise ValueError(
                f"bits must be int32 [..., {-(-vocab_size // 32)}] or uint8 "
                f"[..., {-(-vocab_size // 8)}] for vocab_size {vocab_size}, "
                f"got {words.dtype} {list(bits.shape)}"
            )
        return Support.from_mask(_unpack(words, vocab_size))


_LAST = torch.iinfo(torch.int32).max


def _rows(name: str, x) -> Tensor:
    """[..., K] as [rows, K]."""
    if _check.tensor(name, x).dim() < 1:
        raise ValueError(f"{name} must have shape [..., K], got {list(x.shape)}")
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _ids(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 1].to(torch.int32)


def _unpack(bits: Tensor, vocab: int) -> Tensor:
    """bool [B, V] from words [B, ≥ V / bits of a word]."""
    shifts = torch.arange(8 * bits.dtype.itemsize, device=bits.device, dtype=bits.dtype)
    return (bits[..., None] >> shifts & 1).flatten(-2)[:, :vocab].bool()


def _integers(name: str, x, device) -> Tensor:
    x = torch.as_tensor(x, device=device)
    if x.numel() == 0:
        x = x.to(torch.int64)
    if x.dim() != 1 or x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be one-dimensional integers, got {x.dtype} {list(x.shape)}")
    return x.to(torch.int64)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.to(torch.int64).cumsum(0), (1, 0))


def _csr(ascending: Tensor, counts: Tensor) -> Support:
    slots = torch.arange(ascending.shape[-1], device=ascending.device)
    return Support(ascending[slots < counts[:, None]].to(torch.int32), _offsets(counts))


def check(
    support, z: Tensor, shape, other_name: str = "logits"
) -> tuple[Tensor | None, Tensor | None]:
    """(ids, offsets) of a support argument for tokens of `shape`, or (None, None)."""
    if support is None:
        return None, None
    if not isinstance(support, Support):
        raise TypeError(
            f"support must be a pyrlk.Support or None, got {type(support).__name__}; "
            "see Support.from_lists, from_padded, from_mask, from_bits"
        )
    if support.bits is not None and z.device.type == "cpu":
        support = support.trim()
    if support.bits is not None and not torch.compiler.is_compiling() and _check.reads_values(z):
        overflows = support._in_bits()
        if bool(overflows.any()):
            raise ValueError(
                f"support: row {int(overflows.int().argmax())} is bits (status OVERFLOW), which on "
                "CUDA gives NaN; pass support.trim(), or sample with a larger support_capacity"
            )
    ids, offsets = (
        _check.like(f"support.{n}", getattr(support, n), z, other_name) for n in ("ids", "offsets")
    )
    if ids.dtype != torch.int32 or ids.dim() != 1 or not ids.is_contiguous():
        raise TypeError(
            f"support.ids must be contiguous int32 [N], got {ids.dtype} {list(ids.shape)}"
        )
    if offsets.dtype != torch.int64 or not offsets.is_contiguous():
        raise TypeError(f"support.offsets must be contiguous int64, got {offsets.dtype}")
    if offsets.shape != (shape.numel() + 1,):
        raise ValueError(
            f"support.offsets must have shape [{shape.numel() + 1}] for {shape.numel()} tokens, "
            f"got {list(offsets.shape)}"
        )
    return ids, offsets


def pair(ids: Tensor | None, offsets: Tensor | None) -> Support | None:
    """The support of an op from its two schema arguments; None is the whole vocabulary."""
    return None if ids is None or offsets is None else Support(ids, offsets)


def addresses(kept: Support | None) -> tuple[int, int]:
    return (0, 0) if kept is None else (kept.ids.data_ptr(), kept.offsets.data_ptr())


def check_values(kept: Support | None, vocab: int) -> None:
    """On CPU: offsets rise from 0 within ids; ids lie in [0, vocab) and ascend in a row."""
    if kept is None:
        return
    ids, offsets = kept.ids, kept.offsets
    fall = offsets[1:] < offsets[:-1]
    if int(offsets[0]) != 0 or bool(fall.any()) or int(offsets[-1]) > ids.numel():
        raise ValueError(
            f"support.offsets must rise from 0 to at most {ids.numel()} (the number of ids)"
        )
    used = ids[: int(offsets[-1])]
    outside = (used < 0) | (used >= vocab)
    if bool(outside.any()):
        at = int(outside.to(torch.int8).argmax())
        raise ValueError(f"support.ids[{at}] = {int(used[at])} is outside [0, {vocab})")
    first = torch.zeros(used.numel() + 1, dtype=torch.bool, device=ids.device)
    first[offsets] = True
    unordered = (used[1:] <= used[:-1]) & ~first[1 : used.numel()]
    if bool(unordered.any()):
        at = int(unordered.to(torch.int8).argmax()) + 1
        raise ValueError(
            f"support.ids[{at}] = {int(used[at])} must be greater than the id before it"
        )


def take(kept: Support | None, rows: slice | Tensor) -> Support | None:
    """The kept sets of some rows: a slice shares the ids, an index gathers them.

    Without a synchronisation, so into a buffer of the old size; a set outside its ids is empty.
    """
    if kept is None:
        return None
    ids, offsets = kept.ids, kept.offsets
    if isinstance(rows, slice):
        return Support(ids, offsets[rows.start : rows.stop + 1])
    first, last = offsets[:-1][rows], offsets[1:][rows]
    sound = (first >= 0) & (first <= last) & (last <= ids.numel())
    taken = _offsets(torch.where(sound, last - first, 0))
    if rows.numel() == 0 or ids.numel() == 0:
        return Support(ids, taken)
    slots = torch.arange(ids.numel(), device=ids.device)
    row = torch.searchsorted(taken[1:], slots, right=True).clamp(max=rows.numel() - 1)
    source = (first[row] + slots - taken[row]).clamp(0, ids.numel() - 1)
    return Support(ids[source], taken)


def columns(kept: Support, first: int, end: int) -> Support:
    """The kept ids in [first, end), numbered from first on; never waits for the device."""
    ids, offsets = kept.ids, kept.offsets
    inside = (ids >= first) & (ids < end)
    before = _offsets(inside)
    slots = torch.where(inside, before[:-1], ids.numel())
    taken = ids.new_zeros(ids.numel() + 1).scatter_(0, slots, ids - first)
    return Support(taken[:-1], before[offsets.clamp(0, ids.numel())])


def _row_of(kept: Support) -> Tensor:
    """The row of each id; the number of rows where it belongs to none."""
    slots = torch.arange(kept.ids.numel(), device=kept.ids.device)
    return torch.searchsorted(kept.offsets[1:].contiguous(), slots, right=True)


def _some_in_row(flags: Tensor, row: Tensor, count: int) -> Tensor:
    """bool [count]: whether a row has an id whose flag is set."""
    hits = torch.zeros(count + 1, dtype=torch.int32, device=flags.device)
    return hits.index_add_(0, row, flags.to(torch.int32))[:-1] > 0


def holds(kept: Support, tokens: Tensor) -> Tensor:
    """bool [T]: whether each token is in its kept set; never waits for the device."""
    row, count = _row_of(kept), tokens.numel()
    if count == 0:
        return tokens != tokens
    return _some_in_row(kept.ids == tokens[row.clamp(max=count - 1)], row, count)


def sound(kept: Support, vocab: int) -> Tensor:
    """bool [T]: `check_values` of each row, without waiting for the device."""
    ids, offsets = kept.ids, kept.offsets
    first, last = offsets[:-1], offsets[1:]
    right = (first >= 0) & (first <= last) & (last <= ids.numel())
    row, slots = _row_of(kept), torch.arange(ids.numel(), device=ids.device)
    begins = slots == offsets[row.clamp(max=first.numel())]
    unordered = torch.nn.functional.pad(ids[1:] <= ids[:-1], (1, 0))[: ids.numel()] & ~begins
    return right & ~_some_in_row((ids < 0) | (ids >= vocab) | unordered, row, first.numel())
