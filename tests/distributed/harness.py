"""Runs the checks of a script on every rank of a small gloo group; conftest.py starts the ranks.

python SCRIPT RANK RANKS RENDEZVOUS RESULTS
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
    rank, ranks, rendezvous, results = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
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
    if any(said.values()):
        os._exit(0)
    dist.destroy_process_group()
