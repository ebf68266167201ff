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
from ._rows import Actions, Rows, check_tokens
from .from_logprobs import two_launches
from .logprob import gradient, statistics
from .objective import DAPO, TIS, Objective
from .parallel import vocab as _vocab
from .parallel.vocab import Shard
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
    temperature, support, vocab_size, return_entropy
        As in `token_logprobs`; rows of weight from vocab_size on are not read. The logits of a
        chunk are computed for the whole vocabulary also where a support keeps few of them.
    group : torch.distributed.ProcessGroup, optional
        The vocabulary is sharded over its ranks, as in `token_logprobs`: weight [V_local, H] and
        bias [V_local]; hidden is the same on every rank, and so is ∂hidden, which backward sums
        over the ranks. A DTensor weight sharded on the vocabulary names its own group.
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
    leaves, shard = _leaves(hidden, weight, bias, group)
    settings = _head.checked(*leaves, softcap, logits_dtype, chunk, shard.sharded)
    hidden, weight, bias = leaves
    shape = hidden.shape[:-1]
    tokens = _check.tokens(tokens, hidden, shape, "hidden")
    number, per_token = _check.temperature(temperature, hidden, shape, "hidden")
    vocab = _vocab.vocab_size(vocab_size, weight, 0, shard)
    with_entropy = _check.flag("return_entropy", return_entropy)
    kept = _support.check(support, hidden, shape, "hidden")
    rows = Rows(tokens, *kept, number, per_token, vocab)
    out = _linear_logprobs(hidden, weight, bias, *rows, *shard, *settings, with_entropy)
    return out[:2] if with_entropy else out[0]


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
    hidden, weight, bias, softcap, logits_dtype, group, chunk
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
    leaves, shard = _leaves(hidden, weight, bias, group)
    settings = _head.checked(*leaves, softcap, logits_dtype, chunk, shard.sharded)
    hidden, weight, bias = leaves
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
    vocab = _vocab.vocab_size(vocab_size, weight, 0, shard)
    kept = _support.check(support, hidden, shape, "hidden")
    if _check.flag("inplace", inplace):
        raise ValueError("inplace must be False: linear_policy_loss holds no logits to overwrite")

    if shard.sharded or not _plan.one_launch(options):

        def score(ids):
            rows = Rows(ids, *kept, *tau, vocab)
            return _linear_logprobs(*leaves, *rows, *shard, *settings, True)[:2]

        return two_launches(score, tokens, options)

    wants = [x is not None and torch.is_grad_enabled() and x.requires_grad for x in leaves]
    plain = (None if x is None else x.detach() for x in leaves)
    inputs = _plan.inputs(options, tokens, kept, tau, vocab)
    value, stats, *grads = _linear_policy_loss(*plain, *inputs, *settings, wants)
    if any(wants):
        value = _head.attach_grads(hidden, weight, bias, *grads, value)
    return (value, PolicyStats(*stats.unbind())) if return_stats else value


def _leaves(hidden, weight, bias, group) -> tuple[tuple[Tensor, Tensor, Tensor | None], Shard]:
    """The tensors on this rank; a DTensor's gradient becomes one again on its way back."""
    weight, shard = _vocab.find("weight", weight, 0, group)
    if bias is not None:
        bias, own = _vocab.find("bias", bias, 0, None)
        if own.sharded and own != shard:
            raise ValueError("bias must be a tensor or a DTensor that is sharded as weight is")
    return (_vocab.replicated("hidden", hidden), weight, bias), shard


def _spread(x: Any, index: Tensor | None, count: int) -> Any:
    """Results of the kept rows at their places, 0 elsewhere."""
    return x if x is None or index is None else x.new_zeros(count).index_copy_(0, index, x)


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


def _logprobs_fake(hidden, weight, bias, rows, shard, settings, with_entropy):
    dtype, shape = _op.compute_dtype(hidden), rows.tokens.shape
    entropy = hidden.new_empty(shape if with_entropy else (0,), dtype=dtype)
    stats = hidden.new_empty((shape.numel() if shard.sharded else 0, 4), dtype=dtype)
    first = torch.empty((), dtype=torch.int64, device="cpu")
    return hidden.new_empty(shape, dtype=dtype), entropy, stats, first


@_op.op("linear_token_logprobs", fake=_logprobs_fake)
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    shard: Shard,
    settings: Settings,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy or empty, of a shard the row statistics and its first id)."""
    with _head.plain(hidden):
        at = rows.flat(_op.compute_dtype(hidden))
        active = at.tokens != -100
        if _check.reads_values(hidden):
            _check.temperature_values(at.temperatures, active)

        def score(at: Actions):
            head = Head(hidden, weight, bias, active, at.vocab, settings, _NONE)
            at = at if head.index is None else at.take(head.index)
            logprob, entropy, stats = _results(hidden, head.count, with_entropy)
            for part in head.parts():
                h = None if entropy is None else entropy[part]
                statistics(head.logits(part), at.take(part), logprob[part], h, stats[part])
            return head.index, logprob, entropy, stats

        def local(at: Actions, out: Tensor) -> None:
            index, *_, stats = score(at)
            out.copy_(stats) if index is None else out.zero_().index_copy_(0, index, stats)

        shape = rows.tokens.shape
        if shard.sharded:
            logprob, entropy, stats, first = _vocab.score(local, at, shard, len(weight), hidden)
        else:
            check_tokens(at.tokens, at.kept, active, at.vocab)
            index, logprob, entropy, _ = score(at)
            logprob, entropy = (_spread(x, index, shape.numel()) for x in (logprob, entropy))
            stats, first = logprob.new_empty(0, 4), torch.full((), -1, device="cpu")
        entropy = entropy.view(shape) if with_entropy else logprob.new_empty(0)
        return logprob.view(shape), entropy, stats, first


def _logprobs_backward_fake(hidden, weight, bias, rows, shard, settings, first, stats, g, h, wants):
    return _head.grads_fake(hidden, weight, wants)


@_op.op("linear_token_logprobs_backward", fake=_logprobs_backward_fake)
def _linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    shard: Shard,
    settings: Settings,
    first: Tensor,
    stats: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂hidden, ∂weight, ∂bias) from g = ∂ℓ/∂logprob and h = ∂ℓ/∂H; the logits come again.

    So do the statistics, but for a shard: there they are those of the whole rows, and all rows of
    the forward are computed, so that the products are the same.
    """
    with _head.plain(hidden):
        dtype = _op.compute_dtype(hidden)
        at, g, h = rows.flat(dtype), _op.flat(g, dtype), _op.flat(h, dtype)
        active = at.tokens != -100
        if not shard.sharded:
            sloped = [x != 0 for x in (g, h) if x is not None]
            active = active & functools.reduce(torch.logical_or, sloped)
        at = _vocab.mine(at, first, len(weight))
        head = Head(hidden, weight, bias, active, at.vocab, settings, wants)
        if head.index is not None:
            at, g, h = at.take(head.index), _take(g, head.index), _take(h, head.index)
            stats = stats[head.index] if shard.sharded else stats
        logprob, entropy, again = _results(hidden, head.chunk, h is not None)
        for part in head.parts():
            z, here, size = head.logits(part), at.take(part), slice(0, part.stop - part.start)
            if shard.sharded:
                row = stats[part]
            else:
                row = again[size]
                statistics(z, here, logprob[size], _take(entropy, size), row)
            gradient(z, here, row, _take(g, part), _take(h, part), head.slopes(part))
            head.backward(part)
        dhidden, dweight, dbias = _head.grads(head, hidden, wants)
        if shard.sharded and wants[0]:
            dhidden = _vocab.summed(dhidden, shard)
        return dhidden, dweight, dbias


def _take(x: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if x is None else x[rows]


def _logprobs_setup(ctx, inputs, output):
    rows = Rows(*inputs[3:9])
    tensors = rows.tokens, rows.ids, rows.offsets, rows.temperatures
    ctx.save_for_backward(*inputs[:3], *tensors, *output[2:])
    ctx.temperature, ctx.vocab = rows.temperature, rows.vocab
    ctx.how, ctx.with_entropy = inputs[9:14], inputs[14]  # shard and settings
    ctx.megatron = _head.megatron_weight(inputs[1])
    ctx.set_materialize_grads(False)


def _logprobs_backward(ctx, g, h, *_constants):
    needed = ctx.needs_input_grad[:3]
    h = h if ctx.with_entropy else None
    if g is None and h is None:
        return (None,) * 15
    *leaves, tokens, ids, offsets, temperatures, stats, first = ctx.saved_tensors
    rows = Rows(tokens, ids, offsets, ctx.temperature, temperatures, ctx.vocab)
    grads = _linear_logprobs_backward(*leaves, *rows, *ctx.how, first, stats, g, h, list(needed))
    return *_head.hand_over(grads, needed, ctx.megatron, leaves[1].dtype), *(None,) * 12


def _no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "pyrlk.linear_token_logprobs is differentiable once: double backward is not supported"
    )


_linear_logprobs.register_autograd(_logprobs_backward, setup_context=_logprobs_setup)
_linear_logprobs_backward.register_autograd(_no_double_backward)
