"""log π(a) and entropy of each row, differentiable: one sweep forward, one sweep backward.

    logprob = z_a/τ − logsumexp(z/τ)        H = −Σ π·log π        π = softmax(z/τ)
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ],  g = ∂ℓ/∂logprob,  h = ∂ℓ/∂H

Forward reads the logits once and keeps 4 floats a token; backward reads once and writes once.
"""

from __future__ import annotations

from collections.abc import Callable
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


def statistics_cpu(
    logits, actions, kept, temperature, temperatures, vocab, logprob, entropy, stats
) -> None:
    """Fills logprob, entropy (unless None) and stats [T, 4]; all flat, of the compute dtype."""
    _support.check_values(kept, vocab)
    bad = _C.token_logprobs(
        _op.rows(logits, vocab),
        actions.data_ptr(),
        _support.addresses(kept),
        (temperature, _op.address(temperatures)),
        logprob.data_ptr(),
        _op.address(entropy),
        stats.data_ptr(),
        _op.threads(),
    )
    _check.bad_token(bad, actions, vocab)


def statistics_cuda(
    logits, actions, kept, temperature, temperatures, vocab, logprob, entropy, stats
) -> None:
    from .triton_kernels import logprob as kernels

    if actions.numel():
        tau = temperature if temperatures is None else temperatures
        kernels.token_logprobs_fwd(
            logits, actions, kept, tau, vocab, logprob.view(-1), entropy, stats.view(-1, 4)
        )


def gradient_cpu(
    logits, actions, kept, temperature, temperatures, vocab, stats, g, h, grad
) -> None:
    """Fills grad, which may be logits, from the statistics and the slopes (None is 0)."""
    _C.token_logprobs_backward(
        _op.rows(logits, vocab),
        actions.data_ptr(),
        _support.addresses(kept),
        (temperature, _op.address(temperatures)),
        stats.data_ptr(),
        _op.address(g),
        _op.address(h),
        _op.rows(grad, vocab),
        _op.threads(),
    )


def gradient_cuda(
    logits, actions, kept, temperature, temperatures, vocab, stats, g, h, grad
) -> None:
    from .triton_kernels import logprob as kernels

    if actions.numel():
        tau = temperature if temperatures is None else temperatures
        kernels.token_logprobs_bwd(logits, actions, kept, tau, vocab, stats.view(-1, 4), g, h, grad)


def _forward(statistics: Callable):
    def token_logprobs_op(
        logits, tokens, ids, offsets, temperature, temperatures, vocab, with_entropy
    ):
        out = logprob, entropy, stats = _outputs(logits, with_entropy)
        if logits.device.type == "cpu":
            _check.temperature_values(temperatures, tokens != -100)
        tau, actions = _op.flat(temperatures, stats.dtype), _op.flat(tokens, torch.int64)
        wanted, kept = entropy if with_entropy else None, _support.pair(ids, offsets)
        statistics(logits, actions, kept, temperature, tau, vocab, logprob, wanted, stats)
        return out

    return token_logprobs_op


@_op.op("token_logprobs", fake=_forward_fake, cuda=_forward(statistics_cuda))
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
    return _forward(statistics_cpu)(
        logits, tokens, ids, offsets, temperature, temperatures, vocab, with_entropy
    )


def _backward_fake(logits, tokens, ids, offsets, temperature, temperatures, vocab, stats, g, h):
    return _op.empty_gradient(logits)


def _backward_by(gradient: Callable):
    def token_logprobs_backward_op(
        logits, tokens, ids, offsets, temperature, temperatures, vocab, stats, g, h
    ):
        grad = _op.empty_gradient(logits)
        g, h, tau = (_op.flat(x, stats.dtype) for x in (g, h, temperatures))
        actions, kept = _op.flat(tokens, torch.int64), _support.pair(ids, offsets)
        gradient(logits, actions, kept, temperature, tau, vocab, stats, g, h, grad)
        return grad

    return token_logprobs_backward_op


@_op.op("token_logprobs_backward", fake=_backward_fake, cuda=_backward_by(gradient_cuda))
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
    return _backward_by(gradient_cpu)(
        logits, tokens, ids, offsets, temperature, temperatures, vocab, stats, g, h
    )


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
