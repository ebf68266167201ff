"""compute-sanitizer over gpu tests on short rows: `make sanitize-gpu`.

`--tool` takes one of the tools, and may be repeated; all other arguments are pytest's.

An instrumented kernel is some hundred times slower, so PYRLK_GPU_SHORT=1 cuts rows to three groups
and the tests are those that reach every kernel once, in every branch. Memory is not cached, so that
an access beyond a tensor is one beyond its allocation; no graph can be captured then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = (
    "values_of_the_cpu",  # of every op
    "schedules_have_the_same_bits",
    "replayed_loss",
    "broken_support",
    "scorers_bits",
    "forbidden_tokens",
    "beyond_the_buffer",
    "what_the_cpu_packs",
)
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
MISSING = (
    "compute-sanitizer is not installed: it comes with the CUDA toolkit (package "
    "cuda-sanitizer-<version> of NVIDIA's repositories); put it on PATH, or set CUDA_HOME"
)


def find() -> str | None:
    """The tool: on PATH, under CUDA_HOME, or where the toolkit is installed by default."""
    folders = [os.environ["CUDA_HOME"] + "/bin"] if os.environ.get("CUDA_HOME") else []
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, *PLACES])
    return shutil.which("compute-sanitizer", path=path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sanitize.py", allow_abbrev=False, add_help=False)
    parser.add_argument("--tool", choices=TOOLS, action="append")
    options, arguments = parser.parse_known_args(arguments)
    tools = options.tool or TOOLS
    sanitizer = find()
    if sanitizer is None:
        print(MISSING, file=sys.stderr)
        return 2
    environment = os.environ | {"PYRLK_GPU_SHORT": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Not `python -m pytest`: that puts the source tree before an installed wheel.
    run = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; "
        "import pytest; sys.exit(pytest.main())"
    )
    pytest = [sys.executable, "-c", run, str(HERE), "-m", "gpu", "-k", " or ".join(TESTS)]
    pytest += ["--timeout", "3600", "-p", "no:cacheprovider", *arguments]
    reports = []
    for tool in tools:
        print(f"compute-sanitizer --tool {tool}", flush=True)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
        reports.append(subprocess.run([*command, *pytest], env=environment).returncode)
    for tool, code in zip(tools, reports, strict=True):
        print(f"{tool}: {'no reports' if code == 0 else f'failed with {code}'}")
    return int(any(reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
