"""Runs the checks of a script on every rank of a small gloo group; conftest.py starts it.

    python SCRIPT RANKS RENDEZVOUS RESULTS

The ranks are forked from one process that has imported everything: imports take longer than checks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class _Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def collectives(call):
    """Names of the collectives that the dispatcher saw, sorted."""
    with _Collectives() as seen:
        call()
    return sorted(seen.names)


def main() -> None:
    ranks, rendezvous, results = int(sys.argv[1]), *sys.argv[2:]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                _rank(rank, ranks, rendezvous, results)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)


def _rank(rank: int, ranks: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    said = {}
    for name, function in CHECKS.items():
        try:
            function()
            said[name] = ""
            dist.barrier()
        except Exception:
            # The others fail too, by the broken connection, and soon.
            said[name] = traceback.format_exc()
            break
    with open(f"{results}.{rank}", "w") as file:
        json.dump(said, file)
