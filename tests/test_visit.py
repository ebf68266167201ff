"""`make visit-gpu`: whatever a stage does, the others run, in their time, and the table tells."""

import os
import sys
import time
from pathlib import Path

import pytest

from pyrlk import bench

ROOT = Path(__file__).parents[1]


@pytest.fixture
def visit(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    import visit

    monkeypatch.setattr(visit, "GRACE", 1.0)
    monkeypatch.setattr(visit, "TOO_SHORT", 0.5)
    return visit


def python(visit, name, code, seconds=20):
    return visit.Stage(name, seconds, ["-c", code])


def test_a_stage_that_fails_stops_no_other_one(visit, tmp_path, capsys):
    plan = [
        python(visit, "first", "print('1 passed')"),
        python(visit, "second", "import sys; print('why'); sys.exit(3)"),
        python(visit, "third", "print('2 passed')"),
    ]
    assert visit.visit(plan, tmp_path, 60) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["first", "second", "third"]
    for line, ended in zip(lines, ["ok", "failed with 3", "ok"], strict=True):
        assert ended in line
    assert lines[2].endswith("2 passed")
    assert (tmp_path / "second.log").read_text() == "why\n"
    assert visit.visit(plan[:1], tmp_path, 60) == 0


def test_at_its_limit_a_stage_is_asked_to_stop_and_then_ended_with_its_children(visit, tmp_path):
    asked = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far: 2')"
    deaf = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    assert visit.run(python(visit, "asked", asked), tmp_path / "asked", 3.0) == "cut off at 3 s"
    assert (tmp_path / "asked").read_text() == "so far: 2\n"
    assert visit.run(python(visit, "deaf", deaf), tmp_path / "deaf", 3.0) == "cut off at 3 s"
    assert time.monotonic() - begin < 10
    assert ended(int((tmp_path / "deaf").read_text()))


def ended(pid: int) -> bool:
    """Gone, or waiting to be collected by whoever took it over."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_what_the_budget_has_no_time_for_is_not_run_and_said(visit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(visit, "TOO_SHORT", 2.0)
    plan = [
        python(visit, "long", "import time; time.sleep(60)"),
        python(visit, "late", "print('never')"),
    ]
    assert visit.visit(plan, tmp_path, 2.5) == 1
    *_, first, second = capsys.readouterr().out.splitlines()
    assert "cut off at 2 s" in first
    assert "not run: 2 s are used up" in second
    assert not (tmp_path / "late.log").exists()


def test_the_stages_fit_a_visit_and_name_what_exists(visit, tmp_path):
    plan = visit.stages(tmp_path)
    assert len({stage.name for stage in plan}) == len(plan)
    assert sum(stage.seconds for stage in plan) <= visit.BUDGET
    ops = [s.arguments[-1] for s in plan if s.arguments[1:3] == ["pyrlk.cli", "bench"]]
    assert set(ops) <= {*bench.OPS, *bench.TUNING}
    assert set(ops) >= {"policy_loss", "schedules", "update"}
    for stage in plan:
        first = stage.arguments[0]
        assert first in ("-c", "-m") or (ROOT / first).is_file()


def test_a_stage_of_another_name_is_refused(visit, capsys):
    with pytest.raises(SystemExit) as refused:
        visit.main(["sanitise"])
    assert refused.value.code == 2
    assert "no stage 'sanitise'; there are build, doctor" in capsys.readouterr().err


@pytest.mark.skipif("PYRLK_DRY_GPU" in os.environ, reason="a device is pretended")
def test_without_a_gpu_the_tests_fail_instead_of_being_skipped(visit, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (stage,) = [s for s in visit.stages(tmp_path) if s.name == "tests"]
    assert visit.run(stage, tmp_path / "log", 60).startswith("failed"), sys.executable
    assert "passed" not in visit.last_lines(tmp_path / "log", 1)[0]


def test_the_guide_lists_the_stages_with_their_times(visit, tmp_path):
    page = (ROOT / "docs/tuning.md").read_text()
    at = [page.index(f"| `{s.name}` | {s.seconds} |") for s in visit.stages(tmp_path)]
    assert at == sorted(at)
