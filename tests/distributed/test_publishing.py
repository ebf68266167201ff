"""Publisher(group=) on 2 and 3 gloo processes: what publishing.py checks, one test a check."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk

SCRIPT = Path(__file__).with_name("publishing.py")
CHECKS = [
    f.name
    for f in ast.parse(SCRIPT.read_text()).body
    if isinstance(f, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "check" for d in f.decorator_list)
]

pytestmark = pytest.mark.distributed


def environment(**more):
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=[2, 3], ids=["2-ranks", "3-ranks"])
def said(request, tmp_path_factory):
    """What each rank said of each check; the ranks are started once for all of them."""
    folder, ranks, port = tmp_path_factory.mktemp("ranks"), request.param, free_port()
    children = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(ranks), str(port), folder / "said"],
            env=environment(XDG_RUNTIME_DIR=str(folder)),
            stdout=(folder / f"out.{rank}").open("w"), stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        for child in children:
            child.wait(240)
    finally:
        for child in children:
            child.kill()
            child.wait()
    for rank, child in enumerate(children):
        assert child.returncode == 0, (folder / f"out.{rank}").read_text()
    return [json.loads((folder / f"said.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(said, check):
    for rank, results in enumerate(said):
        assert check in results, "not reached: an earlier check failed"
        assert not results[check], f"rank {rank}: {results[check]}"
