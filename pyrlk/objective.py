"""Policy objectives on per-token log-probs: plain torch, differentiable, first of three homes.

    ratio r = exp(logp − old)         advantage A         weight m ≥ 0 of a token
    clipped surrogate   ℓ = −min( min(r, delta)·A, clip(r, 1−eps_low, 1+eps_high)·A )
    REINFORCE           ℓ = −A·logp
    per token           ℓ + kl_coef·KL(logp, ref) − entropy_coef·H
    loss                Σ_t w_t·ℓ_t,  w_t from the aggregation below

The same scalar function stands in csrc/kernels/objective.h and triton_kernels/objective.py under
the same names; tests hold the three equal. Where A = 0 the policy term is 0, whatever the ratio is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "sequence-sum", "constant"]
AGGREGATIONS = ("token", "sequence", "sequence-sum", "constant")
KL_KINDS = ("k1", "k2", "k3")


def _check_number(
    owner: str, name: str, value, low: float, high: float = math.inf, *, open_low=False
):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number, got {type(value).__name__}")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        bracket = "(" if open_low else "["
        raise ValueError(f"{owner}.{name} must lie in {bracket}{low:g}, {high:g}], got {value}")


# Field: (lower limit, upper limit, is the lower limit itself excluded).
_LIMITS = {
    "eps_low": (0.0, 1.0, False),
    "eps_high": (0.0, math.inf, False),
    "dual_clip": (1.0, math.inf, True),
    "delta": (0.0, math.inf, True),
    "max_length": (0.0, math.inf, True),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of the objectives. `aggregation` says how per-token losses become one number.

    "token": Σ m·ℓ / Σ m. "sequence": the mean over sequences of their token means. "sequence-sum":
    the mean over sequences of their token sums. "constant": Σ m·ℓ / (sequences · max_length). A
    sequence without tokens does not count, except in "constant", whose denominator is fixed
    beforehand.
    """

    aggregation: Aggregation = dataclasses.field(default="token", kw_only=True)

    def __post_init__(self):
        name = type(self).__name__
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"{name}.aggregation must be one of {', '.join(AGGREGATIONS)}, "
                f"got {self.aggregation!r}"
            )
        if self.aggregation == "constant" and not hasattr(self, "max_length"):
            raise ValueError(f"{name}.aggregation 'constant' needs max_length: use DrGRPO")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "aggregation" or (value is None and field.default is None):
                continue
            low, high, open_low = _LIMITS[field.name]
            _check_number(name, field.name, value, low, high, open_low=open_low)


@dataclasses.dataclass(frozen=True)
class REINFORCE(Objective):
    """ℓ = −A·logp (Williams 1992). Aggregation "token"."""


@dataclasses.dataclass(frozen=True)
class PPO(Objective):
    """Clipped surrogate (arXiv 1707.06347); `dual_clip` c > 1 bounds it for A < 0 by −c·A
    (1912.09729)."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None


@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """Clipped surrogate, mean of sequence means (arXiv 2402.03300); `delta` caps the ratio."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = dataclasses.field(default="sequence", kw_only=True)


@dataclasses.dataclass(frozen=True)
class BNPO(Objective):
    """Clipped surrogate, mean over the tokens of the batch; `delta` caps the ratio."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None


@dataclasses.dataclass(frozen=True)
class DrGRPO(Objective):
    """Clipped surrogate, Σ / (sequences · max_length) (arXiv 2503.20783)."""

    max_length: float
    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = dataclasses.field(default="constant", kw_only=True)


@dataclasses.dataclass(frozen=True)
class DAPO(Objective):
    """Clip-higher surrogate, one denominator over all tokens (arXiv 2503.14476, eq. 8)."""

    eps_low: float = 0.2
    eps_high: float = 0.28
    delta: float | None = None


@dataclasses.dataclass(frozen=True)
class TIS:
    """Truncated importance correction w = exp(old − rollout) of the policy term (detached).

    level "token" or "sequence" (one w a sequence, from the sum of its log-ratios); mode "clip"
    gives min(w, max_ratio), mode "mask" gives w where w ≤ max_ratio and 0 elsewhere.
    """

    level: Literal["token", "sequence"] = "token"
    mode: Literal["clip", "mask"] = "clip"
    max_ratio: float = 2.0

    def __post_init__(self):
        if self.level not in ("token", "sequence"):
            raise ValueError(f"TIS.level must be 'token' or 'sequence', got {self.level!r}")
        if self.mode not in ("clip", "mask"):
            raise ValueError(f"TIS.mode must be 'clip' or 'mask', got {self.mode!r}")
        _check_number("TIS", "max_ratio", self.max_ratio, 0.0, open_low=True)


@dataclasses.dataclass(frozen=True)
class Terms:
    """What the scalar objective needs besides its tensors: the run-time arguments of every
    kernel."""

    clipped: bool  # the clipped surrogate, else REINFORCE
    eps_low: float = 0.0
    eps_high: float = 0.0
    dual_clip: float = math.inf
    delta: float = math.inf
    kl: int = 3  # 1, 2 or 3
    kl_coef: float = 0.0
    kl_importance: bool = False
    entropy_coef: float = 0.0


def terms(
    objective: Objective, *, kl="k3", kl_coef=0.0, kl_importance=False, entropy_coef=0.0
) -> Terms:
    """The flat form of an objective and its regularisers."""
    clipped = not isinstance(objective, REINFORCE)
    dual_clip = getattr(objective, "dual_clip", None)
    delta = getattr(objective, "delta", None)
    return Terms(
        clipped,
        float(getattr(objective, "eps_low", 0.0)),
        float(getattr(objective, "eps_high", 0.0)),
        math.inf if dual_clip is None else float(dual_clip),
        math.inf if delta is None else float(delta),
        KL_KINDS.index(kl) + 1,
        float(kl_coef),
        bool(kl_importance),
        float(entropy_coef),
    )


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    t: Terms,
) -> Tensor:
    """Per-token loss ℓ + kl_coef·KL − entropy_coef·H; every tensor has the shape of `logprobs`.

    `old_logprobs=None` is on-policy: the ratio is 1 and its gradient that of `logprobs`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = logprobs - old
    active = advantages != 0
    if t.clipped:
        ratio = torch.exp(torch.where(active, log_ratio, 0.0))
        unclipped = ratio.clamp(max=t.delta) * advantages
        clipped = ratio.clamp(1 - t.eps_low, 1 + t.eps_high) * advantages
        surrogate = torch.where(unclipped <= clipped, unclipped, clipped)
        if t.dual_clip != math.inf:
            bound = t.dual_clip * advantages
            surrogate = torch.where((advantages < 0) & (surrogate < bound), bound, surrogate)
        loss = -surrogate
    else:
        loss = -advantages * torch.where(active, logprobs, 0.0)
    if t.kl_coef != 0:
        if ref_logprobs is None:
            raise ValueError("ref_logprobs is needed where kl_coef is not 0")
        kl = kl_estimate(logprobs, ref_logprobs, t.kl)
        if t.kl_importance:
            kl = torch.exp(log_ratio) * kl
        loss = loss + t.kl_coef * kl
    if t.entropy_coef != 0:
        if entropy is None:
            raise ValueError("entropy is needed where entropy_coef is not 0")
        loss = loss - t.entropy_coef * entropy
    return loss


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: int) -> Tensor:
    """KL(π‖ref) at the sampled token: k1 = d, k2 = d²/2, k3 = e^−d + d − 1, with d = logp − ref."""
    d = logprobs - ref_logprobs
    if kind == 1:
        return d
    if kind == 2:
        return 0.5 * d * d
    return torch.exp(-d) + d - 1


@dataclasses.dataclass(frozen=True)
class Sequences:
    """How tokens form sequences: the rows of a [B, L] layout, or cu_seqlens over a flat one."""

    shape: torch.Size
    cu_seqlens: Tensor | None = None

    @property
    def count(self) -> int:
        if self.cu_seqlens is not None:
            return self.cu_seqlens.numel() - 1
        return math.prod(self.shape[:-1])

    def sum(self, x: Tensor) -> Tensor:
        """[count] sums over each sequence, in a fixed order."""
        if self.cu_seqlens is None:
            return x.reshape(self.count, self.shape[-1]).sum(-1)
        # Not differences of one running sum: an infinite sequence would reach all after it.
        # Bounds out of order are refused on CPU and clamped where nothing may synchronise.
        bounds = self.cu_seqlens.clamp(0, self.shape.numel()).cummax(0).values
        wide = x.reshape(-1).double()
        return torch.segment_reduce(wide, "sum", offsets=bounds, initial=0, unsafe=True).to(x.dtype)

    def spread(self, x: Tensor) -> Tensor:
        """[count] values to the tokens of their sequence, in the token shape."""
        if self.cu_seqlens is None:
            return x.reshape(*self.shape[:-1], 1).expand(self.shape)
        positions = torch.arange(self.shape.numel(), device=x.device)
        index = torch.searchsorted(self.cu_seqlens[1:].to(torch.int64), positions, right=True)
        # Tokens beyond the last boundary belong to nothing; they read the last value and weigh 0.
        inside = positions < self.cu_seqlens[-1]
        value = x[index.clamp(max=max(self.count - 1, 0))]
        return torch.where(inside, value, torch.zeros_like(value)).reshape(self.shape)


def sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> Sequences | None:
    """The sequences of a token shape, or None where nothing says what a sequence is."""
    if cu_seqlens is not None:
        return Sequences(shape, cu_seqlens)
    return Sequences(shape) if len(shape) >= 2 else None


class Weighting(NamedTuple):
    """How per-token losses become one number: see `Objective`."""

    aggregation: str
    max_length: float = 0.0


def token_weights(
    objective: Objective | Weighting,
    mask: Tensor,
    seqs: Sequences | None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """w_t of loss = Σ w_t·ℓ_t; all zeros where the mask is. `mask` is a float tensor in the token
    shape."""
    kind = objective.aggregation
    if kind == "token":
        total = mask.sum() if normalizer is None else normalizer
        return _over(mask, total)
    if seqs is None:
        raise ValueError(
            f"cu_seqlens is needed: {type(objective).__name__} aggregates over sequences "
            f"({kind!r}), and tokens of shape {tuple(mask.shape)} do not say where they begin"
        )
    if kind == "constant":
        count = seqs.count if normalizer is None else normalizer
        return _over(mask, count * getattr(objective, "max_length"))  # noqa: B009 - not on every Objective
    lengths = seqs.sum(mask)
    count = (lengths > 0).sum() if normalizer is None else normalizer
    if kind == "sequence":
        mask = _over(mask, seqs.spread(lengths))
    return _over(mask, count)


def _over(x: Tensor, denominator: Tensor | float) -> Tensor:
    d = torch.as_tensor(denominator, dtype=x.dtype, device=x.device)
    return torch.where(d > 0, x / torch.where(d > 0, d, 1), 0)


def correction_weights(
    tis: TIS, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, seqs: Sequences | None
) -> Tensor:
    """w of `TIS`, detached, in the token shape; 1 where the mask is 0."""
    counted = mask > 0
    log_ratio = torch.where(counted, (old_logprobs - rollout_logprobs).detach(), 0.0)
    if tis.level == "sequence":
        if seqs is None:
            raise ValueError(
                "cu_seqlens is needed: correction is TIS(level='sequence') on flat tokens"
            )
        log_ratio = seqs.spread(seqs.sum(log_ratio))
    ratio = torch.exp(log_ratio)
    if tis.mode == "clip":
        ratio = ratio.clamp(max=tis.max_ratio)
    else:
        ratio = torch.where(ratio <= tis.max_ratio, ratio, 0.0)
    return torch.where(counted, ratio, 1.0)
