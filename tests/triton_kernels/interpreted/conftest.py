"""Callables around the launchers; outputs start as NaN, so that nothing passes unwritten."""

import types

import interpreting
import numpy as np
import pytest
import torch
import triton

from pyrlk.triton_kernels import logprob, policy_loss, sample


def pytest_sessionstart(session):
    # Triton 3.6 turns arrays of one element into numbers, which numpy stopped doing in 2.4.
    try:
        int(np.array([1]))
    except TypeError:
        if triton.__version__.startswith("3.6."):
            pytest.exit("the interpreter of triton 3.6 needs numpy < 2.4", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def patch_the_language_once():
    with interpreting.patching_the_language_once():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    interpreting.make_tiles_small(monkeypatch)


def nan(*shape):
    return torch.full(shape, float("nan"))


@pytest.fixture
def score():
    def run(logits, tokens, temperature=1.0, vocab_size=None, kept=None):
        count = tokens.numel()
        out = types.SimpleNamespace(logprob=nan(count), entropy=nan(count), stats=nan(count, 4))
        logprob.token_logprobs_fwd(
            logits,
            tokens.reshape(-1),
            kept,
            temperature,
            vocab_size or logits.shape[-1],
            out.logprob,
            out.entropy,
            out.stats,
        )
        return out

    return run


@pytest.fixture
def learn():
    def run(
        logits,
        tokens,
        old,
        advantages,
        weight,
        terms,
        *,
        ref=None,
        temperature=1.0,
        vocab_size=None,
        kept=None,
        grad=None,
    ):
        count = tokens.numel()
        out = types.SimpleNamespace(loss=nan(count), logprob=nan(count), entropy=nan(count))
        out.grad = torch.full_like(logits, float("nan")) if grad is None else grad
        policy_loss.policy_loss_fwd(
            logits,
            tokens.reshape(-1),
            kept,
            old,
            advantages,
            weight,
            ref,
            temperature,
            vocab_size or logits.shape[-1],
            terms,
            out.loss,
            out.logprob,
            out.entropy,
            out.grad,
        )
        return out

    return run


@pytest.fixture
def draw():
    def run(
        logits,
        *,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=None,
        position=0,
        allowed=None,
        joint=False,
        keep_ties=False,
        exact=True,
        capacity=None,
    ):
        rows = logits.shape[0]

        def per_row(x, dtype):
            return (
                x.to(dtype) if isinstance(x, torch.Tensor) else torch.full((rows,), x, dtype=dtype)
            )

        out = types.SimpleNamespace(
            token=torch.full((rows,), -9, dtype=torch.int64),
            logprob=torch.full((rows,), 9.0),
            full_logprob=torch.full((rows,), 9.0),
            kept=torch.full((rows,), -9, dtype=torch.int32),
            status=torch.full((rows,), 99, dtype=torch.uint8),
            ids=torch.full(
                (logits.numel() if capacity is None else capacity,), -9, dtype=torch.int32
            ),
            offsets=torch.full((rows + 1,), -9, dtype=torch.int64),
            bits=torch.full((rows, -(-logits.shape[1] // 32)), -9, dtype=torch.int32),
        )
        workspace = sample.sample_fwd(
            logits,
            per_row(temperature, torch.float32),
            per_row(top_k, torch.int64),
            per_row(top_p, torch.float32),
            per_row(min_p, torch.float32),
            torch.arange(rows) if seed is None else per_row(seed, torch.int64),
            per_row(position, torch.int64),
            allowed,
            joint,
            keep_ties,
            exact,
            out.token,
            out.logprob,
            out.full_logprob,
            out.kept,
            out.status,
        )
        sample.support_fwd(
            logits, allowed, workspace, out.kept, out.status, out.ids, out.offsets, out.bits
        )
        out.listed = workspace.found[:, 2] >= 0
        out.mask = torch.zeros(rows, logits.shape[1], dtype=torch.bool)
        for r in range(rows):
            if out.status[r] & sample.OVERFLOW:
                out.mask[r] = (
                    out.bits[r].repeat_interleave(32)[: logits.shape[1]]
                    >> (torch.arange(logits.shape[1]) % 32)
                    & 1
                )
            else:
                ids = out.ids[out.offsets[r] : out.offsets[r + 1]].long()
                assert (ids.diff() > 0).all()
                out.mask[r, ids] = True
        return out

    return run
