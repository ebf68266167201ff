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
import sys
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "sequence-sum", "constant"]
AGGREGATIONS = ("token", "sequence", "sequence-sum", "constant")
KL_KINDS = ("k1", "k2", "k3")


def _check_number(
    owner: str, name: str, value, low: float, high: float = math.inf, *, open_low=False, finite=True
):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number, got {type(value).__name__}")
    inside = (low < value if open_low else low <= value) and value <= high
    # An integer beyond the largest double is infinite in every sense but its type.
    if inside and abs(value) > sys.float_info.max:
        inside = not finite and isinstance(value, float)
    if not inside:
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if finite and high == math.inf else "]"
        raise ValueError(f"{owner}.{name} must lie in {left}{low:g}, {high:g}{right}, got {value}")


# Field: (lower limit, upper limit, is the lower limit itself excluded).
_LIMITS = {
    "eps_low": (0.0, 1.0, False),
    "eps_high": (0.0, math.inf, False),
    "dual_clip": (1.0, math.inf, True),
    "delta": (0.0, math.inf, True),
    "max_length": (0.0, math.inf, True),
    "temperature_pos": (0.0, math.inf, True),
    "temperature_neg": (0.0, math.inf, True),
    "k_pos": (0.0, math.inf, False),
    "k_neg": (0.0, math.inf, False),
    "lambda_pos": (0.0, math.inf, True),
    "lambda_neg": (0.0, math.inf, True),
    "max_ratio": (0.0, math.inf, True),
    "beta": (0.0, math.inf, True),
    "share": (0.0, 1.0, True),
    "cov_low": (-math.inf, math.inf, False),
    "cov_high": (-math.inf, math.inf, False),
    "kl_coef": (0.0, math.inf, False),
}
# Where infinity means "no bound"; elsewhere it would make every loss NaN.
_MAY_BE_INFINITE = {"eps_high", "dual_clip", "delta", "max_ratio", "cov_low", "cov_high"}


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of the objectives. `aggregation` says how per-token losses become one number.

    "token": Σ m·ℓ / Σ m. "sequence": the mean over sequences of their token means. "sequence-sum":
    the mean over sequences of their token sums. "constant": Σ m·ℓ / (sequences · max_length). A
    sequence without tokens does not count, except in "constant", whose denominator is fixed
    beforehand.
    """

    aggregation: Aggregation = dataclasses.field(default="token", kw_only=True)

    # One launch computes ℓ and its gradient from the row alone. Otherwise `policy_term` does, on
    # log-probs, between the statistics kernel and the gradient kernel.
    fused: ClassVar[bool] = False
    # The policy term itself spans a sequence, whatever the aggregation is.
    over_sequences: ClassVar[bool] = False

    def policy_term(self, batch: Batch) -> Tensor:
        """ℓ of each token, differentiable in ``batch.logprobs``; the correction is applied in
        it."""
        raise NotImplementedError(f"{type(self).__name__} defines no policy_term")

    def __post_init__(self):
        name = type(self).__name__
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"{name}.aggregation must be one of {', '.join(AGGREGATIONS)}, "
                f"got {self.aggregation!r}"
            )
        if self.aggregation == "constant" and not hasattr(self, "max_length"):
            raise ValueError(
                f"{name}.aggregation 'constant' needs max_length, which DrGRPO has: use that, or "
                "'sequence-sum' with normalizer = sequences · max_length"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _LIMITS or (value is None and field.default is None):
                continue
            low, high, open_low = _LIMITS[field.name]
            finite = field.name not in _MAY_BE_INFINITE
            _check_number(name, field.name, value, low, high, open_low=open_low, finite=finite)


@dataclasses.dataclass(frozen=True)
class REINFORCE(Objective):
    """ℓ = −A·logp (Williams 1992). Aggregation "token"."""

    fused: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class PPO(Objective):
    """Clipped surrogate (arXiv 1707.06347); `dual_clip` c > 1 bounds it for A < 0 by −c·A
    (1912.09729)."""

    fused: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None


@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """Clipped surrogate, mean of sequence means (arXiv 2402.03300); `delta` caps the ratio."""

    fused: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = dataclasses.field(default="sequence", kw_only=True)


@dataclasses.dataclass(frozen=True)
class BNPO(Objective):
    """Clipped surrogate, mean over the tokens of the batch; `delta` caps the ratio."""

    fused: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None


@dataclasses.dataclass(frozen=True)
class DrGRPO(Objective):
    """Clipped surrogate, Σ / (sequences · max_length) (arXiv 2503.20783)."""

    fused: ClassVar[bool] = True

    max_length: float
    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = dataclasses.field(default="constant", kw_only=True)


@dataclasses.dataclass(frozen=True)
class DAPO(Objective):
    """Clip-higher surrogate, one denominator over all tokens (arXiv 2503.14476, eq. 8)."""

    fused: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.28
    delta: float | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """What an objective sees: per-token tensors of one shape, 0 where the mask is 0.

    `old` is detached; `correction` is the truncated importance weight, or None for 1, at each token
    also where `correction_level` is "sequence" and it is one weight a sequence.
    """

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    sequences: Sequences | None
    correction: Tensor | None = None
    correction_level: str = "token"

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old

    def corrected(self, loss: Tensor) -> Tensor:
        return loss if self.correction is None else loss * self.correction

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all tokens, weighted by the mask."""
        return _over((self.mask * x).sum(), self.mask.sum())

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Mean over each sequence, weighted by the mask, at each of its tokens."""
        return _sequences_of(self).spread(
            _over(self.sequence_sum(x), _sequences_of(self).sum(self.mask))
        )

    def sequence_sum(self, x: Tensor) -> Tensor:
        """[sequences] sums over each sequence, weighted by the mask."""
        return _sequences_of(self).sum(self.mask * x)


def _sequences_of(batch: Batch) -> Sequences:
    if batch.sequences is None:
        raise ValueError("cu_seqlens is needed: the objective is over sequences, tokens are flat")
    return batch.sequences


@dataclasses.dataclass(frozen=True)
class CISPO(Objective):
    """ℓ = −sg[clip(r, 1−eps_low, 1+eps_high)]·A·logp (arXiv 2506.13585).

    TRL's raw upper bound x is eps_high = x − 1.
    """

    eps_low: float = 1.0
    eps_high: float = 0.28

    def policy_term(self, batch: Batch) -> Tensor:
        ratio = _ratio(batch.log_ratio.detach(), batch.advantages)
        weight = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
        return batch.corrected(-_weighted(weight * batch.advantages, batch.logprobs))


@dataclasses.dataclass(frozen=True)
class SAPO(Objective):
    """ℓ = −(4/t)·sigmoid(t·(r−1))·A, t = temperature_pos for A > 0, else temperature_neg
    (2511.20347)."""

    temperature_pos: float = 1.0
    temperature_neg: float = 1.05
    aggregation: Aggregation = dataclasses.field(default="sequence", kw_only=True)

    def policy_term(self, batch: Batch) -> Tensor:
        ratio = _ratio(batch.log_ratio, batch.advantages)
        t = _by_side(batch.advantages > 0, self.temperature_pos, self.temperature_neg, ratio)
        gate = torch.sigmoid(t * (ratio - 1)) * 4 / t
        return batch.corrected(-gate * batch.advantages)


@dataclasses.dataclass(frozen=True)
class DPPO(Objective):
    """ℓ = −sg[min(r, max_ratio)·valid]·A·logp (arXiv 2602.04879, as in verl).

    A token is valid while its binary divergence D(old‖π) stays within eps on the side that A pushes
    to. kind "tv": π(a) − old(a) ≤ eps_high for A > 0, ≥ −eps_low otherwise. kind "kl": the KL of
    the two outcomes "a" and "not a" ≤ eps, or π(a) on the other side of old(a).
    """

    kind: Literal["tv", "kl"] = "tv"
    eps_low: float = 0.2
    eps_high: float = 0.2
    max_ratio: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in ("tv", "kl"):
            raise ValueError(f"DPPO.kind must be 'tv' or 'kl', got {self.kind!r}")

    def policy_term(self, batch: Batch) -> Tensor:
        logprobs, old = batch.logprobs.detach(), batch.old
        p, q = torch.exp(logprobs), torch.exp(old)
        if self.kind == "tv":
            up, down = p - q <= self.eps_high, p - q >= -self.eps_low
        else:
            rest = torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
            divergence = q * (old - logprobs) + (1 - q) * rest
            up = (divergence <= self.eps_high) | (p <= q)
            down = (divergence <= self.eps_low) | (p >= q)
        valid = torch.where(batch.advantages > 0, up, down)
        ratio = _ratio(logprobs - old, batch.advantages).clamp(max=self.max_ratio)
        weight = torch.where(valid, ratio, 0.0)
        return batch.corrected(-_weighted(weight * batch.advantages, batch.logprobs))


@dataclasses.dataclass(frozen=True)
class DRO(Objective):
    """ℓ = −(A·logp − (beta/2)·(logp − old)²) (arXiv 2405.19107, as in verl)."""

    beta: float

    def policy_term(self, batch: Batch) -> Tensor:
        penalty = 0.5 * self.beta * batch.log_ratio.square()
        return batch.corrected(penalty - _weighted(batch.advantages, batch.logprobs))


@dataclasses.dataclass(frozen=True)
class GSPO(Objective):
    """Clipped surrogate of the sequence ratio s = exp(mean_t(logp − old)) (arXiv 2507.18071).

    Differentiated through every token of s. `token_level` is the stop-gradient form s·r/sg[r]: the
    same value, and the gradient of each token's own term only.
    """

    over_sequences: ClassVar[bool] = True

    eps_low: float = 3e-4
    eps_high: float = 4e-4
    token_level: bool = False
    aggregation: Aggregation = dataclasses.field(default="sequence", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.token_level, bool):
            kind = type(self.token_level).__name__
            raise TypeError(f"GSPO.token_level must be True or False, got {kind}")

    def policy_term(self, batch: Batch) -> Tensor:
        log_s = batch.sequence_mean(batch.log_ratio)
        if self.token_level:
            log_s = log_s.detach() + (batch.logprobs - batch.logprobs.detach())
        ratio = _ratio(log_s, batch.advantages)
        return batch.corrected(-surrogate(ratio, batch.advantages, self.eps_low, self.eps_high))


@dataclasses.dataclass(frozen=True)
class LUSPO(Objective):
    """GSPO's sequence surrogate, summed over the tokens of a sequence (as in TRL)."""

    over_sequences: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    aggregation: Aggregation = dataclasses.field(default="sequence-sum", kw_only=True)

    def policy_term(self, batch: Batch) -> Tensor:
        ratio = _ratio(batch.sequence_mean(batch.log_ratio), batch.advantages)
        delta = math.inf if self.delta is None else self.delta
        return batch.corrected(
            -surrogate(ratio, batch.advantages, self.eps_low, self.eps_high, delta)
        )


@dataclasses.dataclass(frozen=True)
class GMPO(Objective):
    """ℓ = −Ā·exp(mean_t x_t), the geometric mean of clipped ratios (arXiv 2507.20673, as in verl).

    x_t = log r_t, clipped to [−eps_low, eps_high] on the side that A favours; Ā is the sequence's
    mean advantage. A correction enters as its geometric mean over the sequence.
    """

    over_sequences: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.2
    aggregation: Aggregation = dataclasses.field(default="sequence", kw_only=True)

    def policy_term(self, batch: Batch) -> Tensor:
        sign, x = torch.sign(batch.advantages), batch.log_ratio
        bounded = x.clamp(-self.eps_low, self.eps_high)
        x = torch.where(sign * x <= sign * bounded, x, bounded)
        x = torch.where(sign == 0, 0.0, x)
        loss = -batch.sequence_mean(batch.advantages) * torch.exp(batch.sequence_mean(x))
        if batch.correction is None:
            return loss
        log_weight = torch.log(batch.correction + 1e-10)
        return loss * torch.exp(batch.sequence_mean(log_weight))


@dataclasses.dataclass(frozen=True)
class VESPO(Objective):
    """ℓ = −sg[φ(w)]·A·logp, φ(w) = exp(λ)·w^k·exp(−λ·w), w = exp(Σ_t(logp − old)) (as in TRL).

    (k, λ) are (k_pos, lambda_pos) for A ≥ 0, else (k_neg, lambda_neg). A correction multiplies w,
    not the loss. As in TRL, log-ratios are clamped to ±20 a token and log w to [log 1e-8, 20].
    """

    over_sequences: ClassVar[bool] = True

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def policy_term(self, batch: Batch) -> Tensor:
        lowest = math.log(1e-8)
        with torch.no_grad():
            log_w = batch.sequence_sum(batch.log_ratio.detach().clamp(-20.0, 20.0))
            if batch.correction is not None:
                log_weight = torch.log(batch.correction).clamp(lowest, 20.0)
                if batch.correction_level == "sequence":
                    # One weight a sequence enters once, however many tokens repeat it.
                    lengths = _sequences_of(batch).sum(batch.mask)
                    log_w = log_w + _over(batch.sequence_sum(log_weight), lengths)
                else:
                    log_w = log_w + batch.sequence_sum(log_weight)
            log_w = _sequences_of(batch).spread(log_w.clamp(lowest, 20.0))
            up = batch.advantages >= 0
            k = _by_side(up, self.k_pos, self.k_neg, log_w)
            decay = _by_side(up, self.lambda_pos, self.lambda_neg, log_w)
            phi = torch.exp(decay + k * log_w - decay * torch.exp(log_w))
        return -_weighted(phi * batch.advantages, batch.logprobs)


@dataclasses.dataclass(frozen=True)
class ClipCov(Objective):
    """Clipped surrogate without some tokens of high covariance (arXiv 2505.22617, as in verl).

    cov = (A − mean A)·(logp − mean logp). Of the tokens with cov_low < cov < cov_high that the clip
    did not touch, max(1, floor(share·tokens)), chosen at random by `seed`, get loss 0.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.cov_low < self.cov_high:
            raise ValueError(
                f"ClipCov.cov_low must be less than cov_high, got {self.cov_low:g} and "
                f"{self.cov_high:g}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"ClipCov.seed must be an integer, got {type(self.seed).__name__}")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"ClipCov.seed must fit in 64 bits, got {self.seed}")

    def policy_term(self, batch: Batch) -> Tensor:
        ratio = _ratio(batch.log_ratio, batch.advantages)
        with torch.no_grad():
            bounded = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
            clipped = bounded * batch.advantages < ratio * batch.advantages
            cov = _covariance(batch)
            eligible = (batch.mask > 0) & ~clipped & (cov > self.cov_low) & (cov < self.cov_high)
            key = torch.where(eligible, _lots(self.seed, cov), torch.iinfo(torch.int64).max)
            dropped = _first(key, batch.mask, self.share) & eligible
        loss = -surrogate(ratio, batch.advantages, self.eps_low, self.eps_high)
        return batch.corrected(torch.where(dropped, 0.0, loss))


@dataclasses.dataclass(frozen=True)
class KLCov(Objective):
    """ℓ = −r·A, plus kl_coef·|log r| where the covariance is highest (arXiv 2505.22617, as in
    verl).

    The highest max(1, floor(share·tokens)) values of cov = (A − mean A)·(logp − mean logp).
    """

    share: float = 2e-4
    kl_coef: float = 1.0

    def policy_term(self, batch: Batch) -> Tensor:
        loss = -_ratio(batch.log_ratio, batch.advantages) * batch.advantages
        with torch.no_grad():
            key = torch.where(batch.mask > 0, -_covariance(batch), math.inf)
            highest = _first(key, batch.mask, self.share) & (batch.mask > 0)
        return batch.corrected(
            loss + torch.where(highest, self.kl_coef * batch.log_ratio.abs(), 0.0)
        )


def _ratio(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """exp(log_ratio), and 1 where A = 0: there the policy term is 0, whatever the ratio is.

    A ratio that overflows is an infinite constant: a clipped term has slope 0 there, not 0·∞.
    """
    x = torch.where(advantages != 0, log_ratio, 0.0)
    over = x > math.log(torch.finfo(x.dtype).max)
    return torch.where(over, math.inf, torch.exp(torch.where(over, 0.0, x)))


def _weighted(weight: Tensor, logprobs: Tensor) -> Tensor:
    """weight·logp, and 0 where the weight is 0: a token there may have probability 0."""
    return weight * torch.where(weight != 0, logprobs, 0.0)


def _by_side(up: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    """`positive` where `up`, else `negative`, in the dtype of `like` (torch.where of two numbers
    is float32 beside float64 tensors)."""
    return torch.full_like(like, negative).masked_fill(up, positive)


def surrogate(
    ratio: Tensor,
    advantages: Tensor,
    eps_low: float,
    eps_high: float,
    delta: float = math.inf,
    dual_clip: float = math.inf,
) -> Tensor:
    """min(min(r, delta)·A, clip(r, 1−eps_low, 1+eps_high)·A), at least dual_clip·A where A < 0."""
    unclipped = ratio.clamp(max=delta) * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    least = torch.where(unclipped <= clipped, unclipped, clipped)
    if dual_clip == math.inf:
        return least
    bound = dual_clip * advantages
    return torch.where((advantages < 0) & (least < bound), bound, least)


def _covariance(batch: Batch) -> Tensor:
    logprobs = batch.logprobs.detach()
    centred = logprobs - batch.mean(logprobs)
    return (batch.advantages - batch.mean(batch.advantages)) * centred


def _lots(seed: int, like: Tensor) -> Tensor:
    """A random number in [0, 2^62) for each place: splitmix64, the same on every device.

    Not torch.rand with a generator: a compiler and a CUDA graph refuse one that is new.
    """
    x = torch.arange(1, like.numel() + 1, device=like.device) * _signed(0x9E3779B97F4A7C15)
    x = x + _signed(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return (x ^ (x >> 31 & (1 << 33) - 1)).bitwise_and((1 << 62) - 1).view(like.shape)


def _signed(x: int) -> int:
    """The int64 of the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _first(key: Tensor, mask: Tensor, share: float) -> Tensor:
    """True at the max(1, floor(share·Σ mask)) lowest keys, ties by index; without a host sync."""
    flat = key.reshape(-1)
    rank = torch.empty_like(flat, dtype=torch.int64)
    order = flat.argsort(stable=True)
    rank[order] = torch.arange(flat.numel(), device=flat.device)
    count = (share * mask.sum().double()).floor().clamp(min=1)
    return (rank < count).reshape(key.shape)


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
        _check_number("TIS", "max_ratio", self.max_ratio, 0.0, open_low=True, finite=False)


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
    clipped = objective.fused and not isinstance(objective, REINFORCE)
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
    if t.clipped:
        ratio = _ratio(log_ratio, advantages)
        loss = -surrogate(ratio, advantages, t.eps_low, t.eps_high, t.delta, t.dual_clip)
    else:
        loss = -_weighted(advantages, logprobs)
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
        bounds = self.cu_seqlens.clamp(0, math.prod(self.shape)).cummax(0).values
        wide = x.reshape(-1).double()
        return torch.segment_reduce(wide, "sum", offsets=bounds, initial=0, unsafe=True).to(x.dtype)

    def spread(self, x: Tensor) -> Tensor:
        """[count] values to the tokens of their sequence, in the token shape."""
        if self.cu_seqlens is None:
            return x.reshape(*self.shape[:-1], 1).expand(self.shape)
        positions = torch.arange(math.prod(self.shape), device=x.device)
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
    if isinstance(denominator, Tensor):
        d = denominator.to(x)
    else:  # not as_tensor, which would copy it to a device and wait
        d = torch.full((), denominator, dtype=x.dtype, device=x.device)
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
