"""ties="keep" keeps what the warpers of transformers keep, alone and chained as in generate().

Both judge in float64 here; parameters are exact in float32.
"""

from __future__ import annotations

import pytest
import torch

import pyrlk

pytestmark = pytest.mark.peers
process = pytest.importorskip("transformers.generation.logits_process")


def warped(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """bool [B, V]: what the chain leaves, in the order in which generate() applies it."""
    scores = logits.double()
    chain = [process.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    chain += [process.TopKLogitsWarper(top_k)] if top_k else []
    chain += [process.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    chain += [process.MinPLogitsWarper(min_p)] if min_p else []
    for warper in chain:
        scores = warper(None, scores)
    return scores > -torch.inf


def kept(logits, **filters):
    got = pyrlk.sample(logits, seed=0, ties="keep", return_support=True, **filters)
    return got.support.to_mask(logits.shape[-1])


FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.5},
    {"top_p": 0.9375, "temperature": 0.75},
    {"min_p": 0.0625, "temperature": 1.5},
    {"top_k": 40, "top_p": 0.875},
    {"top_k": 40, "top_p": 0.875, "min_p": 0.125, "temperature": 1.25},
]


@pytest.mark.parametrize("filters", FILTERS, ids=repr)
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_kept_sets_are_equal_where_no_logits_tie(filters, scale):
    logits = scale * torch.randn(200, 2000, generator=torch.Generator().manual_seed(1))
    want = warped(logits, **filters)
    assert torch.equal(kept(logits, **filters), want)
    assert want.sum() > 200 or filters == {"top_k": 1}


@pytest.mark.parametrize("filters", [f for f in FILTERS if "top_p" not in f], ids=repr)
def test_kept_sets_of_top_k_and_min_p_are_equal_among_ties(filters):
    logits = (4 * torch.randn(200, 2000, generator=torch.Generator().manual_seed(2))).round() / 2
    want = warped(logits, **filters)
    assert torch.equal(kept(logits, **filters), want)
    trimmed = pyrlk.sample(logits, seed=0, return_support=True, **filters).support.to_mask(2000)
    assert (trimmed & ~want).sum() == 0
    assert "top_k" not in filters or (want & ~trimmed).any()  # the ties were there


def test_top_p_differs_only_in_tokens_tied_with_the_last_one():
    """Their TopP cuts such a group where its unstable sort happens to; ours keeps it whole."""
    logits = (4 * torch.randn(200, 2000, generator=torch.Generator().manual_seed(3))).round() / 2
    ours, theirs = kept(logits, top_p=0.875), warped(logits, top_p=0.875)
    assert (theirs & ~ours).sum() == 0
    last = torch.where(ours, logits, torch.inf).amin(-1, keepdim=True)
    extra = ours & ~theirs
    assert extra.any()
    assert (logits == last)[extra].all()
