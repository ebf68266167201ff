"""Lengths and hyper-parameters are run-time arguments: the launchers compile each kernel once.

A stand-in driver compiles for sm_90 without a device, and launches end where the compiler does.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyrlk import objective
from pyrlk.triton_kernels import logprob, policy_loss, sample, schedule, speculative

VOCAB = 4096 + 1


class Sm90:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """A function that returns how often each kernel has been compiled."""

    def compile_only(self, grid):
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    kernels = [
        logprob.token_logprobs_fwd_kernel,
        logprob.token_logprobs_bwd_kernel,
        policy_loss.policy_loss_fwd_kernel,
        policy_loss.scale_fwd_kernel,
        schedule.group_statistics_fwd_kernel,
        sample.sample_tiles_fwd_kernel,
        sample.sample_fwd_kernel,
        sample.support_fwd_kernel,
        speculative.verify_accept_fwd_kernel,
        speculative.verify_residual_fwd_kernel,
        speculative.verify_draw_fwd_kernel,
    ]
    for kernel in kernels:
        monkeypatch.setattr(
            kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder)
        )
    monkeypatch.setattr(driver, "_active", Sm90())
    return lambda: [len(kernel.device_caches[0][0]) for kernel in kernels]


def step(length, temperature, eps):
    # Strides of [B, L, V] views change with L; slices of per-token tensors start anywhere.
    logits = torch.empty(2, length + 1, VOCAB, dtype=torch.bfloat16)[:, :-1]
    count = 2 * length
    flat = torch.empty(count + 1)[length % 2 :]
    tokens = torch.empty(count + 1, dtype=torch.int64)[length % 2 :]
    stats = torch.empty(count, 4)
    ids = torch.empty(length + 1, dtype=torch.int32)[length % 2 :]
    kept = ids, torch.empty(count + 2, dtype=torch.int64)[length % 2 :]
    terms = objective.terms(objective.DAPO(eps_high=eps), kl_coef=eps, entropy_coef=eps)
    logprob.token_logprobs_fwd(logits, tokens, None, temperature, VOCAB, flat, flat, stats)
    logprob.token_logprobs_bwd(logits, tokens, kept, temperature, VOCAB, stats, flat, flat, logits)
    for sets, kind in ((kept, None), (None, schedule.Schedule("split"))):
        policy_loss.policy_loss_fwd(
            logits,
            tokens,
            sets,
            flat,
            flat,
            flat,
            flat,
            temperature,
            VOCAB,
            terms,
            flat,
            flat,
            flat,
            logits,
            kind,
        )
    policy_loss.scale_(logits, torch.empty(()))
    draw(length + 1, flat, ids)  # a single row is aligned where many are not


def draw(rows, flat, ids):
    # Rows are few or many, slices of per-row tensors start anywhere.
    logits = torch.empty(rows, VOCAB, dtype=torch.bfloat16)
    floats = flat[:rows]
    integers = torch.zeros(rows + 1, dtype=torch.int64)[rows % 2 :][:rows]
    kept, status = integers.to(torch.int32), integers.to(torch.uint8)
    workspace = sample.sample_fwd(
        logits, floats, integers, floats, floats, integers, integers, None, False, False, False,
        integers, floats, floats, kept, status,
    )  # fmt: skip
    offsets = torch.empty(rows + 1, dtype=torch.int64)
    sample.support_fwd(logits, None, workspace, kept, status, ids, offsets)
    verify(logits, floats, integers, kept, status)


def verify(logits, floats, integers, kept, status):
    """Drafts of no more tokens than there are rows: one draft, whose depth changes."""
    speculative.verify_fwd(
        logits[None], integers[1:], logits[None, 1:], floats, integers, floats, floats, integers,
        integers, False, integers, kept[:1], floats, floats, kept, status,
    )  # fmt: skip


def test_lengths_and_hyper_parameters_compile_nothing_twice(compiled):
    # 1 and multiples of 16 are the values that Triton likes to specialise on.
    for length in (1, 2, 15, 16, 17, 31, 48, 300):
        step(length, 1.0 / length, 0.01 + length / 2**20)
    # Of the loss one form for kept sets, one for split rows; of tiles one for rows nothing cuts.
    assert compiled() == [1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1]
