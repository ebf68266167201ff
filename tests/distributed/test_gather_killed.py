"""A rank that is killed during a gather, at any moment: the others stop within their deadline."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("gather_killed.py")
DEADLINE = 5.0  # as in the script


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_other_rank_stops_with_a_typed_error(tmp_path, moments):
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        [sys.executable, SCRIPT, tmp_path, str(moments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = child.communicate(timeout=290)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.returncode == 0, errors
    seen = [json.loads(line) for line in out.splitlines()]
    assert len(seen) == moments
    for one in seen:
        assert len(one["survivors"]) == 3
        for rank, outcome, waited, text in one["survivors"]:
            assert outcome in ("PeerLost", "Timeout"), (rank, outcome, text)
            assert "gather: " in text
            assert waited < DEADLINE + 2, one
