"""Bits: the same on any instruction set, beside any other rows, with any number of threads."""

from __future__ import annotations

import pytest
import torch

import pyrlk
from pyrlk import _C, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Several tiles and a ragged tail; the tail alone; one element.
VOCABS = [9001, 37, 1]


@pytest.fixture(autouse=True)
def restore():
    name, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_isa(name)
    torch.set_num_threads(threads)


def problem(dtype, vocab, rows=64, scale=4.0):
    torch.manual_seed(vocab)
    z = (scale * torch.randn(rows, vocab)).to(dtype)
    if vocab > 30:
        z[3, ::3] = -torch.inf
        z[4] = 1.0
        z[5] = -torch.inf
        z[5, 7] = 0.5
        z[6] *= 100
        z[7] *= 1e-6
        z[8, 20] = torch.nan
        z[9, 20] = torch.inf
    return z, torch.randint(vocab, (rows,)), torch.randn(rows), torch.rand(rows) + 0.5


def everything(z, tokens, adv, tau):
    """All that the ops compute of these rows, row by row, as one list of tensors."""
    leaf = z.detach().requires_grad_()
    lp, entropy = pyrlk.token_logprobs(leaf, tokens, temperature=tau, return_entropy=True)
    (lp_grad,) = torch.autograd.grad((lp * adv + 0.3 * entropy).sum(), leaf)
    old = lp.detach().nan_to_num(0.0, 0.0, 0.0) - 0.1 * adv
    loss = pyrlk.policy_loss(
        leaf, tokens, old, adv, objective=pyrlk.DAPO(), temperature=tau, entropy_coef=0.01,
        ref_logprobs=old - 0.1, kl_coef=0.1, normalizer=1.0,
    )  # fmt: skip
    (loss_grad,) = torch.autograd.grad(loss, leaf)
    out = [lp, entropy, lp_grad, loss_grad, pyrlk.reinforce_grad(z, tokens, adv, temperature=tau)]
    rows = torch.arange(len(z)) if z.shape[0] == 64 else None
    for settings in ({}, {"top_k": 9, "top_p": 0.9}, {"min_p": 0.05}):
        seed = tokens * 7 + (adv * 1e6).long()
        got = pyrlk.sample(z, temperature=tau, seed=seed, return_support=True, **settings)
        out += got[:5]
        if rows is not None:
            out += [got.support.ids, got.support.offsets]
    return [x.detach() for x in out]


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[a.element_size()]
        assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_code_returns_the_bits_of_portable_code(dtype, vocab, isa):
    args = problem(dtype, vocab)
    assert _C.set_isa("base")
    want = everything(*args)
    if not _C.set_isa(isa):
        pytest.skip(f"this machine or build lacks {isa}")
    assert _C.cpu_isa() == isa
    assert_same_bits(everything(*args), want)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_16_bit_pattern_widens_and_rounds_like_torch(isa):
    """All 2¹⁶ patterns, normal and subnormal, on the way in; random values on the way out."""
    if not _C.set_isa(isa):
        pytest.skip(f"this machine or build lacks {isa}")
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        x = x[x.isfinite()]
        # Widening: a two-token row (x, 0) has log-odds x.
        z = torch.stack([x, torch.zeros_like(x)], 1)
        lp = pyrlk.token_logprobs(z, torch.zeros(len(x), dtype=torch.long))
        want = z.double().log_softmax(-1)[:, 0]
        torch.testing.assert_close(lp.double(), want, rtol=3e-7, atol=3e-7)
        # Rounding: A·(π − e_a) of an even row is ±A/2, in the type of the logits.
        scale = torch.randn(len(x)) * x.float().abs().clamp(1e-30, 1e30)
        half = pyrlk.reinforce_grad(torch.zeros_like(z), torch.ones(len(x)).long(), scale)
        assert torch.equal(half[:, 0], (scale / 2).to(dtype))
        assert torch.equal(half[:, 1], (-scale / 2).to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [1, 7])
def test_a_row_has_the_same_bits_in_any_batch(dtype, size):
    args = problem(dtype, 4500)
    whole = everything(*args)
    keep = [i for i in range(len(whole)) if whole[i].shape[:1] == (64,)]
    parts = [everything(*(x[i : i + size] for x in args)) for i in range(0, 64, size)]
    per_row = [x for x in whole if x.shape[:1] == (64,)]
    assert len(keep) == len(parts[0])
    assert_same_bits([torch.cat(column) for column in zip(*parts, strict=True)], per_row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repetition_change_no_bit(dtype):
    args = problem(dtype, 4500)
    torch.set_num_threads(1)
    want = everything(*args)
    for threads in (2, 5, 5, 1):
        torch.set_num_threads(threads)
        assert_same_bits(everything(*args), want)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_loss_has_the_same_bits_from_run_to_run_and_thread_to_thread(count):
    z, tokens, adv, tau = problem(torch.float32, 4500)
    z, tokens, adv, tau = (
        x[10 : 10 + count].repeat(3, *[1] * (x.dim() - 1)) for x in (z, tokens, adv, tau)
    )
    losses = set()
    for threads in (1, 2, 4, 4):
        torch.set_num_threads(threads)
        losses.add(pyrlk.dapo_loss(z, tokens, adv - 5, adv, temperature=tau).item())
    assert len(losses) == 1


def test_an_unknown_instruction_set_is_refused_and_changes_nothing():
    before = _C.cpu_isa()
    assert not _C.set_isa("avx1024")
    assert _C.cpu_isa() == before


def wide_rows():
    """Rows with more candidates than a search narrows at once (2^14), and what the filters do."""
    vocab = 40_000
    g = torch.Generator().manual_seed(3)
    z = torch.randn(7, vocab, generator=g) * 1e-3
    z[1] = 0.25
    z[2] = (torch.arange(vocab) % 5).float()  # five values: the cut lies among thousands of ties
    z[3, 5::977] = 9.0  # most of the mass on ids that a regular sample of 512 misses
    z[4] = torch.arange(vocab).float() * 1e-4  # ascending
    z[5] = z[4].flip(0)
    z[6, ::2] = -torch.inf
    filters = [
        {"top_p": 0.95},
        {"top_p": 0.3, "top_k": 25_000},
        {"top_k": 25_000},
        {"top_p": 0.5, "top_k": 30_000, "order": "joint"},
        {"min_p": 0.9, "top_p": 0.999},
        {"top_p": 0.6, "ties": "keep"},
    ]
    return z, filters


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("case", range(6))
def test_wide_kept_sets_are_those_of_float64(case, isa):
    z, filters = wide_rows()
    if not _C.set_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    options = filters[case]
    truth = reference.sample(z, seed=0, **options)
    got = pyrlk.sample(z, seed=0, return_support=True, **options)
    assert torch.equal(got.support.to_mask(z.shape[1]), truth.mask)
    assert torch.equal(got.kept.long(), truth.mask.sum(1))
    # The same sets where the buffer ends after the first rows: those beyond it as bits.
    small = int(got.support.offsets[3])
    cut = pyrlk.sample(z, seed=0, return_support=True, support_capacity=small, **options)
    beyond = torch.arange(len(z)) >= 3
    assert torch.equal((cut.status & 16) != 0, beyond)
    assert torch.equal(cut.support.trim().ids, got.support.ids)
    assert torch.equal(cut.token, got.token)
    assert torch.equal(cut.logprob, got.logprob)
