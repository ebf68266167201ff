"""The Triton kernels on a device: float64 accuracy in every dtype, equal bits, no recompilation."""

import types

import pytest
import torch
from dry_device import DRY, size

import pyrlk
from pyrlk import objective, reference

pytest.importorskip("triton")

from pyrlk.triton_kernels import logprob, policy_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Relative error of a gradient in norm: that of the float32 arithmetic, or of rounding to 16 bits.
VOCAB, SMALL = size(151936, 320), size(32000, 160)
BOUNDS = [(torch.float32, 4e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device="cuda", dtype=dtype)


def score(logits, tokens, temperature=1.0, kept=None):
    count = tokens.numel()
    out = types.SimpleNamespace(logprob=empty(count), entropy=empty(count), stats=empty(count, 4))
    logprob.token_logprobs_fwd(
        logits, tokens, kept, temperature, logits.shape[-1], out.logprob, out.entropy, out.stats
    )
    return out


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("vocab", [31, size(4097, 65), VOCAB])
def test_fused_loss_matches_float64(dtype, bound, vocab):
    torch.manual_seed(vocab)
    rows = 8
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    tokens = torch.randint(vocab, (rows,))
    z = logits.double().requires_grad_()
    truth, entropy = reference.token_logprobs(z, tokens, temperature=0.75, return_entropy=True)
    old = (truth.detach() + torch.randn(rows) * 0.2).float()
    ref = (truth.detach() + torch.randn(rows) * 0.5).float()
    advantages, weight = torch.randn(rows), torch.rand(rows)
    terms = objective.terms(objective.DAPO(), kl_coef=0.1, entropy_coef=0.01)
    loss = objective.token_loss(
        truth, old.double(), advantages.double(), ref.double(), entropy, terms
    )
    (loss * weight.double()).sum().backward()
    grad, per_token, own = logits.cuda(), empty(rows), empty(rows)
    policy_loss.policy_loss_fwd(
        grad,
        tokens.cuda(),
        None,
        old.cuda(),
        advantages.cuda(),
        weight.cuda(),
        ref.cuda(),
        0.75,
        vocab,
        terms,
        per_token,
        own,
        None,
        grad,
    )
    torch.testing.assert_close(own.cpu().double(), truth.detach(), atol=1e-6, rtol=1e-7)
    torch.testing.assert_close(per_token.cpu().double(), loss.detach(), atol=2e-6, rtol=2e-6)
    assert (grad.cpu().double() - z.grad).norm() <= bound * z.grad.norm()
    assert torch.equal(own, score(logits.cuda(), tokens.cuda(), 0.75).logprob)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_replayed_loss_matches_float64(dtype, bound, inplace):
    # Sets in one step, in many, and of the whole vocabulary; in place a race would show.
    torch.manual_seed(0)
    vocab = VOCAB
    sets = [[vocab - 1], range(40), torch.randperm(vocab)[:50].tolist(), range(vocab)]
    sets += [torch.randperm(vocab)[:n].tolist() for n in (vocab // 100, vocab // 20, vocab // 2)]
    support, rows = pyrlk.Support.from_lists(sets), len(sets)
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    tokens = torch.tensor([sorted(s)[len(s) // 2] for s in sets])
    z = logits.double().requires_grad_()
    truth = reference.token_logprobs(z, tokens, temperature=0.75, support=support)
    old, advantages = (truth.detach() + torch.randn(rows) * 0.1).float(), torch.randn(rows)
    options = {"temperature": 0.75, "entropy_coef": 0.01}
    expected = reference.policy_loss(
        z, tokens, old.double(), advantages.double(), support=support, **options
    )
    expected.backward()
    kept = pyrlk.Support(support.ids.cuda(), support.offsets.cuda())
    leaf = logits.cuda().requires_grad_()
    loss = pyrlk.policy_loss(
        leaf * 1.0,
        tokens.cuda(),
        old.cuda(),
        advantages.cuda(),
        support=kept,
        inplace=inplace,
        **options,
    )
    loss.backward()
    torch.testing.assert_close(
        loss.detach().cpu().double(), expected.detach(), atol=2e-6, rtol=2e-6
    )
    assert (leaf.grad.cpu().double() - z.grad).norm() <= bound * z.grad.norm()
    outside = ~support.to_mask(vocab)
    assert (leaf.grad.cpu()[outside] == 0).all()
    own = leaf.detach().requires_grad_()
    logprob = pyrlk.token_logprobs(own, tokens.cuda(), temperature=0.75, support=kept)
    torch.testing.assert_close(logprob.cpu().double(), truth, atol=1e-6, rtol=2e-7)
    g = torch.randn(rows)
    logprob.backward(g.cuda())
    (slope,) = torch.autograd.grad(
        reference.token_logprobs(z, tokens, temperature=0.75, support=support), z, g.double()
    )
    assert (own.grad.cpu().double() - slope).norm() <= bound * slope.norm()


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.GSPO(0.2, 0.2)], ids=repr)
@pytest.mark.parametrize("kept", [False, True])
def test_linear_loss_over_kept_sets_equals_the_cpu(objective, kept):
    torch.manual_seed(0)
    vocab = size(5000, 300)
    hidden, weight = torch.randn(3, 70, 64), torch.randn(vocab, 64) / 8
    tokens, mask = torch.randint(vocab, (3, 70)), torch.rand(3, 70) > 0.3
    old, advantages = torch.randn(3, 70) - 8, torch.randn(3)
    support = None
    if kept:
        sets = torch.rand(210, vocab) < 0.02
        support = pyrlk.Support.from_mask(sets.scatter_(1, tokens.view(-1, 1), True))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
        rest = [x.to(device) for x in (tokens, old, advantages, mask)]
        sets = support and pyrlk.Support(support.ids.to(device), support.offsets.to(device))
        loss = pyrlk.linear_policy_loss(
            *leaves, *rest, objective=objective, support=sets, entropy_coef=0.01, chunk=128
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda.cpu() - cpu).norm() <= 1e-4 * cpu.norm()


def test_in_place_by_two_launches_gives_the_bits_of_the_drop_in():
    logits = torch.randn(4, 9, SMALL, device="cuda").bfloat16()
    tokens = torch.randint(SMALL, (4, 9), device="cuda")
    old, advantages = torch.randn(4, 9, device="cuda") - 10, torch.randn(4, device="cuda")
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        z = leaf * 1
        before = z._version
        loss = pyrlk.policy_loss(
            z, tokens, old, advantages, objective=pyrlk.GSPO(0.2, 0.2), inplace=inplace
        )
        loss.backward()
        assert (z._version > before) == inplace
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_draft_loss_equals_the_cpu(kind):
    torch.manual_seed(0)
    vocab = size(5000, 300)
    hidden, weight, tokens = torch.randn(150, 64), torch.randn(vocab, 64) / 8, torch.arange(150)
    teacher = torch.randn(150, 64) if kind == "tv" else None
    bounds = torch.tensor([0, 40, 40, 150])
    results = []
    for device in ("cpu", "cuda"):
        leaf = hidden.to(device).requires_grad_()
        loss = pyrlk.mtp_loss(
            leaf, weight.to(device), tokens.to(device), depth=2, cu_seqlens=bounds.to(device),
            kind=kind, teacher_hidden=teacher if teacher is None else teacher.to(device),
        )  # fmt: skip
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda.cpu() - cpu).norm() <= 1e-4 * cpu.norm()


def test_a_broken_support_gives_nan_in_its_row_alone():
    logits = torch.randn(5, SMALL, device="cuda")
    tokens = torch.tensor([5, 7, 5, 5, 5], device="cuda")
    ids = torch.tensor([3, 5, 3, 5, 3, 5, 2**31 - 1, 3, 5], dtype=torch.int32, device="cuda")
    # A member, a token outside its set, an id out of range, an empty set, offsets out of range.
    offsets = torch.tensor([0, 2, 4, 7, 7, 2**40], device="cuda")
    support = pyrlk.Support(ids, offsets)
    leaf = logits.requires_grad_()
    logprob = pyrlk.token_logprobs(leaf, tokens, support=support)
    logprob.sum().backward()
    assert logprob.isnan().tolist() == [False, True, True, True, True]
    assert leaf.grad.isnan().all(-1).tolist() == [False, True, True, True, True]
    assert leaf.grad[0].isfinite().all()


def test_a_row_has_the_same_bits_in_any_batch():
    rows = size(300, 9)
    logits = torch.randn(rows, VOCAB, device="cuda").bfloat16()
    tokens = torch.randint(VOCAB, (rows,), device="cuda")
    together, alone = score(logits, tokens), score(logits[7:8], tokens[7:8])
    assert torch.equal(together.stats[7], alone.stats[0])
    assert torch.equal(together.stats, score(logits, tokens).stats)


@pytest.mark.skipif(DRY, reason="nothing is compiled")
def test_lengths_and_hyper_parameters_compile_nothing_twice():
    def step(length, temperature, eps):
        logits = torch.randn(2, length + 1, 4097, device="cuda")[:, :-1]
        tokens = torch.randint(4097, (2 * length,), device="cuda")
        ones, out = empty(2 * length).fill_(1), empty(2 * length)
        score(logits, tokens, temperature)
        terms = objective.terms(objective.DAPO(eps_high=eps))
        policy_loss.policy_loss_fwd(
            logits,
            tokens,
            None,
            ones,
            ones,
            ones,
            None,
            temperature,
            4097,
            terms,
            out,
            out,
            None,
            None,
        )

    def compiled():
        kernels = (
            logprob.token_logprobs_fwd_kernel,
            policy_loss.policy_loss_fwd_kernel,
        )
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    step(1, 1.0, 0.28)
    step(16, 0.7, 0.28)
    before = compiled()
    for length in (2, 3, 7, 8, 15, 17, 32, 100):
        step(length, 1.0 / length, 0.01 * length)
    assert compiled() == before
