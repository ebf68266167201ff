"""Sampling with temperature, top-k, top-p and min-p, and the exact log-probs of what was drawn.

Order of a row: (logit descending, id ascending). A kept set is a prefix of it:
    top-k   the first min(k, finite logits)
    top-p   the shortest prefix whose mass reaches p of the mass it applies to
    min-p   logit ≥ max + τ·ln(min_p)
Draw: the first kept id, ascending, whose running mass exceeds u·Z, u = 64 Philox bits of (seed,
position). A row's result depends on its logits, parameters, seed and position alone.
"""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _check, _op, _warm
from .parallel import sampling as _sharded
from .parallel import vocab as _vocab
from .parallel.rows import How, Parameters
from .support import Support

NAN, INF, EMPTY, INVALID, OVERFLOW = 1, 2, 4, 8, 16
_ORDERS = ("top_k_first", "joint")
_TIES = ("trim", "keep")
MAX_VOCAB = 1 << 19


class Sample(NamedTuple):
    """One draw a row. `status` is a bit set: NAN=1, INF=2, EMPTY=4, INVALID=8, OVERFLOW=16.

    token: int64, −1 for EMPTY and INVALID. logprob: float32, under the truncated, renormalised
    distribution that was drawn from. full_logprob: float32, under softmax(logits / temperature).
    kept: int32, size of the kept set. support: the kept ids, or None.
    """

    token: Tensor
    logprob: Tensor
    full_logprob: Tensor
    kept: Tensor
    status: Tensor
    support: Support | None


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor = 0,
    order: str = "top_k_first",
    ties: str = "trim",
    allowed: Tensor | None = None,
    return_support: bool = False,
    support_capacity: int | None = None,
    portable: bool = False,
    group: object | None = None,
) -> Sample:
    """Draw one token a row, with both log-probs of the draw and, on request, the kept set.

    Parameters
    ----------
    logits : [B, V] float32, float16, bfloat16 (float64 on CPU: rounded to float32), V < 2^19
        Any leading shape counts as B rows. −inf is probability 0; NaN counts as −inf.
    temperature : number ≥ 0 or float [B]; 0 is argmax, lowest id among ties
    top_k : int or integer [B]; ≤ 0 is off
    top_p : number in [0, 1] or float [B]; 1 is off, 0 keeps one token
    min_p : number in [0, 1] or float [B]; 0 is off
    seed : int or int64 [B]
        An int s is shorthand for s + arange(B).
    position : int or int64 [B]
        With the seed it names the draw: equal (logits, parameters, seed, position), equal token.
    order : "top_k_first" or "joint"
        top-p applies to the mass that top-k left, or to the whole softmax.
    ties : "trim" or "keep"
        A filter that ends among equal logits keeps the lowest ids of them, or all of them (what
        Hugging Face and FlashInfer keep).
    allowed : int32 [B, ceil(V/32)], optional
        A grammar mask: bit i of word w is token 32·w + i (xgrammar, llguidance). A token whose bit
        is 0 has the logit −inf: every result is that of the logits so masked.
    return_support : bool
    support_capacity : int, optional
        Size of the id buffer. A row that does not fit gets status OVERFLOW, and its kept set as
        bits (see `Support`); losses and log-probs on CUDA take such a support after `trim()`.
        Default on CUDA: B·top_k for a host top_k > 0, else B·4096; on CPU: the exact size.
    portable : bool
        Choose by exact integer masses: token and kept set are the same bits on every device. On CPU
        they always are.
    group : torch.distributed.ProcessGroup, optional
        The vocabulary is sharded over its ranks: logits [B, V_local] are the next columns in rank
        order; all else, `allowed` too, is of the whole vocabulary and the same on every rank. Token
        and kept set are those of the whole rows in every bit (on CUDA: of `portable`), also on
        every rank. A DTensor sharded on the vocabulary names its own group. Not under
        torch.compile; on CUDA return_support reads its size on the host.

    Returns
    -------
    Sample

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A bad value inside a parameter tensor is a ValueError with its index on
        CPU; on CUDA that row gets status INVALID, or under PYRLK_CHECK=1 the same error.
    """
    z, shard = _vocab.find("logits", logits, -1, group)
    z = _check.logits(z, sharded=shard.sharded).detach()
    if z.shape[-1] >= MAX_VOCAB:
        raise ValueError(f"logits must have V < {MAX_VOCAB}, got {z.shape[-1]}")
    lead, vocab = z.shape[:-1], z.shape[-1]
    parameters = row_parameters(z, temperature, top_k, top_p, min_p, seed, position)
    joint = _check.choice("order", order, _ORDERS) == "joint"
    keep_ties = _check.choice("ties", ties, _TIES) == "keep"
    exact = _check.flag("portable", portable)
    if shard.sharded:
        _check.flag("return_support", return_support)
        if support_capacity is not None:
            raise ValueError("support_capacity must be None with group: the size is exact")
        if z.is_cpu:
            check_rows(parameters[0], *parameters[2:4])
        words = _allowed_words(allowed, z, None)
        rows, how = Parameters(*parameters), How(joint, keep_ties, return_support)
        drawn = _sharded.sample(z, rows, how, words, shard)
        token, logprob, full, kept, status = (x.view(lead) for x in drawn[:5])
        return Sample(token, logprob, full, kept, status, drawn[5])
    words = _allowed_words(allowed, z, vocab)
    arguments = (z, *parameters, words, joint, keep_ties, exact)
    if not _check.flag("return_support", return_support):
        room(support_capacity, z, top_k, keep_ties)
        token, logprob, full, kept, status = _sample(*arguments)
        support = None
    else:
        capacity, overflows = room(support_capacity, z, top_k, keep_ties)
        out = _sample_support(*arguments, capacity, overflows)
        token, logprob, full, kept, status, ids, offsets, bits = out
        support = Support(ids, offsets, bits if overflows else None)
    token, logprob, full, kept, status = (
        x.view(lead) for x in (token, logprob, full, kept, status)
    )
    return Sample(token, logprob, full, kept, status, support)


def replay(logits: Tensor, **parameters) -> Sample:
    """The draw that `sample` made from these logits, again: it is a function of its arguments.

    A row's result depends on its logits, its parameters, its seed and its position alone, so that
    any subset of rows replays, in any order and any batch, given their seeds as a tensor.

    Parameters
    ----------
    logits, **parameters
        What `sample` was given.

    Returns
    -------
    Sample
        Equal in every bit on the device that drew; with `portable=True` the token and the kept set
        are equal on any device.

    Raises
    ------
    TypeError, ValueError
        As `sample`.
    """
    return sample(logits, **parameters)


# help() and inspect name the parameters, and not `**parameters`.
replay.__signature__ = inspect.signature(sample)  # type: ignore[attr-defined]


def room(capacity, z: Tensor, top_k, keep_ties: bool = False) -> tuple[int, bool]:
    """(size of the id buffer, whether it may overflow); −1 is the exact size, which only the CPU
    knows beforehand."""
    count, vocab = math.prod(z.shape[:-1]), z.shape[-1]
    widest = top_k if isinstance(top_k, int) and 0 < top_k < vocab else 0
    if capacity is None:
        capacity = -1 if z.device.type == "cpu" else count * (widest or 4096)
    elif _check.integer("support_capacity", capacity) < 0:
        raise ValueError(f"support_capacity must be ≥ 0, got {capacity}")
    return capacity, 0 <= capacity < count * (widest if widest and not keep_ties else vocab)


def _allowed_words(allowed, z: Tensor, vocab: int | None) -> Tensor | None:
    """[B, words]; how many words is not known yet where `vocab` is None."""
    if allowed is None:
        return None
    allowed = _check.like("allowed", allowed, z)
    if allowed.dtype != torch.int32:
        raise TypeError(f"allowed must be int32 (a bit a token), got {allowed.dtype}")
    count = math.prod(z.shape[:-1])
    words = allowed.shape[-1] if vocab is None and allowed.dim() else -(-(vocab or 0) // 32)
    if allowed.shape not in ((*z.shape[:-1], words), (count, words)):
        raise ValueError(
            f"allowed must have shape [{count}, {words}] for V = {vocab}, got {list(allowed.shape)}"
        )
    return allowed.reshape(count, words).contiguous()


def row_parameters(
    z: Tensor, temperature, top_k, top_p, min_p, seed, position
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The parameters of the rows of z as the ops take them: float32 and int64 tensors [B]."""
    tau = _float_rows("temperature", temperature, z, 0.0)
    k = _int_rows("top_k", top_k, z)
    p = _float_rows("top_p", top_p, z, 0.0, 1.0)
    least = _float_rows("min_p", min_p, z, 0.0, 1.0)
    seeds = _int_rows("seed", seed, z)
    if not isinstance(seed, Tensor):
        seeds = seeds + torch.arange(seeds.numel(), device=z.device)
    return tau, k, p, least, seeds, _int_rows("position", position, z)


def _row_tensor(name: str, x: Tensor, z: Tensor) -> Tensor:
    x = _check.like(name, x, z)
    count = math.prod(z.shape[:-1])
    if x.shape != z.shape[:-1] and x.shape != (count,):
        raise ValueError(f"{name} must be a number or have shape [{count}], got {list(x.shape)}")
    return x.reshape(-1)


def _float_rows(name: str, x, z: Tensor, low: float, high: float = float("inf")) -> Tensor:
    if isinstance(x, Tensor):
        x = _row_tensor(name, x, z)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {x.dtype}")
        return x.detach().to(torch.float32).contiguous()
    value = _check.number(name, x, low, high)
    if value > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be representable in float32, got {value}")
    return torch.full((math.prod(z.shape[:-1]),), value, dtype=torch.float32, device=z.device)


def _int_rows(name: str, x, z: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        x = _row_tensor(name, x, z)
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, got {x.dtype}")
        return x.to(torch.int64).contiguous()
    value = _check.integer(name, x)
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    signed = value - (1 << 64) if value >= 1 << 63 else value
    return torch.full((math.prod(z.shape[:-1]),), signed, dtype=torch.int64, device=z.device)


def _outputs(logits: Tensor):
    count = math.prod(logits.shape[:-1])
    return tuple(
        logits.new_empty(count, dtype=dtype)
        for dtype in (torch.int64, torch.float32, torch.float32, torch.int32, torch.uint8)
    )


def check_rows(tau, p, least) -> None:
    """What the CPU kernel checks in a row."""
    bad = ~((tau >= 0) & (tau < float("inf")))
    for x in (p, least):
        bad = bad | ~((x >= 0) & (x <= 1))
    if bad.any():
        row_value_error(int(bad.int().argmax()), tau, p, least)


def row_value_error(row: int, tau, p, least) -> None:
    for name, x, high in (
        ("temperature", tau, float("inf")),
        ("top_p", p, 1.0),
        ("min_p", least, 1.0),
    ):
        value = x[row].item()
        if not 0 <= value <= high or value == float("inf"):
            raise ValueError(f"{name}[{row}] = {value} is outside [0, {high:g}]")


def _run_cpu(logits, tau, k, p, least, seeds, positions, allowed, joint, keep_ties, support=None):
    out = token, logprob, full_logprob, kept, status = _outputs(logits)
    bad = _C.sample(
        _op.rows(logits, logits.shape[-1]),
        tau.data_ptr(),
        k.data_ptr(),
        p.data_ptr(),
        least.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        _op.address(allowed),
        joint,
        keep_ties,
        token.data_ptr(),
        logprob.data_ptr(),
        full_logprob.data_ptr(),
        kept.data_ptr(),
        status.data_ptr(),
        support,
        _op.threads(),
    )
    if bad >= 0:
        row_value_error(bad, tau, p, least)
    return out


def _run_cuda(logits, *arguments):
    """The results of `sample`, and what the kernel for supports reads."""
    from .triton_kernels import sample as kernels

    if _check.reads_values(logits):
        tau, _, p, least, *_ = arguments
        check_rows(tau, p, least)
    out = _outputs(logits)
    return out, kernels.sample_fwd(logits, *arguments, *out)


def _sample_fake(logits, tau, k, p, least, seeds, positions, allowed, joint, keep_ties, portable):
    return _outputs(logits)


def _sample_cuda(logits, *arguments):
    return _run_cuda(logits, *arguments)[0]


@_op.op("sample", fake=_sample_fake, cuda=_sample_cuda)
def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    allowed: Tensor | None,
    joint: bool,
    keep_ties: bool,
    portable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token, logprob, full_logprob, kept, status), each [B]."""
    return _run_cpu(
        logits, temperature, top_k, top_p, min_p, seed, position, allowed, joint, keep_ties
    )


def empty_bits(logits: Tensor, overflows: bool) -> Tensor:
    """A row of bits for each row that may overflow; no rows where none can."""
    rows = math.prod(logits.shape[:-1]) if overflows else 0
    return logits.new_empty((rows, -(-logits.shape[-1] // 32)), dtype=torch.int32)


def _sample_support_fake(
    logits, tau, k, p, least, seeds, positions, allowed, joint, keep_ties, portable, capacity,
    overflows,
):  # fmt: skip
    size = torch.library.get_ctx().new_dynamic_size()
    count = math.prod(logits.shape[:-1])
    return (
        *_outputs(logits),
        logits.new_empty(size, dtype=torch.int32),
        logits.new_empty(count + 1, dtype=torch.int64),
        empty_bits(logits, overflows),
    )


def _sample_support_cuda(
    logits, tau, k, p, least, seeds, positions, allowed, joint, keep_ties, portable, capacity,
    overflows,
):  # fmt: skip
    from .triton_kernels import sample as kernels

    out, workspace = _run_cuda(
        logits, tau, k, p, least, seeds, positions, allowed, joint, keep_ties, portable
    )
    ids = logits.new_empty(capacity, dtype=torch.int32)
    offsets = logits.new_empty(math.prod(logits.shape[:-1]) + 1, dtype=torch.int64)
    bits = empty_bits(logits, overflows)
    kernels.support_fwd(
        logits, allowed, workspace, out[3], out[4], ids, offsets, bits if overflows else None
    )
    return *out, ids, offsets, bits


@_op.op("sample_support", fake=_sample_support_fake, cuda=_sample_support_cuda)
def _sample_support(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    allowed: Tensor | None,
    joint: bool,
    keep_ties: bool,
    portable: bool,
    capacity: int,
    overflows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`sample` plus the kept sets: (ids, offsets, bits) as `Support` has them.

    capacity: entries of ids, −1 for as many as are kept. overflows: that may be too few, so bits is
    [B, ceil(V/32)] and not [0, ceil(V/32)].
    """
    count = math.prod(logits.shape[:-1])
    kept = _C.KeptSets(count)
    out = _run_cpu(
        logits, temperature, top_k, top_p, min_p, seed, position, allowed, joint, keep_ties, kept
    )
    total = kept.total()
    ids = _warm.empty_ids(total if capacity < 0 else min(capacity, total))
    offsets = logits.new_empty(count + 1, dtype=torch.int64)
    bits = empty_bits(logits, overflows)
    kept.write(
        ids.data_ptr(), ids.numel(), offsets.data_ptr(), bits.data_ptr(), bits.shape[1],
        out[4].data_ptr(), _op.threads(),
    )  # fmt: skip
    return *out, ids, offsets, bits
