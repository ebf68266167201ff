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
from ._rows import Actions, Rows, check_tokens
from .parallel import vocab as _vocab
from .parallel.vocab import Shard
from .support import Support


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    group: Any = None,
) -> Any:  # Tensor, or (Tensor, Tensor)
    """Log-probability of `tokens` under softmax(logits / temperature), and its entropy on request.

    Parameters
    ----------
    logits : [..., V] float32, float16, bfloat16 (float64 on CPU)
        Any leading shape; rows may be strided, the last stride is 1. −inf is probability 0. A
        DTensor sharded on the vocabulary names its own group and gets its gradient as one.
    tokens : [...] int64 or int32
        −100 means: the result is 0, without gradient, and the row is never read.
    temperature : number > 0, or a float tensor of the leading shape
        Gradients carry its 1/τ.
    support : Support, optional
        The kept set of each token: log-prob and entropy are over it alone, the gradient outside it
        is 0. A token outside its kept set is a ValueError on CPU, NaN on CUDA; so is there a row
        that overflowed the sampler's buffer, until `support.trim()`.
    vocab_size : int, optional
        True size under a padded head: columns from there on are not read and get gradient 0.
    return_entropy : bool
        Also return H in nats.
    group : torch.distributed.ProcessGroup, optional
        The vocabulary is sharded over its ranks: logits hold the next columns [..., V_local] in
        rank order, as many as there are (0 too). All else is the same on every rank: tokens are
        ids of the whole vocabulary, and vocab_size is its true size. One all-gather of 4 floats a
        token; every rank has the same results, and the gradient of its own columns.

    Returns
    -------
    logprob, or (logprob, entropy) : [...] float32 (float64 for float64 logits)
        Both differentiable once. A row with a NaN, a +inf or nothing but −inf gives NaN.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A token outside [0, V) is a ValueError with its index on CPU and under
        PYRLK_CHECK=1, else NaN on CUDA.
    """
    z, shard = _vocab.find("logits", logits, -1, group)
    z = _check.logits(z, sharded=shard.sharded)
    shape = z.shape[:-1]
    tokens = _check.tokens(tokens, z, shape)
    number, per_token = _check.temperature(temperature, z, shape)
    vocab = _vocab.vocab_size(vocab_size, z, -1, shard)
    with_entropy = _check.flag("return_entropy", return_entropy)
    rows = Rows(tokens, *_support.check(support, z, shape), number, per_token, vocab)
    logprob, entropy, *_ = score(z, *rows, *shard, with_entropy, False)
    return (logprob, entropy) if with_entropy else logprob


def _outputs(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    dtype = _op.compute_dtype(logits)
    logprob = logits.new_empty(shape, dtype=dtype)
    entropy = logits.new_empty(shape if with_entropy else (0,), dtype=dtype)
    return logprob, entropy, logits.new_empty((*shape, 4), dtype=dtype)


def _statistics_cpu(logits, at: Actions, logprob, entropy, stats) -> None:
    bad = _C.token_logprobs(
        _op.rows(logits, at.vocab),
        at.tokens.data_ptr(),
        _support.addresses(at.kept),
        (at.temperature, _op.address(at.temperatures)),
        logprob.data_ptr(),
        _op.address(entropy),
        stats.data_ptr(),
        _op.threads(),
    )
    _check.bad_token(bad, at.tokens, at.vocab)


def _statistics_cuda(logits, at: Actions, logprob, entropy, stats) -> None:
    from .triton_kernels import logprob as kernels

    if at.tokens.numel():
        tau = at.temperature if at.temperatures is None else at.temperatures
        kernels.token_logprobs_fwd(
            logits, at.tokens, at.kept, tau, at.vocab, logprob.view(-1), entropy, stats.view(-1, 4)
        )


# Fills logprob, entropy (unless None) and stats [T, 4], all of the compute dtype.
statistics = _op.by_device(cpu=_statistics_cpu, cuda=_statistics_cuda)


def _gradient_cpu(logits, at: Actions, stats, g, h, grad) -> None:
    _C.token_logprobs_backward(
        _op.rows(logits, at.vocab),
        at.tokens.data_ptr(),
        _support.addresses(at.kept),
        (at.temperature, _op.address(at.temperatures)),
        stats.data_ptr(),
        _op.address(g),
        _op.address(h),
        _op.rows(grad, at.vocab),
        _op.threads(),
    )


def _gradient_cuda(logits, at: Actions, stats, g, h, grad) -> None:
    from .triton_kernels import logprob as kernels

    if grad.numel():
        tau = at.temperature if at.temperatures is None else at.temperatures
        kernels.token_logprobs_bwd(
            logits, at.tokens, at.kept, tau, at.vocab, stats.view(-1, 4), g, h, grad
        )


# Fills grad, which may be logits, from the statistics and the slopes g, h (None is 0).
gradient = _op.by_device(cpu=_gradient_cpu, cuda=_gradient_cuda)


def _score_fake(logits, rows, shard, with_entropy, inplace):
    first = torch.empty((), dtype=torch.int64, device="cpu")
    return *_outputs(logits, with_entropy), first


@_op.op("token_logprobs", fake=_score_fake)
def score(
    logits: Tensor, rows: Rows, shard: Shard, with_entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy or empty, row statistics (m, S, E, z_a), first id of the shard or −1).

    With `inplace` its backward, not this, writes the gradient over the logits.
    """
    logprob, entropy, stats = _outputs(logits, with_entropy)
    at = rows.flat(stats.dtype)
    if _check.reads_values(logits):
        _check.temperature_values(rows.temperatures, rows.tokens != -100)
    if shard.sharded:

        def local(columns: Actions, out: Tensor) -> None:
            statistics(logits, columns, logprob, entropy if with_entropy else None, out)

        whole = _vocab.score(local, at, shard, logits.shape[-1], logits)
        for to, values in zip((logprob, entropy, stats), whole, strict=False):
            if to is not entropy or with_entropy:
                to.copy_(values.view_as(to))
        return logprob, entropy, stats, whole[-1]
    if logits.device.type == "cpu":
        _support.check_values(at.kept, at.vocab)
    if logits.is_cuda:  # the CPU kernel checks what it reads
        check_tokens(at.tokens, at.kept, at.tokens != -100, at.vocab)
    statistics(logits, at, logprob, entropy if with_entropy else None, stats)
    return logprob, entropy, stats, torch.full((), -1, device="cpu")


def _backward_rows(logits, rows: Rows, first, stats, g, h, grad) -> None:
    at = _vocab.mine(rows.flat(stats.dtype), first, logits.shape[-1])
    g, h = _op.flat(g, stats.dtype), _op.flat(h, stats.dtype)
    gradient(logits, at, stats, g, h, grad)


def _backward_fake(logits, rows, first, stats, g, h):
    return _op.empty_gradient(logits)


@_op.op("token_logprobs_backward", fake=_backward_fake)
def _token_logprobs_backward(
    logits: Tensor, rows: Rows, first: Tensor, stats: Tensor, g: Tensor | None, h: Tensor | None
) -> Tensor:
    """∂ℓ/∂logits from g = ∂ℓ/∂logprob and h = ∂ℓ/∂H."""
    grad = _op.empty_gradient(logits)
    _backward_rows(logits, rows, first, stats, g, h, grad)
    return grad


@_op.op("token_logprobs_backward_", fake=_op.mutates_only, mutates=("logits",))
def _token_logprobs_backward_(
    logits: Tensor, rows: Rows, first: Tensor, stats: Tensor, g: Tensor | None, h: Tensor | None
) -> None:
    """The same; the gradient takes the place of the logits."""
    _backward_rows(logits, rows, first, stats, g, h, logits)


def _setup(ctx, inputs, output):
    rows = Rows(*inputs[1:7])
    tensors = rows.tokens, rows.ids, rows.offsets, rows.temperatures
    ctx.save_for_backward(inputs[0], *tensors, output[3], output[2])
    ctx.temperature, ctx.vocab = rows.temperature, rows.vocab
    ctx.with_entropy, ctx.inplace = inputs[9:]
    ctx.set_materialize_grads(False)


def _backward(ctx, g, h, *_constants):
    if g is None and h is None:
        return (None,) * 11
    logits, tokens, ids, offsets, temperatures, first, stats = ctx.saved_tensors
    rows = Rows(tokens, ids, offsets, ctx.temperature, temperatures, ctx.vocab)
    h = h if ctx.with_entropy else None
    if not ctx.inplace:
        return (_token_logprobs_backward(logits, *rows, first, stats, g, h), *(None,) * 10)
    if torch.is_grad_enabled():
        raise RuntimeError("pyrlk losses are differentiable once: create_graph is not supported")
    grad = logits.detach()
    _token_logprobs_backward_(grad, *rows, first, stats, g, h)
    return (grad, *(None,) * 10)


def _no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "pyrlk.token_logprobs is differentiable once: double backward is not supported"
    )


score.register_autograd(_backward, setup_context=_setup)
_token_logprobs_backward.register_autograd(_no_double_backward)
