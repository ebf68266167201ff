"""Runs tests/triton_kernels/interpreted in a child: triton is told to interpret before it loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name):
    # Not `python -m pytest`: that puts the source tree before an installed wheel.
    run = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; "
        "import pytest; sys.exit(pytest.main())"
    )
    child = subprocess.run(
        [sys.executable, "-c", run, str(FOLDER / name), "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
