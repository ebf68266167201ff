"""What the suite shares: poisoned memory, a deterministic hypothesis profile, the float64 judge."""

from __future__ import annotations

import dataclasses
import os
import sys

import hypothesis
import pytest
import torch
from torch import Tensor

import pyrlk
from pyrlk import objective as _objective
from pyrlk import reference

hypothesis.settings.register_profile(
    "pyrlk",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("pyrlk")

PACKAGE = os.path.dirname(os.path.abspath(pyrlk.__file__)) + os.sep
allocations: list[tuple[tuple[int, ...], torch.dtype]] = []  # by pyrlk, since the last clear()


def _poisoned(make):
    """`make`, but memory that pyrlk leaves unwritten shows: NaN, or 77 where there is no NaN."""

    def wrapper(*args, **kwargs):
        out = make(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        if not sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            return out
        allocations.append((tuple(out.shape), out.dtype))
        with torch.no_grad():
            return out.fill_(float("nan") if out.is_floating_point() else 77)

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "empty", _poisoned(torch.empty))
    patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    patch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))
    yield
    patch.undo()


@pytest.fixture
def allocated():
    """Shapes and dtypes that pyrlk took from torch.empty and its kin during this test."""
    allocations.clear()
    return allocations


@dataclasses.dataclass
class Judged:
    """A loss in float64: value, gradient [..., V], slopes g, h [...], scale Σ w·|terms|."""

    loss: Tensor
    grad: Tensor
    g: Tensor
    h: Tensor
    scale: float


def _wide(x):
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _scale_of(logprobs, entropy, old, adv, mask, options) -> float:
    """Σ w·(|ℓ| + |KL term| + |entropy term|): what the error of the loss is measured against."""
    parts = []
    real = _objective.token_loss

    def spy(lp, old, adv, ref, ent, t):
        zero, off = torch.zeros_like(adv), {"kl_coef": 0.0, "entropy_coef": 0.0}
        policy = real(lp, old, adv, ref, ent, dataclasses.replace(t, **off))
        kl = real(lp, old, zero, ref, ent, dataclasses.replace(t, entropy_coef=0.0))
        spread = real(lp, old, zero, ref, ent, dataclasses.replace(t, kl_coef=0.0))
        total = policy.abs() + kl.abs() + spread.abs()
        parts.append(total.detach())
        return total

    _objective.token_loss = spy
    try:
        return float(
            reference.policy_loss_from_logprobs(
                logprobs, old, adv, mask, entropy=entropy, **options
            )
        )
    finally:
        _objective.token_loss = real


def judge(logits, tokens, old, adv, mask=None, *, temperature=1.0, vocab_size=None, **options):
    """The float64 truth of a call of `pyrlk.policy_loss`, by autograd of pyrlk.reference."""
    z = logits.detach().double().requires_grad_()
    tau = _wide(temperature)
    old, adv, mask = _wide(old), _wide(adv), _wide(mask)
    options = {k: _wide(v) for k, v in options.items()}
    loss = reference.policy_loss(
        z, tokens.long(), old, adv, mask, temperature=tau, vocab_size=vocab_size, **options
    )
    (grad,) = torch.autograd.grad(loss, z)
    counted = tokens != -100 if mask is None else (tokens != -100) & (mask != 0)
    weight = counted if mask is None else torch.where(counted, mask, 0)
    with torch.no_grad():
        ids = torch.where(counted, tokens.long(), -100)
        lp, ent = reference.token_logprobs(
            z, ids, temperature=tau, vocab_size=vocab_size, return_entropy=True
        )
    lp, ent = lp.requires_grad_(), ent.requires_grad_()
    again = reference.policy_loss_from_logprobs(lp, old, adv, weight, entropy=ent, **options)
    g, h = torch.autograd.grad(again, (lp, ent), allow_unused=True, materialize_grads=True)
    scale = _scale_of(lp.detach(), ent.detach(), old, adv, weight, options)
    return Judged(loss.detach(), grad, g, h, max(scale, abs(loss.item())))


def ulps(x: Tensor, y: Tensor) -> Tensor:
    """Distance in steps of the 16-bit type of `x`, with y rounded to it."""

    def steps(t):
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return (steps(x) - steps(y.to(x.dtype))).abs()


def assert_gradient(got: Tensor, truth: Judged, temperature=1.0) -> None:
    """fp32: 4e-6 relative in norm. 16 bit: 1 ulp for 99.99 %, never over 2 ulp or 2⁻²²·|g|/τ."""
    assert got.shape == truth.grad.shape
    if got.dtype in (torch.float32, torch.float64):
        bound = 4e-6 if got.dtype == torch.float32 else 1e-12
        error = (got.double() - truth.grad).norm()
        assert error <= bound * truth.grad.norm() + 1e-300, f"{error} > {bound}·{truth.grad.norm()}"
        return
    tau = temperature.double()[..., None] if isinstance(temperature, Tensor) else temperature
    floor = (truth.g.abs() + truth.h.abs())[..., None] * 2.0**-22 / tau
    near = (got.double() - truth.grad).abs() <= floor
    off = torch.where(near, 0, ulps(got, truth.grad))
    assert off.max() <= 2, f"{off.max()} ulp"
    assert (off > 1).sum() <= max(1, 1e-4 * off.numel())


def assert_loss(got: Tensor, truth: Judged) -> None:
    bound = 1e-6 if got.dtype == torch.float32 else 1e-12
    error = abs(got.item() - truth.loss.item())
    assert error <= bound * truth.scale + 1e-300, f"{error} > {bound}·{truth.scale}"


@pytest.fixture(scope="session")
def oracle():
    """judge, assert_loss, assert_gradient and ulps under one name."""

    class Oracle:
        pass

    for f in (judge, assert_loss, assert_gradient, ulps):
        setattr(Oracle, f.__name__, staticmethod(f))
    return Oracle
