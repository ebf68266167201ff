"""Whole runs of two processes: the same bytes again, after a kill, after a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyrlk.demo.record import Record

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# A run small enough for a test; its policy is right now and then.
RUN = """
import sys
from pathlib import Path
from pyrlk import demo
from pyrlk.demo.config import Config
config = Config(steps=int(sys.argv[2]), threads=1, groups=2, group_size=16,
                warmup_steps=40, warmup_batch=64, eval_every=4, save_every=100)
try:
    print(demo.run(config, Path(sys.argv[1]), resume=sys.argv[3] == "resume"))
except demo.Failed as error:
    sys.exit(f"failed: {error}")
"""
PATIENCE = 120.0


class Run:
    """A demo in a process of its own."""

    def __init__(self, folder: Path, steps: int, start: str = "anew"):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), str(steps), start],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def engine(self) -> int:
        """The engine's process id, from the first line that the run prints."""
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words[:2] == ["engine:", "process"]
        return int(words[2].rstrip(";"))

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + PATIENCE
        while self.steps() < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return sum('"reward"' in line for line in text.splitlines())

    def finish(self, timeout: float = PATIENCE) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors

    def metrics(self) -> bytes:
        return (self.folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def start():
    """Starts runs; none of them outlives its test."""
    runs = []

    def start(*args) -> Run:
        runs.append(Run(*args))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()


def test_a_killed_engine_costs_nothing_but_the_resume(start, tmp_path):
    killed = start(tmp_path / "killed", 10**6)
    engine = killed.engine()
    killed.wait_for_step(2)
    os.kill(engine, signal.SIGKILL)
    start_of_end = time.monotonic()
    assert killed.process.stderr is not None
    error = killed.process.stderr.readline().rstrip()
    assert time.monotonic() - start_of_end < 5.0
    code, rest = killed.finish()
    saved = Record(tmp_path / "killed").load()
    assert code == 1
    assert rest == ""
    assert error == (
        f"failed: the engine process was killed by SIGKILL; step {saved['step']} is saved in "
        f"{tmp_path}/killed/checkpoint.safetensors: the same command with --resume continues"
    )
    assert saved["step"] == killed.steps()

    steps = saved["step"] + 2
    resumed = start(tmp_path / "killed", steps, "resume")
    whole = start(tmp_path / "whole", steps)
    assert resumed.finish() == (0, "")
    assert whole.finish() == (0, "")
    assert whole.steps() == steps
    assert resumed.metrics() == whole.metrics()
    lines = [json.loads(line) for line in whole.metrics().splitlines()]
    assert {"heldout_before", "heldout_after"} <= lines[-1].keys()
    assert max(line.get("logprob_gap", 0.0) for line in lines) < 1e-4
    assert not any("second" in name or "time" in name for line in lines for name in line)
    for name in ("curve.svg", "curve.png", "timing.jsonl"):
        assert (tmp_path / "whole" / name).stat().st_size > 0


def test_the_engine_does_not_outlive_the_trainer(start, tmp_path):
    run = start(tmp_path / "run", 10**6)
    engine = run.engine()
    run.wait_for_step(1)
    run.process.kill()
    run.finish(timeout=5.0)
    end = time.monotonic() + 5.0
    while _alive(engine):
        assert time.monotonic() < end
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
