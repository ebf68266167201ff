"""Every kernel compiled for every target, without a GPU: no spills, 16-byte streams, registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

# bf16 everywhere and fp32 where the work is; the rest of the grid differs in nothing but time.
QUICK = [
    ("sm_80", "bf16"),
    ("sm_90", "bf16"),
    ("sm_90", "fp32"),
    ("sm_100", "bf16"),
    ("gfx942", "bf16"),
]
SLOW = [("sm_80", "fp32"), ("sm_100", "fp32"), ("gfx942", "fp32")]

# V-sized streams that a kernel reads and writes; losses read for statistics and for the gradient.
# Over a kept set a row is read only if kept whole; cleared are it, its padding, or a masked row.
STREAMS = {
    "token_logprobs_fwd": (1, 0),
    "token_logprobs_fwd kept": (1, 0),
    "token_logprobs_bwd": (1, 2),  # a gradient, or zeros
    "token_logprobs_bwd kept": (0, 3),
    "policy_loss_fwd dapo": (2, 2),
    "policy_loss_fwd dapo+k3+entropy": (2, 2),
    "policy_loss_fwd dapo+k3+entropy kept": (1, 3),
    "policy_loss_fwd reinforce": (2, 2),
    "reinforce_grad_fwd": (2, 2),
    "scale_fwd": (1, 1),
    "sample_tiles_fwd": (1, 0),
    "sample_tiles_fwd allowed": (1, 0),
    "sample_masses_fwd": (1, 0),
    "sample_fwd": (0, 0),  # candidates; rows too flat for them take eight bytes at a time in bf16
    "sample_fwd exact": (0, 0),
    "support_fwd": (1, 0),  # ids, or bits, in tiles of half the size
}

# Instructions a thread spends on an element of a row. At 4.3 TB/s a multiprocessor of an H200 has
# 14 of them for a bf16 element: the read costs what memory costs. Integer masses cost twice that.
INSTRUCTIONS = {"sample_tiles_fwd": 15, "sample_masses_fwd": 32}


def child(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, ROOT / "bench/static_report.py", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def compile_all(pairs, folder):
    """The report of each (target, dtype), two children at a time."""
    entries = []
    for some in (pairs[k : k + 2] for k in range(0, len(pairs), 2)):
        files = [folder / f"{target}-{dtype}.json" for target, dtype in some]
        children = [
            child("--target", target, "--dtype", dtype, "--json", file)
            for (target, dtype), file in zip(some, files, strict=True)
        ]
        for process in children:
            output, _ = process.communicate()
            assert process.returncode == 0, output[-4000:]
        entries += [entry for file in files for entry in json.loads(file.read_text())["kernels"]]
    return entries


@pytest.fixture(scope="module")
def quick_entries(tmp_path_factory):
    return compile_all(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize(("target", "dtype"), QUICK)
def test_kernels_compile_without_spills_and_with_wide_streams(quick_entries, target, dtype):
    check(quick_entries, target, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), SLOW)
def test_the_rest_of_the_grid_too(tmp_path, target, dtype):
    check(compile_all([(target, dtype)], tmp_path), target, dtype)


def check(entries, target, dtype):
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
        if target == "sm_90" and name in INSTRUCTIONS:
            assert 0 < entry["instructions"] <= INSTRUCTIONS[name], entry


def test_the_widths_tell_an_unaligned_row(tmp_path):
    # The check above can fail: rows that do not start on 16 bytes are read one element at a time.
    file = tmp_path / "unaligned.json"
    process = child("--target", "sm_90", "--kernel", "scale_fwd", "--unaligned", "--json", file)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    for entry in json.loads(file.read_text())["kernels"]:
        assert "128" not in entry["loads"], entry
        assert "128" not in entry["stores"], entry
