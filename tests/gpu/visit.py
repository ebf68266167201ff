"""What a device is asked first, in the order of its worth: `make visit-gpu`.

Every stage is a command with a time limit of its own and a log of its own. One that fails does not
stop the others; one that the budget has no time for is not run, and the table at the end says so.
At its limit a stage is interrupted, so that pytest still says what has failed so far; a bench has
written every row that it finished.

    make visit-gpu                                     all of it: 13 minutes at most
    make visit-gpu ARGS="--budget 480"                 as far as 8 minutes go
    make visit-gpu ARGS="memcheck racecheck"           these stages alone
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUDGET = 13 * 60
GRACE = 8.0  # seconds between being interrupted and being killed
TOO_SHORT = 10.0  # python and torch alone take as long to start
FINAL_LINES = 12  # of the log of a stage that failed


class Stage(NamedTuple):
    name: str
    seconds: int
    arguments: list[str]  # of the interpreter


# Fails where torch sees no GPU, and says why. Every test would be skipped then, and pass.
ON_GPU = "import sys, torch; torch.cuda.init(); "
DOCTOR = ON_GPU + "from pyrlk import cli; sys.exit(cli.main(['doctor']))"
PYTEST = ON_GPU + "import pytest; sys.exit(pytest.main())"


def bench(op: str, seconds: int, logs: Path) -> Stage:
    arguments = ["-m", "pyrlk.cli", "bench", "--device", "cuda", "--write", str(logs)]
    return Stage(op, seconds, [*arguments, "--op", op])


def demo(seconds: int, logs: Path) -> Stage:
    arguments = ["-m", "pyrlk.cli", "demo", "--device", "cuda", "--steps", "20"]
    arguments += ["--overwrite"]
    return Stage("demo", seconds, [*arguments, "--runs", str(logs / "runs")])


def sanitizer(tool: str, seconds: int) -> Stage:
    return Stage(tool, seconds, ["tests/gpu/sanitize.py", "--tool", tool, "-x"])


def tests(seconds: int) -> Stage:
    """The gpu tests. They mostly wait for the compiler, so in several processes if pytest-xdist is
    there; a test of a speed would then measure the others, and the bench of packing has it too."""
    arguments = ["-c", PYTEST, "tests/gpu", "-q", "-p", "no:cacheprovider", "--durations", "15"]
    # A kernel that never ends cannot be interrupted: only the thread's way ends its process.
    arguments += ["--timeout", "90", "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist"):
        processes = str(min(8, os.cpu_count() or 1))
        arguments += ["-n", processes, "-k", "not at_the_speed_of"]
    return Stage("tests", seconds, arguments)


def stages(logs: Path) -> list[Stage]:
    """Figures after the tests that say what they are worth; last what needs most patience."""
    return [
        Stage("build", 60, ["-c", "import setup; setup.compile_into()"]),
        Stage("doctor", 20, ["-c", DOCTOR]),
        tests(160),
        bench("policy_loss", 60, logs),
        bench("score", 40, logs),
        bench("schedules", 55, logs),
        bench("sample", 40, logs),
        bench("linear", 45, logs),
        bench("verify", 25, logs),
        bench("update", 75, logs),
        demo(45, logs),
        bench("cooperative", 30, logs),
        bench("pack", 25, logs),
        sanitizer("memcheck", 60),
        sanitizer("racecheck", 40),
    ]


def run(stage: Stage, log: Path, seconds: float) -> str:
    """How it ended: "" is well."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *stage.arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # to be ended together with what it starts
        )
        try:
            code = process.wait(max(1.0, seconds - GRACE))
            return f"failed with {code}" if code else ""
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return f"cut off at {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_lines(log: Path, count: int) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def visit(plan: Iterable[Stage], logs: Path, budget: float) -> int:
    """Run the stages; 0 if all of them ran and ended well."""
    logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    table = []
    try:
        for stage in plan:
            left = budget - (time.monotonic() - begin)
            if left < TOO_SHORT:
                table.append((stage.name, f"not run: {budget:.0f} s are used up", 0.0, ""))
                continue
            print(f"{stage.name} …", flush=True)
            log = logs / f"{stage.name}.log"
            started = time.monotonic()
            ended = run(stage, log, min(stage.seconds, left))
            taken = time.monotonic() - started
            if ended:
                print("\n".join(f"    {line[:200]}" for line in last_lines(log, FINAL_LINES)))
            table.append((stage.name, ended or "ok", taken, "".join(last_lines(log, 1))[:80]))
    finally:
        print()
        for name, ended, taken, said in table:
            print(f"{name:<12} {taken:6.1f} s  {ended:<20}  {said}".rstrip(), flush=True)
    return int(any(ended != "ok" for _, ended, _, _ in table))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="visit.py", allow_abbrev=False)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="these alone; default: all")
    parser.add_argument("--logs", type=Path, default=ROOT / "build/visit", metavar="FOLDER")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    args = parser.parse_args(arguments)
    plan = {stage.name: stage for stage in stages(args.logs.resolve())}
    for name in args.stages:
        if name not in plan:
            parser.error(f"no stage {name!r}; there are {', '.join(plan)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return visit([plan[name] for name in args.stages or plan], args.logs, args.budget)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
