"""Policy losses on log-probs, in plain torch: differentiable wherever the log-probs come from.

    loss = Σ_t w_t·[ ℓ_t + kl_coef·KL_t − entropy_coef·H_t ]         (objective.py has ℓ, KL and w)

Also the middle of every loss that is not one launch: statistics of the rows → this → row gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check, _op, _plan
from . import objective as _objective
from ._plan import Options, PolicyStats
from .objective import DAPO, TIS, Objective
from .support import Support


def policy_loss_from_logprobs(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective: Objective | Callable = DAPO(),  # noqa: B008 - a frozen dataclass
    entropy: Tensor | None = None,
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
    group: Any = None,
    inplace: bool = False,
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, PolicyStats)
    """The loss of `policy_loss` from log-probs [...] (float32, float64): plain torch and autograd.

    Parameters
    ----------
    logprobs : [...] float32, float64
    entropy : [...] float, needed where entropy_coef is not 0
    temperature, support, vocab_size, group, inplace
        At their defaults: they belong to logits. Log-probs have them from the function that they
        come from, and so does their gradient.
    old_logprobs, advantages, mask, objective and all others
        As in `policy_loss`, with the shape of logprobs.

    Returns
    -------
    loss : 0-d in the dtype of logprobs, or (loss, PolicyStats)
        Differentiable in `logprobs` and `entropy`; masked places of both may hold anything.

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU also for values inside tensors.
    """
    _only_of_logits(temperature, support, vocab_size, group, inplace)
    z = _check.tensor("logprobs", logprobs)
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logprobs must be float32 or float64, got {z.dtype}")
    options = _plan.checked(
        Options(
            old_logprobs,
            advantages,
            mask,
            objective,
            ref_logprobs,
            kl_coef,
            kl,
            kl_importance,
            entropy_coef,
            rollout_logprobs,
            correction,
            cu_seqlens,
            normalizer,
            return_stats,
        ),
        z,
        z.shape,
        "logprobs",
    )
    if entropy is not None:
        entropy = _check.floating("entropy", entropy, z, z.shape, "logprobs")
    elif entropy_coef != 0:
        raise ValueError("entropy is needed where entropy_coef is not 0")
    return from_logprobs(z, entropy, options)


def _only_of_logits(temperature, support, vocab_size, group, inplace) -> None:
    """Refuses what would change nothing here, but would have changed the log-probs."""
    number = None if isinstance(temperature, Tensor) else _check.number("temperature", temperature)
    for name, neutral, kept in (
        ("temperature", 1.0, number == 1.0),
        ("support", None, support is None),
        ("vocab_size", None, vocab_size is None),
        ("group", None, group is None),
        ("inplace", False, not _check.flag("inplace", inplace)),
    ):
        if not kept:
            raise ValueError(
                f"{name} must be {neutral}: it belongs to logits; give it to the function that the "
                "log-probs come from"
            )


def two_launches(score: Callable, tokens: Tensor, options: Options) -> Any:
    """A loss by way of log-probs and autograd: `score` maps tokens to (logprob, entropy)."""
    mask = options.mask
    keep = tokens if mask is None else torch.where(mask != 0, tokens, -100)
    counted = keep != -100
    mask = counted if mask is None else torch.where(counted, mask, 0)
    logprobs, entropy = score(keep)
    out = from_logprobs(logprobs, entropy, options._replace(mask=mask))
    return (_once(out[0]), out[1]) if options.return_stats else _once(out)


@_op.op("once", fake=lambda loss: torch.empty_like(loss))
def _once(loss: Tensor) -> Tensor:
    """`loss`, which backward may enter once: a rule of all losses, whatever their launches are."""
    return loss.clone()


def _once_setup(ctx, inputs, output):
    ctx.spent = False


def _once_backward(ctx, factor):
    _op.enter_once(ctx, "losses are differentiable once")
    return factor


_once.register_autograd(_once_backward, setup_context=_once_setup)


def from_logprobs(z: Tensor, entropy: Tensor | None, options: Options) -> Any:
    """The loss of checked options, and its statistics where they ask for them."""
    objective, correction, mask = options.objective, options.correction, options.mask
    shape, dtype = z.shape, z.dtype
    if not torch.compiler.is_compiling() and _check.reads_values(z):
        _check.mask_values(mask)
        _check.cu_seqlens_values(options.cu_seqlens, shape.numel())
        _check.normalizer_value(options.normalizer)

    m = torch.ones_like(z.detach()) if mask is None else mask.to(dtype)
    counted = m > 0
    seqs = _objective.sequences(shape, options.cu_seqlens)

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(counted, x.to(dtype), 0)

    advantages = _plan.at_tokens(options.advantages, shape, seqs)
    advantages = torch.where(counted, advantages.to(dtype), 0)
    constants = options.old_logprobs, options.ref_logprobs, options.rollout_logprobs
    old, ref, rollout = (clean(x) for x in constants)
    logprobs, entropy = torch.where(counted, z, 0), clean(entropy)
    policy_advantages, factor = advantages, None
    if correction is not None and rollout is not None:
        behaviour = logprobs.detach() if old is None else old
        factor = _objective.correction_weights(correction, behaviour, rollout, m, seqs)
        policy_advantages = advantages * factor

    rule = objective if isinstance(objective, Objective) else DAPO()
    weight = _objective.token_weights(rule, m, seqs, options.normalizer)
    t = _objective.terms(
        rule,
        kl=options.kl,
        kl_coef=options.kl_coef,
        kl_importance=options.kl_importance,
        entropy_coef=options.entropy_coef,
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
    if not options.return_stats:
        return loss
    with torch.no_grad():
        stats = _plan.statistics(logprobs, old, advantages, m, ref, entropy, factor, t)
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
