"""Schedules on a device: equal bits, no synchronisation, capture by a CUDA graph."""

import types

import pytest
import schedules as cases
import torch
from dry_device import DRY, SHORT, size

pytest.importorskip("triton")

import pyrlk
from pyrlk.triton_kernels import policy_loss, row
from pyrlk.triton_kernels.schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = size([torch.float32, torch.float16, torch.bfloat16], [torch.float32, torch.bfloat16])
# As in the interpreter, and the vocabularies of models in use, padded and not.
VOCABULARIES = [(1, None), (4095, None), (4097, None), (20000, None), (50257, 50304)]
VOCABULARIES += [(32000, None), (128256, None), (151936, None), (262144, None)]
VOCABULARIES = [lengths for lengths in VOCABULARIES if lengths[0] <= size(262144, 0)]
if SHORT:
    DTYPES, VOCABULARIES = DTYPES[-1:], VOCABULARIES[::2]
if DRY:
    VOCABULARIES = [(1, None), (63, None), (400, 448)]
VOCAB, SMALL = size(151936, 600), size(32000, 300)
KINDS = ["rows", "split", *size(["cooperative"], [])]  # which waits for programs beside it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "width"), VOCABULARIES)
@pytest.mark.parametrize("name", cases.TERMS)
def test_schedules_have_the_same_bits(vocab, width, dtype, name):
    b = cases.batch(vocab, dtype, "cuda", width)
    rows = cases.learn(b, cases.TERMS[name], Schedule("rows", 0))
    if vocab > 2:
        cases.assert_sound(rows)
    others = [Schedule("rows", 1), Schedule("rows", 2, 2), Schedule("rows", 2, 3)]
    for other in (*others, *(Schedule(kind) for kind in KINDS[1:])):
        for inplace in (False, True):
            again = cases.learn(b, cases.TERMS[name], other, inplace=inplace)
            cases.assert_same_bits(rows, again)
    for other in (Schedule("split"), Schedule("rows", stages=2)):
        cases.assert_same_bits(cases.score(b, Schedule("rows")), cases.score(b, other))


def many(rows, vocab, dtype=torch.bfloat16):
    """A batch that keeps every program busy many times over."""
    b = types.SimpleNamespace(vocab=vocab)
    b.logits = torch.randn(rows, vocab, device="cuda", dtype=dtype) * 3
    b.tokens = torch.randint(vocab, (rows,), device="cuda")
    b.advantages = torch.randn(rows, device="cuda")
    b.weight = (torch.rand(rows, device="cuda") > 0.2).float()
    b.old = pyrlk.token_logprobs(b.logits, b.tokens, temperature=cases.TAU)
    b.ref = b.old
    return b


def learn(b, schedule):
    """Loss and gradient in place of a copy."""
    grad, loss = b.logits.clone(), torch.empty_like(b.old)
    terms = cases.TERMS["dapo"]
    policy_loss.policy_loss_fwd(
        grad,
        b.tokens,
        None,
        b.old,
        b.advantages,
        b.weight,
        None,
        cases.TAU,
        b.vocab,
        terms,
        loss,
        torch.empty_like(loss),
        None,
        grad,
        schedule,
    )
    return loss, grad


@pytest.mark.skipif(DRY, reason="programs run one after the other")
@pytest.mark.parametrize("vocab", [32000, 151936])
def test_programs_that_wait_for_each_other_agree_under_load(vocab):
    # Every launch meets thousands of times; a race would show as bits that change.
    b = many(2048, vocab)
    truth = learn(b, Schedule("rows"))
    for _ in range(20):
        for x, y in zip(learn(b, Schedule("cooperative")), truth, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_is_captured_and_replayed(kind):
    # Replays start from the state that the last one left behind: the counters must begin at 0.
    b = many(size(64, 6), SMALL)
    schedule = Schedule(kind)
    learn(b, schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = learn(b, schedule)
    for _ in range(3):
        b.logits.copy_(torch.randn_like(b.logits) * 3)
        graph.replay()
        for x, y in zip(captured, learn(b, schedule), strict=True):
            assert torch.equal(x, y)


@pytest.fixture
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def ops(logits, tokens, old, advantages, mask):
    """Every op on logits, forward and backward."""
    leaf = logits.detach().requires_grad_()
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "ref_logprobs": old, "return_stats": True}
    loss, stats = pyrlk.dapo_loss(leaf, tokens, old, advantages, mask, **options)
    loss.backward()
    inplace = pyrlk.dapo_loss(leaf * 1.0, tokens, old, advantages, mask, inplace=True)
    inplace.backward()
    logprob, entropy = pyrlk.token_logprobs(leaf, tokens, return_entropy=True)
    (logprob * advantages + entropy).sum().backward()
    return loss, stats.entropy, leaf.grad, pyrlk.reinforce_grad(logits, tokens, advantages)


def test_no_op_waits_for_the_device(no_waiting):
    for rows in (4, size(500, 12)):
        torch.cuda.set_sync_debug_mode("default")
        b = many(rows, SMALL)
        torch.cuda.set_sync_debug_mode("error")
        ops(b.logits, b.tokens, b.old, b.advantages, b.weight)


@pytest.mark.parametrize("rows", [4, size(500, 12)])
def test_every_op_is_captured_by_a_cuda_graph(rows):
    b = many(rows, SMALL)
    arguments = b.logits, b.tokens, b.old, b.advantages, b.weight
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = ops(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops(*arguments)
    graph.replay()
    for x, y in zip(captured, eager, strict=True):
        assert torch.equal(x, y)


def test_tiles_on_the_device_are_those_of_the_sampler():
    # Scorer and sampler load differently; the bits of a row's sum must not.
    logits = torch.randn(8, VOCAB, device="cuda").bfloat16() * 3
    drawn = pyrlk.sample(logits, seed=0)
    again = pyrlk.token_logprobs(logits, drawn.token)
    assert torch.equal(drawn.full_logprob, again)
    assert row.parts(VOCAB) > 2
