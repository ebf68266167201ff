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
    offsets[-1] entries are in use.
    """

    ids: Tensor
    offsets: Tensor

    def rows(self) -> list[list[int]]:
        """The kept ids of every row, on the host."""
        ids, offsets = self.ids.tolist(), self.offsets.tolist()
        return [ids[a:b] for a, b in itertools.pairwise(offsets)]

    def to_mask(self, vocab_size: int) -> Tensor:
        """bool [B, V]: True where a token was kept."""
        if _check.integer("vocab_size", vocab_size) < 1:
            raise ValueError(f"vocab_size must be ≥ 1, got {vocab_size}")
        if self.ids.is_cpu and self.ids.numel() and self.ids.max() >= vocab_size:
            raise ValueError(f"vocab_size must exceed every id, got {vocab_size}")
        count = self.offsets.numel() - 1
        slots = torch.arange(self.ids.numel(), device=self.ids.device)
        row = torch.searchsorted(self.offsets[1:], slots, right=True)
        mask = torch.zeros(count + 1, vocab_size, dtype=torch.bool, device=self.ids.device)
        unused = row >= count
        mask[torch.where(unused, count, row), torch.where(unused, 0, self.ids)] = True
        return mask[:count]

    def trim(self) -> Support:
        """The same without unused entries. On CUDA this synchronises."""
        return Support(self.ids[: int(self.offsets[-1])], self.offsets)

    @staticmethod
    def from_lists(rows, device=None) -> Support:
        """From one list of ids a row, in any order."""
        ascending = [sorted(operator.index(i) for i in row) for row in rows]
        for b, row in enumerate(ascending):
            if len(set(row)) != len(row) or (row and not 0 <= row[0] <= row[-1] < 1 << 31):
                raise ValueError(f"rows[{b}] must hold distinct ids in [0, 2^31), got {row}")
        offsets = torch.tensor([0, *(len(row) for row in ascending)], dtype=torch.int64).cumsum(0)
        ids = torch.tensor([i for row in ascending for i in row], dtype=torch.int32)
        return Support(ids.to(device), offsets.to(device))

    @staticmethod
    def from_padded(ids: Tensor) -> Support:
        """From padded ids [..., K], −1 where there is none, in any order; one row a token."""
        flat = _check.tensor("ids", ids).reshape(-1, ids.shape[-1])
        present = flat >= 0
        return _csr(torch.where(present, flat, _LAST).sort(-1).values, present.sum(-1))

    @staticmethod
    def from_mask(mask: Tensor) -> Support:
        """From a bool mask [..., V]; one row a token."""
        flat = _check.tensor("mask", mask).reshape(-1, mask.shape[-1])
        if flat.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {flat.dtype}")
        return Support(flat.nonzero()[:, 1].to(torch.int32), _offsets(flat.sum(-1)))

    @staticmethod
    def from_bits(bits: Tensor, vocab_size: int) -> Support:
        """From a bitmask int32 [..., ceil(V/32)]: bit i of word w is token 32·w + i."""
        words = _check.tensor("bits", bits).reshape(-1, bits.shape[-1])
        if words.dtype != torch.int32 or 32 * words.shape[-1] < vocab_size:
            raise ValueError(
                f"bits must be int32 [..., {-(-vocab_size // 32)}] for vocab_size {vocab_size}, "
                f"got {words.dtype} {list(bits.shape)}"
            )
        shifts = torch.arange(32, device=words.device, dtype=torch.int32)
        mask = (words[..., None] >> shifts & 1).flatten(-2)[:, :vocab_size].bool()
        return Support.from_mask(mask)


_LAST = torch.iinfo(torch.int32).max


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
    ids, offsets = (
        _check.like(f"support.{n}", getattr(support, n), z, other_name) for n in support._fields
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
    ids, offsets = kept
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
    first = torch.zeros(used.numel() + 1, dtype=torch.bool)
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
    ids, offsets = kept
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
    ids, offsets = kept
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
    ids, offsets = kept
    first, last = offsets[:-1], offsets[1:]
    right = (first >= 0) & (first <= last) & (last <= ids.numel())
    row, slots = _row_of(kept), torch.arange(ids.numel(), device=ids.device)
    begins = slots == offsets[row.clamp(max=first.numel())]
    unordered = torch.nn.functional.pad(ids[1:] <= ids[:-1], (1, 0))[: ids.numel()] & ~begins
    return right & ~_some_in_row((ids < 0) | (ids >= vocab) | unordered, row, first.numel())
