"""The vocabulary sharded over 2 and 4 gloo processes: what ranks.py checks, one test a check."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk

SCRIPT = Path(__file__).with_name("ranks.py")
CHECKS = [
    f.name
    for f in ast.parse(SCRIPT.read_text()).body
    if isinstance(f, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "check" for d in f.decorator_list)
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def said(request, tmp_path_factory):
    """What each rank said of each check; the ranks are started once for all of them."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(ranks), folder / "meet", folder / "said"],
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


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(said, check):
    for rank, results in enumerate(said):
        assert check in results, "not reached: an earlier check failed"
        assert not results[check], f"rank {rank}: {results[check]}"
