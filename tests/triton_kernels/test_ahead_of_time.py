"""Every kernel compiled for every target, without a GPU: no spills, 16-byte streams, registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

# Two children at a time, with a CUDA pair each so that neither has all the work of ptxas.
GROUPS = (("sm_80", "gfx942"), ("sm_90", "sm_100"))
TARGETS = [target for group in GROUPS for target in group]

# V-sized streams that a kernel reads and writes; losses read for statistics and for the gradient.
STREAMS = {
    "token_logprobs_fwd": (1, 0),
    "token_logprobs_bwd": (1, 2),  # a gradient, or zeros
    "policy_loss_fwd dapo": (2, 2),
    "policy_loss_fwd dapo+k3+entropy": (2, 2),
    "policy_loss_fwd reinforce": (2, 2),
    "reinforce_grad_fwd": (2, 2),
    "scale_fwd": (1, 1),
    # full statistics, top-k (threshold, ties), pool, top-p (threshold, ties), kept statistics, draw
    "sample_fwd": (8, 0),
    "support_fwd": (1, 0),
}


def child(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, ROOT / "bench/static_report.py", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    files = [folder / f"{group[0]}.json" for group in GROUPS]
    children = [
        child("--target", *group, "--json", file) for group, file in zip(GROUPS, files, strict=True)
    ]
    for process in children:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]
    return [entry for file in files for entry in json.loads(file.read_text())["kernels"]]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_without_spills_and_with_wide_streams(entries, target, dtype):
    of_target = {e["kernel"]: e for e in entries if (e["target"], e["dtype"]) == (target, dtype)}
    assert of_target.keys() == STREAMS.keys()
    # A tile is 4096 columns over 8 warps: so many 16-byte accesses a thread and stream.
    lanes = 64 if target.startswith("gfx") else 32
    accesses = 4096 * {"fp32": 4, "bf16": 2}[dtype] // (8 * lanes * 16)
    for name, entry in of_target.items():
        reads, writes = STREAMS[name]
        assert entry["spills"] == 0, entry
        # 128 registers leave two blocks of 256 threads to an SM, which hide each other's latency.
        assert entry["registers"] <= 128, entry
        assert entry["shared"] <= 48 << 10, entry
        assert entry["loads"].get("128", 0) >= reads * accesses, entry
        assert entry["stores"].get("128", 0) >= writes * accesses, entry


def test_the_widths_tell_an_unaligned_row(tmp_path):
    # The check above can fail: rows that do not start on 16 bytes are read one element at a time.
    file = tmp_path / "unaligned.json"
    process = child("--target", "sm_90", "--kernel", "scale_fwd", "--unaligned", "--json", file)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    for entry in json.loads(file.read_text())["kernels"]:
        assert "128" not in entry["loads"], entry
        assert "128" not in entry["stores"], entry
