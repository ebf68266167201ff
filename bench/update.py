"""A whole update, trainer process to engine process, over the same tensors on one device.

copy         plain copies of as many bytes inside one process: the limit
direct       Publisher: the engine copies from the trainer's own memory, after a read for its sums
unverified   the same with verify="off": the weights are read once
staged       Publisher: packed into staging buckets, copied from there
bucket       flattened buckets sent by torch.multiprocessing, cut up and copied by the engine
per_tensor   every tensor sent by torch.multiprocessing, copied by the engine

Weights change before every update, and the engine's are compared after each side's last one.
Qwen3-8B's shapes; on a GPU with room for two of them Qwen3-30B-A3B's too. On a CPU every size is an
eighth.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.multiprocessing
from torch import Tensor, nn

from pyrlk import weights

from .measure import Timing, interleaved
from .pack import qwen3_moe_shapes

BUCKET_BYTES = 512 << 20
PUBLISHERS = "direct", "unverified", "staged"
Shapes = list[tuple[int, ...]]


def qwen3_dense_shapes(layers: int, scale: int) -> Shapes:
    """Of every tensor of Qwen3-8B (hidden 4096, inner 12288), divided by `scale`."""
    hidden, inner, vocab, key, head = (x // scale for x in (4096, 12288, 151936, 1024, 128))
    layer: Shapes = [(hidden, hidden), (key, hidden), (key, hidden), (hidden, hidden)]
    layer += [(head,), (head,), (hidden,), (hidden,)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [(vocab, hidden), *layer * layers, (hidden,), (vocab, hidden)]


class Model(nn.Module):
    def __init__(self, shapes: Shapes, device: str):
        super().__init__()
        empty = (torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
        self.weights = nn.ParameterList(nn.Parameter(x, requires_grad=False) for x in empty)

    def change(self) -> None:
        """Other bits everywhere; all of them are finite numbers."""
        for weight in self.weights:
            weight.data.view(torch.int16).add_(1).bitwise_and_(0x3FFF)

    def digest(self) -> list[int]:
        """Depends on every bit and on where the tensor stands."""
        sums = [w.data.view(torch.int16).sum(dtype=torch.int64) for w in self.weights]
        return torch.stack(sums).tolist()


class Staged(weights.Local):
    """A receiver that is handed staging buckets, whatever memory the tensors are in."""

    direct: ClassVar[bool] = False  # type: ignore[misc]


def buckets(tensors: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first tensor, flattened bucket) one after the other."""
    first, room = 0, 0
    for i, tensor in enumerate(tensors):
        if room + tensor.nbytes > BUCKET_BYTES and i > first:
            yield first, torch.cat([t.reshape(-1) for t in tensors[first:i]])
            first, room = i, 0
        room += tensor.nbytes
    yield first, torch.cat([t.reshape(-1) for t in tensors[first:]])


def _engine(folder: str, pipe: Any, shapes: Shapes, device: str) -> None:
    """Takes what comes: a receiver for each publisher, and torch's way through the pipe."""
    torch.set_num_threads(1)
    model = Model(shapes, device)
    with contextlib.ExitStack() as stack:
        paths = (os.path.join(folder, side) for side in PUBLISHERS)
        receivers = [stack.enter_context(weights.Receiver(model, path)) for path in paths]
        pipe.send("ready")
        while True:
            for receiver in receivers:
                receiver.poll(1e-4)
            if not pipe.poll():
                continue
            command, first, data = pipe.recv()
            if command == "stop":
                return
            if command == "digest":
                pipe.send(model.digest())
            elif command == "tensors":
                for weight, tensor in zip(model.weights[first:], data, strict=False):
                    weight.data.copy_(tensor)
            elif command == "bucket":
                at = 0
                for weight in model.weights[first:]:
                    if at == data.numel():
                        break
                    weight.data.copy_(data[at : at + weight.numel()].view(weight.shape))
                    at += weight.numel()
            if command != "digest":
                if device == "cuda":
                    torch.cuda.synchronize()
                pipe.send("taken")
            del data  # before the sender reuses its memory


class Trainer:
    """The weights and every way they go; `tensors` are what torch sends."""

    def __init__(self, shapes: Shapes, device: str, folder: str, pipe: Any):
        self.model, self.pipe = Model(shapes, device), pipe
        for weight in self.model.weights:
            weight.data.view(torch.int16).random_(0, 0x3FFF)
        self.nbytes = sum(weight.nbytes for weight in self.model.weights)
        # On a CPU torch.multiprocessing moves what it sends into memory of its own; on a GPU it is
        # sent tensors of their own allocations, as a trainer has them, where there is room.
        self.copies = device == "cpu" or torch.cuda.mem_get_info()[0] > 2 * self.nbytes
        self.tensors = [w.data.clone() for w in self.model.weights] if self.copies else []
        weights.share(self.model)
        self.tensors = self.tensors or [weight.data for weight in self.model.weights]
        kinds = {"direct": weights.Local, "unverified": weights.Local, "staged": Staged}
        self.publishers = {
            side: weights.Publisher(
                kind(os.path.join(folder, side)),
                bucket_bytes=BUCKET_BYTES,
                verify="off" if side == "unverified" else "copy",
            )
            for side, kind in kinds.items()
        }
        self.reports: dict[str, list[weights.UpdateReport]] = {side: [] for side in kinds}
        size = (min(self.nbytes, 2 << 30) // 2,)
        self.source = torch.randint(-999, 999, size, dtype=torch.int16, device=device)
        self.room = torch.empty_like(self.source)

    def change(self) -> None:
        self.model.change()
        if self.copies:
            for mine, sent in zip(self.model.weights, self.tensors, strict=True):
                sent.copy_(mine.data)

    def copy(self) -> None:
        left = self.nbytes // 2
        while left > 0:
            some = min(left, self.source.numel())
            self.room[:some].copy_(self.source[:some])
            left -= some

    def publish(self, side: str) -> None:
        reports = self.reports[side]
        reports.append(self.publishers[side].update(self.model, version=len(reports)))

    def send(self, command: str, first: int, data: object) -> Any:
        self.pipe.send((command, first, data))
        return self.pipe.recv()

    def sides(self) -> dict[str, Callable[[], object]]:
        return {
            "copy": self.copy,
            **{side: functools.partial(self.publish, side) for side in self.publishers},
            "bucket": lambda: [self.send("bucket", *item) for item in buckets(self.tensors)],
            "per_tensor": lambda: self.send("tensors", 0, self.tensors),
        }


def run(name: str, shapes: Shapes, device: str, *, rounds: int) -> dict:
    """One row of the table."""
    spawn = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipe, its = spawn.Pipe()
        engine = spawn.Process(target=_engine, args=(folder, its, shapes, device), daemon=True)
        engine.start()
        its.close()
        assert pipe.recv() == "ready"
        trainer = Trainer(shapes, device, folder, pipe)
        sides = trainer.sides()
        before = dict.fromkeys(sides, trainer.change)
        times = interleaved(sides, before=before, rounds=rounds, wall=True)
        exact = True
        for side, call in sides.items():
            trainer.change()
            call()
            exact &= side == "copy" or trainer.send("digest", 0, None) == trainer.model.digest()
        modes = {side: reports[-1].mode for side, reports in trainer.reports.items()}
        for publisher in trainer.publishers.values():
            publisher.close()
        trainer.pipe.send(("stop", 0, None))
        engine.join(60)
    row = {
        "op": f"update {name}",
        "shape": [len(shapes)],
        "dtype": "bfloat16",
        "bytes": trainer.nbytes,
        "modes": modes,
    }
    if not exact or modes != {"direct": "direct", "unverified": "direct", "staged": "bucket"}:
        return row | {"failed": "correctness gate: no times are reported"}
    stages = {
        side: {
            stage: Timing([r.seconds[stage] * 1e3 for r in reports[2:-1]]).as_dict()
            for stage in reports[-1].seconds
        }
        for side, reports in trainer.reports.items()
    }
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "stages": stages,
        **{f"{side}_over_copy": times[side].over(times["copy"]) for side in sides},
    }


def main(device: str, quick: bool) -> Iterator[dict]:
    """Qwen3-8B; on a GPU that holds it twice Qwen3-30B-A3B too."""
    rounds = 3 if quick else 9
    if quick or device == "cpu":
        layers, scale = (2, 64) if quick else (36, 8)
        shapes = qwen3_dense_shapes(layers, scale)
        yield run(f"Qwen3-8B, sizes / {scale}", shapes, device, rounds=rounds)
        return
    yield run("Qwen3-8B", qwen3_dense_shapes(36, 1), device, rounds=rounds)
    large = qwen3_moe_shapes(48, 1)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] > 2 * sum(2 * math.prod(shape) for shape in large) + (8 << 30):
        yield run("Qwen3-30B-A3B", large, device, rounds=5)
