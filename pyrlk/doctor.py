"""`pyrlk doctor`: what works on this machine, in a form that can be pasted into an issue.

A line is (name, value, cure): the cure is there where something is missing or will hurt.
"""

from __future__ import annotations

import array
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import torch

_PACKAGES = ("pyrlk", "torch", "triton", "transformers", "numpy", "rich", "matplotlib")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
_REINSTALL = "pip install --force-reinstall pyrlk, or pip install -e . in a checkout"


class Line(NamedTuple):
    name: str
    value: str
    cure: str = ""
    needed: bool = False  # without it pyrlk is not usable


class Engine(NamedTuple):
    """The engine to look at beside this machine: an SGLang by its URL, an interpreter by path."""

    url: str | None = None
    api_key: str | None = None
    python: str | None = None


_NO_ENGINE = Engine()


def main(*, as_json: bool = False, engine: Engine = _NO_ENGINE) -> int:
    """Print the report; 0 if pyrlk is usable here."""
    lines = report(engine)
    usable = not any(line.needed and line.cure for line in lines)
    if as_json:
        print(json.dumps({"usable": usable, "lines": [line._asdict() for line in lines]}, indent=2))
    else:
        width = max(len(line.name) for line in lines)
        for line in lines:
            print(f"{line.name:<{width}}  {line.value}")
            if line.cure:
                print(f"{'':<{width}}  → {line.cure}")
        print(f"\npyrlk is {'usable' if usable else 'not usable'} here")
    return 0 if usable else 1


def report(engine: Engine = _NO_ENGINE) -> list[Line]:
    lines = [*_versions(), *_cpu(), *_gpu(), *_hand_over()]
    if engine.url:
        lines += _server(engine.url, engine.api_key)
    if engine.python:
        lines.append(_loader(engine.python))
    return lines


def _versions() -> list[Line]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    lines = [Line("python", f"{platform.python_version()}, {system}")]
    for name in _PACKAGES:
        try:
            lines.append(Line(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append(_missing(name))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        lines.append(Line("compiler", "none found (needed only to build from source)"))
    else:
        lines.append(Line("compiler", _first_line([compiler, "--version"])))
    return lines


def _missing(name: str) -> Line:
    if name == "pyrlk":
        from pyrlk import __version__

        return Line(name, f"{__version__}, imported from a source tree")
    if name == "triton":
        cure = 'pip install "pyrlk[gpu]"' if torch.version.cuda else ""
        return Line(name, "not installed (needed for GPU kernels)", cure)
    if name == "torch":
        return Line(name, torch.__version__)
    return Line(name, "not installed (needed for pyrlk demo)", 'pip install "pyrlk[demo]"')


def _cpu() -> list[Line]:
    try:
        from pyrlk import _C
    except ImportError as error:
        extension = Line("extension", f"not built: {error}", _REINSTALL, needed=True)
    else:
        extension = Line("extension", f"pyrlk._C, kernels for {_C.cpu_isa()}", needed=True)
    flags = _cpu_flags()
    cores = f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    return [
        extension,
        Line(
            "cpu", f"{_cpu_name()}: {' '.join(f for f in _FLAGS if f in flags) or 'no SIMD found'}"
        ),
        Line("cores", f"{cores}; {torch.get_num_threads()} torch threads"),
    ]


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags").split() or _cpuinfo("Features").split()


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return ""


def _gpu() -> list[Line]:
    torch_cuda = torch.version.cuda or "none: a build of torch for the CPU"
    lines = [Line("torch cuda", torch_cuda)]
    if not torch.cuda.is_available():
        lines.append(Line("gpu", "none that torch can use"))
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        lines.append(Line(f"gpu {index}", f"{p.name}, sm_{p.major}{p.minor}, {memory}"))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines.append(Line("driver", _first_line(query)))
    else:
        lines.append(Line("driver", "no nvidia-smi"))
    return lines


def _hand_over() -> list[Line]:
    """Whether weights can be handed to another process, by trying it."""
    lines = [_host_handles(), *_cuda_handles()]
    try:
        shm = shutil.disk_usage("/dev/shm")
        lines.append(
            Line("/dev/shm", f"{shm.free / 2**30:.1f} of {shm.total / 2**30:.1f} GiB free")
        )
    except OSError as error:
        lines.append(Line("/dev/shm", f"{error}"))
    return [*lines, *_namespaces(), *_allocators()]


def _namespaces() -> list[Line]:
    """Handles reach a process of the same pid and ipc namespaces; containers have their own."""
    names = []
    for kind in ("pid", "ipc"):
        try:
            names.append(os.readlink(f"/proc/self/ns/{kind}"))
        except OSError as error:
            names.append(f"{kind}:{error.strerror}")
    return [Line("namespaces", f"{', '.join(names)}; the engine must show the same")]


def _allocators() -> list[Line]:
    """Settings under which torch's own CUDA memory cannot be exported."""
    lines = []
    cure = (
        "pyrlk.weights stages in memory of its own; code that shares tensors directly, and the "
        "hand-over without staging, need {}"
    )
    setting = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    plain = setting.lower().replace(" ", "")
    for found, wanted in (
        ("expandable_segments:true", "expandable_segments:False"),
        ("backend:cudamallocasync", "backend:native"),
    ):
        if found in plain:
            what = f"{setting}: torch's own tensors have no cudaIpcMemHandle"
            lines.append(Line("allocator", what, cure.format(wanted)))
    if "memory_saver" in os.environ.get("LD_PRELOAD", ""):
        what = "torch_memory_saver is preloaded: tensors in its regions have no cudaIpcMemHandle"
        lines.append(Line("allocator", what, cure.format("tensors outside its regions")))
    return lines


def _server(url: str, api_key: str | None) -> list[Line]:
    """What an update of that server would meet; nothing of it is changed."""
    from pyrlk.weights.errors import UpdateError
    from pyrlk.weights.sglang_server import LOADER, Server

    name = "engine"
    try:
        server = Server(url, api_key, 5.0)
        info = server.info()
        version = server.version()
        sessions = server.look()
    except (UpdateError, ValueError, TypeError) as error:
        cure = "start it on this machine; a server with an admin key needs --api-key"
        return [Line(name, f"no: {error}", cure, needed=True)]
    size = f"tp {info.tp_size}, pp {info.pp_size}, {info.dtype or 'dtype unknown'}"
    lines = [Line(name, f"SGLang {info.release}, {size}, weight version {version or 'none'}")]
    if version.startswith("pyrlk-updating:"):
        lines.append(Line(name, f"dirty: {version}", "send a full update"))
    dialect = "begin/end sessions" if sessions else "no sessions, an older server: bucket mode only"
    lines.append(Line("engine dialect", dialect))
    cure = "" if info.loader else f"start it with --custom-weight-loader {LOADER}"
    lines.append(Line("engine loader", f"{'yes' if info.loader else 'no'}: {LOADER}", cure))
    return lines


_IMPORT_LOADER = """
import importlib.metadata as m, os, pyrlk, torch
from pyrlk.weights import sglang_loader
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return "not installed"
print(f"torch {torch.__version__}, sglang {version('sglang')}, pyrlk in",
      os.path.dirname(pyrlk.__file__))
"""


def _loader(python: str) -> Line:
    """The engine's interpreter imports what --custom-weight-loader names."""
    name = "engine python"
    cure = (
        "install pyrlk into a folder of its own (pip install --no-deps --target DIR pyrlk) and put "
        "that on the engine's PYTHONPATH"
    )
    try:
        done = subprocess.run(
            [python, "-c", _IMPORT_LOADER], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line(name, f"no: {error}", "--engine-python names the engine's interpreter", True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Line(name, f"no: {lines[-1]}", cure, needed=True)
    return Line(name, f"yes: loader imported; {done.stdout.strip()}")


def _host_handles() -> Line:
    name = "cpu handles"
    try:
        from pyrlk.weights import memory
    except ImportError as error:
        return Line(name, f"not tried: {error}", _REINSTALL, needed=True)
    text = b"pyrlk doctor"
    try:
        source = memory.create(torch.device("cpu"), 4096)
        source.flat[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        fd = _through_socket(_descriptor(source))
        opened = memory.open_segment(source.handle, [fd])
        same = bytes(opened.flat[: len(text)].tolist()) == text
        opened.close()
        source.close()
    except Exception as error:
        cure = "allow memfd_create and SCM_RIGHTS (a seccomp profile or an old kernel forbids them)"
        return Line(name, f"no: {type(error).__name__}: {error}", cure, needed=True)
    if not same:
        return Line(name, "no: other bytes arrived", "please report this", needed=True)
    return Line(name, "yes: sealed memfd, passed over a Unix socket, mapped read-only")


def _descriptor(segment: Any) -> int:
    if segment.fd is None:
        raise RuntimeError("the segment has no descriptor")
    return segment.fd


def _through_socket(fd: int) -> int:
    """The descriptor that arrives at the other end of a Unix socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        ours.sendmsg([b"x"], rights)
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
    if len(fds) != 1:
        raise OSError("no descriptor arrived")
    return fds[0]


def _cuda_handles() -> list[Line]:
    name = "cuda handles"
    try:
        from pyrlk import _C
    except ImportError:
        return []
    reason = _C.cuda_unavailable()
    if reason:
        return [Line(name, f"no: {reason}")]
    count = _C.cuda_device_count()
    if count == 0:
        return [Line(name, "no: the driver sees no device")]
    return [_export(_C, device) for device in range(count)]


# Without torch: the extension alone is loaded in a moment.
_OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
import _C
device = int(sys.argv[2])
try: _C.cuda_ipc_close(device, _C.cuda_ipc_open(device, bytes.fromhex(sys.argv[3])))
except _C.CudaError as error: sys.exit(str(error))
"""


def _export(_C, device: int) -> Line:
    """A handle, exported here and opened by another process: a sandbox may allow one alone."""
    name = f"cuda handles {device}"
    cure = "trainer and engine must share the pid and ipc namespaces; MIG and WSL lack CUDA IPC"
    try:
        address = _C.cuda_alloc(device, 1 << 21)
        try:
            handle, _, _ = _C.cuda_ipc_export(device, address)
            folder = os.path.dirname(os.path.abspath(_C.__file__))
            command = [sys.executable, "-c", _OPEN, folder, str(device), handle.hex()]
            opened = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False
            )
        finally:
            _C.cuda_free(device, address)
    except Exception as error:
        return Line(name, f"no: {error}", cure)
    if opened.returncode:
        said = opened.stderr.strip().splitlines() or [f"exit code {opened.returncode}"]
        return Line(name, f"exported, but not opened by another process: {said[-1]}", cure)
    return Line(name, "yes: cudaIpcMemHandle exported, and opened by another process")


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    lines = (done.stdout or done.stderr).splitlines()
    return lines[0].strip() if lines else f"{command[0]}: exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(as_json="--json" in sys.argv[1:]))
