"""log π(a) and entropy of each row, differentiable: one sweep forward, one sweep backward.

    logprob = z_a/τ − logsumexp(z/τ)        H = −Σ π·log π        π = softmax(z/τ)
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ],  g = ∂ℓ/∂logprob,  h = ∂ℓ/∂H

Forward reads the logits once and keeps 4 floats a token; backward reads once and writes once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, _check, _op
from . import support as _support
from .support import Support


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
) -> Any:  # Tensor, or (Tensor, Tensor)
    """Log-probability of `tokens` under softmax(logits / temperature), and its entropy on request.

    Parameters
    ----------
    logits : [..., V] float32, float16, bfloat16 (float64 on CPU)
        Any leading shape; rows may be strided, the last stride is 1. −inf is probability 0.
    tokens : [...] int64 or int32
        −100 means: the result is 0, without gradient, and the row is never read.
    temperature : number > 0, or a float tensor of the leading shape
        Gradients carry its 1/τ.
    support : Support, optional
        The kept set of each token: log-prob and entropy are over it alone, the gradient outside it
        is 0. A token outside its kept set is a ValueError on CPU, NaN on CUDA.
    vocab_size : int, optional
        True size under a padded head: columns from there on are not read and get gradient 0.
    return_entropy : bool
        Also return H in nats.

    Returns
    -------
    logprob, or (logprob, entropy) : [...] float32 (float64 for float64 logits)
        Both differentiable once. A row with a NaN, a +inf or nothing but −inf gives NaN.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A token outside [0, V) is a ValueError with its index on CPU, NaN on
        CUDA.
    """
    z = _check.logits(logits)
    shape = z.shape[:-1]
    tokens = _check.tokens(tokens, z, shape)
    number, per_token = _check.temperature(temperature, z, shape)
    vocab = _check.vocab_size(vocab_size, z)
    with_entropy = _check.flag("return_entropy", return_entropy)
    ids, offsets = _support.check(support, z, shape)
    logprob, entropy, _ = _token_logprobs(
        z, tokens, ids, offsets, number, per_token, vocab, with_entropy
    )
    return (logprob, entropy) if with_entropy else logprob


def _outputs(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    dtype = _op.compute_dtype(logits)
    logprob = logits.new_empty(shape, dtype=dtype)
    entropy = logits.new_empty(shape if with_entropy else (0,), dtype=dtype)
    return logprob, entropy, logits.new_empty((*shape, 4), dtype=dtype)


def _forward_fake(logits, tokens, ids, offsets, temperature, temperatures, vocab, with_entropy):
    return _outputs(logits, with_entropy)


def _forward_cuda(logits, tokens, ids, offsets, temperature, temperatures, vocab, with_entropy):
    from .triton_kernels import logprob as kernels

    out = _outputs(logits, with_entropy)
    if out[0].numel():
        kernels.token_logprobs_fwd(
            logits,
            _op.flat(tokens, torch.int64),
            None if ids is None else (ids, offsets),
            temperature if temperatures is None else _op.flat(temperatures, torch.float32),
            vocab,
            out[0].view(-1),
            out[1] if with_entropy else None,
            out[2].view(-1, 4),
        )
    return out


@_op.op("token_logprobs", fake=_forward_fake, cuda=_forward_cuda)
def _token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    vocab: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy or empty, row statistics (m, S, E, z_a))."""
    logprob, entropy, stats = _outputs(logits, with_entropy)
    actions = _op.flat(tokens, torch.int64)
    _check.temperature_values(temperatures, tokens != -100)
    _support.check_values(ids, offsets, vocab)
    tau = _op.flat(temperatures, logprob.dtype)
    bad = _C.token_logprobs(
        _op.rows(logits, vocab),
        actions.data_ptr(),
        (_op.address(ids), _op.address(offsets)),
        (temperature, _op.address(tau)),
        logprob.data_ptr(),
        entropy.data_ptr() if with_entropy else 0,
        stats.data_ptr(),
        _op.threads(),
    )
    _check.bad_token(bad, actions, vocab)
    return logprob, entropy, stats


def _backward_fake(logits, tokens, ids, offsets, temperature, temperatures, vocab, stats, g, h):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward_cuda(logits, tokens, ids, offsets, temperature, temperatures, vocab, stats, g, h):
    from .triton_kernels import logprob as kernels

    grad = _op.empty_gradient(logits)
    if tokens.numel():
        kernels.token_logprobs_bwd(
            logits,
            _op.flat(tokens, torch.int64),
            None if ids is None else (ids, offsets),
            temperature if temperatures is None else _op.flat(temperatures, torch.float32),
            vocab,
            stats.view(-1, 4),
            _op.flat(g, torch.float32),
            _op.flat(h, torch.float32),
            grad,
        )
    return grad


@_op.op("token_logprobs_backward", fake=_backward_fake, cuda=_backward_cuda)
def _token_logprobs_backward(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    vocab: int,
    stats: Tensor,
    g: Tensor | None,
    h: Tensor | None,
) -> Tensor:
    """∂ℓ/∂logits from g = ∂ℓ/∂logprob and h = ∂ℓ/∂H."""
    grad = _op.empty_gradient(logits)
    actions = _op.flat(tokens, torch.int64)
    g, h, tau = (_op.flat(x, stats.dtype) for x in (g, h, temperatures))
    _C.token_logprobs_backward(
        _op.rows(logits, vocab),
        actions.data_ptr(),
        (_op.address(ids), _op.address(offsets)),
        (temperature, _op.address(tau)),
        stats.data_ptr(),
        _op.address(g),
        _op.address(h),
        _op.rows(grad, vocab),
        _op.threads(),
    )
    return grad


def _setup(ctx, inputs, output):
    logits, tokens, ids, offsets, temperature, temperatures, vocab, with_entropy = inputs
    ctx.save_for_backward(logits, tokens, ids, offsets, temperatures, output[2])
    ctx.temperature, ctx.vocab, ctx.with_entropy = temperature, vocab, with_entropy
    ctx.set_materialize_grads(False)


def _backward(ctx, g, h, _stats):
    logits, tokens, ids, offsets, temperatures, stats = ctx.saved_tensors
    if g is None and h is None:
        return (None,) * 8
    h = h if ctx.with_entropy else None
    grad = _token_logprobs_backward(
        logits, tokens, ids, offsets, ctx.temperature, temperatures, ctx.vocab, stats, g, h
    )
    return (grad, *(None,) * 7)


def _no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "pyrlk.token_logprobs is differentiable once: double backward is not supported"
    )


_token_logprobs.register_autograd(_backward, setup_context=_setup)
_token_logprobs_backward.register_autograd(_no_double_backward)
