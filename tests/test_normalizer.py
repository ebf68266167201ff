"""The global denominator: ranks and micro-batches together give the gradient of the whole batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pyrlk

OBJECTIVES = [pyrlk.DAPO(), pyrlk.GRPO(), pyrlk.LUSPO(), pyrlk.DrGRPO(9)]
RANKS, SEQUENCES, LENGTH, V = 2, 6, 5, 13


def batch():
    torch.manual_seed(0)
    shape = (SEQUENCES, LENGTH)
    mask = torch.rand(shape) * (torch.rand(shape) > 0.3)
    mask[1] = 0  # a sequence that does not count
    mask[:3, 2:] = 0  # the ranks' shares differ
    z, old = torch.randn(*shape, V), torch.randn(shape) - 3
    return z, torch.randint(V, shape), old, torch.randn(SEQUENCES), mask


def whole(objective):
    z, *rest = batch()
    leaf = z.requires_grad_()
    loss = pyrlk.policy_loss(leaf, *rest, objective=objective)
    loss.backward()
    return loss.detach(), leaf.grad


def part(objective, rows, denominator):
    z, *rest = (x[rows] for x in batch())
    leaf = z.requires_grad_()
    loss = pyrlk.policy_loss(leaf, *rest, objective=objective, normalizer=denominator)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("averaged", [False, True])
def test_micro_batches_sum_to_the_whole_batch(objective, averaged):
    count = 3 if averaged else 1
    denominator = pyrlk.normalizer(batch()[-1], objective, micro_batches=count)
    parts = [part(objective, slice(i, i + 2), denominator) for i in (0, 2, 4)]
    loss, grad = whole(objective)
    torch.testing.assert_close(sum(p[0] for p in parts) / count, loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]) / count, grad)


def run_rank(rank: int, store: str) -> None:
    """What each process of the test below runs: its half of the batch, and a reduction."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    group, rows = torch.distributed.new_group([0, 1]), slice(3 * rank, 3 * rank + 3)
    for objective in OBJECTIVES:
        want_loss, want = whole(objective)
        for averaged in (True, False):
            denominator = pyrlk.normalizer(
                batch()[-1][rows], objective, group=group, averaged=averaged
            )
            loss, grad = part(objective, rows, denominator)
            torch.distributed.all_reduce(loss, group=group)
            scale = RANKS if averaged else 1  # what DDP divides by
            torch.testing.assert_close(loss / scale, want_loss)
            torch.testing.assert_close(grad / scale, want[rows])
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_ranks_with_a_process_group_give_the_gradient_of_the_whole_batch(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), sys.argv[1])
