"""verl 0.9: its policy losses, computed by `pyrlk.policy_loss_from_logprobs`.

    from pyrlk.integrations import verl; verl.register()        in every worker, or the option
    actor_rollout_ref.model.external_lib=pyrlk.integrations.verl_register, which does the same, and
    actor_rollout_ref.actor.policy_loss.loss_mode=pyrlk_vanilla

    loss = Σ_t w_t·ℓ_t     ℓ from the mode and actor.clip_ratio…, w from loss_agg_mode and the batch

verl adds its entropy bonus and its KL to a reference itself, after the policy loss.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from ..from_logprobs import policy_loss_from_logprobs
from ..objective import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    GSPO,
    PPO,
    REINFORCE,
    SAPO,
    Aggregation,
    ClipCov,
    KLCov,
    Objective,
)
from . import lower, missing, weighted

PREFIX = "pyrlk_"
MODES = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "cispo",
)
_AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": "token",
    "token-sum": "token",
    "seq-mean-token-sum": "sequence-sum",
    "seq-mean-token-sum-norm": "sequence-sum",
    "seq-mean-token-mean": "sequence",
}


def register() -> None:
    """Adds `pyrlk_<mode>` for every mode to verl's registry of policy losses.

    Raises
    ------
    ImportError
        Where verl is missing.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
    except ImportError as error:
        missing("pyrlk.integrations.verl.register", "verl: pip install verl==0.9.1", error)
    for mode in MODES:
        register_policy_loss(PREFIX + mode)(functools.partial(policy_loss, mode))


def policy_loss(
    mode: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss of `mode`; all after it is the signature of verl's registry.

    Parameters
    ----------
    mode : one of MODES
    old_log_prob, log_prob, advantages : [B, L] float
    response_mask : [B, L] bool or int
    loss_agg_mode : verl's name
    config : verl's ActorConfig
        clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, tau_neg, policy_loss and
        global_batch_info are read.
    rollout_is_weights : [B, L] float, optional
        Multiplies the policy term of each token.

    Returns
    -------
    loss, metrics
        0-d, and verl's actor/ppo_kl (the mean of old − logp), actor/ratio_max and, in a mode whose
        ratio a token is clipped by, actor/pg_clipfrac.
    """
    # A new choice of tokens in every call, as in verl, from the generator that torch.manual_seed
    # sets.
    seed = int(torch.randint(1 << 62, ())) if mode == "clip_cov" else 0
    objective = objective_of(config, mode, loss_agg_mode, seed=seed)
    correction = {} if rollout_is_weights is None else weighted(old_log_prob, rollout_is_weights)
    loss, stats = policy_loss_from_logprobs(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective=objective,
        normalizer=normalizer_of(config, mode, loss_agg_mode, response_mask),
        return_stats=True,
        **correction,
    )
    with torch.no_grad():
        kept = response_mask > 0
        gap = torch.where(kept, old_log_prob - log_prob, 0).sum() / kept.sum().clamp(min=1)
        values = {"actor/ppo_kl": gap, "actor/ratio_max": stats.ratio_max}
        if objective.fused and hasattr(objective, "eps_high"):
            values["actor/pg_clipfrac"] = stats.clip_low + stats.clip_high
        numbers = torch.stack([x.double() for x in values.values()]).tolist()  # one wait, not three
    return loss, dict(zip(values, numbers, strict=True))


def objective_of(
    config: Any, mode: str | None = None, loss_agg_mode: str | None = None, *, seed: int = 0
) -> Objective:
    """The objective of verl's ActorConfig.

    Parameters
    ----------
    config : ActorConfig, or anything with its attributes
    mode : one of MODES; by default policy_loss.loss_mode, with or without `pyrlk_`
    loss_agg_mode : by default that of config
    seed : of the choice of tokens in "clip_cov", for which verl has no option

    Raises
    ------
    ValueError
        For a mode that has no equal here ("bypass_mode") and for an unknown loss_agg_mode.
    """
    if mode is None:
        mode = str(_of(config.policy_loss, "loss_mode", "vanilla")).removeprefix(PREFIX)
    if mode not in MODES:
        raise ValueError(f"policy_loss.loss_mode must be one of {', '.join(MODES)}, got {mode!r}")
    agg = _agg(mode, _of(config, "loss_agg_mode", None) if loss_agg_mode is None else loss_agg_mode)
    aggregation = _AGGREGATIONS[agg]
    low = _of(config, "clip_ratio_low", config.clip_ratio)
    high = _of(config, "clip_ratio_high", config.clip_ratio)
    eps = {"eps_low": lower(low), "eps_high": high}
    own = _of(config, "policy_loss", None)
    if mode == "vanilla":
        c = _of(config, "clip_ratio_c", 3.0)
        return PPO(**eps, dual_clip=c, aggregation=aggregation)
    if mode in ("dppo_tv", "dppo_kl"):
        c = _of(config, "clip_ratio_c", 20.0)
        kind: Literal["tv", "kl"] = "tv" if mode == "dppo_tv" else "kl"
        return DPPO(kind, low, high, max_ratio=c, aggregation=aggregation)
    if mode == "gspo":
        return GSPO(**eps, token_level=True, aggregation=aggregation)
    if mode == "sapo":
        return SAPO(config.tau_pos, config.tau_neg, aggregation=aggregation)
    if mode == "gpg":
        return REINFORCE(aggregation=aggregation)
    if mode == "clip_cov":
        share, below = _of(own, "clip_cov_ratio", 2e-4), _of(own, "clip_cov_lb", 1.0)
        bounds = {"cov_low": below, "cov_high": _of(own, "clip_cov_ub", 5.0)}
        return ClipCov(**eps, share=share, **bounds, seed=seed, aggregation=aggregation)
    if mode == "kl_cov":
        share, coef = _of(own, "kl_cov_ratio", 2e-4), _of(own, "ppo_kl_coef", 1.0)
        return KLCov(share=share, kl_coef=coef, aggregation=aggregation)
    if mode == "geo_mean":
        return GMPO(low, high, aggregation=aggregation)
    if mode == "dro":
        if _of(own, "dro_beta", None) is None:
            raise ValueError("policy_loss.dro_beta must be a number > 0 for dro, got None")
        return DRO(own.dro_beta, aggregation=aggregation)
    return CISPO(**eps, aggregation=aggregation)


def normalizer_of(
    config: Any, mode: str, loss_agg_mode: str, mask: Tensor
) -> float | Tensor | None:
    """The denominator of verl's agg_loss over its ranks, whose gradients are averaged.

    None, what the mask of this micro-batch says, where config.global_batch_info says nothing.

    Raises
    ------
    ValueError
        Where there are several ranks and the global count that the mode needs is missing.
    """
    if mode == "geo_mean":  # a mean over the rows of the micro-batch, whatever the options say
        return float(mask.shape[0])
    agg = _agg(mode, loss_agg_mode)
    info = _of(config, "global_batch_info", None) or {}
    ranks = info.get("dp_size") or 1
    if agg == "token-sum":
        return 1.0 / ranks
    name = "batch_num_tokens" if agg == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None and ranks > 1:
        raise ValueError(f"global_batch_info.{name} is needed by {agg!r} on {ranks} ranks")
    if agg != "seq-mean-token-sum-norm":
        return None if count is None else count / ranks
    if count is None:
        count = (mask > 0).any(-1).sum().clamp(min=1)
    length = info.get("loss_scale_factor")
    return (mask.shape[-1] if length is None else length) * count / ranks


def _agg(mode: str, loss_agg_mode: str | None) -> str:
    if mode in ("sapo", "geo_mean"):  # verl fixes it for these two
        return "seq-mean-token-mean"
    if loss_agg_mode is None:
        return "token-mean"
    if loss_agg_mode not in _AGGREGATIONS:
        known = ", ".join(_AGGREGATIONS)
        raise ValueError(f"loss_agg_mode must be one of {known}, got {loss_agg_mode!r}")
    return loss_agg_mode


def _of(config: Any, name: str, default: Any) -> Any:
    """An option, or the default where it is missing or None."""
    value = getattr(config, name, None)
    return default if value is None else value
