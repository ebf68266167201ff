"""Bad inputs of the objectives: each is a TypeError or ValueError that names the field or argument.

What every loss checks alike (shapes, dtypes, masks, normalisers) is in test_errors.py; here are the
fields of the objectives and of TIS, partners that only some objectives need, callables, and the
errors of the path over log-probs.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import pyrlk
from pyrlk import (
    BNPO,
    CISPO,
    DAPO,
    DPPO,
    DRO,
    GMPO,
    GRPO,
    GSPO,
    LUSPO,
    PPO,
    REINFORCE,
    SAPO,
    TIS,
    VESPO,
    ClipCov,
    DrGRPO,
    KLCov,
)

B, L, V = 2, 3, 7
T, W = TypeError, ValueError


def f(*shape):
    return torch.zeros(shape or (B, L))


def from_logprobs(**changes):
    given = {"logprobs": f(), "old_logprobs": f(), "advantages": f() + 1} | changes
    return pyrlk.policy_loss_from_logprobs(**given)


def loss(**changes):
    given = {
        "logits": f(B, L, V),
        "tokens": f().long(),
        "old_logprobs": f(),
        "advantages": f() + 1,
    } | changes
    return pyrlk.policy_loss(**given)


def flat(**changes):
    """[6] log-probs: nothing says where a sequence begins."""
    given = {"logprobs": f(6), "old_logprobs": f(6), "advantages": f(6) + 1} | changes
    return pyrlk.policy_loss_from_logprobs(**given)


def flat_logits(**changes):
    given = {"logits": f(6, V), "tokens": f(6).long(), "old_logprobs": f(6), "advantages": f(6)}
    return pyrlk.policy_loss(**(given | changes))


CLIPPED = (PPO, GRPO, BNPO, DAPO, CISPO, DPPO, GSPO, LUSPO, GMPO, ClipCov)
ALL = (REINFORCE, *CLIPPED, SAPO, VESPO, KLCov)
HUGE = 10**400  # an integer that no double holds
NO_NUMBER = [("0.2", T), (None, T), (True, T), ([0.2], T), (torch.tensor(0.2), T), (0.2j, T)]


def field(cls, name, bad, error=W, wanted="", **others):
    return cls, {name: bad} | others, error, rf"^{cls.__name__}\.{name}\b.*{wanted}"


CASES = [
    # Clip bounds: 0 ≤ eps_low ≤ 1, eps_high ≥ 0, of every objective that has them.
    *(
        field(cls, "eps_low", bad, W, r"\[0, 1\]")
        for cls in CLIPPED
        for bad in (-0.1, 1.5, math.nan, -math.inf)
    ),
    *(field(cls, "eps_high", bad, W, "got") for cls in CLIPPED for bad in (-1e-9, math.nan, HUGE)),
    *(field(cls, "eps_high", "0.2", T, "number, got str") for cls in CLIPPED),
    *(field(PPO, "eps_low", bad, error, "number") for bad, error in NO_NUMBER),
    # Optional bounds.
    *(field(PPO, "dual_clip", bad) for bad in (1, -3.0, -math.inf, HUGE)),
    *(field(PPO, "dual_clip", bad, T, "number") for bad in ("3", True)),
    *(
        field(cls, "delta", bad, error)
        for cls in (BNPO, DAPO, LUSPO)
        for bad, error in [(0.0, W), (-1.0, W), (math.nan, W), ("2", T), (False, T)]
    ),
    # Finite positive parameters: infinity would make every loss NaN.
    *(
        field(cls, name, bad, W, r"\(0, inf\), got", **others)
        for cls, name, others in [
            (SAPO, "temperature_pos", {}),
            (SAPO, "temperature_neg", {}),
            (VESPO, "lambda_pos", {}),
            (VESPO, "lambda_neg", {}),
            (DRO, "beta", {}),
            (DrGRPO, "max_length", {}),
        ]
        for bad in (0.0, -1, math.nan, math.inf, HUGE)
    ),
    *(
        field(VESPO, name, bad, W, r"\[0, inf\), got")
        for name in ("k_pos", "k_neg")
        for bad in (-0.5, math.nan, math.inf)
    ),
    *(field(SAPO, "temperature_pos", bad, error) for bad, error in NO_NUMBER),
    *(field(VESPO, "k_neg", bad, error) for bad, error in NO_NUMBER[:3]),
    *(field(DRO, "beta", bad, error) for bad, error in NO_NUMBER[:3]),
    *(field(DrGRPO, "max_length", bad, error) for bad, error in NO_NUMBER[:3]),
    (DRO, {}, T, "beta"),
    # DPPO.
    *(
        field(DPPO, "kind", bad, W, "'tv' or 'kl', got")
        for bad in ("js", "", None, 1, "TV", ["tv"])
    ),
    *(field(DPPO, "max_ratio", bad) for bad in (0, -2.0, math.nan)),
    field(DPPO, "max_ratio", None, T, "number, got NoneType"),
    # GSPO.
    *(
        field(GSPO, "token_level", bad, T, "True or False, got")
        for bad in (1, "yes", None, torch.tensor(True))
    ),
    # ClipCov and KLCov.
    *(
        field(cls, "share", bad, W, r"\(0, 1\]")
        for cls in (ClipCov, KLCov)
        for bad in (0, -1e-4, 1.5, math.nan, math.inf)
    ),
    *(field(cls, "share", "all", T, "number") for cls in (ClipCov, KLCov)),
    *(field(ClipCov, name, math.nan) for name in ("cov_low", "cov_high")),
    *(field(ClipCov, name, "1", T, "number") for name in ("cov_low", "cov_high")),
    field(ClipCov, "cov_low", 5.0, W, "less than cov_high, got 5 and 5"),
    field(ClipCov, "cov_low", 2.0, W, "got 2 and 1", cov_high=1.0),
    *(
        field(ClipCov, "seed", bad, T, "integer, got")
        for bad in (1.0, "1", None, True, torch.tensor(1))
    ),
    *(field(ClipCov, "seed", bad, W, "64 bits, got") for bad in (1 << 64, -(1 << 63) - 1)),
    *(field(KLCov, "kl_coef", bad) for bad in (-1.0, math.nan, math.inf)),
    field(KLCov, "kl_coef", None, T, "number"),
    # Aggregation.
    *(
        field(cls, "aggregation", bad, W, "one of token, sequence, sequence-sum, constant, got")
        for cls, bad in zip(ALL, ["mean", "Token", "", None, 0, True, ["token"]] * 2, strict=True)
    ),
    *(
        field(cls, "aggregation", "constant", W, "needs max_length, which DrGRPO has")
        for cls in ALL
    ),
    # TIS.
    *(field(TIS, "level", bad, W, "'token' or 'sequence'") for bad in ("seq", None, 0, "Token")),
    *(field(TIS, "mode", bad, W, "'clip' or 'mask'") for bad in ("truncate", None, True)),
    *(field(TIS, "max_ratio", bad) for bad in (-1.0, -math.inf, math.nan, HUGE)),
    *(field(TIS, "max_ratio", bad, T, "number") for bad in ("2", True, torch.tensor(2.0))),
    # Unknown fields and positions.
    (GRPO, {"epsilon": 0.2}, T, "epsilon"),
    (CISPO, {"eps_max": 5.0}, T, "eps_max"),
    (KLCov, {"seed": 1}, T, "seed"),
    (REINFORCE, {"eps_low": 0.2}, T, "eps_low"),
    (SAPO, {"eps_low": 0.2}, T, "eps_low"),
    # A term over sequences needs to know them, whatever the aggregation is.
    *(
        (call, {"objective": objective}, W, f"^cu_seqlens is needed: {type(objective).__name__}")
        for call in (flat, flat_logits)
        for objective in [
            VESPO(),
            GSPO(),
            GSPO(aggregation="token"),
            LUSPO(aggregation="token"),
            GMPO(aggregation="token"),
            SAPO(),
            GMPO(),
            LUSPO(),
            DAPO(aggregation="sequence-sum"),
            CISPO(aggregation="sequence"),
        ]
    ),
    (flat, {"objective": VESPO(), "advantages": f(2)}, W, "^advantages must have shape"),
    (
        flat,
        {"correction": TIS("sequence"), "rollout_logprobs": f(6)},
        W,
        "^cu_seqlens is needed: correction",
    ),
    # Callables.
    *(
        (call, {"objective": make}, error, "^objective must return .*" + wanted)
        for call in (from_logprobs, loss)
        for make, error, wanted in [
            (lambda lp, *_: None, W, "got NoneType"),
            (lambda lp, *_: 0.0, W, "got float"),
            (lambda lp, *_: (lp, lp), W, "got tuple"),
            (lambda lp, *_: lp.sum(-1), W, r"losses \[2, 3\] or a 0-d loss, got \[2\]"),
            (lambda lp, *_: lp[None], W, r"got \[1, 2, 3\]"),
            (lambda lp, *_: lp.sum()[None], W, r"got \[1\]"),
            (lambda lp, *_: lp.long(), T, "float loss, got torch.int64"),
            (lambda lp, *_: lp > 0, T, "float loss, got torch.bool"),
            (lambda lp, *_: lp.to(torch.complex64), T, "complex64"),
            (lambda lp, *_: lp.to("meta"), W, "on cpu, got one on meta"),
        ]
    ),
    (from_logprobs, {"objective": lambda lp: lp}, T, "positional argument"),
    *(
        (call, {"objective": bad}, T, r"^objective must be an instance such as pyrlk\.DAPO\(\)")
        for call in (from_logprobs, loss)
        for bad in (GSPO, "gspo", 3, {"name": "gspo"}, ())
    ),
    # Log-probs.
    *(
        (from_logprobs, {"logprobs": bad}, T, "^logprobs must be " + wanted)
        for bad, wanted in [
            (f().bfloat16(), "float32 or float64, got torch.bfloat16"),
            (f().long(), "float32 or float64, got torch.int64"),
            (None, "a tensor, got NoneType"),
            ([0.0], "a tensor, got list"),
            (f().to("meta"), "on cpu or cuda"),
            (f().to_sparse(), "a dense tensor"),
        ]
    ),
    *(
        (from_logprobs, {name: bad} | partner, error, f"^{name} must .*" + wanted)
        for name, partner in [
            ("old_logprobs", {}),
            ("advantages", {}),
            ("entropy", {"entropy_coef": 0.1}),
            ("ref_logprobs", {"kl_coef": 0.1}),
            ("rollout_logprobs", {"correction": TIS()}),
        ]
        for bad, error, wanted in [
            (f(B, L, 1), W, r"shape \[2, 3\]"),
            (f(L, B), W, r"got \[3, 2\]"),
            (f().bool(), T, "float tensor, got torch.bool"),
            (f().double(), T, "float32 beside logprobs"),
            ("none", T, "tensor, got str"),
        ]
    ),
    (from_logprobs, {"entropy_coef": -0.1}, W, "^entropy is needed where entropy_coef is not 0"),
    (from_logprobs, {"kl_coef": -0.1}, W, "^ref_logprobs is needed where kl_coef is not 0"),
    (from_logprobs, {"correction": TIS()}, W, "^rollout_logprobs is needed"),
    (from_logprobs, {"correction": 2.0, "rollout_logprobs": f()}, T, "^correction must be"),
    (from_logprobs, {"kl": "K3"}, W, "^kl must be one of"),
    (from_logprobs, {"kl_importance": "yes"}, T, "^kl_importance must be True or False"),
    (from_logprobs, {"return_stats": 1}, T, "^return_stats must be True or False"),
    (from_logprobs, {"entropy_coef": HUGE}, W, "^entropy_coef must lie in"),
    (from_logprobs, {"temperature": 0.5}, W, "^temperature must be 1.0: it belongs to logits"),
    # The global denominator.
    *(
        (pyrlk.normalizer, {"mask": f(), "objective": bad}, T, "^objective must be an instance")
        for bad in ("dapo", DAPO, None, lambda *a: a)
    ),
    *(
        (pyrlk.normalizer, {"mask": f(6), "objective": o}, W, r"^mask must be \[B, L\] for")
        for o in (GSPO(), LUSPO(), DrGRPO(4))
    ),
    (
        pyrlk.normalizer,
        {"mask": f(), "objective": DAPO(), "micro_batches": 1.5},
        T,
        "^micro_batches must be an integer",
    ),
    (
        pyrlk.normalizer,
        {"mask": f(), "objective": DAPO(), "averaged": 1},
        T,
        "^averaged must be True or False",
    ),
]


def label(case):
    call, bad, _, _ = case
    values = (v if isinstance(v, (str, int, float, type(None))) else type(v) for v in bad.values())
    return f"{call.__name__}-{'-'.join(bad)}-{'-'.join(str(v)[:24] for v in values)}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_bad_input_is_an_error_that_names_it(case):
    call, bad, error, wanted = case
    with pytest.raises(error, match=wanted) as raised:
        call(**bad)
    assert raised.type is error


@pytest.mark.parametrize("cls", [c for c in (*ALL, DrGRPO, DRO) if dataclasses.fields(c)])
def test_objectives_are_frozen_and_equal_by_value(cls):
    required = {"max_length": 8.0} if cls is DrGRPO else {"beta": 0.5} if cls is DRO else {}
    objective = cls(**required)
    assert objective == cls(**required)
    assert hash(objective) == hash(cls(**required))
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(objective, field.name, 1)


@pytest.mark.parametrize(
    "objective",
    [
        PPO(eps_high=math.inf),
        PPO(dual_clip=math.inf),
        GRPO(delta=math.inf),
        CISPO(eps_high=math.inf),
        DPPO(max_ratio=math.inf),
        ClipCov(cov_low=-math.inf, cov_high=math.inf),
        DAPO(eps_low=0, eps_high=0),
        VESPO(k_pos=0, k_neg=0),
        ClipCov(seed=-(1 << 63)),
        ClipCov(seed=(1 << 64) - 1),
        KLCov(share=1),
    ],
    ids=repr,
)
def test_the_ends_of_the_ranges_are_legal(objective):
    torch.manual_seed(0)
    lp = torch.randn(B, L).requires_grad_()
    value = pyrlk.policy_loss_from_logprobs(
        lp, torch.randn(B, L), torch.randn(B, L), objective=objective
    )
    value.backward()
    assert value.isfinite()
    assert lp.grad.isfinite().all()


def test_an_error_leaves_logits_in_place_untouched():
    logits = torch.randn(B, L, V).requires_grad_() * 1
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="objective must return"):
        loss(logits=logits, inplace=True, objective=lambda lp, *_: lp[0])
    assert torch.equal(logits, before)
