"""How an op is made, and how tensors reach the kernels.

An op is one torch.library schema with one body for both devices: it checks and prepares in torch,
and leaves the sweep over V to a kernel that `by_device` picks, C++ or Triton. The C++ side takes
addresses; a tensor of logits becomes (address, dtype, rows, vocab, width, inner, strides).
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from . import _C, _check, _warm

_DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def op(
    name: str, *, fake: Callable, mutates: tuple[str, ...] = (), cuda: Callable | None = None
) -> Callable:
    """Registers the decorated body as torch.ops.pyrlk.<name> for cpu and cuda.

    A parameter annotated with a NamedTuple stands for its fields in the schema: the op is called
    with them one by one, body and fake receive the tuple. `cuda` is a body of its own, where the
    two devices share nothing.
    """

    def register(body: Callable) -> Any:
        signature, pack = _flattened(body)
        body, device_body = _on_its_device(body), _on_its_device(cuda or body)

        def packed(function: Callable) -> Callable:
            @functools.wraps(body)
            def call(*args):
                return function(*pack(args))

            call.__signature__ = signature  # type: ignore[attr-defined]
            return call

        devices = ("cpu", "cuda") if cuda is None else "cpu"
        made = torch.library.custom_op(
            f"pyrlk::{name}", packed(body), mutates_args=mutates, device_types=devices
        )
        if cuda is not None:
            made.register_kernel("cuda")(packed(device_body))
        made.register_fake(packed(fake))
        return made if mutates else _Eager(made, body, device_body, pack)

    return register


def _on_its_device(body: Callable) -> Callable:
    """The body, while the device of its first tensor is current: Triton launches on that one."""

    @functools.wraps(body)
    def call(x, *args):
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return body(x, *args)
        with torch.cuda.device(x.device):
            return body(x, *args)

    return call


class _Eager:
    """An op that is called without torch.library where nobody would see a difference.

    The dispatcher's way round through Python takes longer than a small kernel: 0.05 ms an op. It is
    taken under a compiler, a mode, a transform, and with subclasses of Tensor.
    """

    def __init__(self, made: Any, cpu: Callable, cuda: Callable, pack: Callable):
        self._made = made
        self._function: Any = None  # the same as one of autograd
        self._body = lambda *args: (cuda if args[0].is_cuda else cpu)(*pack(args))

    def register_autograd(self, backward: Callable, *, setup_context: Callable | None = None):
        self._made.register_autograd(backward, setup_context=setup_context)
        if setup_context is None:
            return

        def forward(ctx, *args):  # setup_context of autograd.Function costs as much as the rest
            output = self._body(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type("Eager", (torch.autograd.Function,), methods)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not _unseen():
            return self._made(*args)
        learns = False
        for x in args:
            if isinstance(x, Tensor):
                if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                    return self._made(*args)
                learns = learns or x.requires_grad
        if not (learns and torch.is_grad_enabled()):
            with torch.no_grad():
                return self._body(*args)
        return (self._made if self._function is None else self._function.apply)(*args)


def _unseen() -> bool:
    """Whether neither a dispatch mode nor a functorch transform is active."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _flattened(body: Callable) -> tuple[inspect.Signature, Callable]:
    """The signature with every NamedTuple spelt out, and what puts flat arguments back in it."""
    whole = inspect.signature(body, eval_str=True)
    groups: list[tuple[type | None, int]] = []
    flat: list[inspect.Parameter] = []
    for parameter in whole.parameters.values():
        kind = parameter.annotation
        if not hasattr(kind, "_fields"):
            groups.append((None, 1))
            flat.append(parameter)
            continue
        fields = typing.get_type_hints(kind)
        groups.append((kind, len(fields)))
        flat += [parameter.replace(name=n, annotation=a) for n, a in fields.items()]

    def pack(args: tuple) -> list:
        out, at = [], 0
        for kind, count in groups:
            out.append(args[at] if kind is None else kind(*args[at : at + count]))
            at += count
        return out

    return whole.replace(parameters=flat), pack


def by_device(*, cpu: Callable, cuda: Callable) -> Callable:
    """The kernel for the device of its first argument, a tensor; called inside an op."""

    def kernel(x: Tensor, *args):
        return (cuda if x.is_cuda else cpu)(x, *args)

    return kernel


def enter_once(ctx: Any, why: str) -> None:
    """Of a backward that may run once; its setup has set `ctx.spent` to False."""
    if ctx.spent:
        raise RuntimeError(f"second backward through the same pyrlk loss: {why}")
    ctx.spent = True


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
    if x is None:
        return None
    if x.dtype == dtype and x.dim() == 1 and x.is_contiguous():
        return x.detach()
    return x.detach().to(dtype).reshape(-1).contiguous()


def empty_gradient(logits: Tensor) -> Tensor:
    """Memory for a gradient: contiguous, whatever the strides of the logits are."""
    return _warm.empty_like(logits, _DTYPE_CODE[logits.dtype])


def scale_gradient(x: Tensor, factor: Tensor) -> None:
    """`scale_` of a gradient in backward, without its op for the usual factor of 1 on the CPU."""
    eager = type(x) is Tensor and not torch.compiler.is_compiling() and _unseen()
    if not (eager and x.is_cpu and float(factor) == 1.0):
        scale_(x, factor)


def _scale_cpu(x: Tensor, factor: Tensor) -> None:
    value = float(factor)
    if value == 1.0:
        return
    if x.is_contiguous():
        _C.scale(x.data_ptr(), _DTYPE_CODE[x.dtype], x.numel(), value, threads())
    else:
        x.mul_(value)


def _scale_cuda(x: Tensor, factor: Tensor) -> None:
    from .triton_kernels import policy_loss

    policy_loss.scale_(x, factor)


_scale = by_device(cpu=_scale_cpu, cuda=_scale_cuda)


@op("scale_", fake=mutates_only, mutates=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place, x contiguous or rows of two strides; a factor of 1 touches nothing."""
    _scale(x, factor)
