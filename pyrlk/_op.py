"""How an op is made, and how tensors reach the kernels.

An op is one torch.library schema with a `cpu` and a `cuda` kernel: the dispatcher is torch's. The
C++ side takes addresses; a tensor of logits becomes (address, dtype, rows, vocab, width, inner,
strides).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from . import _C, _check

_DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def op(name: str, *, fake: Callable, cuda: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Registers the decorated CPU function as torch.ops.pyrlk.<name>, with CUDA twin and fake."""

    def register(cpu: Callable) -> Any:
        made = torch.library.custom_op(
            f"pyrlk::{name}", cpu, mutates_args=mutates, device_types="cpu"
        )
        made.register_kernel("cuda")(cuda)
        made.register_fake(fake)
        return made

    return register


def mutates_only(*_args, **_kwargs) -> None:
    """The fake of an op that returns nothing."""


def rows(x: Tensor, vocab: int) -> tuple:
    count, inner, outer_stride, inner_stride = _check.row_layout(x)
    code = _DTYPE_CODE[x.dtype]
    return x.data_ptr(), code, count, vocab, x.shape[-1], inner, outer_stride, inner_stride


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 beside float64 logits: the type of per-token inputs and results."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@overload
def flat(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def flat(x: None, dtype: torch.dtype) -> None: ...
def flat(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A per-token input as the kernels want it: contiguous [T] of `dtype`."""
    return None if x is None else x.detach().to(dtype).reshape(-1).contiguous()


def empty_gradient(logits: Tensor) -> Tensor:
    """Fresh memory for a gradient: contiguous, whatever the strides of the logits are."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _scale_cuda(x: Tensor, factor: Tensor) -> None:
    from .triton_kernels import policy_loss

    policy_loss.scale_(x, factor)


@op("scale_", fake=mutates_only, cuda=_scale_cuda, mutates=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place, x contiguous or rows of two strides; a factor of 1 touches nothing."""
    value = float(factor)
    if value == 1.0:
        return
    if x.is_contiguous():
        _C.scale(x.data_ptr(), _DTYPE_CODE[x.dtype], x.numel(), value, threads())
    else:
        x.mul_(value)
