"""pyrlk equals slime's losses, in our own words: packed responses, one list entry a sample.

Default: the sum over samples of their token means, over the global batch size. With
--calculate-per-token-loss: the sum over tokens, over their global number.
"""

from __future__ import annotations

import pytest
import torch

import pyrlk
from pyrlk import GRPO, GSPO, PPO, TIS

LOW, HIGH, C = 0.2, 0.28, 3.0
GLOBAL_BATCH, GLOBAL_TOKENS = 16, 90
BOUND = 1e-12


def samples(d):
    """The responses of a batch as slime holds them: a list of dicts, prompts and padding gone."""
    lengths = [9, 4, 1, 0, 7, 9]
    fields = {"logp": d.logprobs, "old": d.old, "ref": d.ref, "rollout": d.rollout, "mask": d.mask}
    return [
        {k: v[i, :n] for k, v in fields.items()} | {"adv": d.advantages[i, 0]}
        for i, n in enumerate(lengths)
    ]


def ppo(logp, old, adv, *, c=None):
    ratio = (logp - old).exp()
    loss = torch.maximum(-ratio * adv, -ratio.clamp(1 - LOW, 1 + HIGH) * adv)
    return torch.where(adv < 0, loss.minimum(-c * adv), loss) if c else loss


def gspo(logp, old, adv, mask):
    mean = ((logp - old) * mask).sum() / mask.sum().clamp(min=1)
    return ppo(mean.expand_as(logp), torch.zeros_like(logp), adv)


def packed(parts, name):
    return torch.cat([p[name] for p in parts])


def difference_to(parts, compare, formula, per_token, objective, **options):
    """Our packed call against `formula(sample, logp) -> per-token losses`."""
    leaf = packed(parts, "logp").clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for p, logp in zip(parts, leaf.split([len(p["logp"]) for p in parts]), strict=True):
        loss = (p["mask"] * formula(p, logp)).sum()
        total = total + (loss if per_token else loss / p["mask"].sum().clamp(min=1))
    total = total / (GLOBAL_TOKENS if per_token else GLOBAL_BATCH)
    (slope,) = torch.autograd.grad(total, leaf)

    ours = packed(parts, "logp").clone().requires_grad_()
    value = pyrlk.policy_loss_from_logprobs(
        ours,
        packed(parts, "old"),
        torch.stack([p["adv"] for p in parts]),
        packed(parts, "mask"),
        objective=objective,
        cu_seqlens=torch.tensor([0, *(len(p["logp"]) for p in parts)]).cumsum(0),
        normalizer=GLOBAL_TOKENS if per_token else GLOBAL_BATCH,
        **options,
    )
    (grad,) = torch.autograd.grad(value, ours)
    return compare((value.detach(), grad), (total.detach(), slope))


@pytest.mark.parametrize("per_token", [False, True], ids=["sample mean", "token"])
@pytest.mark.parametrize("c", [None, C])
def test_policy_loss(batch, compare, per_token, c):
    objective = PPO(LOW, HIGH, c, aggregation="token" if per_token else "sequence")
    gap = difference_to(
        samples(batch()),
        compare,
        lambda p, logp: ppo(logp, p["old"], p["adv"], c=c),
        per_token,
        objective,
    )
    assert gap <= BOUND


@pytest.mark.parametrize("per_token", [False, True], ids=["sample mean", "token"])
def test_gspo(batch, compare, per_token):
    gap = difference_to(
        samples(batch()),
        compare,
        lambda p, logp: gspo(logp, p["old"], p["adv"], p["mask"]),
        per_token,
        GSPO(LOW, HIGH, aggregation="token" if per_token else "sequence"),
    )
    assert gap <= BOUND


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("kind", "kl"),
    [
        ("k1", lambda d: d),
        ("k2", lambda d: d**2 / 2),
        ("k3", lambda d: (-d).exp() - 1 + d),
    ],
)
def test_kl_loss(batch, compare, kind, kl, unbiased):
    def formula(p, logp):
        weight = (logp - p["old"]).exp() if unbiased else 1.0
        return ppo(logp, p["old"], p["adv"]) + 0.1 * weight * kl(logp - p["ref"])

    gap = difference_to(
        samples(batch()),
        compare,
        formula,
        False,
        GRPO(LOW, HIGH),
        ref_logprobs=packed(samples(batch()), "ref"),
        kl_coef=0.1,
        kl=kind,
        kl_importance=unbiased,
    )
    assert gap <= BOUND


@pytest.mark.parametrize("mode", ["clip", "mask"])
def test_tis_and_icepop(batch, compare, mode):
    """--use-tis bounds the weight from above; the icepop function drops what is beyond."""

    def formula(p, logp):
        weight = (p["old"] - p["rollout"]).exp()
        weight = weight.clamp(max=1.1) if mode == "clip" else weight * (weight <= 1.1)
        return weight * ppo(logp, p["old"], p["adv"])

    gap = difference_to(
        samples(batch()),
        compare,
        formula,
        False,
        GRPO(LOW, HIGH),
        rollout_logprobs=packed(samples(batch()), "rollout"),
        correction=TIS("token", mode, 1.1),
    )
    assert gap <= BOUND
