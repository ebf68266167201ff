"""Starts the ranks of a test module's SCRIPT once, and makes one test of each check in it."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk


def pytest_generate_tests(metafunc):
    if "said" in metafunc.fixturenames:
        ranks = getattr(metafunc.module, "RANKS", (2, 4))
        names = [f"{count}-ranks" for count in ranks]
        metafunc.parametrize("said", ranks, indirect=True, scope="module", ids=names)
    if "check" in metafunc.fixturenames:
        body = ast.parse(metafunc.module.SCRIPT.read_text()).body
        functions = [f for f in body if isinstance(f, ast.FunctionDef)]
        metafunc.parametrize(
            "check",
            [
                f.name
                for f in functions
                if any(isinstance(d, ast.Name) and d.id == "check" for d in f.decorator_list)
            ],
        )


@pytest.fixture(scope="module")
def said(request, tmp_path_factory):
    """What each rank said of each check; the ranks are started once for all of them."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        [sys.executable, request.module.SCRIPT, str(ranks), folder / "meet", folder / "said"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output = child.communicate(timeout=280)[0]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.returncode == 0, output
    return [json.loads((folder / f"said.{rank}").read_text()) for rank in range(ranks)]


@pytest.fixture
def on_every_rank(said, check):
    failures = [f"rank {rank}: {of[check]}" for rank, of in enumerate(said) if of.get(check)]
    assert not failures, "\n".join(failures)
    assert all(check in results for results in said), "not reached: an earlier check failed"
