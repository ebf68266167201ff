"""Policy losses on logits: statistics → objective → gradient of a row, read once and written once.

    loss = Σ_t w_t·[ ℓ_t + kl_coef·KL_t − entropy_coef·H_t ]         (objective.py has ℓ, KL and w)
    ∂loss/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ],  g = w·∂ℓ/∂logp,  h = −w·entropy_coef

The gradient is computed in the forward pass, because the loss is a scalar: backward only scales it.
What cannot be one launch (a callable objective, or a correction without old log-probs) goes through
token_logprobs and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, _check, _op
from . import objective as _objective
from . import support as _support
from .logprob import token_logprobs
from .objective import AGGREGATIONS, DAPO, KL_KINDS, REINFORCE, TIS, Objective, Sequences, Terms
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


def dapo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    **common: Any,
) -> Any:
    """DAPO's clip-higher policy loss with one denominator over all tokens (arXiv 2503.14476).

        loss = −Σ m·min(r·A, clip(r, 1−eps_low, 1+eps_high)·A) / Σ m,   r = exp(logπ(token) − old)

    `policy_loss` with ``objective=DAPO(eps_low, eps_high)``: see there for shapes, the common
    options and errors.
    """
    objective = DAPO(eps_low=eps_low, eps_high=eps_high)
    return policy_loss(
        logits, tokens, old_logprobs, advantages, mask, objective=objective, **common
    )


def reinforce_loss(
    logits: Tensor, tokens: Tensor, advantages: Tensor, mask: Tensor | None = None, **common: Any
) -> Any:
    """REINFORCE: loss = −Σ m·A·logπ(token) / Σ m, whose gradient is m·A·(π − e_a)/τ / Σ m.

    `policy_loss` with ``objective=REINFORCE()``: see there for shapes, the common options and
    errors.
    """
    return policy_loss(logits, tokens, None, advantages, mask, objective=REINFORCE(), **common)


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective: Objective | Callable = DAPO(),  # noqa: B008 - a frozen dataclass
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    correction: TIS | None = None,
    support: Support | None = None,
    vocab_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, PolicyStats)
    """A policy-gradient loss on logits, with the gradient computed in the same pass over them.

    Parameters
    ----------
    logits : [..., V] float32, float16, bfloat16 (float64 on CPU), last stride 1
    tokens : [...] int64 or int32; −100 counts as mask 0
    old_logprobs : [...] float, or None
        Log-probs of the policy before this update. None is on-policy: the ratio is 1.
    advantages : [...] float, or one a sequence
        One a sequence: [B] beside logits [B, L, V], or [S] beside cu_seqlens.
    mask : [...] bool, int or float weight ≥ 0, optional
        Where it is 0 nothing else is read, NaN included, and the gradient is 0.
    objective : an objective of pyrlk, or a callable
        A callable takes (logprobs, old_logprobs, advantages, mask) and returns per-token losses,
        which are averaged over the mask, or a 0-d loss; it runs through token_logprobs and
        autograd.
    temperature : number > 0, or [...] float
    ref_logprobs, kl_coef, kl, kl_importance
        Adds kl_coef·KL(policy‖ref) by the estimator "k1", "k2" or "k3" with its exact gradient;
        kl_importance multiplies it by the ratio, gradient included.
    entropy_coef : number
        Subtracts entropy_coef·H, with its true gradient.
    rollout_logprobs, correction
        The engine's own log-probs, and TIS(...): w = exp(old − rollout), truncated, detached,
        multiplies the policy term.
    support : Support, optional
        The kept set of each token: the policy is over it alone, the gradient outside it is 0.
    vocab_size : int, optional
        Columns from there on are padding: not read, gradient 0.
    cu_seqlens : [sequences + 1] int32 or int64, optional
        Bounds of packed sequences, 0 … T, for tokens of shape [T] or [1, T].
    normalizer : number or 0-d tensor > 0, optional
        Replaces Σ mask, or the number of sequences: see `pyrlk.normalizer`.
    inplace : bool
        Write the gradient over the logits: no [T, V] memory. They must not be a leaf that requires
        grad.
    return_stats : bool

    Returns
    -------
    loss : 0-d float32 (float64 for float64 logits), or (loss, PolicyStats)

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU also for values inside tensors, before anything is written.
    RuntimeError
        On a second backward through the same loss, and on a double backward.
    """
    z = _check.logits(logits)
    shape = z.shape[:-1]
    tokens = _check.tokens(tokens, z, shape)
    options = _options(
        z,
        shape,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        rollout_logprobs,
        correction,
        cu_seqlens,
        normalizer,
        objective,
        kl_coef,
        kl,
        kl_importance,
        entropy_coef,
    )
    number, per_token = _check.temperature(temperature, z, shape)
    vocab = _check.vocab_size(vocab_size, z)
    kept = _support.check(support, z, shape)
    _check.flag("return_stats", return_stats)
    if _check.flag("inplace", inplace):
        _check_inplace(z)

    if not _one_launch(objective, correction, old_logprobs):
        return _two_launches(
            lambda keep: token_logprobs(
                z,
                keep,
                temperature=temperature,
                support=support,
                vocab_size=vocab,
                return_entropy=True,
            ),
            tokens,
            mask,
            old_logprobs,
            advantages,
            objective=objective,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl=kl,
            kl_importance=kl_importance,
            entropy_coef=entropy_coef,
            rollout_logprobs=rollout_logprobs,
            correction=correction,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            return_stats=return_stats,
        )

    wants_grad = torch.is_grad_enabled() and z.requires_grad
    integers, numbers = _flatten(
        objective, correction, KL_KINDS.index(kl), kl_coef, kl_importance, entropy_coef
    )
    integers += [int(return_stats)]
    arguments = (tokens, *kept, *options, per_token, number, vocab, integers, numbers)
    plain = z.detach()
    if inplace and wants_grad:
        loss, stats = _policy_loss_(plain, *arguments)
        grad = plain
    else:
        loss, grad, stats = _policy_loss(plain, *arguments, wants_grad)
    if wants_grad:
        loss = _attach_grad(z, grad, loss)
    return (loss, PolicyStats(*stats.unbind())) if return_stats else loss


def _one_launch(objective, correction, old_logprobs) -> bool:
    """Whether a row's gradient follows from the row and its own scalars alone."""
    fused = isinstance(objective, Objective) and objective.fused
    return fused and (correction is None or old_logprobs is not None)


def _two_launches(score: Callable, tokens, mask, old_logprobs, advantages, **options) -> Any:
    """The loss by way of log-probs and autograd: `score` maps tokens to (logprob, entropy)."""
    keep = tokens if mask is None else torch.where(mask != 0, tokens, -100)
    counted = keep != -100
    mask = counted if mask is None else torch.where(counted, mask, 0)
    logprobs, entropy = score(keep)
    return policy_loss_from_logprobs(
        logprobs, old_logprobs, advantages, mask, entropy=entropy, **options
    )


def _options(
    z,
    shape,
    old_logprobs,
    advantages,
    mask,
    ref_logprobs,
    rollout_logprobs,
    correction,
    cu_seqlens,
    normalizer,
    objective,
    kl_coef,
    kl,
    kl_importance,
    entropy_coef,
    name="logits",
) -> tuple[
    Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:
    """Checks what every loss takes beside its logits; returns the tensors of the op, in order."""
    if isinstance(objective, type) or not (isinstance(objective, Objective) or callable(objective)):
        raise TypeError(
            f"objective must be an instance such as pyrlk.DAPO() or a callable, got {objective!r}"
        )
    cu_seqlens = _check.cu_seqlens(cu_seqlens, z, shape, name)
    seqs = _objective.sequences(shape, cu_seqlens)
    advantages = _check.advantages(advantages, z, shape, seqs, name)

    def per_token(label, x):
        return None if x is None else _check.floating(label, x, z, shape, name)

    old_logprobs = per_token("old_logprobs", old_logprobs)
    ref_logprobs = per_token("ref_logprobs", ref_logprobs)
    rollout_logprobs = per_token("rollout_logprobs", rollout_logprobs)
    mask = None if mask is None else _check.mask(mask, z, shape, name)
    _check.number("kl_coef", kl_coef)
    _check.number("entropy_coef", entropy_coef)
    _check.choice("kl", kl, KL_KINDS)
    _check.flag("kl_importance", kl_importance)
    if kl_coef != 0 and ref_logprobs is None:
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
    if isinstance(normalizer, Tensor):
        if _check.like("normalizer", normalizer, z, name).dim() != 0:
            raise ValueError(f"normalizer must be 0-d, got shape {list(normalizer.shape)}")
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise TypeError(f"normalizer must be a float or an integer, got {normalizer.dtype}")
    elif normalizer is not None:
        value = _check.number("normalizer", normalizer, 0.0, above=True)
        normalizer = torch.full((), value, dtype=torch.float64, device=z.device)
    # Constants of the loss, whatever graph they come from: only the logits are differentiated.
    constants = (
        None if x is None else x.detach()
        for x in (old_logprobs, advantages, mask, ref_logprobs, rollout_logprobs)
    )
    return *constants, cu_seqlens, None if normalizer is None else normalizer.detach()


def _check_inplace(z: Tensor) -> None:
    owner = z
    if not torch.compiler.is_compiling() and z._is_view() and z._base is not None:
        owner = z._base  # a view of a parameter would overwrite the parameter
    if owner.is_leaf and owner.requires_grad:
        raise ValueError("inplace=True: logits must not be (a view of) a leaf that requires grad")
    _check.disjoint_rows(z, "inplace=True: rows of logits overlap")


def _flatten(objective, correction, kl, kl_coef, kl_importance, entropy_coef):
    """An objective and its options as the integers and numbers of the op schema; 0 is off."""
    t = _objective.terms(objective)
    level = 0 if correction is None else 1 + int(correction.level == "sequence")
    integers = [
        int(t.clipped),
        AGGREGATIONS.index(objective.aggregation),
        kl + 1,
        int(kl_importance),
        level,
        int(correction is not None and correction.mode == "mask"),
    ]
    numbers = [
        t.eps_low,
        t.eps_high,
        getattr(objective, "dual_clip", None) or 0.0,
        getattr(objective, "delta", None) or 0.0,
        float(kl_coef),
        float(entropy_coef),
        float(getattr(objective, "max_length", 0.0)),
        0.0 if correction is None else float(correction.max_ratio),
    ]
    return integers, numbers


class _Plan(NamedTuple):
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

    def take(self, rows: slice | Tensor) -> _Plan:
        """The same for some of the tokens, as far as the kernel reads it."""

        def at(x):
            return None if x is None else x[rows]

        return self._replace(
            tokens=self.tokens[rows],
            old=at(self.old),
            advantages=self.advantages[rows],
            weight=self.weight[rows],
            ref=at(self.ref),
            temperatures=at(self.temperatures),
        )


def _prepare(
    logits, tokens, ids, offsets, old, advantages, mask, ref, rollout, cu, normalizer, temperatures,
    vocab, ints, numbers,
) -> _Plan:  # fmt: skip
    clipped, aggregation, kl, kl_importance, level, masked_mode, _ = ints
    eps_low, eps_high, dual_clip, delta, kl_coef, entropy_coef, max_length, max_ratio = numbers
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
    shape, dtype = tokens.shape, _op.compute_dtype(logits)
    kept = _support.pair(ids, offsets)
    counted = tokens != -100
    if mask is not None:
        counted = counted & (mask != 0)
    if logits.device.type == "cpu":
        _check.mask_values(mask, tokens != -100)
        _check.cu_seqlens_values(cu, shape.numel())
        _check.normalizer_value(normalizer)
        _check.temperature_values(temperatures, counted)
        _support.check_values(kept, vocab)
    m = counted.to(dtype) if mask is None else torch.where(counted, mask.to(dtype), 0)
    seqs = _objective.sequences(shape, cu)
    rule = _objective.Weighting(AGGREGATIONS[aggregation], max_length)
    weight = _objective.token_weights(rule, m, seqs, normalizer)
    spread = advantages if advantages.shape == shape else _spread(seqs, advantages)
    spread = spread.to(dtype)
    factor = None
    if level:
        tis = TIS(("token", "sequence")[level - 1], ("clip", "mask")[masked_mode], max_ratio)
        factor = _objective.correction_weights(tis, old.to(dtype), rollout.to(dtype), m, seqs)
        spread = spread * factor
    return _Plan(
        t,
        _op.flat(tokens, torch.int64),
        kept,
        _op.flat(old, dtype),
        _op.flat(spread, dtype),
        _op.flat(weight, dtype),
        _op.flat(ref, dtype),
        _op.flat(temperatures, dtype),
        m.reshape(-1),
        None if factor is None else factor.reshape(-1),
    )


def _finish(plan: _Plan, out: _PerToken, want: bool) -> tuple[Tensor, Tensor]:
    """(loss, statistics) from the kernel's per-token results."""
    loss = (out.loss.double() * plan.weight.double()).sum().to(out.loss.dtype)
    if not want:
        return loss, loss.new_empty(0)
    stats = _statistics(
        out.logprob,
        plan.old,
        plan.advantages,
        plan.mask,
        plan.ref,
        out.entropy,
        plan.correction,
        plan.terms,
    )
    return loss, stats


def _statistics(logprob, old, advantages, mask, ref, entropy, factor, t: Terms) -> Tensor:
    counted = mask > 0
    total = mask.sum()
    share = torch.where(total > 0, mask / torch.where(total > 0, total, 1), 0)

    def mean(x):
        return (torch.where(counted, x, 0) * share).sum()

    log_ratio = torch.zeros_like(logprob) if old is None else logprob - old
    log_ratio = torch.where(counted, log_ratio, 0)
    ratio = torch.exp(log_ratio)
    one = torch.ones((), dtype=logprob.dtype, device=logprob.device)
    zero = torch.zeros_like(one)
    low, high = (
        (advantages < 0) & (ratio < 1 - t.eps_low),
        (advantages > 0) & (ratio > 1 + t.eps_high),
    )
    return torch.stack(
        [
            zero if entropy is None else mean(entropy),
            mean(torch.expm1(log_ratio) - log_ratio),
            zero if ref is None else mean(_objective.kl_estimate(logprob, ref, t.kl)),
            mean(low.to(ratio.dtype)) if t.clipped else zero,
            mean(high.to(ratio.dtype)) if t.clipped else zero,
            mean(ratio),
            torch.where(counted, ratio, 0).amax() if ratio.numel() else zero,
            one if factor is None else mean(factor),
            counted.sum().to(ratio.dtype),
        ]
    )


class _PerToken(NamedTuple):
    """What the kernel says of each token."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None

    def take(self, rows: slice) -> _PerToken:
        entropy = None if self.entropy is None else self.entropy[rows]
        return _PerToken(self.loss[rows], self.logprob[rows], entropy)


def _per_token(like: Tensor, plan: _Plan, count: int, want_stats: bool) -> _PerToken:
    with_entropy = plan.terms.entropy_coef != 0 or want_stats

    def empty():
        return like.new_empty(count, dtype=plan.weight.dtype)

    return _PerToken(empty(), empty(), empty() if with_entropy else None)


def _rows_cpu(logits: Tensor, plan: _Plan, temperature: float, vocab: int, out: _PerToken, grad):
    """Fills `out` and, unless it is None, `grad`, which may be `logits`."""
    t = plan.terms
    bad = _C.policy_loss(
        _op.rows(logits, vocab),
        plan.tokens.data_ptr(),
        _support.addresses(plan.kept),
        _op.address(plan.old),
        plan.advantages.data_ptr(),
        plan.weight.data_ptr(),
        _op.address(plan.ref),
        (temperature, _op.address(plan.temperatures)),
        (
            t.clipped,
            t.eps_low,
            t.eps_high,
            t.dual_clip,
            t.delta,
            t.kl,
            t.kl_coef,
            t.kl_importance,
            t.entropy_coef,
        ),
        out.loss.data_ptr(),
        out.logprob.data_ptr(),
        _op.address(out.entropy),
        None if grad is None else _op.rows(grad, vocab),
        _op.threads(),
    )
    _check.bad_token(bad, plan.tokens, vocab)


def _rows_cuda(logits: Tensor, plan: _Plan, temperature: float, vocab: int, out: _PerToken, grad):
    from .triton_kernels import policy_loss as kernels

    if plan.tokens.numel():
        kernels.policy_loss_fwd(
            logits,
            plan.tokens,
            plan.kept,
            plan.old,
            plan.advantages,
            plan.weight,
            plan.ref,
            temperature if plan.temperatures is None else plan.temperatures,
            vocab,
            plan.terms,
            out.loss,
            out.logprob,
            out.entropy,
            grad,
        )


def _results_fake(logits: Tensor, ints) -> tuple[Tensor, Tensor]:
    dtype = _op.compute_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty(9 if ints[-1] else 0, dtype=dtype)


def _run(rows: Callable, logits, plan: _Plan, temperature, vocab, want: bool, grad):
    out = _per_token(logits, plan, plan.tokens.numel(), want)
    rows(logits, plan, temperature, vocab, out, grad)
    return _finish(plan, out, want)


def _fused(rows: Callable):
    def policy_loss_op(
        logits, tokens, ids, offsets, old, advantages, mask, ref, rollout, cu, normalizer,
        temperatures, temperature, vocab, ints, numbers, want_grad,
    ):  # fmt: skip
        plan = _prepare(
            logits, tokens, ids, offsets, old, advantages, mask, ref, rollout, cu, normalizer,
            temperatures, vocab, ints, numbers,
        )  # fmt: skip
        grad = _op.empty_gradient(logits) if want_grad else None
        loss, stats = _run(rows, logits, plan, temperature, vocab, bool(ints[-1]), grad)
        return loss, logits.new_empty(0) if grad is None else grad, stats

    return policy_loss_op


def _fused_fake(logits, *rest):
    ints, want_grad = rest[-3], rest[-1]
    loss, stats = _results_fake(logits, ints)
    return loss, _op.empty_gradient(logits) if want_grad else logits.new_empty(0), stats


@_op.op("policy_loss", fake=_fused_fake, cuda=_fused(_rows_cuda))
def _policy_loss(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    vocab: int,
    integers: list[int],
    numbers: list[float],
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient by the logits or an empty tensor, statistics or an empty tensor)."""
    return _fused(_rows_cpu)(
        logits, tokens, ids, offsets, old_logprobs, advantages, mask, ref_logprobs,
        rollout_logprobs, cu_seqlens, normalizer, temperatures, temperature, vocab, integers,
        numbers, want_grad,
    )  # fmt: skip


def _fused_inplace(rows: Callable):
    def policy_loss_op_(
        logits, tokens, ids, offsets, old, advantages, mask, ref, rollout, cu, normalizer,
        temperatures, temperature, vocab, ints, numbers,
    ):  # fmt: skip
        plan = _prepare(
            logits, tokens, ids, offsets, old, advantages, mask, ref, rollout, cu, normalizer,
            temperatures, vocab, ints, numbers,
        )  # fmt: skip
        return _run(rows, logits, plan, temperature, vocab, bool(ints[-1]), logits)

    return policy_loss_op_


def _fused_inplace_fake(logits, *rest):
    return _results_fake(logits, rest[-2])


@_op.op(
    "policy_loss_", fake=_fused_inplace_fake, cuda=_fused_inplace(_rows_cuda), mutates=("logits",)
)
def _policy_loss_(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    vocab: int,
    integers: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """(loss, statistics); the gradient takes the place of the logits."""
    return _fused_inplace(_rows_cpu)(
        logits, tokens, ids, offsets, old_logprobs, advantages, mask, ref_logprobs,
        rollout_logprobs, cu_seqlens, normalizer, temperatures, temperature, vocab, integers,
        numbers,
    )  # fmt: skip


def _attach(logits: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
    return loss.clone()


def _attach_fake(logits, grad, loss):
    return torch.empty_like(loss)


@_op.op("attach_grad", fake=_attach_fake, cuda=_attach)
def _attach_grad(logits: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
    """`loss` as a function of `logits` whose gradient is known; backward consumes `grad`."""
    return _attach(logits, grad, loss)


def _attach_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.spent = False


def _attach_backward(ctx, factor):
    if ctx.spent:
        raise RuntimeError(
            "second backward through the same pyrlk loss: its gradient was handed over by the first"
        )
    ctx.spent = True
    (grad,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise RuntimeError("pyrlk losses are differentiable once: create_graph is not supported")
    _op.scale_(grad, factor)
    return grad, None, None


_attach_grad.register_autograd(_attach_backward, setup_context=_attach_setup)


def policy_loss_from_logprobs(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective: Objective | Callable = DAPO(),  # noqa: B008 - a frozen dataclass
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    correction: TIS | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, PolicyStats)
    """The loss of `policy_loss` from log-probs [...] (float32, float64): plain torch and autograd.

    Arguments mean what they mean in `policy_loss`; `entropy` [...] is needed where entropy_coef is
    not 0. Differentiable in `logprobs` and `entropy`; masked places of both may hold anything.
    """
    z = _check.tensor("logprobs", logprobs)
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logprobs must be float32 or float64, got {z.dtype}")
    shape, dtype = z.shape, z.dtype
    old, advantages, mask, ref, rollout, cu_seqlens, normalizer = _options(
        z,
        shape,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        rollout_logprobs,
        correction,
        cu_seqlens,
        normalizer,
        objective,
        kl_coef,
        kl,
        kl_importance,
        entropy_coef,
        "logprobs",
    )
    _check.flag("return_stats", return_stats)
    if entropy is not None:
        entropy = _check.floating("entropy", entropy, z, shape, "logprobs")
    elif entropy_coef != 0:
        raise ValueError("entropy is needed where entropy_coef is not 0")
    if z.device.type == "cpu" and not torch.compiler.is_compiling():
        _check.mask_values(mask)
        _check.cu_seqlens_values(cu_seqlens, shape.numel())
        _check.normalizer_value(normalizer)

    m = torch.ones_like(z.detach()) if mask is None else mask.detach().to(dtype)
    counted = m > 0
    seqs = _objective.sequences(shape, cu_seqlens)

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(counted, x.to(dtype), 0)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else clean(x.detach())

    spread = advantages if advantages.shape == shape else _spread(seqs, advantages)
    advantages = torch.where(counted, spread.detach().to(dtype), 0)
    old, ref, rollout = constant(old), constant(ref), constant(rollout)
    logprobs, entropy = torch.where(counted, z, 0), clean(entropy)
    policy_advantages, factor = advantages, None
    if correction is not None and rollout is not None:
        behaviour = logprobs.detach() if old is None else old
        factor = _objective.correction_weights(correction, behaviour, rollout, m, seqs)
        policy_advantages = advantages * factor

    rule = objective if isinstance(objective, Objective) else DAPO()
    weight = _objective.token_weights(rule, m, seqs, normalizer)
    t = _objective.terms(
        rule, kl=kl, kl_coef=kl_coef, kl_importance=kl_importance, entropy_coef=entropy_coef
    )
    if isinstance(objective, Objective) and objective.fused:
        per_token = _objective.token_loss(logprobs, old, policy_advantages, ref, entropy, t)
        loss = (weight * per_token).sum()
    else:
        behaviour = logprobs.detach() if old is None else old
        if isinstance(objective, Objective):
            level = "token" if correction is None else correction.level
            batch = _objective.Batch(logprobs, behaviour, advantages, m, seqs, factor, level)
            own = objective.policy_term(batch)
        else:
            own = _called(objective, logprobs, behaviour, policy_advantages, m)
        no_policy_term = torch.zeros_like(advantages)
        rest = _objective.token_loss(logprobs, old, no_policy_term, ref, entropy, t)
        if own.shape == shape:
            loss = (weight * (torch.where(counted, own, 0) + rest)).sum()
        else:
            loss = own + (weight * rest).sum()
    if not return_stats:
        return loss
    with torch.no_grad():
        stats = _statistics(logprobs, old, policy_advantages, m, ref, entropy, factor, t)
    return loss, PolicyStats(*stats.unbind())


def _called(objective: Callable, *arguments: Tensor) -> Tensor:
    loss, shape = objective(*arguments), arguments[0].shape
    if not isinstance(loss, Tensor) or loss.shape not in (shape, torch.Size(())):
        raise ValueError(
            f"objective must return per-token losses {list(shape)} or a 0-d loss, got "
            f"{list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
        )
    z = arguments[0]
    if loss.device != z.device:
        raise ValueError(f"objective must return a loss on {z.device}, got one on {loss.device}")
    if not loss.is_floating_point():
        raise TypeError(f"objective must return a float loss, got {loss.dtype}")
    return loss


def _spread(seqs: Sequences | None, x: Tensor) -> Tensor:
    assert seqs is not None  # _check.advantages has seen to it
    return seqs.spread(x)


def reinforce_grad(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """A·(π − e_a)/τ: the gradient of −A·log π(a) by the logits, π = softmax(logits / τ).

    Parameters
    ----------
    logits : [..., V] float32, float16, bfloat16 (float64 on CPU), last stride 1
    tokens : [...] int64 or int32; −100 gives a zero row, which is not read
    advantages : [...] float; 0 gives a zero row
    temperature : number > 0, or [...] float
    out : tensor like logits, optional
        Receives the result; it may be the logits themselves.

    Returns
    -------
    [..., V] in the dtype of the logits; each row sums to 0 up to rounding. Not differentiable.
    """
    z = _check.logits(logits)
    shape = z.shape[:-1]
    tokens = _check.tokens(tokens, z, shape)
    advantages = _check.floating("advantages", advantages, z, shape)
    number, per_token = _check.temperature(temperature, z, shape)
    z = z.detach()
    if out is None:
        out = _op.empty_gradient(z)
    else:
        _check.shaped("out", _check.logits(_check.like("out", out, z), "out"), z.shape)
        if out.dtype != z.dtype:
            raise TypeError(f"out must be {z.dtype} like logits, got {out.dtype}")
        if out.requires_grad:
            raise ValueError("out must not require grad")
        _check.disjoint_rows(out, "out: its rows overlap")
    _reinforce_grad(z, tokens, advantages.detach(), number, per_token, out)
    return out


def _reinforce_cuda(logits, tokens, advantages, temperature, temperatures, out):
    from .triton_kernels import policy_loss as kernels

    if tokens.numel():
        tau = temperature if temperatures is None else _op.flat(temperatures, torch.float32)
        ids, scale = _op.flat(tokens, torch.int64), _op.flat(advantages, torch.float32)
        kernels.reinforce_grad(logits, ids, scale, tau, out)


@_op.op("reinforce_grad", fake=_op.mutates_only, cuda=_reinforce_cuda, mutates=("out",))
def _reinforce_grad(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    out: Tensor,
) -> None:
    dtype, vocab = _op.compute_dtype(logits), logits.shape[-1]
    _check.temperature_values(temperatures, tokens != -100)
    ids = _op.flat(tokens, torch.int64)
    scale, tau = _op.flat(advantages, dtype), _op.flat(temperatures, dtype)
    assert ids is not None
    bad = _C.reinforce_grad(
        _op.rows(logits, vocab),
        ids.data_ptr(),
        _op.address(scale),
        (temperature, _op.address(tau)),
        _op.rows(out, vocab),
        _op.threads(),
    )
    _check.bad_token(bad, ids, vocab)


def normalizer(
    mask: Tensor,
    objective: Objective,
    *,
    group=None,
    micro_batches: int = 1,
    averaged: bool = True,
) -> Tensor:
    """The global denominator of a loss under data parallelism and gradient accumulation.

    Parameters
    ----------
    mask : [B, L] or [T], of all micro-batches of this rank together
    objective : its aggregation says what is counted: mask weight, or sequences with tokens
    group : torch.distributed process group of the data-parallel ranks, optional
        The count is summed over it (one all-reduce of one float).
    micro_batches : int ≥ 1
        Divides the result where the trainer averages, not sums, the micro-batches' gradients.
    averaged : bool
        True where gradients are averaged over the ranks (DDP, FSDP): divides by their number.

    Returns
    -------
    0-d float64 tensor on the device of `mask`, for ``normalizer=`` of every micro-batch's loss.
    """
    mask = _check.tensor("mask", mask)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an instance such as pyrlk.DAPO(), got {objective!r}")
    if _check.integer("micro_batches", micro_batches) < 1:
        raise ValueError(f"micro_batches must be ≥ 1, got {micro_batches}")
    _check.flag("averaged", averaged)
    weight = mask.to(torch.float64)
    if objective.aggregation == "token":
        total = weight.sum()
    elif mask.dim() < 2:
        raise ValueError(
            f"mask must be [B, L] for {type(objective).__name__}, which counts sequences, "
            f"got {list(mask.shape)}"
        )
    elif objective.aggregation == "constant":
        total = weight.new_tensor(float(mask.shape[:-1].numel()))
    else:
        total = (weight.sum(-1) > 0).sum().to(torch.float64)
    ranks = 1
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
        ranks = torch.distributed.get_world_size(group)
    return total / (micro_batches * (ranks if averaged else 1))
