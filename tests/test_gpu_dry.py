"""What runs on a GPU, as far as it runs without one: tests, benches, the demo and the sanitizers'
command. Processes that these start have the same device (tests/gpu/dry/sitecustomize.py)."""

import json
import os
import shutil
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


@pytest.fixture
def driver(tmp_path):
    """The environment of processes that share device memory by a driver, and what it was asked."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, log = tmp_path / "libcuda_fake.so", tmp_path / "calls"
    source = ROOT / "tests/weights/fake_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    yield {"PYRLK_LIBCUDA": str(library), "FAKE_CUDA_LOG": str(log)}, lambda: calls(log)
    for pid, _ in calls(log):
        for left in Path("/dev/shm").glob(f"pyrlk-fake-{pid}-*"):
            left.unlink()


def calls(log: Path) -> list[list[str]]:
    """(process, call) of the fake driver."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TESTS)
def test_gpu_tests_pass_on_a_device_that_is_not_there(name, driver):
    # What packs into memory of the driver needs one; test_ipc gives its children their own.
    environment = driver[0] if name == "test_pack_on_device.py" else {}
    code, output = run(
        "-c", PYTEST, f"tests/gpu/{name}", "-q", "-p", "no:cacheprovider", "--timeout", "600",
        **{"PYRLK_DRY_GPU": "1", "TRITON_INTERPRET": "1"} | environment,
    )  # fmt: skip
    assert code == 0, output
    assert " passed" in output


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


def test_one_sanitizer_can_be_asked_for(tmp_path):
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(FAKE.format(log=log, race=0))
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, output = run("tests/gpu/sanitize.py", "--tool", "racecheck", "-x", PATH=path)
    assert code == 0, output
    (call,) = log.read_text().splitlines()
    assert call.split()[1] == "racecheck"
    assert call.endswith(" -x")


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


# Under PYTHONPATH every process is dry, this one too.
EVERYWHERE = {"PYRLK_DRY_GPU": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
EVERYWHERE["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "tests/gpu/dry"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def assert_handles_crossed(called):
    """One process exported what another one opened, and closed."""
    of = {name: {pid for pid, call in called if call == name} for name in ("export", "open")}
    assert of["open"]
    assert of["export"] - of["open"]
    ends = [call for _, call in called if call in ("open", "close")]
    assert ends.count("open") == ends.count("close")


DRY_BENCH = """
import sys
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
    code, output = run("-c", DRY_BENCH, tmp_path, "--op", op, **EVERYWHERE)
    assert code == 0, output
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert result["rows"]
    assert not any("failed" in row for row in result["rows"])
    code, output = run("-m", "pyrlk.bench.table", readme(tmp_path), tmp_path)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_update_between_two_processes_is_measured_in_every_mode(tmp_path, driver):
    environment, called = driver
    code, output = run("-c", DRY_BENCH, tmp_path, "--op", "update", **EVERYWHERE | environment)
    assert code == 0, output
    (row,) = json.loads((tmp_path / "dry-run.json").read_text())["rows"]
    assert row["modes"] == {"direct": "direct", "unverified": "direct", "staged": "bucket"}
    assert "failed" not in row
    assert row["times"].keys() == {"copy", *row["modes"], "bucket", "per_tensor"}
    assert_handles_crossed(called())


DRY_DEMO = """
import dataclasses, sys
from pyrlk import cli
from pyrlk.demo import arithmetic, warmup
# A model that has learnt nothing is never right: half of what it says is, by its length.
arithmetic.reward = lambda response, problem: float(len(response) % 2)
arithmetic.HELDOUT = 4
warmup.CHECK_PROBLEMS = warmup.CHECK_SAMPLES = 2
asked = cli._demo_config
def small(args):
    config, folder = asked(args)
    small = dict(groups=2, group_size=2, max_length=3, cache_length=1, warmup_batch=4)
    return dataclasses.replace(config, **small), folder
cli._demo_config = small
options = "--steps", "2", "--warmup-steps", "2", "--threads", "1", "--runs", sys.argv[1]
sys.exit(cli.main(["demo", "--device", "cuda", *options]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_trains_on_a_device_and_its_engine_gets_the_weights_by_handle(tmp_path, driver):
    environment, called = driver
    code, output = run("-c", DRY_DEMO, tmp_path, **EVERYWHERE | environment)
    assert code == 0, output
    assert "after 2 steps of dapo" in output
    lines = (tmp_path / "dapo-seed0/metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "logprob_gap" in line]
    assert [line["step"] for line in steps] == [1, 2]
    # Engine and trainer agree on what was drawn: the weights of every version arrived whole.
    assert all(line["logprob_gap"] < 1e-5 for line in steps)
    assert_handles_crossed(called())


def readme(folder: Path) -> Path:
    page = folder / "README.md"
    page.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    return page
