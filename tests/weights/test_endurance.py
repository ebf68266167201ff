"""Nothing grows from update to update: resident memory, descriptors, shared memory."""

import gc
import multiprocessing
import os
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pyrlk import weights

pytestmark = pytest.mark.distributed
MIB = 1 << 20
WARM_UP = 200  # updates until allocators and caches have settled


class Held(NamedTuple):
    resident: int
    descriptors: int
    mappings: int
    shared: int


def held() -> Held:
    """What this process holds now."""
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:  # exact, unlike statm
        resident = next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))
    with open("/proc/self/maps") as file:
        mappings = sum("pyrlk" in line or "/dev/shm" in line for line in file)
    # Files of the whole machine: those that are, or could be, this process's.
    ours = ("pyrlk", f"torch_{os.getpid()}_")
    shared = sum(name.startswith(ours) for name in os.listdir("/dev/shm"))
    return Held(resident, len(os.listdir("/proc/self/fd")), mappings, shared)


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 50), nn.LayerNorm(50))


def _engine(path: str, pipe) -> None:
    torch.set_num_threads(1)
    with weights.Receiver(make_model(0), path) as receiver:
        pipe.send("listening")
        while True:
            receiver.poll(0.01)
            if pipe.poll():
                if pipe.recv() == "stop":
                    return
                pipe.send((receiver.version, held()))


@pytest.mark.parametrize(
    "updates", [500, pytest.param(10_000, marks=[pytest.mark.endurance, pytest.mark.timeout(3600)])]
)
def test_nothing_grows(socket_path, updates):
    fork = multiprocessing.get_context("fork")
    pipe, theirs = fork.Pipe()
    engine = fork.Process(target=_engine, args=(socket_path, theirs), daemon=True)
    engine.start()
    assert pipe.recv() == "listening"
    trainer = make_model(1)
    try:
        with weights.Publisher(weights.Local(socket_path), bucket_bytes=8192) as publisher:
            for version in range(updates + WARM_UP):
                publisher.update(trainer, version=version)
                if version == WARM_UP - 1:
                    pipe.send("held")
                    before = held(), pipe.recv()[1]
            pipe.send("held")
            last, engine_after = pipe.recv()
            after = held(), engine_after
        assert last == updates + WARM_UP - 1
        for who, old, new in zip(("publisher", "receiver"), before, after, strict=True):
            grown = new.resident - old.resident
            print(f"{who}: {grown / 1024:+.0f} KiB resident after {updates} updates")
            assert grown < MIB, who
            assert new[1:] == old[1:], who
    finally:
        pipe.send("stop")
        engine.join(10)
        engine.kill()
