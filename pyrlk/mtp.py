"""The loss of a multi-token-prediction head: token t+k+1 from the state at t, chunk by chunk.

    q_t = softmax(hidden_t @ weightᵀ), depth k       p_{t+k} the same of the trunk's own states
    "ce"   ℓ_t = −log q_t(token_{t+k+1})             ∂ℓ/∂z = q − e
    "tv"   ℓ_t = ½·Σ|q_t − p_{t+k}|                  ∂ℓ/∂z = q·(s − Σ q·s),  s = ½·sign(q − p)
    loss   Σ m·ℓ / Σ m,  m the weight of the token that is predicted

With `group` each rank has columns of z. "ce": one all-gather of (m, Σ2^y, argmax, z_a) a row. "tv":
one of (m, Σ2^y) of q and of p, and one of Σ|q − p| and Σ q·s. The products are computed again after
it, and ∂hidden is summed over the ranks (parallel/vocab.py).

A rejection sampler accepts a draft with probability 1 − TV. The logits [T, V] never exist; nothing
of size [T, H] is shifted, only indices are; no pair (t, t+k+1) crosses a sequence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, _head, _op
from . import objective as _objective
from ._head import Head, Settings
from ._rows import Actions, Rows, check_tokens
from .logprob import gradient, statistics
from .parallel import vocab as _vocab
from .parallel.vocab import Shard

_KINDS = ("ce", "tv")


class MTPStats(NamedTuple):
    """By-products, 0-d int64 on the device: how many tokens were predicted, how many of them were
    the draft's most likely one. matches / tokens estimates the share that greedy decoding accepts.
    """

    tokens: Tensor
    matches: Tensor


def mtp_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    depth: int = 1,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kind: str = "ce",
    teacher_hidden: Tensor | None = None,
    detach_weight: bool = True,
    group: Any = None,
    chunk: int | None = None,
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, MTPStats)
    """Trains the depth-k prediction head of a model on its own tokens or its own distribution.

    The gradients by hidden and weight are computed in the forward pass. To let the prediction
    block alone learn, detach the trunk's states where they enter it; the head's weight is detached
    here, unless `detach_weight` is False.

    Parameters
    ----------
    hidden : [B, L, H] or [T, H] float32, float16, bfloat16 (float64 on CPU)
        States of the depth-k block. Row t predicts tokens[t + depth + 1].
    weight : [V, H] in the dtype of hidden
    tokens : [B, L] or [T] int64 or int32; −100 is not predicted
    depth : int ≥ 1
    mask : like tokens, bool, int or float weight ≥ 0, optional
        Of the token that is predicted. Where it is 0, the states of the row that would predict it
        are not read.
    cu_seqlens : [sequences + 1] int32 or int64, optional
        Bounds of packed sequences, 0 … T, for tokens of shape [T] or [1, T].
    kind : "ce" or "tv"
        Cross-entropy of the tokens, or total variation to the trunk's distribution of them.
    teacher_hidden : like hidden, for "tv"
        The trunk's last states. Row t + depth is the trunk's for that same token; no gradient.
    detach_weight : bool
        False: weight learns too, through the draft's distribution, also into ``main_grad``.
    group : torch.distributed.ProcessGroup, optional
        The vocabulary is sharded over its ranks, as in `linear_token_logprobs`: weight
        [V_local, H]; all else is the same on every rank, and so is ∂hidden, summed over them. A
        DTensor weight sharded on the vocabulary names its own group.
    chunk : int ≥ 1, optional
        As in `linear_token_logprobs`.
    return_stats : bool

    Returns
    -------
    loss : 0-d float32 (float64 for float64), 0 where nothing is predicted; or (loss, MTPStats)

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU also for values inside tensors.
    RuntimeError
        On a second backward through the same loss, and on a double backward.

    Notes
    -----
    Source of the heads: DeepSeek-V3, arXiv 2412.19437, section 2.2; of 1 − TV: Leviathan et al.,
    arXiv 2211.17192. Rows that predict nothing are dropped first, with one synchronisation on CUDA.
    """
    weight, shard = _vocab.find("weight", weight, 0, group)
    hidden = _vocab.replicated("hidden", hidden)
    settings = _head.checked(hidden, weight, None, None, None, chunk, shard.sharded)
    shape = hidden.shape[:-1]
    if len(shape) < 1:
        raise ValueError(f"hidden must have shape [B, L, H] or [T, H], got {list(hidden.shape)}")
    tokens = _check.tokens(tokens, hidden, shape, "hidden")
    if not 1 <= _check.integer("depth", depth) < 1 << 31:
        raise ValueError(f"depth must be ≥ 1, got {depth}")
    mask = None if mask is None else _check.mask(mask, hidden, shape, "hidden").detach()
    cu_seqlens = _check.cu_seqlens(cu_seqlens, hidden, shape, "hidden")
    _check.choice("kind", kind, _KINDS)
    if (teacher_hidden is not None) != (kind == "tv"):
        given = "missing" if teacher_hidden is None else "given"
        raise ValueError(f'teacher_hidden belongs to kind "tv": it is {given} for {kind!r}')
    if teacher_hidden is not None:
        teacher_hidden = _vocab.replicated("teacher_hidden", teacher_hidden)
        teacher_hidden = _check.like("teacher_hidden", teacher_hidden, hidden, "hidden").detach()
        if teacher_hidden.dtype != hidden.dtype:
            raise TypeError(
                f"teacher_hidden must be {hidden.dtype} like hidden, got {teacher_hidden.dtype}"
            )
        _check.shaped("teacher_hidden", teacher_hidden, hidden.shape)
    if _check.flag("detach_weight", detach_weight):
        weight = weight.detach()
    _check.flag("return_stats", return_stats)

    wants = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)] + [False]
    loss, stats, *grads = _mtp_loss(
        hidden.detach(), weight.detach(), teacher_hidden, tokens, mask, cu_seqlens, depth,
        *shard, *settings, return_stats, wants,
    )  # fmt: skip
    if any(wants):
        loss = _head.attach_grads(hidden, weight, None, *grads, loss)
    return (loss, MTPStats(*stats.unbind())) if return_stats else loss


class _Pairs(NamedTuple):
    """What row t predicts; all [T]. `weight` is 0, and `target` −100, where it is nothing."""

    target: Tensor
    weight: Tensor
    active: Tensor


def _pairs(hidden: Tensor, tokens: Tensor, mask, cu, depth: int) -> _Pairs:
    shape, count, step = tokens.shape, tokens.numel(), depth + 1
    if _check.reads_values(hidden):
        _check.cu_seqlens_values(cu, count)
        _check.mask_values(mask, tokens != -100)
    position = torch.arange(count, device=tokens.device)
    source = (position + step).clamp(max=max(count - 1, 0))
    if cu is None:
        inside = position % shape[-1] < shape[-1] - step if count else position > 0
    else:
        sequence = torch.searchsorted(cu[1:].to(torch.int64), position, right=True)
        inside = (sequence == sequence[source]) & (sequence < cu.numel() - 1)
        inside = inside & (position + step < count)
    flat = tokens.reshape(-1).to(torch.int64)
    target = torch.where(inside, flat[source], -100)
    active = target != -100
    dtype = _op.compute_dtype(hidden)
    weight = active.to(dtype)
    if mask is not None:
        m = mask.reshape(-1)[source].to(dtype)
        active = active & (m != 0)
        weight = torch.where(active, m, 0)
    return _Pairs(
        torch.where(active, target, -100), _objective.token_weights(_TOKEN, weight, None), active
    )


_TOKEN = _objective.Weighting("token")


def _shifted(active: Tensor, by: int) -> Tensor:
    """True at t + by where `active` is True at t."""
    out = torch.zeros_like(active)
    if by < active.numel():
        out[by:] = active[: active.numel() - by]
    return out


def _mtp_fake(hidden, weight, teacher, tokens, mask, cu, depth, shard, settings, want_stats, wants):
    loss = hidden.new_empty((), dtype=_op.compute_dtype(hidden))
    stats = hidden.new_empty(2 if want_stats else 0, dtype=torch.int64)
    return loss, stats, *_head.grads_fake(hidden, weight, wants), torch.empty_like(loss)


@_op.op("mtp_loss", fake=_mtp_fake)
def _mtp_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    depth: int,
    shard: Shard,
    settings: Settings,
    want_stats: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, tokens and matches, ∂hidden, ∂weight, ∂bias (empty), the unit of the three)."""
    with _head.plain(hidden):
        vocab, flat = weight.shape[0], tokens.reshape(-1)
        pairs = _pairs(hidden, tokens, mask, cu_seqlens, depth)
        predicted = _shifted(pairs.active, depth + 1)
        if not shard.sharded:
            check_tokens(flat, None, predicted, vocab)
        head = Head(hidden, weight, None, pairs.active, vocab, settings, wants)
        trunk = None
        if teacher is not None:
            trunk = _trunk(
                teacher, weight, pairs.active, depth, settings._replace(chunk=head.chunk)
            )
        unit = _head.float16_unit(pairs.weight, hidden.dtype)
        target, w = pairs.target, pairs.weight
        if head.index is not None:
            target, w = target[head.index], w[head.index]
        rows = Rows(target, None, None, 1.0, None, 0 if shard.sharded else vocab).flat(w.dtype)
        if shard.sharded:
            common = torch.where(predicted, flat, -100)
            losses, matches = _sharded(head, trunk, rows, w / unit, common, shard, want_stats)
        else:
            losses, matches = _whole(head, trunk, rows, w / unit, want_stats)
        loss = torch.where(w != 0, w * losses, 0).double().sum().to(w.dtype)
        stats = torch.stack([pairs.active.sum(), matches]) if want_stats else matches.new_empty(0)
        dhidden, dweight, dbias = _head.grads(head, hidden, wants)
        if shard.sharded and wants[0]:
            dhidden = _vocab.summed(dhidden, shard)
        return loss, stats, dhidden, dweight, dbias, unit


def _whole(
    head: Head, trunk: Head | None, at: Actions, w: Tensor, want_stats: bool
) -> tuple[Tensor, Tensor]:
    """(ℓ of the rows, how many of them predict their token first); the head has its gradients."""
    losses = torch.zeros_like(w)
    matches = torch.zeros((), dtype=torch.int64, device=w.device)
    for part in head.parts():
        z = head.logits(part)
        if want_stats:
            matches += (z.argmax(-1) == at.tokens[part]).sum()
        if trunk is None:
            _cross_entropy(z, at.take(part), w[part], losses[part], head.slopes(part))
        else:
            _total_variation(z, trunk.logits(part), w[part], losses[part], head.slopes(part))
        head.backward(part)
    return losses, matches


def _sharded(
    head: Head,
    trunk: Head | None,
    at: Actions,
    w: Tensor,
    common: Tensor,
    shard: Shard,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    """As `_whole`, where the head has columns of the vocabulary. `common` [T] must be so."""
    width = head.weight.shape[0]
    top = w.new_zeros(head.count, 4)  # of tv the sums of this rank, then maximum and argmax

    def statistics_of(head: Head, at: Actions, best: Tensor | None) -> Tensor:
        """(m, Σ 2^y, Σ 2^y·y, z_a) of this rank's columns."""
        stats = w.new_empty(head.count, 4)
        logprob = w.new_empty(head.chunk)

        def local(at: Actions, out: Tensor) -> None:
            for part in head.parts():
                z = head.logits(part)
                statistics(z, at.take(part), logprob[: part.stop - part.start], None, out[part])
                if best is not None:
                    best[part] = z.argmax(-1)

        _vocab.statistics_of(local, at, stats)
        return stats

    def fill(first: int, out: Tensor) -> None:
        here = _vocab.columns(at, first, width)
        best = top[:, 3].zero_()
        stats = statistics_of(head, here, best if want_stats else None)
        top[:, 2] = stats[:, 0]
        best.add_(first)
        if trunk is None:
            stats[:, 2] = best
        else:
            stats[:, 2:] = statistics_of(trunk, here, None)[:, :2]
        out.zero_()
        out[: head.count] = stats

    # One row a token, of which the head may have dropped some: all ranks the same.
    parts, layout, apart = _vocab.meet(fill, "tokens", common, 0, shard, width, w)
    check_tokens(common, None, common != -100, layout.total)
    parts = parts[:, : head.count].double()
    m, s, _, z = _vocab.combine(parts * parts.new_tensor([1, 1, 0, 1]), _LOG2E)
    s = torch.where(m == -math.inf, math.nan, s)
    if apart is not None:
        s = torch.where(apart | (at.tokens >= layout.total), math.nan, s)
    if trunk is None:
        owned = _vocab.columns(at, layout.first, width)
        whole = torch.stack([m, s, torch.zeros_like(m), z], -1).to(w.dtype)
        for part in head.parts() if any(head.wants) else ():
            z_part = head.logits(part)
            gradient(z_part, owned.take(part), whole[part], -w[part], None, head.slopes(part))
            head.backward(part)
        return (s.log() - (z - m)).to(w.dtype), _matches(parts[..., 0], parts[..., 2], at.tokens)

    nothing = torch.zeros_like(parts[..., :2])
    m_p, s_p, *_ = _vocab.combine(torch.cat([parts[..., 2:], nothing], -1), _LOG2E)
    scales = [x.to(w.dtype) for x in (m, s, m_p, torch.where(m_p == -math.inf, math.nan, s_p))]
    for part in head.parts():
        for rows, q, p in _shares(head.logits(part), trunk.logits(part), part, scales):
            gap = q - p
            top[rows, 0] = 0.5 * gap.abs().sum(-1)
            top[rows, 1] = 0.5 * gap.sign_().mul_(q).sum(-1)
    every = _vocab.gathered(top, _vocab.process_group(shard))
    losses, lean = (_vocab.in_order(x.double()).to(w.dtype) for x in every[..., :2].unbind(-1))
    for part in head.parts() if any(head.wants) else ():
        slopes = head.slopes(part)
        assert slopes is not None
        for rows, q, p in _shares(head.logits(part), trunk.logits(part), part, scales):
            slope = (q - p).sign_().mul_(0.5).sub_(lean[rows, None]).mul_(q).mul_(w[rows, None])
            to = slopes[rows.start - part.start : rows.stop - part.start]
            to.copy_(torch.where(w[rows, None] != 0, slope, 0))
        head.backward(part)
    return losses, _matches(every[..., 2], every[..., 3], at.tokens)


_LOG2E = math.log2(math.e)


def _matches(maxima: Tensor, best: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens are the likeliest of their row, as argmax has it: the first maximum."""
    where = maxima.argmax(0, keepdim=True)
    return (best.gather(0, where)[0].long() == tokens).sum()


def _shares(z: Tensor, other: Tensor, part: slice, scales: list[Tensor]):
    """(rows of all, q, p) of this rank's columns, a few rows at a time; scales: m, s of each."""
    size = _head.blocks(z)
    for start in range(0, z.shape[0], size):
        rows = slice(part.start + start, min(part.start + start + size, part.stop))
        m, s, m_p, s_p = (x[rows, None] for x in scales)
        here = slice(start, start + rows.stop - rows.start)
        q = (z[here].to(m.dtype) - m).exp_().div_(s)
        yield rows, q, (other[here].to(m.dtype) - m_p).exp_().div_(s_p)


def _trunk(teacher: Tensor, weight: Tensor, active: Tensor, depth: int, settings) -> Head:
    """The head on the trunk's rows t + depth, in the order of the draft's rows t."""
    later = _shifted(active, depth)
    head = Head(teacher, weight, None, later, weight.shape[0], settings, (False,) * 3)
    if head.index is None:  # no row was dropped, as under capture: then all rows move
        head.hidden = head.hidden.roll(-depth, 0)
    return head


def _cross_entropy(z: Tensor, at: Actions, w: Tensor, losses: Tensor, grad: Tensor | None) -> None:
    stats = z.new_empty(z.shape[0], 4, dtype=w.dtype)
    logprob = torch.empty_like(losses)
    statistics(z, at, logprob, None, stats)
    torch.neg(logprob, out=losses)
    if grad is not None:
        gradient(z, at, stats, -w, None, grad)


def _total_variation(
    draft: Tensor, trunk: Tensor, w: Tensor, losses: Tensor, grad: Tensor | None
) -> None:
    """A few rows at a time: their float32 copies are small beside the chunk."""
    size = _head.blocks(draft)
    for start in range(0, draft.shape[0], size):
        rows = slice(start, start + size)
        q = draft[rows].to(w.dtype).softmax(-1)
        gap = trunk[rows].to(w.dtype).softmax(-1).sub_(q).neg_()
        losses[rows] = 0.5 * gap.abs().sum(-1)
        if grad is None:
            continue
        s = gap.sign_().mul_(0.5)
        slope = s.sub_((q * s).sum(-1, keepdim=True)).mul_(q).mul_(w[rows, None])
        grad[rows] = torch.where(w[rows, None] != 0, slope, 0)
