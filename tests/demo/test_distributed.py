"""The demo under torchrun: FSDP2 over gloo ranks learns what one process learns."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pyrlk
from pyrlk.batch import TooFewGroups
from pyrlk.demo.ranks import Ranks

pytestmark = pytest.mark.distributed

# A run small enough for a test; its policy is right now and then.
RUN = """
import sys
from pathlib import Path
from pyrlk import demo
from pyrlk.demo.config import Config
from pyrlk.demo.ranks import Ranks
if __name__ == "__main__":  # the engine is spawned
    config = Config(steps=int(sys.argv[2]), threads=2, groups=2, group_size=16,
                    warmup_steps=40, warmup_batch=64, eval_every=4, save_every=1)
    with Ranks() as ranks:
        demo.run(config, Path(sys.argv[1]), resume=sys.argv[3] == "resume", ranks=ranks)
"""
PATIENCE = 240.0


def torchrun(*command: str, ranks: int = 2) -> subprocess.Popen:
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*agent, "--nproc-per-node", str(ranks), *command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture
def start():
    """Starts torchrun; nothing of it outlives the test."""
    agents = []

    def start(*command: str, **options) -> subprocess.Popen:
        agents.append(torchrun(*command, **options))
        return agents[-1]

    yield start
    for agent in agents:
        agent.terminate()  # the agent ends its ranks, and they end the engine
        try:
            agent.communicate(timeout=40.0)
        finally:
            agent.kill()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """What fsdp_steps.py found on two ranks."""
    results = tmp_path_factory.mktemp("fsdp") / "results.json"
    agent = torchrun(str(Path(__file__).with_name("fsdp_steps.py")), str(results))
    try:
        output, _ = agent.communicate(timeout=PATIENCE)
    finally:
        agent.kill()
    assert agent.returncode == 0, output
    return json.loads(results.read_text())


CASES = (
    "tokens are the denominator",
    "sequences are the denominator",
    "rows that do not divide evenly",
)


@pytest.mark.parametrize("case", CASES)
def test_two_updates_are_those_of_one_process(compared, case):
    """Rounding is 3e-7 in the first gradient; the mean of two ranks' means would be off by 0.3."""
    said = compared[case]
    for version, bound in ((0, 2e-6), (1, 2e-5)):
        sharded, alone = said[f"metrics {version}"]
        assert sharded.keys() == alone.keys()
        for name, value in alone.items():
            assert sharded[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
        assert said[f"gradient {version}"] <= bound
        assert said[f"weights {version}"] <= 2e-4  # of the way that they moved


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_shards_goes_on_in_the_same_bits(compared, case):
    assert compared[case]["resumed"]
    assert compared[case]["share"] == pytest.approx(0.5, abs=0.01)


def test_every_rank_needs_a_row_of_every_update():
    few = Ranks()
    few.rank, few.size = 1, 3
    assert few.share(torch.arange(7)).tolist() == [3, 4]
    with pytest.raises(ValueError, match="3 ranks cannot share the 2 rows of an update"):
        few.share(torch.arange(2))


def test_an_error_can_be_told():
    """What rank 0 raises is made anew on the others, from what it reduces to."""
    error = copy.copy(TooFewGroups("few", 0.25))
    assert (str(error), error.kept_share) == ("few", 0.25)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_costs_nothing_but_the_resume(start, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    killed = start(str(script), str(tmp_path / "killed"), str(10**6), "anew")
    wait_for_step(killed, tmp_path / "killed", 3)
    ranks = {rank_of(pid): pid for pid in children(killed.pid)}
    engine = [pid for pid in children(ranks["0"]) if "spawn_main" in command_of(pid)]
    os.kill(ranks["1"], signal.SIGKILL)
    output, _ = killed.communicate(timeout=40.0)
    assert killed.returncode == 1
    assert "SIGKILL" in output
    assert not any(map(alive, (*ranks.values(), *engine)))

    steps = len(lines_of(tmp_path / "killed"))  # at least those of the checkpoint
    resumed = start(str(script), str(tmp_path / "killed"), str(steps + 2), "resume")
    assert resumed.wait(PATIENCE) == 0
    unbroken = start(str(script), str(tmp_path / "whole"), str(steps + 2), "anew")
    assert unbroken.wait(PATIENCE) == 0
    metrics = [tmp_path / name / "metrics.jsonl" for name in ("killed", "whole")]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()
    assert "heldout_after" in lines_of(tmp_path / "whole")[-1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_reaches_the_accuracy_of_the_demo(start, tmp_path):
    """Held-out greedy accuracy 0.978 in one process; rounding may cost or bring a few of 500."""
    run = start("-m", "pyrlk.cli", "demo", "--runs", str(tmp_path), "--name", "full")
    output, _ = run.communicate(timeout=1700.0)
    assert run.returncode == 0, output
    last = lines_of(tmp_path / "full")[-1]
    assert last["heldout_after"] >= 0.96
    assert last["heldout_before"] < 0.5


def lines_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def wait_for_step(agent: subprocess.Popen, folder: Path, step: int) -> None:
    end = time.monotonic() + PATIENCE
    while len(lines_of(folder)) <= step:
        assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def rank_of(pid: int) -> str | None:
    pairs = (x.partition("=") for x in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs}.get("RANK")


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
