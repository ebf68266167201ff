"""Policy losses on logits: statistics → objective → gradient of a row, read once and written once.

    loss = Σ_t w_t·[ ℓ_t + kl_coef·KL_t − entropy_coef·H_t ]         (objective.py has ℓ, KL and w)
    ∂loss/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ],  g = w·∂ℓ/∂logp,  h = −w·entropy_coef

The gradient is computed in the forward pass, because the loss is a scalar: backward only scales it.
What cannot be one launch (a sequence ratio, a callable, a correction without old log-probs) goes
through token_logprobs and from_logprobs.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from . import _C, _check, _op, _plan, logprob
from . import support as _support
from ._plan import Inputs, Options, Plan, PolicyStats
from ._rows import check_tokens
from .from_logprobs import two_launches
from .objective import DAPO, REINFORCE, TIS, Objective
from .parallel import vocab as _vocab
from .support import Support

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Common(TypedDict, total=False):
    """The options that every policy loss on logits has; `policy_loss` says what they mean."""

    temperature: float | Tensor
    ref_logprobs: Tensor | None
    kl_coef: float
    kl: str
    kl_importance: bool
    entropy_coef: float
    rollout_logprobs: Tensor | None
    correction: TIS | None
    support: Support | None
    vocab_size: int | None
    cu_seqlens: Tensor | None
    normalizer: float | Tensor | None
    group: Any
    inplace: bool
    return_stats: bool


def _with_common(loss: Callable) -> Callable:
    """help() and inspect show the common options with their defaults, and not `**common`."""
    own = inspect.signature(loss)
    options = inspect.signature(policy_loss).parameters
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    loss.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*kept, *(options[name] for name in Common.__annotations__)]
    )
    return loss


def dapo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    **common: Unpack[Common],
) -> Any:
    """DAPO's clip-higher policy loss with one denominator over all tokens (arXiv 2503.14476).

        loss = −Σ m·min(r·A, clip(r, 1−eps_low, 1+eps_high)·A) / Σ m,   r = exp(logπ(token) − old)

    `policy_loss` with ``objective=DAPO(eps_low, eps_high)``: see there for shapes, the common
    options and errors.
    """
    objective = DAPO(eps_low=eps_low, eps_high=eps_high)
    return policy_loss(
        logits, tokens, old_logprobs, advantages, mask, objective=objective, **common
    )


def reinforce_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    **common: Unpack[Common],
) -> Any:
    """REINFORCE: loss = −Σ m·A·logπ(token) / Σ m, whose gradient is m·A·(π − e_a)/τ / Σ m.

    `policy_loss` with ``objective=REINFORCE()``: see there for shapes, the common options and
    errors.
    """
    return policy_loss(logits, tokens, None, advantages, mask, objective=REINFORCE(), **common)


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective: Objective | Callable = DAPO(),  # noqa: B008 - a frozen dataclass
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
    """A policy-gradient loss on logits, with the gradient computed in the same pass over them.

    Parameters
    ----------
    logits : [..., V] float32, float16, bfloat16 (float64 on CPU), last stride 1
    tokens : [...] int64 or int32; −100 counts as mask 0
    old_logprobs : [...] float, or None
        Log-probs of the policy before this update. None is on-policy: the ratio is 1.
    advantages : [...] float, or one a sequence
        One a sequence: [B] beside logits [B, L, V], or [S] beside cu_seqlens.
    mask : [...] bool, int or float weight ≥ 0, optional
        Where it is 0 nothing else is read, NaN included, and the gradient is 0.
    objective : an objective of pyrlk, or a callable
        A callable takes (logprobs, old_logprobs, advantages, mask) and returns per-token losses,
        which are averaged over the mask, or a 0-d loss; it runs through token_logprobs and
        autograd.
    temperature : number > 0, or [...] float
    ref_logprobs, kl_coef, kl, kl_importance
        Adds kl_coef·KL(policy‖ref) by the estimator "k1", "k2" or "k3" with its exact gradient;
        kl_importance multiplies it by the ratio, gradient included.
    entropy_coef : number
        Subtracts entropy_coef·H, with its true gradient.
    rollout_logprobs, correction
        The engine's own log-probs, and TIS(...): w = exp(old − rollout), truncated, detached,
        multiplies the policy term.
    support : Support, optional
        The kept set of each token: the policy is over it alone, the gradient outside it is 0. On
        CUDA a row that overflowed the sampler's buffer gives NaN until `support.trim()`.
    vocab_size : int, optional
        Columns from there on are padding: not read, gradient 0.
    cu_seqlens : [sequences + 1] int32 or int64, optional
        Bounds of packed sequences, 0 … T, for tokens of shape [T] or [1, T].
    normalizer : number or 0-d tensor > 0, optional
        Replaces Σ mask, or the number of sequences: see `pyrlk.normalizer`.
    group : torch.distributed.ProcessGroup, optional
        The vocabulary is sharded over its ranks, as in `token_logprobs`; every rank has the same
        loss, and the gradient of its own columns.
    inplace : bool
        Write the gradient over the logits: no [T, V] memory. They must not be a leaf that requires
        grad. REINFORCE to DAPO write in this call, the other objectives and callables in backward,
        which refuses logits that were modified in between. Without a gradient nothing is written.
    return_stats : bool

    Returns
    -------
    loss : 0-d float32 (float64 for float64 logits), or (loss, PolicyStats)

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU, and on CUDA under PYRLK_CHECK=1, also for values inside
        tensors, before anything is written.
    RuntimeError
        On a second backward through the same loss, and on a double backward.
    """
    z, shard = _vocab.find("logits", logits, -1, group)
    z = _check.logits(z, sharded=shard.sharded)
    shape = z.shape[:-1]
    tokens = _check.tokens(tokens, z, shape)
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
        z,
        shape,
    )
    tau = _check.temperature(temperature, z, shape)
    vocab = _vocab.vocab_size(vocab_size, z, -1, shard)
    kept = _support.check(support, z, shape)
    if _check.flag("inplace", inplace):
        _check_inplace(z, logits)

    if shard.sharded or not _plan.one_launch(options):

        def score(ids):
            rows = logprob.Rows(ids, *kept, *tau, vocab)
            return logprob.score(z, *rows, *shard, True, inplace)[:2]

        return two_launches(score, tokens, options)

    wants_grad = torch.is_grad_enabled() and z.requires_grad
    inputs = _plan.inputs(options, tokens, kept, tau, vocab)
    plain = z.detach()
    if inplace and wants_grad:
        loss, stats = _policy_loss_(plain, *inputs)
        grad = plain
    else:
        loss, grad, stats = _policy_loss(plain, *inputs, wants_grad)
    if wants_grad:
        loss = _attach_grad(z, grad, loss)
    return (loss, PolicyStats(*stats.unbind())) if return_stats else loss


for _loss in (dapo_loss, reinforce_loss):
    _with_common(_loss)


def _check_inplace(z: Tensor, given: Tensor) -> None:
    """`given` is z, or the DTensor whose part z is."""
    owner = given
    if given is z and not torch.compiler.is_compiling() and z._is_view() and z._base is not None:
        owner = z._base  # a view of a parameter would overwrite the parameter
    if owner.is_leaf and owner.requires_grad:
        raise ValueError("inplace=True: logits must not be (a view of) a leaf that requires grad")
    _check.disjoint_rows(z, "inplace=True: rows of logits overlap")


def _rows_cpu(logits: Tensor, plan: Plan, temperature: float, vocab: int, out, grad) -> None:
    """Fills `out` and, unless it is None, `grad`, which may be `logits`."""
    t = plan.terms
    bad = _C.policy_loss(
        _op.rows(logits, vocab),
        plan.tokens.data_ptr(),
        _support.addresses(plan.kept),
        _op.address(plan.old),
        plan.advantages.data_ptr(),
        plan.weight.data_ptr(),
        _op.address(plan.ref),
        (temperature, _op.address(plan.temperatures)),
        (
            t.clipped,
            t.eps_low,
            t.eps_high,
            t.dual_clip,
            t.delta,
            t.kl,
            t.kl_coef,
            t.kl_importance,
            t.entropy_coef,
        ),
        out.loss.data_ptr(),
        out.logprob.data_ptr(),
        _op.address(out.entropy),
        None if grad is None else _op.rows(grad, vocab),
        _op.threads(),
    )
    _check.bad_token(bad, plan.tokens, vocab)


def _rows_cuda(logits: Tensor, plan: Plan, temperature: float, vocab: int, out, grad) -> None:
    from .triton_kernels import policy_loss as kernels

    if plan.tokens.numel():
        kernels.policy_loss_fwd(
            logits,
            plan.tokens,
            plan.kept,
            plan.old,
            plan.advantages,
            plan.weight,
            plan.ref,
            temperature if plan.temperatures is None else plan.temperatures,
            vocab,
            plan.terms,
            out.loss,
            out.logprob,
            out.entropy,
            grad,
        )


row_kernel = _op.by_device(cpu=_rows_cpu, cuda=_rows_cuda)


def _run(logits: Tensor, inputs: Inputs, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    plan = _plan.prepare(logits, inputs)
    if logits.is_cuda:  # the CPU kernel checks what it reads
        check_tokens(plan.tokens, plan.kept, plan.mask != 0, inputs.vocab)
    out = _plan.per_token(logits, plan, plan.tokens.numel())
    row_kernel(logits, plan, inputs.temperature, inputs.vocab, out, grad)
    return _plan.finish(plan, out)


def _policy_loss_fake(logits, inputs, want_grad):
    loss, stats = _plan.finish_fake(logits, inputs)
    return loss, _op.empty_gradient(logits) if want_grad else logits.new_empty(0), stats


@_op.op("policy_loss", fake=_policy_loss_fake)
def _policy_loss(logits: Tensor, inputs: Inputs, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient by the logits or an empty tensor, statistics or an empty tensor)."""
    grad = _op.empty_gradient(logits) if want_grad else None
    loss, stats = _run(logits, inputs, grad)
    return loss, logits.new_empty(0) if grad is None else grad, stats


@_op.op("policy_loss_", fake=_plan.finish_fake, mutates=("logits",))
def _policy_loss_(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(loss, statistics); the gradient takes the place of the logits."""
    return _run(logits, inputs, logits)


def _attach_fake(logits, grad, loss):
    return torch.empty_like(loss)


@_op.op("attach_grad", fake=_attach_fake)
def _attach_grad(logits: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
    """`loss` as a function of `logits` whose gradient is known; backward consumes `grad`."""
    return loss.clone()


def _attach_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.spent = False


def _attach_backward(ctx, factor):
    _op.enter_once(ctx, "its gradient was handed over by the first")
    (grad,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise RuntimeError("pyrlk losses are differentiable once: create_graph is not supported")
    _op.scale_gradient(grad, factor)
    return grad, None, None


_attach_grad.register_autograd(_attach_backward, setup_context=_attach_setup)


def normalizer(
    mask: Tensor,
    objective: Objective,
    *,
    group=None,
    micro_batches: int = 1,
    averaged: bool = True,
) -> Tensor:
    """The global denominator of a loss under data parallelism and gradient accumulation.

    Parameters
    ----------
    mask : [B, L] or [T], of all micro-batches of this rank together
    objective : its aggregation says what is counted: mask weight, or sequences with tokens
    group : torch.distributed process group of the data-parallel ranks, optional
        The count is summed over it (one all-reduce of one float).
    micro_batches : int ≥ 1
        Divides the result where the trainer averages, not sums, the micro-batches' gradients.
    averaged : bool
        True where gradients are averaged over the ranks (DDP, FSDP): divides by their number.

    Returns
    -------
    0-d float64 tensor on the device of `mask`, for ``normalizer=`` of every micro-batch's loss.

    Raises
    ------
    TypeError, ValueError
        Naming the argument; on CPU also for weights that are negative or not finite.
    """
    mask = _check.mask_type(_check.tensor("mask", mask)).detach()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an instance such as pyrlk.DAPO(), got {objective!r}")
    if not 1 <= _check.integer("micro_batches", micro_batches) < 1 << 31:
        raise ValueError(f"micro_batches must lie in [1, 2^31), got {micro_batches}")
    _check.flag("averaged", averaged)
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
    weight = mask.to(torch.float64)
    if objective.aggregation == "token":
        total = weight.sum()
    elif mask.dim() < 2:
        raise ValueError(
            f"mask must be [B, L] for {type(objective).__name__}, which counts sequences, "
            f"got {list(mask.shape)}"
        )
    elif objective.aggregation == "constant":
        total = weight.new_tensor(float(mask.shape[:-1].numel()))
    else:
        total = (weight.sum(-1) > 0).sum().to(torch.float64)
    if _check.reads_values(mask):
        _check.mask_values(mask)
    ranks = 1
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
        ranks = torch.distributed.get_world_size(group)
    return total / (micro_batches * (ranks if averaged else 1))
