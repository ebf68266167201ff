"""verify_draft: distributed as the target, exact in accept and residual, the target's log-probs."""

from __future__ import annotations

import math

import pytest
import torch

import pyrlk
from pyrlk import reference
from pyrlk.bench import draws
from pyrlk.sampling import EMPTY, INVALID, NAN

FILTERS = [{}, {"top_k": 9}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 20, "min_p": 0.05}]


def problem(batch=60, depth=4, vocab=50, dtype=torch.float32, near=0.5):
    """Target and draft logits that agree in part, and draft tokens drawn from the draft."""
    torch.manual_seed(vocab + depth)
    target = 2 * torch.randn(batch, depth + 1, vocab)
    draft = (target[:, :-1] + near * torch.randn(batch, depth, vocab)).to(dtype)
    flat = pyrlk.sample(draft.reshape(-1, vocab), seed=77).token
    return target.to(dtype), flat.view(batch, depth), draft


@pytest.mark.parametrize("one_hot", [False, True], ids=["draft logits", "one-hot"])
@pytest.mark.parametrize("filters", FILTERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_log_probs_equal_the_reference_and_the_scorer(dtype, filters, one_hot):
    target, tokens, draft = problem(dtype=dtype)
    if one_hot:
        tokens, draft = draft.argmax(-1), None
    seeds, positions = torch.arange(60) * 31, torch.arange(60) * 5
    options = {"seed": seeds, "position": positions, **filters}
    got = pyrlk.verify_draft(target, tokens, draft, return_support=True, **options)
    want_tokens, want_accepted, want_logprob = reference.verify_draft(
        target, tokens, draft, **options
    )
    assert torch.equal(got.tokens, want_tokens)
    assert torch.equal(got.accepted, want_accepted)
    assert 0.2 < got.accepted.float().mean() < 3.8
    torch.testing.assert_close(got.logprob.double(), want_logprob, rtol=1e-6, atol=1e-6)
    tau = filters.get("temperature", 1.0)
    scored = got.tokens.masked_fill(got.tokens < 0, -100)
    assert torch.equal(got.full_logprob, pyrlk.token_logprobs(target, scored, temperature=tau))
    replayed = pyrlk.token_logprobs(target, scored, temperature=tau, support=got.support)
    assert torch.equal(got.logprob, replayed)
    assert got.status.eq(0).all()


@pytest.mark.parametrize("one_hot", [False, True], ids=["draft logits", "one-hot"])
@pytest.mark.parametrize("name", draws.FILTERS)
def test_the_output_is_distributed_as_direct_sampling(name, one_hot):
    """First tokens against p₀; second ones, where there are any, against p₁."""
    settings, size = draws.FILTERS[name], 1 << 16
    rows = torch.stack([draws.DISTRIBUTIONS["normal"], draws.DISTRIBUTIONS["geometric"]])
    proposal = 0.7 * draws.DISTRIBUTIONS["normal"] - 0.3 * draws.DISTRIBUTIONS["narrow"]
    seeds = torch.full((size,), 5)
    positions = 2 * torch.arange(size)
    tokens = pyrlk.sample(proposal.expand(size, -1), seed=seeds + 1, position=positions).token
    if one_hot:
        tokens = proposal.argmax().expand(size)
    got = pyrlk.verify_draft(
        rows.expand(size, 2, -1), tokens[:, None],
        None if one_hot else proposal.expand(size, 1, -1),
        seed=seeds, position=positions, **settings,
    )  # fmt: skip
    accepted = got.accepted == 1
    assert 0.02 < accepted.float().mean() < 0.95
    assert torch.equal(got.tokens[accepted, 0], tokens[accepted])
    assert got.tokens[~accepted, 1].eq(-1).all()
    for depth, chosen in ((0, slice(None)), (1, accepted)):
        counts = torch.bincount(got.tokens[chosen, depth], minlength=64)
        truth = draws.probabilities(rows[depth], **settings)
        assert abs(draws.deviate(*draws.chi_square(counts, truth))) < 6
    # The same statistic sees a verifier that draws its residual from p: it favours likely tokens.
    if not one_hot:
        p, q = draws.probabilities(rows[0], **settings), proposal.double().softmax(0)
        wrong = torch.minimum(p, q) + (1 - torch.minimum(p, q).sum()) * p
        counts = torch.bincount(got.tokens[:, 0], minlength=64)
        assert draws.deviate(*draws.chi_square(counts, wrong)) > 6


def test_a_draft_that_the_target_gives_no_probability_is_never_accepted():
    torch.manual_seed(1)
    target = torch.randn(4000, 2, 30)
    tokens = torch.randint(30, (4000, 1))
    target[:, 0].scatter_(1, tokens, -math.inf)
    draft = torch.full((4000, 1, 30), -math.inf)
    both = draft.clone()  # neither gives the token anything: 0 < 0 is false
    draft[:, 0].scatter_(1, tokens, 0.0)
    both[:, 0, :] = torch.randn(4000, 30).scatter(1, tokens, -math.inf)
    for q in (None, draft, both):
        got = pyrlk.verify_draft(target, tokens, q, seed=0)
        assert got.accepted.eq(0).all()
        assert (got.tokens[:, 0] != tokens[:, 0]).all()
        assert got.tokens[:, 1].eq(-1).all()
    cut = pyrlk.verify_draft(torch.zeros(4000, 2, 30), torch.full((4000, 1), 29), seed=0, top_k=29)
    assert cut.accepted.eq(0).all()


def test_a_draft_equal_to_the_target_is_accepted_whole():
    target, _, _ = problem(depth=3)
    tokens = pyrlk.sample(target[:, :-1].reshape(-1, 50), seed=9).token.view(60, 3)
    got = pyrlk.verify_draft(target, tokens, target[:, :-1], seed=2)
    assert got.accepted.eq(3).all()
    assert torch.equal(got.tokens[:, :3], tokens)
    bonus = pyrlk.sample(target[:, 3], seed=2, position=3)
    assert torch.equal(got.tokens[:, 3], bonus.token)
    assert torch.equal(got.logprob[:, 3], bonus.logprob)


def test_without_a_draft_it_is_sample():
    z = torch.randn(20, 1, 100)
    none = torch.empty(20, 0, dtype=torch.long)
    got = pyrlk.verify_draft(z, none, seed=4, position=6, top_k=8, return_support=True)
    want = pyrlk.sample(z[:, 0], seed=4, position=6, top_k=8, return_support=True)
    assert torch.equal(got.tokens[:, 0], want.token)
    assert torch.equal(got.logprob[:, 0], want.logprob)
    assert got.support.rows() == want.support.rows()


def test_temperature_zero_accepts_the_argmax_alone():
    target, _, _ = problem(depth=2)
    best = target.argmax(-1)
    tokens = best[:, :2].clone()
    tokens[30:, 1] = (tokens[30:, 1] + 1) % 50
    got = pyrlk.verify_draft(target, tokens, temperature=0, seed=0)
    assert got.accepted.tolist() == [2] * 30 + [1] * 30
    assert torch.equal(got.tokens[:30], best[:30])
    assert torch.equal(got.tokens[30:, :2], best[30:, :2])
    assert got.logprob.eq(0).all()


def test_a_row_depends_on_itself_alone_and_threads_change_no_bit():
    target, tokens, draft = problem(batch=16, vocab=40_000, depth=2)
    options = {"seed": torch.arange(16), "position": torch.arange(16), "top_p": 0.9}
    whole = pyrlk.verify_draft(target, tokens, draft, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for row in (0, 7, 15):
                one = slice(row, row + 1)
                alone = pyrlk.verify_draft(
                    target[one], tokens[one], draft[one],
                    seed=options["seed"][one], position=options["position"][one], top_p=0.9,
                )  # fmt: skip
                for a, b in zip(alone[:5], whole[:5], strict=True):
                    assert torch.equal(a, b[one])
    finally:
        torch.set_num_threads(before)


def test_rows_without_a_distribution_end_and_leave_their_neighbours_alone():
    target, tokens, draft = problem(batch=6, depth=2, near=0.0)
    clean = pyrlk.verify_draft(target, tokens, draft, seed=0)
    assert clean.accepted.eq(2).all()
    target[1, 0] = -math.inf
    target[2, 1] = math.nan
    draft[3, 1] = -math.inf
    draft[4, 0, (tokens[4, 0] + 1) % 50] = math.nan
    got = pyrlk.verify_draft(target, tokens, draft, seed=0, return_support=True)
    assert got.status[1].tolist() == [EMPTY, 0, 0]
    assert got.status[2].tolist() == [0, NAN | EMPTY, 0]
    assert got.status[3].tolist() == [0, INVALID, 0]
    assert got.accepted[:4].tolist() == [2, 0, 1, 1]
    assert got.tokens[1].tolist() == [-1, -1, -1]
    assert got.logprob[1, 0].isnan()
    assert got.logprob[1, 1:].eq(0).all()
    assert got.support.rows()[3:6] == [[], [], []]
    for name in ("tokens", "accepted", "logprob", "full_logprob", "status"):
        assert torch.equal(getattr(got, name)[[0, 5]], getattr(clean, name)[[0, 5]])


Z, X, Q = torch.randn(4, 3, 11), torch.zeros(4, 2, dtype=torch.long), torch.randn(4, 2, 11)
T, W = TypeError, ValueError
ERRORS = [
    ({"target_logits": [0]}, T, "target_logits must be a tensor"),
    ({"target_logits": Z[0]}, W, r"target_logits must have shape \[B, n \+ 1, V\]"),
    ({"target_logits": torch.randn(4, 0, 11)}, W, "target_logits must have shape"),
    ({"target_logits": Z.long()}, T, "target_logits must be float32"),
    ({"draft_tokens": X.float()}, T, "draft_tokens must be int64 or int32"),
    ({"draft_tokens": X[:, :1]}, W, r"draft_tokens must have shape \[4, 2\]"),
    ({"draft_tokens": None}, T, "draft_tokens must be a tensor"),
    ({"draft_tokens": torch.full((4, 2), 11)}, W, r"draft_tokens\[0\] = 11 is outside \[0, 11\)"),
    ({"draft_tokens": X.index_fill(0, torch.tensor(3), -1)}, W, r"draft_tokens\[6\] = -1"),
    ({"draft_logits": Z}, W, r"draft_logits must have shape \[4, 2, 11\]"),
    ({"draft_logits": Q.int()}, T, "draft_logits must be float32"),
    ({"temperature": -1.0}, W, "temperature must lie in"),
    ({"temperature": torch.ones(3)}, W, r"temperature.*\[4\]"),
    ({"top_p": torch.tensor([1, 1, 2.0, 1])}, W, r"top_p\[2\] = 2.0"),
    ({"top_k": 1.0}, T, "top_k must be an integer"),
    ({"min_p": 2.0}, W, "min_p must lie in"),
    ({"seed": None}, T, "seed must be an integer"),
    ({"position": 0.5}, T, "position must be an integer"),
    ({"return_support": 1}, T, "return_support must be True or False"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_a_bad_argument_is_named(number):
    bad, error, wanted = ERRORS[number]
    given = {"target_logits": Z, "draft_tokens": X, "draft_logits": Q, "seed": 0} | bad
    with pytest.raises(error, match=wanted):
        pyrlk.verify_draft(**given)
