"""Policy losses on logits: every option against float64 autograd, and what masks and layouts do."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrlk
from pyrlk import loss as loss_module

OBJECTIVES = [
    pyrlk.REINFORCE(),
    pyrlk.REINFORCE(aggregation="sequence"),
    pyrlk.PPO(),
    pyrlk.PPO(dual_clip=1.5),
    pyrlk.GRPO(),
    pyrlk.GRPO(delta=1.1),
    pyrlk.BNPO(delta=1.4),
    pyrlk.DrGRPO(max_length=11),
    pyrlk.DAPO(),
    pyrlk.DAPO(eps_low=0.05, eps_high=0.1, aggregation="sequence-sum"),
]
CORRECTIONS = [
    None,
    *(pyrlk.TIS(a, b, 1.2) for a in ("token", "sequence") for b in ("clip", "mask")),
]
LENGTHS = [4, 0, 1, 7]  # packed sequences, an empty one among them


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64)):
    """(logits, arguments, options) of policy_loss: every option, layout and dtype at random."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    vocab = draw(st.sampled_from([2, 17, 64, 130]))
    packed = draw(st.booleans())
    shape = (sum(LENGTHS),) if packed else (3, 4)
    view = draw(st.sampled_from(["dense", "shifted", "transposed", "wide"]))
    spread = draw(st.sampled_from([0.3, 2.0]))
    if view == "dense" or (packed and view != "wide"):
        z = spread * torch.randn(*shape, vocab)
    elif view == "wide":
        z = (spread * torch.randn(*shape, vocab + 5))[..., :vocab]
    elif view == "shifted":
        z = (spread * torch.randn(3, 5, vocab))[:, :-1]
    else:
        z = (spread * torch.randn(4, 3, vocab)).transpose(0, 1)
    z = z.to(dtype)
    size = draw(st.sampled_from([None, vocab - 1]))
    tokens = torch.randint(size or vocab, shape)
    tau = draw(st.sampled_from([1.0, 0.75, "tensor"]))
    tau = 0.5 + torch.rand(shape) if tau == "tensor" else tau
    with torch.no_grad():
        lp = pyrlk.token_logprobs(z, tokens, temperature=tau, vocab_size=size).float()
    count = len(LENGTHS) if packed else 3
    adv = torch.randn(count if draw(st.booleans()) else shape)
    adv[0] = 0.0
    mask = {
        "none": None,
        "bool": torch.rand(shape) > 0.3,
        "int": torch.randint(0, 2, shape),
        "float": torch.rand(shape) * (torch.rand(shape) > 0.3),
    }[draw(st.sampled_from(["none", "bool", "int", "float"]))]
    if draw(st.booleans()):
        tokens = torch.where(torch.rand(shape) < 0.2, -100, tokens)
    options = {
        "objective": draw(st.sampled_from(OBJECTIVES)),
        "temperature": tau,
        "vocab_size": size,
        "entropy_coef": draw(st.sampled_from([0.0, 0.05, -0.3])),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0) if packed else None,
        "normalizer": draw(st.sampled_from([None, 7.0, torch.tensor(5.5)])),
    }
    if draw(st.booleans()):
        options["ref_logprobs"] = lp + 0.3 * torch.randn(shape)
        options["kl_coef"] = draw(st.sampled_from([0.1, -0.5]))
        options["kl"] = draw(st.sampled_from(["k1", "k2", "k3"]))
        options["kl_importance"] = draw(st.booleans())
    correction = draw(st.sampled_from(CORRECTIONS))
    if correction is not None:
        options |= {"correction": correction, "rollout_logprobs": lp + 0.2 * torch.randn(shape)}
    old = lp + 0.3 * torch.randn(shape) if draw(st.booleans()) else None
    ids = tokens.int() if draw(st.booleans()) else tokens
    return z, (ids, old, adv, mask), options


def run(z, arguments, options):
    """(loss, gradient) of pyrlk.policy_loss through autograd."""
    leaf = z.detach().requires_grad_()
    loss = pyrlk.policy_loss(leaf, *arguments, **options)
    loss.backward()
    return loss.detach(), leaf.grad


@settings(max_examples=60)
@given(cases())
def test_loss_and_gradient_equal_float64(oracle, case):
    z, arguments, options = case
    truth = oracle.judge(z, *arguments, **options)
    loss, grad = run(z, arguments, options)
    # Per-token inputs and weights are float32 beside float32 logits, float64 beside float64.
    assert loss.dtype == grad.dtype == z.dtype
    oracle.assert_loss(loss, truth)
    oracle.assert_gradient(grad, truth, options["temperature"])


@settings(max_examples=40)
@given(cases((torch.bfloat16, torch.float16)))
def test_16_bit_gradients_are_correctly_rounded_but_for_one_ulp(oracle, case):
    z, arguments, options = case
    truth = oracle.judge(z, *arguments, **options)
    loss, grad = run(z, arguments, options)
    assert loss.dtype == torch.float32
    assert grad.dtype == z.dtype
    oracle.assert_loss(loss, truth)
    oracle.assert_gradient(grad, truth, options["temperature"])


@settings(max_examples=25)
@given(cases((torch.float32, torch.bfloat16, torch.float64)))
def test_in_place_and_loss_alone_give_the_same_bits(case):
    z, arguments, options = case
    loss, grad = run(z, arguments, options)
    with torch.no_grad():
        assert torch.equal(pyrlk.policy_loss(z, *arguments, **options), loss)
    leaf = z.detach().requires_grad_()
    again = pyrlk.policy_loss(leaf * 1, *arguments, inplace=True, **options)
    again.backward()
    assert torch.equal(again, loss)
    assert torch.equal(leaf.grad, grad)


@settings(max_examples=25)
@given(cases((torch.float32,)))
def test_from_logprobs_and_a_callable_equal_the_fused_path(oracle, case):
    z, (tokens, old, adv, mask), options = case
    truth = oracle.judge(z, tokens, old, adv, mask, **options)
    tau, size = options["temperature"], options["vocab_size"]
    keep = tokens if mask is None else torch.where(mask != 0, tokens, -100)
    weight = torch.ones(tokens.shape) if mask is None else mask
    weight = torch.where(tokens != -100, weight, 0)
    rest = {k: v for k, v in options.items() if k not in ("temperature", "vocab_size")}
    leaf = z.detach().requires_grad_()
    lp, ent = pyrlk.token_logprobs(
        leaf, keep, temperature=tau, vocab_size=size, return_entropy=True
    )
    loss = pyrlk.policy_loss_from_logprobs(lp, old, adv, weight, entropy=ent, **rest)
    loss.backward()
    oracle.assert_loss(loss, truth)
    oracle.assert_gradient(leaf.grad, truth)

    def surrogate(logprobs, old, adv, mask):
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)

    options["objective"] = pyrlk.DAPO()
    fused, fused_grad = run(z, (tokens, old, adv, mask), options)
    options["objective"] = surrogate
    own, own_grad = run(z, (tokens, old, adv, mask), options)
    scale = max(1.0, truth.scale)
    torch.testing.assert_close(own, fused, rtol=1e-5, atol=1e-6 * scale)
    assert (own_grad - fused_grad).norm() <= 4e-6 * fused_grad.norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ignored", ["mask", "token"])
@settings(max_examples=25)
@given(case=cases((torch.float32,)))
def test_masked_rows_may_hold_anything(dtype, ignored, case):
    z, (tokens, old, adv, mask), options = case
    if adv.shape != tokens.shape:
        adv = torch.randn(tokens.shape)
    z = z.to(dtype).contiguous()
    out = torch.rand(tokens.shape) < 0.5
    mask = torch.where(out, 0, torch.ones(tokens.shape) if mask is None else mask)
    keep = torch.where(tokens == -100, 0, tokens) if ignored == "mask" else tokens
    clean = run(z, (keep, old, adv, mask), options)
    z = z.masked_fill(out[..., None], math.nan)
    if ignored == "mask":
        keep = torch.where(out, 10**6, keep)  # not even the token is looked at
    else:
        keep, mask = torch.where(out, -100, keep), torch.where(out, 1, mask)

    def poison(x):
        return x.masked_fill(out, math.nan) if isinstance(x, torch.Tensor) else x

    for name in ("ref_logprobs", "rollout_logprobs"):
        if name in options:
            options[name] = poison(options[name])
    if isinstance(options["temperature"], torch.Tensor):
        options["temperature"] = options["temperature"].masked_fill(out, -1.0)
    loss, grad = run(z, (keep, poison(old), poison(adv), mask), options)
    assert torch.equal(loss, clean[0])
    assert torch.equal(grad, clean[1])
    assert grad[out].eq(0).all()


@pytest.mark.parametrize("objective", OBJECTIVES[:1] + OBJECTIVES[4:9:2], ids=repr)
@pytest.mark.parametrize("callable_", [False, True])
def test_no_token_counted_gives_zero_and_never_nan(objective, callable_):
    if callable_:
        objective = lambda lp, old, adv, mask: -lp * adv  # noqa: E731
    z = torch.full((2, 3, 9), math.nan, requires_grad=True)
    nan = torch.full((2, 3), math.nan)
    options = {"ref_logprobs": nan, "kl_coef": 0.1, "entropy_coef": 0.1, "objective": objective}
    loss, stats = pyrlk.policy_loss(
        z, torch.zeros(2, 3, dtype=torch.long), nan, nan, torch.zeros(2, 3), return_stats=True,
        **options,
    )  # fmt: skip
    loss.backward()
    assert loss == 0
    assert z.grad.eq(0).all()
    assert all(s.isfinite() for s in stats)
    assert stats.tokens == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_tokens_at_all_work(shape, inplace):
    z = torch.randn(*shape, 5, requires_grad=True)
    tokens, none = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    loss, stats = pyrlk.dapo_loss(
        z * 1, tokens, none, none, inplace=inplace, return_stats=True, entropy_coef=0.1
    )
    loss.backward()
    assert loss == 0
    assert z.grad.shape == z.shape
    assert stats.tokens == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_poisoned_row_poisons_the_loss_and_its_own_gradient_alone(bad):
    torch.manual_seed(0)
    z = torch.randn(5, 70)
    tokens, old, adv = torch.randint(69, (5,)), -4 - torch.rand(5), torch.randn(5)
    _, clean = run(z, (tokens, old, adv), {"entropy_coef": 0.1})
    z[2, 69] = bad
    loss, grad = run(z, (tokens, old, adv), {"entropy_coef": 0.1})
    assert loss.isnan()
    assert grad[2].isnan().all()
    assert torch.equal(grad[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
def test_a_token_that_the_old_policy_could_not_draw_is_infinitely_far(objective):
    z, tokens, adv = torch.randn(4, 9), torch.arange(4), -torch.ones(4)
    old = torch.tensor([-1.0, -math.inf, -2.0, -3.0])
    _, stats = pyrlk.policy_loss(z, tokens, old, adv, objective=objective, return_stats=True)
    assert stats.approx_kl == stats.ratio_mean == stats.ratio_max == math.inf
    mask = torch.tensor([1, 0, 1, 1])
    _, stats = pyrlk.policy_loss(z, tokens, old, adv, mask, objective=objective, return_stats=True)
    assert stats.approx_kl.isfinite()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradient_is_the_slope_of_the_loss(objective):
    torch.manual_seed(1)
    z = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    tokens, adv = torch.randint(6, (2, 3)), torch.randn(2, 3, dtype=torch.float64)
    old = pyrlk.token_logprobs(z, tokens).detach() + 0.1 * torch.randn(2, 3).double()
    options = {"ref_logprobs": old - 0.2, "kl_coef": 0.3, "entropy_coef": 0.2}

    def f(z):
        return pyrlk.policy_loss(z, tokens, old, adv, objective=objective, **options)

    # Not torch's gradcheck: it runs backward twice through one graph, and these losses allow one.
    (grad,) = torch.autograd.grad(f(z), z)
    step = 1e-6 * torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape)
    with torch.no_grad():
        slopes = torch.stack([(f(z + e) - f(z - e)) / 2e-6 for e in step])
    torch.testing.assert_close(grad, slopes.view_as(grad), rtol=1e-6, atol=1e-8)


@given(st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31))
def test_reinforce_grad_is_its_formula_and_the_gradient_of_reinforce_loss(dtype, seed):
    torch.manual_seed(seed)
    z = torch.randn(6, 50, dtype=dtype)
    tokens, adv = torch.randint(50, (6,)), torch.randn(6)
    tokens[1], adv[2] = -100, 0.0
    got = pyrlk.reinforce_grad(z, tokens, adv, temperature=0.5)
    want = pyrlk.reference.reinforce_grad(z.double(), tokens, adv.double(), temperature=0.5)
    assert (got.double() - want).norm() <= (4e-6 if dtype == torch.float32 else 1e-12) * want.norm()
    assert got[[1, 2]].eq(0).all()
    leaf = z.clone().requires_grad_()
    pyrlk.reinforce_loss(leaf, tokens, adv, temperature=0.5, normalizer=1.0).backward()
    torch.testing.assert_close(leaf.grad, got, rtol=1e-6, atol=1e-7)
    out = z.clone()
    assert pyrlk.reinforce_grad(out, tokens, adv, temperature=0.5, out=out) is out
    assert torch.equal(out, got)


def test_every_policy_loss_shows_and_takes_the_same_common_options():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    common = options(pyrlk.policy_loss)
    del common["objective"]
    assert list(common) == list(loss_module.Common.__annotations__)
    for function, own in (
        (pyrlk.dapo_loss, {"eps_low", "eps_high"}),
        (pyrlk.reinforce_loss, set()),
        (pyrlk.linear_policy_loss, {"objective", "bias", "softcap", "logits_dtype", "chunk"}),
        (pyrlk.policy_loss_from_logprobs, {"objective", "entropy"}),
    ):
        theirs = options(function)
        assert theirs.keys() - common.keys() == own
        assert {name: theirs[name] for name in common} == common


def test_replay_shows_the_parameters_of_sample():
    assert inspect.signature(pyrlk.replay) == inspect.signature(pyrlk.sample)
