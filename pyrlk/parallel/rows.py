"""What a draw from sharded rows is given, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..support import Support
from .vocab import Layout

MAX_VOCAB = 1 << 19


class Parameters(NamedTuple):
    """Of the rows, [B] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor


class How(NamedTuple):
    """Of the call: top-p of the joint softmax, all of equal logits kept, the support wanted."""

    joint: bool
    keep_ties: bool
    support: bool


class Drawn(NamedTuple):
    """[B] each, the same on every rank; the fields of `pyrlk.Sample`."""

    token: Tensor
    logprob: Tensor
    full_logprob: Tensor
    kept: Tensor
    status: Tensor
    support: Support | None


def check_total(layout: Layout, allowed: Tensor | None) -> None:
    if layout.total >= MAX_VOCAB:
        raise ValueError(f"logits must have V < {MAX_VOCAB}, got {layout.total}")
    if allowed is not None and allowed.shape[1] != -(-layout.total // 32):
        raise ValueError(
            f"allowed must have {-(-layout.total // 32)} words a row for V = {layout.total}, "
            f"got {allowed.shape[1]}"
        )
