"""Sampling with temperature, top-k, top-p and min-p, and the exact log-probs of what was drawn.

Order of a row: (logit descending, id ascending). A kept set is a prefix of it:
    top-k   the first min(k, finite logits)
    top-p   the shortest prefix whose mass reaches p of the mass it applies to
    min-p   logit ≥ max + τ·ln(min_p)
Draw: the first kept id, ascending, whose running mass exceeds u·Z, u = 64 Philox bits of (seed,
position). A row's result depends on its logits, parameters, seed and position alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _check, _op
from .support import Support

NAN, INF, EMPTY, INVALID, OVERFLOW = 1, 2, 4, 8, 16
_ORDERS = ("top_k_first", "joint")
_MAX_VOCAB = 1 << 19


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
    return_support: bool = False,
    support_capacity: int | None = None,
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
    return_support : bool
    support_capacity : int, optional
        Size of the id buffer on CUDA; default B·top_k for a host top_k > 0, else B·4096. A row that
        does not fit gets status OVERFLOW and no ids. On CPU the buffer always has the exact size.

    Returns
    -------
    Sample

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A bad value inside a parameter tensor is a ValueError with its index on
        CPU; on CUDA that row gets status INVALID.
    """
    z = _check.logits(logits).detach()
    if z.shape[-1] >= _MAX_VOCAB:
        raise ValueError(f"logits must have V < {_MAX_VOCAB}, got {z.shape[-1]}")
    lead = z.shape[:-1]
    count = math.prod(lead)
    tau = _float_rows("temperature", temperature, z, 0.0)
    k = _int_rows("top_k", top_k, z)
    p = _float_rows("top_p", top_p, z, 0.0, 1.0)
    least = _float_rows("min_p", min_p, z, 0.0, 1.0)
    seeds = _int_rows("seed", seed, z)
    if not isinstance(seed, Tensor):
        seeds = seeds + torch.arange(count, device=z.device)
    positions = _int_rows("position", position, z)
    joint = _check.choice("order", order, _ORDERS) == "joint"
    arguments = (z, tau, k, p, least, seeds, positions, joint)
    if not _check.flag("return_support", return_support):
        token, logprob, full, kept, status = _sample(*arguments)
        support = None
    else:
        capacity = _capacity(support_capacity, top_k, count)
        token, logprob, full, kept, status, ids, offsets = _sample_support(*arguments, capacity)
        support = Support(ids, offsets)
    token, logprob, full, kept, status = (
        x.view(lead) for x in (token, logprob, full, kept, status)
    )
    return Sample(token, logprob, full, kept, status, support)


def _capacity(capacity, top_k, count: int) -> int:
    if capacity is not None:
        if _check.integer("support_capacity", capacity) < 0:
            raise ValueError(f"support_capacity must be ≥ 0, got {capacity}")
        return capacity
    return count * (top_k if isinstance(top_k, int) and top_k > 0 else 4096)


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
        return x.to(torch.float32).contiguous()
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


def _row_value_error(row: int, tau, p, least) -> None:
    for name, x, high in (
        ("temperature", tau, float("inf")),
        ("top_p", p, 1.0),
        ("min_p", least, 1.0),
    ):
        value = x[row].item()
        if not 0 <= value <= high or value == float("inf"):
            raise ValueError(f"{name}[{row}] = {value} is outside [0, {high:g}]")


def _run_cpu(logits, tau, k, p, least, seeds, positions, joint, support):
    out = token, logprob, full_logprob, kept, status = _outputs(logits)
    bad = _C.sample(
        _op.rows(logits, logits.shape[-1]),
        tau.data_ptr(),
        k.data_ptr(),
        p.data_ptr(),
        least.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        joint,
        token.data_ptr(),
        logprob.data_ptr(),
        full_logprob.data_ptr(),
        kept.data_ptr(),
        status.data_ptr(),
        support,
        _op.threads(),
    )
    if bad >= 0:
        _row_value_error(bad, tau, p, least)
    return out


def _run_cuda(logits, tau, k, p, least, seeds, positions, joint, bounds=None):
    from .triton_kernels import sample as kernels

    out = _outputs(logits)
    kernels.sample_fwd(logits, tau, k, p, least, seeds, positions, joint, *out, bounds)
    return out


def _sample_fake(logits, tau, k, p, least, seeds, positions, joint):
    return _outputs(logits)


def _sample_cuda(logits, tau, k, p, least, seeds, positions, joint):
    return _run_cuda(logits, tau, k, p, least, seeds, positions, joint)


@_op.op("sample", fake=_sample_fake, cuda=_sample_cuda)
def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token, logprob, full_logprob, kept, status), each [B]."""
    return _run_cpu(logits, temperature, top_k, top_p, min_p, seed, position, joint, None)


def _sample_support_fake(logits, tau, k, p, least, seeds, positions, joint, capacity):
    size = torch.library.get_ctx().new_dynamic_size()
    count = math.prod(logits.shape[:-1])
    return (
        *_outputs(logits),
        logits.new_empty(size, dtype=torch.int32),
        logits.new_empty(count + 1, dtype=torch.int64),
    )


def _sample_support_cuda(logits, tau, k, p, least, seeds, positions, joint, capacity):
    from .triton_kernels import sample as kernels

    count = math.prod(logits.shape[:-1])
    bounds = logits.new_empty((count, 2), dtype=torch.int64)
    out = _run_cuda(logits, tau, k, p, least, seeds, positions, joint, bounds)
    ids = logits.new_empty(capacity, dtype=torch.int32)
    offsets = logits.new_empty(count + 1, dtype=torch.int64)
    kernels.support_fwd(logits, bounds, out[3], out[4], ids, offsets)
    return *out, ids, offsets


@_op.op("sample_support", fake=_sample_support_fake, cuda=_sample_support_cuda)
def _sample_support(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    joint: bool,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`sample` plus the kept ids as CSR (ids, offsets)."""
    count = math.prod(logits.shape[:-1])
    kept = _C.Support(count)
    out = _run_cpu(logits, temperature, top_k, top_p, min_p, seed, position, joint, kept)
    ids = logits.new_empty(kept.total(), dtype=torch.int32)
    offsets = logits.new_empty(count + 1, dtype=torch.int64)
    kept.write(ids.data_ptr(), offsets.data_ptr())
    return *out, ids, offsets
