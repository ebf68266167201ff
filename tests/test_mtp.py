"""The multi-token-prediction loss: against float64, and what it may neither read nor allocate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrlk
from pyrlk import _head, reference

LENGTHS = [4, 0, 1, 7, 2]  # packed: an empty sequence, and ones too short to predict in


def example(kind, dtype=torch.float32, shape=(3, 8), width=16, vocab=50, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(*shape, width).to(dtype).requires_grad_()
    weight = (2 * torch.randn(vocab, width) / math.sqrt(width)).to(dtype).requires_grad_()
    teacher = torch.randn(*shape, width).to(dtype) if kind == "tv" else None
    return hidden, weight, torch.randint(vocab, shape), {"kind": kind, "teacher_hidden": teacher}


def gradients(f, hidden, weight, tokens, options):
    """(loss, ∂hidden, ∂weight): zeros where the loss does not depend on them."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = f(*leaves, tokens, **options)
    if not loss.requires_grad:
        return [loss, *map(torch.zeros_like, leaves)]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def truth(hidden, weight, tokens, options):
    options = {k: v for k, v in options.items() if k != "chunk"}
    if options.get("teacher_hidden") is not None:
        options["teacher_hidden"] = options["teacher_hidden"].double()
    return gradients(reference.mtp_loss, hidden.double(), weight.double(), tokens, options)


def assert_close(got, want, bound):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= bound * (b.norm() + 0.1)


# Depths to beyond every sequence; layouts and masks as in the policy losses.
@settings(max_examples=60)
@given(
    st.sampled_from(["ce", "tv"]),
    st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-13)]),
    st.sampled_from([1, 2, 3, 9]),
    st.booleans(),
    st.sampled_from(["none", "bool", "float"]),
    st.booleans(),
    st.sampled_from([None, 1, 5]),
    st.integers(0, 2**31),
)
def test_loss_and_gradients_equal_float64(
    kind, precision, depth, packed, masked, detach, chunk, seed
):
    dtype, bound = precision
    shape = (sum(LENGTHS),) if packed else (3, 8)
    hidden, weight, tokens, options = example(kind, dtype, shape, seed=seed)
    tokens[torch.rand(shape) < 0.1] = -100
    options |= {"depth": depth, "detach_weight": detach, "chunk": chunk}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0)
    if masked != "none":
        keep = torch.rand(shape) > 0.3
        options["mask"] = keep if masked == "bool" else keep * torch.rand(shape)
    got = gradients(pyrlk.mtp_loss, hidden, weight, tokens, options)
    want = truth(hidden, weight, tokens, options)
    assert got[0].dtype == dtype
    assert [g.dtype for g in got[1:]] == [dtype, dtype]
    assert_close(got, want, bound)
    assert got[2].eq(0).all() or not detach


@pytest.mark.parametrize("kind", ["ce", "tv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_near_float64(kind, dtype):
    """Rounding z to 16 bits moves q by up to |z|·2⁻⁹ (bfloat16), which is what 3 % allow."""
    hidden, weight, tokens, options = example(kind, dtype, (4, 40), 32, 200)
    options["detach_weight"] = False
    got = gradients(pyrlk.mtp_loss, hidden, weight, tokens, options)
    want = truth(hidden, weight, tokens, options)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 0.03 * b.norm()


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_gradient_is_the_slope_of_the_loss(kind):
    hidden, weight, tokens, options = example(kind, torch.float64, (2, 5), 3, 7)
    options["detach_weight"] = False

    def f(hidden, weight):
        return pyrlk.mtp_loss(hidden, weight, tokens, **options)

    grads = torch.autograd.grad(f(hidden, weight), (hidden, weight))
    # The weight moves the trunk's distribution too, which is a constant of the loss.
    leaves = [hidden, weight] if kind == "ce" else [hidden]
    with torch.no_grad():
        for i, leaf in enumerate(leaves):
            slopes = []
            for e in 1e-6 * torch.eye(leaf.numel(), dtype=torch.float64).view(-1, *leaf.shape):
                up, down = [hidden, weight], [hidden, weight]
                up[i], down[i] = leaf + e, leaf - e
                slopes.append((f(*up) - f(*down)) / 2e-6)
            torch.testing.assert_close(
                grads[i], torch.stack(slopes).view_as(leaf), rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_what_predicts_nothing_may_hold_anything(kind):
    """Ends of sequences, −100 and mask 0: neither their rows nor their tokens are read."""
    shape, depth = (sum(LENGTHS),), 2
    hidden, weight, tokens, options = example(kind, shape=shape)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    mask = torch.ones(shape)
    mask[9], tokens[4] = 0, -100
    options |= {"depth": depth, "cu_seqlens": cu, "mask": mask, "detach_weight": False}
    clean = gradients(pyrlk.mtp_loss, hidden, weight, tokens, options)
    start = cu[torch.searchsorted(cu, torch.arange(shape[0]), right=True) - 1]
    predicted = torch.arange(shape[0]) - start > depth
    predicted &= (mask != 0) & (tokens != -100)
    used = torch.zeros(shape, dtype=torch.bool)
    used[predicted.nonzero()[:, 0] - depth - 1] = True
    poisoned = hidden.detach().masked_fill(~used[:, None], math.nan)
    if kind == "tv":
        taught = torch.zeros(shape, dtype=torch.bool)
        taught[predicted.nonzero()[:, 0] - 1] = True
        options["teacher_hidden"] = options["teacher_hidden"].masked_fill(
            ~taught[:, None], math.nan
        )
    wild = torch.where(predicted | (tokens == -100), tokens, 10**6)
    again = gradients(pyrlk.mtp_loss, poisoned, weight, wild, options)
    assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))
    assert again[1][~used].eq(0).all()
    assert used.sum() == 4  # of 4 and 7 tokens: 1 + 4, less one under the mask


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_statistics_count_tokens_and_the_drafts_first_choices(kind):
    hidden, weight, tokens, options = example(kind, shape=(2, 30), vocab=4)
    tokens[0, 5] = -100
    options["mask"] = torch.rand(2, 30) > 0.2
    loss, stats = pyrlk.mtp_loss(hidden, weight, tokens, chunk=7, return_stats=True, **options)
    choice = (hidden @ weight.t()).argmax(-1)[:, :-2]
    counted = (options["mask"] & (tokens != -100))[:, 2:]
    assert stats.tokens == counted.sum()
    assert stats.matches == ((choice == tokens[:, 2:]) & counted).sum()
    assert 0 < stats.matches < stats.tokens
    assert torch.equal(loss, pyrlk.mtp_loss(hidden, weight, tokens, chunk=7, **options))


def test_a_draft_that_is_the_trunk_has_no_total_variation():
    hidden, weight, tokens, _ = example("tv", torch.float64)
    teacher = hidden.detach().roll(1, 1)  # row t + 1 of the trunk is row t of the draft
    loss = pyrlk.mtp_loss(hidden, weight, tokens, kind="tv", teacher_hidden=teacher)
    assert loss == 0
    far = pyrlk.mtp_loss(hidden, weight, tokens, kind="tv", teacher_hidden=-50 * teacher)
    assert 0.5 < far < 1


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_fixed_shapes_and_undropped_rows_give_the_same(monkeypatch, kind):
    """What CUDA does, and what it does under graph capture, on the CPU."""
    arguments = example(kind, torch.float64)
    arguments[-1].update(depth=2, chunk=5, detach_weight=False)
    want = gradients(pyrlk.mtp_loss, *arguments)
    monkeypatch.setattr(_head, "_fixed_shapes", lambda x: True)
    for capturing in (False, True):
        monkeypatch.setattr(_head, "_capturing", lambda x, answer=capturing: answer)
        assert_close(gradients(pyrlk.mtp_loss, *arguments), want, 1e-13)


def test_nothing_learns_that_is_detached():
    hidden, weight, tokens, options = example("tv")
    teacher = options["teacher_hidden"].requires_grad_()
    pyrlk.mtp_loss(hidden, weight, tokens, **options).backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None
    assert teacher.grad is None
    with torch.no_grad():
        assert not pyrlk.mtp_loss(hidden, weight, tokens, **options).requires_grad


def test_the_gradient_of_the_weight_goes_into_main_grad():
    hidden, weight, tokens, options = example("ce")
    want = gradients(pyrlk.mtp_loss, hidden, weight, tokens, options | {"detach_weight": False})
    weight.main_grad = torch.ones_like(weight)
    pyrlk.mtp_loss(hidden, weight, tokens, detach_weight=False, **options).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + want[2])


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_a_second_backward_raises(kind):
    hidden, weight, tokens, options = example(kind)
    loss = pyrlk.mtp_loss(hidden, weight, tokens, **options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_the_logits_never_exist_and_the_states_are_not_copied(kind, allocated):
    hidden, weight, tokens, options = example(kind, shape=(4, 64), width=8, vocab=3000)
    pyrlk.mtp_loss(hidden, weight, tokens, chunk=16, **options).backward()
    sizes = [math.prod(shape) for shape, _ in allocated]
    assert max(sizes) <= 16 * 3008  # a chunk, its rows on cache lines
    states = [shape for shape, _ in allocated if math.prod(shape) >= hidden.numel() // 2]
    states = [shape for shape in states if shape[-1] == 8]
    assert states == [(4 * 64, 8)]  # ∂hidden


@pytest.mark.parametrize("kind", ["ce", "tv"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (1,), (2, 2)])
def test_nothing_to_predict_gives_zero(kind, shape):
    hidden, weight, tokens, options = example(kind, shape=shape)
    loss, stats = pyrlk.mtp_loss(hidden, weight, tokens, return_stats=True, **options)
    loss.backward()
    assert loss == 0
    assert stats.tokens == stats.matches == 0
    assert hidden.grad.eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_one_graph_for_every_length(kind):
    torch._dynamo.reset()
    compiled = torch.compile(pyrlk.mtp_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in range(5, 65, 3):
            arguments = example(kind, shape=(2, length), seed=length)
            got = gradients(compiled, *arguments)
            want = gradients(pyrlk.mtp_loss, *arguments)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


X, W, IDS = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
TV = {"kind": "tv", "teacher_hidden": X}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": X.long()}, TypeError, "hidden"),
        ({"hidden": X[0]}, ValueError, "hidden must have shape"),
        ({"hidden": X.to("meta")}, TypeError, "hidden"),
        ({"weight": W.double()}, TypeError, "weight"),
        ({"weight": W[:, :4]}, ValueError, "weight"),
        ({"tokens": X[:, 0]}, TypeError, "tokens"),
        ({"tokens": IDS[:5]}, ValueError, "tokens"),
        ({"tokens": IDS + 6}, ValueError, r"tokens\[5\] = 11 is outside \[0, 11\)"),
        ({"tokens": IDS - 3}, ValueError, r"tokens\[2\] = -1 is outside"),
        ({"depth": 0}, ValueError, "depth"),
        ({"depth": -1}, ValueError, "depth"),
        ({"depth": 1.0}, TypeError, "depth"),
        ({"depth": True}, TypeError, "depth"),
        ({"depth": 1 << 40}, ValueError, "depth"),
        ({"mask": [1] * 6}, TypeError, "mask"),
        ({"mask": torch.ones(5)}, ValueError, "mask"),
        ({"mask": -torch.ones(6)}, ValueError, r"mask\[0\] = -1"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens\[1\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, r"cu_seqlens\[2\]"),
        ({"kind": "kl"}, ValueError, "kind"),
        ({"kind": None}, ValueError, "kind"),
        ({"kind": "tv"}, ValueError, "teacher_hidden .* missing for 'tv'"),
        ({"teacher_hidden": X}, ValueError, "teacher_hidden .* given for 'ce'"),
        (TV | {"teacher_hidden": [1.0]}, TypeError, "teacher_hidden"),
        (TV | {"teacher_hidden": X.double()}, TypeError, "teacher_hidden"),
        (TV | {"teacher_hidden": X[:, :4]}, ValueError, "teacher_hidden"),
        ({"detach_weight": 1}, TypeError, "detach_weight"),
        ({"group": object()}, TypeError, "group"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"return_stats": 1}, TypeError, "return_stats"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        pyrlk.mtp_loss(**({"hidden": X, "weight": W, "tokens": IDS} | change))
