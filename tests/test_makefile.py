"""`make USE=<python>`: everything runs by that interpreter, as it is, and nothing is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ["build", "doctor", "demo", "test", "test-gpu", "bench-gpu", "sanitize-gpu", "dry-gpu"]
TARGETS += ["visit-gpu"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(*arguments):
    # Not as a part of the make that runs the tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment |= {"PIP_NO_INDEX": "1", "PYTHONPATH": "/carried"}
    done = subprocess.run(
        ["make", *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_every_command_of_a_target_is_the_given_interpreters(target):
    lines = make("-n", "USE=/some/python", target).splitlines()
    assert lines
    assert all(line.startswith("/some/python ") for line in lines), lines


def test_without_it_the_interpreter_is_that_of_the_environment_that_make_sets_up():
    lines = make("-n", "-o", ".venv/.ready", "test-gpu").splitlines()
    assert lines
    assert all(line.startswith(".venv/bin/") for line in lines), lines


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter with our dependencies, without pip, and without pyrlk."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # Of an entry of a .pth no further .pth is read: an editable pyrlk stays out.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin/python"
    found = subprocess.run([python, "-c", "import pyrlk"], cwd=folder, capture_output=True)
    assert found.returncode != 0
    return python


def test_a_bare_interpreter_runs_the_source_tree(bare):
    said = make("-s", "-o", "build", f"USE={bare}", "doctor")
    assert "pyrlk is usable here" in said
    listed = make(
        "-s", "-o", "build", f"USE={bare}", "test-gpu", "ARGS=-q --collect-only -p no:cacheprovider"
    )
    assert "tests/gpu/test_ops_on_device.py::" in listed
    assert "no tests ran" not in listed


def test_the_extension_is_built_in_place_by_cmake_alone(tmp_path):
    """Whatever setuptools there is: one before 77 cannot read our metadata."""
    command = make("-n", "USE=/some/python", "build")
    code = command.split("-c", 1)[1].strip().strip("'")
    script = (
        "import setup, subprocess, setuptools.dist\n"
        "setuptools.dist.Distribution.parse_config_files = None\n"
        "subprocess.run = lambda command, check: print(*command)\n" + code
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"--prefix {ROOT / 'pyrlk'}")
