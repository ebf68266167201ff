"""A rank is killed (SIGKILL) while four of them gather; the others say what they met, and when.

    python gather_killed.py FOLDER MOMENTS      one JSON line a moment

The ranks are forked from a process that has imported everything: a moment takes a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pyrlk import weights
from pyrlk.weights import gather

RANKS = 4
DEADLINE = 5.0  # seconds, of every wait
TENSORS = 60
RULES = [gather.Rule("w{i}", "w{i}")]


def run(rank, folder, said):
    """Gather again and again until something happens; write it down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    module = nn.Module()
    for i in range(TENSORS):
        part = nn.Parameter(torch.full((64, 32), float(i)), requires_grad=False)
        part.tensor_model_parallel, part.partition_dim = True, 0
        module.register_parameter(f"w{i}", part)
    dist.barrier()
    os.write(said, b"r")  # ready: from here on any moment will do
    began, outcome = time.monotonic(), "nothing"
    try:
        while time.monotonic() - began < 60:
            began = time.monotonic()
            gathered = gather.megatron(
                module, rules=RULES, tensor_group=dist.group.WORLD, timeout=DEADLINE
            )
            for _ in range(3):
                for _ in gathered.stream(200_000, receive=rank in (0, 2)):
                    began = time.monotonic()
    except weights.UpdateError as error:
        outcome = type(error).__name__
        text = str(error)
    except BaseException as error:
        outcome, text = "other", repr(error)
    waited = time.monotonic() - began
    os.write(said, json.dumps([rank, outcome, waited, text]).encode())
    os._exit(0)


def moment(folder, seed):
    folder.mkdir()
    chance = random.Random(seed)
    reads, children = {}, {}
    for rank in range(RANKS):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run(rank, folder, write)
            finally:
                os._exit(1)
        os.close(write)
        reads[rank], children[rank] = read, child
    try:
        for rank in range(RANKS):
            assert os.read(reads[rank], 1) == b"r"
        victim = chance.randrange(RANKS)
        time.sleep(chance.uniform(0, 0.6))
        os.kill(children[victim], signal.SIGKILL)
        killed = time.monotonic()
        survivors = []
        for rank in set(range(RANKS)) - {victim}:
            rest = b""
            while part := os.read(reads[rank], 4096):
                rest += part
            survivors.append(json.loads(rest) if rest else [rank, "died", 0.0, ""])
        return {"victim": victim, "after": time.monotonic() - killed, "survivors": survivors}
    finally:
        for rank in range(RANKS):
            os.close(reads[rank])
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)


if __name__ == "__main__":
    for seed in range(int(sys.argv[2])):
        print(json.dumps(moment(Path(sys.argv[1]) / str(seed), seed)), flush=True)
