"""slime: its policy loss on Megatron's logits, by `pyrlk.policy_loss` in one pass and in place.

    --loss-type custom_loss --custom-loss-function-path pyrlk.integrations.slime.policy_loss

    loss = Σ_t w_t·[ ℓ_t + kl_loss_coef·KL_t − entropy_coef·H_t ]     w: slime's own reducer

logits [1, T, V / tensor-parallel ranks] hold whole samples, prompt and response, one after the
other; T may be padded. The row before a token of a response predicts it; no other row is read.
slime itself divides by the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..loss import policy_loss as _policy_loss
from ..objective import CISPO, GSPO, PPO, TIS, Objective
from ..support import Support
from . import lower, missing

_KL = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
_ICEPOP = "icepop_function"  # the end of slime's path to it


def policy_loss(
    args: Any, batch: dict, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's `policy_loss`, with the signature of its custom loss functions.

    The gradient is written over the logits, except under --recompute-loss-function, which reads
    them twice.

    Parameters
    ----------
    args : slime's arguments; `objective_of` and `options_of` name those that are read
    batch : slime's micro-batch
        "unconcat_tokens", "total_lengths", "response_lengths" and, one tensor a response,
        "advantages", "log_probs", "ref_log_probs", "rollout_log_probs".
    logits : [1, T, V] float, V of this tensor-parallel rank
    sum_of_sample_mean : any linear function of the values [R] of all response tokens
        Its slope is the weight of each token, with slime's denominators in it.

    Returns
    -------
    loss, metrics
        0-d; slime's loss, entropy_loss, pg_clipfrac (without gspo and cispo), kl_loss and tis, and
        approx_kl, the mean of (r − 1) − log r. Each metric is reduced as slime reduces its own.

    Raises
    ------
    ValueError
        Naming the option that has no equal here.
    ImportError
        Where megatron.core is missing.
    """
    objective, options = objective_of(args), options_of(args)
    group = _vocabulary_group()
    device, count = logits.device, logits.shape[1]
    rows = _rows(batch, device)
    weight = _weights(sum_of_sample_mean, rows.numel(), logits)

    def spread(parts: list[Tensor], fill: float = 0) -> Tensor:
        """One tensor a response → [1, T], each value at the row that predicts its token."""
        flat = torch.cat([part.to(device) for part in parts])
        return flat.new_full((count,), fill).index_copy(0, rows, flat)[None]

    responses = [
        tokens[total - length : total]
        for tokens, total, length in zip(
            batch["unconcat_tokens"],
            batch["total_lengths"],
            batch["response_lengths"],
            strict=True,
        )
    ]
    advantages = spread(batch["advantages"])
    before = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    old = spread(before) if before else None  # None: on-policy, as in slime
    if args.use_tis:
        options["rollout_logprobs"] = spread(batch["rollout_log_probs"])
        options["correction"] = _correction(args)
        if args.tis_clip_low > 0:
            # TIS has no lower bound, and the policy term is linear in the advantage.
            advantages = advantages * _bounded(args, old, options.pop("rollout_logprobs"))
            del options["correction"]
    if args.use_kl_loss:
        options["ref_logprobs"] = spread(batch["ref_log_probs"])
    loss, stats = _policy_loss(
        logits,
        spread(responses, -100),
        old,
        advantages,
        weight.new_zeros(count).index_copy(0, rows, weight)[None],
        objective=objective,
        support=_support(args, batch, rows, count),
        cu_seqlens=_bounds(batch, count, device),
        normalizer=1.0,  # the weights have the denominators
        group=group,
        inplace=not args.recompute_loss_function,
        return_stats=True,
        **options,
    )
    total = weight.sum()
    metrics = {
        "loss": loss.detach().clone(),
        "entropy_loss": stats.entropy * total,
        "approx_kl": stats.approx_kl * total,
    }
    if objective.fused:
        metrics["pg_clipfrac"] = (stats.clip_low + stats.clip_high) * total
    if args.use_kl_loss:
        metrics["kl_loss"] = stats.ref_kl * total
    if "correction" in options:
        metrics["tis"] = stats.correction_mean * total
    return loss, metrics


def objective_of(args: Any) -> Objective:
    """The objective of --advantage-estimator, --eps-clip, --eps-clip-high and --eps-clip-c.

    Its aggregation is "token": slime's reducer gives each token its weight.
    """
    low, high, c = args.eps_clip, args.eps_clip_high, args.eps_clip_c
    high = low if high is None else high
    if args.advantage_estimator in ("gspo", "cispo") and c is not None:
        if args.advantage_estimator == "gspo":
            raise ValueError("--eps-clip-c has no equal under --advantage-estimator gspo")
        c = None  # slime does not read it there
    low = lower(low)
    if args.advantage_estimator == "gspo":
        return GSPO(low, high, aggregation="token")
    if args.advantage_estimator == "cispo":
        return CISPO(low, high)
    return PPO(low, high, c)


def options_of(args: Any) -> dict[str, Any]:
    """What `pyrlk.policy_loss` takes of slime's arguments besides the objective.

    Raises
    ------
    ValueError
        Naming the option that has no equal here.
    """
    for name, neutral in (
        ("use_opsm", False),
        ("get_mismatch_metrics", False),
        ("custom_pg_loss_reducer_function_path", None),
    ):
        if getattr(args, name, neutral) != neutral:
            raise ValueError(f"--{name.replace('_', '-')} has no equal in pyrlk")
    if getattr(args, "context_parallel_size", 1) != 1:
        raise ValueError(
            "--context-parallel-size must be 1: a rank of more holds parts of sequences"
        )
    options = {"temperature": args.rollout_temperature, "entropy_coef": args.entropy_coef}
    if not args.use_kl_loss:
        return options
    if args.kl_loss_type not in _KL:
        raise ValueError(f"--kl-loss-type must be one of {', '.join(_KL)}, got {args.kl_loss_type}")
    kl = {"kl_coef": args.kl_loss_coef, "kl": _KL[args.kl_loss_type]}
    return options | kl | {"kl_importance": bool(args.use_unbiased_kl)}


def _correction(args: Any) -> TIS:
    path = getattr(args, "custom_tis_function_path", None)
    if path is not None and not path.endswith(_ICEPOP):
        raise ValueError(f"--custom-tis-function-path must be slime's {_ICEPOP}, got {path!r}")
    return TIS("token", "clip" if path is None else "mask", args.tis_clip)


def _bounded(args: Any, old: Tensor | None, rollout: Tensor) -> Tensor:
    """exp(old − rollout) inside [tis_clip_low, tis_clip]: clipped to it, or 0 outside."""
    if old is None:
        raise ValueError("--tis-clip-low needs old log-probs in the batch (log_probs)")
    ratio, low, high = torch.exp(old - rollout), args.tis_clip_low, args.tis_clip
    if _correction(args).mode == "clip":
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _vocabulary_group() -> Any:
    """Megatron's tensor-parallel group, None where the vocabulary is whole."""
    try:
        from megatron.core import mpu
    except ImportError as error:
        missing("pyrlk.integrations.slime.policy_loss", "slime's megatron.core", error)
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return None
    return mpu.get_tensor_model_parallel_group()


def _rows(batch: dict, device: torch.device) -> Tensor:
    """[R]: of each response token, in order, the row of the logits that predicts it."""
    parts, end = [], 0
    for total, length in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        end += total
        parts.append(torch.arange(end - length - 1, end - 1))
    return torch.cat(parts).to(device)


def _bounds(batch: dict, count: int, device: torch.device) -> Tensor:
    """cu_seqlens of the samples; the padding after the last one is a sequence without tokens."""
    ends = torch.tensor([0, *batch["total_lengths"]]).cumsum(0)
    return torch.cat([ends, torch.tensor([count])]).to(device)


def _weights(reduce: Callable[[Tensor], Tensor], count: int, logits: Tensor) -> Tensor:
    """[R] the weights of a linear reducer: its slope."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = torch.zeros(count, dtype=dtype, device=logits.device, requires_grad=True)
    # Hooks of activation checkpointing would take this small graph for one of the model.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return torch.autograd.grad(reduce(x), x)[0]


def _support(args: Any, batch: dict, rows: Tensor, count: int) -> Support | None:
    """The kept sets of the rollout, one a row of the logits, empty where there is no response."""
    if getattr(args, "rollout_top_p", 1.0) == 1.0:
        return None
    ids, lengths = [], []
    pairs = zip(
        batch["rollout_top_p_token_ids"],
        batch["rollout_top_p_token_offsets"],
        batch["response_lengths"],
        strict=True,
    )
    for i, (own, offsets, length) in enumerate(pairs):
        bounds = torch.as_tensor(offsets, dtype=torch.int64)
        if bounds.numel() < length + 1:
            raise ValueError(
                f"rollout_top_p_token_offsets[{i}] must have {length + 1} entries, one more than "
                f"tokens, got {bounds.numel()}"
            )
        ids.append(torch.as_tensor(own, dtype=torch.int64)[: int(bounds[length])])
        lengths.append(bounds[: length + 1].diff())
    per_row = torch.zeros(count, dtype=torch.int64)
    per_row[rows.cpu()] = torch.cat(lengths).cpu()
    kept = Support.from_flat(torch.cat(ids).cpu(), lengths=per_row)
    return Support(kept.ids.to(rows.device), kept.offsets.to(rows.device))
