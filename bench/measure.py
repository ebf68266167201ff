"""How everything here is timed, and under which conditions a figure was taken.

The sides of a comparison run interleaved, one call each a round, after warm-up rounds: a change of
clock or of a neighbour's load hits all of them. A figure is a median with its 20th and 80th
percentile; a ratio is the median of the ratios within a round. No time is printed for a result that
fails its correctness gate.

On a GPU a call is timed by events on its stream, behind a read of 512 MiB: L2 then holds nothing of
the call's inputs, and nothing that has yet to be written back, and the host has queued the call by
the time the read ends. What waits for another process is timed by the wall instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import pyrlk

BEYOND_L2 = 512 << 20  # bytes, several times any L2: an H200 reads them in 0.12 ms


class Timing(NamedTuple):
    """Milliseconds of one side, one entry a round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def percentile(self, share: float) -> float:
        return sorted(self.rounds)[min(len(self.rounds) - 1, int(share * len(self.rounds)))]

    def over(self, other: Timing) -> float:
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(a / b for a, b in pairs)

    def as_dict(self) -> dict:
        return {
            "ms": round(self.median, 4),
            "p20": round(self.percentile(0.2), 4),
            "p80": round(self.percentile(0.8), 4),
        }


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    rounds: int,
    warmup: int = 2,
    wall: bool = False,
) -> dict[str, Timing]:
    """Time each side once a round; `before[name]` restores its inputs and is not timed."""
    clock = _wall_clock if wall or not _on_gpu() else _device_clock
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, call in sides.items():
            if before and name in before:
                before[name]()
            milliseconds = clock(call)
            if i >= warmup:
                taken[name].append(milliseconds)
    return {name: Timing(values) for name, values in taken.items()}


def _on_gpu() -> bool:
    """Whether this process measures a GPU: a bench of the CPU never starts one that is there."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _wall_clock(call: Callable[[], object]) -> float:
    if _on_gpu():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if _on_gpu():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def _device_clock(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _much_memory().sum()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _much_memory() -> torch.Tensor:
    return torch.zeros(BEYOND_L2 // 4, device="cuda")


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`call` as one CUDA graph: kernels without the time of their launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles or loads must not do so in the capture
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def forget() -> None:
    """Give back what an op left to the allocators, before the next one."""
    gc.collect()
    if _on_gpu():
        torch.cuda.empty_cache()


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that `call` needed beyond what was there before, at its highest."""
    gc.collect()
    if _on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    before = _status("VmHWM")
    call()
    return _status("VmHWM") - before


def _return_freed_memory() -> None:
    """What an allocator keeps for later (pyrlk's, glibc's) would be missing from the next peak."""
    pyrlk.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def conditions(device: str) -> dict:
    """Device, versions and commit: what a figure is worth nothing without."""
    from pyrlk import _C

    facts: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
        }
    else:
        facts |= {
            "device": _cpu_name(),
            "isa": _C.cpu_isa(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
    return facts


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The commit of the source tree, `+` and a digest of what changed since.

    Outside git it is what PYRLK_COMMIT says: a copy of the tree knows no commit of its own.
    """
    sources = "--", ":/csrc", ":/pyrlk", ":/triton_kernels"
    try:
        base = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("diff", "HEAD", *sources) + _git("status", "--porcelain", *sources)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PYRLK_COMMIT") or "unknown"
    return base + (f"+{hashlib.sha256(changed.encode()).hexdigest()[:6]}" if changed else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
