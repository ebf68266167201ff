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

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def collectives(call):
    """Names of the collectives that the dispatcher of c10d saw."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    return sorted(e.name for e in profile.events() if e.name.startswith("c10d::"))


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
