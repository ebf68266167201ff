"""Weights into staging memory: 18,867 tensors of Qwen3-30B-A3B's shapes.

Limit, measured in the same rounds: one memcpy of as many bytes. On a CPU every size is an eighth,
and the copy is split evenly over as many threads; on a GPU it goes bucket by bucket, as packing
does. And on a CPU the whole of an update, between two processes, of 3,000 small tensors, where the
bytes cost nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pyrlk import weights
from pyrlk.weights import layout as layouts
from pyrlk.weights import memory

from .measure import Timing, interleaved

LAYERS, EXPERTS, SCALE = 48, 128, 8


def qwen3_moe_shapes(layers: int, scale: int) -> list[tuple[int, ...]]:
    """Of every tensor of Qwen3-30B-A3B (hidden 2048, experts of 768), divided by `scale`."""
    hidden, inner, vocab = 2048 // scale, 768 // scale, 151936 // scale
    query, key, head = 4096 // scale, 512 // scale, 128 // scale
    layer: list[tuple[int, ...]] = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    layer += [(head,), (head,), (hidden,), (hidden,), (EXPERTS, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)] * EXPERTS
    return [(vocab, hidden), *layer * layers, (hidden,), (vocab, hidden)]


def pack(layers: int, *, rounds: int) -> dict:
    """One row: pack with and without its sums against one memcpy."""
    tensors = [
        torch.empty(shape, dtype=torch.bfloat16) for shape in qwen3_moe_shapes(layers, SCALE)
    ]
    g = torch.Generator().manual_seed(0)
    for tensor in tensors:
        tensor.view(torch.int16).random_(generator=g)
    placed, end = [], 0
    for tensor in tensors:
        placed.append((tensor, end))
        end = (end + tensor.nbytes + 255) // 256 * 256
    segment = memory.Host(end)
    copies = memory.Copies(placed)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    threads = torch.get_num_threads()
    sums = segment.pack(copies, checksum=True, threads=threads)
    flat = [(t.view(-1).view(torch.uint8), at) for t, at in placed]
    exact = all(torch.equal(segment.flat[at : at + t.numel()], t) for t, at in flat)
    exact &= sums == [memory._sum_of(t).item() % 2**64 for t, _ in flat]
    row = {"op": "pack", "shape": [len(tensors)], "dtype": "bfloat16", "bit_exact": exact}
    if not exact:
        return row | {"failed": "correctness gate: no times are reported"}
    source = torch.cat([t.view(-1) for t in tensors]).view(torch.uint8)
    with ThreadPoolExecutor(threads) as pool:
        times = interleaved(
            {
                "memcpy": lambda: _memcpy(pool, threads, segment.flat, source),
                "pack": lambda: segment.pack(copies, checksum=True, threads=threads),
                "pack_no_sum": lambda: segment.pack(copies, checksum=False, threads=threads),
            },
            rounds=rounds,
        )
    return row | _against_memcpy(times, nbytes) | {"threads": threads}


def pack_on_gpu(layers: int, scale: int, bucket_bytes: int, *, rounds: int) -> dict:
    """One row: all tensors, bucket after bucket, into two slots in turn."""
    shapes = qwen3_moe_shapes(layers, scale)
    source = torch.empty(sum(map(math.prod, shapes)), dtype=torch.bfloat16, device="cuda")
    source.view(torch.int16).random_()
    ends = list(itertools.accumulate(map(math.prod, shapes), initial=0))
    tensors = [
        source[a:b].view(shape)
        for shape, (a, b) in zip(shapes, itertools.pairwise(ends), strict=True)
    ]
    specs = [layouts.Spec(str(i), s, torch.bfloat16) for i, s in enumerate(shapes)]
    layout = layouts.plan(specs, bucket_bytes)
    slots = [_slot(layout.slot_bytes) for _ in range(2)]
    buckets = [
        (slots[i % 2], memory.Copies([(tensors[j], layout.entries[j].offset) for j in pieces]))
        for i, pieces in enumerate(layout.pieces)
    ]
    flat = source.view(torch.uint8)

    def pack(checksum: bool) -> None:
        for slot, copies in buckets:
            slot.pack(copies, checksum=checksum, threads=1)

    def memcpy() -> None:
        at = 0
        for (slot, _), nbytes in zip(buckets, layout.buckets, strict=True):
            nbytes = min(nbytes, flat.numel() - at)
            slot.flat[:nbytes].copy_(flat[at : at + nbytes])
            at += nbytes

    exact = True
    for slot, copies in buckets:
        sums = slot.pack(copies, checksum=True, threads=1)
        for tensor, at, total in zip(copies.tensors, copies.offsets, sums, strict=True):
            data = tensor.reshape(-1).view(torch.uint8)
            exact &= torch.equal(slot.flat[at : at + data.numel()], data)
            exact &= total == memory._sum_of(data).item() % 2**64
    row = {"op": "pack", "shape": [len(tensors)], "dtype": "bfloat16", "bit_exact": exact}
    if not exact:
        return row | {"failed": "correctness gate: no times are reported"}
    times = interleaved(
        {"memcpy": memcpy, "pack": lambda: pack(True), "pack_no_sum": lambda: pack(False)},
        rounds=rounds,
    )
    return row | _against_memcpy(times, flat.numel()) | {"buckets": len(buckets)}


def _slot(nbytes: int) -> memory.Segment:
    """Memory of the GPU as a staging slot; no other process opens it."""
    handle = memory.Handle(memory.Kind.CUDA, nbytes, bytes(16))
    flat = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return memory.Segment(handle, flat, lambda: None)


def _against_memcpy(times: dict[str, Timing], nbytes: int) -> dict:
    return {
        "bytes": nbytes,
        "times": {side: t.as_dict() for side, t in times.items()},
        "memcpy_over_pack": times["memcpy"].over(times["pack"]),
        "memcpy_over_pack_no_sum": times["memcpy"].over(times["pack_no_sum"]),
        "gb_per_s": 2 * nbytes / times["pack"].median / 1e6,
    }


def _memcpy(pool: ThreadPoolExecutor, threads: int, out: Tensor, source: Tensor) -> None:
    """ctypes.memmove is the C library's, and runs without the interpreter's lock."""
    cuts = [source.numel() * i // threads for i in range(threads + 1)]
    jobs = [
        pool.submit(ctypes.memmove, out.data_ptr() + begin, source.data_ptr() + begin, end - begin)
        for begin, end in itertools.pairwise(cuts)
    ]
    for job in jobs:
        job.result()


class Small(nn.Module):
    """`count` weights of a few hundred bytes, thirty a layer."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterList([torch.randn(16, 16 + i % 3) for i in range(30)])
            for _ in range(count // 30)
        )


def _engine(path: str, count: int, last: int) -> None:
    torch.set_num_threads(1)
    with weights.Receiver(Small(count), path) as receiver:
        receiver.serve(until=lambda: receiver.version >= last)
        receiver.poll(1.0)  # the publisher closes


def small_tensors(count: int, *, rounds: int) -> dict:
    """One row: update() of a module and of a mapping, as the publisher sees it."""
    warmup = 3
    last = 2 * (rounds + warmup) - 1
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.sock")
        spawn = multiprocessing.get_context("spawn")
        engine = spawn.Process(target=_engine, args=(path, count, last))
        engine.start()
        torch.set_num_threads(1)
        trainer = Small(count)
        state = dict(trainer.named_parameters())
        reports: list[weights.UpdateReport] = []
        with weights.Publisher(weights.Local(path)) as publisher:

            def update(source: weights.source.NamedTensors) -> None:
                reports.append(publisher.update(source, version=len(reports)))

            times = interleaved(
                {"module": lambda: update(trainer), "mapping": lambda: update(state)},
                rounds=rounds,
                warmup=warmup,
            )
        engine.join()
    torch.set_num_threads(threads)
    stages = {
        stage: Timing([r.seconds[stage] * 1e3 for r in reports[2 * warmup :]]).as_dict()
        for stage in ("plan", "check", "pack", "verify", "copy")
    }
    return {
        "op": "update of small tensors",
        "shape": [count],
        "dtype": "float32",
        "bytes": reports[-1].bytes,
        "times": {side: t.as_dict() for side, t in times.items()} | stages,
    }


def main(device: str, quick: bool) -> list[dict]:
    """On a GPU as many layers as fit beside what is there."""
    rounds = 5 if quick else 15
    if device == "cuda":
        layers, scale, bucket_bytes = (1, 64, 1 << 16) if quick else (LAYERS, 1, 512 << 20)
        room = torch.cuda.mem_get_info()[0] - 4 * bucket_bytes
        while layers > 1 and 2 * sum(map(math.prod, qwen3_moe_shapes(layers, scale))) > room:
            layers -= 1
        return [pack_on_gpu(layers, scale, bucket_bytes, rounds=rounds)]
    return [
        pack(2 if quick else LAYERS, rounds=rounds),
        small_tensors(300 if quick else 3000, rounds=2 * rounds),
    ]
