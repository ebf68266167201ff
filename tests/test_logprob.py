"""token_logprobs: value, entropy and gradient of every layout against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import pyrlk
from pyrlk import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element, one vector and its neighbours, one tile of 4096 and its neighbours, several tiles.
VOCABS = [1, 2, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 9001]


def layouts(base: torch.Tensor):
    """Views of one [B, L, V] tensor whose rows sit at every stride the kernels address."""
    yield base
    yield base[:, :-1]  # the shift of a causal LM: rows of two strides
    yield base.transpose(0, 1)  # [L, B, V]
    yield base[:, :, : base.shape[-1] - 1] if base.shape[-1] > 1 else base  # row stride > V
    yield base[:1].expand(4, *base.shape[1:])  # stride 0
    yield base[:, 0]
    yield base[0, 0]  # no leading shape at all


def truth(z, tokens, **options):
    """(logprob, entropy, gradient of Σ(2·logprob + 3·entropy)) in float64."""
    z = z.detach().double().requires_grad_()
    lp, h = reference.token_logprobs(z, tokens.long(), return_entropy=True, **options)
    (grad,) = torch.autograd.grad((2 * lp + 3 * h).sum(), z)
    return lp.detach(), h.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradient_equal_float64_at_every_size(dtype, vocab, oracle):
    torch.manual_seed(vocab)
    z = (4 * torch.randn(6, vocab)).to(dtype).requires_grad_()
    tokens = torch.randint(vocab, (6,))
    lp, h = pyrlk.token_logprobs(z, tokens, temperature=0.75, return_entropy=True)
    (2 * lp + 3 * h).sum().backward()
    want_lp, want_h, want_grad = truth(z, tokens, temperature=0.75)
    wide = dtype == torch.float64
    assert lp.dtype == h.dtype == (torch.float64 if wide else torch.float32)
    tolerance = 1e-13 if wide else 3e-7
    torch.testing.assert_close(lp.double(), want_lp, rtol=tolerance, atol=3 * tolerance)
    torch.testing.assert_close(h.double(), want_h, rtol=tolerance, atol=10 * tolerance)
    assert z.grad.dtype == dtype
    if vocab > 1:
        judged = _Judged(want_grad, torch.full((6,), 2.0), torch.full((6,), 3.0))
        oracle.assert_gradient(z.grad, judged, 0.75)
    else:
        assert (z.grad == 0).all()


class _Judged:
    def __init__(self, grad, g, h):
        self.grad, self.g, self.h = grad, g, h


@given(
    st.sampled_from(range(7)),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.int64, torch.int32]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_layout_equals_its_contiguous_copy(index, dtype, ids, per_token, seed):
    torch.manual_seed(seed)
    z = list(layouts(torch.randn(3, 5, 70).to(dtype)))[index]
    tokens = torch.randint(-1, z.shape[-1], z.shape[:-1])
    tokens = torch.where(tokens < 0, -100, tokens).to(ids)
    tau = 0.5 + torch.rand(z.shape[:-1]) if per_token else 1.25
    leaf = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    view = z.detach().requires_grad_()
    got = pyrlk.token_logprobs(view, tokens, temperature=tau, return_entropy=True)
    want = pyrlk.token_logprobs(leaf, tokens, temperature=tau, return_entropy=True)
    for a, b in zip(got, want, strict=True):
        assert a.shape == z.shape[:-1]
        assert torch.equal(a, b)
    (got[0] * 2 + got[1]).sum().backward()
    (want[0] * 2 + want[1]).sum().backward()
    assert torch.equal(view.grad, leaf.grad)


def test_strided_tokens_and_incoming_gradients_are_read_where_they_lie():
    z = torch.randn(4, 6, 33, requires_grad=True)
    tokens = torch.randint(33, (6, 4)).t()
    weight = torch.randn(4, 12)[:, ::2]
    (pyrlk.token_logprobs(z, tokens) * weight).sum().backward()
    want = torch.autograd.grad((reference.token_logprobs(z, tokens) * weight).sum(), z)[0]
    torch.testing.assert_close(z.grad, want, rtol=1e-5, atol=1e-6)


def test_ignored_rows_are_never_read_and_give_zero():
    z = torch.randn(5, 40)
    z[1], z[3] = math.nan, math.inf
    tokens = torch.tensor([0, -100, 39, -100, 7])
    z.requires_grad_()
    lp, h = pyrlk.token_logprobs(z, tokens, return_entropy=True)
    (lp + h).sum().backward()
    assert lp[[1, 3]].eq(0).all()
    assert h[[1, 3]].eq(0).all()
    assert z.grad[[1, 3]].eq(0).all()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_row_poisons_itself_alone(bad, dtype):
    z = torch.randn(5, 4100).to(dtype)
    clean = z.clone().requires_grad_()
    z[2, 4099] = bad
    z.requires_grad_()
    tokens = torch.randint(4099, (5,))
    results = []
    for x in (clean, z):
        lp, h = pyrlk.token_logprobs(x, tokens, return_entropy=True)
        (lp + h).sum().backward()
        results.append((lp, h, x.grad))
    for want, got in zip(*results, strict=True):
        assert got[2].isnan().all()
        rest = [0, 1, 3, 4]
        assert torch.equal(got[rest], want[rest])


def test_minus_infinity_is_probability_zero():
    z = torch.randn(4, 300)
    z[:, 100:] = -math.inf
    z[3] = -math.inf
    z[2, :] = -math.inf
    z[2, 5] = 1e30
    z.requires_grad_()
    tokens = torch.tensor([3, 200, 5, 0])  # a kept one, a forbidden one, the only one, an empty row
    lp, h = pyrlk.token_logprobs(z, tokens, return_entropy=True)
    want = z.detach().double().log_softmax(-1)
    torch.testing.assert_close(lp[0].double(), want[0, 3], rtol=1e-6, atol=1e-6)
    assert lp[1] == -math.inf
    assert lp[2] == 0
    assert h[2] == 0
    assert lp[3].isnan()
    assert h[3].isnan()
    (grad,) = torch.autograd.grad(h[:3].sum(), z, retain_graph=True)
    assert grad[:3].isfinite().all()
    assert grad[:3, 100:].eq(0).all()
    (grad,) = torch.autograd.grad(lp[1], z)
    p = want[1].exp()
    p[200] -= 1
    torch.testing.assert_close(grad[1].double(), -p, rtol=1e-5, atol=1e-7)


# Rows at the edges of float32: the difference overflows, all are equal, one dwarfs the rest.
EXTREMES = [
    [3e38, -3e38, 0.0, 1.0],
    [3e38, 3e38, 3e38, 3e38],
    [-3e38, -3e38, -3e38, -3e38],
    [3e38, 3e38, -math.inf, 0.0],
    [0.0, -0.0, 0.0, -0.0],
    [1e-45, 0.0, -1e-45, 0.0],
    [100.0, 0.0, 0.0, 0.0],
]


@pytest.mark.parametrize("tau", [1e-6, 1.0, 1e3, 1e30])
def test_extreme_logits_equal_float64(tau):
    z = torch.tensor(EXTREMES, requires_grad=True)
    tau = torch.tensor(tau).item()
    tokens = torch.zeros(len(EXTREMES), dtype=torch.long)
    lp, h = pyrlk.token_logprobs(z, tokens, temperature=tau, return_entropy=True)
    lp.sum().backward()
    wide = z.detach().double().requires_grad_()
    want, want_h = reference.token_logprobs(wide, tokens, temperature=tau, return_entropy=True)
    want.sum().backward()
    torch.testing.assert_close(lp.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.double(), want_h, rtol=1e-5, atol=1e-5)
    scaled = z.grad.double() * tau
    torch.testing.assert_close(scaled, wide.grad * tau, rtol=1e-5, atol=1e-6)


@given(st.integers(2, 200), st.sampled_from([0.01, 1.0, 30.0]), st.integers(0, 2**31))
def test_gradient_is_the_softmax_jacobian_and_its_rows_sum_to_zero(vocab, spread, seed):
    torch.manual_seed(seed)
    row = spread * torch.randn(vocab)
    tau = 0.5 + torch.rand(()).item()
    z = row.expand(vocab, vocab).clone().requires_grad_()
    pi = (row.double() / torch.tensor(tau).double()).softmax(0)
    lp = pyrlk.token_logprobs(z, torch.arange(vocab), temperature=tau)
    (lp.exp().detach() * lp).sum().backward()  # row a becomes ∂π_a/∂z
    jacobian = (torch.diag(pi) - pi[:, None] * pi) / tau
    torch.testing.assert_close(z.grad.double(), jacobian, rtol=1e-5, atol=1e-6 / tau)
    total, size = z.grad.double().sum(-1).abs(), z.grad.double().abs().sum(-1)
    subnormal = vocab * 1.5e-45
    assert (total <= 1e-6 * size + 1e-6 * lp.exp() / tau + subnormal).all()


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    z = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(9, (3, 4))
    tokens[0, 0] = -100
    tau = 0.5 + torch.rand(3, 4, dtype=torch.float64)

    def f(z):
        return pyrlk.token_logprobs(z, tokens, temperature=tau, vocab_size=7, return_entropy=True)

    tokens = torch.where(tokens >= 7, 6, tokens)
    assert gradcheck(f, z)


def test_padded_columns_are_never_read_and_get_gradient_zero():
    z = torch.randn(6, 80)
    z[:, 70:] = math.nan
    z.requires_grad_()
    tokens = torch.randint(70, (6,))
    lp, h = pyrlk.token_logprobs(z, tokens, vocab_size=70, return_entropy=True)
    (lp + h).sum().backward()
    cut = z.detach()[:, :70].clone().requires_grad_()
    want, want_h = pyrlk.token_logprobs(cut, tokens, return_entropy=True)
    (want + want_h).sum().backward()
    assert torch.equal(lp, want)
    assert torch.equal(h, want_h)
    assert torch.equal(z.grad[:, :70], cut.grad)
    assert z.grad[:, 70:].eq(0).all()


def test_each_output_alone_carries_its_own_gradient():
    z = torch.randn(5, 60, requires_grad=True)
    tokens = torch.randint(60, (5,))
    lp, h = pyrlk.token_logprobs(z, tokens, return_entropy=True)
    (by_lp,) = torch.autograd.grad(lp.sum(), z, retain_graph=True)
    (by_h,) = torch.autograd.grad(h.sum(), z, retain_graph=True)
    (both,) = torch.autograd.grad((lp + h).sum(), z)
    torch.testing.assert_close(both, by_lp + by_h, rtol=1e-5, atol=1e-7)
    alone = pyrlk.token_logprobs(z, tokens)
    assert torch.equal(alone, lp)


def test_nothing_of_size_v_is_allocated_without_a_gradient(allocated):
    z = torch.randn(8, 500, requires_grad=True)
    tokens = torch.randint(500, (8,))
    with torch.no_grad():
        pyrlk.token_logprobs(z, tokens, return_entropy=True)
    assert allocated  # the hook sees pyrlk's memory
    assert all(math.prod(shape) <= 4 * 8 for shape, _ in allocated)


def test_empty_inputs_work():
    for shape in ((0,), (0, 3), (3, 0)):
        z = torch.randn(*shape, 7, requires_grad=True)
        lp, h = pyrlk.token_logprobs(z, torch.zeros(shape, dtype=torch.long), return_entropy=True)
        assert lp.shape == h.shape == shape
        (lp.sum() + h.sum()).backward()
        assert z.grad.shape == z.shape
