"""Random batches for the comparisons, and verl's losses without verl's dependencies."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import pyrlk


class Data(NamedTuple):
    """A float64 batch [B, L], ratios outside the clip range on both sides, row 3 without tokens."""

    logits: Tensor
    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor


def make_batch(seed: int = 0, *, per_token: bool = False, empty_row: bool = True) -> Data:
    torch.manual_seed(seed)
    shape, vocab = (6, 9), 13
    logits = torch.randn(*shape, vocab, dtype=torch.float64)
    tokens = torch.randint(vocab, shape)
    logprobs, entropy = pyrlk.token_logprobs(logits, tokens, return_entropy=True)

    def near(scale):
        return logprobs + scale * torch.randn(shape, dtype=torch.float64)

    advantages = torch.tensor([1.3, -0.7, 0.4, 2.0, -1.1, 0.0], dtype=torch.float64)[:, None]
    if per_token:
        advantages = torch.randn(shape, dtype=torch.float64)
        advantages[:, 2] = 0.0
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, 4:] = 0  # a short response
    mask[2, 1:] = 0  # one token
    mask[4, 2:5] = 0  # what a tool wrote
    if empty_row:
        mask[3] = 0
    return Data(
        logits, tokens, logprobs, entropy, near(0.4), near(0.3), near(0.2), advantages, mask
    )


@pytest.fixture(scope="session")
def batch():
    return make_batch


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """The largest difference of (loss, gradient), relative to the largest entry of each."""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype == torch.float64
        assert y.isfinite().all()
        assert y.abs().max() > 0, "the batch shows nothing"
        worst = max(worst, float((x - y).abs().max() / y.abs().max()))
    return worst


@pytest.fixture(scope="session")
def compare():
    return difference


@pytest.fixture(scope="session")
def verl():
    """verl.trainer.ppo.core_algos alone: its package imports ray, which no loss needs."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps verl==0.9.1")
    root = spec.submodule_search_locations[0]
    stubs = {}
    for name in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo", "verl.workers"):
        stubs[name] = types.ModuleType(name)
        stubs[name].__path__ = ["/".join([root, *name.split(".")[1:]])]
    for name, attribute in [
        ("omegaconf", "DictConfig"),
        ("tensordict", "TensorDict"),
        ("verl.trainer.config", "AlgoConfig"),
        ("verl.workers.config", "ActorConfig"),
    ]:
        stubs[name] = types.ModuleType(name)
        setattr(stubs[name], attribute, type(attribute, (), {}))
    with mock.patch.dict(sys.modules, stubs):
        from verl.utils.groupwise import as_torch_index, group_mean_std

        stubs["verl.utils"].as_torch_index = as_torch_index
        stubs["verl.utils"].group_mean_std = group_mean_std
        from verl.trainer.ppo import core_algos
    return core_algos
