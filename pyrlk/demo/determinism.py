"""Same seed, same bytes: what has to be fixed in each process besides the seeds."""

from __future__ import annotations

import os

import torch


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def fix(threads: int) -> None:
    """Deterministic kernels and a fixed number of threads: the order of a sum depends on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
