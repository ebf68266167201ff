"""verify_draft on a device: the CPU's choices, the scorer's bits, graphs, no synchronisation."""

import pytest
import torch
from dry_device import size

import pyrlk

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = size([torch.float32, torch.float16, torch.bfloat16], [torch.bfloat16])
VOCAB = size(151936, 320)
BATCH = size(32, 2)
DEPTH = size(3, 2)
# Flat rows and nothing cut; lists of candidates; greedy.
FILTERS = [{}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.9, "temperature": 0.7}, {"temperature": 0}]


def problem(dtype=torch.float32, seed=0, near=0.3):
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 6, BATCH)[:, None, None]
    target = torch.randn(BATCH, DEPTH + 1, VOCAB, generator=g) * spread
    draft = target[:, :-1] + near * torch.randn(BATCH, DEPTH, VOCAB, generator=g)
    target, draft = target.to(dtype), draft.to(dtype)
    tokens = pyrlk.sample(draft, seed=7).token
    return target.cuda(), tokens.cuda(), draft.cuda()


@pytest.mark.parametrize("one_hot", [False, True], ids=["draft logits", "one-hot"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_chooses_what_the_cpu_chooses(dtype, filters, one_hot):
    """A boundary or a draw lies within the rounding of float32 masses in one row of hundreds."""
    target, tokens, draft = problem(dtype)
    if one_hot:
        tokens, draft = draft.argmax(-1), None
    options = {"seed": 3, "position": 11, "return_support": True, **filters}
    got = pyrlk.verify_draft(target, tokens, draft, **options)
    there = None if draft is None else draft.cpu()
    want = pyrlk.verify_draft(target.cpu(), tokens.cpu(), there, **options)
    assert torch.equal(got.status.cpu(), want.status)
    kept = got.support.to_mask(VOCAB).cpu() == want.support.to_mask(VOCAB)
    same = (got.tokens.cpu() == want.tokens).all(-1) & (got.accepted.cpu() == want.accepted)
    same &= kept.view(BATCH, -1).all(-1)
    assert (~same).sum() <= 1
    for name in ("logprob", "full_logprob"):
        x, y = getattr(got, name).cpu()[same], getattr(want, name)[same]
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-6, equal_nan=True)
    whole = got.status.bitwise_and(pyrlk.sampling.OVERFLOW).eq(0).cpu()
    if whole.all() and same.all():
        assert got.support.rows() == want.support.rows()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_are_the_scorers_bits(dtype):
    target, tokens, draft = problem(dtype)
    got = pyrlk.verify_draft(target, tokens, draft, seed=1, top_p=0.9, return_support=True)
    scored = got.tokens.masked_fill(got.tokens < 0, -100)
    assert torch.equal(got.full_logprob, pyrlk.token_logprobs(target, scored))
    kept = pyrlk.token_logprobs(target, scored, support=got.support)
    assert torch.equal(got.logprob, kept)


@pytest.mark.parametrize("one_hot", [False, True], ids=["draft logits", "one-hot"])
def test_nothing_synchronises_and_a_graph_replays_it(one_hot):
    target, tokens, draft = problem(torch.bfloat16)
    seeds = torch.arange(BATCH, device="cuda")

    def verify():
        return pyrlk.verify_draft(target, tokens, None if one_hot else draft, seed=seeds, top_p=0.9)

    verify()
    torch.cuda.set_sync_debug_mode("error")
    try:
        verify()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = verify()
    for step in (1, 2):
        for held, new in zip((target, tokens, draft), problem(torch.bfloat16, step), strict=True):
            held.copy_(new)
        graph.replay()
        again = verify()
        for a, b in zip(out[:5], again[:5], strict=True):
            assert torch.equal(a, b)


def test_a_row_depends_on_itself_alone():
    target, tokens, draft = problem(torch.bfloat16)
    seeds = torch.arange(BATCH, device="cuda")
    whole = pyrlk.verify_draft(target, tokens, draft, seed=seeds)
    one = slice(1, 2)
    alone = pyrlk.verify_draft(target[one], tokens[one], draft[one], seed=seeds[one])
    for a, b in zip(alone[:5], whole[:5], strict=True):
        assert torch.equal(a, b[one])


def test_bad_values_are_errors_where_they_are_asked_for(monkeypatch):
    target, tokens, draft = problem(torch.bfloat16)
    tokens[0, 0] = VOCAB
    assert pyrlk.verify_draft(target, tokens, draft, seed=0).accepted[0] == 0
    monkeypatch.setenv("PYRLK_CHECK", "1")
    with pytest.raises(ValueError, match=rf"draft_tokens\[0\] = {VOCAB} is outside"):
        pyrlk.verify_draft(target, tokens, draft, seed=0)
