"""The plain-torch truth of every op: slow, short, differentiable, any dtype up to float64.

    π = softmax(z/τ),  logp = z_a/τ − logsumexp(z/τ),  H = −Σ π·log π  (a weight of 0 contributes 0)

Tests judge the kernels against these functions in float64; users may call them to check a run.
Arguments mean what they mean in the op of the same name; nothing is validated here.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import objective as _objective

MASK32 = 0xFFFFFFFF


def token_logprobs(
    logits, tokens, *, temperature=1.0, support=None, vocab_size=None, return_entropy=False
):
    """log π(token) and, on request, H, in the dtype of `logits`; both differentiable."""
    logits = logits[..., :vocab_size]
    if support is not None:
        kept = support.to_mask(logits.shape[-1]).view(logits.shape)
        logits = torch.where(kept, logits, -math.inf)
    keep = tokens != -100
    z = torch.where(keep[..., None], logits, 0.0) / _per_row(temperature, logits)
    logprob = z.log_softmax(-1)
    at = logprob.gather(-1, torch.where(keep, tokens, 0)[..., None])[..., 0]
    at = torch.where(keep, at, 0.0)
    if not return_entropy:
        return at
    return at, torch.where(keep, _entropy(logprob), 0.0)


def _entropy(logprob: Tensor) -> Tensor:
    finite = torch.where(logprob == -math.inf, 0.0, logprob)
    return -(logprob.exp() * finite).sum(-1)


def _per_row(temperature, logits: Tensor):
    return (
        temperature[..., None].to(logits.dtype) if isinstance(temperature, Tensor) else temperature
    )


def reinforce_grad(logits, tokens, advantages, *, temperature=1.0):
    """A·(π − e_a)/τ, the gradient of −A·log π(a); zero rows where the token is −100."""
    keep = tokens != -100
    z = torch.where(keep[..., None], logits, 0.0) / _per_row(temperature, logits)
    onehot = torch.zeros_like(z).scatter_(-1, torch.where(keep, tokens, 0)[..., None], 1.0)
    scale = torch.where(keep, advantages, 0.0).to(z.dtype)[..., None] / _per_row(
        temperature, logits
    )
    return scale * (z.softmax(-1) - onehot)


def policy_loss(
    logits,
    tokens,
    old_logprobs,
    advantages,
    mask=None,
    *,
    objective=None,
    temperature=1.0,
    entropy_coef=0.0,
    support=None,
    vocab_size=None,
    **options,
):
    """The loss of `pyrlk.policy_loss`, from log-probs and entropy in the dtype of `logits`."""
    counted = tokens != -100 if mask is None else (tokens != -100) & (mask != 0)
    tokens = torch.where(counted, tokens, -100)
    logprobs, entropy = token_logprobs(
        logits,
        tokens,
        temperature=temperature,
        support=support,
        vocab_size=vocab_size,
        return_entropy=True,
    )
    mask = counted if mask is None else torch.where(counted, mask, 0)
    return policy_loss_from_logprobs(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        objective=objective,
        entropy=entropy,
        entropy_coef=entropy_coef,
        **options,
    )


def linear_logits(hidden, weight, *, bias=None, softcap=None):
    """hidden @ weightᵀ (+ bias), then softcap·tanh(z / softcap)."""
    z = hidden @ weight.mT
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_token_logprobs(hidden, weight, tokens, *, bias=None, softcap=None, **options):
    """`token_logprobs` of `linear_logits`; rows of token −100 are not looked at."""
    hidden = torch.where((tokens != -100)[..., None], hidden, 0.0)
    z = linear_logits(hidden, weight, bias=bias, softcap=softcap)
    return token_logprobs(z, tokens, **options)


def linear_policy_loss(
    hidden, weight, tokens, old_logprobs, advantages, mask=None, *, bias=None, softcap=None,
    **options,
):  # fmt: skip
    """`policy_loss` of `linear_logits`; masked rows are not looked at."""
    counted = tokens != -100 if mask is None else (tokens != -100) & (mask != 0)
    hidden = torch.where(counted[..., None], hidden, 0.0)
    z = linear_logits(hidden, weight, bias=bias, softcap=softcap)
    return policy_loss(z, tokens, old_logprobs, advantages, mask, **options)


def policy_loss_from_logprobs(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    *,
    objective=None,
    entropy=None,
    entropy_coef=0.0,
    ref_logprobs=None,
    kl_coef=0.0,
    kl="k3",
    kl_importance=False,
    rollout_logprobs=None,
    correction=None,
    cu_seqlens=None,
    normalizer=None,
):
    """The loss of `pyrlk.policy_loss_from_logprobs`: objective.py, summed with its weights."""
    objective = _objective.DAPO() if objective is None else objective
    dtype, shape = logprobs.dtype, logprobs.shape
    mask = torch.ones_like(logprobs.detach()) if mask is None else mask.to(dtype)
    seqs = _objective.sequences(shape, cu_seqlens)

    def clean(x):
        return None if x is None else torch.where(mask > 0, x.detach().to(dtype), 0.0)

    if advantages.shape != shape and seqs is not None:
        advantages = seqs.spread(advantages)
    old, advantages, ref = clean(old_logprobs), clean(advantages), clean(ref_logprobs)
    logprobs = torch.where(mask > 0, logprobs, 0.0)
    if entropy is not None:
        entropy = torch.where(mask > 0, entropy, 0.0)
    behaviour = logprobs.detach() if old is None else old
    factor = None
    if correction is not None:
        factor = _objective.correction_weights(
            correction, behaviour, clean(rollout_logprobs), mask, seqs
        )
    flat = _objective.terms(
        objective, kl=kl, kl_coef=kl_coef, kl_importance=kl_importance, entropy_coef=entropy_coef
    )
    if objective.fused:
        scaled = advantages if factor is None else advantages * factor
        per_token = _objective.token_loss(logprobs, old, scaled, ref, entropy, flat)
    else:
        level = "token" if correction is None else correction.level
        batch = _objective.Batch(logprobs, behaviour, advantages, mask, seqs, factor, level)
        none = torch.zeros_like(advantages)
        per_token = objective.policy_term(batch) + _objective.token_loss(
            logprobs, old, none, ref, entropy, flat
        )
    return (_objective.token_weights(objective, mask, seqs, normalizer) * per_token).sum()


def mtp_loss(
    hidden, weight, tokens, *, depth=1, mask=None, cu_seqlens=None, kind="ce",
    teacher_hidden=None, detach_weight=True,
):  # fmt: skip
    """The loss of `pyrlk.mtp_loss`, sequence by sequence."""
    weight = weight.detach() if detach_weight else weight
    length = tokens.shape[-1]
    starts = range(0, tokens.numel() + 1, max(length, 1)) if cu_seqlens is None else cu_seqlens
    x, ids = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    m = torch.ones_like(ids, dtype=x.dtype) if mask is None else mask.reshape(-1).to(x.dtype)
    m = torch.where(ids == -100, 0, m)
    total = x.new_zeros(())
    counted = x.new_zeros(())
    bounds = [int(b) for b in starts]
    for begin, end in itertools.pairwise(bounds):
        for t in range(begin, end - depth - 1):
            to = t + depth + 1
            if m[to] == 0:
                continue
            log_q = (x[t] @ weight.mT).log_softmax(-1)
            if kind == "ce":
                loss = -log_q[ids[to]]
            else:
                teacher = teacher_hidden.reshape(x.shape)[t + depth].detach()
                loss = (log_q.exp() - (teacher @ weight.detach().mT).softmax(-1)).abs().sum() / 2
            total, counted = total + m[to] * loss, counted + m[to]
    return total / counted if counted > 0 else total


class Draw(NamedTuple):
    """What `sample` returns: the fields of pyrlk.Sample, with the kept set as a dense mask."""

    token: Tensor
    logprob: Tensor
    full_logprob: Tensor
    kept: Tensor
    mask: Tensor


def kept_mask(
    logits,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    order="top_k_first",
    ties="trim",
    allowed=None,
):
    """bool [B, V]: the prefix of the order (logit descending, id ascending) that the filters keep.

    Parameters are numbers or [B]. Masses are float64 and unnormalised, so that ties stay exact.
    top_p = 1, min_p = 0 and top_k ≤ 0 are off. ties="keep": a filter keeps all tokens that are tied
    with the last one it keeps.
    """
    z = _clean_logits(logits, allowed)
    rows, vocab = z.shape
    tau, k, p, min_p = (_row_values(x, rows) for x in (temperature, top_k, top_p, min_p))
    ranked, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    finite = (ranked > -math.inf).sum(-1)
    rank = torch.arange(vocab)
    mass = torch.exp((ranked - ranked[:, :1].clamp(min=-1e300)) / tau[:, None])
    mass = torch.where(rank < finite[:, None], mass, 0.0)

    def with_ties(count):
        if ties == "trim":
            return count
        last = ranked.gather(1, (count - 1).clamp(min=0)[:, None])
        return torch.minimum((ranked >= last).sum(-1), finite)

    keep = finite.clone()
    by_k = torch.where(k > 0, torch.minimum(k.to(torch.int64), finite), finite)
    by_k = with_ties(by_k)
    keep = torch.minimum(keep, by_k)
    pool = mass
    if order == "top_k_first":
        pool = torch.where(rank < by_k[:, None], mass, 0.0)
    enough = pool.cumsum(-1) >= p[:, None] * pool.sum(-1, keepdim=True)
    by_p = torch.where(enough.any(-1), enough.to(torch.int8).argmax(-1) + 1, vocab)
    keep = torch.where(p < 1, torch.minimum(keep, with_ties(by_p)), keep)
    floor = ranked[:, 0] + tau * torch.log(min_p)
    by_min = (ranked >= floor[:, None]).sum(-1)
    keep = torch.where(min_p > 0, torch.minimum(keep, by_min), keep)
    keep = torch.where(tau == 0, 1, keep)
    keep = torch.minimum(keep.clamp(min=1), finite)
    return torch.zeros_like(z, dtype=torch.bool).scatter_(1, ids, rank < keep[:, None])


def sample(logits, *, temperature=1.0, seed, position=0, allowed=None, **filters):
    """Draw one token a row by float64 masses and the stream of `uniform_bits`; finite τ > 0
    only."""
    z = _clean_logits(logits, allowed)
    rows = z.shape[0]
    keep = kept_mask(logits, temperature=temperature, allowed=allowed, **filters)
    tau = _row_values(temperature, rows)[:, None]
    full = (z / tau).log_softmax(-1)
    truncated = torch.where(keep, z / tau, -math.inf).log_softmax(-1)
    seeds = seed if isinstance(seed, Tensor) else seed + torch.arange(rows)
    positions = position if isinstance(position, Tensor) else torch.full((rows,), position)
    tokens = []
    for row in range(rows):
        u = uniform_bits(int(seeds[row]), int(positions[row])) / 2.0**64
        running = truncated[row].exp().cumsum(0)
        tokens.append(int((running > u * running[-1]).to(torch.int8).argmax()))
    token = torch.tensor(tokens, dtype=torch.int64)
    pick = token[:, None]
    return Draw(
        token,
        truncated.gather(1, pick)[:, 0],
        full.gather(1, pick)[:, 0],
        keep.sum(-1).to(torch.int32),
        keep,
    )


def verify_draft(
    target_logits, draft_tokens, draft_logits=None, *, temperature=1.0, seed, position=0, **filters
):
    """(tokens, accepted, logprob) of `pyrlk.verify_draft` in float64; finite τ > 0 only."""
    batch, last = target_logits.shape[0], target_logits.shape[1] - 1
    tokens = torch.full((batch, last + 1), -1)
    logprob = torch.zeros(batch, last + 1, dtype=torch.float64)
    accepted = torch.zeros(batch, dtype=torch.int32)
    tau = _row_values(temperature, batch)
    for b in range(batch):
        own = int(seed[b]) if isinstance(seed, Tensor) else seed + b
        at = int(position[b]) if isinstance(position, Tensor) else position
        rows = {
            k: v[b].expand(last + 1) if isinstance(v, Tensor) else v for k, v in filters.items()
        }
        keep = kept_mask(target_logits[b], temperature=tau[b].expand(last + 1), **rows)
        z = torch.where(keep, _clean_logits(target_logits[b]) / tau[b], -math.inf)
        target = z.softmax(-1)
        for i in range(last + 1):
            p, weights, stream = target[i], target[i], 0
            if i < last:
                x, u = int(draft_tokens[b, i]), uniform_bits(own, at + i, 1) / 2.0**64
                q = torch.zeros_like(p).index_fill(0, torch.tensor(x), 1.0)
                if draft_logits is not None:
                    q = _clean_logits(draft_logits[b, i : i + 1])[0].softmax(-1)
                if u * q[x] < p[x]:
                    tokens[b, i], logprob[b, i] = x, p[x].log()
                    accepted[b] += 1
                    continue
                left = (p - q).clamp(min=0)
                weights, stream = (left if left.sum() > 0 else p), 2
            running = weights.cumsum(0)
            u = uniform_bits(own, at + i, stream) / 2.0**64
            tokens[b, i] = int((running > u * running[-1]).to(torch.int8).argmax())
            logprob[b, i] = p[tokens[b, i]].log()
            break
    return tokens, accepted, logprob


def _clean_logits(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """NaN and what a grammar forbids count as −inf; +inf logits share the top equally, nothing else
    has mass beside them."""
    z = logits.detach().cpu().double()
    z = torch.where(z.isnan(), -math.inf, z)
    if allowed is not None:
        bits = allowed.cpu()[..., None] >> torch.arange(32, dtype=torch.int32) & 1
        z = torch.where(bits.flatten(-2)[..., : z.shape[-1]] == 1, z, -math.inf)
    top = z == math.inf
    return torch.where(top.any(-1, keepdim=True), torch.where(top, 0.0, -math.inf).to(z.dtype), z)


def _row_values(x, rows: int) -> Tensor:
    """A parameter as float64 [rows], rounded to float32 first (the contract of `pyrlk.sample`)."""
    x = x.detach().cpu() if isinstance(x, Tensor) else torch.full((rows,), x)
    return (x.to(torch.float32) if x.is_floating_point() else x).double()


def uniform_bits(seed: int, position: int, stream: int = 0) -> int:
    """64 random bits of Philox4x32-10: key = seed, counter = (position low, high, stream, 0).

    The first word is the high half. Source: Salmon et al., SC 2011.
    """
    counter = [position & MASK32, position >> 32 & MASK32, stream, 0]
    key = [seed & MASK32, seed >> 32 & MASK32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            b >> 32 ^ counter[1] ^ key[0],
            b & MASK32,
            a >> 32 ^ counter[3] ^ key[1],
            a & MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK32, (key[1] + 0xBB67AE85) & MASK32]
    return counter[0] << 32 | counter[1]
