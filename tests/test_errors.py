"""Bad inputs: each is a TypeError or ValueError that names its argument, and changes nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import pyrlk
from pyrlk import DAPO, GRPO, PPO, TIS, DrGRPO, Support

B, L, V = 2, 3, 11


def z(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (B, L, V)), dtype=dtype)


def ids(*shape):
    return torch.zeros(shape or (B, L), dtype=torch.long)


def f(*shape):
    return torch.randn(*(shape or (B, L)))


def at(x, value, *index):
    """`x` with one element replaced."""
    x = x.clone()
    x[index] = value
    return x


def loss(**changes):
    given = {"logits": z(), "tokens": ids(), "old_logprobs": f(), "advantages": f()} | changes
    return pyrlk.policy_loss(**given)


def dapo(**changes):
    given = {"logits": z(), "tokens": ids(), "old_logprobs": f(), "advantages": f()} | changes
    return pyrlk.dapo_loss(**given)


def packed(**changes):
    """Flat tokens: [6, V]."""
    given = {"logits": z(6, V), "tokens": ids(6), "old_logprobs": f(6), "advantages": f(6)}
    return pyrlk.policy_loss(**(given | changes))


def from_logprobs(**changes):
    return pyrlk.policy_loss_from_logprobs(
        **({"logprobs": f(), "old_logprobs": f(), "advantages": f()} | changes)
    )


def score(**changes):
    return pyrlk.token_logprobs(**({"logits": z(), "tokens": ids()} | changes))


def grad(**changes):
    given = {"logits": z(), "tokens": ids(), "advantages": f()} | changes
    return pyrlk.reinforce_grad(**given)


def draw(**changes):
    return pyrlk.sample(**({"logits": z(4, V), "seed": 0} | changes))


def overlapping():
    return torch.randn(60).unfold(0, V, 1)[:6].unflatten(0, (B, L))


META = torch.empty(B, L, V, device="meta")
SPARSE = torch.eye(V)[:6].to_sparse()
DEEP = torch.randn(2, 3, 4, V).permute(2, 0, 1, 3)[:, :, :2]  # rows that need three strides
LEAF = torch.randn(B, L, V, requires_grad=True)

T, W = TypeError, ValueError
# One row an argument and a way to get it wrong: type, dtype, device, layout, shape, stride, range,
# NaN, a value inside a tensor with its index, a partner that is missing.
CASES = [
    *(
        (call, {"logits": bad}, error, "logits.*" + wanted)
        for call in (score, loss, grad, draw)
        for bad, error, wanted in [
            ([[0.0]], T, "tensor, got list"),
            (None, T, "tensor, got NoneType"),
            (META, T, "cpu or cuda, got a tensor on meta"),
            (SPARSE, T, "dense tensor"),
            (torch._neg_view(z()), T, "negated view; use logits.resolve_neg"),
            (ids(B, L, V), T, "float32, float16, bfloat16, float64 on cpu, got torch.int64"),
            (z().to(torch.complex64), T, "complex64"),
            (z(B, L, 0), W, "V ≥ 1"),
            (torch.tensor(1.0), W, r"\[\.\.\., V\]"),
            (z(B, L, 2 * V)[..., ::2], W, r"stride 1 .* use logits\.contiguous"),
            (DEEP, W, "two strides"),
        ]
    ),
    *(
        (call, {"tokens": bad}, error, "tokens.*" + wanted)
        for call in (score, loss, grad)
        for bad, error, wanted in [
            ([0], T, "tensor, got list"),
            (torch._neg_view(ids()), T, "negated view"),
            (f(), T, "int64 or int32, got torch.float32"),
            (torch.zeros(B, L, dtype=torch.bool), T, "got torch.bool"),
            (ids(B), W, r"shape \[2, 3\], got \[2\]"),
            (ids(B, L, 1), W, r"\[2, 3, 1\]"),
            (ids(1, L), W, r"\[1, 3\]"),
            (ids().to("meta"), T, "meta"),
            (at(ids(), V, 1, 0), W, r"\[3\] = 11 is outside \[0, 11\)"),
            (at(ids(), -1, 0, 2), W, r"\[2\] = -1"),
            (at(ids(), -101, 0, 0), W, r"\[0\] = -101"),
            (at(ids(), 2**40, 0, 1), W, r"\[1\] = 1099511627776"),
        ]
    ),
    *(
        (call, {"temperature": bad}, error, "temperature.*" + wanted)
        for call in (score, loss, grad)
        for bad, error, wanted in [
            ("1", T, "number, got str"),
            (True, T, "number, got bool"),
            (None, T, "number, got NoneType"),
            (0.0, W, r"\(0, inf\), got 0"),
            (-1.0, W, "got -1"),
            (math.nan, W, "nan"),
            (math.inf, W, "inf"),
            (10**400, W, "lie in"),
            (1e39, W, "float32, got 1e"),
            (1e-50, W, "float32, got 1e-50"),
            (f(B), W, r"shape \[2, 3\]"),
            (ids(), T, "float tensor, got torch.int64"),
            (f().abs().double(), T, "float32 beside logits"),
            (at(torch.ones(B, L), 0.0, 1, 1), W, r"\[4\] = 0"),
            (at(torch.ones(B, L), math.nan, 0, 1), W, r"\[1\] = nan"),
            (at(torch.ones(B, L), math.inf, 0, 0), W, r"\[0\] = inf"),
        ]
    ),
    *(
        (call, {"vocab_size": bad}, error, "vocab_size.*" + wanted)
        for call in (score, loss)
        for bad, error, wanted in [
            (0, W, r"\[1, 11\], got 0"),
            (V + 1, W, "got 12"),
            (5.0, T, "integer, got float"),
            (True, T, "integer, got bool"),
        ]
    ),
    *(
        (loss, {name: bad} | partner, error, f"{name}.*" + wanted)
        for name, partner in [
            ("old_logprobs", {}),
            ("advantages", {}),
            ("ref_logprobs", {"kl_coef": 0.1}),
            ("rollout_logprobs", {"correction": TIS()}),
        ]
        for bad, error, wanted in [
            (1.0, T, "tensor, got float"),
            (ids(), T, "float tensor, got torch.int64"),
            (f().double(), T, "float32 beside logits of torch.float32, got torch.float64"),
            (f(B, L + 1), W, r"shape \[2, 3\].*got \[2, 4\]"),
            (f(1, L), W, r"got \[1, 3\]"),
            (f().to("meta"), T, "meta"),
        ]
    ),
    (loss, {"advantages": f(L)}, W, r"advantages.*or \[2\] \(one a sequence\), got \[3\]"),
    (packed, {"advantages": f(2)}, W, r"advantages must have shape \[6\], got \[2\]"),
    (grad, {"advantages": f(B)}, W, r"advantages must have shape \[2, 3\]"),
    (grad, {"advantages": None}, T, "advantages must be a tensor"),
    *(
        (call, {"mask": bad}, error, r"mask.*" + wanted)
        for call in (loss, from_logprobs)
        for bad, error, wanted in [
            (True, T, "tensor, got bool"),
            (f().to(torch.complex64), T, "bool, int or float"),
            (torch.ones(B), W, r"shape \[2, 3\]"),
            (torch.ones(B, L, device="meta"), T, "meta"),
            (at(torch.ones(B, L), -1.0, 1, 2), W, r"\[5\] = -1.0"),
            (at(torch.ones(B, L, dtype=torch.long), -1, 0, 1), W, r"\[1\] = -1"),
            (at(torch.ones(B, L), math.nan, 0, 0), W, r"\[0\] = nan"),
            (at(torch.ones(B, L), math.inf, 0, 0), W, r"\[0\] = inf"),
        ]
    ),
    *(
        (call, {"objective": bad}, T, "objective must be an instance such as pyrlk.DAPO")
        for call in (loss, from_logprobs)
        for bad in ("dapo", DAPO, None)
    ),
    (loss, {"objective": lambda *a: 3.0}, W, r"objective must return.*got float"),
    (loss, {"objective": lambda *a: f(B)}, W, r"objective must return.*got \[2\]"),
    (packed, {"objective": GRPO()}, W, "cu_seqlens is needed: GRPO"),
    (packed, {"objective": DrGRPO(4)}, W, "cu_seqlens is needed: DrGRPO"),
    *(
        (packed, {"cu_seqlens": bad}, error, "cu_seqlens.*" + wanted)
        for bad, error, wanted in [
            ([0, 6], T, "tensor, got list"),
            (torch.tensor([0.0, 6.0]), T, "int32 or int64"),
            (torch.tensor([[0, 6]]), W, r"\[sequences \+ 1\]"),
            (torch.tensor([], dtype=torch.long), W, r"\[sequences \+ 1\]"),
            (torch.tensor([1, 6]), W, r"\[0\] must be 0, got 1"),
            (torch.tensor([0, 4, 3, 6]), W, r"\[2\] = 3 is less"),
            (torch.tensor([0, 5]), W, r"\[1\] must be 6 \(tokens\), got 5"),
            (torch.tensor([0, 7]), W, "got 7"),
        ]
    ),
    (loss, {"cu_seqlens": torch.tensor([0, 6])}, W, r"cu_seqlens is for packed tokens"),
    *(
        (loss, {name: bad}, error, name + ".*" + wanted)
        for name in ("kl_coef", "entropy_coef")
        for bad, error, wanted in [
            ("0", T, "number, got str"),
            (True, T, "number, got bool"),
            (torch.tensor(0.1), T, "number, got Tensor"),
            (1e308, W, "float32, got 1e"),
            (math.nan, W, "nan"),
            (math.inf, W, "inf"),
        ]
    ),
    (loss, {"kl_coef": 0.1}, W, "ref_logprobs is needed"),
    (loss, {"kl": "k4"}, W, "kl must be one of 'k1', 'k2', 'k3', got 'k4'"),
    (loss, {"kl": 3}, W, "kl must be one of"),
    (loss, {"kl_importance": 1}, T, "kl_importance must be True or False"),
    (loss, {"correction": TIS()}, W, "rollout_logprobs is needed"),
    (loss, {"correction": "tis"}, T, "correction must be a pyrlk.TIS"),
    (loss, {"correction": TIS, "rollout_logprobs": f()}, T, "correction must be"),
    (packed, {"correction": TIS("sequence"), "rollout_logprobs": f(6)}, W, "cu_seqlens is needed"),
    *(
        (call, {"normalizer": bad}, error, "normalizer.*" + wanted)
        for call in (loss, from_logprobs)
        for bad, error, wanted in [
            (0, W, r"\(0, inf\), got 0"),
            (-2.0, W, "got -2"),
            (math.nan, W, "nan"),
            (True, T, "number, got bool"),
            (1e39, W, "float32, got 1e"),
            (torch.ones(1), W, r"0-d, got shape \[1\]"),
            (torch.tensor(0.0), W, "> 0, got 0"),
            (torch.tensor(math.nan), W, "nan"),
            (torch.tensor(math.inf), W, "inf"),
            (torch.tensor(True), T, "bool"),
        ]
    ),
    *((call, {"group": object()}, T, "^group must be a torch") for call in (loss, dapo, score)),
    (loss, {"inplace": 1}, T, "inplace must be True or False"),
    (loss, {"return_stats": None}, T, "return_stats must be True or False"),
    (loss, {"inplace": True, "logits": LEAF}, W, "inplace.*leaf"),
    (loss, {"inplace": True, "logits": LEAF[:, :, :9]}, W, "inplace.*leaf"),
    (loss, {"inplace": True, "logits": z(1, L, V).expand(B, L, V)}, W, "inplace.*overlap"),
    (loss, {"inplace": True, "logits": overlapping()}, W, "inplace.*overlap"),
    (dapo, {"eps_low": -0.1}, W, "eps_low"),
    (dapo, {"eps_low": 1.1}, W, "eps_low"),
    (dapo, {"eps_high": -0.1}, W, "eps_high"),
    (dapo, {"eps_high": math.nan}, W, "eps_high"),
    (dapo, {"eps_low": "0.2"}, T, "eps_low"),
    (dapo, {"eps_high": True}, T, "eps_high"),
    (dapo, {"epsilon": 0.2}, T, "epsilon"),
    (from_logprobs, {"logprobs": f().half()}, T, "logprobs must be float32 or float64"),
    (from_logprobs, {"logprobs": 0.0}, T, "logprobs must be a tensor"),
    (from_logprobs, {"entropy_coef": 0.1}, W, "entropy is needed"),
    (from_logprobs, {"entropy": f(B), "entropy_coef": 0.1}, W, r"entropy must have shape"),
    (from_logprobs, {"old_logprobs": f(B)}, W, "old_logprobs must have shape"),
    (from_logprobs, {"temperature": 0.8}, W, r"^temperature must be 1.0: it belongs to logits"),
    (from_logprobs, {"temperature": f()}, W, r"^temperature must be 1.0"),
    (from_logprobs, {"temperature": "1"}, T, "^temperature must be a number"),
    (from_logprobs, {"support": Support.from_lists([[0]])}, W, "^support must be None"),
    (from_logprobs, {"vocab_size": V}, W, "^vocab_size must be None"),
    (from_logprobs, {"group": object()}, W, "^group must be None"),
    (from_logprobs, {"inplace": True}, W, "^inplace must be False"),
    (from_logprobs, {"inplace": 0}, T, "^inplace must be True or False"),
    (score, {"return_entropy": 1}, T, "return_entropy must be True or False"),
    (grad, {"out": z(B, L, V + 1)}, W, "out must have shape"),
    (grad, {"out": z().half()}, T, "out must be torch.float32 like logits"),
    (grad, {"out": z().requires_grad_()}, W, "out must not require grad"),
    (grad, {"out": z(1, L, V).expand(B, L, V)}, W, "out.*overlap"),
    (grad, {"out": overlapping()}, W, "out.*overlap"),
    (grad, {"out": [0.0]}, T, "out must be a tensor"),
    *((PPO, {"dual_clip": bad}, W, "PPO.dual_clip") for bad in (1.0, 0.5, math.nan)),
    *((GRPO, {"delta": bad}, e, "GRPO.delta") for bad, e in ((0.0, W), (-1, W), ("2", T))),
    (GRPO, {"aggregation": "mean"}, W, "GRPO.aggregation"),
    (DAPO, {"aggregation": "constant"}, W, "DAPO.aggregation 'constant' needs max_length"),
    (DrGRPO, {"max_length": 0}, W, "DrGRPO.max_length"),
    (DrGRPO, {"max_length": math.nan}, W, "DrGRPO.max_length"),
    (DrGRPO, {}, T, "max_length"),
    (TIS, {"level": "batch"}, W, "TIS.level"),
    (TIS, {"mode": "drop"}, W, "TIS.mode"),
    (TIS, {"max_ratio": 0.0}, W, "TIS.max_ratio"),
    (TIS, {"max_ratio": None}, T, "TIS.max_ratio"),
    *(
        (draw, {name: bad}, error, name + ".*" + wanted)
        for name in ("temperature", "top_p", "min_p")
        for bad, error, wanted in [
            ("1", T, "number, got str"),
            (True, T, "number, got bool"),
            (-0.1, W, r"got -0\.1"),
            (math.nan, W, "nan"),
            (f(3), W, r"\[4\], got \[3\]"),
            (ids(4), T, "float tensor"),
            (at(torch.full((4,), 0.5), -1.0, 2), W, r"\[2\] = -1.0"),
            (at(torch.full((4,), 0.5), math.nan, 3), W, r"\[3\] = nan"),
        ]
    ),
    (draw, {"temperature": 1e39}, W, "temperature must be representable in float32"),
    (draw, {"temperature": math.inf}, W, "temperature.*inf"),
    (draw, {"top_p": 1.5}, W, r"top_p must lie in \[0, 1\], got 1.5"),
    (draw, {"min_p": 1.5}, W, r"min_p must lie in \[0, 1\], got 1.5"),
    (draw, {"top_p": at(torch.ones(4), 1.5, 1)}, W, r"top_p\[1\] = 1.5 is outside \[0, 1\]"),
    (draw, {"top_k": 1.0}, T, "top_k must be an integer, got float"),
    (draw, {"top_k": True}, T, "top_k must be an integer, got bool"),
    (draw, {"top_k": f(4)}, T, "top_k must be int64 or int32"),
    (draw, {"top_k": ids(1)}, W, r"top_k.*\[4\]"),
    (draw, {"seed": 1.0}, T, "seed must be an integer"),
    (draw, {"seed": None}, T, "seed must be an integer, got NoneType"),
    (draw, {"seed": 1 << 64}, W, "seed must fit in 64 bits"),
    (draw, {"seed": ids(5)}, W, r"seed.*\[4\], got \[5\]"),
    (draw, {"position": -(1 << 64)}, W, "position must fit in 64 bits"),
    (draw, {"position": f(4)}, T, "position must be int64 or int32"),
    (draw, {"order": "joined"}, W, "order must be one of 'top_k_first', 'joint'"),
    (draw, {"return_support": 1}, T, "return_support must be True or False"),
    (draw, {"return_support": True, "support_capacity": -1}, W, "support_capacity must be ≥ 0"),
    (draw, {"return_support": True, "support_capacity": 1.5}, T, "support_capacity"),
    (draw, {"logits": torch.zeros(1, 1 << 19)}, W, "logits must have V < 524288"),
    (Support.from_lists, {"rows": [[1, 1]]}, W, r"rows\[0\] must hold distinct ids"),
    (Support.from_lists, {"rows": [[], [-1]]}, W, r"rows\[1\]"),
    (Support.from_lists, {"rows": [[1 << 40]]}, W, r"rows\[0\]"),
    (Support.from_lists, {"rows": [[0.5]]}, T, "float"),
    (Support.from_lists([[3]]).to_mask, {"vocab_size": 3}, W, "vocab_size must exceed every id"),
    (Support.from_lists([[3]]).to_mask, {"vocab_size": 0}, W, "vocab_size must be ≥ 1"),
    *(
        (pyrlk.normalizer, {"mask": bad, "objective": DAPO()}, error, "^mask" + wanted)
        for bad, error, wanted in [
            ([1], T, " must be a tensor"),
            (f().to(torch.complex64), T, " must be bool, int or float"),
            (at(torch.ones(B, L), -1.0, 0, 1), W, r"\[1\] = -1"),
            (at(torch.ones(B, L), math.nan, 1, 0), W, r"\[3\] = nan"),
        ]
    ),
    (pyrlk.normalizer, {"mask": f(), "objective": DAPO}, T, "objective must be an instance"),
    (pyrlk.normalizer, {"mask": f(3), "objective": GRPO()}, W, r"mask must be \[B, L\] for GRPO"),
    (
        pyrlk.normalizer,
        {"mask": f(), "objective": DAPO(), "micro_batches": 0},
        W,
        r"micro_batches must lie in \[1, 2",
    ),
]


def label(case):
    call, bad, _, wanted = case
    return f"{call.__name__}-{'-'.join(bad)}-{wanted}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_bad_input_is_an_error_that_names_it(case):
    call, bad, error, wanted = case
    with pytest.raises(error, match=wanted) as raised:
        call(**bad)
    assert raised.type is error


HEAD = {"hidden": torch.randn(B, L, 4), "weight": torch.randn(V, 4), "tokens": ids()}
PER_TOKEN = {"old_logprobs": f(), "advantages": f(), "mask": torch.ones(B, L)}
SCORE = {"temperature": 1.0, "vocab_size": V, "group": None}
SCORE["support"] = Support.from_lists([range(V)] * (B * L))
OPTIONS = {
    "ref_logprobs": f(), "kl_coef": 0.1, "kl": "k3", "kl_importance": False, "entropy_coef": 0.0,
    "rollout_logprobs": f(), "correction": TIS(), "cu_seqlens": None, "normalizer": 3.0,
    "return_stats": False,
}  # fmt: skip
BLOCKS = {"bias": torch.randn(V), "softcap": 3.0, "logits_dtype": None, "chunk": 2}
FULL = {
    pyrlk.token_logprobs: {"logits": z(), "tokens": ids(), **SCORE, "return_entropy": False},
    pyrlk.linear_token_logprobs: {**HEAD, **SCORE, **BLOCKS, "return_entropy": False},
    pyrlk.policy_loss: {
        "logits": z(), "tokens": ids(), **PER_TOKEN, **SCORE, **OPTIONS, "objective": DAPO(),
        "inplace": False,
    },
    pyrlk.linear_policy_loss: {
        **HEAD, **PER_TOKEN, **SCORE, **OPTIONS, **BLOCKS, "objective": DAPO(), "inplace": False,
    },
    pyrlk.policy_loss_from_logprobs: {
        "logprobs": f(), **PER_TOKEN, **OPTIONS, "objective": DAPO(), "entropy": f(),
    },
    pyrlk.reinforce_grad: {
        "logits": z(), "tokens": ids(), "advantages": f(), "temperature": 1.0, "out": z(),
    },
    pyrlk.mtp_loss: {
        **HEAD, "depth": 1, "mask": torch.ones(B, L), "cu_seqlens": None, "kind": "ce",
        "teacher_hidden": None, "detach_weight": True, "group": None, "chunk": 2,
        "return_stats": False,
    },
    pyrlk.normalizer: {
        "mask": f().abs(), "objective": DAPO(), "group": None, "micro_batches": 1,
        "averaged": True,
    },
}  # fmt: skip


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


NONSENSE = {
    "object": object(),
    "bytes": b"1",
    "dict": {},
    "complex": 1j,
    "class": int,
    "beyond double": 10**400,
    "array": np.zeros((B, L)),
    "meta": torch.zeros(B, L, device="meta"),
    "sparse": torch.eye(2).to_sparse(),
    "nested": nested(),
    "float8": torch.zeros(B, L, dtype=torch.float8_e4m3fn),
    "complex tensor": torch.zeros(B, L, dtype=torch.complex64),
}


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call, given in FULL.items() for name in given],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_nonsense_for_any_argument_is_an_error_that_names_it(call, name):
    """Of every kind: what no argument takes. A callable class is an objective only by accident."""
    given = FULL[call]
    call(**given)  # else every error below could have another cause
    for kind, bad in NONSENSE.items():
        with pytest.raises((TypeError, ValueError), match=name) as raised:
            call(**(given | {name: bad}))
        assert raised.type in (TypeError, ValueError), kind


@pytest.mark.parametrize(
    "bad",
    [
        {"tokens": at(ids(), V, 1, 2)},
        {"mask": at(torch.ones(B, L), -1.0, 1, 2)},
        {"temperature": at(torch.ones(B, L), 0.0, 1, 2)},
        {"normalizer": torch.tensor(0.0)},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_logits_in_place_are_untouched_after_an_error(bad):
    logits = z().requires_grad_() * 1
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=next(iter(bad))):
        dapo(logits=logits, inplace=True, **bad)
    assert torch.equal(logits, before)


def test_masked_tokens_are_never_validated():
    tokens = at(ids(), 10**6, 0, 0)
    mask = at(torch.ones(B, L), 0.0, 0, 0)
    assert loss(tokens=tokens, mask=mask).isfinite()
    tokens, mask = at(ids(), -100, 0, 0), at(torch.ones(B, L), -1.0, 0, 0)
    assert loss(tokens=tokens, mask=mask).isfinite()


def test_tensors_of_another_graph_are_constants():
    logits = z().requires_grad_()
    others = {"old_logprobs": f(), "advantages": f(), "mask": torch.rand(B, L)}
    others |= {"ref_logprobs": f(), "rollout_logprobs": f(), "normalizer": torch.tensor(3.0)}
    others |= {"temperature": torch.rand(B, L) + 0.5}
    options = {"kl_coef": 0.1, "correction": TIS(), "return_stats": True}
    results = []
    for wants in (False, True):
        for x in others.values():
            x.requires_grad_(wants)
        value, stats = loss(logits=logits, **others, **options)
        (slope,) = torch.autograd.grad(value, logits)
        assert not any(s.requires_grad for s in stats)
        results.append((value.detach(), slope))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not loss(**others).requires_grad
    assert not grad(advantages=f().requires_grad_()).requires_grad
    tau = others["temperature"]
    assert not pyrlk.token_logprobs(z(), ids(), temperature=tau).requires_grad
    drawn = pyrlk.sample(z(), seed=0, temperature=tau, min_p=0.1 * tau)
    assert not drawn.logprob.requires_grad
    assert not drawn.full_logprob.requires_grad
    assert not pyrlk.normalizer(others["mask"], pyrlk.GRPO()).requires_grad
