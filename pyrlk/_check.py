"""Argument checks of the public functions: an error names the argument, what came, what is wanted.

Nothing here reads a tensor's values, so nothing synchronises; the CPU kernels check values
themselves.
"""

from __future__ import annotations

import math
import os
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    *LOGITS_DTYPES,
    torch.float64,
)
_FLOAT32 = torch.finfo(torch.float32)


def tensor(name: str, x) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} must be on cpu or cuda, got a tensor on {x.device}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {x.layout}")
    # Its memory has the other sign. A compiler knows, and cannot be asked.
    if not torch.compiler.is_compiling() and x.is_neg():
        raise TypeError(f"{name} must not be a negated view; use {name}.resolve_neg()")
    # torch would drop the tangent silently.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name} has a tangent: pyrlk has no forward-mode derivatives")
    return x


def number(name: str, x, low=-math.inf, high=math.inf, *, above: bool = False) -> float:
    """A finite host number in [low, high], or in (low, high] where `above`."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    inside = (x > low if above else x >= low) and x <= high and abs(x) <= sys.float_info.max
    if not inside:
        left = "(" if above or low == -math.inf else "["
        right = ")" if high == math.inf else "]"
        raise ValueError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {x}")
    return float(x)


def compute_number(name: str, x, z: Tensor, low=-math.inf, *, above: bool = False) -> float:
    """A host number that the computation beside `z` can hold: float32, or float64 of float64."""
    value = number(name, x, low, above=above)
    return value if z.dtype == torch.float64 else float32_number(name, value)


def float32_number(name: str, x: float) -> float:
    """`x` where float32 holds it: neither too large for it, nor rounded to 0."""
    if abs(x) > _FLOAT32.max or (x != 0 and abs(x) < _FLOAT32.smallest_normal / 2**23):
        raise ValueError(f"{name} must be representable in float32, got {x}")
    return x


def integer(name: str, x) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
    return x


def choice(name: str, x, options: tuple[str, ...]) -> str:
    if not isinstance(x, str) or x not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {x!r}")
    return x


def flag(name: str, x) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {type(x).__name__}")
    return x


def rows(x, name: str, width: str, least: int = 1) -> Tensor:
    """[..., width] with width ≥ least in a dtype of the kernels; float64 on CPU only."""
    x = tensor(name, x)
    allowed = (*LOGITS_DTYPES, torch.float64) if x.device.type == "cpu" else LOGITS_DTYPES
    if x.dtype not in allowed:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {wanted} on {x.device.type}, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < least:
        raise ValueError(
            f"{name} must have shape [..., {width}] with {width} ≥ {least}, got {list(x.shape)}"
        )
    return x


def logits(x, name: str = "logits", *, sharded: bool = False) -> Tensor:
    """Logits [..., V], last stride 1, and rows that two strides address; V ≥ 1 but for a shard."""
    x = rows(x, name, "V", 0 if sharded else 1)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have stride 1 in its last dimension, got strides {list(x.stride())}; "
            f"use {name}.contiguous()"
        )
    row_layout(x, name)
    return x


def row_layout(x: Tensor, name: str = "logits") -> tuple[int, int, int, int]:
    """(rows, inner, outer, inner stride): row t begins at (t // inner)·outer + (t %
    inner)·stride."""
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first
    rows = 1
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        rows = rows * size
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        raise ValueError(
            f"{name} of shape {list(x.shape)} and strides {list(x.stride())} needs more than two "
            f"strides to address its rows; use {name}.contiguous()"
        )
    if not levels:
        return rows, 1, 0, 0
    if len(levels) == 1:
        return rows, levels[0][0], 0, levels[0][1]
    return rows, levels[1][0], levels[0][1], levels[1][1]


def disjoint_rows(x: Tensor, message: str) -> None:
    """Refuses to write where two rows share memory: expanded or overlapping ones."""
    rows, inner, far, near = row_layout(x)
    if rows == 0:
        return
    outer, width = rows // inner, x.shape[-1]
    apart = inner == 1 or near >= width
    nested = far >= (inner - 1) * near + width
    crossed = far >= width and near >= (outer - 1) * far + width
    if not (apart and (outer == 1 or nested or crossed)):
        raise ValueError(f"{message} (strides {list(x.stride())}); use .clone()")


def like(name: str, x, other: Tensor, other_name: str = "logits") -> Tensor:
    x = tensor(name, x)
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    return x


def shaped(name: str, x: Tensor, shape) -> Tensor:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return x


def tokens(x, z: Tensor, shape, other_name: str = "logits") -> Tensor:
    x = like("tokens", x, z, other_name)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {x.dtype}")
    return shaped("tokens", x, shape)


def floating(name: str, x, z: Tensor, shape=None, other_name: str = "logits") -> Tensor:
    """A float tensor that the computation may widen, never round: float64 only beside float64."""
    x = like(name, x, z, other_name)
    if x.dtype not in (*LOGITS_DTYPES, torch.float64):
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}")
    if x.dtype == torch.float64 and z.dtype != torch.float64:
        raise TypeError(
            f"{name} must be float32 beside {other_name} of {z.dtype}, got torch.float64; "
            f"round it yourself with {name}.float()"
        )
    return x if shape is None else shaped(name, x, shape)


def mask(x, z: Tensor, shape, other_name: str = "logits") -> Tensor:
    return shaped("mask", mask_type(like("mask", x, z, other_name)), shape)


def mask_type(x: Tensor) -> Tensor:
    if x.dtype not in _MASK_DTYPES:
        raise TypeError(f"mask must be bool, int or float, got {x.dtype}")
    return x


def temperature(x, z: Tensor, shape, other_name="logits") -> tuple[float, Tensor | None]:
    """(number, per-token tensor or None); τ > 0. A constant, whatever graph it comes from."""
    if isinstance(x, Tensor):
        return 1.0, floating("temperature", x, z, shape, other_name).detach()
    return compute_number("temperature", x, z, 0.0, above=True), None


def vocab_size(x, z: Tensor, dim: int = -1) -> int:
    if x is None:
        return z.shape[dim]
    x = integer("vocab_size", x)
    if not 1 <= x <= z.shape[dim]:
        raise ValueError(f"vocab_size must lie in [1, {z.shape[dim]}], got {x}")
    return x


def cu_seqlens(x, z: Tensor, shape, other_name: str = "logits") -> Tensor | None:
    if x is None:
        return None
    x = like("cu_seqlens", x, z, other_name)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {x.dtype}")
    if x.dim() != 1 or x.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {list(x.shape)}")
    if len(shape) != 1 and not (len(shape) == 2 and shape[0] == 1):
        raise ValueError(
            f"cu_seqlens is for packed tokens of shape [T] or [1, T], got tokens of {list(shape)}"
        )
    return x


def advantages(x, z: Tensor, shape, seqs, other_name: str = "logits") -> Tensor:
    """Per token, or one a sequence where something says what a sequence is."""
    x = floating("advantages", x, z, other_name=other_name)
    if x.shape == shape or (seqs is not None and x.shape == (seqs.count,)):
        return x
    per_sequence = f" or [{seqs.count}] (one a sequence)" if seqs is not None else ""
    raise ValueError(f"advantages must have shape {list(shape)}{per_sequence}, got {list(x.shape)}")


# Values. On CPU reading them costs nothing but the read; on CUDA it waits for the device.


def reads_values(x: Tensor) -> bool:
    """Whether values inside tensors are checked where `x` is: on CUDA under PYRLK_CHECK=1 alone.

    Not during a CUDA graph's capture, which nothing may wait for.
    """
    if x.device.type == "cpu":
        return True
    return os.environ.get("PYRLK_CHECK") == "1" and not torch.cuda.is_current_stream_capturing()


def mask_values(x: Tensor | None, counted: Tensor | bool = True) -> None:
    """Weights are finite and ≥ 0 where `counted`."""
    if x is None or x.dtype == torch.bool or x.numel() == 0:
        return
    least, most = (float(bound) for bound in x.aminmax())
    if least >= 0 and most < math.inf:
        return
    bad = (counted & ~((x >= 0) & (x < math.inf))).reshape(-1)
    if bad.any():
        at = int(bad.to(torch.int8).argmax())
        raise ValueError(f"mask[{at}] = {x.reshape(-1)[at].item()} must be a finite weight ≥ 0")


def cu_seqlens_values(x: Tensor | None, total: int) -> None:
    if x is None:
        return
    steps = x.tolist()
    if steps[0] != 0:
        raise ValueError(f"cu_seqlens[0] must be 0, got {steps[0]}")
    for i in range(1, len(steps)):
        if steps[i] < steps[i - 1]:
            raise ValueError(f"cu_seqlens[{i}] = {steps[i]} is less than the one before it")
    if steps[-1] != total:
        raise ValueError(f"cu_seqlens[{len(steps) - 1}] must be {total} (tokens), got {steps[-1]}")


def temperature_values(x: Tensor | None, counted: Tensor) -> None:
    if x is None:
        return
    bad = (counted & ~((x > 0) & (x < math.inf))).reshape(-1)
    if bad.any():
        at = int(bad.to(torch.int8).argmax())
        raise ValueError(f"temperature[{at}] = {x.reshape(-1)[at].item()} must be finite and > 0")


def normalizer_value(x: Tensor | None) -> None:
    if x is not None and not 0 < x < math.inf:
        raise ValueError(f"normalizer must be finite and > 0, got {x.item()}")


def bad_token(at: int, tokens: Tensor, vocab: int, prefix: str = "") -> None:
    """Turns a kernel's answer (first bad index, or −1) into an error."""
    if at >= 0:
        token = int(tokens.reshape(-1)[at])
        where = "its support" if 0 <= token < vocab else f"[0, {vocab})"
        raise ValueError(f"{prefix}tokens[{at}] = {token} is outside {where}")
