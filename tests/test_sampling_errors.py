"""More bad inputs of the sampler (others: tests/test_errors.py); each error names its argument."""

from __future__ import annotations

import math

import pytest
import torch

import pyrlk

B, V = 4, 70


def words(*shape, dtype=torch.int32):
    return torch.zeros(shape or (B, 3), dtype=dtype)


T, W = TypeError, ValueError
CASES = [
    ({"allowed": [0]}, T, "allowed must be a tensor, got list"),
    ({"allowed": words(dtype=torch.int64)}, T, "allowed must be int32 .*, got torch.int64"),
    ({"allowed": torch.ones(B, V, dtype=torch.bool)}, T, "allowed must be int32"),
    ({"allowed": words(B, 2)}, W, r"allowed must have shape \[4, 3\] for V = 70, got \[4, 2\]"),
    ({"allowed": words(B, 4)}, W, r"allowed must have shape \[4, 3\]"),
    ({"allowed": words(1, 3)}, W, r"allowed must have shape \[4, 3\]"),
    ({"allowed": words(3)}, W, r"allowed must have shape"),
    ({"allowed": words().to("meta")}, T, "allowed must be on cpu or cuda"),
    ({"ties": "drop"}, W, "ties must be one of 'trim', 'keep', got 'drop'"),
    ({"ties": None}, W, "ties must be one of"),
    ({"ties": True}, W, "ties must be one of"),
    ({"order": None}, W, "order must be one of"),
    ({"portable": 1}, T, "portable must be True or False, got int"),
    ({"portable": None}, T, "portable must be True or False"),
    ({"return_support": None}, T, "return_support must be True or False"),
    ({"support_capacity": -1}, W, "support_capacity must be ≥ 0, got -1"),
    ({"support_capacity": "8"}, T, "support_capacity must be an integer, got str"),
    ({"support_capacity": True}, T, "support_capacity must be an integer, got bool"),
    ({"temperature": None}, T, "temperature must be a number, got NoneType"),
    ({"temperature": -1e-30}, W, "temperature must lie in"),
    ({"temperature": torch.ones(2, 2)}, W, r"temperature.*\[4\], got \[2, 2\]"),
    ({"temperature": torch.tensor([1.0, 1.0, math.inf, 1.0])}, W, r"temperature\[2\] = inf"),
    ({"top_p": 1 + 1e-12}, W, "top_p must lie in"),
    ({"top_p": torch.tensor([0.5, 0.5, 0.5, 1.1])}, W, r"top_p\[3\] = 1.1"),
    ({"min_p": math.inf}, W, "min_p must lie in"),
    ({"top_k": "5"}, T, "top_k must be an integer, got str"),
    ({"top_k": None}, T, "top_k must be an integer, got NoneType"),
    ({"top_k": 1 << 64}, W, "top_k must fit in 64 bits"),
    ({"top_k": torch.ones(B, dtype=torch.bool)}, T, "top_k must be int64 or int32"),
    ({"seed": torch.zeros(B)}, T, "seed must be int64 or int32"),
    ({"seed": torch.zeros(B, dtype=torch.uint8)}, T, "seed must be int64 or int32"),
    ({"seed": True}, T, "seed must be an integer, got bool"),
    ({"position": None}, T, "position must be an integer"),
    ({"position": 0.0}, T, "position must be an integer, got float"),
    ({"position": torch.zeros(3, dtype=torch.long)}, W, r"position.*\[4\], got \[3\]"),
    ({"logits": torch.zeros(B, V, dtype=torch.int64)}, T, "logits must be float32"),
    ({"logits": torch.zeros(B, 0)}, W, "logits must have shape"),
    ({"logits": torch.zeros(V, B).t()}, W, "logits must have stride 1"),
    ({"logits": [[0.0]]}, T, "logits must be a tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("call", [pyrlk.sample, pyrlk.replay])
def test_a_bad_argument_is_named(call, number):
    bad, error, wanted = CASES[number]
    with pytest.raises(error, match=wanted):
        call(**({"logits": torch.randn(B, V), "seed": 0} | bad))
