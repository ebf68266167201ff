"""sample with log-probs and support on [B, V]: top-k 50 + top-p 0.95, and flat rows.

float32 on a CPU, bfloat16 on a GPU, where `graph` is the same call replayed by a CUDA graph.
Limit, measured in the same rounds: one copy of the logits into warm memory. Beside it the usual
torch sampler: sort, softmax, cumulative sum, mask, multinomial, log-softmax. Flat rows (a spread of
0.001, top-p 0.95 alone) are the worst case: no bound leaves out a token, and 95 % of V are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import pyrlk
from pyrlk import reference

from .measure import captured, interleaved
from .peers import flashinfer_sampler, ratios, usable

VOCAB, QUICK = 151936, 32000
ROWS = {"cpu": (1, 64), "cuda": (1, 64, 512)}
# Spread of the logits and filters by name.
CASES: dict[str, tuple[float, dict]] = {
    "sample top-k 50 + top-p 0.95": (3.0, {"top_k": 50, "top_p": 0.95}),
    "sample top-p 0.95, flat rows": (1e-3, {"top_p": 0.95}),
}


def _sorting_sampler(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0):
    ranked, ids = logits.sort(dim=-1, descending=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    probs = ranked.softmax(-1)
    ranked = ranked.masked_fill(probs.cumsum(-1) - probs > top_p, -torch.inf)
    logp = ranked.log_softmax(-1)
    pick = torch.multinomial(logp.exp(), 1)
    return ids.gather(1, pick)[:, 0], logp.gather(1, pick)[:, 0]


def run(op: str, rows: int, vocab: int, device: str, *, rounds: int) -> dict:
    """One row of the table."""
    scale, filters = CASES[op]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logits = (torch.randn(rows, vocab, device=device) * scale).to(dtype)
    warm = torch.empty_like(logits)

    def sample() -> pyrlk.Sample:
        return pyrlk.sample(logits, seed=0, return_support=True, **filters)

    draw = sample()
    assert draw.support is not None
    some = slice(0, min(rows, 8))
    truth = reference.sample(logits[some], seed=0, **filters)
    wrong = (draw.support.to_mask(vocab)[some].cpu() != truth.mask).sum(-1)
    same = (wrong == 0) & (draw.token[some].cpu() == truth.token)
    errors = (draw.logprob[some].cpu() - truth.logprob).abs()
    error = errors.masked_fill(~same, 0).max().item()
    # A float32 mass moves the edge of a set by a token once in a while; integers (CPU) never do.
    kept_equal = wrong.max().item() <= (device == "cuda") and bool(2 * same.sum() > len(same))
    row = {
        "op": op,
        "shape": [rows, vocab],
        "dtype": str(dtype).removeprefix("torch."),
        "kept_sets_equal": kept_equal,
        "logprob_error": error,
    }
    if not kept_equal or error > 1e-6:
        return row | {"failed": "correctness gate: no times are reported"}
    others = usable(
        {
            "FlashInfer": lambda: flashinfer_sampler(
                logits, filters.get("top_k", vocab), filters["top_p"]
            )
        }
    )
    sides: dict[str, Callable[[], object]] = {
        "copy": lambda: warm.copy_(logits),
        "sample": sample,
        "sort": lambda: _sorting_sampler(logits, **filters),
    }
    if device == "cuda":
        sides["graph"] = captured(sample)
    times = interleaved(sides | others, rounds=rounds)
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "sample_over_copy": times["sample"].over(times["copy"]),
        "sort_over_sample": times["sort"].over(times["sample"]),
        "peers": ratios(times, others, "sample"),
    }


def main(device: str, quick: bool) -> Iterator[dict]:
    """B = 1 and 64 (and 512 on a GPU), flat rows at 64."""
    vocab, sizes = QUICK if quick else VOCAB, ROWS[device]
    usual, flat = CASES
    rounds = 5 if quick else 9
    for b in sizes:
        yield run(usual, b, vocab, device, rounds=rounds)
    yield run(flat, min(64, sizes[-1]), vocab, device, rounds=rounds)
