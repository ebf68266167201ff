"""TRL 1.16: what the options of GRPOConfig are in pyrlk. Reads attributes, so it needs no TRL.

loss = Σ_t w_t·[ ℓ_t + beta·KL_t − entropy_coef·H_t ]     ℓ from loss_type, w from normalizer_of
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..objective import (
    BNPO,
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    LUSPO,
    SAPO,
    TIS,
    VESPO,
    Aggregation,
    DrGRPO,
    Objective,
)

# How a loss of the clipped surrogate is aggregated where the ratio is a sequence's.
_OF_SEQUENCE_RATIOS: dict[str, Aggregation] = {
    "grpo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "dr_grpo": "sequence-sum",
    "luspo": "sequence-sum",
}


def objective_of(args: Any) -> Objective:
    """The objective of loss_type, epsilon, epsilon_high, delta and importance_sampling_level.

    Parameters
    ----------
    args : GRPOConfig, or anything with its attributes

    Raises
    ------
    ValueError
        Naming the option that has no equal here: the sequence ratio of cispo and sapo, and an
        epsilon_high below 1 in cispo.
    """
    kind, level = args.loss_type, args.importance_sampling_level
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
    if kind == "vespo":  # its weight is a sequence's at either level
        return VESPO(
            args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg
        )
    if kind in ("cispo", "sapo") and level == "sequence":
        raise ValueError(f"importance_sampling_level='sequence' has no equal for {kind!r}")
    if kind == "cispo":
        if high < 1:
            raise ValueError(
                f"epsilon_high must be at least 1 for cispo, got {high}: it bounds the ratio itself"
            )
        return CISPO(eps_high=high - 1)
    if kind == "sapo":
        return SAPO(args.sapo_temperature_pos, args.sapo_temperature_neg)
    if kind not in _OF_SEQUENCE_RATIOS:
        known = ", ".join([*_OF_SEQUENCE_RATIOS, "cispo", "sapo", "vespo"])
        raise ValueError(f"loss_type must be one of {known}, got {kind!r}")
    low, delta = args.epsilon, args.delta
    if level == "sequence":
        aggregation = _OF_SEQUENCE_RATIOS[kind]
        if kind == "luspo" or delta is not None:
            return LUSPO(low, high, delta, aggregation=aggregation)
        return GSPO(low, high, aggregation=aggregation)
    if kind == "dr_grpo":
        return DrGRPO(args.max_completion_length, low, high, delta)
    if kind == "luspo":
        return GRPO(low, high, delta, aggregation="sequence-sum")
    rule = {"grpo": GRPO, "bnpo": BNPO, "dapo": DAPO}[kind]
    return rule(low, high, delta)


def options_of(args: Any) -> dict[str, Any]:
    """What a pyrlk loss on logits takes of `args` besides objective, normalizer and correction.

    Raises
    ------
    ValueError
        Naming the option that has no equal here.
    """
    if args.top_entropy_quantile < 1:
        raise ValueError("top_entropy_quantile must be 1: set the advantage of such tokens to 0")
    if args.off_policy_mask_threshold is not None:
        raise ValueError("off_policy_mask_threshold must be None: set such advantages to 0")
    if args.use_adaptive_entropy:
        raise ValueError("use_adaptive_entropy has no equal in pyrlk")
    if args.entropy_coef != 0 and args.loss_type != "bnpo":
        raise ValueError(
            "entropy_coef must be 0 except for bnpo: elsewhere TRL's bonus has another denominator "
            "than its loss"
        )
    corrected = args.beta != 0 and args.use_bias_correction_kl
    if corrected and args.importance_sampling_level == "sequence":
        raise ValueError("use_bias_correction_kl has no equal for the ratio of a sequence")
    return {
        "temperature": args.temperature,
        "kl_coef": args.beta,
        "kl": "k3",
        "kl_importance": corrected,
        "entropy_coef": args.entropy_coef,
    }


def correction_of(args: Any) -> TIS | None:
    """The correction of use_vllm and vllm_importance_sampling_…; with it give rollout_logprobs.

    Raises
    ------
    ValueError
        For vllm_importance_sampling_clip_min: TIS has no lower bound.
    """
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return None
    if args.vllm_importance_sampling_clip_min is not None:
        raise ValueError(
            "vllm_importance_sampling_clip_min must be None: scale the advantages by the weight"
        )
    level, how = args.vllm_importance_sampling_mode.split("_")
    bound = args.vllm_importance_sampling_clip_max
    bound = math.inf if bound is None else bound
    return TIS(level, "clip" if how == "truncate" else "mask", bound)


def normalizer_of(
    args: Any,
    mask: Tensor,
    *,
    accumulation_steps: int = 1,
    num_items_in_batch: Tensor | float | None = None,
    processes: int = 1,
    training: bool = True,
) -> Tensor | float:
    """TRL's denominator of one micro-batch.

    Parameters
    ----------
    args : GRPOConfig, or anything with its attributes
    mask : [B, L] of the micro-batch
    accumulation_steps : micro-batches of this optimizer step
    num_items_in_batch : tokens of the generation batch on all processes
        Needed by dapo, cispo and vespo.
    processes : int
    training : bool
        False in evaluation, where nothing is accumulated.

    Raises
    ------
    ValueError
        Where num_items_in_batch is needed and missing.
    """
    kind, steps = args.loss_type, accumulation_steps if training else 1
    if kind in ("dapo", "cispo", "vespo"):
        if num_items_in_batch is None:
            raise ValueError(f"num_items_in_batch is needed by {kind!r}")
        items = num_items_in_batch
        items = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
        return items / processes * (steps / args.steps_per_generation if training else 1)
    if kind == "bnpo":
        return mask.sum().clamp(min=1) * steps
    rows = float(mask.shape[0] * steps)
    by_length = kind == "dr_grpo" and args.importance_sampling_level == "sequence"
    return rows * args.max_completion_length if by_length else rows
