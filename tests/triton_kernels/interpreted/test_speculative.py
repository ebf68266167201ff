"""Draft verification: the C++ kernel's tokens, acceptances and kept sets; the sampler's bits."""

import math
import types

import pytest
import torch

import pyrlk
from pyrlk.triton_kernels import sample, speculative

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles"),
]

VOCAB, DEPTH, BATCH = 150, 2, 8
NAN, INF = math.nan, math.inf
# Of each draft others: nothing cut, few kept (a list), more than a list holds, greedy.
FILTERS = {
    "top_k": torch.tensor([0, 9, 0, 60, 0, 120, 7, 0]),
    "top_p": torch.tensor([1, 1, 0.8, 1, 0.99, 0.95, 0.5, 1]),
    "min_p": torch.tensor([0, 0, 0, 0.05, 0.01, 0, 0, 0.3]),
    "temperature": torch.tensor([1, 1, 0.7, 1, 2.0, 1.3, 0, 0.9]),
}


def problem(dtype=torch.float32, near=0.6):
    torch.manual_seed(5)
    target = 2 * torch.randn(BATCH, DEPTH + 1, VOCAB)
    draft = (target[:, :-1] + near * torch.randn(BATCH, DEPTH, VOCAB)).to(dtype)
    tokens = pyrlk.sample(draft.reshape(-1, VOCAB), seed=77).token.view(BATCH, DEPTH)
    return target.to(dtype), tokens, draft


def verify(
    target, tokens, draft, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, exact=True
):
    """What pyrlk.verify_draft returns, from the Triton kernels; outputs start as nonsense."""
    batch, depths, vocab = target.shape
    rows = batch * depths

    def per_row(x, dtype):
        x = torch.as_tensor(x, dtype=dtype).expand(batch)
        return x.repeat_interleave(depths)

    out = types.SimpleNamespace(
        tokens=torch.full((batch, depths), -9),
        accepted=torch.full((batch,), -9, dtype=torch.int32),
        logprob=torch.full((batch, depths), 9.0),
        full_logprob=torch.full((batch, depths), 9.0),
        status=torch.full((batch, depths), 99, dtype=torch.uint8),
    )
    kept = torch.full((rows,), -9, dtype=torch.int32)
    seeds = (seed + torch.arange(batch)).repeat_interleave(depths)
    positions = (torch.arange(depths) + 5 * torch.arange(batch)[:, None]).view(-1)
    workspace = speculative.verify_fwd(
        target, tokens, draft, per_row(temperature, torch.float32), per_row(top_k, torch.int64),
        per_row(top_p, torch.float32), per_row(min_p, torch.float32), seeds, positions, exact,
        out.tokens, out.accepted, out.logprob, out.full_logprob, kept, out.status,
    )  # fmt: skip
    ids = torch.full((rows * vocab,), -9, dtype=torch.int32)
    offsets = torch.full((rows + 1,), -9, dtype=torch.int64)
    sample.support_fwd(target, None, workspace, kept, out.status, ids, offsets)
    out.support = pyrlk.Support(ids, offsets).trim()
    return out


def assert_equal(got, want, log_probs=2e-6):
    for name in ("tokens", "accepted", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("logprob", "full_logprob"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), atol=log_probs, rtol=0, equal_nan=True
        )
    assert got.support.rows() == want.support.rows()


def on_cpu(target, tokens, draft, **options):
    return pyrlk.verify_draft(
        target, tokens, draft, seed=torch.arange(len(target)) + options.pop("seed", 0),
        position=5 * torch.arange(len(target)), return_support=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("one_hot", [False, True], ids=["draft logits", "one-hot"])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, False)])
def test_it_chooses_what_the_cpu_chooses(dtype, exact, one_hot):
    """In float32 masses of whole rows a choice differs once in millions."""
    target, tokens, draft = problem(dtype)
    if one_hot:
        tokens, draft = draft.argmax(-1), None
    want = on_cpu(target, tokens, draft, **FILTERS)
    assert 0 < want.accepted.float().mean() < DEPTH
    assert_equal(verify(target, tokens, draft, exact=exact, **FILTERS), want)


def test_log_probs_are_those_of_a_draw_bit_for_bit():
    """The bonus is sample's; at the other depths the scorer of the same token has the same bits."""
    target, _, draft = problem(near=0.0)
    tokens = pyrlk.sample(draft.reshape(-1, VOCAB), seed=3).token.view(BATCH, DEPTH)
    got = verify(target, tokens, target[:, :-1], top_k=0)
    assert got.accepted.eq(DEPTH).all()
    flat = target.reshape(-1, VOCAB)
    again = verify(flat[:, None], got.tokens.new_empty(len(flat), 0), None)
    drawn = again.tokens.view(-1) == got.tokens.view(-1)
    assert drawn.sum() > 0
    assert torch.equal(got.full_logprob.view(-1)[drawn], again.full_logprob.view(-1)[drawn])
    assert torch.equal(got.logprob, got.full_logprob)


def test_rows_without_a_distribution_end_as_on_the_cpu():
    target, tokens, draft = problem(near=0.0)
    target[1, 0] = -INF
    target[2, 1] = NAN
    target[5, 1, 17] = INF
    target[6, DEPTH] = NAN
    draft[3, 1] = -INF
    draft[4, 0, (tokens[4, 0] + 1) % VOCAB] = NAN
    draft[7, 0, 4] = INF
    temperature = torch.ones(BATCH)
    want = on_cpu(target, tokens, draft, temperature=temperature)
    assert_equal(verify(target, tokens, draft, temperature=temperature), want)
    temperature[0] = -1.0
    got = verify(target, tokens, draft, temperature=temperature)
    assert got.status[0].tolist() == [8, 0, 0]
    assert got.tokens[0].tolist() == [-1] * 3
    kept = torch.arange(BATCH) != 0
    assert torch.equal(got.tokens[kept], want.tokens[kept])


def test_tokens_that_nothing_proposes():
    target, tokens, _ = problem()
    target[:, 0].scatter_(1, tokens[:, :1], -INF)
    draft = target[:, :-1].clone()
    for q in (None, draft):
        got = verify(target, tokens, q)
        assert_equal(got, on_cpu(target, tokens, q))
        assert got.accepted.eq(0).all()
    outside = tokens.clone()
    outside[::2, 0], outside[1::2, 0] = VOCAB, -1
    got = verify(target, outside, draft)
    assert got.accepted.eq(0).all()
    assert (got.tokens[:, 0] >= 0).all()
    assert (got.tokens[:, 0] < VOCAB).all()


def test_greedy_targets_and_no_draft():
    target, _, _ = problem()
    best = target.argmax(-1)
    tokens = best[:, :DEPTH].clone()
    tokens[5:, 1] = (tokens[5:, 1] + 1) % VOCAB
    assert_equal(
        verify(target, tokens, None, temperature=0.0), on_cpu(target, tokens, None, temperature=0.0)
    )
    none = torch.empty(BATCH, 0, dtype=torch.int64)
    assert_equal(verify(target[:, :1], none, None), on_cpu(target[:, :1], none, None))
    empty = torch.empty(0, DEPTH + 1, VOCAB)
    assert verify(empty, torch.empty(0, DEPTH, dtype=torch.int64), None).tokens.shape == (0, 3)
