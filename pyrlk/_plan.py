"""What a policy loss is computed with: from the user's arguments to the kernels' scalars and back.

Options   the arguments all losses share, checked
Inputs    the same as tensors, integers and numbers: what the schemas of the ops hold
Plan      O(T): one advantage, weight, old and reference log-prob a token, and the scalar terms
PerToken  what the row kernel says of each token; `finish` sums it into loss and statistics
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, _op
from . import objective as _objective
from . import support as _support
from .objective import AGGREGATIONS, KL_KINDS, TIS, Objective, Sequences, Terms
from .support import Support


class PolicyStats(NamedTuple):
    """Statistics of a loss call: 0-d tensors on the device, means weighted by the mask.

    entropy: H of the policy, nats. approx_kl: (r − 1) − log r, Schulman's estimate of
    KL(old‖policy). ref_kl: the KL estimate of the loss, 0 without a reference. clip_low, clip_high:
    the share of tokens with A < 0 and r < 1 − eps_low, with A > 0 and r > 1 + eps_high. ratio_mean,
    ratio_max: of r. correction_mean: of the importance correction, 1 without. tokens: how many have
    a mask > 0.
    """

    entropy: Tensor
    approx_kl: Tensor
    ref_kl: Tensor
    clip_low: Tensor
    clip_high: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    correction_mean: Tensor
    tokens: Tensor


class Options(NamedTuple):
    """The arguments that all policy losses share; see `policy_loss`."""

    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    objective: Objective | Callable
    ref_logprobs: Tensor | None
    kl_coef: float
    kl: str
    kl_importance: bool
    entropy_coef: float
    rollout_logprobs: Tensor | None
    correction: TIS | None
    cu_seqlens: Tensor | None
    normalizer: Any  # a 0-d tensor once checked
    return_stats: bool


def checked(options: Options, z: Tensor, shape: torch.Size, name: str = "logits") -> Options:
    """`options` for tokens of `shape` beside `z`: tensors detached, the normalizer a tensor."""
    objective, correction = options.objective, options.correction
    if isinstance(objective, type) or not (isinstance(objective, Objective) or callable(objective)):
        raise TypeError(
            f"objective must be an instance such as pyrlk.DAPO() or a callable, got {objective!r}"
        )
    cu_seqlens = _check.cu_seqlens(options.cu_seqlens, z, shape, name)
    seqs = _objective.sequences(shape, cu_seqlens)

    def per_token(label, x):
        return None if x is None else _check.floating(label, x, z, shape, name).detach()

    advantages = _check.advantages(options.advantages, z, shape, seqs, name)
    old_logprobs = per_token("old_logprobs", options.old_logprobs)
    ref_logprobs = per_token("ref_logprobs", options.ref_logprobs)
    rollout_logprobs = per_token("rollout_logprobs", options.rollout_logprobs)
    mask = None if options.mask is None else _check.mask(options.mask, z, shape, name)
    _check.compute_number("kl_coef", options.kl_coef, z)
    _check.compute_number("entropy_coef", options.entropy_coef, z)
    _check.choice("kl", options.kl, KL_KINDS)
    _check.flag("kl_importance", options.kl_importance)
    _check.flag("return_stats", options.return_stats)
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError("ref_logprobs is needed where kl_coef is not 0")
    if correction is not None:
        if not isinstance(correction, TIS):
            raise TypeError(f"correction must be a pyrlk.TIS or None, got {correction!r}")
        if rollout_logprobs is None:
            raise ValueError("rollout_logprobs is needed where correction is given")
        if correction.level == "sequence" and seqs is None:
            raise ValueError("cu_seqlens is needed: correction is per sequence and tokens are flat")
    if isinstance(objective, Objective) and seqs is None:
        if objective.aggregation != "token":
            raise ValueError(
                f"cu_seqlens is needed: {type(objective).__name__} aggregates over sequences "
                f"({objective.aggregation!r}) and the tokens are flat"
            )
        if objective.over_sequences:
            raise ValueError(
                f"cu_seqlens is needed: {type(objective).__name__} has a term over each sequence "
                "and the tokens are flat"
            )
    # Constants of the loss, whatever graph they come from: only the logits are differentiated.
    return options._replace(
        old_logprobs=old_logprobs,
        advantages=advantages.detach(),
        mask=None if mask is None else mask.detach(),
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
        normalizer=_normalizer(options.normalizer, z, name),
    )


def _normalizer(x: float | Tensor | None, z: Tensor, name: str) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor):
        value = _check.compute_number("normalizer", x, z, 0.0, above=True)
        return torch.full((), value, dtype=torch.float64, device=z.device)
    if _check.like("normalizer", x, z, name).dim() != 0:
        raise ValueError(f"normalizer must be 0-d, got shape {list(x.shape)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"normalizer must be a float or an integer, got {x.dtype}")
    return x.detach()


def one_launch(options: Options) -> bool:
    """Whether a row's gradient follows from the row and its own scalars alone."""
    objective = options.objective
    fused = isinstance(objective, Objective) and objective.fused
    return fused and (options.correction is None or options.old_logprobs is not None)


class Inputs(NamedTuple):
    """What an op takes beside its rows, in the order of its schema; see `inputs` and `_rules`."""

    tokens: Tensor
    ids: Tensor | None
    offsets: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    normalizer: Tensor | None
    temperatures: Tensor | None
    temperature: float
    vocab: int
    integers: list[int]
    numbers: list[float]


def inputs(
    options: Options,
    tokens: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
    temperature: tuple[float, Tensor | None],
    vocab: int,
) -> Inputs:
    number, per_token = temperature
    return Inputs(
        tokens,
        *kept,
        options.old_logprobs,
        options.advantages,
        options.mask,
        options.ref_logprobs,
        options.rollout_logprobs,
        options.cu_seqlens,
        options.normalizer,
        per_token,
        number,
        vocab,
        *_rules(options),
    )


def _rules(options: Options) -> tuple[list[int], list[float]]:
    """The objective and its options as the integers and numbers of a schema; 0 is off."""
    objective, correction = options.objective, options.correction
    assert isinstance(objective, Objective)
    t = _objective.terms(objective)
    level = 0 if correction is None else 1 + int(correction.level == "sequence")
    integers = [
        int(t.clipped),
        AGGREGATIONS.index(objective.aggregation),
        KL_KINDS.index(options.kl) + 1,
        int(options.kl_importance),
        level,
        int(correction is not None and correction.mode == "mask"),
        int(options.return_stats),
    ]
    numbers = [
        t.eps_low,
        t.eps_high,
        getattr(objective, "dual_clip", None) or 0.0,
        getattr(objective, "delta", None) or 0.0,
        float(options.kl_coef),
        float(options.entropy_coef),
        float(getattr(objective, "max_length", 0.0)),
        0.0 if correction is None else float(correction.max_ratio),
    ]
    return integers, numbers


class Plan(NamedTuple):
    """The O(T) side of the op: what the kernel reads, and what the statistics need."""

    terms: Terms
    tokens: Tensor
    kept: Support | None
    old: Tensor | None
    advantages: Tensor
    weight: Tensor
    ref: Tensor | None
    temperatures: Tensor | None
    mask: Tensor
    correction: Tensor | None
    uncorrected: Tensor  # the advantages as they were given, for the statistics
    want_stats: bool

    def take(self, rows: slice | Tensor) -> Plan:
        """The same for some of the tokens, as far as the kernel reads it."""

        def at(x):
            return None if x is None else x[rows]

        return self._replace(
            tokens=self.tokens[rows],
            kept=_support.take(self.kept, rows),
            old=at(self.old),
            advantages=self.advantages[rows],
            weight=self.weight[rows],
            ref=at(self.ref),
            temperatures=at(self.temperatures),
        )


def prepare(rows: Tensor, inputs: Inputs) -> Plan:
    """The plan for the logits or hidden states `rows`; on CPU it reads the values it checks."""
    clipped, aggregation, kl, kl_importance, level, masked_mode, want_stats = inputs.integers
    eps_low, eps_high, dual_clip, delta, kl_coef, entropy_coef, max_length, max_ratio = (
        inputs.numbers
    )
    t = Terms(
        bool(clipped),
        eps_low,
        eps_high,
        dual_clip or float("inf"),
        delta or float("inf"),
        kl,
        kl_coef,
        bool(kl_importance),
        entropy_coef,
    )
    shape, dtype = inputs.tokens.shape, _op.compute_dtype(rows)
    kept = _support.pair(inputs.ids, inputs.offsets)
    tokens, mask, cu = inputs.tokens, inputs.mask, inputs.cu_seqlens
    present = tokens != -100
    counted = present if mask is None else present & (mask != 0)
    if _check.reads_values(rows):
        _check.mask_values(mask, present)
        _check.cu_seqlens_values(cu, shape.numel())
        _check.normalizer_value(inputs.normalizer)
        _check.temperature_values(inputs.temperatures, counted)
        _support.check_values(kept, inputs.vocab)
    m = counted.to(dtype) if mask is None else torch.where(counted, mask.to(dtype), 0)
    seqs = _objective.sequences(shape, cu)
    rule = _objective.Weighting(AGGREGATIONS[aggregation], max_length)
    weight = _objective.token_weights(rule, m, seqs, inputs.normalizer)
    uncorrected = advantages = at_tokens(inputs.advantages, shape, seqs).to(dtype)
    factor = None
    if level:
        tis = TIS(("token", "sequence")[level - 1], ("clip", "mask")[masked_mode], max_ratio)
        old, rollout = inputs.old_logprobs, inputs.rollout_logprobs
        assert old is not None  # else there would be two launches
        assert rollout is not None
        factor = _objective.correction_weights(tis, old.to(dtype), rollout.to(dtype), m, seqs)
        advantages = advantages * factor
    return Plan(
        t,
        _op.flat(tokens, torch.int64),
        kept,
        _op.flat(inputs.old_logprobs, dtype),
        _op.flat(advantages, dtype),
        _op.flat(weight, dtype),
        _op.flat(inputs.ref_logprobs, dtype),
        _op.flat(inputs.temperatures, dtype),
        m.reshape(-1),
        None if factor is None else factor.reshape(-1),
        uncorrected.reshape(-1),
        bool(want_stats),
    )


def at_tokens(advantages: Tensor, shape: torch.Size, seqs: Sequences | None) -> Tensor:
    """One advantage a token, also where they came one a sequence."""
    if advantages.shape == shape:
        return advantages
    assert seqs is not None  # _check.advantages has seen to it
    return seqs.spread(advantages)


def finish(plan: Plan, out: PerToken) -> tuple[Tensor, Tensor]:
    """(loss, statistics) from the kernel's per-token results."""
    loss = (out.loss.double() * plan.weight.double()).sum().to(out.loss.dtype)
    if not plan.want_stats:
        return loss, loss.new_empty(0)
    stats = statistics(
        out.logprob,
        plan.old,
        plan.uncorrected,
        plan.mask,
        plan.ref,
        out.entropy,
        plan.correction,
        plan.terms,
    )
    return loss, stats


def statistics(logprob, old, advantages, mask, ref, entropy, factor, t: Terms) -> Tensor:
    counted = mask > 0
    total = mask.sum()
    share = torch.where(total > 0, mask / torch.where(total > 0, total, 1), 0)

    def mean(x):
        return (torch.where(counted, x, 0) * share).sum()

    log_ratio = torch.zeros_like(logprob) if old is None else logprob - old
    log_ratio = torch.where(counted, log_ratio, 0)
    ratio = torch.exp(log_ratio)
    # (r − 1) − log r, infinite and not ∞ − ∞ where the old policy could not draw the token.
    gap = torch.where(log_ratio == math.inf, math.inf, torch.expm1(log_ratio) - log_ratio)
    one = torch.ones((), dtype=logprob.dtype, device=logprob.device)
    zero = torch.zeros_like(one)
    low, high = (
        (advantages < 0) & (ratio < 1 - t.eps_low),
        (advantages > 0) & (ratio > 1 + t.eps_high),
    )
    return torch.stack(
        [
            zero if entropy is None else mean(entropy),
            mean(gap),
            zero if ref is None else mean(_objective.kl_estimate(logprob, ref, t.kl)),
            mean(low.to(ratio.dtype)) if t.clipped else zero,
            mean(high.to(ratio.dtype)) if t.clipped else zero,
            mean(ratio),
            torch.where(counted, ratio, 0).amax() if ratio.numel() else zero,
            one if factor is None else mean(factor),
            counted.sum().to(ratio.dtype),
        ]
    )


class PerToken(NamedTuple):
    """What the kernel says of each token."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None

    def take(self, rows: slice) -> PerToken:
        entropy = None if self.entropy is None else self.entropy[rows]
        return PerToken(self.loss[rows], self.logprob[rows], entropy)


def per_token(like: Tensor, plan: Plan, count: int) -> PerToken:
    with_entropy = plan.terms.entropy_coef != 0 or plan.want_stats

    def empty():
        return like.new_empty(count, dtype=plan.weight.dtype)

    return PerToken(empty(), empty(), empty() if with_entropy else None)


def finish_fake(rows: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    dtype = _op.compute_dtype(rows)
    stats = rows.new_empty(9 if inputs.integers[-1] else 0, dtype=dtype)
    return rows.new_empty((), dtype=dtype), stats
