"""pyrlk equals TRL 1.16: GRPOTrainer._compute_loss itself, called on a stub of its trainer.

Loss and gradient by the log-probs in float64, every loss type, with masks that leave a row empty.
Objective and normaliser are those of pyrlk.integrations.trl_options for the options of each case.
What is different on purpose is a test_deviation_… below and a row of docs/frameworks.md.
"""

from __future__ import annotations

import collections
import math
import types

import pytest
import torch

import pyrlk
from pyrlk import BNPO, GRPO, GSPO, SAPO, TIS, VESPO
from pyrlk.integrations import trl_options as integration

pytestmark = pytest.mark.peers
trl = pytest.importorskip("trl", reason="pip install pyrlk[peers]")
GRPOTrainer = trl.GRPOTrainer

BOUND = 1e-12
ITEMS, PROCESSES, ACCUMULATION, STEPS = 40, 2, 4, 8
LIMIT = 21  # max_completion_length


class Stub:
    """What _compute_loss reads of its trainer: options, one process, and the log-probs to use."""

    get_gamma_weights = staticmethod(GRPOTrainer.get_gamma_weights)
    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)
    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask

    def __init__(self, logprobs, entropies, options):
        self.answer = logprobs, entropies, None
        self.model = types.SimpleNamespace(training=True)
        self.accelerator = types.SimpleNamespace(
            num_processes=PROCESSES,
            sync_gradients=False,
            gather=lambda x: x,
            pad_across_processes=lambda x, **_: x,
            reduce=lambda x, **_: x,
        )
        self.args = types.SimpleNamespace(
            use_bias_correction_kl=False,
            delta=None,
            steps_per_generation=STEPS,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.25,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        )
        self.importance_sampling_level = "token"
        self.epsilon_low, self.epsilon_high = 0.2, 0.28
        self.beta = 0.0
        self.max_completion_length = LIMIT
        self.current_gradient_accumulation_steps = ACCUMULATION
        self.top_entropy_quantile = 1.0
        self.off_policy_mask_threshold = None
        self.use_vllm = self.vllm_importance_sampling_correction = False
        self._entropy_bonus_enabled = self.use_adaptive_entropy = self.aux_loss_enabled = False
        self.entropy_coef = 0.0
        self._metrics = {"train": collections.defaultdict(list)}
        for name, value in options.items():
            setattr(self.args if hasattr(self.args, name) else self, name, value)

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.answer


def theirs(d, *, logprobs=None, entropies=None, inputs=None, **options):
    """(loss, gradient by the log-probs) of TRL."""
    logprobs = (d.logprobs if logprobs is None else logprobs).detach().requires_grad_()
    stub = Stub(logprobs, d.entropy if entropies is None else entropies, options)
    nothing = torch.zeros(d.mask.shape[0], 0, dtype=torch.int64)
    given = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": d.tokens,
        "completion_mask": d.mask,
        "advantages": d.advantages,
        "old_per_token_logps": d.old,
        "ref_per_token_logps": d.ref,
        "num_items_in_batch": torch.tensor(ITEMS),
    } | (inputs or {})
    loss = GRPOTrainer._compute_loss(stub, None, given)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad


def ours(d, objective, *, logprobs=None, **options):
    """(loss, gradient by the log-probs) of pyrlk, per-sequence advantages given as such."""
    logprobs = (d.logprobs if logprobs is None else logprobs).detach().requires_grad_()
    advantages = d.advantages[:, 0] if d.advantages.shape[1] == 1 else d.advantages
    given = {"old_logprobs": d.old, "advantages": advantages, "mask": d.mask} | options
    loss = pyrlk.policy_loss_from_logprobs(logprobs, objective=objective, **given)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad


def rows(d):
    """TRL averages over all rows, those without tokens too, and over the micro-batches."""
    return len(d.mask) * ACCUMULATION


def tokens(d):
    return float(d.mask.sum()) * ACCUMULATION


def window(d):
    """num_items_in_batch counts the whole generation batch on all processes."""
    return ITEMS / PROCESSES * ACCUMULATION / STEPS


EPS = {"eps_low": 0.2, "eps_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08}
NEAR = {"eps_low": 0.05, "eps_high": 0.08}
# One row a loss type, its `delta`, and the levels that have a counterpart: TRL's options.
CASES = {
    "grpo": {},
    "grpo delta": {"delta": 1.1},
    "bnpo": {},
    "bnpo delta": {"delta": 1.4},
    "dr_grpo": {},
    "dr_grpo delta": {"delta": 1.4},
    "dapo": {},
    "dapo delta": {"delta": 1.5},
    "cispo": {"epsilon_high": 1.3},
    "sapo": {},
    "vespo": {},
    "vespo parameters": {
        "vespo_k_pos": 1.5,
        "vespo_lambda_pos": 0.5,
        "vespo_k_neg": 0,
        "vespo_lambda_neg": 4.0,
    },
    "luspo": SEQUENCE,
    "luspo delta": SEQUENCE | {"delta": 1.1},
    "luspo token": {},
    "grpo sequence": SEQUENCE,
    "grpo sequence delta": SEQUENCE | {"delta": 1.1},
    "bnpo sequence": SEQUENCE,
    "bnpo sequence delta": SEQUENCE | {"delta": 1.1},
    "dapo sequence": SEQUENCE,
    "dr_grpo sequence": SEQUENCE,
}
BY_NAME = pytest.mark.parametrize("name", CASES)


def config(options):
    """GRPOConfig, as far as the mapping reads it, of options that TRL's trainer has under its own
    names."""
    trainer = Stub(None, None, {"loss_type": "grpo"} | options)
    names = ("loss_type", "importance_sampling_level", "max_completion_length", "epsilon_high")
    given = vars(trainer.args) | {name: getattr(trainer, name) for name in names}
    return types.SimpleNamespace(**given, epsilon=trainer.epsilon_low)


def of(name, d):
    """(TRL's options, our objective, our normaliser)"""
    options = {"loss_type": name.split()[0]} | CASES[name]
    args = config(options)
    normalizer = integration.normalizer_of(
        args,
        d.mask,
        accumulation_steps=ACCUMULATION,
        num_items_in_batch=torch.tensor(ITEMS),
        processes=PROCESSES,
    )
    return options, integration.objective_of(args), normalizer


@BY_NAME
@pytest.mark.parametrize("per_token", [False, True], ids=["per sequence", "per token"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal(batch, compare, name, per_token, seed):
    d = batch(seed, per_token=per_token)
    options, objective, normalizer = of(name, d)
    assert compare(ours(d, objective, normalizer=normalizer), theirs(d, **options)) <= BOUND


def test_the_batches_reach_every_branch(batch):
    """Ratios outside both bounds, of both levels; above delta with A < 0; an empty row."""
    d = batch()
    count = d.mask.sum(-1, keepdim=True)
    token = (d.logprobs - d.old).exp()
    sequence = (((d.logprobs - d.old) * d.mask).sum(-1, keepdim=True) / count.clamp(min=1)).exp()
    for ratio, low, high in [(token, 0.8, 1.5), (sequence.expand(d.mask.shape), 0.95, 1.1)]:
        seen = (ratio < low, ratio > high)
        assert all((s & (d.mask > 0)).any() for s in seen)
    assert (token[d.advantages[:, 0] < 0] > 1.5).any()
    assert (count == 0).sum() == 1


@BY_NAME
def test_through_logits(batch, compare, name):
    d = batch()
    options, objective, normalizer = of(name, d)
    z = d.logits.clone().requires_grad_()
    logprobs = z.log_softmax(-1).gather(-1, d.tokens[..., None])[..., 0]
    loss, slope = theirs(d, logprobs=logprobs, **options)
    (grad,) = torch.autograd.grad(logprobs, z, slope)
    leaf = d.logits.clone().requires_grad_()
    value = pyrlk.policy_loss(
        leaf,
        d.tokens,
        d.old,
        d.advantages[:, 0],
        d.mask,
        objective=objective,
        normalizer=normalizer,
    )
    value.backward()
    assert compare((value.detach(), leaf.grad), (loss, grad)) <= BOUND


@BY_NAME
def test_through_hidden_states(batch, compare, name):
    """linear_policy_loss in chunks of four rows: gradients by the hidden states and the head."""
    d = batch()
    options, objective, normalizer = of(name, d)
    torch.manual_seed(9)
    hidden = torch.randn(*d.mask.shape, 5, dtype=torch.float64)
    head = torch.randn(d.logits.shape[-1], 5, dtype=torch.float64) / 5
    pairs = []
    for peer in (False, True):
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logprobs = (x @ w.T).log_softmax(-1).gather(-1, d.tokens[..., None])[..., 0]
        d = d._replace(old=logprobs.detach() + d.old - d.logprobs, logprobs=logprobs.detach())
        if peer:
            loss, slope = theirs(d, logprobs=logprobs, **options)
            slopes = torch.autograd.grad(logprobs, (x, w), slope)
        else:
            loss = pyrlk.linear_policy_loss(
                x,
                w,
                d.tokens,
                d.old,
                d.advantages[:, 0],
                d.mask,
                objective=objective,
                normalizer=normalizer,
                chunk=4,
            )
            slopes = torch.autograd.grad(loss, (x, w))
        pairs.append((loss.detach(), *slopes))
    assert compare(*pairs) <= BOUND


@BY_NAME
@pytest.mark.parametrize("per_token", [False, True], ids=["per sequence", "per token"])
def test_kl_to_a_reference(batch, compare, name, per_token):
    d = batch(per_token=per_token)
    options, objective, normalizer = of(name, d)
    got = ours(d, objective, normalizer=normalizer, ref_logprobs=d.ref, kl_coef=0.3)
    assert compare(got, theirs(d, beta=0.3, **options)) <= BOUND


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].keys().isdisjoint(SEQUENCE)])
def test_bias_corrected_kl_is_kl_importance(batch, compare, name):
    d = batch()
    options, objective, normalizer = of(name, d)
    kl = {"ref_logprobs": d.ref, "kl_coef": 0.3, "kl_importance": True}
    got = ours(d, objective, normalizer=normalizer, **kl)
    assert compare(got, theirs(d, beta=0.3, use_bias_correction_kl=True, **options)) <= BOUND


def vllm_ratio(d, mode, low=None, high=2.0):
    """The ratio as TRL's documentation of vllm_importance_sampling_mode describes it."""
    level, what = mode.split("_")
    log_ratio = torch.where(d.mask > 0, d.old - d.rollout, 0.0)
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    if what == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio > high) | (ratio < (low or 0.0)), 0.0, ratio)


@BY_NAME
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("what", ["truncate", "mask"])
def test_importance_sampling_correction_is_tis(batch, compare, name, level, what):
    d = batch()
    options, objective, normalizer = of(name, d)
    ratio = vllm_ratio(d, f"{level}_{what}", high=1.1)
    assert ((ratio == 0) if what == "mask" else (ratio == 1.1)).any()
    vllm = types.SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=f"{level}_{what}",
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=1.1,
    )
    got = ours(
        d,
        objective,
        normalizer=normalizer,
        rollout_logprobs=d.rollout,
        correction=integration.correction_of(vllm),
        ref_logprobs=d.ref,
        kl_coef=0.3,
    )
    expected = theirs(
        d,
        inputs={"importance_sampling_ratio": ratio},
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        beta=0.3,
        **options,
    )
    assert compare(got, expected) <= BOUND


@BY_NAME
def test_on_policy(batch, compare, name):
    """No old log-probs: the ratio is 1 and its gradient that of the log-prob."""
    d = batch()
    options, objective, normalizer = of(name, d)
    got = ours(d, objective, old_logprobs=None, normalizer=normalizer)
    assert compare(got, theirs(d, inputs={"old_per_token_logps": None}, **options)) <= BOUND


@BY_NAME
def test_without_empty_rows_no_normaliser_is_needed(batch, compare, name):
    """One micro-batch of one process, every row with tokens: the defaults agree."""
    d = batch(empty_row=False)
    options, objective, _ = of(name, d)
    inputs = {"num_items_in_batch": d.mask.sum() * PROCESSES}
    whole = {"current_gradient_accumulation_steps": 1, "steps_per_generation": 1}
    divisor = LIMIT if name == "dr_grpo sequence" else 1
    loss, grad = ours(d, objective)
    got = (loss / divisor, grad / divisor)
    assert compare(got, theirs(d, inputs=inputs, **options | whole)) <= BOUND


@pytest.mark.parametrize("name", ["dapo", "cispo", "vespo"])
def test_normaliser_of_an_accumulation_window(batch, compare, name):
    """Micro-batches of unequal length, one process, a window that is the generation batch."""
    parts = [batch(seed) for seed in (3, 4)]
    parts[1] = parts[1]._replace(mask=parts[1].mask * (torch.arange(9) < 3))
    options, objective, _ = of(name, parts[0])
    mask = torch.cat([d.mask for d in parts])
    whole = {"current_gradient_accumulation_steps": 2, "steps_per_generation": 2}
    inputs = {"num_items_in_batch": mask.sum() * PROCESSES}
    normalizer = pyrlk.normalizer(mask, objective)
    for d in parts:
        got = ours(d, objective, normalizer=normalizer)
        assert compare(got, theirs(d, inputs=inputs, **options | whole)) <= BOUND


def test_entropy_bonus_of_token_means(batch, compare):
    """bnpo and TRL's bonus are both means over the tokens; gradient by the entropies too."""
    d = batch()
    pairs = []
    for peer in (True, False):
        entropy = d.entropy.clone().requires_grad_()
        logprobs = d.logprobs.clone().requires_grad_()
        if peer:
            stub = {"_entropy_bonus_enabled": True, "entropy_coef": 0.2, "loss_type": "bnpo"}
            given = Stub(logprobs, entropy, stub)
            nothing = d.tokens[:, :0]
            loss = GRPOTrainer._compute_loss(
                given,
                None,
                {
                    "prompt_ids": nothing,
                    "prompt_mask": nothing,
                    "completion_ids": d.tokens,
                    "completion_mask": d.mask,
                    "advantages": d.advantages,
                    "old_per_token_logps": d.old,
                },
            )
        else:
            loss = pyrlk.policy_loss_from_logprobs(
                logprobs,
                d.old,
                d.advantages[:, 0],
                d.mask,
                objective=BNPO(**EPS),
                entropy=entropy,
                entropy_coef=0.2,
                normalizer=tokens(d),
            )
        slopes = torch.autograd.grad(loss, (logprobs, entropy))
        pairs.append((loss.detach(), *slopes))
    assert compare(pairs[1], pairs[0]) <= BOUND


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "sapo", "vespo"])
def test_top_entropy_quantile_is_a_zero_advantage(batch, compare, name):
    """TRL drops the policy term of low-entropy tokens, not their KL: so does A = 0."""
    d = batch(per_token=True)
    options, objective, normalizer = of(name, d)
    chosen = Stub(None, None, {}).get_high_entropy_mask(d.entropy, d.mask, 0.6)
    assert 0 < chosen.sum() < d.mask.sum()
    if name == "vespo":  # its weights see the sign of A, which 0 shares with A > 0
        d = d._replace(advantages=d.advantages.abs())
    expected = theirs(d, top_entropy_quantile=0.4, beta=0.3, **options)
    few = d._replace(advantages=torch.where(chosen, d.advantages, 0.0))
    got = ours(few, objective, normalizer=normalizer, ref_logprobs=d.ref, kl_coef=0.3)
    assert compare(got, expected) <= BOUND


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "sapo", "luspo", "grpo sequence"])
def test_a_weight_of_the_policy_term_is_a_scaled_advantage(batch, compare, name):
    """TRL's lower bound of the correction (…_clip_min) has no TIS field: scale A by the weight."""
    d = batch(per_token=True)
    options, objective, normalizer = of(name, d)
    ratio = vllm_ratio(d, "token_truncate", low=0.9, high=1.2)
    expected = theirs(
        d,
        inputs={"importance_sampling_ratio": ratio},
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        **options,
    )
    scaled = d._replace(advantages=d.advantages * ratio)
    assert compare(ours(scaled, objective, normalizer=normalizer), expected) <= BOUND


@pytest.mark.parametrize("name", ["cispo", "sapo"])
def test_sequence_ratios_of_other_losses_are_callables(batch, compare, name):
    """TRL forms cispo and sapo of the sequence's ratio too; here that is a function of the user."""

    def objective(logprobs, old, advantages, mask):
        mean = (mask * (logprobs - old)).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        ratio = torch.where(mask.sum(-1, keepdim=True) > 0, mean, 0.0).exp()
        if name == "cispo":
            loss = -ratio.clamp(max=1.05).detach() * advantages * logprobs
            return (mask * loss).sum() / window(d)
        t = torch.where(advantages > 0, torch.ones_like(advantages), 1.25)
        loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantages
        return ((mask * loss).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / rows(d)

    d = batch()
    options = {"loss_type": name, "importance_sampling_level": "sequence", "epsilon_high": 1.05}
    assert compare(ours(d, objective), theirs(d, **options)) <= BOUND


# Where pyrlk differs on purpose. Every name below is a row of docs/frameworks.md.


@pytest.mark.parametrize(("name", "objective"), [("grpo", GRPO(**EPS)), ("sapo", SAPO(1.0, 1.25))])
def test_deviation_empty_rows_do_not_count(batch, compare, name, objective):
    d = batch()
    got, expected = ours(d, objective), theirs(d, loss_type=name)
    shared = len(d.mask) / int((d.mask.sum(-1) > 0).sum())
    assert (
        compare((got[0] / shared, got[1] / shared), [x * ACCUMULATION for x in expected]) <= BOUND
    )
    assert shared > 1


def test_deviation_no_denominator_is_raised_to_one(batch):
    """Weights that sum to less than 1: TRL divides by 1, pyrlk by the sum."""
    d = batch()
    light = d._replace(mask=d.mask.double() * 0.01)
    got, expected = ours(light, BNPO(**EPS)), theirs(light, loss_type="bnpo")
    total = float(light.mask.sum())
    assert total < 1
    torch.testing.assert_close(got[0] * total / ACCUMULATION, expected[0], rtol=1e-12, atol=0)


def test_deviation_entropy_has_the_denominator_of_the_loss(batch):
    d = batch()
    options = {"_entropy_bonus_enabled": True, "entropy_coef": 0.2, "loss_type": "grpo"}
    bonus = theirs(d, loss_type="grpo")[0] - theirs(d, **options)[0]
    torch.testing.assert_close(
        bonus, 0.2 * (d.entropy * d.mask).sum() / tokens(d), rtol=1e-9, atol=0
    )
    plain = ours(d, GRPO(**EPS), normalizer=rows(d))[0]
    entropy = {"entropy": d.entropy, "entropy_coef": 0.2}
    bonus = plain - ours(d, GRPO(**EPS), normalizer=rows(d), **entropy)[0]
    means = (d.entropy * d.mask).sum(-1) / d.mask.sum(-1).clamp(min=1)
    torch.testing.assert_close(bonus, 0.2 * means.sum() / rows(d), rtol=1e-9, atol=0)


def test_deviation_kl_importance_is_the_tokens_ratio(batch, compare):
    """At sequence level TRL weighs the KL by the sequence's ratio; the estimator is a token's."""
    d = batch()
    options = {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True} | SEQUENCE
    kl = {"ref_logprobs": d.ref, "kl_coef": 0.3}
    got = ours(d, GSPO(**NEAR), normalizer=rows(d), kl_importance=True, **kl)
    expected = theirs(d, **options)
    assert compare(got, expected) > 1e-3

    count = d.mask.sum(-1, keepdim=True).clamp(min=1)
    by_sequence = ((d.logprobs - d.old) * d.mask).sum(-1, keepdim=True) / count
    k3 = (d.ref - d.logprobs).expm1() - (d.ref - d.logprobs)
    policy = ours(d, GSPO(**NEAR), normalizer=rows(d))[0]
    for log_ratio, value in [(by_sequence, expected[0]), (d.logprobs - d.old, got[0])]:
        term = 0.3 * (log_ratio.exp() * k3 * d.mask / count).sum() / rows(d)
        torch.testing.assert_close(policy + term, value, rtol=1e-12, atol=0)


def test_deviation_parameters_keep_the_precision_of_the_tensors(batch, compare):
    """TRL rounds SAPO's temperatures and VESPO's parameters to float32, beside float64 too."""
    d = batch()
    for temperature, off in [(1.25, False), (1.05, True)]:
        got = ours(d, SAPO(1.0, temperature), normalizer=rows(d))
        gap = compare(got, theirs(d, loss_type="sapo", sapo_temperature_neg=temperature))
        assert (gap > BOUND) == off
        assert gap < 1e-5
    rounded = float(torch.tensor(1.05, dtype=torch.float32))
    got = ours(d, SAPO(1.0, rounded), normalizer=rows(d))
    expected = theirs(d, loss_type="sapo", sapo_temperature_neg=1.05)
    assert compare(got, expected) <= BOUND

    odd = (1.9, 2.9, 3.1, 2.1)
    names = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    expected = theirs(d, loss_type="vespo", **dict(zip(names, odd, strict=True)))
    assert BOUND < compare(ours(d, VESPO(*odd), normalizer=window(d)), expected) < 1e-5
    rounded = torch.tensor(odd, dtype=torch.float32).tolist()
    assert compare(ours(d, VESPO(*rounded), normalizer=window(d)), expected) <= BOUND


def test_deviation_vespo_lambda_has_no_floor(batch, compare):
    d = batch()
    options = {"loss_type": "vespo", "vespo_lambda_pos": 1e-6, "vespo_lambda_neg": 1e-6}
    expected = theirs(d, **options)
    floor = float(torch.tensor(1e-4, dtype=torch.float32))
    got = ours(d, VESPO(2.0, floor, 3.0, floor), normalizer=window(d))
    assert compare(got, expected) <= BOUND
    assert compare(ours(d, VESPO(2.0, 1e-6, 3.0, 1e-6), normalizer=window(d)), expected) > 1e-5


def test_deviation_nan_in_a_counted_token_shows(batch):
    """VESPO's weight of a NaN log-ratio is 0 in TRL: the sequence vanishes. Here it is NaN."""
    d = batch()
    d.old[0, 0] = math.nan
    assert theirs(d, loss_type="vespo")[0].isfinite()
    assert ours(d, VESPO())[0].isnan()


def test_deviation_masked_places_may_hold_anything(batch, compare):
    d = batch()
    clean = ours(d, GRPO(**EPS), normalizer=rows(d))
    dirty = d._replace(old=torch.where(d.mask > 0, d.old, math.nan))
    assert theirs(dirty, loss_type="grpo")[0].isnan()
    assert compare(ours(dirty, GRPO(**EPS), normalizer=rows(d)), clean) == 0


def test_deviation_missing_rollout_logprobs_are_not_guessed(batch, compare):
    """TRL gives a token whose engine log-prob is NaN the weight 1; here old says so explicitly."""
    d = batch()
    gone = torch.zeros_like(d.mask, dtype=torch.bool)
    gone[0, 1] = gone[4, 0] = True
    dirty = d._replace(rollout=torch.where(gone, math.nan, d.rollout))
    tis = {"correction": TIS(), "normalizer": rows(d)}
    assert ours(d, GRPO(**EPS), rollout_logprobs=dirty.rollout, **tis)[0].isnan()
    ratio = torch.where(gone, 1.0, vllm_ratio(d, "token_truncate"))
    expected = theirs(
        d,
        loss_type="grpo",
        inputs={"importance_sampling_ratio": ratio},
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    filled = torch.where(dirty.rollout.isnan(), d.old, dirty.rollout)
    assert compare(ours(d, GRPO(**EPS), rollout_logprobs=filled, **tis), expected) <= BOUND
