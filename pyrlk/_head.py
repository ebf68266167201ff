"""The head a chunk of rows at a time: z = x·Wᵀ (+ b), softcap, and from ∂z the three gradients.

    ∂hidden = ∂z @ weight        ∂weight += ∂zᵀ @ hidden        ∂bias += Σ ∂z      (float32 sums)

Buffers are shared by all chunks; rows without a gradient are dropped before the first product.
Gradients are known before backward: `attach_grads` makes a loss a function of its leaves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, _op

_LINE = 64  # elements: rows of a chunk start on a cache line, whatever V is


class Settings(NamedTuple):
    """How the products are done: softcap or 0, logits wider than their operands, chunk or 0."""

    softcap: float
    wide: bool
    chunk: int


def checked(hidden, weight, bias, softcap, logits_dtype, chunk, sharded=False) -> Settings:
    _check.rows(hidden, "hidden", "H")
    dtype, width = hidden.dtype, hidden.shape[-1]
    _check.like("weight", weight, hidden, "hidden")
    if weight.dtype != dtype:
        raise TypeError(f"weight must be {dtype} like hidden, got {weight.dtype}")
    least = 0 if sharded else 1
    if weight.dim() != 2 or weight.shape[0] < least or weight.shape[1] != width:
        raise ValueError(
            f"weight must have shape [V, {width}] with V ≥ {least}, got {list(weight.shape)}"
        )
    if 1 not in weight.stride() and weight.numel():
        raise ValueError(
            f"weight must have stride 1 in one dimension, got strides {list(weight.stride())}; "
            "use weight.contiguous()"
        )
    if bias is not None:
        _check.like("bias", bias, hidden, "hidden")
        if bias.dtype != dtype:
            raise TypeError(f"bias must be {dtype} like hidden, got {bias.dtype}")
        _check.shaped("bias", bias, weight.shape[:1])
    if softcap is not None:
        _check.float32_number("softcap", _check.number("softcap", softcap, 0.0, above=True))
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype must be a torch.dtype or None, got {type(logits_dtype).__name__}"
        )
    if logits_dtype not in (None, dtype, _op.compute_dtype(hidden)):
        raise ValueError(
            f"logits_dtype must be None, {dtype} or {_op.compute_dtype(hidden)}, got {logits_dtype}"
        )
    if chunk is not None and not 1 <= _check.integer("chunk", chunk) < 1 << 31:
        raise ValueError(f"chunk must lie in [1, 2^31), got {chunk}")
    main_grad = None if torch.compiler.is_compiling() else getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(
            f"weight.main_grad must have shape {list(weight.shape)}, got {list(main_grad.shape)}"
        )
    return Settings(float(softcap or 0.0), logits_dtype not in (None, dtype), chunk or 0)


class Head:
    """The products of a chunk of rows with the weight, in buffers that all chunks share.

    ``for part in head.parts()`` names the rows; ``logits(part)`` computes z; a kernel writes ∂z to
    ``slopes(part)``, which is z itself unless the softcap still needs z; ``backward(part)`` turns
    it into dhidden, dweight and dbias.
    """

    def __init__(self, hidden, weight, bias, active, vocab: int, settings: Settings, wants):
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.softcap, wide, chunk = settings
        cuda, device, dtype = hidden.is_cuda, hidden.device, hidden.dtype
        total = _op.compute_dtype(hidden)
        self.index = None
        if _capturing(hidden):
            # How many rows are active cannot be read: all are computed, and 0·NaN of a masked one
            # must not reach dweight.
            self.hidden = torch.where(active[:, None], self.hidden, 0)
        else:
            index = active.nonzero()[:, 0]
            self.index = None if index.numel() == active.numel() else index
        self.count = active.numel() if self.index is None else self.index.numel()
        # The operands of the products. torch has no mixed ones on CPU.
        self.dtype = total if wide and not cuda else dtype
        self.weight = weight[:vocab].to(self.dtype)
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        z_dtype = total if wide else dtype
        self.chunk = chunk_rows(chunk, self.count, vocab * z_dtype.itemsize, cuda)
        self.padded = _fixed_shapes(hidden)

        def rows(width, of):
            return _buffer(self.chunk, width, of, device)

        self.x = rows(self.hidden.shape[1], self.dtype)
        self.z = rows(vocab, z_dtype)
        # Distinct empty tensors: the results of an op may not share memory.
        self.dhidden, self.dweight, self.dbias = (hidden.new_empty(0) for _ in range(3))
        self.wants = wants
        self.dz = self.z if self.softcap == 0 or not any(wants) else rows(vocab, z_dtype)
        if wants[0]:
            self.dhidden = torch.empty(self.hidden.shape, dtype=dtype, device=device)
            if self.index is not None:
                self.dhidden.zero_()
            self.dx = rows(self.hidden.shape[1], self.dtype)
        if wants[1]:
            self.dweight = torch.empty(weight.shape, dtype=total, device=device)
            self.dweight[0 if self.count == 0 else vocab :].zero_()
        if wants[2]:
            self.dbias = torch.zeros(weight.shape[0], dtype=total, device=device)
        # ∂z as an operand: in the dtype of the weight for dhidden, wide on CPU for dweight.
        self.narrow = rows(vocab, self.dtype) if self.dtype != z_dtype and any(wants[:2]) else None
        self.wide = rows(vocab, total) if not cuda and self.dtype != total and wants[1] else None

    def parts(self) -> Iterator[slice]:
        for start in range(0, self.count, self.chunk):
            yield slice(start, min(start + self.chunk, self.count))

    def logits(self, part: slice) -> Tensor:
        x = self._rows(part)
        z = self.z[: x.shape[0]]
        if self.bias is not None and z.dtype == x.dtype:
            torch.addmm(self.bias, x, self.weight.t(), out=z)  # rounded once
        else:
            _product(x, self.weight.t(), z)
            if self.bias is not None:
                z.add_(self.bias)
        if self.softcap:
            _softcap_(z, self.softcap)
        return z[: part.stop - part.start]

    def slopes(self, part: slice) -> Tensor | None:
        return self.dz[: part.stop - part.start] if any(self.wants) else None

    def backward(self, part: slice) -> None:
        if not any(self.wants):
            return
        count = part.stop - part.start
        size = self.chunk if self.padded else count
        dz = self.dz[:size]
        dz[count:].zero_()
        if self.softcap:
            _softcap_slope_(dz, self.z[:size], self.softcap)
        vocab = dz.shape[1]
        if self.wants[2]:
            self.dbias[:vocab].add_(dz.sum(0, dtype=self.dbias.dtype))
        if self.narrow is not None:
            dz = self.narrow[:size].copy_(dz)
        if self.wants[0]:
            dx = self.dx[:size]
            if self.index is None and size == count and self.dtype == self.dhidden.dtype:
                dx = self.dhidden[part]
            _product(dz, self.weight, dx)
            if self.index is not None:
                self.dhidden.index_copy_(0, self.index[part], dx[:count].to(self.dhidden.dtype))
            elif dx.data_ptr() != self.dhidden[part].data_ptr():
                self.dhidden[part] = dx[:count]
        if self.wants[1]:
            x = self._rows(part)
            if self.wide is not None:
                dz, x = self.wide[:size].copy_(dz), x.to(self.wide.dtype)
            accumulate(self.dweight[:vocab], dz.t(), x, first=part.start == 0)

    def _rows(self, part: slice) -> Tensor:
        """[n, H] of hidden, or [chunk, H] with zeros at the end where shapes are fixed."""
        count = part.stop - part.start
        plain = self.index is None and self.dtype == self.hidden.dtype
        if plain and not (self.padded and count < self.chunk):
            return self.hidden[part]
        x = self.x[: self.chunk if self.padded else count]
        if self.index is not None and self.dtype == self.hidden.dtype:
            torch.index_select(self.hidden, 0, self.index[part], out=x[:count])
        else:
            x[:count] = self.hidden[part if self.index is None else self.index[part]]
        x[count:].zero_()
        return x


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _fixed_shapes(x: Tensor) -> bool:
    """Whether the last chunk is padded: on CUDA, where the shape of a product picks its kernel."""
    return x.is_cuda


def chunk_rows(chunk: int, count: int, row_bytes: int, cuda: bool) -> int:
    """Rows at a time: large enough to hide the traffic of dweight, small beside the model.

    A given `chunk` is kept as it is on CUDA. Otherwise the rows are split evenly, on CUDA in
    multiples of 128, so that the last product is no special case.
    """
    if chunk:
        return chunk if cuda else max(1, min(chunk, count))
    if cuda:
        most = 4096 if 4096 * row_bytes <= 3 << 29 else 2048
    else:
        most = min(4096, max(64, (256 << 20) // max(1, row_bytes)))
    even = -(-count // max(1, -(-count // most)))
    return -(-even // 128) * 128 if cuda else max(1, even)


def _buffer(rows: int, width: int, dtype: torch.dtype, device) -> Tensor:
    """[rows, width] whose rows start on cache lines."""
    padded = -(-width // _LINE) * _LINE
    return torch.empty((rows, padded), dtype=dtype, device=device)[:, :width]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b in the dtype of `total`, or total = a @ b for the first chunk."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif _addmm_widens(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for rows, block in zip(total.split(16384), a.split(16384), strict=True):
            product = torch.mm(block, b, out_dtype=total.dtype)
            rows.copy_(product) if first else rows.add_(product)


@functools.cache
def _addmm_widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of 16-bit operands into float32; older ones only store."""
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, small, small, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def blocks(x: Tensor) -> int:
    """Rows whose float32 copy stays in cache, or is small beside a chunk."""
    return max(1, ((64 << 20) if x.is_cuda else (4 << 20)) // (4 * max(1, x.shape[1])))


def _softcap_(z: Tensor, c: float) -> None:
    """z = c·tanh(z/c), rounded once."""
    for rows in z.split(blocks(z)):
        rows.copy_((rows.to(_op.compute_dtype(z)) / c).tanh_().mul_(c))


def _softcap_slope_(dz: Tensor, z: Tensor, c: float) -> None:
    """dz *= ∂(c·tanh(x/c))/∂x = 1 − (z/c)², with z the capped logits."""
    size = blocks(z)
    for to, rows in zip(dz.split(size), z.split(size), strict=True):
        to.mul_((rows.to(_op.compute_dtype(z)) / c).square_().neg_().add_(1))


@contextlib.contextmanager
def plain(x: Tensor) -> Iterator[None]:
    """Products as written: autograd sees the op alone, autocast none of it."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def grads_fake(hidden, weight, wants):
    total = _op.compute_dtype(hidden)
    empty = hidden.new_empty
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if wants[0]
        else empty(0),
        empty(weight.shape, dtype=total) if wants[1] else empty(0),
        empty(weight.shape[0], dtype=total) if wants[2] else empty(0),
    )


def grads(head: Head, hidden: Tensor, wants) -> tuple[Tensor, Tensor, Tensor]:
    dhidden = head.dhidden.view(hidden.shape) if wants[0] else head.dhidden
    return dhidden, head.dweight, head.dbias


def _attach_fake(hidden, weight, bias, dhidden, dweight, dbias, unit, value):
    return torch.empty_like(value)


@_op.op("linear_attach_grads", fake=_attach_fake)
def attach_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    unit: Tensor,
    value: Tensor,
) -> Tensor:
    """The loss as a function of its leaves, whose gradients are known; backward consumes them."""
    return value.clone()


def _attach_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[3:7])
    ctx.weight, ctx.dtype, ctx.spent = megatron_weight(inputs[1]), inputs[1].dtype, False


def _attach_backward(ctx, factor):
    _op.enter_once(ctx, "its gradient was handed over by the first")
    *grads, unit = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise RuntimeError("pyrlk losses are differentiable once: create_graph is not supported")
    needed = ctx.needs_input_grad[:3]
    for grad, wanted in zip(grads, needed, strict=True):
        if wanted:
            _op.scale_gradient(grad, factor * unit)
    return *hand_over(grads, needed, ctx.weight, ctx.dtype), *(None,) * 5


attach_grads.register_autograd(_attach_backward, setup_context=_attach_setup)


def megatron_weight(weight: Tensor) -> Tensor | None:
    """The weight where Megatron has given it a buffer for its gradient."""
    return weight if getattr(weight, "main_grad", None) is not None else None


def hand_over(grads, needed, megatron: Tensor | None, dtype: torch.dtype):
    """Gradients as autograd wants them; ∂weight goes into main_grad instead where there is one."""
    dhidden, dweight, dbias = grads
    to_weight = _rounded(dweight, dtype) if needed[1] and megatron is None else None
    if needed[1] and megatron is not None:
        main: Any = megatron
        main.main_grad.add_(dweight)
        if hasattr(main, "grad_added_to_main_grad"):
            # Megatron's hook waits for a gradient, and takes it for accounted for by this flag.
            main.grad_added_to_main_grad = True
            to_weight = torch.zeros_like(main)
    return dhidden if needed[0] else None, to_weight, dbias.to(dtype) if needed[2] else None


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def float16_unit(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """What an op's gradients are in units of: a power of two for float16, else 1.

    `sizes` are the w·|A| of the tokens. 1/T of a loss is below what float16 resolves, and a loss
    scale comes only with backward. So the largest of them counts as about 1/16 until then.
    """
    one = torch.ones((), dtype=sizes.dtype, device=sizes.device)
    if dtype != torch.float16 or sizes.numel() == 0:
        return one
    size = torch.where(sizes > 0, sizes, 0).amax()
    unit = torch.exp2(torch.log2(size).ceil() + 4)
    return torch.where((size > 1e-30) & (size < 1e30), unit, one)
