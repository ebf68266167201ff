"""Starts the ranks of a test module's SCRIPT once, and makes one test of each check in it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk


def pytest_generate_tests(metafunc):
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


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def said(request, tmp_path_factory):
    """What each rank said of each check; the ranks are started once for all of them."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = request.module.SCRIPT
    children = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(ranks), folder / "meet", folder / "said"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return [json.loads((folder / f"said.{rank}").read_text()) for rank in range(ranks)]


@pytest.fixture
def on_every_rank(said, check):
    failures = [f"rank {rank}: {of[check]}" for rank, of in enumerate(said) if of.get(check)]
    assert not failures, "\n".join(failures)
    assert all(check in results for results in said), "not reached: an earlier check failed"
