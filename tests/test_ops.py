"""The ops as torch sees them: opcheck, torch.compile, autograd rules, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import pyrlk
import pyrlk.linear
import pyrlk.loss
import pyrlk.mtp
import pyrlk.reinforce
import pyrlk.sampling
import pyrlk.speculative

OPS = torch.ops.pyrlk
B, L, V = 3, 5, 100


def batch(dtype=torch.float32):
    torch.manual_seed(0)
    z = torch.randn(B, L, V, dtype=dtype)
    return z, torch.randint(V, (B, L)), torch.randn(B, L) - 4, torch.randn(B, L)


def op_arguments():
    """One call of each op, by name: the schemas are private, so this list is their only witness."""
    z, tokens, old, adv = batch()
    whole = (None, None)
    kept = pyrlk.sample(z, top_k=7, seed=0, return_support=True)
    inside = kept.token.view(B, L)
    tau = torch.rand(B, L) + 0.5
    row = (inside, *kept.support[:2], 1.0, tau, V)
    here = ("", 0)  # not sharded
    stats, first = OPS.token_logprobs(z, *row, *here, True, False)[2:]
    integers, numbers = [1, 0, 3, 0, 0, 0, 1], [0.2, 0.28, 0.0, 0.0, 0.1, 0.1, 0.0, 0.0]
    mask = torch.rand(B, L) > 0.2
    loss = (tokens, *whole, old, adv, mask, old, None, None, None, tau, 1.0, V, integers, numbers)
    n = B * L
    rules = (torch.ones(n), torch.zeros(n).long(), torch.full((n,), 0.9), torch.zeros(n))
    h, weight, bias = torch.randn(B, L, 8), torch.randn(V, 8), torch.randn(V)
    leaves = [x.clone().requires_grad_() for x in (h, weight, bias)]
    grads = [torch.randn_like(x) for x in leaves]
    head = (2.0, False, 4)
    draw = (z, *rules, torch.arange(n), torch.zeros(n).long(), None, False, False, False)
    return {
        "token_logprobs": (z.clone().requires_grad_(), *row, *here, True, False),
        "token_logprobs_backward": (z, *row, first, stats, adv, old),
        "token_logprobs_backward_": (z.clone(), *row, first, stats, adv, old),
        "policy_loss": (z, *loss, True),
        "policy_loss_": (z.clone(), *loss),
        "once": (torch.tensor(1.0, requires_grad=True),),
        "attach_grad": (z.clone().requires_grad_(), torch.randn(B, L, V), torch.tensor(1.0)),
        "scale_": (z.clone(), torch.tensor(2.0)),
        "reinforce_grad": (z, tokens, adv, 1.0, None, torch.empty_like(z)),
        "linear_policy_loss": (h, weight, bias, *loss, *head, [True, True, True]),
        "linear_attach_grads": (*leaves, *grads, torch.ones(()), torch.tensor(1.0)),
        "linear_token_logprobs": (*leaves, *row, *here, *head, True),
        "linear_token_logprobs_backward": (
            h,
            weight,
            None,
            *row,
            *here,
            *head,
            first,
            stats[:0, 0],
            adv,
            None,
            [True] * 2 + [False],
        ),
        "mtp_loss": (
            h,
            weight,
            h + 1,
            tokens,
            mask,
            None,
            1,
            *here,
            *head,
            True,
            [True, True, False],
        ),
        "sample": draw,
        "sample_support": (*draw, 100, True),
        "verify_draft": (
            z,
            tokens[:, 1:].contiguous(),
            z[:, 1:],
            *(x[:B] for x in draw[1:7]),
            True,
            -1,
            False,
        ),
    }


@pytest.mark.parametrize("name", sorted(op_arguments()))
def test_every_op_passes_opcheck(name):
    result = opcheck(getattr(OPS, name).default, op_arguments()[name])
    assert set(result.values()) == {"SUCCESS"}


def test_no_op_is_left_out_of_opcheck():
    names = {n.removeprefix("pyrlk::").split(".")[0] for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("pyrlk::")}  # fmt: skip
    assert names == set(op_arguments())


WEIGHT = torch.randn(V, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def dropin(h, tokens, old, adv, mask):
    return pyrlk.dapo_loss(h @ WEIGHT.t(), tokens, old, adv, mask, entropy_coef=0.01)


def inplace(h, tokens, old, adv, mask):
    logits = h @ WEIGHT.t()
    return pyrlk.dapo_loss(logits, tokens, old, adv, mask, inplace=True, return_stats=True)[0]


def inplace_in_two(h, tokens, old, adv, mask):
    return pyrlk.policy_loss(
        h @ WEIGHT.t(), tokens, old, adv[:, 0], mask, objective=pyrlk.GSPO(), inplace=True,
        entropy_coef=0.01,
    )  # fmt: skip


def sequences(h, tokens, old, adv, mask):
    return pyrlk.policy_loss(
        (h @ WEIGHT.t())[:, :-1], tokens[:, :-1], old[:, :-1], adv[:, 0], mask[:, :-1],
        objective=pyrlk.GRPO(delta=2.0), ref_logprobs=old[:, :-1], kl_coef=0.1, kl="k2",
        correction=pyrlk.TIS("sequence"), rollout_logprobs=old[:, :-1] - 0.1,
    )  # fmt: skip


def callable_objective(h, tokens, old, adv, mask):
    def own(logprobs, old, adv, mask):
        return -(logprobs - old).exp() * adv

    logits = h @ WEIGHT.t()
    return pyrlk.policy_loss(logits, tokens, old, adv, mask, objective=own, entropy_coef=0.1)


def packed(h, tokens, old, adv, mask):
    logits, cu = (h @ WEIGHT.t()).flatten(0, 1), torch.tensor([0, 3, tokens.numel()])

    def own(logprobs, old, adv, mask):
        return -(logprobs - old).exp() * adv

    old, adv, mask = old.flatten(), adv[0, :2], mask.flatten()
    return pyrlk.policy_loss(
        logits, tokens.flatten(), old, adv, mask, objective=own, cu_seqlens=cu, normalizer=5.0,
        correction=pyrlk.TIS("sequence"), rollout_logprobs=old - 0.1,
    )  # fmt: skip


def scorer(h, tokens, old, adv, mask):
    logprob, entropy = pyrlk.token_logprobs(h @ WEIGHT.t(), tokens, return_entropy=True)
    return (logprob * adv + entropy).sum()


def replayed(h, tokens, old, adv, mask):
    sets = pyrlk.Support(torch.arange(V).int().repeat(tokens.numel()),
                         torch.arange(tokens.numel() + 1) * V)  # fmt: skip
    logits = h @ WEIGHT.t()
    return pyrlk.dapo_loss(logits, tokens, old, adv, mask, support=sets, entropy_coef=0.01)


def linear(h, tokens, old, adv, mask):
    return pyrlk.linear_policy_loss(h, WEIGHT, tokens, old, adv, mask, softcap=3.0, chunk=50)


def linear_in_two(h, tokens, old, adv, mask):
    return pyrlk.linear_policy_loss(
        h, WEIGHT, tokens, old, adv[:, 0], mask, objective=pyrlk.GSPO(), entropy_coef=0.01
    )


def linear_scorer(h, tokens, old, adv, mask):
    logprob, entropy = pyrlk.linear_token_logprobs(h, WEIGHT, tokens, return_entropy=True)
    return (logprob * adv + entropy).sum()


STEPS = [
    dropin, inplace, inplace_in_two, sequences, callable_objective, packed, scorer, replayed,
    linear, linear_in_two, linear_scorer,
]  # fmt: skip
LENGTHS = range(5, 65, 3)  # 20 of them


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_compiled_fullgraph_equals_eager_at_any_length_without_recompiling(step):
    compiled_equals_eager(step, "aot_eager", LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("step", [dropin, inplace])
def test_compiled_by_inductor_equals_eager_at_any_length_without_recompiling(step):
    compiled_equals_eager(step, "inductor", LENGTHS[::5])


def compiled_equals_eager(step, backend, lengths):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for length in lengths:
        h = torch.randn(4, length, 16)
        tokens, mask = torch.randint(V, (4, length)), torch.rand(4, length) > 0.2
        old, adv = torch.randn(4, length) - 4, torch.randn(4, length)
        results = []
        for f in (step, compiled):
            loss = f(h, tokens, old, adv, mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, WEIGHT)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_random_choice_by_its_seed_compiles_too():
    """ClipCov's: a compiled graph takes no new torch.Generator, nor does a captured one."""
    torch._dynamo.reset()
    z, tokens, old, adv = batch()

    def step(z, seed):
        objective = pyrlk.ClipCov(share=0.3, cov_low=-9.0, cov_high=9.0, seed=seed)
        return pyrlk.policy_loss(z, tokens, old, adv, objective=objective)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = [step(z, seed) for seed in range(4)]
    for seed, loss in enumerate(losses):
        torch.testing.assert_close(compiled(z, seed), loss)
    assert len({loss.item() for loss in losses}) == 4


@pytest.mark.slow
def test_a_compiled_reinforce_gradient_equals_eager_without_recompiling():
    torch._dynamo.reset()
    compiled = torch.compile(
        pyrlk.reinforce_grad, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in LENGTHS:
            z, tokens, adv = (
                torch.randn(length, V),
                torch.randint(V, (length,)),
                torch.randn(length),
            )
            assert torch.equal(compiled(z, tokens, adv), pyrlk.reinforce_grad(z, tokens, adv))


@pytest.mark.slow
def test_a_compiled_sampler_equals_eager_without_recompiling():
    torch._dynamo.reset()
    counters.clear()

    def draw(z, seed, position, support):
        return pyrlk.sample(
            z * 1, temperature=0.7, top_k=5, seed=seed, position=position, return_support=support
        )

    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5, 9):
        z, seed = torch.randn(count, V), torch.randint(0, 2**40, (count,))
        got, want = compiled(z, seed, seed + 1, False), draw(z, seed, seed + 1, False)
        assert all(torch.equal(a, b) for a, b in zip(got[:5], want[:5], strict=True))
    assert counters["stats"]["unique_graphs"] == 1
    got, want = compiled(z, seed, seed, True), draw(z, seed, seed, True)
    assert torch.equal(got.support.ids, want.support.ids)
    assert torch.equal(got.support.offsets, want.support.offsets)


def every_result(z, tokens, old, adv, h):
    """Losses, gradients, log-probs and draws by each way to a kernel."""
    out = []
    for objective in (pyrlk.DAPO(), pyrlk.GSPO(), pyrlk.ClipCov(share=0.5)):
        for f in (
            lambda o: pyrlk.policy_loss(z * 1, tokens, old, adv, objective=o, inplace=True),
            lambda o: pyrlk.policy_loss(z, tokens, old, adv, objective=o, entropy_coef=0.1),
            lambda o: pyrlk.linear_policy_loss(h, WEIGHT, tokens, old, adv, objective=o),
        ):
            loss = f(objective)
            out += [loss, *torch.autograd.grad(loss, (z, h), allow_unused=True)]
    logprobs = pyrlk.linear_token_logprobs(h, WEIGHT, tokens)
    drawn = pyrlk.sample(z, seed=0, top_p=0.9, return_support=True)
    out += [logprobs, *torch.autograd.grad(logprobs.sum(), h), *drawn[:5], *drawn.support[:2]]
    out += [*pyrlk.mtp_loss(h, WEIGHT, tokens, return_stats=True)[1]]
    out += [*pyrlk.verify_draft(z, tokens[:, 1:], seed=0, return_support=True).support[:2]]
    return [x for x in out if x is not None]


@pytest.mark.parametrize("setting", ["device", "dtype"])
def test_the_users_defaults_for_new_tensors_change_nothing(setting):
    """set_default_device("cuda") is common, and logits may still be on the CPU."""
    z, tokens, old, adv = batch()
    leaves = z.requires_grad_(), torch.randn(B, L, 16).requires_grad_()
    arguments = leaves[0], tokens, old, adv, leaves[1]
    want = every_result(*arguments)
    try:
        if setting == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        got = every_result(*arguments)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(want, got, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


# One launch, and what takes two: a sequence ratio, a callable.
TWO = [pyrlk.GSPO(), lambda logprobs, old, adv, mask: -(logprobs - old).exp() * adv]
THREE = [pyrlk.DAPO(), *TWO]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("objective", THREE)
def test_a_second_backward_and_a_double_backward_raise(inplace, objective):
    z, tokens, old, adv = batch()
    leaf, options = z.requires_grad_(), {"inplace": inplace, "objective": objective}
    loss = pyrlk.policy_loss(leaf * 1, tokens, old, adv, **options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    loss = pyrlk.policy_loss(leaf * 1, tokens, old, adv, **options)
    if not inplace and objective in TWO:
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            slope.sum().backward()
        return
    with pytest.raises(RuntimeError, match="create_graph is not supported"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize(
    "f",
    [
        lambda z: pyrlk.token_logprobs(z, torch.zeros(B, L).long()),
        lambda z: pyrlk.reinforce_loss(z, torch.zeros(B, L).long(), torch.ones(B, L)),
        lambda z: pyrlk.linear_token_logprobs(z, torch.ones(9, V), torch.zeros(B, L).long()),
    ],
)
def test_a_forward_mode_derivative_raises_and_is_never_zero(f):
    z = torch.randn(B, L, V)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(f, (z,), (torch.ones_like(z),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has a tangent"):
        f(forward_ad.make_dual(z, torch.ones_like(z)))
    with forward_ad.dual_level():
        assert f(z).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_a_backward_scale_multiplies_the_gradient(dtype, inplace, strided):
    z, tokens, old, adv = batch(dtype)
    if strided:
        tokens, old, adv = tokens[:, 1:], old[:, 1:], adv[:, 1:]
    grads = []
    for scale in (1.0, -3.0, 0.0, 2.0**10):
        leaf = z.clone().requires_grad_()
        logits = (leaf * 1)[:, :-1] if strided else leaf * 1
        (scale * pyrlk.dapo_loss(logits, tokens, old, adv, inplace=inplace)).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[1], (grads[0].double() * -3).to(dtype))
    assert grads[2].eq(0).all()
    assert torch.equal(grads[3], grads[0] * 2**10)


def test_accumulated_losses_add_their_gradients():
    z, tokens, old, adv = batch()
    leaf = z.requires_grad_()
    one = pyrlk.dapo_loss(leaf, tokens, old, adv)
    two = pyrlk.reinforce_loss(leaf, tokens, adv)
    (both,) = torch.autograd.grad(one + 2 * two, leaf)
    (a,) = torch.autograd.grad(pyrlk.dapo_loss(leaf, tokens, old, adv), leaf)
    (b,) = torch.autograd.grad(pyrlk.reinforce_loss(leaf, tokens, adv), leaf)
    torch.testing.assert_close(both, a + 2 * b)


@pytest.mark.parametrize("objective", THREE)
def test_in_place_bumps_the_version_so_that_a_stale_tensor_is_an_error(objective):
    z, tokens, old, adv = batch()
    leaf = z.requires_grad_()
    logits = leaf * 1
    stale = (logits**2).sum()  # keeps the logits for its backward
    version = logits._version
    loss = pyrlk.policy_loss(logits, tokens, old, adv, inplace=True, objective=objective)
    loss.backward()
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("objective", TWO)
def test_logits_that_change_before_an_in_place_backward_are_an_error(objective):
    z, tokens, old, adv = batch()
    leaf = z.requires_grad_()
    for change in (lambda x: x.add_(1), lambda x: x.detach().zero_(), one_launch_in_place):
        logits = leaf * 1
        loss = pyrlk.policy_loss(logits, tokens, old, adv, inplace=True, objective=objective)
        change(logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def one_launch_in_place(logits):
    _, tokens, old, adv = batch()
    pyrlk.dapo_loss(logits, tokens, old, adv, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("objective", TWO)
def test_in_place_gives_the_bits_of_the_drop_in(dtype, strided, kept, objective):
    z, tokens, old, adv = batch(dtype)
    mask = torch.rand(B, L) > 0.2
    tokens[0, 1] = -100
    if strided:
        tokens, old, adv, mask = tokens[:, 1:], old[:, 1:], adv[:, 1:], mask[:, 1:]
    options = {"objective": objective, "entropy_coef": 0.1, "temperature": 0.7, "vocab_size": 90}
    tokens = torch.where(tokens >= 90, 89, tokens)
    if kept:
        sets = torch.rand(tokens.numel(), 90) < 0.3
        sets.scatter_(1, tokens.reshape(-1, 1).clamp(min=0), True)
        options["support"] = pyrlk.Support.from_mask(sets)
    grads = []
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        logits = (leaf * 1)[:, :-1] if strided else leaf * 1
        loss = pyrlk.policy_loss(logits, tokens, old, adv, mask, inplace=inplace, **options)
        (3 * loss).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("objective", THREE)
def test_in_place_under_no_grad_leaves_the_logits_alone(objective):
    z, tokens, old, adv = batch()
    before, options = z.clone(), {"inplace": True, "objective": objective}
    pyrlk.policy_loss(z, tokens, old, adv, **options)
    with torch.no_grad():
        pyrlk.policy_loss(z.requires_grad_() * 1, tokens, old, adv, **options)
    assert torch.equal(z, before)
    with pytest.raises(ValueError, match="inplace"):
        pyrlk.policy_loss(z, tokens, old, adv, **options)


class Big(TorchDispatchMode):
    """Shapes of every tensor that torch allocates and that holds at least `least` elements."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen, self.storages = least, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.least:
                where = x.untyped_storage().data_ptr()
                if where not in self.storages:
                    self.storages.add(where)
                    self.seen.append((str(func), tuple(x.shape)))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inplace", "grad", "allowed"), [(False, True, 1), (True, True, 0), (False, False, 0)]
)
@pytest.mark.parametrize("objective", THREE)
def test_the_gradient_is_the_only_tensor_of_size_t_v(
    dtype, inplace, grad, allowed, objective, allocated
):
    count, vocab = 64, 4096
    leaf = torch.randn(count, vocab).to(dtype).requires_grad_()
    logits = leaf * 1
    tokens, adv = torch.randint(vocab, (count,)), torch.randn(count)
    options = {"entropy_coef": 0.1, "ref_logprobs": adv, "kl_coef": 0.1, "return_stats": True}
    options |= {"objective": objective, "cu_seqlens": torch.tensor([0, 30, count])}
    with torch.set_grad_enabled(grad):
        big = Big(logits.numel() * logits.element_size() // 2)
        big.storages.add(logits.untyped_storage().data_ptr())
        with big:
            loss, _ = pyrlk.policy_loss(logits, tokens, adv, adv, inplace=inplace, **options)
            if grad:
                (slope,) = torch.autograd.grad(loss, logits)
    assert not grad or slope.isfinite().all()
    assert len(big.seen) == allowed, big.seen
    assert sum(math.prod(shape) >= count * vocab for shape, _ in allocated) == allowed
    if inplace:
        assert slope.data_ptr() == logits.data_ptr()
