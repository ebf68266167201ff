"""Draft verification: which tokens of a draft the target accepts, and the token after them.

    accept    draft token x at depth i iff u·q(x) < p(x)
    residual  at the first rejection, a draw from max(p − q, 0) renormalised
    bonus     after n acceptances, a draw from p
p is the target after temperature and filters, q = softmax(draft_logits). The output is distributed
as draws from p one after the other, so the log-prob of every token is the target's truncated one.
Streams (accept, residual, bonus) are keyed by (seed, position + depth).
Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _check, _op, _warm
from . import sampling as _sampling
from .support import Support


class Verified(NamedTuple):
    """What the target makes of B drafts of n tokens.

    tokens: int64 [B, n + 1], the accepted ones, then the residual or bonus token, then −1.
    accepted: int32 [B]. logprob, full_logprob: float32 [B, n + 1], of each token under the target,
    truncated and not; 0 where the token is −1 because the draft had ended. status: uint8
    [B, n + 1], bits as in Sample; a row ends, with token −1 and log-probs NaN, at a target without
    finite logits (EMPTY) or a draft without (INVALID). support: one row a token, [B·(n + 1)], empty
    where there is none; or None.
    """

    tokens: Tensor
    accepted: Tensor
    logprob: Tensor
    full_logprob: Tensor
    status: Tensor
    support: Support | None


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor = 0,
    return_support: bool = False,
) -> Verified:
    """Accept a prefix of each draft and draw the token after it, distributed as the target.

    Parameters
    ----------
    target_logits : [B, n + 1, V] float32, float16, bfloat16 (float64 on CPU: rounded to float32)
        Row i is the target's distribution of the token at position + i. V < 2^19.
    draft_tokens : int64 or int32 [B, n]
        A token that the target gives probability 0 is never accepted.
    draft_logits : [B, n, V], optional
        The draft tokens were drawn from softmax(draft_logits): temperature and filters of the draft
        are the caller's to apply. None: the draft is deterministic, q is 1 at its token.
    temperature, top_k, top_p, min_p : as in `sample`, for the target
    seed, position : int or int64 [B], as in `sample`
        position is that of the first token.
    return_support : bool

    Returns
    -------
    Verified

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU also for a draft token outside [0, V), with its index.

    Notes
    -----
    On CUDA the masses of whole rows are float32 sums, as in `sample` without `portable`.
    """
    z = _check.logits(target_logits, "target_logits").detach()
    if z.dim() != 3 or z.shape[1] < 1:
        raise ValueError(f"target_logits must have shape [B, n + 1, V], got {list(z.shape)}")
    if z.shape[-1] >= _sampling.MAX_VOCAB:
        raise ValueError(f"target_logits must have V < {_sampling.MAX_VOCAB}, got {z.shape[-1]}")
    batch, depth, vocab = z.shape[0], z.shape[1] - 1, z.shape[2]
    tokens = _check.like("draft_tokens", draft_tokens, z, "target_logits")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"draft_tokens must be int64 or int32, got {tokens.dtype}")
    _check.shaped("draft_tokens", tokens, (batch, depth))
    draft = None
    if draft_logits is not None:
        draft = _check.logits(_check.like("draft_logits", draft_logits, z), "draft_logits").detach()
        _check.shaped("draft_logits", draft, (batch, depth, vocab))
    parameters = _sampling.row_parameters(z[:, 0], temperature, top_k, top_p, min_p, seed, position)
    wanted = _check.flag("return_support", return_support)
    capacity, overflows = _sampling.room(None, z, top_k) if wanted else (0, False)
    out = _verify_draft(
        z, tokens.to(torch.int64).contiguous(), draft, *parameters, wanted, capacity, overflows
    )
    token, accepted, logprob, full_logprob, status, ids, offsets, bits = out
    support = Support(ids, offsets, bits if overflows else None) if wanted else None
    return Verified(token, accepted, logprob, full_logprob, status, support)


def _outputs(target: Tensor):
    """(tokens, accepted, logprob, full_logprob, status)."""
    rows = target.shape[:2]
    return (
        target.new_empty(rows, dtype=torch.int64),
        target.new_empty(rows[0], dtype=torch.int32),
        target.new_empty(rows, dtype=torch.float32),
        target.new_empty(rows, dtype=torch.float32),
        target.new_empty(rows, dtype=torch.uint8),
    )


def _fake(
    target, tokens, draft, tau, k, p, least, seeds, positions, wanted, capacity, overflows
):  # fmt: skip
    size = torch.library.get_ctx().new_dynamic_size()
    count = target.shape[0] * target.shape[1]
    ids, offsets = (
        target.new_empty(size, dtype=torch.int32),
        target.new_empty(count + 1 if wanted else 0, dtype=torch.int64),
    )
    return *_outputs(target), ids, offsets, _sampling.empty_bits(target, overflows)


def _cuda(
    target, tokens, draft, tau, k, p, least, seeds, positions, wanted, capacity, overflows
):  # fmt: skip
    from .triton_kernels import sample as sampler
    from .triton_kernels import speculative as kernels

    if _check.reads_values(target):
        _check_tokens(tokens, target.shape[-1])
        _sampling.check_rows(tau, p, least)
    out = token, accepted, logprob, full_logprob, status = _outputs(target)
    depths = target.shape[1]
    # contiguous: of one draft the expanded row is a view of one number
    of_rows = [
        x[:, None].expand(-1, depths).contiguous().view(-1) for x in (tau, k, p, least, seeds)
    ]
    at = positions[:, None] + torch.arange(depths, device=target.device)
    kept = torch.empty_like(token, dtype=torch.int32)
    workspace = kernels.verify_fwd(
        target, tokens, draft, *of_rows, at.view(-1), False, token, accepted, logprob, full_logprob,
        kept, status,
    )  # fmt: skip
    ids = target.new_empty(capacity, dtype=torch.int32)
    offsets = target.new_empty(token.numel() + 1 if wanted else 0, dtype=torch.int64)
    bits = _sampling.empty_bits(target, overflows)
    if wanted:
        room = bits if overflows else None
        sampler.support_fwd(target, None, workspace, kept, status, ids, offsets, room)
    return *out, ids, offsets, bits


def _check_tokens(tokens: Tensor, vocab: int) -> None:
    outside = ((tokens < 0) | (tokens >= vocab)).reshape(-1)
    if outside.any():
        _check.bad_token(int(outside.to(torch.int8).argmax()), tokens, vocab, "draft_")


@_op.op("verify_draft", fake=_fake, cuda=_cuda)
def _verify_draft(
    target: Tensor,
    tokens: Tensor,
    draft: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    support: bool,
    capacity: int,
    overflows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five tensors of Verified, and ids, offsets and bits of its support (empty without).

    capacity, overflows: as in `sample_support`; on CPU there is always room.
    """
    _check_tokens(tokens, target.shape[-1])
    out = token, accepted, logprob, full_logprob, status = _outputs(target)
    kept = _C.KeptSets(token.numel() if support else 0)
    bad = _C.verify_draft(
        _op.rows(target, target.shape[-1]),
        None if draft is None else _op.rows(draft, target.shape[-1]),
        tokens.data_ptr(),
        tokens.shape[1],
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        seed.data_ptr(),
        position.data_ptr(),
        token.data_ptr(),
        accepted.data_ptr(),
        logprob.data_ptr(),
        full_logprob.data_ptr(),
        status.data_ptr(),
        kept if support else None,
        _op.threads(),
    )
    if bad >= 0:
        _sampling.row_value_error(bad, temperature, top_p, min_p)
    ids = _warm.empty_ids(kept.total())
    offsets = target.new_empty(token.numel() + 1 if support else 0, dtype=torch.int64)
    if support:
        kept.write(
            ids.data_ptr(), ids.numel(), offsets.data_ptr(), 0, 0, status.data_ptr(), _op.threads()
        )
    return *out, ids, offsets, _sampling.empty_bits(target, False)
