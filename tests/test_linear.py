"""Loss and log-probs from hidden states and the head's weight: against float64, at every chunk."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import pyrlk
from pyrlk import _head, reference
from pyrlk import support as support_module

# One launch: REINFORCE to DAPO. Two passes: the others, GSPO and GMPO across whole sequences.
FUSED = [
    pyrlk.REINFORCE(),
    pyrlk.PPO(dual_clip=1.5),
    pyrlk.GRPO(delta=1.1),
    pyrlk.BNPO(),
    pyrlk.DrGRPO(max_length=11),
    pyrlk.DAPO(),
]
TWO_PASS = [
    pyrlk.GSPO(0.1, 0.2),
    pyrlk.GSPO(0.1, 0.2, token_level=True),
    pyrlk.LUSPO(),
    pyrlk.GMPO(),
    pyrlk.CISPO(),
    pyrlk.SAPO(),
    pyrlk.VESPO(),
    pyrlk.DPPO(),
    pyrlk.DRO(beta=0.5),
    pyrlk.ClipCov(cov_low=-1.0),
    pyrlk.KLCov(share=0.2),
]
LENGTHS = [4, 0, 1, 7]  # packed sequences, an empty one among them


def gradients(f, inputs, arguments, options):
    """(loss, [gradient or None of hidden, weight, bias]) of f, for the inputs that require one."""
    leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    loss = f(leaves["hidden"], leaves["weight"], *arguments, bias=leaves.get("bias"), **options)
    loss.backward()
    return loss.detach(), [leaves[k].grad for k in leaves]


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def truth(inputs, arguments, options):
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    kept = {k: wide(v) for k, v in options.items() if k not in ("chunk", "logits_dtype")}
    tokens, *rest = arguments
    return gradients(reference.linear_policy_loss, exact, (tokens.long(), *map(wide, rest)), kept)


def bound_of(inputs) -> float:
    """4e-6 is the row kernel's. A float32 product of length n adds some √n·2⁻²⁴ in norm, in z as in
    the gradients; 4e-6 holds the first, as errors of z of one row are independent. float64: 1e-13.
    """
    longest = max(*inputs["weight"].shape, inputs["hidden"].shape[:-1].numel())
    wide = inputs["hidden"].dtype == torch.float64
    return 1e-13 if wide else 4e-6 + 2**-24 * math.sqrt(longest)


def assert_close(got, want, bound, floor=1e-12):
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
            continue
        error, size = (a.double() - b).norm().item(), b.norm().item()
        assert error <= bound * size + floor * bound, f"{error} > {bound}·{size}"


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64), objectives=(*FUSED, *TWO_PASS)):
    """(inputs, arguments, options) of linear_policy_loss: options, layout and dtype at random."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    vocab, width = draw(st.sampled_from([1, 17, 64, 130])), draw(st.sampled_from([1, 8, 33]))
    packed = draw(st.booleans())
    shape = (sum(LENGTHS),) if packed else (3, 4)
    hidden = torch.randn(*shape, width)
    if not packed and draw(st.booleans()):
        hidden = torch.randn(3, 5, width)[:, :-1]  # the shift of a causal LM
    weight = 2 * torch.randn(vocab, width) / math.sqrt(width)
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    size = draw(st.sampled_from([None, max(1, vocab - 1)]))
    tokens = torch.randint(size or vocab, shape)
    needs = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    inputs = {
        "hidden": hidden.to(dtype).requires_grad_(needs[0]),
        "weight": weight.to(dtype).requires_grad_(needs[1]),
    }
    if draw(st.booleans()):
        inputs["bias"] = torch.randn(vocab).to(dtype).requires_grad_(draw(st.booleans()))
    tau = draw(st.sampled_from([1.0, 0.75, "tensor"]))
    tau = 0.5 + torch.rand(shape) if tau == "tensor" else tau
    options = {
        "temperature": tau,
        "vocab_size": size,
        "softcap": draw(st.sampled_from([None, 3.0])),
    }
    with torch.no_grad():
        lp = pyrlk.linear_token_logprobs(
            inputs["hidden"], inputs["weight"], tokens, bias=inputs.get("bias"), **options
        ).float()
    count = len(LENGTHS) if packed else 3
    adv = torch.randn(count if draw(st.booleans()) else shape)
    adv[0] = 0.0
    mask = {
        "none": None,
        "bool": torch.rand(shape) > 0.3,
        "float": torch.rand(shape) * (torch.rand(shape) > 0.3),
    }[draw(st.sampled_from(["none", "bool", "float"]))]
    if draw(st.booleans()):
        tokens = torch.where(torch.rand(shape) < 0.2, -100, tokens)
    objective = draw(st.sampled_from(objectives))
    options |= {
        "objective": objective,
        "entropy_coef": draw(st.sampled_from([0.0, 0.0, 0.05])),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0) if packed else None,
        "normalizer": draw(st.sampled_from([None, 7.0, torch.tensor(5.5)])),
        "chunk": draw(st.sampled_from([None, 1, 5, 100])),
    }
    if draw(st.booleans()):
        options |= {"ref_logprobs": lp + 0.3 * torch.randn(shape), "kl_coef": 0.1}
        options["kl"] = draw(st.sampled_from(["k1", "k2", "k3"]))
    if draw(st.booleans()):
        tis = pyrlk.TIS(draw(st.sampled_from(["token", "sequence"])), "mask", 1.2)
        options |= {"correction": tis, "rollout_logprobs": lp + 0.2 * torch.randn(shape)}
    if draw(st.booleans()):
        options["support"] = kept_sets(tokens, size or vocab)
    old = lp + 0.3 * torch.randn(shape) if draw(st.booleans()) else None
    return inputs, (tokens, old, adv, mask), options


def kept_sets(tokens, vocab):
    """A random kept set for every token, which is in it."""
    chosen = torch.rand(tokens.numel(), vocab) < 0.4
    chosen.scatter_(1, tokens.reshape(-1, 1).clamp(min=0), True)
    return pyrlk.Support.from_mask(chosen)


@settings(max_examples=120)
@given(cases())
def test_loss_and_gradients_equal_float64(case):
    inputs, *_ = case
    loss, got = gradients(pyrlk.linear_policy_loss, *case)
    want_loss, want = truth(*case)
    dtype = inputs["hidden"].dtype
    bound = bound_of(inputs)
    if case[2]["objective"].over_sequences:  # a sum of n log-probs carries n of their errors
        bound *= max(LENGTHS)
    assert loss.dtype == dtype
    # Of a loss of order 1 or more: its terms cancel, and Σ w·|ℓ| is of the order of |A| = 1.
    assert abs(loss - want_loss) <= bound * max(1.0, want_loss.abs().item())
    # An all but cancelled gradient is measured against what would be there without cancellation.
    assert_close(got, want, bound, floor=0.1)
    assert all(g is None or g.dtype == dtype for g in got)


SHAPE = (96, 64, 700)


def example(dtype=torch.float32, bias=True, shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    rows, width, vocab = shape
    inputs = {
        "hidden": torch.randn(rows, width).to(dtype).requires_grad_(),
        "weight": (2 * torch.randn(vocab, width) / math.sqrt(width)).to(dtype).requires_grad_(),
    }
    if bias:
        inputs["bias"] = torch.randn(vocab).to(dtype).requires_grad_()
    tokens, adv = torch.randint(vocab, (rows,)), torch.randn(rows)
    with torch.no_grad():
        lp = pyrlk.linear_token_logprobs(
            inputs["hidden"], inputs["weight"], tokens, bias=inputs.get("bias")
        ).float()
    return inputs, (tokens, lp + 0.2 * torch.randn(rows), adv, torch.rand(rows) > 0.2)


def unfused(hidden, weight, *arguments, bias=None, softcap=None, **options):
    """What a trainer writes without this op: every step rounded to the dtype of the weight."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return pyrlk.policy_loss(z, *arguments, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_16_bit_errors_are_those_of_the_unfused_way_or_less(dtype, objective, softcap):
    """Both round z and ∂z to 16 bits and sum dweight in float32; ours sums the chunks there too."""
    inputs, arguments = example(dtype)
    options = {"objective": objective, "softcap": softcap, "temperature": 1.3, "normalizer": 1.0}
    _, want = truth(inputs, arguments, options)

    def errors(f, **more):
        _, got = gradients(f, inputs, arguments, options | more)
        assert all(g.dtype == dtype for g in got)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]

    theirs, ours = errors(unfused), errors(pyrlk.linear_policy_loss, chunk=16)
    unrounded = errors(pyrlk.linear_policy_loss, chunk=16, logits_dtype=torch.float32)
    for a, b, c in zip(theirs, ours, unrounded, strict=True):
        assert b <= 1.1 * a
        assert c <= 1.1 * b
        assert c <= 2.5 * torch.finfo(dtype).eps / 2  # what rounding the result itself costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.SAPO(aggregation="token")], ids=repr)
def test_the_chunk_changes_nothing_but_rounding(dtype, objective):
    inputs, arguments = example(dtype, shape=(24, 32, 150))
    options = {"objective": objective, "softcap": 4.0, "entropy_coef": 0.01}
    _, whole = gradients(pyrlk.linear_policy_loss, inputs, arguments, options | {"chunk": 24})
    bound = bound_of(inputs) if dtype != torch.bfloat16 else 5e-3
    for chunk in (1, 7, 23, 25, 10**9, None):
        _, got = gradients(pyrlk.linear_policy_loss, inputs, arguments, options | {"chunk": chunk})
        assert_close(got, [w.double() for w in whole], bound)


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
def test_equal_calls_give_equal_bits(objective):
    inputs, arguments = example()
    options = {"objective": objective, "chunk": 17}
    first, again = (gradients(pyrlk.linear_policy_loss, inputs, arguments, options) for _ in "12")
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@settings(max_examples=40)
@given(cases())
def test_masked_rows_may_hold_anything(case):
    inputs, (tokens, old, adv, mask), options = case
    if adv.shape != tokens.shape:
        adv = torch.randn(tokens.shape)
    out = torch.rand(tokens.shape) < 0.4
    mask = torch.where(out, 0, torch.ones(tokens.shape) if mask is None else mask)
    clean = gradients(pyrlk.linear_policy_loss, inputs, (tokens, old, adv, mask), options)

    def poison(x, value=math.nan):
        return x.masked_fill(out, value) if isinstance(x, torch.Tensor) else x

    needs = inputs["hidden"].requires_grad
    hidden = inputs["hidden"].detach().masked_fill(out[..., None], math.nan).requires_grad_(needs)
    tokens = poison(tokens, 10**6)
    for name in ("ref_logprobs", "rollout_logprobs"):
        if name in options:
            options[name] = poison(options[name])
    options["temperature"] = poison(options["temperature"], -1.0)
    poisoned = inputs | {"hidden": hidden}
    loss, got = gradients(
        pyrlk.linear_policy_loss, poisoned, (tokens, poison(old), poison(adv), mask), options
    )
    assert torch.equal(loss, clean[0])
    for a, b in zip(got, clean[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    if got[0] is not None:
        assert got[0][out].eq(0).all()


def test_rows_without_advantage_are_dropped_unless_something_else_needs_them():
    inputs, (tokens, old, adv, _) = example()
    adv[::2] = 0.0
    poisoned = inputs | {"hidden": inputs["hidden"].detach().clone()}
    poisoned["hidden"][::2] = math.nan
    poisoned["hidden"].requires_grad_()
    clean, want = gradients(pyrlk.linear_policy_loss, inputs, (tokens, old, adv), {})
    loss, got = gradients(pyrlk.linear_policy_loss, poisoned, (tokens, old, adv), {})
    assert torch.equal(loss, clean)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    loss, _ = gradients(
        pyrlk.linear_policy_loss, poisoned, (tokens, old, adv), {"entropy_coef": 0.1}
    )
    assert loss.isnan()


def test_padded_rows_of_the_weight_are_never_read_and_get_gradient_zero():
    inputs, arguments = example()
    padded = {k: v.detach().clone() for k, v in inputs.items()}
    padded["weight"] = torch.cat([padded["weight"], torch.full((5, SHAPE[1]), math.nan)])
    padded["bias"] = torch.cat([padded["bias"], torch.full((5,), math.nan)])
    padded = {k: v.requires_grad_() for k, v in padded.items()}
    _, want = gradients(pyrlk.linear_policy_loss, inputs, arguments, {})
    _, got = gradients(pyrlk.linear_policy_loss, padded, arguments, {"vocab_size": SHAPE[2]})
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a[: SHAPE[2]], b)
        assert a[SHAPE[2] :].eq(0).all()


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.GSPO()], ids=repr)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3)])
def test_no_token_counted_gives_zero_and_never_nan(shape, objective):
    hidden = torch.full((*shape, 8), math.nan, requires_grad=True)
    weight, bias = torch.randn(11, 8, requires_grad=True), torch.randn(11, requires_grad=True)
    nan, tokens = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.long)
    options = {"ref_logprobs": nan, "kl_coef": 0.1, "entropy_coef": 0.1, "objective": objective}
    if len(shape) == 1:
        options["cu_seqlens"] = torch.tensor([0, 0])
    loss, stats = pyrlk.linear_policy_loss(
        hidden, weight, tokens, nan, nan, torch.zeros(shape), bias=bias, return_stats=True,
        **options,
    )  # fmt: skip
    loss.backward()
    assert loss == 0
    assert all(s.isfinite() for s in stats)
    for x in (hidden, weight, bias):
        assert x.grad.eq(0).all()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
def test_statistics_are_those_of_the_logits(objective):
    inputs, arguments = example(torch.float64)
    arguments[2][::3] = 0.0  # counted in the statistics, though without a gradient
    options = {"objective": objective, "return_stats": True}
    with torch.no_grad():
        z = torch.nn.functional.linear(*inputs.values())
        want_loss, want = pyrlk.policy_loss(z, *arguments, **options)
        loss, got = pyrlk.linear_policy_loss(
            inputs["hidden"], inputs["weight"], *arguments, bias=inputs["bias"], **options
        )
    torch.testing.assert_close(loss, want_loss)
    for name, a, b in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_callable_objective_equals_the_fused_one():
    inputs, arguments = example(torch.float64)

    def surrogate(logprobs, old, adv, mask):
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)

    loss, got = gradients(
        pyrlk.linear_policy_loss, inputs, arguments, {"objective": surrogate, "chunk": 7}
    )
    want_loss, want = gradients(pyrlk.linear_policy_loss, inputs, arguments, {"chunk": 11})
    torch.testing.assert_close(loss, want_loss)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logprobs_and_their_gradients_equal_float64(dtype, softcap):
    inputs, (tokens, *_) = example(dtype)
    tokens[::5] = -100
    tau, options = 0.5 + torch.rand(SHAPE[0]), {"softcap": softcap, "return_entropy": True}
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    a, b = torch.randn(SHAPE[0]), torch.randn(SHAPE[0])

    def call(f, x, tau, **more):
        lp, h = f(
            x["hidden"], x["weight"], tokens, bias=x["bias"], temperature=tau, **options, **more
        )
        (lp.double() @ a.double() + h.double() @ b.double()).backward()
        return lp.detach().double(), h.detach().double(), [v.grad for v in x.values()]

    want = call(reference.linear_token_logprobs, exact, tau.double())
    got = call(pyrlk.linear_token_logprobs, inputs, tau, chunk=13)
    assert got[0][::5].eq(0).all()
    if dtype == torch.bfloat16:
        assert_close(got[:2], want[:2], 4e-3)
        assert_close(got[2], want[2], 1e-2)
    else:
        bound = bound_of(inputs)
        assert_close(got[:2], want[:2], bound)
        assert_close(got[2], want[2], bound)


def test_logprobs_alone_are_those_with_entropy_and_each_output_carries_its_own_gradient():
    inputs, (tokens, *_) = example(torch.float64)
    leaves = list(inputs.values())
    lp, h = pyrlk.linear_token_logprobs(
        *leaves[:2], tokens, bias=leaves[2], return_entropy=True, chunk=20
    )
    assert torch.equal(
        pyrlk.linear_token_logprobs(*leaves[:2], tokens, bias=leaves[2], chunk=20), lp
    )
    by_lp = torch.autograd.grad(lp.sum(), leaves, retain_graph=True)
    by_h = torch.autograd.grad(h.sum(), leaves, retain_graph=True)
    both = torch.autograd.grad((lp + h).sum(), leaves)
    assert_close(both, [x + y for x, y in zip(by_lp, by_h, strict=True)], 1e-12)


def test_gradcheck_of_the_logprobs():
    torch.manual_seed(0)
    wide = {"dtype": torch.float64, "requires_grad": True}
    x, w, b = torch.randn(2, 3, 4, **wide), torch.randn(9, 4, **wide), torch.randn(9, **wide)
    tokens = torch.randint(7, (2, 3))
    tokens[0, 1] = -100
    tau = 0.5 + torch.rand(2, 3, dtype=torch.float64)

    def f(x, w, b):
        return pyrlk.linear_token_logprobs(
            x, w, tokens, bias=b, softcap=2.0, temperature=tau, vocab_size=7, chunk=2,
            return_entropy=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (x, w, b))


@pytest.mark.parametrize("objective", [*FUSED, TWO_PASS[0], TWO_PASS[3]], ids=repr)
def test_gradient_is_the_slope_of_the_loss(objective):
    torch.manual_seed(3)
    wide = {"dtype": torch.float64, "requires_grad": True}
    leaves = [torch.randn(2, 3, 4, **wide), torch.randn(6, 4, **wide), torch.randn(6, **wide)]
    tokens, adv = torch.randint(6, (2, 3)), torch.randn(2, 3, dtype=torch.float64)
    old = pyrlk.linear_token_logprobs(*leaves[:2], tokens, bias=leaves[2], softcap=2.0).detach()
    options = {"ref_logprobs": old - 0.2, "kl_coef": 0.3, "entropy_coef": 0.2}
    old = old + 0.1 * torch.randn(2, 3, dtype=torch.float64)

    def f(x, w, b):
        return pyrlk.linear_policy_loss(
            x, w, tokens, old, adv, bias=b, softcap=2.0, objective=objective, chunk=4, **options
        )

    # Not torch's gradcheck: it runs backward twice through one graph, and these losses allow one.
    for i, leaf in enumerate(leaves):
        (grad,) = torch.autograd.grad(f(*leaves), leaf)
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            ahead, behind = (
                [*leaves[:i], leaf + s * direction, *leaves[i + 1 :]] for s in (1e-6, -1e-6)
            )
            slope = (f(*ahead) - f(*behind)) / 2e-6
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
def test_the_gradient_of_the_weight_goes_into_main_grad(objective, flag):
    inputs, arguments = example(torch.bfloat16)
    _, want = gradients(
        pyrlk.linear_policy_loss, inputs, arguments,
        {"objective": objective, "logits_dtype": torch.float32},
    )  # fmt: skip
    weight = inputs["weight"]
    weight.main_grad = torch.ones(weight.shape)
    if flag:
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        loss = pyrlk.linear_policy_loss(
            inputs["hidden"], weight, *arguments, bias=inputs["bias"], objective=objective,
            logits_dtype=torch.float32,
        )  # fmt: skip
        assert weight.main_grad.max() <= 1 + want[1].abs().max() * 2  # nothing before backward
        (loss * 2).backward()
    got = (weight.main_grad - 1) / 4
    # float32 against the same sum rounded to bfloat16
    assert (got - want[1].float()).norm() <= 2**-8 * got.norm()
    assert not torch.equal(got, got.bfloat16().float())
    if flag:
        assert weight.grad_added_to_main_grad
        assert weight.grad.eq(0).all()
    else:
        assert weight.grad is None


def test_backward_scales_and_happens_once():
    inputs, arguments = example()
    leaves = list(inputs.values())

    def loss(objective=FUSED[-1]):
        return pyrlk.linear_policy_loss(
            *leaves[:2], *arguments, bias=leaves[2], objective=objective
        )

    plain = torch.autograd.grad(loss(), leaves)
    scaled = torch.autograd.grad(loss() * 4, leaves)
    assert all(torch.equal(4 * a, b) for a, b in zip(plain, scaled, strict=True))
    once = loss()
    torch.autograd.grad(once, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(once, leaves)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss(), leaves, create_graph=True)
    once = loss(pyrlk.CISPO())
    torch.autograd.grad(once, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(once, leaves)
    (slope, *_) = torch.autograd.grad(loss(pyrlk.CISPO()), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        slope.sum().backward()


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
def test_a_support_of_the_whole_vocabulary_changes_no_bit(objective):
    inputs, arguments = example()
    everything = pyrlk.Support.from_mask(torch.ones(SHAPE[0], SHAPE[2], dtype=torch.bool))
    options = {"objective": objective, "entropy_coef": 0.1, "chunk": 8}
    loss, want = gradients(pyrlk.linear_policy_loss, inputs, arguments, options)
    options["support"] = everything
    again, got = gradients(pyrlk.linear_policy_loss, inputs, arguments, options)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_columns_outside_every_support_count_for_nothing(objective, softcap):
    """They may hold anything, and their rows of the weight get no gradient."""
    inputs, (tokens, *rest) = example()
    tokens = tokens % 300
    support = kept_sets(tokens, 300)
    options = {"objective": objective, "softcap": softcap, "chunk": 20, "entropy_coef": 0.1}
    options["support"] = support
    loss, want = gradients(pyrlk.linear_policy_loss, inputs, (tokens, *rest), options)
    weight = inputs["weight"].detach().clone()
    weight[300:] = 7.0
    inputs["weight"] = weight.requires_grad_()
    again, got = gradients(pyrlk.linear_policy_loss, inputs, (tokens, *rest), options)
    torch.testing.assert_close(loss, again)
    assert_close(got, [x.double() for x in want], 1e-6)
    assert got[1][300:].eq(0).all()


def test_rows_that_are_dropped_take_their_kept_sets_with_them():
    """Under -100, a mask and no advantage the rest reads its own sets, whatever theirs hold."""
    inputs, (tokens, old, adv, mask) = example()
    support = kept_sets(tokens, SHAPE[2])
    lists = support.rows()
    masked = [0, 6, 95]
    for row in masked:
        lists[row] = []
    tokens[masked[0]], mask[masked[1:]] = -100, False
    lists[5], adv[5] = [int(tokens[5])], 0.0
    emptied = pyrlk.Support.from_lists(lists)
    results = []
    for kept in (support, emptied):
        loss, grads = gradients(
            pyrlk.linear_policy_loss, inputs, (tokens, old, adv, mask), {"support": kept}
        )
        results.append((loss, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_set_outside_the_ids_is_empty_when_rows_are_gathered():
    """What the CPU refuses and CUDA must survive: the sets of the other rows stay whole."""
    ids = torch.arange(8, dtype=torch.int32)
    broken = pyrlk.Support(ids, torch.tensor([0, 3, 2, 7, 99, 8]))
    lists = support_module.take(broken, torch.tensor([4, 0, 1, 3, 2])).rows()
    assert lists == [[], [0, 1, 2], [], [], [2, 3, 4, 5, 6]]
    part = support_module.take(broken, slice(2, 3))
    assert part.offsets.tolist() == [2, 7]
    assert part.ids is ids


def test_a_token_outside_its_support_is_an_error_with_its_own_index():
    inputs, (tokens, old, adv, _) = example()
    leaves = inputs["hidden"], inputs["weight"]
    lists = kept_sets(tokens, SHAPE[2]).rows()
    lists[90].remove(int(tokens[90]))
    support = pyrlk.Support.from_lists(lists)
    adv[:50] = 0.0  # dropped before row 90
    message = rf"tokens\[90\] = {tokens[90]} is outside its support"
    with pytest.raises(ValueError, match=message):
        pyrlk.linear_policy_loss(*leaves, tokens, old, adv, support=support, chunk=7)
    with pytest.raises(ValueError, match=message):
        pyrlk.linear_token_logprobs(*leaves, tokens, support=support, chunk=7)


def test_autocast_does_not_reach_the_products():
    inputs, arguments = example()
    want = gradients(pyrlk.linear_policy_loss, inputs, arguments, {})
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(pyrlk.linear_policy_loss, inputs, arguments, {})
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def peak_and_largest(call) -> tuple[int, int]:
    """(bytes held at the highest point, bytes of the largest allocation) by torch's allocator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            call()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, max(e.nbytes() for e in events)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_chunks_beside_the_gradients(objective, softcap, dtype):
    rows, width, vocab, chunk = 512, 16, 4000, 32
    inputs, arguments = example(dtype, shape=(rows, width, vocab))
    leaves = [x.detach().requires_grad_() for x in inputs.values()]

    def call():
        pyrlk.linear_policy_loss(
            *leaves[:2], *arguments, bias=leaves[2], objective=objective, softcap=softcap,
            chunk=chunk,
        ).backward()  # fmt: skip

    peak, largest = peak_and_largest(call)
    line = 64 * -(-vocab // 64)
    chunks = 2 * chunk * line * 4  # in float32: on CPU a 16-bit chunk is widened for dweight
    gradients = 4 * (2 * rows * width + 2 * vocab * width + 2 * vocab)
    scratch = 4 << 20 if softcap else 0  # float32 blocks of the softcap
    assert largest <= max(chunks // 2, scratch, gradients)
    assert peak <= chunks + gradients + 3 * scratch + 100 * rows * 4
    if not softcap:
        assert peak < rows * vocab * dtype.itemsize  # less than the logits alone


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.CISPO()], ids=repr)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_fixed_shapes_and_undropped_rows_give_the_same(monkeypatch, objective, softcap):
    """What CUDA does, here: the last chunk padded with zeros, and under capture no compaction."""
    inputs, (tokens, old, adv, mask) = example(torch.float64)
    options = {"objective": objective, "softcap": softcap, "chunk": 20, "entropy_coef": 0.01}
    inputs["hidden"] = inputs["hidden"].detach().masked_fill(~mask[:, None], math.nan)
    inputs["hidden"].requires_grad_()
    arguments = (tokens, old, adv, mask)
    loss, want = gradients(pyrlk.linear_policy_loss, inputs, arguments, options)
    monkeypatch.setattr(_head, "_fixed_shapes", lambda x: True)
    for capturing in (False, True):
        monkeypatch.setattr(_head, "_capturing", lambda x, answer=capturing: answer)
        again, got = gradients(pyrlk.linear_policy_loss, inputs, arguments, options)
        torch.testing.assert_close(again, loss)
        assert_close(got, want, 1e-13)


def test_float16_keeps_what_one_over_t_would_push_below_its_range():
    """Under a loss scale the gradient is as exact as that of a loss without the 1/T."""
    inputs, arguments = example(torch.float16, bias=False, shape=(32, 16, 500))
    leaves = list(inputs.values())

    def scaled(normalizer, scale):
        loss = pyrlk.linear_policy_loss(*leaves, *arguments, normalizer=normalizer)
        return torch.autograd.grad(loss * scale, leaves)

    for a, b in zip(scaled(2.0**18, 2.0**18), scaled(1.0, 1.0), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_computed_for_what_needs_no_gradient(allocated):
    inputs, arguments = example()
    frozen = inputs | {"weight": inputs["weight"].detach(), "bias": inputs["bias"].detach()}
    gradients(pyrlk.linear_policy_loss, frozen, arguments, {"chunk": 8})
    assert (SHAPE[0], SHAPE[1]) in {shape for shape, _ in allocated}
    assert (SHAPE[2], SHAPE[1]) not in {shape for shape, _ in allocated}
    allocated.clear()
    with torch.no_grad():
        pyrlk.linear_policy_loss(inputs["hidden"], inputs["weight"], *arguments, chunk=8)
        pyrlk.linear_token_logprobs(inputs["hidden"], inputs["weight"], arguments[0], chunk=8)
    shapes = {shape for shape, _ in allocated}
    assert (8, 704) in shapes  # the chunk, its rows on cache lines
    assert not {(SHAPE[0], SHAPE[1]), (SHAPE[2], SHAPE[1])} & shapes


def test_opcheck():
    torch.manual_seed(0)
    ops = torch.ops.pyrlk
    x, w, b = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(11)
    tokens, old, adv = torch.randint(11, (2, 5)), -torch.rand(2, 5), torch.randn(2, 5)
    integers, numbers = [1, 0, 3, 0, 0, 0], [0.2, 0.28, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    nones = (None,) * 6
    kept = pyrlk.Support.from_lists([range(11)] * 10)[:2]
    cases = ((b, kept, 1, [True] * 3), (None, (None, None), 0, [False, True, False]))
    for bias, pair, stats, wants in cases:
        opcheck(
            ops.linear_policy_loss.default,
            (x, w, bias, tokens, *pair, old, adv, *nones, 1.0, 11, [*integers, stats], numbers,
             2.0, False, 3, wants),
        )  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    for entropy in (False, True):
        rows = (tokens, *(kept if entropy else (None, None)), 1.0, None, 11)
        row = (*rows, "", 0, 0.0, False, 3)  # not sharded
        opcheck(ops.linear_token_logprobs.default, (*leaves, *row, entropy))
        slopes = (torch.randn(2, 5), torch.randn(2, 5) if entropy else None)
        backward = ops.linear_token_logprobs_backward.default
        whole = (torch.tensor(-1), torch.empty(0, 4))
        opcheck(backward, (x, w, b, *row, *whole, *slopes, [True, entropy, True]))
    grads = (torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(11))
    opcheck(ops.linear_attach_grads.default, (*leaves, *grads, torch.ones(()), torch.randn(())))


X, W, IDS, PER = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6), torch.randn(6)
META = {"device": "meta"}
HEAD_ERRORS = [
    ({"hidden": [1.0]}, TypeError, "hidden"),
    ({"hidden": X.long()}, TypeError, "hidden"),
    ({"hidden": torch.randn(6, 8, **META)}, TypeError, "hidden"),
    ({"hidden": X.to_sparse()}, TypeError, "hidden"),
    ({"hidden": torch.randn(())}, ValueError, "hidden"),
    ({"hidden": torch.randn(6, 0)}, ValueError, "hidden"),
    ({"weight": None}, TypeError, "weight"),
    ({"weight": W.double()}, TypeError, "weight"),
    ({"weight": W.bfloat16()}, TypeError, "weight"),
    ({"weight": W.to("meta")}, TypeError, "weight"),
    ({"weight": W[0]}, ValueError, "weight"),
    ({"weight": W.t().contiguous()}, ValueError, "weight"),
    ({"weight": torch.randn(0, 8)}, ValueError, "weight"),
    ({"weight": torch.randn(2, 11, 8)}, ValueError, "weight"),
    ({"weight": torch.randn(22, 16)[::2, ::2]}, ValueError, "weight"),
    ({"tokens": PER}, TypeError, "tokens"),
    ({"tokens": IDS[:5]}, ValueError, "tokens"),
    ({"tokens": IDS + 6}, ValueError, r"tokens\[5\] = 11"),
    ({"tokens": IDS - 1}, ValueError, r"tokens\[0\] = -1"),
    ({"bias": 0.0}, TypeError, "bias"),
    ({"bias": torch.randn(11).double()}, TypeError, "bias"),
    ({"bias": torch.randn(8)}, ValueError, "bias"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"softcap": math.nan}, ValueError, "softcap"),
    ({"softcap": 1e39}, ValueError, "softcap"),
    ({"softcap": "30"}, TypeError, "softcap"),
    ({"softcap": torch.tensor(3.0)}, TypeError, "softcap"),
    ({"logits_dtype": "float32"}, TypeError, "logits_dtype"),
    ({"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype"),
    ({"logits_dtype": torch.float64}, ValueError, "logits_dtype"),
    ({"chunk": 0}, ValueError, "chunk"),
    ({"chunk": -1}, ValueError, "chunk"),
    ({"chunk": 2.0}, TypeError, "chunk"),
    ({"chunk": True}, TypeError, "chunk"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": PER.double()}, TypeError, "temperature"),
    ({"temperature": torch.ones(5)}, ValueError, "temperature"),
    ({"temperature": -torch.ones(6)}, ValueError, r"temperature\[0\]"),
    ({"vocab_size": 12}, ValueError, "vocab_size"),
    ({"vocab_size": 0}, ValueError, "vocab_size"),
    ({"vocab_size": 5}, ValueError, r"tokens\[5\] = 5 is outside \[0, 5\)"),
    ({"group": object()}, TypeError, "group"),
    ({"support": [[1]] * 6}, TypeError, "support"),
    ({"support": pyrlk.Support.from_lists([range(11)] * 5)}, ValueError, "support.offsets"),
    ({"support": pyrlk.Support(IDS, torch.arange(7))}, TypeError, "support.ids"),
    ({"support": pyrlk.Support(IDS.int(), torch.arange(7).int())}, TypeError, "support.offsets"),
    ({"support": pyrlk.Support(IDS.int(), torch.arange(7) + 1)}, ValueError, "support.offsets"),
    ({"support": pyrlk.Support(IDS.int().to("meta"), torch.arange(7))}, TypeError, "support.ids"),
    ({"support": pyrlk.Support(IDS.int() + 6, torch.arange(7))}, ValueError, r"support.ids\[5\]"),
    ({"support": pyrlk.Support.from_lists([[0]] * 6)}, ValueError, r"tokens\[1\] = 1 is outside i"),
]
LOSS_ERRORS = [
    ({"old_logprobs": PER[:5]}, ValueError, "old_logprobs"),
    ({"old_logprobs": PER.double()}, TypeError, "old_logprobs"),
    ({"advantages": PER[:3]}, ValueError, "advantages"),
    ({"advantages": IDS}, TypeError, "advantages"),
    ({"mask": [1] * 6}, TypeError, "mask"),
    ({"mask": -torch.ones(6)}, ValueError, r"mask\[0\]"),
    ({"objective": "dapo"}, TypeError, "objective"),
    ({"objective": pyrlk.DAPO}, TypeError, "objective"),
    ({"objective": pyrlk.GSPO()}, ValueError, "cu_seqlens"),
    ({"kl_coef": 0.1}, ValueError, "ref_logprobs"),
    ({"kl": "k4"}, ValueError, "kl"),
    ({"correction": pyrlk.TIS()}, ValueError, "rollout_logprobs"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens\[1\]"),
    ({"normalizer": 0.0}, ValueError, "normalizer"),
    ({"normalizer": torch.ones(1)}, ValueError, "normalizer"),
    ({"return_stats": 1}, TypeError, "return_stats"),
    ({"inplace": True}, ValueError, "inplace"),
    ({"inplace": 1}, TypeError, "inplace"),
]


def _case_id(value):
    return next(iter(value)) if isinstance(value, dict) else None


@pytest.mark.parametrize(("change", "error", "message"), HEAD_ERRORS + LOSS_ERRORS, ids=_case_id)
def test_bad_arguments_are_named_by_the_loss(change, error, message):
    arguments = {"hidden": X, "weight": W, "tokens": IDS, "old_logprobs": PER, "advantages": PER}
    with pytest.raises(error, match=f"^{message}"):
        pyrlk.linear_policy_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"), [*HEAD_ERRORS, ({"return_entropy": 1}, TypeError, "return_e")],
    ids=_case_id,
)  # fmt: skip
def test_bad_arguments_are_named_by_the_logprobs(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        pyrlk.linear_token_logprobs(**({"hidden": X, "weight": W, "tokens": IDS} | change))


def test_a_main_grad_of_another_shape_is_refused():
    weight = torch.randn(11, 8, requires_grad=True)
    weight.main_grad = torch.zeros(8, 11)
    with pytest.raises(ValueError, match="main_grad"):
        pyrlk.linear_policy_loss(X, weight, IDS, PER, PER)
