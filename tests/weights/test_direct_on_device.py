"""Weights between two processes on one GPU: from the trainer's own memory, and staged."""

import pytest
import torch
from child import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("options", "mode"),
    [((), "direct"), (("--strided",), "direct+bucket")],
    ids=["direct", "direct and staged"],
)
@pytest.mark.parametrize("verify", ["copy", "off", "engine"])
def test_two_processes_hand_over_on_a_gpu(start, options, mode, verify):
    on_gpu = ("--device", "cuda")
    receiver = start("receiver", "--version", "3", *on_gpu)
    assert receiver.stdout.readline() == "listening\n"
    sender = start(
        "publisher", "--first", "1", "--version", "3", *on_gpu, "--verify", verify, *options
    )
    assert sender.wait(120) == 0
    assert sender.stdout.read().splitlines() == [f"mode {mode}"] * 3
    total = sum(p.detach().double().sum().item() for p in make_model(seed=2).parameters())
    line = receiver.stdout.readline().split()
    assert line[:5] == ["version", "3", "dirty", "False", "sum"]
    assert float(line[5]) == pytest.approx(total, rel=1e-12)
