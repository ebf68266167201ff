"""The raw REINFORCE gradient by the logits: A·(π − e_a)/τ, without autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C, _check, _op
from ._rows import check_tokens


def reinforce_grad(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """A·(π − e_a)/τ: the gradient of −A·log π(a) by the logits, π = softmax(logits / τ).

    Parameters
    ----------
    logits : [..., V] float32, float16, bfloat16 (float64 on CPU), last stride 1
    tokens : [...] int64 or int32; −100 gives a zero row, which is not read
    advantages : [...] float; 0 gives a zero row
    temperature : number > 0, or [...] float
    out : tensor like logits, optional
        Receives the result; it may be the logits themselves.

    Returns
    -------
    [..., V] in the dtype of the logits; each row sums to 0 up to rounding. Not differentiable.
    """
    z = _check.logits(logits)
    shape = z.shape[:-1]
    tokens = _check.tokens(tokens, z, shape)
    advantages = _check.floating("advantages", advantages, z, shape)
    number, per_token = _check.temperature(temperature, z, shape)
    z = z.detach()
    if out is None:
        out = _op.empty_gradient(z)
    else:
        _check.shaped("out", _check.logits(_check.like("out", out, z), "out"), z.shape)
        if out.dtype != z.dtype:
            raise TypeError(f"out must be {z.dtype} like logits, got {out.dtype}")
        if out.requires_grad:
            raise ValueError("out must not require grad")
        _check.disjoint_rows(out, "out: its rows overlap")
    _reinforce_grad(z, tokens, advantages.detach(), number, per_token, out)
    return out


def _grad_cpu(logits, tokens, advantages, temperature, temperatures, out) -> None:
    _check.temperature_values(temperatures, tokens != -100)
    dtype, vocab = _op.compute_dtype(logits), logits.shape[-1]
    ids = _op.flat(tokens, torch.int64)
    scale, tau = _op.flat(advantages, dtype), _op.flat(temperatures, dtype)
    bad = _C.reinforce_grad(
        _op.rows(logits, vocab),
        ids.data_ptr(),
        _op.address(scale),
        (temperature, _op.address(tau)),
        _op.rows(out, vocab),
        _op.threads(),
    )
    _check.bad_token(bad, ids, vocab)


def _grad_cuda(logits, tokens, advantages, temperature, temperatures, out):
    from .triton_kernels import policy_loss as kernels

    if tokens.numel():
        if _check.reads_values(logits):
            _check.temperature_values(temperatures, tokens != -100)
            check_tokens(tokens.reshape(-1), None, tokens.reshape(-1) != -100, logits.shape[-1])
        tau = temperature if temperatures is None else _op.flat(temperatures, torch.float32)
        ids, scale = _op.flat(tokens, torch.int64), _op.flat(advantages, torch.float32)
        kernels.reinforce_grad(logits, ids, scale, tau, out)


_grad = _op.by_device(cpu=_grad_cpu, cuda=_grad_cuda)


@_op.op("reinforce_grad", fake=_op.mutates_only, mutates=("out",))
def _reinforce_grad(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    out: Tensor,
) -> None:
    _grad(logits, tokens, advantages, temperature, temperatures, out)
