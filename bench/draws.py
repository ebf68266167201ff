"""Do draws follow their distribution? Pearson's χ² of many draws against float64 probabilities.

    z = (Σ (seen − expected)² / expected − f) / √(2f)      cells pooled until each expects 10 draws

A token outside the kept set of the reference makes z infinite. 12 distributions of 64 tokens × 4
filters; a draw is one row of the batch, with its own position. `python -m pyrlk.bench.draws`
writes the full run: 5 M draws a filter, then illegal tokens among 10⁸ draws.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import pyrlk
from pyrlk import reference

from .measure import conditions

VOCAB = 64
FILTERS: dict[str, dict] = {
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.9},
    "both": {"top_k": 30, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
}


def _distributions() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    normal, ids = torch.randn(4, VOCAB, generator=g), torch.arange(VOCAB).float()
    masked = torch.where(torch.rand(VOCAB, generator=g) > 0.5, normal[0], -torch.inf)
    return {
        "uniform": torch.zeros(VOCAB),
        "normal": normal[1],
        "wide": 3 * normal[2],
        "narrow": 0.1 * normal[3],
        "geometric": -ids / 8,
        "reversed": (ids - VOCAB) / 8,
        "zipf": -(ids + 1).log(),
        "two values": (ids % 3 == 0).float(),
        "quantised": (2 * normal[0]).round() / 2,
        "masked": masked,
        "one against many": torch.where(ids == 41, 3.0, 0.0),
        "two modes": -((ids % 32 - 16) ** 2) / 40,
    }


DISTRIBUTIONS = _distributions()


def probabilities(row: Tensor, **settings) -> Tensor:
    """float64 [V]: softmax over the kept set of the reference."""
    keep = reference.kept_mask(row[None], **settings)[0]
    z = row.double() / settings.get("temperature", 1.0)
    return torch.where(keep, z, -math.inf).softmax(0)


def count(row: Tensor, draws: int, *, first: int = 0, **settings) -> Tensor:
    """int64 [V]: tokens of `draws` draws from one row, at positions from `first` on."""
    counts, batch = torch.zeros(row.numel(), dtype=torch.int64), 1 << 16
    for begin in range(first, first + draws, batch):
        size = min(batch, first + draws - begin)
        token = pyrlk.sample(
            row.expand(size, -1),
            seed=torch.full((size,), 11),
            position=torch.arange(begin, begin + size),
            **settings,
        ).token
        counts += torch.bincount(token, minlength=row.numel())
    return counts


def chi_square(counts: Tensor, probability: Tensor) -> tuple[float, int]:
    """(Pearson's statistic, degrees of freedom); infinite where an impossible token was seen."""
    order = probability.argsort(descending=True)
    expected, seen = probability[order] * int(counts.sum()), counts[order].double()
    if seen[expected == 0].sum() > 0:
        return math.inf, 1
    rest = expected < 10  # the tail is one cell, with as many tokens before it as it needs
    while rest.any() and not rest.all() and expected[rest].sum() < 10:
        rest[int((~rest).sum()) - 1] = True
    cells = torch.where(rest, expected.numel(), torch.arange(expected.numel()))
    e = torch.zeros(expected.numel() + 1, dtype=torch.float64).index_add_(0, cells, expected)
    o = torch.zeros_like(e).index_add_(0, cells, seen)
    used = e > 0
    return float(((o - e)[used] ** 2 / e[used]).sum()), max(int(used.sum()) - 1, 1)


def deviate(statistic: float, freedom: int) -> float:
    """A χ² as a normal deviate."""
    return (statistic - freedom) / math.sqrt(2 * freedom)


def pooled(filter_: str, draws: int, **changes) -> tuple[float, dict[str, float]]:
    """z of one filter over all distributions together, and of each alone.

    `changes` to the settings of the sampler, not of the truth, are faults for it to find.
    """
    total, freedom, alone = 0.0, 0, {}
    for name, row in DISTRIBUTIONS.items():
        settings = FILTERS[filter_]
        counts = count(row, draws // len(DISTRIBUTIONS), **(settings | changes))
        statistic, f = chi_square(counts, probabilities(row, **settings))
        alone[name] = deviate(statistic, f)
        total, freedom = total + statistic, freedom + f
    return deviate(total, freedom), alone


def illegal(draws: int) -> int:
    """Tokens outside the reference's kept set, over all distributions and filters."""
    cases = [(row, s) for row in DISTRIBUTIONS.values() for s in FILTERS.values()]
    found = 0
    for row, settings in cases:
        counts = count(row, -(-draws // len(cases)), first=1 << 40, **settings)
        found += int(counts[probabilities(row, **settings) == 0].sum())
    return found


def main(path: str, draws: int = 5_000_000, legal: int = 100_000_000) -> None:
    """Everything, into one JSON file."""
    result: dict = {"conditions": conditions("cpu"), "draws_a_filter": draws, "z": {}}
    for name in FILTERS:
        begin = time.perf_counter()
        z, alone = pooled(name, draws)
        worst = max(alone, key=lambda n: abs(alone[n]))
        result["z"][name] = {"pooled": round(z, 3), "worst": [worst, round(alone[worst], 3)]}
        print(name, result["z"][name], f"{time.perf_counter() - begin:.0f} s", flush=True)
    begin = time.perf_counter()
    result |= {"draws_checked": legal, "illegal": illegal(legal)}
    print("illegal", result["illegal"], f"{time.perf_counter() - begin:.0f} s", flush=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
