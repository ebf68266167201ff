"""dapo_loss in place, forward + backward: does time grow with the work, and only with it?

    lengths       T = 64 … 4096 at one V      vocabularies  V = 1 … 262144 at one T
    new lengths   20 lengths, each called for the first time and again; graphs that torch.compile
                  made for all of them
A point's time over the line through 0 and the largest point is `over_linear`: 1 on the line.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

import pyrlk
from pyrlk import reference

from .measure import interleaved
from .policy_loss import Graph

SHAPE, QUICK = (4096, 32000, 256), (256, 4096, 16)  # the longest T, its V, T where V grows
NEW_LENGTHS = range(256, 116, -7)  # twenty


class Shape:
    """Rows of one shape in memory that all shapes share."""

    def __init__(self, memory: torch.Tensor, rows: int, vocab: int):
        g = torch.Generator().manual_seed(rows + vocab)
        self.logits = memory[: rows * vocab].view(rows, vocab)
        self.tokens = torch.randint(vocab, (rows,), generator=g).to(memory.device)
        self.advantages = torch.randn(rows, generator=g).to(memory.device)
        self.old = pyrlk.token_logprobs(self.logits, self.tokens) + 0.1
        self.handle = torch.zeros((), requires_grad=True)

    def step(self) -> None:
        logits = Graph.apply(self.handle, self.logits)
        pyrlk.dapo_loss(logits, self.tokens, self.old, self.advantages, inplace=True).backward()

    def restore(self) -> None:
        self.logits.normal_(std=3)


def memory(elements: int, device: str) -> torch.Tensor:
    return torch.empty(elements, device=device).normal_(std=3)


def gate(logits: torch.Tensor) -> float:
    """Error of the loss against float64 on a few rows."""
    rows = logits[:8]
    tokens, advantages = torch.arange(len(rows)) % logits.shape[1], torch.ones(len(rows))
    tokens, advantages = tokens.to(logits.device), advantages.to(logits.device)
    ours = pyrlk.reinforce_loss(rows, tokens, advantages)
    truth = reference.policy_loss(
        rows.cpu().double(), tokens.cpu(), None, advantages.cpu().double(),
        objective=pyrlk.REINFORCE(),
    )  # fmt: skip
    return abs(ours.item() - truth.item()) / max(1.0, abs(truth.item()))


def sweep(name: str, shapes: list[tuple[int, int]], device: str, rounds: int) -> dict:
    """Times of every shape, interleaved."""
    pool = memory(max(r * v for r, v in shapes), device)
    cases = {f"{r}×{v}": Shape(pool, r, v) for r, v in shapes}
    largest = cases[f"{shapes[-1][0]}×{shapes[-1][1]}"]
    row: dict = {"op": name, "shape": list(shapes[-1]), "dtype": "float32"}
    row["loss_error"] = gate(largest.logits)
    if row["loss_error"] > 1e-6:
        return row | {"failed": "correctness gate: no times are reported"}
    times = interleaved(
        {k: c.step for k, c in cases.items()},
        before={k: c.restore for k, c in cases.items()},
        rounds=rounds,
    )
    most = shapes[-1][0] * shapes[-1][1]
    end = times[f"{shapes[-1][0]}×{shapes[-1][1]}"]
    points = []
    for r, v in shapes:
        t = times[f"{r}×{v}"]
        points.append({"shape": [r, v], **t.as_dict(), "over_linear": t.over(end) * most / (r * v)})
    return row | {"points": points}


def new_lengths(vocab: int, lengths: range, device: str) -> dict:
    """First call of a length against the calls after it; compiled graphs for all lengths."""
    pool = memory(lengths[0] * vocab, device)
    cases = [Shape(pool, r, vocab) for r in lengths]
    warm = Shape(pool, lengths.stop, vocab)
    for _ in range(3):
        warm.step()
    first, again = [], []
    for case in cases:
        first.append(_seconds(case.step, device))
        again.append(statistics.median(_seconds(case.step, device) for _ in range(3)))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(pyrlk.dapo_loss, fullgraph=True, dynamic=True)
    for case in cases:
        compiled(case.logits, case.tokens, case.old, case.advantages)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {
        "op": f"dapo_loss, {len(lengths)} new lengths",
        "shape": [lengths[0], vocab],
        "dtype": "float32",
        "loss_error": gate(cases[0].logits.normal_()),
        "first_ms": 1e3 * statistics.median(first),
        "slowest_first_ms": 1e3 * max(first),
        "first_over_again": statistics.median(a / b for a, b in zip(first, again, strict=True)),
        "compiled_graphs": graphs,
    }


def _seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(device: str, quick: bool) -> Iterator[dict]:
    """Lengths, vocabularies, new lengths."""
    longest, vocab, few = QUICK if quick else SHAPE
    lengths = [64 * 2**i for i in range(20) if 64 * 2**i <= longest]
    vocabularies = [8**i for i in range(20) if 8**i <= (vocab if quick else 262144)]
    rounds = 3 if quick else 9
    yield sweep("dapo_loss in place, T grows", [(t, vocab) for t in lengths], device, rounds)
    yield sweep("dapo_loss in place, V grows", [(few, v) for v in vocabularies], device, rounds)
    yield new_lengths(vocab, NEW_LENGTHS, device)
