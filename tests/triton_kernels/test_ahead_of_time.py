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

# Sweeps of each kernel over a row, in order: elements read, elements written, and a budget of
# instructions an element on sm_90 in bfloat16, a tenth above what was counted. An H200 issues 24 an
# element in the millisecond that one read and one write of 8192 × 151936 take.
SWEEPS = {
    "token_logprobs_fwd": [(1, 0, 8.3)],
    "token_logprobs_fwd entropy": [(1, 0, 11.8)],
    # The first group is asked for before the loop.
    "token_logprobs_fwd entropy, 2 stages": [(1, 0, 1.5), (1, 0, 12.2)],
    "token_logprobs_fwd kept": [(1, 0, 11.8)],
    "token_logprobs_bwd": [(1, 1, 7.5)],
    "token_logprobs_bwd entropy": [(1, 1, 10.5)],
    "group_statistics_fwd": [(1, 0, 8.7)],
    "policy_loss_fwd dapo rows": [(1, 0, 8.3), (1, 1, 7.2)],
    "policy_loss_fwd dapo rows, 2 stages": [(1, 0, 1.5), (1, 0, 8.7), (1, 1, 7.2)],
    "policy_loss_fwd dapo split": [(1, 1, 7.5)],
    "policy_loss_fwd dapo cooperative": [(1, 0, 8.8), (0, 1, 5.8)],
    "policy_loss_fwd all rows": [(1, 0, 11.8), (1, 1, 10.5)],
    "policy_loss_fwd all cooperative": [(1, 0, 12.6), (0, 1, 9.0)],
    "policy_loss_fwd reinforce rows": [(1, 0, 8.3), (1, 1, 7.2)],
    "scale_fwd": [(1, 1, 4.0)],
}
# The sampler reads tile by tile, a kept set is gathered: 16-byte loads are counted, not sweeps.
# Of flat rows sample_fwd takes 8 bytes at a time; support_fwd reads half tiles, for ids or bits.
TILES_READ = {"sample_tiles_fwd": 1, "sample_tiles_fwd allowed": 1, "sample_masses_fwd": 1}
TILES_READ |= {"sample_fwd": 0, "sample_fwd exact": 0, "support_fwd": 1}
# A verification takes a row 8 bytes at a time too, and of it only one in n + 1.
TILES_READ |= {"verify_accept_fwd": 0, "verify_residual_fwd": 0, "verify_draw_fwd": 0}
TILES_READ |= {"verify_residual_fwd one-hot": 0}
TILES_READ |= {"token_logprobs_bwd kept": 0, "policy_loss_fwd all kept": 4}
TILES_READ |= {"pack_fwd": 1, "pack_fwd sums": 1, "pack_fwd copy": 1}
TILES_READ |= {name: 4 * sum(s[0] for s in sweeps) for name, sweeps in SWEEPS.items()}

# The same for a tile of the sampler. At 4.3 TB/s an H200 issues 14 for an element in bfloat16, so
# that the one read costs what memory costs; the read of integer masses costs twice that.
TRIPS = {"sample_tiles_fwd": 9.9, "sample_tiles_fwd allowed": 12.1, "sample_masses_fwd": 34.0}


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
    assert of_target.keys() == TILES_READ.keys()
    size = {"fp32": 4, "bf16": 2}[dtype]
    # A tile is 4096 columns over 8 warps: so many 16-byte accesses a thread and stream.
    lanes = 64 if target.startswith("gfx") else 32
    accesses = 4096 * size // (8 * lanes * 16)
    for name, entry in of_target.items():
        assert entry["spills"] == 0, entry
        # 128 registers leave two blocks of 256 threads to an SM, which hide each other's latency;
        # a cooperative launch counts on both. A search has four warps, a tile of the sampler two;
        # of a kernel with a kept set one block is enough.
        other = name.startswith("sample_") or name.endswith(" kept")
        most = 256 if target.startswith("gfx") else 192 if other else 128
        assert entry["registers"] <= most, entry
        # A group is on its way to shared memory; two blocks still fit.
        staged = 4 * 4096 * size if name.endswith("stages") else 0
        assert entry["shared"] <= (48 << 10) + staged, entry
        # Half a tile is 8 bytes a lane of a wave of 64.
        half = name == "support_fwd" and lanes == 64 and size == 2
        assert entry["loads"].get("64" if half else "128", 0) >= TILES_READ[name] * accesses, entry
        if name in ("pack_fwd", "pack_fwd copy"):
            assert entry["stores"]["128"] == entry["loads"]["128"], entry
        # 70000 rows of 151936 columns are more than 2^31 elements.
        assert entry["offset_bits"] == 64, entry
        if target == "sm_90" and name in TRIPS:
            assert 0 < entry["trip"] <= TRIPS[name], entry
        if name in SWEEPS and not target.startswith("gfx"):
            found, wanted = entry["sweeps"], SWEEPS[name]
            traffic = [(s["read"], s["written"]) for s in found]
            assert traffic == [(read * size, written * size) for read, written, _ in wanted], entry
            if (target, dtype) == ("sm_90", "bf16"):
                for sweep, (_, _, budget) in zip(found, wanted, strict=True):
                    assert sweep["instructions"] <= budget, entry


def test_the_widths_tell_an_unaligned_row(tmp_path):
    # The check above can fail: rows that do not start on 16 bytes are read one element at a time.
    file = tmp_path / "unaligned.json"
    process = child("--target", "sm_90", "--kernel", "scale_fwd", "--unaligned", "--json", file)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    for entry in json.loads(file.read_text())["kernels"]:
        assert "128" not in entry["loads"], entry
        assert "128" not in entry["stores"], entry
        assert entry["sweeps"] == [], entry


def test_a_product_of_32_bits_is_seen_in_an_offset():
    from pyrlk.bench.static_report import row_offset_bits

    ttir = """
    %row = tt.get_program_id x : i32
    %outer = arith.divsi %row, %inner : i32
    %product = arith.muli %outer, %stride : i32
    %offset = arith.extsi %product : i32 to i64
    %z_ptr = tt.addptr %logits_ptr, %offset : !tt.ptr<bf16>, i64
    """
    assert row_offset_bits(ttir) == 32
    assert row_offset_bits(ttir.replace("%product = arith.muli %outer, %stride : i32", "")) == 64
