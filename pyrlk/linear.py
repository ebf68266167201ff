"""Loss and log-probs from hidden states and the head's weight: the logits [T, V] never exist.

    z = hidden @ weightᵀ (+ bias),  with a softcap z = c·tanh(z/c)         a chunk of rows at a time
    the row kernel of loss.py turns the chunk into ∂z where it lies, in the forward pass, and then
    ∂hidden = ∂z @ weight        ∂weight += ∂zᵀ @ hidden        ∂bias += Σ ∂z      (float32 sums)

Rows without a gradient are dropped before the first product. Sequence-level objectives and
callables take two passes: log-probs, then the same chunks again with the slopes known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check, _head, _op, _plan, loss
from . import support as _support
from ._head import Head, Settings
from ._plan import Inputs, Options, PerToken, PolicyStats
from .from_logprobs import two_launches
from .logprob import Rows, gradient, statistics
from .objective import DAPO, TIS, Objective
from .support import Support


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    group: Any = None,
    chunk: int | None = None,
) -> Any:  # Tensor, or (Tensor, Tensor)
    """`token_logprobs` of the logits hidden @ weightᵀ (+ bias), chunk by chunk.

    Backward computes the logits once more. Differentiable once in hidden, weight and bias.

    Parameters
    ----------
    hidden : [..., H] float32, float16, bfloat16 (float64 on CPU)
    weight : [V, H] in the dtype of hidden
    tokens : [...] int64 or int32; −100 gives 0 without gradient, and the row is never read
    bias : [V] in the dtype of hidden, optional
    softcap : number > 0, optional
        z = softcap·tanh(z / softcap), after the bias and before the temperature.
    logits_dtype : torch.dtype, optional
        None: the dtype of hidden. torch.float32: logits of 16-bit operands are not rounded.
    temperature, support, vocab_size, return_entropy, group
        As in `token_logprobs`; rows of weight from vocab_size on are not read. The logits of a
        chunk are computed for the whole vocabulary also where a support keeps few of them.
    chunk : int ≥ 1, optional
        Rows at a time. By default 2048 to 4096 on CUDA, on CPU what 256 MiB of logits hold, and
        evenly split. A number on CUDA also fixes the shape of every product, the last one padded.

    Returns
    -------
    logprob, or (logprob, entropy) : [...] float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A token outside [0, V), or outside its support, is a ValueError with
        its index on CPU, NaN on CUDA.
    """
    settings = _head.checked(hidden, weight, bias, softcap, logits_dtype, chunk)
    shape = hidden.shape[:-1]
    tokens = _check.tokens(tokens, hidden, shape, "hidden")
    number, per_token = _check.temperature(temperature, hidden, shape, "hidden")
    vocab = _check.vocab_size(vocab_size, weight, 0)
    with_entropy = _check.flag("return_entropy", return_entropy)
    _check.no_group(group)
    kept = _support.check(support, hidden, shape, "hidden")
    rows = Rows(tokens, *kept, number, per_token, vocab)
    out = _linear_logprobs(hidden, weight, bias, *rows, *settings, with_entropy)
    return out if with_entropy else out[0]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective: Objective | Callable = DAPO(),  # noqa: B008 - a frozen dataclass
    bias: Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_importance: bool = False,
    entropy_coef: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    correction: TIS | None = None,
    support: Support | None = None,
    vocab_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    group: Any = None,
    inplace: bool = False,
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, PolicyStats)
    """`policy_loss` of the logits hidden @ weightᵀ (+ bias), without ever holding them all.

    The gradients by hidden, weight and bias are computed in the forward pass, for those of the
    three that require one; ∂weight and ∂bias are summed over the chunks in float32. Where `weight`
    has an attribute ``main_grad`` (Megatron), backward adds ∂weight into it in its own dtype, and
    weight.grad stays None.

    Parameters
    ----------
    hidden, weight, bias, softcap, logits_dtype, chunk
        As in `linear_token_logprobs`.
    tokens, old_logprobs, advantages, mask, objective and all others
        As in `policy_loss`, with the leading shape of hidden. inplace must be False: there are no
        logits to overwrite.

    Returns
    -------
    loss : 0-d float32 (float64 for float64), or (loss, PolicyStats)

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU also for values inside tensors.
    RuntimeError
        On a second backward through the same loss, and on a double backward.

    Notes
    -----
    Rows are dropped first: mask 0, token −100, and advantage 0 where neither KL, entropy nor
    statistics need them. On CUDA this reads one count from the device, the call's one
    synchronisation; under CUDA-graph capture all rows are computed instead.
    """
    settings = _head.checked(hidden, weight, bias, softcap, logits_dtype, chunk)
    shape = hidden.shape[:-1]
    tokens = _check.tokens(tokens, hidden, shape, "hidden")
    options = _plan.checked(
        Options(
            old_logprobs,
            advantages,
            mask,
            objective,
            ref_logprobs,
            kl_coef,
            kl,
            kl_importance,
            entropy_coef,
            rollout_logprobs,
            correction,
            cu_seqlens,
            normalizer,
            return_stats,
        ),
        hidden,
        shape,
        "hidden",
    )
    tau = _check.temperature(temperature, hidden, shape, "hidden")
    vocab = _check.vocab_size(vocab_size, weight, 0)
    kept = _support.check(support, hidden, shape, "hidden")
    _check.no_group(group)
    if _check.flag("inplace", inplace):
        raise ValueError("inplace must be False: linear_policy_loss holds no logits to overwrite")

    if not _plan.one_launch(options):

        def score(ids):
            rows = Rows(ids, *kept, *tau, vocab)
            return _linear_logprobs(hidden, weight, bias, *rows, *settings, True)

        return two_launches(score, tokens, options)

    leaves = (hidden, weight, bias)
    wants = [x is not None and torch.is_grad_enabled() and x.requires_grad for x in leaves]
    plain = (None if x is None else x.detach() for x in leaves)
    inputs = _plan.inputs(options, tokens, kept, tau, vocab)
    value, stats, *grads = _linear_policy_loss(*plain, *inputs, *settings, wants)
    if any(wants):
        value = _head.attach_grads(hidden, weight, bias, *grads, value)
    return (value, PolicyStats(*stats.unbind())) if return_stats else value


def _spread(x: Any, index: Tensor | None, count: int) -> Any:
    """Results of the kept rows at their places, 0 elsewhere."""
    return x if x is None or index is None else x.new_zeros(count).index_copy_(0, index, x)


def check_tokens(tokens: Tensor, kept: Support | None, counted: Tensor, vocab: int) -> None:
    """On CPU, before the rows are dropped: indices in errors are the caller's."""
    if tokens.device.type != "cpu":
        return
    _support.check_values(kept, vocab)
    bad = (tokens < 0) | (tokens >= vocab)
    if kept is not None:
        bad = bad | ~_support.holds(kept, tokens)
    bad = bad & counted
    _check.bad_token(int(bad.to(torch.int8).argmax()) if bad.any() else -1, tokens, vocab)


def _linear_policy_loss_fake(hidden, weight, bias, inputs, settings, wants):
    value, stats = _plan.finish_fake(hidden, inputs)
    return value, stats, *_head.grads_fake(hidden, weight, wants), torch.empty_like(value)


@_op.op("linear_policy_loss", fake=_linear_policy_loss_fake)
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Inputs,
    settings: Settings,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, ∂hidden, ∂weight, ∂bias, the unit of the three).

    Empty where not wanted; ∂weight and ∂bias are float32 sums.
    """
    with _head.plain(hidden):
        plan, vocab = _plan.prepare(hidden, inputs), inputs.vocab
        active = plan.weight != 0
        check_tokens(plan.tokens, plan.kept, active, vocab)
        if not plan.want_stats and plan.terms.kl_coef == 0 and plan.terms.entropy_coef == 0:
            active = active & (plan.advantages != 0)
        head = Head(hidden, weight, bias, active, vocab, settings, wants)
        unit = _head.float16_unit(plan.weight * plan.advantages.abs(), hidden.dtype)
        dense = plan._replace(weight=plan.weight / unit)
        dense = dense if head.index is None else dense.take(head.index)
        out = _plan.per_token(hidden, plan, head.count)
        for part in head.parts():
            z, to, slopes = head.logits(part), out.take(part), head.slopes(part)
            loss.row_kernel(z, dense.take(part), inputs.temperature, vocab, to, slopes)
            head.backward(part)
        spread = (_spread(x, head.index, plan.tokens.numel()) for x in out)
        value, stats = _plan.finish(plan, PerToken(*spread))
        return value, stats, *_head.grads(head, hidden, wants), unit


_NONE = (False, False, False)


def _results(hidden, count: int, with_entropy: bool):
    def empty(*shape):
        return hidden.new_empty(shape, dtype=_op.compute_dtype(hidden))

    return empty(count), empty(count) if with_entropy else None, empty(count, 4)


def _logprobs_fake(hidden, weight, bias, rows, settings, with_entropy):
    dtype, shape = _op.compute_dtype(hidden), rows.tokens.shape
    entropy = hidden.new_empty(shape if with_entropy else (0,), dtype=dtype)
    return hidden.new_empty(shape, dtype=dtype), entropy


@_op.op("linear_token_logprobs", fake=_logprobs_fake)
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    settings: Settings,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy or an empty tensor)."""
    with _head.plain(hidden):
        at = rows.flat(_op.compute_dtype(hidden))
        active = at.tokens != -100
        check_tokens(at.tokens, at.kept, active, at.vocab)
        if hidden.device.type == "cpu":
            _check.temperature_values(at.temperatures, active)
        head = Head(hidden, weight, bias, active, at.vocab, settings, _NONE)
        at = at if head.index is None else at.take(head.index)
        logprob, entropy, stats = _results(hidden, head.count, with_entropy)
        for part in head.parts():
            h = None if entropy is None else entropy[part]
            statistics(head.logits(part), at.take(part), logprob[part], h, stats[part])
        shape = rows.tokens.shape
        logprob = _spread(logprob, head.index, shape.numel()).view(shape)
        if entropy is None:
            return logprob, logprob.new_empty(0)
        return logprob, _spread(entropy, head.index, shape.numel()).view(shape)


def _logprobs_backward_fake(hidden, weight, bias, rows, settings, g, h, wants):
    return _head.grads_fake(hidden, weight, wants)


@_op.op("linear_token_logprobs_backward", fake=_logprobs_backward_fake)
def _linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    settings: Settings,
    g: Tensor | None,
    h: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂hidden, ∂weight, ∂bias) from g = ∂ℓ/∂logprob and h = ∂ℓ/∂H; the logits come again."""
    with _head.plain(hidden):
        dtype = _op.compute_dtype(hidden)
        at, g, h = rows.flat(dtype), _op.flat(g, dtype), _op.flat(h, dtype)
        sloped = [x != 0 for x in (g, h) if x is not None]
        active = (at.tokens != -100) & functools.reduce(torch.logical_or, sloped)
        head = Head(hidden, weight, bias, active, at.vocab, settings, wants)
        if head.index is not None:
            at, g, h = at.take(head.index), _take(g, head.index), _take(h, head.index)
        logprob, entropy, stats = _results(hidden, head.chunk, h is not None)
        for part in head.parts():
            z, here, size = head.logits(part), at.take(part), slice(0, part.stop - part.start)
            statistics(z, here, logprob[size], _take(entropy, size), stats[size])
            gradient(z, here, stats[size], _take(g, part), _take(h, part), head.slopes(part))
            head.backward(part)
        return _head.grads(head, hidden, wants)


def _take(x: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if x is None else x[rows]


def _logprobs_setup(ctx, inputs, output):
    rows = Rows(*inputs[3:9])
    tensors = rows.tokens, rows.ids, rows.offsets, rows.temperatures
    ctx.save_for_backward(*inputs[:3], *tensors)
    ctx.temperature, ctx.vocab = rows.temperature, rows.vocab
    ctx.settings, ctx.with_entropy = inputs[9:12], inputs[12]
    ctx.megatron = _head.megatron_weight(inputs[1])
    ctx.set_materialize_grads(False)


def _logprobs_backward(ctx, g, h):
    needed = ctx.needs_input_grad[:3]
    h = h if ctx.with_entropy else None
    if g is None and h is None:
        return (None,) * 13
    *leaves, tokens, ids, offsets, temperatures = ctx.saved_tensors
    rows = Rows(tokens, ids, offsets, ctx.temperature, temperatures, ctx.vocab)
    grads = _linear_logprobs_backward(*leaves, *rows, *ctx.settings, g, h, list(needed))
    return *_head.hand_over(grads, needed, ctx.megatron, leaves[1].dtype), *(None,) * 10


def _no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "pyrlk.linear_token_logprobs is differentiable once: double backward is not supported"
    )


_linear_logprobs.register_autograd(_logprobs_backward, setup_context=_logprobs_setup)
_linear_logprobs_backward.register_autograd(_no_double_backward)
