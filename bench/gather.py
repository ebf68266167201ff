"""Sharded weights, whole again on four gloo ranks: 3,000 tensors cut along rows or columns.

baseline   what slime does (update_weight/common.py): one all_gather a tensor, all of a bucket
           begun with async_op, then a torch.cat of each
gather     one collective a bucket, parts put together on the way into bucket memory

per_tensor and gather: every rank gets all. Then rank 0 alone does, for an engine that takes as long
for a bucket as its collective does (a thread that sleeps: its work is not this machine's). serial:
stage after stage; overlapped: the next bucket is under way, the last one still with the engine.
Limit: the slowest stage alone.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from pyrlk.weights import gather
from pyrlk.weights import layout as layouts
from pyrlk.weights.source import Work

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

RANKS = 4
Case = tuple[int, int, int, int]  # tensors, rows, columns, bucket_bytes


def _model(count: int, rows: int, columns: int) -> tuple[nn.Module, list[Tensor]]:
    """This rank's shards, and the whole of every hundredth tensor."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    module, wholes = nn.Module(), []
    for i in range(count):
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(i)).bfloat16()
        local = whole.chunk(RANKS, i % 2)[dist.get_rank()].clone()
        sharded = DTensor.from_local(local, mesh, [Shard(i % 2)])
        module.register_parameter(f"w{i}", nn.Parameter(sharded, requires_grad=False))
        if i % 100 == 0:
            wholes.append(whole)
    return module, wholes


def per_tensor(module: nn.Module, bucket_bytes: int) -> list[Tensor]:
    """The baseline; returns every hundredth whole tensor."""
    kept: list[Tensor] = []
    under_way: list[tuple] = []
    nbytes = 0

    def finish() -> None:
        for index, dim, parts, work in under_way:
            work.wait()
            whole = torch.cat(parts, dim)
            if index % 100 == 0:
                kept.append(whole)
        under_way.clear()

    for index, parameter in enumerate(module.parameters()):
        local = cast("DTensor", parameter).to_local().contiguous()
        parts = [torch.empty_like(local) for _ in range(RANKS)]
        work = dist.all_gather(parts, local, async_op=True)
        under_way.append((index, index % 2, parts, work))
        nbytes += RANKS * local.nbytes
        if nbytes >= bucket_bytes:
            finish()
            nbytes = 0
    finish()
    return kept


def in_buckets(gathered: gather.Gathered, bucket_bytes: int) -> list[Tensor]:
    kept = []
    for tensors in gathered.stream(bucket_bytes):
        kept += [t.clone() for name, t in tensors.items() if int(name[1:]) % 100 == 0]
    return kept


def _handed_over(
    gathered: gather.Gathered,
    layout: layouts.Layout,
    slots: list[Tensor],
    seconds: float = 0.0,
    *,
    overlapped: bool = True,
) -> None:
    """Gather every bucket into two slots; an engine behind them takes `seconds` for each.

    A rank without slots only contributes.
    """
    count = len(layout.buckets)
    handed: list[Future] = []
    works: dict[int, Work] = {}
    with ThreadPoolExecutor(1) as engine:
        for bucket in range(count):
            for ahead in range(bucket, min(bucket + 1 + overlapped, count)):
                if ahead not in works:
                    out = slots[ahead % 2] if slots else None
                    works[ahead] = gathered.start(layout, ahead, out)
            if slots and overlapped and bucket >= 2:
                handed[bucket - 2].result()  # its slot is free again
            works[bucket].wait(60)
            if slots:
                handed.append(engine.submit(time.sleep, seconds))
                if not overlapped:
                    handed[-1].result()


def _timed(call: Callable[[], object]) -> float:
    """Milliseconds of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    spent = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item() * 1e3


def _rank(rank: int, folder: str, cases: list[Case], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    rows = []
    for count, height, width, bucket_bytes in cases:
        module, wholes = _model(count, height, width)
        gathered = gather.dtensor(module)
        for got in (per_tensor(module, bucket_bytes), in_buckets(gathered, bucket_bytes)):
            assert all(map(torch.equal, got, wholes))
            assert len(got) == len(wholes)
        layout = layouts.plan(gathered.specs(), bucket_bytes)
        times: dict[str, list[float]] = {
            k: [] for k in ("per_tensor", "gather", "pack", "collective", "assemble", "engine",
                            "serial", "overlapped")
        }  # fmt: skip
        for _ in range(rounds):
            _one_round(module, gathered, layout, bucket_bytes, times)
        if rank == 0:
            rows.append(_row(count, height, width, layout, times))
    dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows))


def _one_round(
    module: nn.Module,
    gathered: gather.Gathered,
    layout: layouts.Layout,
    bucket_bytes: int,
    times: dict[str, list[float]],
) -> None:
    slots = [torch.zeros(layout.slot_bytes, dtype=torch.uint8) for _ in range(2)]
    times["per_tensor"].append(_timed(lambda: per_tensor(module, bucket_bytes)))
    times["gather"].append(_timed(lambda: _handed_over(gathered, layout, slots)))
    mine = slots if gathered.rank == 0 else []
    _timed(lambda: _handed_over(gathered, layout, mine, overlapped=False))
    spent = torch.tensor([gathered.seconds[k] for k in ("pack", "wait", "assemble")])
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    for stage, value in zip(("pack", "collective", "assemble"), spent.tolist(), strict=True):
        times[stage].append(value * 1e3)
    times["engine"].append(spent[1].item() * 1e3)
    pause = spent[1].item() / len(layout.buckets)
    for side in ("serial", "overlapped"):
        overlapped = side == "overlapped"
        spent_on = _timed(
            lambda o=overlapped: _handed_over(gathered, layout, mine, pause, overlapped=o)  # type: ignore[misc]
        )
        times[side].append(spent_on)


def _row(count: int, height: int, width: int, layout: layouts.Layout, times: dict) -> dict:
    middle = {side: statistics.median(values) for side, values in times.items()}
    stages = [times[stage] for stage in ("pack", "collective", "assemble", "engine")]
    slowest = list(map(max, *stages))
    return {
        "op": "gather",
        "shape": [count, height, width],
        "dtype": "bfloat16",
        "bit_exact": True,
        "ranks": RANKS,
        "bytes": layout.nbytes,
        "buckets": len(layout.buckets),
        "collectives": {"per_tensor": count, "gather": len(layout.buckets) + 1},
        "times": {side: {"ms": round(value, 3)} for side, value in middle.items()},
        "per_tensor_over_gather": statistics.median(
            a / b for a, b in zip(times["per_tensor"], times["gather"], strict=True)
        ),
        "overlapped_over_slowest_stage": statistics.median(
            a / b for a, b in zip(times["overlapped"], slowest, strict=True)
        ),
    }


def main(device: str, quick: bool) -> list[dict]:
    """CPU only: the transport is gloo's."""
    if device != "cpu":
        return []
    cases: list[Case] = [(3000, 16, 32, 1 << 18)]
    if not quick:
        cases.append((3000, 256, 256, 16 << 20))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, cases, 3 if quick else 5), RANKS)
        return json.loads((Path(folder) / "rows").read_text())
