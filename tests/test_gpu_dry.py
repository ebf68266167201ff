"""What runs on a GPU, as far as it runs without one: tests, benches and the sanitizers' command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
TESTS = sorted(path.name for path in (ROOT / "tests/gpu").glob("test_*.py"))
PYTEST = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
)


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TESTS)
def test_gpu_tests_pass_on_a_device_that_is_not_there(name):
    code, output = run(
        "-c", PYTEST, f"tests/gpu/{name}", "-q", "-p", "no:cacheprovider", "--timeout", "600",
        PYRLK_DRY_GPU="1", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert code == 0, output


FAKE = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *racecheck*) exit {race} ;; esac
"""


@pytest.mark.parametrize("race", [0, 99])
def test_every_sanitizer_is_run_and_one_report_fails_all(tmp_path, race):
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(FAKE.format(log=log, race=race))
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, output = run("tests/gpu/sanitize.py", "-x", PATH=path)
    assert code == (race != 0), output
    calls = log.read_text().splitlines()
    assert [call.split()[1] for call in calls] == [
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
    ]
    assert all(call.endswith("-x") for call in calls)
    assert ("racecheck: failed with 99" in output) == (race != 0)


def test_the_sanitizers_tests_exist():
    sys.path.insert(0, str(ROOT / "tests/gpu"))
    try:
        import sanitize
    finally:
        sys.path.pop(0)
    text = "".join((ROOT / "tests/gpu" / name).read_text() for name in TESTS)
    for part in sanitize.TESTS:
        assert part in text, part


def test_a_missing_sanitizer_says_where_it_comes_from(tmp_path):
    code, output = run("tests/gpu/sanitize.py", PATH=str(tmp_path), CUDA_HOME="")
    assert code == 2
    assert "compute-sanitizer is not installed: it comes with the CUDA toolkit" in output


DRY_BENCH = """
import sys
sys.path.insert(0, "tests/gpu")
import dry_device
dry_device.install()
from pyrlk import bench
from pyrlk.bench import linear, measure, policy_loss, sample, scaling, schedules, score, verify
measure.BEYOND_L2 = 1 << 10
policy_loss.QUICK = score.QUICK = 4, 300
linear.QUICK = 6, 16, 300
sample.QUICK = 64
sample.ROWS["cuda"] = 1, 2
verify.QUICK = 64
verify.ROWS["cuda"] = 1, 2
scaling.QUICK = 64, 8, 2
scaling.NEW_LENGTHS = range(4, 1, -1)
schedules.TOKENS, schedules.VOCABULARIES = (1, 3), (300,)
sys.exit(bench.main(["--device", "cuda", "--quick", "--write", sys.argv[1], *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "op", ["policy_loss", "linear", "score", "sample", "verify", "scaling", "pack", "schedules"]
)
def test_benches_run_on_a_device_that_is_not_there(tmp_path, op):
    code, output = run(
        "-c", DRY_BENCH, tmp_path, "--op", op,
        PYRLK_DRY_GPU="1", TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1",
    )  # fmt: skip
    assert code == 0, output
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert result["rows"]
    assert not any("failed" in row for row in result["rows"])
    code, output = run("-m", "pyrlk.bench.table", readme(tmp_path), tmp_path)
    assert code == 0, output


def readme(folder: Path) -> Path:
    page = folder / "README.md"
    page.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    return page
