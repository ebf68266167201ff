"""What rows are scored by: as the schemas of the ops hold it, and as the kernels want it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, _op
from . import support as _support
from .support import Support


class Rows(NamedTuple):
    """What an op scores rows by, in the order of its schema."""

    tokens: Tensor
    ids: Tensor | None
    offsets: Tensor | None
    temperature: float
    temperatures: Tensor | None
    vocab: int  # of a sharded vocabulary the whole one, and 0 is all its columns

    def flat(self, dtype: torch.dtype) -> Actions:
        return Actions(
            _op.flat(self.tokens, torch.int64),
            _support.pair(self.ids, self.offsets),
            self.temperature,
            _op.flat(self.temperatures, dtype),
            self.vocab,
        )


class Actions(NamedTuple):
    """`Rows` as the kernels want them: flat, contiguous, of the compute dtype."""

    tokens: Tensor
    kept: Support | None
    temperature: float
    temperatures: Tensor | None
    vocab: int

    def take(self, rows: slice | Tensor) -> Actions:
        return self._replace(
            tokens=self.tokens[rows],
            kept=_support.take(self.kept, rows),
            temperatures=None if self.temperatures is None else self.temperatures[rows],
        )


def check_tokens(tokens: Tensor, kept: Support | None, counted: Tensor, vocab: int) -> None:
    """Where values are checked; other rows than those `counted` may hold anything."""
    if not _check.reads_values(tokens):
        return
    _support.check_values(kept, vocab)
    bad = (tokens < 0) | (tokens >= vocab)
    if kept is not None:
        bad = bad | ~_support.holds(kept, tokens)
    bad = bad & counted
    _check.bad_token(int(bad.to(torch.int8).argmax()) if bad.any() else -1, tokens, vocab)


def wrong_tokens(tokens: Tensor, kept: Support | None, vocab: int) -> Tensor:
    """bool [T]: tokens that are no column, or not in a kept set that is one; never waits."""
    wrong = (tokens < 0) | (tokens >= vocab)
    if kept is None:
        return wrong
    return wrong | ~_support.holds(kept, tokens) | ~_support.sound(kept, vocab)
