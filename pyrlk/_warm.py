"""Memory of large CPU gradients, warm from step to step (csrc/memory/warm_pages.h)."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack

from . import _C

# From here on malloc keeps nothing for later: every allocation is a fresh mapping.
WARM_BYTES = 32 << 20


def empty_like(x: Tensor, code: int) -> Tensor:
    """Contiguous, uninitialised; `code` is the dtype in the kernels' numbering.

    Warm where it is large, on the CPU, and PYRLK_WARM_GRADIENTS is not 0.
    """
    if (
        not torch.compiler.is_compiling()  # first: a traced length must not become a branch
        and x.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and x.nbytes >= WARM_BYTES
        and os.environ.get("PYRLK_WARM_GRADIENTS") != "0"
    ):
        made = _C.warm_tensor(x.shape, code)
        if made is not None:
            return from_dlpack(made)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def empty_cache() -> int:
    """Return the memory of freed CPU gradients to the system; gives its size in bytes.

    The memory of a gradient of 32 MiB or more is kept for the next step when its last tensor is
    gone: at most two, and no more than were in use at once. The system may take it back by itself
    when it is short. PYRLK_WARM_GRADIENTS=0 keeps none.
    """
    return _C.release_warm_pages()
