"""The other process of a two-process test: `child.py receiver|publisher SOCKET [option …]`.

Prints a line when it reaches a point that the test waits for.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from pyrlk import weights
from pyrlk.weights import memory, publisher


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 300), nn.LayerNorm(300), nn.Linear(300, 64)).bfloat16()


def build_fake_cuda(folder: Path) -> str | None:
    """Compile fake_cuda.c, for PYRLK_LIBCUDA; None without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = str(folder / "libcuda_fake.so")
    source = str(Path(__file__).with_name("fake_cuda.c"))
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    return library


def use_fake_cuda() -> None:
    """Device memory of the fake driver is host memory: wrap its addresses as CPU tensors."""

    def host_tensor(address: int, nbytes: int, device: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)

    memory._cuda_tensor = host_tensor
    memory.placement = lambda tensors: torch.device("cuda", 0)


def say(line: str) -> None:
    print(line, flush=True)


def receive(options: argparse.Namespace) -> None:
    model = make_model(seed=1).to(options.device)
    target = model
    if options.hang:
        # A load_weights that never returns: the publisher waits for a process about to be killed.
        def target(tensors):
            say("loading")
            time.sleep(60)

    with weights.Receiver(target, options.socket) as receiver:
        say("listening")
        receiver.serve(until=lambda: receiver.version >= options.version)
        if options.stay:
            receiver.serve()
        # The publisher may still be closing.
        receiver.poll(1.0)
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    say(f"version {receiver.version} dirty {receiver.dirty} sum {total!r}")


def publish(options: argparse.Namespace) -> None:
    packed = memory.Segment.pack
    count = 0

    def stop_at(self, sources, **kwargs):
        nonlocal count
        if count == options.hang_at:
            say("packing")
            time.sleep(60)
        count += 1
        return packed(self, sources, **kwargs)

    memory.Segment.pack = stop_at
    target = weights.Local(options.socket)
    model = make_model(seed=2).to(options.device)
    if options.strided:
        weight = model[0].weight
        weight.data = weight.data.t().contiguous().t()
    with publisher.Publisher(
        target, bucket_bytes=options.bucket_bytes, verify=options.verify
    ) as sender:
        for version in range(options.first or options.version, options.version + 1):
            say(f"mode {sender.update(model, version=version).mode}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["receiver", "publisher"])
    parser.add_argument("socket")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--hang-at", type=int, default=-1)
    parser.add_argument("--bucket-bytes", type=int, default=512 << 20)
    parser.add_argument("--fake-cuda", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strided", action="store_true")
    parser.add_argument("--verify", default="copy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fake_cuda:
        use_fake_cuda()
    {"receiver": receive, "publisher": publish}[options.role](options)


if __name__ == "__main__":
    sys.exit(main())
