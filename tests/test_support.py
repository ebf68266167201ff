"""Support to and from every format of the engines: what goes in comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyrlk import Support

VOCAB = 71  # not a multiple of 8 or 32
ROWS = st.lists(st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=9), max_size=6)


def same(a, b):
    return torch.equal(a.ids, b.ids) and torch.equal(a.offsets, b.offsets)


@given(ROWS)
def test_lists_as_vllm_sglang_and_slime_send_them(rows):
    """CompletionOutput.sampling_mask, meta_info["output_token_sampling_mask"]: ids in any order."""
    support = Support.from_lists(rows)
    assert support.rows() == [sorted(row) for row in rows]
    assert same(Support.from_lists(support.rows()), support)


@given(ROWS, st.booleans())
def test_flat_ids_with_offsets_or_lengths(rows, arrays):
    """vLLM's and slime's (token_ids, offsets), SGLang's (lengths, token_ids)."""
    wanted = Support.from_lists(rows)
    flat, lengths = [i for row in rows for i in row], [len(row) for row in rows]
    offsets = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    if arrays:
        flat, lengths = np.array(flat, np.int32), np.array(lengths, np.int32)
        offsets = np.array(offsets, np.int64)
    by_offsets = Support.from_flat(flat, offsets=offsets)
    assert same(by_offsets, wanted)
    assert same(Support.from_flat(flat, lengths=lengths), wanted)
    assert same(Support.from_flat(wanted.ids, offsets=wanted.offsets), wanted)
    assert same(Support.from_flat(wanted.ids, lengths=wanted.counts()), wanted)


@given(ROWS, st.integers(0, 3))
def test_padded_ids(rows, slack):
    """[tokens, width] with −1: SGLang's capture, prime-rl."""
    support = Support.from_lists(rows)
    width = max((len(row) for row in rows), default=0) + slack
    padded = support.to_padded(width)
    assert padded.shape == (len(rows), width)
    assert [[i for i in row if i >= 0] for row in padded.tolist()] == support.rows()
    assert same(Support.from_padded(padded), support)
    assert same(Support.from_padded(padded.flip(-1)), support)
    assert support.to_padded(width, fill=77).eq(77).sum() >= width * len(rows) - len(support.ids)


@given(ROWS)
def test_bits_and_masks(rows):
    """int32 words (xgrammar, SGLang), octets of numpy.packbits(bitorder="little") (vLLM), bools."""
    support = Support.from_lists(rows)
    mask = support.to_mask(VOCAB)
    assert same(Support.from_mask(mask), support)
    octets = support.to_bits(VOCAB, torch.uint8)
    assert octets.shape == (len(rows), 9)
    assert np.array_equal(octets, np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    words = support.to_bits(VOCAB)
    assert words.shape == (len(rows), 3)
    for row, ids in zip(words.tolist(), rows, strict=True):
        assert sum((w & 0xFFFFFFFF) << 32 * i for i, w in enumerate(row)) == sum(
            1 << i for i in ids
        )
    for bits in (octets, words):
        assert same(Support.from_bits(bits, VOCAB), support)


@given(ROWS, st.integers(0, 40))
def test_rows_in_bits_convert_like_rows_in_ids(rows, capacity):
    """The form that overflow takes: unused and half-used entries hold anything."""
    whole = Support.from_lists(rows)
    bits = whole.to_bits(VOCAB)
    inside = whole.offsets[1:] <= capacity
    bits[inside] = -1  # never read
    ids = torch.full((capacity,), 77, dtype=torch.int32)
    end = int(whole.offsets[int(inside.sum())])
    ids[:end] = whole.ids[:end]
    got = Support(ids, whole.offsets, bits)
    assert same(got.trim(), whole)
    assert got.trim().bits is None
    assert got.rows() == whole.rows()
    assert torch.equal(got.to_mask(VOCAB), whole.to_mask(VOCAB))
    assert torch.equal(got.to_padded(), whole.to_padded())
    assert torch.equal(got.to_bits(VOCAB), whole.to_bits(VOCAB))


SUPPORT = Support.from_lists([[3, 1], [], [5]])
ERRORS = [
    (lambda: Support.from_lists([[1, 1]]), ValueError, r"rows\[0\] must hold distinct ids"),
    (lambda: Support.from_lists([[0], [-1]]), ValueError, r"rows\[1\]"),
    (lambda: Support.from_lists([[0.5]]), TypeError, "rows must be lists .*float"),
    (lambda: Support.from_lists([3]), TypeError, "rows must be lists"),
    (lambda: Support.from_lists(None), TypeError, "rows must be lists"),
    (lambda: Support.from_padded(torch.tensor([[1.0, -1.0]])), TypeError, "ids must be int64 or"),
    (lambda: Support.from_padded(torch.tensor([[1, 1 << 31]])), ValueError, r"ids .* than 2\^31"),
    (lambda: Support.from_padded(torch.tensor(1)), ValueError, r"ids must have shape \[..., K\]"),
    (lambda: Support.from_mask(torch.tensor(True)), ValueError, r"mask must have shape"),
    (lambda: Support.from_bits(torch.ones(2, 1).int(), 0), ValueError, "vocab_size must be ≥ 1"),
    (lambda: Support.from_bits(torch.ones(2, 1).int(), 3.0), TypeError, "vocab_size must be an i"),
    (lambda: Support.from_flat([1]), TypeError, "either offsets or lengths"),
    (lambda: Support.from_flat([1], offsets=[0, 1], lengths=[1]), TypeError, "either"),
    (lambda: Support.from_flat([1.5], lengths=[1]), TypeError, "ids must be one-dimensional int"),
    (lambda: Support.from_flat([[1]], lengths=[1]), TypeError, "ids must be one-dimensional"),
    (lambda: Support.from_flat([1], lengths=[2]), ValueError, "end at 1 .ids., got 2"),
    (lambda: Support.from_flat([1], lengths=[-1, 2]), ValueError, "lengths must be ≥ 0"),
    (lambda: Support.from_flat([1], offsets=[1, 1]), ValueError, "offsets must rise from 0"),
    (lambda: Support.from_flat([1], offsets=[]), ValueError, "offsets must rise from 0"),
    (lambda: Support.from_flat([-1], lengths=[1]), ValueError, r"ids must lie in \[0, 2\^31\)"),
    (lambda: Support.from_flat([4, 4], lengths=[2]), ValueError, "distinct within a row"),
    (lambda: Support.from_mask(torch.ones(2, 3)), TypeError, "mask must be bool"),
    (lambda: Support.from_mask([[True]]), TypeError, "mask must be a tensor"),
    (lambda: Support.from_bits(torch.ones(2, 1).int(), 33), ValueError, r"int32 \[..., 2\]"),
    (lambda: Support.from_bits(torch.ones(2, 1), 3), ValueError, "bits must be int32"),
    (lambda: SUPPORT.to_bits(9, torch.int64), TypeError, "dtype must be"),
    (lambda: SUPPORT.to_padded(1), ValueError, "width must be at least 2"),
    (lambda: SUPPORT.to_padded(2.0), TypeError, "width must be an integer"),
    (lambda: SUPPORT.to_mask(5), ValueError, "vocab_size must exceed every id"),
    (lambda: SUPPORT.to_mask(0), ValueError, "vocab_size must be ≥ 1"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_what_is_no_support_is_refused(number):
    call, error, wanted = ERRORS[number]
    with pytest.raises(error, match=wanted):
        call()
