"""pyrlk equals slime's losses, in our own words: packed samples, one list entry a response.

Default: the sum over responses of their token means; --calculate-per-token-loss: the sum over
tokens. slime divides by the global batch, or the global number of tokens, after its loss function.
Our side is pyrlk.integrations.slime.policy_loss, called as slime calls a custom loss.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from pyrlk.integrations import slime

LOW, HIGH, C = 0.2, 0.28, 3.0
BOUND = 1e-12
PROMPTS, LENGTHS, PADDING = [2, 1, 3, 1, 2, 4], [9, 4, 1, 0, 7, 9], 3


def arguments(**options):
    """slime's arguments, as far as its policy loss reads them."""
    given = {
        "advantage_estimator": "grpo",
        "eps_clip": LOW,
        "eps_clip_high": HIGH,
        "eps_clip_c": None,
        "entropy_coef": 0.0,
        "use_kl_loss": False,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k1",
        "use_unbiased_kl": False,
        "use_rollout_logprobs": False,
        "use_tis": False,
        "tis_clip": 2.0,
        "tis_clip_low": 0,
        "custom_tis_function_path": None,
        "rollout_temperature": 1.0,
        "rollout_top_p": 1.0,
        "recompute_loss_function": False,
    }
    return types.SimpleNamespace(**given | options)


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    """megatron.core of one rank."""
    core = types.ModuleType("megatron.core")
    core.mpu = types.SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 1)
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)


def packed(d) -> tuple[dict, Tensor]:
    """A micro-batch as slime holds it, and its logits [1, T, V] with padding behind."""
    torch.manual_seed(5)

    def responses(x):
        return [x[i, :n] for i, n in enumerate(LENGTHS)]

    def prompt(n):
        return torch.randint(13, (n,))

    tokens = [
        torch.cat([prompt(p), own]) for p, own in zip(PROMPTS, responses(d.tokens), strict=True)
    ]
    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": [len(t) for t in tokens],
        "response_lengths": LENGTHS,
        "loss_masks": responses(d.mask),
        "advantages": responses(d.advantages.expand(d.mask.shape)),
        "log_probs": responses(d.old),
        "ref_log_probs": responses(d.ref),
        "rollout_log_probs": responses(d.rollout),
    }
    rows = []
    for i, (p, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        unread = torch.randn(2, p, 13, dtype=torch.float64)
        rows += [
            unread[0, : p - 1],
            d.logits[i, :n],
            unread[1, :1],
        ]  # a row predicts the next token
    rows.append(torch.randn(PADDING, 13, dtype=torch.float64))
    return batch, torch.cat(rows)[None]


def reducer(batch, per_token=False, denominators=None):
    """slime's sum_of_sample_mean; `denominators` where several samples are one rollout."""
    counts = [m.sum() for m in batch["loss_masks"]] if denominators is None else denominators

    def reduce(x):
        parts = zip(x.split(LENGTHS), batch["loss_masks"], counts, strict=True)
        return sum((x * m).sum() / (1 if per_token else max(int(n), 1)) for x, m, n in parts)

    return reduce


def logprobs_of(batch, logits, temperature=1.0):
    """One tensor a response: the log-probs of its tokens, by the rows before them."""
    table, end, out = (logits[0] / temperature).log_softmax(-1), 0, []
    for tokens, n in zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True):
        end += len(tokens)
        out.append(table[torch.arange(end - n - 1, end - 1), tokens[len(tokens) - n :]])
    return out


def ppo(logp, old, adv, *, c=None):
    ratio = (logp - old).exp()
    loss = torch.maximum(-ratio * adv, -ratio.clamp(1 - LOW, 1 + HIGH) * adv)
    return torch.where(adv < 0, loss.minimum(-c * adv), loss) if c else loss


def gspo(logp, old, adv, mask):
    mean = ((logp - old) * mask).sum() / mask.sum().clamp(min=1)
    return ppo(mean.expand_as(logp), torch.zeros_like(logp), adv)


def cispo(logp, old, adv):
    return -(logp - old).exp().clamp(1 - LOW, 1 + HIGH).detach() * adv * logp


def with_gradient(logits, make):
    """(loss, gradient by the logits): logits that are no leaf, as a model's are none."""
    leaf = logits.clone().requires_grad_()
    loss = make(leaf * 1.0)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def difference_to(d, compare, formula, *, reduce=reducer, **options):
    """Our call against `formula(batch, i, logp) -> per-token losses` of response i."""
    batch, logits = packed(d)
    args, mean = arguments(**options), reduce(batch)

    def theirs(z):
        logp = logprobs_of(batch, z, args.rollout_temperature)
        return mean(torch.cat([formula(batch, i, x) for i, x in enumerate(logp)]))

    def ours(z):
        return slime.policy_loss(args, batch, z, mean)[0]

    return compare(with_gradient(logits, ours), with_gradient(logits, theirs))


def policy(b, i, logp, c=None):
    return ppo(logp, b["log_probs"][i], b["advantages"][i], c=c)


def per_token(batch):
    return reducer(batch, per_token=True)


def of_rollouts(batch):
    """Samples 0 and 1 are one rollout, the others another: a denominator is a rollout's."""
    counts = [int(m.sum()) for m in batch["loss_masks"]]
    return reducer(batch, denominators=[sum(counts[:2])] * 2 + [sum(counts[2:])] * 4)


every_reducer = pytest.mark.parametrize("reduce", [reducer, per_token, of_rollouts])


@every_reducer
@pytest.mark.parametrize("c", [None, C])
def test_policy_loss(batch, compare, reduce, c):
    gap = difference_to(
        batch(), compare, lambda b, i, x: policy(b, i, x, c), reduce=reduce, eps_clip_c=c
    )
    assert gap <= BOUND


@every_reducer
def test_gspo(batch, compare, reduce):
    gap = difference_to(
        batch(),
        compare,
        lambda b, i, x: gspo(x, b["log_probs"][i], b["advantages"][i], b["loss_masks"][i]),
        reduce=reduce,
        advantage_estimator="gspo",
    )
    assert gap <= BOUND


@every_reducer
def test_cispo(batch, compare, reduce):
    gap = difference_to(
        batch(),
        compare,
        lambda b, i, x: cispo(x, b["log_probs"][i], b["advantages"][i]),
        reduce=reduce,
        advantage_estimator="cispo",
    )
    assert gap <= BOUND


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_temperature(batch, compare, estimator):
    """--rollout-temperature divides the logits, and the gradient carries it."""

    def formula(b, i, x):
        if estimator == "grpo":
            return policy(b, i, x)
        return gspo(x, b["log_probs"][i], b["advantages"][i], b["loss_masks"][i])

    options = {"rollout_temperature": 0.7, "advantage_estimator": estimator}
    assert difference_to(batch(), compare, formula, **options) <= BOUND


def test_on_policy(batch, compare):
    """No log_probs in the batch: slime takes the policy's own, detached."""
    d = batch()
    whole, logits = packed(d)
    del whole["log_probs"]
    mean = reducer(whole)

    def theirs(z):
        logp = logprobs_of(whole, z)
        parts = [ppo(x, x.detach(), a) for x, a in zip(logp, whole["advantages"], strict=True)]
        return mean(torch.cat(parts))

    ours = with_gradient(logits, lambda z: slime.policy_loss(arguments(), whole, z, mean)[0])
    assert compare(ours, with_gradient(logits, theirs)) <= BOUND


@pytest.mark.parametrize("coef", [0.3])
def test_entropy_bonus(batch, compare, coef):
    d = batch()
    whole, logits = packed(d)
    mean = reducer(whole)

    def theirs(z):
        table = z[0].log_softmax(-1)
        entropy, end, rows = -(table.exp() * table).sum(-1), 0, []
        for total, n in zip(whole["total_lengths"], LENGTHS, strict=True):
            end += total
            rows.append(entropy[end - n - 1 : end - 1])
        logp = logprobs_of(whole, z)
        loss = torch.cat([policy(whole, i, x) for i, x in enumerate(logp)])
        return mean(loss) - coef * mean(torch.cat(rows))

    args = arguments(entropy_coef=coef)
    ours = with_gradient(logits, lambda z: slime.policy_loss(args, whole, z, mean)[0])
    assert compare(ours, with_gradient(logits, theirs)) <= BOUND


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("kind", "kl"),
    [
        ("k1", lambda d: d),
        ("k2", lambda d: d**2 / 2),
        ("k3", lambda d: (-d).exp() - 1 + d),
        ("low_var_kl", lambda d: (-d).exp() - 1 + d),  # below the 10 at which slime cuts it
    ],
)
def test_kl_loss(batch, compare, kind, kl, unbiased):
    def formula(b, i, logp):
        weight = (logp - b["log_probs"][i]).exp() if unbiased else 1.0
        return policy(b, i, logp) + 0.1 * weight * kl(logp - b["ref_log_probs"][i])

    options = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": kind}
    gap = difference_to(batch(), compare, formula, use_unbiased_kl=unbiased, **options)
    assert gap <= BOUND


@pytest.mark.parametrize("low", [0, 0.9])
@pytest.mark.parametrize("path", [None, "slime.backends.megatron_utils.loss.icepop_function"])
def test_tis_and_icepop(batch, compare, path, low):
    """--use-tis bounds the weight; the icepop function drops what is outside."""
    seen = set()

    def formula(b, i, logp):
        weight = (b["log_probs"][i] - b["rollout_log_probs"][i]).exp()
        outside = (weight < low) | (weight > 1.1)
        seen.update(outside.tolist())
        weight = weight.clamp(low, 1.1) if path is None else torch.where(outside, 0.0, weight)
        return weight * policy(b, i, logp)

    options = {"use_tis": True, "tis_clip": 1.1, "tis_clip_low": low}
    gap = difference_to(batch(), compare, formula, custom_tis_function_path=path, **options)
    assert gap <= BOUND
    assert seen == {True, False}


def test_rollout_logprobs_in_the_ratio(batch, compare):
    def formula(b, i, logp):
        return ppo(logp, b["rollout_log_probs"][i], b["advantages"][i])

    assert difference_to(batch(), compare, formula, use_rollout_logprobs=True) <= BOUND


@every_reducer
def test_metrics_are_reduced_as_slimes_own(batch, reduce):
    d = batch()
    whole, logits = packed(d)
    mean = reduce(whole)
    args = arguments(use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k2", use_tis=True)
    loss, metrics = slime.policy_loss(args, whole, logits.clone(), mean)
    logp = torch.cat(logprobs_of(whole, logits))
    old, ref, rollout, advantages = (
        torch.cat(whole[name])
        for name in ("log_probs", "ref_log_probs", "rollout_log_probs", "advantages")
    )
    ratio = (logp - old).exp()
    clipped = torch.where(advantages > 0, ratio > 1 + HIGH, (ratio < 1 - LOW) & (advantages < 0))
    expected = {
        "loss": loss,
        "pg_clipfrac": mean(clipped.double()),
        "approx_kl": mean(ratio - 1 - (logp - old)),
        "kl_loss": mean((logp - ref) ** 2 / 2),
        "tis": mean((old - rollout).exp().clamp(max=2.0)),
    }
    assert expected["pg_clipfrac"] > 0
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-12, atol=0, msg=name)


def test_top_p_replay(batch, compare):
    """--rollout-top-p: the log-prob is over the kept ids alone, in whatever order they came."""
    d = batch()
    whole, logits = packed(d)
    mean = reducer(whole)
    kept = [
        [[(int(t) + k) % 13 for k in (5, 0, 2)] for t in tokens[len(tokens) - n :]]
        for tokens, n in zip(whole["unconcat_tokens"], LENGTHS, strict=True)
    ]
    whole["rollout_top_p_token_ids"] = [[t for row in rows for t in row] for rows in kept]
    whole["rollout_top_p_token_offsets"] = [torch.arange(len(rows) + 1) * 3 for rows in kept]

    def theirs(z):
        outside, end = torch.zeros(z.shape[1:], dtype=torch.bool), 0
        for total, n, rows in zip(whole["total_lengths"], LENGTHS, kept, strict=True):
            end += total
            for row, ids in zip(range(end - n - 1, end - 1), rows, strict=True):
                outside[row] = True
                outside[row, ids] = False
        logp = logprobs_of(whole, z.masked_fill(outside, -torch.inf))
        return mean(torch.cat([policy(whole, i, x) for i, x in enumerate(logp)]))

    args = arguments(rollout_top_p=0.9)
    ours = with_gradient(logits, lambda z: slime.policy_loss(args, whole, z, mean)[0])
    assert compare(ours, with_gradient(logits, theirs)) <= BOUND

    whole["rollout_top_p_token_offsets"][1] = torch.arange(3)
    with pytest.raises(ValueError, match=r"rollout_top_p_token_offsets\[1\] must have 5 entries"):
        slime.policy_loss(args, whole, logits, mean)


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_the_gradient_takes_the_place_of_the_logits(batch, estimator):
    """No second [T, V]: autograd hands on the very memory of the logits."""
    whole, logits = packed(batch())
    leaf = logits.clone().requires_grad_()
    z = leaf * 1.0
    seen = []
    z.register_hook(seen.append)
    args = arguments(advantage_estimator=estimator)
    loss, _ = slime.policy_loss(args, whole, z, reducer(whole))
    loss.backward()
    assert seen[0].data_ptr() == z.data_ptr()
    torch.testing.assert_close(z.detach(), leaf.grad, rtol=0, atol=0)
    assert not torch.equal(z, logits)


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_recomputed_in_backward(batch, compare, estimator):
    """--recompute-loss-function runs the loss twice, so the logits stay what they are."""
    whole, logits = packed(batch())
    mean = reducer(whole)

    def run(args, call):
        return with_gradient(logits, lambda z: call(slime.policy_loss, args, whole, z, mean)[0])

    runs = []

    def checkpointed(loss, *given):
        def counted(*given):
            runs.append(1)
            return loss(*given)

        return torch.utils.checkpoint.checkpoint(counted, *given, use_reentrant=False)

    plain = run(arguments(advantage_estimator=estimator), lambda loss, *given: loss(*given))
    args = arguments(advantage_estimator=estimator, recompute_loss_function=True)
    assert compare(run(args, checkpointed), plain) == 0
    assert len(runs) == 2  # the reducer's slope, inside, asks for no run of its own
