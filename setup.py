"""Build pyrlk: CMake and Ninja compile csrc/; triton_kernels/ installs as pyrlk.triton_kernels.

Metadata lives in pyproject.toml. torch is not needed to build. `make build` calls `compile_into`
alone, in place: that reads no metadata, and so takes a setuptools of any age.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def compile_into(folder: Path = ROOT / "pyrlk") -> None:
    """Configure, build and install csrc/ there; what did not change is not compiled again."""
    import pybind11

    build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    build.mkdir(parents=True, exist_ok=True)
    cmake, ninja = _tool("cmake"), _tool("ninja")
    configure = [
        cmake,
        "-S", str(ROOT / "csrc"),
        "-B", str(build),
        "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_BUILD_TYPE={os.environ.get('PYRLK_BUILD_TYPE', 'Release')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *os.environ.get("CMAKE_ARGS", "").split(),
    ]  # fmt: skip
    _run(configure)
    _run([cmake, "--build", str(build)])
    _run([cmake, "--install", str(build), "--prefix", str(folder.resolve())])


def _tool(name: str) -> str:
    # The environment's own tool first: a system ninja of another version rebuilds everything.
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"pyrlk needs {name} to build: pip install {name}")
    return found


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pyrlk: `{' '.join(command[:2])} …` failed with status {error.returncode}. A "
            "C++17 compiler with OpenMP is needed (Debian: apt install g++; no macOS). "
            "The compiler's own message is above."
        ) from None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        compile_into(Path(self.get_ext_fullpath(ext.name)).parent)


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["pyrlk", "pyrlk.*"]),
            "pyrlk.bench",
            "pyrlk.triton_kernels",
        ],
        package_dir={"pyrlk.triton_kernels": "triton_kernels", "pyrlk.bench": "bench"},
        package_data={"pyrlk": ["py.typed", "_C.pyi"]},
        ext_modules=[Extension("pyrlk._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
