"""CPU memory of large gradients and kept sets, warm from step to step (memory/warm_pages.h)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack

from . import _C

# From here on malloc keeps nothing for later: every allocation is a fresh mapping.
WARM_BYTES = 32 << 20


def _empty(shape: Sequence[int], dtype: torch.dtype, code: int) -> Tensor:
    """Uninitialised; warm where it is large and PYRLK_WARM_GRADIENTS is not 0.

    `code` is the dtype in the kernels' numbering, or that of one of the same size.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= WARM_BYTES and os.environ.get("PYRLK_WARM_GRADIENTS") != "0":
        made = _C.warm_tensor(shape, code)
        if made is not None:
            return from_dlpack(made).view(dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


def empty_ids(count: int) -> Tensor:
    """int32 [count] for the ids of kept sets, on the CPU."""
    return _empty((count,), torch.int32, 0)


def empty_like(x: Tensor, code: int) -> Tensor:
    """A gradient of x: contiguous, uninitialised; `code` is its dtype in the kernels' numbering."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or isinstance(x, FakeTensor):
        # A traced length must not become a branch.
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _empty(x.shape, x.dtype, code)


def empty_cache() -> int:
    """Return the memory of freed CPU gradients and kept sets to the system; gives its bytes.

    The memory of a gradient, or of the ids of a support, of 32 MiB or more is kept for the next
    step when its last tensor is gone: at most two, and no more than were in use at once. The system
    may take it back by itself when it is short. PYRLK_WARM_GRADIENTS=0 keeps none.
    """
    return _C.release_warm_pages()
