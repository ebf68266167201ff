"""The scalar objective: torch and C++ against formulas written out once more in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import pyrlk
from pyrlk import DAPO, GRPO, PPO, REINFORCE, TIS, DrGRPO
from pyrlk import objective as objectives

FUSED = [REINFORCE(), PPO(), PPO(dual_clip=3.0), GRPO(delta=1.5), DAPO(), DAPO(0.0, 0.0), DAPO(1.0)]
OTHERS = [
    pyrlk.CISPO(), pyrlk.SAPO(), pyrlk.DPPO(), pyrlk.DPPO("kl"), pyrlk.DRO(0.1), pyrlk.GSPO(),
    pyrlk.GSPO(token_level=True), pyrlk.LUSPO(), pyrlk.GMPO(), pyrlk.VESPO(), pyrlk.ClipCov(),
    pyrlk.KLCov(),
]  # fmt: skip


def plain(objective, logp, old, adv, ref, kl, kl_coef, importance):
    """(ℓ, ∂ℓ/∂logp) by cases, the way the papers read."""
    ratio = math.exp(min(logp - old, 700.0)) if logp - old <= 700 else math.inf
    if adv == 0:
        loss, slope = 0.0, 0.0
    elif isinstance(objective, REINFORCE):
        loss, slope = -adv * logp, -adv
    else:
        low, high = 1 - objective.eps_low, 1 + objective.eps_high
        capped = min(ratio, getattr(objective, "delta", None) or math.inf)
        slope = -ratio * adv if capped == ratio else 0.0
        loss = -capped * adv
        bounded = -min(max(ratio, low), high) * adv
        if bounded > loss:
            loss, slope = bounded, 0.0
        worst = -(getattr(objective, "dual_clip", None) or math.inf) * adv
        if adv < 0 and loss > worst:
            loss, slope = worst, 0.0
    if kl_coef:
        d = logp - ref
        value, rise = {
            "k1": (d, 1.0),
            "k2": (d * d / 2, d),
            "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
        }[kl]
        if importance:
            value, rise = ratio * value, ratio * (value + rise)
        loss, slope = loss + kl_coef * value, slope + kl_coef * rise
    return loss, slope


@settings(max_examples=100)
@given(
    st.sampled_from(FUSED),
    st.floats(-20.0, -1e-3),
    st.floats(-3.0, 3.0),
    st.sampled_from([0.0, -1.0, 0.5, 1e3, -1e-3]),
    st.floats(-2.0, 2.0),
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
)
@example(DAPO(0.0, 0.0), -1.0, 0.0, 1.0, 0.0, "k3", 0.0, False)  # on the clip edge on both sides
@example(GRPO(delta=1.0), -1.0, 0.0, -1.0, 0.0, "k1", 0.0, False)  # on the delta edge
@example(DAPO(), -1.0, 800.0, 1.0, 0.0, "k1", 0.0, False)  # the ratio overflows, the clip holds
@example(DAPO(), -1.0, -800.0, -1.0, 0.0, "k1", 0.0, False)  # and underflows
def test_torch_and_cpp_equal_the_formula(objective, logp, shift, adv, ref, kl, kl_coef, importance):
    old = logp - shift
    want, slope = plain(objective, logp, old, adv, logp + ref, kl, kl_coef, importance)

    def one(x):
        return torch.tensor([[x]], dtype=torch.float64)

    options = {"ref_logprobs": one(logp + ref), "kl": kl, "kl_coef": kl_coef}
    options |= {"kl_importance": importance, "objective": objective}
    close = {"rel": 1e-9, "abs": 1e-10 * max(1.0, abs(want))}
    x = one(logp).requires_grad_()
    loss = pyrlk.policy_loss_from_logprobs(x, one(old), one(adv), **options)
    loss.backward()
    assert loss.item() == pytest.approx(want, **close)
    assert x.grad.item() == pytest.approx(slope, **close)
    # Two logits (z, 0) with π(0) = exp(logp): ∂ℓ/∂z = slope·(1 − π).
    z = torch.tensor([[[logp - math.log(-math.expm1(logp)), 0.0]]], dtype=torch.float64)
    z.requires_grad_()
    loss = pyrlk.policy_loss(z, torch.tensor([[0]]), one(old), one(adv), **options)
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-7, abs=1e-8 * max(1.0, abs(want)))
    if abs(shift) > 1e-6 or adv == 0 or isinstance(objective, REINFORCE):
        rest = -math.expm1(logp)
        assert z.grad[0, 0, 0].item() == pytest.approx(slope * rest, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(
    "objective",
    [*FUSED, pyrlk.CISPO(), pyrlk.DPPO(), pyrlk.DPPO("kl"), pyrlk.SAPO(), pyrlk.KLCov(kl_coef=0.0)],
    ids=repr,
)
def test_without_advantage_a_token_of_probability_0_costs_nothing(objective):
    """A = 0 times log 0 is 0, not NaN; CISPO's weight is 0 there too, whatever A is."""
    z = torch.randn(1, 3, 9)
    z[0, :2, 4] = -math.inf
    z, tokens = z.requires_grad_(), torch.tensor([[4, 4, 1]])
    adv = torch.tensor([[0.0, float(isinstance(objective, pyrlk.CISPO)), 0.5]])
    loss = pyrlk.policy_loss(z, tokens, torch.full((1, 3), -2.0), adv, objective=objective)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad[0, :2].eq(0).all()


def test_an_overflowing_ratio_that_is_clipped_has_gradient_zero_in_float32():
    z = torch.randn(2, 3, 9, requires_grad=True)
    tokens, old, adv = (
        torch.zeros(2, 3, dtype=torch.long),
        torch.full((2, 3), -300.0),
        torch.ones(2, 3),
    )
    for objective in (DAPO(), lambda lp, old, adv, m: -torch.clamp(lp - old, max=0.2) * adv):
        loss = pyrlk.policy_loss(z, tokens, old, adv, objective=objective)
        (slope,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        assert slope.eq(0).all()
    lp = torch.full((2, 3), -1.0, requires_grad=True)
    pyrlk.policy_loss_from_logprobs(lp, old, adv).backward()
    assert lp.grad.eq(0).all()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "sequence-sum", "constant"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_aggregation_is_its_definition(aggregation, packed):
    lengths = [3, 0, 2, 4]
    losses = [torch.randn(n, dtype=torch.float64) for n in lengths]
    masks = [torch.rand(n, dtype=torch.float64) * (torch.rand(n) > 0.2) for n in lengths]
    sums = [float((a * m).sum()) for a, m in zip(losses, masks, strict=True)]
    weights = [float(m.sum()) for m in masks]
    full = [i for i, w in enumerate(weights) if w > 0]
    want = {
        "token": sum(sums) / sum(weights),
        "sequence": sum(sums[i] / weights[i] for i in full) / len(full),
        "sequence-sum": sum(sums) / len(full),
        "constant": sum(sums) / (len(lengths) * 7),
    }[aggregation]
    if packed:
        adv, mask = -torch.cat(losses), torch.cat(masks)
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        adv, mask = -pad(losses, batch_first=True), pad(masks, batch_first=True)
        cu = None
    rule = DrGRPO(7) if aggregation == "constant" else DAPO(aggregation=aggregation)
    loss = pyrlk.policy_loss_from_logprobs(
        torch.zeros_like(adv), None, adv, mask, objective=rule, cu_seqlens=cu
    )
    assert loss.item() == pytest.approx(want, rel=1e-12)
    own = pyrlk.normalizer(torch.ones(4, 5), rule, micro_batches=2)
    assert own == {"token": 20, "constant": 4}.get(aggregation, 4) / 2


@pytest.mark.parametrize("mode", ["clip", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_correction_is_its_formula_and_an_infinite_sequence_stays_alone(level, mode, packed):
    tis = TIS(level, mode, 1.5)
    old, rollout = torch.randn(3, 4) / 2, torch.randn(3, 4) / 2
    old[1, 2] = -math.inf
    mask = (torch.rand(3, 4) > 0.3).float()
    mask[1, 2] = 1.0
    log_ratio = torch.where(mask > 0, old - rollout, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand(3, 4)
    ratio = log_ratio.exp()
    want = ratio.clamp(max=1.5) if mode == "clip" else ratio * (ratio <= 1.5)
    want = torch.where(mask > 0, want, 1.0)
    shape = torch.Size([12]) if packed else torch.Size([3, 4])
    cu = torch.tensor([0, 4, 8, 12]) if packed else None
    seqs = objectives.sequences(shape, cu)
    flat = (x.reshape(shape) for x in (old, rollout, mask))
    got = objectives.correction_weights(tis, *flat, seqs)
    torch.testing.assert_close(got.reshape(3, 4), want)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6), st.sampled_from([torch.int32, torch.int64])
)
def test_packed_sequences_sum_and_spread_like_a_loop(lengths, dtype):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    total = sum(lengths)
    x = torch.randn(total)
    seqs = objectives.sequences(torch.Size([total]), cu)
    assert seqs.count == len(lengths)
    bounds = cu.tolist()
    want = [x[a:b].double().sum().float() for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(seqs.sum(x), torch.stack(want))
    values = torch.randn(len(lengths))
    assert torch.equal(seqs.spread(values), values.repeat_interleave(torch.tensor(lengths)))


@pytest.mark.parametrize("objective", [*FUSED, *OTHERS], ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_every_objective_on_logits_equals_the_reference(objective, packed, oracle):
    torch.manual_seed(5)
    shape, cu = ((12,), torch.tensor([0, 5, 5, 12])) if packed else ((3, 4), None)
    z = torch.randn(*shape, 30, dtype=torch.float64)
    tokens, adv, mask = torch.randint(30, shape), torch.randn(shape), torch.rand(shape)
    tokens.view(-1)[3] = -100
    mask.view(-1)[7] = 0.0
    old = pyrlk.token_logprobs(z, tokens).float() + 0.2 * torch.randn(shape)
    options = {"objective": objective, "cu_seqlens": cu, "entropy_coef": 0.1}
    options |= {"correction": TIS(), "rollout_logprobs": old - 0.1}
    options |= {"ref_logprobs": old + 0.1, "kl_coef": 0.1}
    truth = oracle.judge(z, tokens, old, adv, mask, **options)
    hole = (mask == 0) | (tokens == -100)
    z = z.masked_fill(hole[..., None], math.nan).requires_grad_()
    for x in (old, adv, options["rollout_logprobs"], options["ref_logprobs"]):
        x.masked_fill_(hole, math.nan)
    loss, stats = pyrlk.policy_loss(z, tokens, old, adv, mask, return_stats=True, **options)
    loss.backward()
    oracle.assert_loss(loss, truth)
    oracle.assert_gradient(z.grad, truth)
    assert z.grad[hole].eq(0).all()
    assert all(s.isfinite() for s in stats)


@pytest.mark.parametrize(
    "objective", [*FUSED, pyrlk.SAPO(), pyrlk.DRO(0.1), pyrlk.GSPO()], ids=repr
)
def test_from_logprobs_passes_gradcheck(objective):
    torch.manual_seed(6)
    lp, entropy = (torch.rand(2, 3, dtype=torch.float64).neg().requires_grad_() for _ in range(2))
    old, adv = lp.detach() + 0.1 * torch.randn(2, 3), torch.randn(2, 3)
    options = {"ref_logprobs": old, "kl_coef": 0.1, "kl_importance": True, "entropy_coef": 0.3}
    assert gradcheck(
        lambda lp, entropy: pyrlk.policy_loss_from_logprobs(
            lp, old, adv, objective=objective, entropy=entropy, **options
        ),
        (lp, entropy),
    )


@pytest.mark.parametrize("correction", [TIS(), TIS(mode="mask", max_ratio=1.0)])
@pytest.mark.parametrize("fused", [True, False])
def test_statistics_are_their_definitions_on_both_paths(fused, correction):
    torch.manual_seed(7)
    z, tokens = torch.randn(4, 5, 40), torch.randint(40, (4, 5))
    adv, mask = torch.randn(4, 5), torch.rand(4, 5) * (torch.rand(4, 5) > 0.3)
    lp, entropy = pyrlk.reference.token_logprobs(z.double(), tokens, return_entropy=True)
    old, ref, rollout = (lp.float() + 0.3 * torch.randn(4, 5) for _ in range(3))
    options = {
        "ref_logprobs": ref,
        "kl_coef": 0.1,
        "correction": correction,
        "rollout_logprobs": rollout,
    }
    objective = DAPO() if fused else lambda lp, old, adv, mask: -lp * adv
    _, got = pyrlk.policy_loss(
        z, tokens, old, adv, mask, objective=objective, return_stats=True, **options
    )
    share = mask.double() / mask.double().sum()
    ratio, d = (lp - old).exp(), lp - ref
    factor = (old - rollout).exp()
    if correction.mode == "mask":  # a token whose term it removes may still be a clipped one
        factor = factor * (factor <= 1)
    factor = factor.clamp(max=2.0)
    want = {
        "entropy": (entropy * share).sum(),
        "approx_kl": ((ratio - 1 - (lp - old)) * share).sum(),
        "ref_kl": ((torch.exp(-d) + d - 1) * share).sum(),
        "clip_low": (((adv < 0) & (ratio < 0.8)) * share).sum(),
        "clip_high": (((adv > 0) & (ratio > 1.28)) * share).sum(),
        "ratio_mean": (ratio * share).sum(),
        "ratio_max": ratio[mask > 0].max(),
        "correction_mean": (factor * share).sum(),
        "tokens": (mask > 0).sum(),
    }
    for name, value in want.items():
        one = getattr(got, name)
        assert one.dim() == 0
        assert one.item() == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize(
    "objective", [pyrlk.GSPO(aggregation="token"), pyrlk.GMPO(), pyrlk.VESPO()]
)
def test_sequence_objectives_on_flat_tokens_ask_for_cu_seqlens(objective):
    with pytest.raises(ValueError, match="cu_seqlens is needed"):
        pyrlk.policy_loss(
            torch.randn(4, 9), torch.zeros(4, dtype=torch.long), torch.zeros(4), torch.ones(4),
            objective=objective,
        )  # fmt: skip


def test_objectives_are_frozen_values():
    assert DAPO() == DAPO(eps_high=0.28)
    assert len({DAPO(), DAPO(), PPO()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        DAPO().eps_low = 0.1
