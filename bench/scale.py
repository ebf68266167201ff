"""The weight update on more GPUs than there are here: measured stages, computed totals.

    bucket of b bytes, n ranks, g of them in a node
    inside    (g−1)·α_in  + b·(g−1)/g / β_in          all-gather, what arrives at a rank
    between   (N−1)·α_out + b·(N−1)/N / (g·β_out)     N = n/g nodes, one network port a GPU
    assemble  2·b / copy      load  2·b·needed/t / copy      hand over  h a bucket, p a tensor
    update    Σ of one bucket's stages + (buckets − 1) · the slowest: the others hide behind it

python -m pyrlk.bench.scale --measure bench/results/scale/cpu.json     1, 2 and 4 gloo ranks, here
python -m pyrlk.bench.scale --write docs/scaling.md                    the tables, from that file
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"
RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Link:
    """Of a rank: seconds a step of a collective, bytes a second that arrive."""

    latency: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`ranks` in nodes of at most `per_node`."""

    ranks: int
    per_node: int
    inside: Link
    between: Link
    copy: float  # bytes read and written a second
    hand_over: float  # seconds a bucket, of the host
    per_tensor: float  # seconds a tensor, of the host: names, plan, checks

    @property
    def local(self) -> int:
        return min(self.ranks, self.per_node)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


@dataclasses.dataclass(frozen=True)
class Job:
    """A model in FSDP2 shards on all ranks, for engines of `tensor_parallel` GPUs on the same ones.

    `experts`: the share of the bytes that belongs to experts, of which a rank's engine holds
    1/expert_parallel; only these are gathered there.
    """

    name: str
    nbytes: int
    tensors: int
    bucket: int = 512 << 20
    slots: int = 2
    tensor_parallel: int = 1
    experts: float = 0.0
    expert_parallel: int = 1

    @property
    def arriving(self) -> float:
        """Bytes that a rank gathers."""
        return self.nbytes * (1 - self.experts + self.experts / self.expert_parallel)

    @property
    def buckets(self) -> int:
        return max(1, math.ceil(self.arriving / self.bucket))


@dataclasses.dataclass(frozen=True)
class Update:
    """What one update takes: seconds by stage alone, bytes that a rank takes in, its memory."""

    seconds: dict[str, float]
    once: float
    total: float
    inside: float
    between: float
    own: float
    memory: dict[str, float]

    @property
    def limit(self) -> str:
        """The stage, or the host's work once an update, that the total is closest to."""
        return max({**self.seconds, "host": self.once}.items(), key=lambda pair: pair[1])[0]


def simulate(job: Job, on: Cluster) -> Update:
    """One update, its buckets overlapped."""
    local, nodes, buckets = on.local, on.nodes, job.buckets
    size = job.arriving / buckets
    # A node takes in what the others hold, through all of its ports; its GPUs share it out.
    between = size * (nodes - 1) / nodes / local
    own = size / (nodes * local)
    inside = size - own - between
    one = {
        "between nodes": (nodes - 1) * on.between.latency + between / on.between.rate,
        "inside a node": (local - 1) * on.inside.latency + inside / on.inside.rate,
        "assemble": 2 * size / on.copy,
        "hand over": on.hand_over,
        "load": 2 * size / job.tensor_parallel / on.copy,
    }
    once = job.tensors * on.per_tensor
    total = once + sum(one.values()) + (buckets - 1) * max(one.values())
    memory = {
        "shard": job.nbytes / on.ranks,
        "slots": float(job.slots * min(job.bucket, job.arriving)),
        "engine": job.arriving / job.tensor_parallel,
    }
    seconds = {stage: buckets * value for stage, value in one.items()}
    return Update(seconds, once, total, inside * buckets, between * buckets, own * buckets, memory)


def gpus(count: int, host: dict[str, float], **other: Any) -> Cluster:
    """H200s in nodes of eight. Assumed, not measured here; `host` is measured on a CPU.

    Copy: 4.3 TB/s read and written (docs of the design; a target, not a figure of ours). NVLink 4:
    450 GB/s a direction, 400 Gb/s a port (both published), at 80 % (assumed). Steps: 5 and 15 µs
    (assumed).
    """
    assumed = {
        "inside": Link(5e-6, 0.8 * 450e9), "between": Link(15e-6, 0.8 * 50e9), "copy": 4.3e12,
    }  # fmt: skip
    return Cluster(count, 8, **{**assumed, **host, **other})


def host_costs(cpu: dict[str, Any]) -> dict[str, float]:
    """What a CPU does in any update, from `pyrlk bench`'s row of 3,000 small tensors."""
    (row,) = [r for r in cpu["rows"] if r["op"] == "update of small tensors"]
    ms = {side: t["ms"] for side, t in row["times"].items()}
    stages = ms["plan"] + ms["check"] + ms["pack"] + ms["verify"] + ms["copy"]
    tensors = row["shape"][0]
    return {
        "per_tensor": (ms["plan"] + ms["check"]) / tensors / 1e3,
        "hand_over": max(0.0, ms["module"] - stages) / 1e3,
    }


def here(measured: dict[str, Any], ranks: int) -> Cluster:
    """This machine with `ranks` gloo processes; its memory is the network."""
    point = measured["ranks"][str(ranks)]
    small, large = point["small"], point["large"]
    steps, share = max(1, ranks - 1), (ranks - 1) / ranks
    latency = small["seconds"] / steps
    rate = (
        large["bytes"] * share / max(1e-9, large["seconds"] - small["seconds"]) if share else 1e12
    )
    link = Link(latency, rate)
    return Cluster(ranks, ranks, link, link, measured["copy"], 0.0, 0.0)


def measure() -> dict[str, Any]:
    """All-gathers of one size alone, and of a model in buckets: what the simulator is judged by."""
    import torch
    import torch.multiprocessing

    from . import measure as conditions

    points = {}
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (ranks, folder), ranks)
            points[str(ranks)] = json.loads((Path(folder) / "point").read_text())
    x, y = torch.ones(1 << 26, dtype=torch.uint8), torch.empty(1 << 26, dtype=torch.uint8)
    copy = 2 * x.nbytes / _middle(lambda: y.copy_(x), 15)
    return {"conditions": conditions.conditions("cpu"), "copy": copy, "ranks": points}


SMALL, LARGE, BUCKET, BUCKETS = 1 << 12, 16 << 20, 4 << 20, 12


def _rank(rank: int, ranks: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )

    def gather(nbytes: int, times: int = 1):
        mine = torch.ones(nbytes // ranks, dtype=torch.uint8)
        out = list(torch.empty(ranks, nbytes // ranks, dtype=torch.uint8).unbind(0))

        def run() -> None:
            for _ in range(times):
                dist.all_gather(out, mine)

        return _middle(run, 9, dist.barrier)

    point = {
        name: {"bytes": nbytes, "buckets": times, "seconds": gather(nbytes, times)}
        for name, nbytes, times in (
            ("small", SMALL, 1), ("large", LARGE, 1), ("buckets", BUCKET, BUCKETS),
        )
    }  # fmt: skip
    if rank == 0:
        (Path(folder) / "point").write_text(json.dumps(point))
    dist.destroy_process_group()


def _middle(call, rounds: int, before=lambda: None) -> float:
    times = []
    for _ in range(rounds + 2):
        before()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def local_point(measured: dict[str, Any], ranks: int) -> tuple[float, float]:
    """(computed, measured) seconds of the gathers of a model in buckets, one after the other."""
    point = measured["ranks"][str(ranks)]["buckets"]
    job = Job("local", point["bytes"] * point["buckets"], 0, bucket=point["bytes"])
    return simulate(job, here(measured, ranks)).seconds["inside a node"], point["seconds"]


JOBS = (
    Job("Qwen3-30B-A3B, engines of TP 1", 61_000_000_000, 18_867),
    Job("the same, experts over 8 GPUs", 61_000_000_000, 18_867, experts=0.95, expert_parallel=8),
    Job("a dense 70B, engines of TP 8", 141_000_000_000, 723, tensor_parallel=8),
)


def tables(measured: dict[str, Any], cpu: dict[str, Any]) -> str:
    """Markdown: what was measured, then what is computed."""
    facts, host = measured["conditions"], host_costs(cpu)
    lines = [
        "### Measured",
        "",
        f"{facts['device']}, {facts['date']}, commit `{facts['commit']}`, "
        "`bench/results/scale/cpu.json`: gloo ranks of one thread on one machine.",
        "",
        "| ranks | all-gather of 4 KiB | of 16 MiB | 12 buckets of 4 MiB | computed from these |",
        "|---|---|---|---|---|",
    ]
    for ranks, point in measured["ranks"].items():
        small, large, whole = (point[k]["seconds"] * 1e3 for k in ("small", "large", "buckets"))
        computed = "(a copy)"
        if ranks != "1":
            computed = f"{local_point(measured, int(ranks))[0] * 1e3:.1f} ms"
        lines.append(f"| {ranks} | {small:.2f} ms | {large:.1f} ms | {whole:.1f} ms | {computed} |")
    lines += [
        "",
        "Host work, from `bench/results/cpu.json` (3,000 tensors): "
        f"{host['per_tensor'] * 1e6:.1f} µs a tensor for plan and checks, "
        f"{host['hand_over'] * 1e3:.2f} ms a bucket beyond its stages.",
        "",
        "### Computed",
        "",
        "H200s, eight a node; nothing below was run. Seconds are of one update; stages are what "
        "each would take alone, and overlap.",
        "",
        "| model | GPUs | bytes in: NVLink / network | network | NVLink | assemble | load | host | "
        "update | limit | memory a GPU: shard / slots / engine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job in JOBS:
        for count in (8, 64, 1024):
            u = simulate(job, gpus(count, host))
            s, m = u.seconds, u.memory
            lines.append(
                f"| {job.name} | {count} | {_gb(u.inside)} / {_gb(u.between)} | "
                f"{s['between nodes']:.3f} | {s['inside a node']:.3f} | {s['assemble']:.3f} | "
                f"{s['load']:.3f} | {s['hand over'] + u.once:.3f} | **{u.total:.3f}** | "
                f"{u.limit} | "
                f"{_gb(m['shard'])} / {_gb(m['slots'])} / {_gb(m['engine'])} |"
            )
    return "\n".join(lines)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyrlk.bench.scale", description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure here, and write FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="renew the tables of a page")
    args = parser.parse_args(argv)
    if args.measure:
        args.measure.parent.mkdir(parents=True, exist_ok=True)
        args.measure.write_text(json.dumps(measure(), indent=1) + "\n")
    measured = json.loads((RESULTS / "scale" / "cpu.json").read_text())
    text = tables(measured, json.loads((RESULTS / "cpu.json").read_text()))
    if args.write:
        head, rest = args.write.read_text().split(BEGIN, 1)
        args.write.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
