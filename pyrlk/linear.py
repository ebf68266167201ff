"""Loss and log-probs from hidden states and the head's weight: the logits [T, V] never exist.

    z = hidden @ weightᵀ (+ bias),  with a softcap z = c·tanh(z/c)         a chunk of rows at a time
    the row kernel of loss.py turns the chunk into ∂z where it lies, in the forward pass, and then
    ∂hidden = ∂z @ weight        ∂weight += ∂zᵀ @ hidden        ∂bias += Σ ∂z      (float32 sums)

Rows without a gradient are dropped before the first product. Sequence-level objectives and
callables take two passes: log-probs, then the same chunks again with the slopes known.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _check, _op, logprob, loss
from .loss import PolicyStats
from .objective import DAPO, KL_KINDS, TIS, Objective

_LINE = 64  # elements: rows of a chunk start on a cache line, whatever V is


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    return_entropy: bool = False,
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
    temperature, vocab_size, return_entropy
        As in `token_logprobs`; rows of weight from vocab_size on are not read.
    chunk : int ≥ 1, optional
        Rows at a time. By default 2048 to 4096 on CUDA, on CPU what 256 MiB of logits hold, and
        evenly split. A number on CUDA also fixes the shape of every product, the last one padded.

    Returns
    -------
    logprob, or (logprob, entropy) : [...] float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A token outside [0, V) is a ValueError with its index on CPU, NaN on
        CUDA.
    """
    settings = _check_head(hidden, weight, bias, softcap, logits_dtype, chunk)
    shape = hidden.shape[:-1]
    tokens = _check.tokens(tokens, hidden, shape, "hidden")
    number, per_token = _check.temperature(temperature, hidden, shape, "hidden")
    vocab = _check.vocab_size(vocab_size, weight, 0)
    with_entropy = _check.flag("return_entropy", return_entropy)
    out = _linear_logprobs(
        hidden, weight, bias, tokens, per_token, number, vocab, *settings, with_entropy
    )
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
    vocab_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
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
    settings = _check_head(hidden, weight, bias, softcap, logits_dtype, chunk)
    shape = hidden.shape[:-1]
    tokens = _check.tokens(tokens, hidden, shape, "hidden")
    options = loss._options(
        hidden,
        shape,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        rollout_logprobs,
        correction,
        cu_seqlens,
        normalizer,
        objective,
        kl_coef,
        kl,
        kl_importance,
        entropy_coef,
        "hidden",
    )
    number, per_token = _check.temperature(temperature, hidden, shape, "hidden")
    vocab = _check.vocab_size(vocab_size, weight, 0)
    _check.flag("return_stats", return_stats)
    if _check.flag("inplace", inplace):
        raise ValueError("inplace must be False: linear_policy_loss holds no logits to overwrite")

    if not loss._one_launch(objective, correction, old_logprobs):
        return loss._two_launches(
            lambda keep: _linear_logprobs(
                hidden, weight, bias, keep, per_token, number, vocab, *settings, True
            ),
            tokens,
            mask,
            old_logprobs,
            advantages,
            objective=objective,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl=kl,
            kl_importance=kl_importance,
            entropy_coef=entropy_coef,
            rollout_logprobs=rollout_logprobs,
            correction=correction,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            return_stats=return_stats,
        )

    leaves = (hidden, weight, bias)
    wants = [x is not None and torch.is_grad_enabled() and x.requires_grad for x in leaves]
    integers, numbers = loss._flatten(
        objective, correction, KL_KINDS.index(kl), kl_coef, kl_importance, entropy_coef
    )
    plain = (None if x is None else x.detach() for x in leaves)
    value, stats, *grads = _linear_policy_loss(
        *plain, tokens, *options, per_token, number, vocab, *settings,
        [*integers, int(return_stats)], numbers, wants,
    )  # fmt: skip
    if any(wants):
        value = _attach_grads(hidden, weight, bias, *grads, value)
    return (value, PolicyStats(*stats.unbind())) if return_stats else value


def _check_head(hidden, weight, bias, softcap, logits_dtype, chunk) -> tuple[float, bool, int]:
    """(softcap or 0, whether logits are wider than their operands, chunk or 0) for the ops."""
    _check.rows(hidden, "hidden", "H")
    dtype, width = hidden.dtype, hidden.shape[-1]
    _check.like("weight", weight, hidden, "hidden")
    if weight.dtype != dtype:
        raise TypeError(f"weight must be {dtype} like hidden, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != width:
        raise ValueError(
            f"weight must have shape [V, {width}] with V ≥ 1, got {list(weight.shape)}"
        )
    if 1 not in weight.stride():
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
    if chunk is not None and _check.integer("chunk", chunk) < 1:
        raise ValueError(f"chunk must be ≥ 1, got {chunk}")
    main_grad = None if torch.compiler.is_compiling() else getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(
            f"weight.main_grad must have shape {list(weight.shape)}, got {list(main_grad.shape)}"
        )
    return float(softcap or 0.0), logits_dtype not in (None, dtype), chunk or 0


class _Head:
    """The products of a chunk of rows with the weight, in buffers that all chunks share.

    ``for part in head.parts()`` names the rows; ``logits(part)`` computes z; a kernel writes ∂z to
    ``slopes(part)``, which is z itself unless the softcap still needs z; ``backward(part)`` turns
    it into dhidden, dweight and dbias.
    """

    def __init__(self, hidden, weight, bias, active, vocab, softcap, wide, chunk, wants):
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.softcap = softcap
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
        self.chunk = _chunk_rows(chunk, self.count, vocab * z_dtype.itemsize, cuda)
        self.padded = _fixed_shapes(hidden)

        def rows(width, of):
            return _buffer(self.chunk, width, of, device)

        self.x = rows(self.hidden.shape[1], self.dtype)
        self.z = rows(vocab, z_dtype)
        # Distinct empty tensors: the results of an op may not share memory.
        self.dhidden, self.dweight, self.dbias = (hidden.new_empty(0) for _ in range(3))
        self.wants = wants
        self.dz = self.z if softcap == 0 or not any(wants) else rows(vocab, z_dtype)
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
            _accumulate(self.dweight[:vocab], dz.t(), x, first=part.start == 0)

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


def _chunk_rows(chunk: int, count: int, row_bytes: int, cuda: bool) -> int:
    """Rows at a time: large enough to hide the traffic of dweight, small beside the model.

    A given `chunk` is kept as it is on CUDA. Otherwise the rows are split evenly, on CUDA in
    multiples of 128, so that the last product is no special case.
    """
    if chunk:
        return chunk if cuda else max(1, min(chunk, count))
    if cuda:
        most = 4096 if 4096 * row_bytes <= 3 << 29 else 2048
    else:
        most = min(4096, max(64, (256 << 20) // row_bytes))
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


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
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


def _blocks(x: Tensor) -> int:
    """Rows whose float32 copy stays in cache, or is small beside a chunk."""
    return max(1, ((64 << 20) if x.is_cuda else (4 << 20)) // (4 * x.shape[1]))


def _softcap_(z: Tensor, c: float) -> None:
    """z = c·tanh(z/c), rounded once."""
    for rows in z.split(_blocks(z)):
        rows.copy_((rows.to(_op.compute_dtype(z)) / c).tanh_().mul_(c))


def _softcap_slope_(dz: Tensor, z: Tensor, c: float) -> None:
    """dz *= ∂(c·tanh(x/c))/∂x = 1 − (z/c)², with z the capped logits."""
    size = _blocks(z)
    for to, rows in zip(dz.split(size), z.split(size), strict=True):
        to.mul_((rows.to(_op.compute_dtype(z)) / c).square_().neg_().add_(1))


@contextlib.contextmanager
def _plain(x: Tensor) -> Iterator[None]:
    """Products as written: autograd sees the op alone, autocast none of it."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def _spread(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Results of the kept rows at their places, 0 elsewhere."""
    return x if index is None else x.new_zeros(count).index_copy_(0, index, x)


def _check_tokens(tokens: Tensor, counted: Tensor, vocab: int) -> None:
    if tokens.device.type == "cpu":
        bad = counted & ((tokens < 0) | (tokens >= vocab))
        _check.bad_token(int(bad.to(torch.int8).argmax()) if bad.any() else -1, tokens, vocab)


def _grads_fake(hidden, weight, wants):
    total = _op.compute_dtype(hidden)
    empty = hidden.new_empty
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if wants[0]
        else empty(0),
        empty(weight.shape, dtype=total) if wants[1] else empty(0),
        empty(weight.shape[0], dtype=total) if wants[2] else empty(0),
    )


def _fused(rows: Callable):
    def linear_policy_loss_op(
        hidden, weight, bias, tokens, old, advantages, mask, ref, rollout, cu, normalizer,
        temperatures, temperature, vocab, softcap, wide, chunk, ints, numbers, wants,
    ):  # fmt: skip
        with _plain(hidden):
            plan = loss._prepare(
                hidden, tokens, None, None, old, advantages, mask, ref, rollout, cu, normalizer,
                temperatures, vocab, ints, numbers,
            )  # fmt: skip
            t, want_stats, count = plan.terms, bool(ints[-1]), plan.tokens.numel()
            active = plan.weight != 0
            _check_tokens(plan.tokens, active, vocab)
            if not want_stats and t.kl_coef == 0 and t.entropy_coef == 0:
                active = active & (plan.advantages != 0)
            head = _Head(hidden, weight, bias, active, vocab, softcap, wide, chunk, wants)
            unit = _unit(plan, hidden.dtype)
            kept = plan._replace(weight=plan.weight / unit)
            kept = kept if head.index is None else kept.take(head.index)
            out = loss._per_token(hidden, plan, head.count, want_stats)
            for part in head.parts():
                z = head.logits(part)
                rows(z, kept.take(part), temperature, vocab, out.take(part), head.slopes(part))
                head.backward(part)
            full = loss._PerToken(
                _spread(out.loss, head.index, count),
                _spread(out.logprob, head.index, count),
                None if out.entropy is None else _spread(out.entropy, head.index, count),
            )
            value, stats = loss._finish(plan, full, want_stats)
            dhidden = head.dhidden.view(_shape(hidden, wants))
            return value, stats, dhidden, head.dweight, head.dbias, unit

    return linear_policy_loss_op


def _unit(plan: loss._Plan, dtype: torch.dtype) -> Tensor:
    """What the op's gradients are in units of: a power of two for float16, else 1.

    1/T of a policy loss is below what float16 resolves, and a loss scale comes only with backward.
    So the largest w·|A| counts as about 1/16 until then.
    """
    one = torch.ones((), dtype=plan.weight.dtype, device=plan.weight.device)
    if dtype != torch.float16 or plan.weight.numel() == 0:
        return one
    size = torch.where(plan.weight != 0, plan.weight * plan.advantages.abs(), 0).amax()
    unit = torch.exp2(torch.log2(size).ceil() + 4)
    return torch.where((size > 1e-30) & (size < 1e30), unit, one)


def _shape(hidden: Tensor, wants) -> torch.Size:
    return hidden.shape if wants[0] else torch.Size([0])


def _fused_fake(hidden, weight, *rest):
    ints, wants = rest[-3], rest[-1]
    value, stats = loss._results_fake(hidden, ints)
    return value, stats, *_grads_fake(hidden, weight, wants), torch.empty_like(value)


@_op.op("linear_policy_loss", fake=_fused_fake, cuda=_fused(loss._rows_cuda))
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    vocab: int,
    softcap: float,
    wide: bool,
    chunk: int,
    integers: list[int],
    numbers: list[float],
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, ∂hidden, ∂weight, ∂bias, the unit of the three).

    Empty where not wanted; ∂weight and ∂bias are float32 sums.
    """
    return _fused(loss._rows_cpu)(
        hidden, weight, bias, tokens, old_logprobs, advantages, mask, ref_logprobs,
        rollout_logprobs, cu_seqlens, normalizer, temperatures, temperature, vocab, softcap, wide,
        chunk, integers, numbers, wants,
    )  # fmt: skip


def _attach(hidden, weight, bias, dhidden, dweight, dbias, unit, value):
    return value.clone()


def _attach_fake(hidden, weight, bias, dhidden, dweight, dbias, unit, value):
    return torch.empty_like(value)


@_op.op("linear_attach_grads", fake=_attach_fake, cuda=_attach)
def _attach_grads(
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
    return _attach(hidden, weight, bias, dhidden, dweight, dbias, unit, value)


def _attach_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[3:7])
    ctx.weight, ctx.dtype, ctx.spent = _megatron(inputs[1]), inputs[1].dtype, False


def _attach_backward(ctx, factor):
    if ctx.spent:
        raise RuntimeError(
            "second backward through the same pyrlk loss: its gradient was handed over by the first"
        )
    ctx.spent = True
    *grads, unit = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise RuntimeError("pyrlk losses are differentiable once: create_graph is not supported")
    needed = ctx.needs_input_grad[:3]
    for grad, wanted in zip(grads, needed, strict=True):
        if wanted:
            _op.scale_(grad, factor * unit)
    return *_hand_over(grads, needed, ctx.weight, ctx.dtype), *(None,) * 5


_attach_grads.register_autograd(_attach_backward, setup_context=_attach_setup)


def _megatron(weight: Tensor) -> Tensor | None:
    """The weight where Megatron has given it a buffer for its gradient."""
    return weight if getattr(weight, "main_grad", None) is not None else None


def _hand_over(grads, needed, megatron: Tensor | None, dtype: torch.dtype):
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


def _score(statistics: Callable):
    def linear_token_logprobs_op(
        hidden, weight, bias, tokens, temperatures, temperature, vocab, softcap, wide, chunk,
        with_entropy,
    ):  # fmt: skip
        with _plain(hidden):
            ids, tau, active = _per_token(hidden, tokens, temperatures)
            _check_tokens(ids, active, vocab)
            if ids.device.type == "cpu":
                _check.temperature_values(tau, active)
            head = _Head(hidden, weight, bias, active, vocab, softcap, wide, chunk, _NONE)
            ids, tau = _take(ids, head.index), _take(tau, head.index)
            lp, h, stats = _results(hidden, head.count, with_entropy)
            for part in head.parts():
                z = head.logits(part)
                at = None if h is None else h[part]
                row = (z, ids[part], None, temperature, _take(tau, part), vocab)
                statistics(*row, lp[part], at, stats[part])
            lp = _spread(lp, head.index, tokens.numel()).view(tokens.shape)
            if h is None:
                return lp, lp.new_empty(0)
            return lp, _spread(h, head.index, tokens.numel()).view(tokens.shape)

    return linear_token_logprobs_op


_NONE = (False, False, False)


def _per_token(hidden, tokens, temperatures):
    dtype = _op.compute_dtype(hidden)
    ids, tau = _op.flat(tokens, torch.int64), _op.flat(temperatures, dtype)
    return ids, tau, ids != -100


def _take(x: Tensor | None, rows: Tensor | slice | None) -> Any:
    return x if x is None or rows is None else x[rows]


def _results(hidden, count: int, with_entropy: bool):
    def empty(*shape):
        return hidden.new_empty(shape, dtype=_op.compute_dtype(hidden))

    return empty(count), empty(count) if with_entropy else None, empty(count, 4)


def _score_fake(hidden, weight, bias, tokens, *rest):
    dtype, shape = _op.compute_dtype(hidden), tokens.shape
    entropy = hidden.new_empty(shape if rest[-1] else (0,), dtype=dtype)
    return hidden.new_empty(shape, dtype=dtype), entropy


@_op.op("linear_token_logprobs", fake=_score_fake, cuda=_score(logprob.statistics_cuda))
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    vocab: int,
    softcap: float,
    wide: bool,
    chunk: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy or an empty tensor)."""
    return _score(logprob.statistics_cpu)(
        hidden, weight, bias, tokens, temperatures, temperature, vocab, softcap, wide, chunk,
        with_entropy,
    )  # fmt: skip


def _again(statistics: Callable, gradient: Callable):
    def linear_token_logprobs_backward_op(
        hidden, weight, bias, tokens, temperatures, temperature, vocab, softcap, wide, chunk,
        slope_logprob, slope_entropy, wants,
    ):  # fmt: skip
        with _plain(hidden):
            ids, tau, active = _per_token(hidden, tokens, temperatures)
            dtype = _op.compute_dtype(hidden)
            g, h = _op.flat(slope_logprob, dtype), _op.flat(slope_entropy, dtype)
            sloped = [x != 0 for x in (g, h) if x is not None]
            active = active & functools.reduce(torch.logical_or, sloped)
            head = _Head(hidden, weight, bias, active, vocab, softcap, wide, chunk, wants)
            ids, tau, g, h = (_take(x, head.index) for x in (ids, tau, g, h))
            lp, entropy, stats = _results(hidden, head.chunk, h is not None)
            for part in head.parts():
                z, size = head.logits(part), slice(0, part.stop - part.start)
                row = (z, ids[part], None, temperature, _take(tau, part), vocab)
                statistics(*row, lp[size], _take(entropy, size), stats[size])
                slopes = _take(g, part), _take(h, part)
                gradient(*row, stats[size], *slopes, head.slopes(part))
                head.backward(part)
            return head.dhidden.view(_shape(hidden, wants)), head.dweight, head.dbias

    return linear_token_logprobs_backward_op


def _again_fake(hidden, weight, *rest):
    return _grads_fake(hidden, weight, rest[-1])


@_op.op(
    "linear_token_logprobs_backward",
    fake=_again_fake,
    cuda=_again(logprob.statistics_cuda, logprob.gradient_cuda),
)
def _linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    vocab: int,
    softcap: float,
    wide: bool,
    chunk: int,
    slope_logprob: Tensor | None,
    slope_entropy: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂hidden, ∂weight, ∂bias) from the slopes of logprob and entropy; the logits come again."""
    return _again(logprob.statistics_cpu, logprob.gradient_cpu)(
        hidden, weight, bias, tokens, temperatures, temperature, vocab, softcap, wide, chunk,
        slope_logprob, slope_entropy, wants,
    )  # fmt: skip


def _score_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest, ctx.with_entropy = inputs[5:10], inputs[10]
    ctx.weight = _megatron(inputs[1])
    ctx.set_materialize_grads(False)


def _score_backward(ctx, g, h):
    needed = ctx.needs_input_grad[:3]
    h = h if ctx.with_entropy else None
    if g is None and h is None:
        return (None,) * 11
    if g is None:
        g = torch.zeros_like(h)
    grads = _linear_logprobs_backward(*ctx.saved_tensors, *ctx.rest, g, h, list(needed))
    dtype = ctx.saved_tensors[1].dtype
    return *_hand_over(grads, needed, ctx.weight, dtype), *(None,) * 8


def _no_double_backward(ctx, *_grads):
    raise RuntimeError(
        "pyrlk.linear_token_logprobs is differentiable once: double backward is not supported"
    )


_linear_logprobs.register_autograd(_score_backward, setup_context=_score_setup)
_linear_logprobs_backward.register_autograd(_no_double_backward)
