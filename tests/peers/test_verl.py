"""pyrlk equals verl 0.9: its policy losses in our own words, and its own functions where installed.

Each case runs twice: against the formula below (the ordinary suite) and, marked `peers`, against
verl.trainer.ppo.core_algos. A formula is the loss of a token; `aggregate` makes one number of it.
Our side is pyrlk.integrations.verl, which has verl's signature and reads verl's options.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import sys
import types
from unittest import mock

import pytest
import torch

import pyrlk
from pyrlk import CISPO, DPPO, GMPO, GRPO, GSPO, PPO, REINFORCE, SAPO, ClipCov, DrGRPO, KLCov
from pyrlk.integrations import verl as integration

LOW, HIGH = 0.2, 0.28


def aggregate(loss, mask, mode):
    """verl's loss_agg_mode: over all tokens, or over the sequences that have any."""
    sums, counts = (mask * loss).sum(-1), mask.sum(-1)
    full = (counts > 0).sum()
    if mode == "token-mean":
        return sums.sum() / counts.sum()
    if mode == "token-sum":
        return sums.sum()
    if mode == "seq-mean-token-sum":
        return sums.sum() / full
    if mode == "seq-mean-token-sum-norm":
        return sums.sum() / full / mask.shape[-1]
    assert mode == "seq-mean-token-mean"
    return (sums / counts.clamp(min=1)).sum() / full


def clip(ratio):
    return ratio.clamp(1 - LOW, 1 + HIGH)


def vanilla(logp, old, adv, mask, *, clip_ratio_c=3.0):
    """PPO's pessimistic bound; for A < 0 the loss never exceeds clip_ratio_c·|A|."""
    ratio = (logp - old).exp()
    pessimistic = torch.maximum(-adv * ratio, -adv * clip(ratio))
    return torch.where(adv < 0, pessimistic.minimum(-adv * clip_ratio_c), pessimistic)


def dppo_tv(logp, old, adv, mask, *, clip_ratio_c=20.0):
    """Policy gradient with a truncated ratio, while |π − μ| of the token is inside its bound."""
    moved = logp.exp() - old.exp()
    inside = torch.where(adv > 0, moved <= HIGH, moved >= -LOW)
    return -(inside * (logp - old).exp().clamp(max=clip_ratio_c)).detach() * adv * logp


def dppo_kl(logp, old, adv, mask, *, clip_ratio_c=20.0, kl_low=0.02, kl_high=0.028):
    """The same with the KL of the outcomes "this token" and "another"; the way back is free."""
    p, q = logp.exp(), old.exp()
    kl = q * (old - logp) + (1 - q) * ((1 - q + 1e-8).log() - (1 - p + 1e-8).log())
    inside = torch.where(adv > 0, (kl <= kl_high) | (p <= q), (kl <= kl_low) | (p >= q))
    return -(inside * (p / q).clamp(max=clip_ratio_c)).detach() * adv * logp


def gspo(logp, old, adv, mask, *, low=0.05, high=0.08):
    """The value is the sequence's geometric mean ratio; each token's gradient is its own alone."""
    mean = (mask * (logp - old)).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = mean.exp().detach()[:, None] * (logp - logp.detach()).exp()
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - low, 1 + high))


def sapo(logp, old, adv, mask, *, tau_pos=1.0, tau_neg=1.05):
    """A sigmoid gate in place of the clip, slope 1 at ratio 1."""
    tau = torch.where(adv > 0, torch.full_like(adv, tau_pos), torch.full_like(adv, tau_neg))
    return -4 / tau / (1 + (tau * (1 - (logp - old).exp())).exp()) * adv


def gpg(logp, old, adv, mask):
    return -adv * logp


def covariance(logp, adv, mask):
    here = mask > 0
    return (adv - adv[here].mean()) * (logp - logp[here].mean()).detach()


def clip_cov(logp, old, adv, mask, *, low=0.5, high=2.0):
    """PPO without the tokens whose covariance is in (low, high) and that the clip left alone.

    With a share of 1 all of them go, and nothing is left to chance.
    """
    ratio = (logp - old).exp()
    cov = covariance(logp, adv, mask)
    free = -adv * clip(ratio) <= -adv * ratio
    gone = free & (cov > low) & (cov < high) & (mask > 0)
    assert gone.any()
    return torch.where(gone, 0.0, torch.maximum(-adv * ratio, -adv * clip(ratio)))


def kl_cov(logp, old, adv, mask, *, share=0.2, coef=0.7):
    """An unclipped ratio, and |log ratio| on the share of tokens with the highest covariance."""
    cov = torch.where(mask > 0, covariance(logp, adv, mask), -math.inf)
    count = max(1, int(share * int(mask.sum())))
    least = cov.flatten().sort(descending=True).values[count - 1]
    return -adv * (logp - old).exp() + coef * torch.where(cov >= least, (logp - old).abs(), 0.0)


def geo_mean(logp, old, adv, mask):
    """The geometric mean of ratios clipped on the side A points to, times the mean advantage."""
    x = logp - old
    up, down = x.clamp(max=HIGH), x.clamp(min=-LOW)
    x = torch.where(adv > 0, up, torch.where(adv < 0, down, 0.0))
    n = mask.sum(-1).clamp(min=1)
    loss = -(mask * adv).sum(-1) / n * ((mask * x).sum(-1) / n).exp()
    return loss[:, None].expand(mask.shape)


def dro(logp, old, adv, mask, *, beta=0.3):
    return -adv * logp + beta / 2 * (logp - old) ** 2


def cispo(logp, old, adv, mask):
    return -clip((logp - old).exp()).detach() * adv * logp


EPS = {"eps_low": LOW, "eps_high": HIGH}
POLICY_LOSS = types.SimpleNamespace(
    clip_cov_ratio=1.0,
    clip_cov_lb=0.5,
    clip_cov_ub=2.0,
    kl_cov_ratio=0.2,
    ppo_kl_coef=0.7,
    dro_beta=0.3,
)
# verl's name: (formula, verl's options where they differ from those of `config` below).
CASES = {
    "vanilla": (vanilla, {}),
    "vanilla dual clip": (vanilla, {"clip_ratio_c": 1.5}),
    "dppo_tv": (dppo_tv, {"clip_ratio_c": 20.0}),
    "dppo_tv truncated": (dppo_tv, {"clip_ratio_c": 1.2}),
    "dppo_kl": (
        dppo_kl,
        {"clip_ratio_c": 20.0, "clip_ratio_low": 0.02, "clip_ratio_high": 0.028},
    ),
    "gspo": (gspo, {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08}),
    "sapo": (sapo, {}),
    "gpg": (gpg, {}),
    "clip_cov": (clip_cov, {}),
    "kl_cov": (kl_cov, {}),
    "geo_mean": (geo_mean, {}),
    "dro": (dro, {}),
    "cispo": (cispo, {}),
}
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
BOUND = 1e-12
PEERS = [pytest.param(False, id="formula"), pytest.param(True, id="verl", marks=pytest.mark.peers)]
every_case = pytest.mark.parametrize("name", CASES)
both_peers = pytest.mark.parametrize("real", PEERS)


def spread(d):
    return d.advantages.expand(d.mask.shape)


def by_logprobs(d, make):
    """(loss, gradient by the log-probs) of make(logprobs)."""
    logprobs = d.logprobs.clone().requires_grad_()
    loss = make(logprobs)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad


def ours(d, objective, **options):
    given = {"old_logprobs": d.old, "advantages": spread(d), "mask": d.mask} | options
    return by_logprobs(
        d, lambda x: pyrlk.policy_loss_from_logprobs(x, objective=objective, **given)
    )


def config(base=object, *, batch_info=None, **options):
    """What the losses read of verl's ActorConfig."""

    class Config(base):
        clip_ratio, clip_ratio_low, clip_ratio_high = LOW, LOW, HIGH
        clip_ratio_c = 3.0
        tau_pos, tau_neg = 1.0, 1.05
        policy_loss = POLICY_LOSS
        global_batch_info = batch_info or {}

        def get(self, key, default):
            return getattr(self, key, default)

    for key, value in options.items():
        setattr(Config, key, value)
    return Config()


def called(loss, d, mode, given, weights):
    call = {
        "old_log_prob": d.old,
        "advantages": spread(d),
        "response_mask": d.mask,
        "loss_agg_mode": mode,
        "config": given,
        "rollout_is_weights": weights,
    }
    return by_logprobs(d, lambda x: loss(log_prob=x, **call)[0])


def verl_loss(core, d, name, mode, *, weights=None, **options):
    """(loss, gradient) of verl's own function."""
    loss = core.POLICY_LOSS_REGISTRY[name.split()[0]]
    return called(loss, d, mode, config(core.ActorConfig, **options), weights)


def integrated(d, name, mode, *, weights=None, **options):
    """(loss, gradient) of ours, called as verl calls its own."""
    loss = functools.partial(integration.policy_loss, name.split()[0])
    return called(loss, d, mode, config(**options), weights)


@pytest.fixture
def theirs(request, real):
    """A callable (d, name, mode) -> (loss, gradient): verl's own code or the formula."""
    if real:
        core = request.getfixturevalue("verl")

        def call(d, name, mode):
            return verl_loss(core, d, name, mode, **CASES[name][1])
    else:

        def call(d, name, mode):
            formula, options = CASES[name]
            known = {k: v for k, v in options.items() if k == "clip_ratio_c"}
            return by_logprobs(
                d,
                lambda x: aggregate(formula(x, d.old, spread(d), d.mask, **known), d.mask, mode),
            )

    return call


def own_mode(name, mode):
    """SAPO's mode is fixed in verl, GMPO's is a mean over rows."""
    return "seq-mean-token-mean" if name in ("sapo", "geo_mean") else mode


@every_case
@both_peers
@pytest.mark.parametrize("per_token", [False, True], ids=["per sequence", "per token"])
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradient_equal(batch, compare, theirs, real, name, per_token, seed):
    d = batch(seed, per_token=per_token, empty_row=name != "geo_mean")
    mode = own_mode(name, "token-mean")
    got = integrated(d, name, mode, **CASES[name][1])
    assert compare(got, theirs(d, name, mode)) <= BOUND


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "dro"])
@both_peers
def test_every_aggregation(batch, compare, theirs, real, name, mode):
    d = batch(1)
    got = integrated(d, name, mode, **CASES[name][1])
    assert compare(got, theirs(d, name, mode)) <= BOUND


@every_case
@both_peers
def test_through_logits(batch, compare, theirs, real, name):
    d = batch(2, empty_row=name != "geo_mean")
    mode = own_mode(name, "token-mean")
    loss, slope = theirs(d, name, mode)
    z = d.logits.clone().requires_grad_()
    logprobs = z.log_softmax(-1).gather(-1, d.tokens[..., None])[..., 0]
    (grad,) = torch.autograd.grad(logprobs, z, slope)
    leaf = d.logits.clone().requires_grad_()
    objective = integration.objective_of(config(**CASES[name][1]), name.split()[0], mode)
    value = pyrlk.policy_loss(
        leaf, d.tokens, d.old, d.advantages[:, 0], d.mask, objective=objective
    )
    value.backward()
    assert compare((value.detach(), leaf.grad), (loss, grad)) <= BOUND


@every_case
@pytest.mark.peers
def test_rollout_weights_are_tis(batch, compare, verl, name):
    """Weights that verl has computed, and the correction that computes them here."""
    d = batch(1, empty_row=name != "geo_mean")
    weights = torch.where(d.mask > 0, d.old - d.rollout, 0.0).exp().clamp(max=1.1)
    mode, options = own_mode(name, "token-mean"), CASES[name][1]
    expected = verl_loss(verl, d, name, mode, weights=weights, **options)
    assert compare(integrated(d, name, mode, weights=weights, **options), expected) <= BOUND
    tis = {"rollout_logprobs": d.rollout, "correction": pyrlk.TIS(max_ratio=1.1)}
    objective = integration.objective_of(config(**options), name.split()[0], mode)
    assert compare(ours(d, objective, **tis), expected) <= BOUND


@every_case
@pytest.mark.peers
def test_rollout_weights_of_zero(batch, compare, verl, name):
    """What verl's rejection leaves of a token: nothing, and no NaN."""
    d = batch(1, empty_row=name != "geo_mean")
    weights = torch.where(d.mask > 0, d.old - d.rollout, 0.0).exp()
    weights = torch.where(weights > 1.1, 0.0, weights)
    mode, options = own_mode(name, "token-mean"), CASES[name][1]
    expected = verl_loss(verl, d, name, mode, weights=weights, **options)
    assert compare(integrated(d, name, mode, weights=weights, **options), expected) <= BOUND


@pytest.mark.peers
@pytest.mark.parametrize(
    ("mode", "info"),
    [
        ("token-mean", {"dp_size": 4, "batch_num_tokens": 100}),
        ("token-sum", {"dp_size": 4}),
        ("seq-mean-token-sum", {"dp_size": 4, "global_batch_size": 24}),
        ("seq-mean-token-mean", {"dp_size": 4, "global_batch_size": 24}),
        ("seq-mean-token-sum-norm", {"dp_size": 4, "global_batch_size": 24}),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 30}),
        (
            "seq-mean-token-sum-norm",
            {"dp_size": 4, "global_batch_size": 24, "loss_scale_factor": 30},
        ),
    ],
)
def test_global_batch_is_a_normaliser(batch, compare, verl, mode, info):
    d = batch()
    got = integrated(d, "vanilla", mode, batch_info=info)
    assert compare(got, verl_loss(verl, d, "vanilla", mode, batch_info=info)) <= BOUND


@pytest.mark.peers
def test_metrics_equal(batch, verl):
    """pg_clipfrac and ppo_kl under verl's names, from the same batch."""
    d = batch()
    arguments = {"response_mask": d.mask, "loss_agg_mode": "token-mean"}
    _, want = verl.POLICY_LOSS_REGISTRY["vanilla"](
        d.old, d.logprobs, spread(d), config=config(verl.ActorConfig), **arguments
    )
    _, got = integration.policy_loss(
        "vanilla", d.old, d.logprobs, spread(d), config=config(), **arguments
    )
    assert want["actor/pg_clipfrac"] > 0
    for name in ("actor/pg_clipfrac", "actor/ppo_kl"):
        assert got[name] == pytest.approx(want[name], rel=1e-6)  # verl averages in float32


@pytest.mark.peers
def test_register_gives_verl_every_mode(batch, compare, verl):
    """Through verl's own registry, as its workers look a loss up."""
    d = batch()
    with mock.patch.dict(verl.POLICY_LOSS_REGISTRY):
        known = set(verl.POLICY_LOSS_REGISTRY)
        stubs = {"verl.trainer.ppo.core_algos": verl}
        for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
            stubs[name] = types.ModuleType(name)
        with mock.patch.dict(sys.modules, stubs):
            importlib.import_module("pyrlk.integrations.verl_register")  # as external_lib does
        added = set(verl.POLICY_LOSS_REGISTRY) - known
        assert added == {f"pyrlk_{mode}" for mode in known - {"bypass_mode"}}
        loss = verl.get_policy_loss_fn("pyrlk_vanilla")
        got = called(loss, d, "token-mean", config(), None)
    assert compare(got, verl_loss(verl, d, "vanilla", "token-mean")) <= BOUND


@pytest.mark.peers
def test_sum_norm_is_dr_grpo(batch, compare, verl):
    """loss_scale_factor is the length limit; `normalizer` the number of sequences with tokens."""
    d = batch()
    info = {"loss_scale_factor": 30}
    expected = verl_loss(
        verl, d, "vanilla", "seq-mean-token-sum-norm", clip_ratio_c=1e9, batch_info=info
    )
    got = ours(d, DrGRPO(30, **EPS), normalizer=float((d.mask.sum(-1) > 0).sum()))
    assert compare(got, expected) <= BOUND


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "peer"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_kl_loss(batch, compare, verl, kind, peer):
    d = batch()

    def with_kl(x):
        kl = verl.kl_penalty(x, d.ref, peer)
        policy = verl.agg_loss(gpg(x, d.old, spread(d), d.mask), d.mask, "token-mean")
        return policy + 0.1 * verl.agg_loss(kl, d.mask, "token-mean")

    got = ours(d, REINFORCE(), ref_logprobs=d.ref, kl_coef=0.1, kl=kind)
    assert compare(got, by_logprobs(d, with_kl)) <= BOUND


@pytest.mark.peers
def test_straight_through_kl_has_the_gradient_of_k2(batch, compare, verl):
    d = batch()
    _, grad = by_logprobs(
        d, lambda x: verl.agg_loss(verl.kl_penalty(x, d.ref, "k3+"), d.mask, "token-mean")
    )
    none = torch.zeros_like(spread(d))
    options = {"advantages": none, "ref_logprobs": d.ref, "kl_coef": 1.0}
    _, ours_k2 = ours(d, REINFORCE(), kl="k2", **options)
    assert compare((ours_k2,), (grad,)) <= BOUND


# Where pyrlk differs on purpose. Every name below is a row of docs/frameworks.md.


def one_token(log_ratio, advantage):
    """A batch of one token with that log-ratio; log π = −0.5."""
    logprobs = torch.tensor([[-0.5]], dtype=torch.float64)
    return types.SimpleNamespace(
        logprobs=logprobs,
        old=logprobs - log_ratio,
        advantages=torch.full_like(logprobs, advantage),
        mask=torch.ones(1, 1, dtype=torch.int64),
    )


@pytest.mark.peers
@pytest.mark.parametrize("name", ["vanilla", "dppo_tv", "sapo", "cispo"])
def test_deviation_no_clamp_of_the_log_ratio(verl, name):
    """Below e^−20 verl's ratio stays e^−20: 2e-9 of A in the value, and no gradient."""
    d = one_token(-25.0, 1.0)
    options = {"clip_ratio_low": 1.0}  # else cispo's own bound hides it
    expected, flat = verl_loss(verl, d, name, "token-mean", **options)
    objective = {
        "vanilla": PPO(1.0, HIGH, dual_clip=3.0),
        "dppo_tv": DPPO("tv", 1.0, HIGH),
        "sapo": SAPO(1.0, 1.05),
        "cispo": CISPO(1.0, HIGH),
    }[name]
    got, slope = ours(d, objective)
    assert got != expected
    assert abs(got - expected) < 1e-8
    if name in ("vanilla", "sapo"):
        assert flat == 0
        assert slope != 0


@pytest.mark.peers
def test_deviation_gspo_sequence_ratio_is_not_capped(verl):
    """verl caps log s at 10; with A < 0 nothing else bounds it."""
    d = one_token(12.0, -1.0)
    expected, flat = verl_loss(verl, d, "gspo", "token-mean")
    got, slope = ours(d, GSPO(LOW, HIGH, token_level=True))
    assert expected.item() == pytest.approx(math.exp(10), rel=1e-12)
    assert flat == 0
    assert got.item() == slope.item() == pytest.approx(math.exp(12), rel=1e-12)


@pytest.mark.peers
def test_deviation_k3_is_not_clamped(verl):
    """verl's k3 stops at 10, where its gradient vanishes: a far token is no longer pulled back."""
    d = one_token(0.0, 0.0)
    ref = d.logprobs + 5.0
    kl, flat = by_logprobs(d, lambda x: verl.kl_penalty(x, ref, "low_var_kl").sum())
    assert (kl, flat) == (10, 0)
    got, slope = ours(d, REINFORCE(), ref_logprobs=ref, kl_coef=1.0)
    assert got.item() == pytest.approx(math.exp(5) - 6, rel=1e-12)
    assert slope.item() == pytest.approx(1 - math.exp(5), rel=1e-12)


@pytest.mark.peers
def test_deviation_no_epsilon_in_a_length(batch, compare, verl):
    """verl divides a sequence's sum by n + 1e-8, pyrlk by n; float32 lengths hide it."""
    d = batch()._replace(mask=batch().mask.double())
    got = ours(d, GRPO(**EPS))
    expected = verl_loss(verl, d, "vanilla", "seq-mean-token-mean", clip_ratio_c=1e9)
    assert 1e-10 < compare(got, expected) < 1e-7


@pytest.mark.peers
def test_deviation_geo_mean_counts_empty_rows(batch, compare, verl):
    d = batch()
    expected = verl_loss(verl, d, "geo_mean", "token-mean")
    assert compare(ours(d, GMPO(**EPS)), expected) > 0.1
    assert compare(ours(d, GMPO(**EPS), normalizer=len(d.mask)), expected) < 1e-7
    assert compare(integrated(d, "geo_mean", "token-mean"), expected) < 1e-7


@pytest.mark.peers
def test_deviation_no_tokens_no_loss(batch, verl):
    """A batch without a token: 0/0 in verl, 0 with gradient 0 here."""
    d = batch()._replace(mask=torch.zeros_like(batch().mask))
    assert verl_loss(verl, d, "vanilla", "token-mean")[0].isnan()
    loss, grad = ours(d, PPO(**EPS))
    assert loss == 0
    assert (grad == 0).all()


@both_peers
def test_deviation_dual_clip_tie_keeps_its_gradient(request, real):
    """At r = dual_clip the loss has a corner: verl halves the gradient there, here it is whole."""
    d = one_token(1.0, -1.0)
    c = float((d.logprobs - d.old).exp())
    if real:
        core = request.getfixturevalue("verl")
        loss, half = verl_loss(core, d, "vanilla", "token-mean", clip_ratio_c=c)
    else:
        loss, half = by_logprobs(
            d, lambda x: vanilla(x, d.old, d.advantages, d.mask, clip_ratio_c=c).sum()
        )
    got, whole = ours(d, PPO(**EPS, dual_clip=c))
    assert got == loss
    assert whole == 2 * half


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("side", [-0.25, 0.25])
@both_peers
def test_clip_ties_agree(request, real, advantage, side):
    """At 1 ± eps exactly both sides of the clip are equal, and all of the gradient is there."""
    d = one_token(side, advantage)
    bound = float((d.logprobs - d.old).exp())
    low, high = (1 - bound, 0.5) if side < 0 else (0.5, bound - 1)
    at = (1 - low) if side < 0 else (1 + high)
    if at != bound:
        pytest.skip("1 ± eps rounds away from the ratio")
    if real:
        bounds = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": 1e9}
        core = request.getfixturevalue("verl")
        expected = verl_loss(core, d, "vanilla", "token-mean", **bounds)
    else:

        def formula(x):
            ratio = (x - d.old).exp()
            a = d.advantages
            return torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high)).sum()

        expected = by_logprobs(d, formula)
    got = ours(d, PPO(low, high))
    assert got == expected
    assert got[1].item() == -advantage * bound


@both_peers
def test_deviation_clip_cov_draws_by_its_seed(request, batch, real):
    """As many of the same candidates go as in verl; which ones, the seed says, not torch."""
    d = batch(per_token=True)
    whole = ours(d, PPO(**EPS))[1]
    objective = ClipCov(**EPS, share=0.1, cov_low=0.1, cov_high=3.0, seed=5)
    count = max(1, int(0.1 * int(d.mask.sum())))
    if real:
        core = request.getfixturevalue("verl")
        policy = types.SimpleNamespace(**vars(POLICY_LOSS) | {"clip_cov_ratio": 0.1})
        policy.clip_cov_lb, policy.clip_cov_ub = 0.1, 3.0
        torch.manual_seed(0)
        first = verl_loss(core, d, "clip_cov", "token-mean", policy_loss=policy)[1]
        assert ((first == 0) & (whole != 0)).sum() == count
    drawn = set()
    cov = covariance(d.logprobs, spread(d), d.mask)
    for seed in range(30):
        torch.manual_seed(seed)  # the global generator has no part in it
        fixed = ours(d, objective)[1]
        other = ours(d, dataclasses.replace(objective, seed=seed))[1]
        gone = (other == 0) & (whole != 0)
        assert gone.sum() == count
        assert ((cov > 0.1) & (cov < 3.0))[gone].all()
        drawn.add(tuple(gone.nonzero().flatten().tolist()))
        assert torch.equal(fixed, ours(d, objective)[1])
        torch.testing.assert_close(other[~gone], whole[~gone], rtol=1e-12, atol=0)
    assert len(drawn) > 10


def test_deviation_kl_cov_ties_go_to_the_first(batch):
    """Of equal covariances torch.topk takes any; here the lower index, on every device."""
    d = batch(empty_row=False)
    d = d._replace(
        logprobs=torch.full_like(d.logprobs, -1.0),
        mask=torch.ones_like(d.mask),
        old=torch.full_like(d.old, -1.3),
        advantages=torch.full_like(d.advantages, 0.5),
    )
    none = ours(d, KLCov(share=0.1, kl_coef=0.0))[1]
    some = ours(d, KLCov(share=0.1, kl_coef=1.0))[1]
    changed = (some != none).flatten().nonzero().flatten()
    assert changed.tolist() == list(range(int(0.1 * d.mask.numel())))


def test_shares_are_counted_in_double():
    """0.29 of 100 tokens is 28 to Python, and would be 29 in float32."""
    torch.manual_seed(0)
    logprobs = torch.randn(100).requires_grad_()
    grads = []
    for coef in (0.0, 1.0):
        loss = pyrlk.policy_loss_from_logprobs(
            logprobs,
            logprobs.detach() - 0.1,
            torch.linspace(-1, 1, 100),
            objective=KLCov(share=0.29, kl_coef=coef),
        )
        grads.append(torch.autograd.grad(loss, logprobs)[0])
    assert (grads[0] != grads[1]).sum() == int(0.29 * 100) == 28
