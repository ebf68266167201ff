"""Rows beyond 2^31 elements: a [70000, 151936] problem in memory that is mapped, not allocated."""

from __future__ import annotations

import mmap

import pytest
import torch

import pyrlk
from pyrlk import reference

ROWS, VOCAB = 70000, 151936
# The first row, those around 2^31 and 2^32 elements, and the last.
FEW = [0, 14134, 14135, 28268, 28269, ROWS - 1]


@pytest.fixture
def mapped():
    """bfloat16 logits [70000, 151936]: 21 GB of address space, of which a few rows are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, ROWS * VOCAB * 2, flags=flags)
    except OSError:
        pytest.skip("this system reserves memory that is mapped")
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(ROWS, VOCAB)
    g = torch.Generator().manual_seed(0)
    for t in FEW:
        logits[t] = torch.randn(VOCAB, generator=g) * 3
    return logits


def test_rows_beyond_32_bits_are_scored(mapped):
    tokens = torch.full((ROWS,), -100)
    tokens[FEW] = torch.tensor([1, 17, VOCAB - 1, 4096, 99, 7])
    logprob = pyrlk.token_logprobs(mapped, tokens)
    truth = reference.token_logprobs(mapped[FEW].double(), tokens[FEW])
    torch.testing.assert_close(logprob[FEW].double(), truth, atol=1e-6, rtol=2e-7)
    assert (logprob == 0).sum() == ROWS - len(FEW)


def test_gradients_are_written_in_place_beyond_32_bits(mapped):
    # Two rows, whose stride is nearly the whole mapping: masked rows would be written with zeros.
    rows = mapped[:: ROWS - 1]
    tokens, advantages = torch.tensor([3, 5]), torch.tensor([1.5, -0.5])
    truth = reference.reinforce_grad(rows.double(), tokens, advantages.double())
    between = mapped[14134].clone()
    pyrlk.reinforce_grad(rows, tokens, advantages, out=rows)
    assert (rows.double() - truth).norm() <= 4e-3 * truth.norm()
    assert torch.equal(mapped[14134], between)
