"""One full update of an SGLang server: our two modes and SGLang's own way, interleaved.

    python -m pyrlk.bench.weights_sglang URL     a server with our --custom-weight-loader, whose
                                                 model_path can be read here

A side's floor is an update without tensors: the same requests, nothing to move. The copy inside the
engine is timed beside one memcpy of the same bytes by `replay`, without a server.

    sglang   a fresh tensor of all, torch.cat of uint8 views, "file_system" sharing
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pyrlk import weights
from pyrlk.weights import layout as layouts
from pyrlk.weights import memory, sglang_loader
from pyrlk.weights.sglang_server import Server

from . import measure

ROUNDS = 10


def checkpoint(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def sglang_update(server: Server, tensors: dict[str, Tensor], version: int) -> None:
    """What SGLang's own documentation does, on one node, for one rank."""
    server.pause("retract")
    server.flush()
    server.begin("all", recover=False)
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
    metadata = []
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=at,
                end_idx=end,
                numel=tensor.nbytes,
            )
        )
        at = end
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        payload = ForkingPickler.dumps({"flattened_tensor": flat, "metadata": metadata})
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    text = base64.b64encode(bytes(payload)).decode()
    server.update([text], "flattened_bucket", "all")
    server.end()
    server.set_version(str(version))
    server.resume()


def updates(url: str, rounds: int) -> dict:
    """Medians in milliseconds, and the ratios that the issue asks for."""
    server = Server(url, None, 300.0)
    tensors = checkpoint(Path(server.info().model_path))
    version = int(server.version()) if server.version().isdecimal() else 0
    stages: dict[str, dict[str, list[float]]] = {}
    taken: dict[str, list[float]] = {}

    def timed(side: str, run) -> None:
        nonlocal version
        version += 1
        start = time.perf_counter()
        report = run()
        taken.setdefault(side, []).append((time.perf_counter() - start) * 1e3)
        for stage, seconds in (report.seconds if report else {}).items():
            stages.setdefault(side, {}).setdefault(stage, []).append(seconds * 1e3)

    def ours(mode: str, sent: dict[str, Tensor]):
        # A publisher each: the lock is one publisher's at a time. Its connection is not timed.
        with weights.Publisher(weights.SGLang(url, mode=mode), timeout=300) as publisher:
            nonlocal version
            publisher.update({}, version=version, partial=True)
            version += 1
            if sent:
                publisher.update(sent, version=version)
                version += 1
            for side, given in (("", sent), ("-floor", {})):
                number = version
                timed(
                    mode + side,
                    lambda given=given, number=number: publisher.update(
                        given, version=number, partial=not given
                    ),
                )

    for _ in range(2):  # recorded, then compared: from then on replayed
        version += 1
        with weights.Publisher(weights.SGLang(url, mode="plan"), timeout=300) as publisher:
            first = publisher.update(tensors, version=version)
            stages.setdefault("plan-first", {}).setdefault("copy", []).append(
                first.seconds["copy"] * 1e3
            )
    version += 1
    for _ in range(rounds):
        ours("plan", tensors)
        ours("bucket", tensors)
        timed("sglang", lambda: sglang_update(server, tensors, version - 1))
    sides = {side: measure.Timing(values) for side, values in taken.items()}
    plan, bucket = sides["plan"], sides["bucket"]
    net = [
        (p - pf, b - bf)
        for p, pf, b, bf in zip(
            plan.rounds,
            sides["plan-floor"].rounds,
            bucket.rounds,
            sides["bucket-floor"].rounds,
            strict=True,
        )
    ]
    middle = measure.Timing([p / b for p, b in net]).median
    return {
        "tensors": len(tensors),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "sides": {side: timing.as_dict() for side, timing in sides.items()},
        "stages": {
            side: {name: round(measure.Timing(v).median, 3) for name, v in parts.items()}
            for side, parts in stages.items()
        },
        "(plan - floor) / (bucket - floor)": round(middle, 3),
        "sglang / plan": round(sides["sglang"].over(plan), 2),
        "load_weights / replay": round(
            stages["plan-first"]["copy"][0] / measure.Timing(stages["plan"]["copy"]).median,
            1,
        ),
    }


class Experts(nn.Module):
    """A mixture of experts as SGLang holds it, with a load_weights of the kind SGLang has."""

    def __init__(self, layers: int, experts: int, hidden: int, inner: int):
        super().__init__()
        dtype = torch.bfloat16
        self.shapes = layers, experts, hidden, inner
        self.w13 = nn.ParameterList(
            nn.Parameter(torch.zeros(experts, 2 * inner, hidden, dtype=dtype), requires_grad=False)
            for _ in range(layers)
        )
        self.w2 = nn.ParameterList(
            nn.Parameter(torch.zeros(experts, hidden, inner, dtype=dtype), requires_grad=False)
            for _ in range(layers)
        )

    def checkpoint(self) -> dict[str, Tensor]:
        layers, experts, hidden, inner = self.shapes
        out = {}
        for layer in range(layers):
            for expert in range(experts):
                name = f"layers.{layer}.experts.{expert}"
                out[f"{name}.gate"] = torch.randn(inner, hidden).bfloat16()
                out[f"{name}.up"] = torch.randn(inner, hidden).bfloat16()
                out[f"{name}.down"] = torch.randn(hidden, inner).bfloat16()
        return out

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        inner = self.shapes[3]
        for name, loaded in named:
            _, layer, _, expert, kind = name.split(".")
            if kind == "down":
                target = self.w2[int(layer)].data[int(expert)]
            else:
                start = 0 if kind == "gate" else inner
                target = self.w13[int(layer)].data[int(expert)].narrow(0, start, inner)
            target.copy_(loaded)


def replay(rounds: int, sizes: tuple[int, int, int, int] = (8, 128, 256, 128)) -> dict:
    """The engine's copy of one bucket against one memcpy of the same bytes, with equal threads."""
    model = Experts(*sizes)
    sent = model.checkpoint()
    specs = [layouts.Spec(n, tuple(t.shape), t.dtype) for n, t in sent.items()]
    layout = layouts.plan(specs, 1 << 40)
    segment = memory.create(torch.device("cpu"), layout.slot_bytes)
    copies = memory.Copies(
        [(t, e.offset) for t, e in zip(sent.values(), layout.entries, strict=True)]
    )
    threads = torch.get_num_threads()
    order = [layout.entries.index(layout.entries[i]) for i in layout.pieces[0]]
    packed = segment.pack(copies, checksum=True, threads=threads)
    sums = tuple(packed[i] for i in order)
    engine = sglang_loader.PlanEngine(model)
    for _ in range(2):
        engine.check(layout, False)
        engine.apply(segment, 0, sums, threads)
    source, target = segment.flat, torch.zeros(segment.nbytes, dtype=torch.uint8)
    wanted = {n: t.clone() for n, t in model.state_dict().items()}
    model_load = lambda: model.load_weights(  # noqa: E731 (one side of the table)
        (e.name, segment.view(e.offset, e.shape, e.dtype)) for e in layout.entries
    )
    sides = measure.interleaved(
        {
            "memcpy": lambda: target.copy_(source),
            "off": lambda: engine.apply(segment, 0, (), threads),
            "copy": lambda: engine.apply(segment, 0, sums, threads),
            "load_weights": model_load,
        },
        rounds=rounds,
    )
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
    return {
        "tensors": len(sent),
        "bytes": segment.nbytes,
        "threads": threads,
        "sides": {name: timing.as_dict() for name, timing in sides.items()},
        "off / memcpy": round(sides["off"].over(sides["memcpy"]), 3),
        "copy / memcpy": round(sides["copy"].over(sides["memcpy"]), 3),
        "load_weights / off": round(sides["load_weights"].over(sides["off"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", help="without one, only the copy inside the engine")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    result = {
        "replay": replay(3 * args.rounds),
        # 3,000 tensors of 8 KB: the calls cost more than the bytes.
        "replay small": replay(3 * args.rounds, (8, 125, 64, 64)),
    }
    if args.url:
        result["update"] = updates(args.url, args.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
