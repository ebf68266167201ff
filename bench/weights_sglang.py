"""One full update of an SGLang server: our two modes and SGLang's own way, interleaved.

    make bench-sglang            starts two servers and measures both
    python -m pyrlk.bench.weights_sglang LARGE [SMALL] [--write FOLDER]
                                 URLs of servers with our --custom-weight-loader, on this machine,
                                 whose model_path can be read here

    floor      an update without tensors: the same requests, nothing to move
    plan, bucket   ours; what is left after the floor is packing, handing over, loading
    sglang     a fresh tensor of all, torch.cat of uint8 views, "file_system" sharing
               (no floor is taken off: pause, flush, begin, end and version are in it)
    memcpy     what the copy inside the engine is held against, without a server

SMALL is a server of thousands of small tensors: there the engine's copy is held against its own
load_weights.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pyrlk import weights
from pyrlk.weights import layout as layouts
from pyrlk.weights import memory, sglang_loader
from pyrlk.weights.sglang_server import Server

from . import measure, table

ROUNDS = 10
RAW = argparse.RawDescriptionHelpFormatter


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


class Engine:
    """A server, its checkpoint, and versions that rise."""

    def __init__(self, url: str):
        self.url = url
        self.server = Server(url, None, 300.0)
        # On a CPU /flush_cache collects garbage; with SGLang's modules frozen, little of it.
        self.server.http.request("POST", "/freeze_gc")
        self.tensors = checkpoint(Path(self.server.info().model_path))
        current = self.server.version()
        self._version = int(current) if current.isdecimal() else 0

    def version(self) -> int:
        self._version += 1
        return self._version

    def publisher(self, mode: str) -> weights.Publisher:
        return weights.Publisher(weights.SGLang(self.url, mode=mode), timeout=300)

    def checksums(self) -> list[str]:
        """SGLang's own, of every rank's parameters."""
        status, answer = self.server.http.request("POST", "/weights_checker", {})
        if status != 200:
            raise SystemExit(f"{self.url}/weights_checker: {status} {answer}")
        return [rank["per_gpu_checksum"] for rank in answer["ranks"]]


SIDES = ("plan", "bucket", "sglang")


def updates(url: str, rounds: int) -> dict:
    """Each way once a round, and its floor; milliseconds, by stage where it is ours."""
    engine = Engine(url)
    tensors = engine.tensors
    zero = {name: tensor * 0 for name, tensor in tensors.items()}
    taken: dict[str, list[float]] = {}
    stages: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}

    def timed(side: str, run: Callable[[], weights.UpdateReport | None]) -> None:
        start = time.perf_counter()
        report = run()
        taken.setdefault(side, []).append((time.perf_counter() - start) * 1e3)
        for stage, seconds in (report.seconds if report else {}).items():
            stages.setdefault(side, {}).setdefault(stage, []).append(seconds * 1e3)

    def ours(mode: str) -> None:
        # One publisher at a time holds the lock: each round has its own, warmed before the clock.
        with engine.publisher(mode) as publisher:
            publisher.update({}, version=engine.version(), partial=True)
            publisher.update(tensors, version=engine.version())
            for side, sent in ((mode, tensors), (f"{mode}-floor", {})):
                version = engine.version()
                timed(side, lambda: publisher.update(sent, version=version, partial=not sent))  # noqa: B023

    def theirs() -> None:
        version = engine.version()
        timed("sglang", lambda: sglang_update(engine.server, tensors, version))

    with engine.publisher("plan") as publisher:  # recorded, compared: from then on replayed
        for _ in range(2):
            publisher.update(tensors, version=engine.version())
    wanted = engine.checksums()
    for side in SIDES:  # no time for a way that loses a byte
        with engine.publisher("bucket") as publisher:
            publisher.update(zero, version=engine.version())
        if side == "sglang":
            sglang_update(engine.server, tensors, engine.version())
        else:
            with engine.publisher(side) as publisher:
                publisher.update(tensors, version=engine.version())
        if engine.checksums() != wanted:
            return {"op": "SGLang update", "failed": f"{side}: other weights arrived"}
    for _ in range(rounds):
        ours("plan")
        ours("bucket")
        theirs()
    times = {side: measure.Timing(values) for side, values in taken.items()}
    net = {
        mode: [a - b for a, b in zip(taken[mode], taken[f"{mode}-floor"], strict=True)]
        for mode in ("plan", "bucket")
    }
    return {
        "op": "SGLang update",
        "shape": [len(tensors)],
        "dtype": "bfloat16",
        "bytes": sum(t.nbytes for t in tensors.values()),
        "rounds": rounds,
        "times": {side: timing.as_dict() for side, timing in times.items()},
        "stages": {
            side: {name: round(measure.Timing(v).median, 3) for name, v in parts.items()}
            for side, parts in stages.items()
            if parts
        },
        "plan_net_over_bucket_net": round(
            measure.Timing(net["plan"]).over(measure.Timing(net["bucket"])), 3
        ),
        "sglang_over_plan": round(times["sglang"].over(times["plan"]), 2),
        "sglang_over_bucket": round(times["sglang"].over(times["bucket"]), 2),
    }


def small_tensors(url: str, rounds: int) -> dict:
    """The copy inside the engine: SGLang's load_weights against its replay, as the engine says."""
    engine = Engine(url)
    names = list(engine.tensors)
    loaded, replayed = [], []
    with engine.publisher("plan") as publisher:
        for _ in range(3):
            publisher.update(engine.tensors, version=engine.version())
        for turn in range(rounds):
            # Without one tensor it is another manifest: recorded, and loaded by load_weights.
            some = {n: engine.tensors[n] for n in names if n != names[-1 - turn]}
            report = publisher.update(some, version=engine.version(), partial=True)
            assert report.planned == 0
            loaded.append(report.seconds["copy"] * 1e3)
            report = publisher.update(engine.tensors, version=engine.version())
            assert report.planned == report.tensors
            replayed.append(report.seconds["copy"] * 1e3)
    sides = {"load_weights": measure.Timing(loaded), "replay": measure.Timing(replayed)}
    return {
        "op": "SGLang load_weights",
        "shape": [len(names)],
        "dtype": "bfloat16",
        "bytes": sum(t.nbytes for t in engine.tensors.values()),
        "rounds": rounds,
        "times": {name: timing.as_dict() for name, timing in sides.items()},
        "load_weights_over_replay": round(sides["load_weights"].over(sides["replay"]), 1),
    }


class Experts(nn.Module):
    """A mixture of experts as SGLang holds it."""

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


def replay(rounds: int) -> dict:
    """The engine's copy of one bucket against one memcpy of the same bytes, with equal threads."""
    model = Experts(8, 128, 256, 128)
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
    sides = measure.interleaved(
        {
            "memcpy": lambda: target.copy_(source),
            "off": lambda: engine.apply(segment, 0, (), threads),
            "copy": lambda: engine.apply(segment, 0, sums, threads),
        },
        rounds=rounds,
    )
    if not all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items()):
        return {"op": "replay", "failed": "other bytes"}
    return {
        "op": "replay",
        "shape": [len(sent)],
        "dtype": "bfloat16",
        "bytes": segment.nbytes,
        "threads": threads,
        "rounds": rounds,
        "times": {name: timing.as_dict() for name, timing in sides.items()},
        "off_over_memcpy": round(sides["off"].over(sides["memcpy"]), 3),
        "copy_over_memcpy": round(sides["copy"].over(sides["memcpy"]), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("large", nargs="?", help="URL; without one, only the engine's copy")
    parser.add_argument("small", nargs="?", help="URL of a server of small tensors")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", metavar="FOLDER", help="also write sglang-cpu.json there")
    args = parser.parse_args()
    facts = measure.conditions("cpu")
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)

    add(replay(3 * args.rounds))
    if args.large:
        facts["sglang"] = Server(args.large, None, 30.0).info().release
        add(updates(args.large, args.rounds))
    if args.small:
        add(small_tensors(args.small, args.rounds))
    result = {"conditions": facts, "rows": rows}
    print(table.markdown(result))
    if args.write:
        file = Path(args.write) / "sglang-cpu.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {file}")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
