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

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def collectives(call):
    """Names of the collectives that the dispatcher saw, sorted; also those inside an op."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    return sorted(e.name for e in profile.events() if e.name.startswith("c10d::"))


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
