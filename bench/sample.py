"""sample with log-probs and support on [B, V] float32: top-k 50 + top-p 0.95, and flat rows.

Limit, measured in the same rounds: one copy of the logits into warm memory. Beside it the usual
torch sampler: sort, softmax, cumulative sum, mask, multinomial, log-softmax. Flat rows (a spread of
0.001, top-p 0.95 alone) are the worst case: no bound leaves out a token, and 95 % of V are kept.
"""

from __future__ import annotations

import torch

import pyrlk
from pyrlk import reference

from .measure import interleaved
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
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(device)
    warm = torch.empty_like(logits)

    def sample() -> pyrlk.Sample:
        return pyrlk.sample(logits, seed=0, return_support=True, **filters)

    draw = sample()
    assert draw.support is not None
    some = slice(0, min(rows, 8))
    truth = reference.sample(logits[some], seed=0, **filters)
    kept_equal = bool((draw.support.to_mask(vocab)[some].cpu() == truth.mask).all())
    error = (draw.logprob[some].cpu() - truth.logprob).abs().max().item()
    row = {
        "op": op,
        "shape": [rows, vocab],
        "dtype": "float32",
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
    times = interleaved(
        {
            "copy": lambda: warm.copy_(logits),
            "sample": sample,
            "sort": lambda: _sorting_sampler(logits, **filters),
        }
        | others,
        rounds=rounds,
        warmup=2,
    )
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "sample_over_copy": times["sample"].over(times["copy"]),
        "sort_over_sample": times["sort"].over(times["sample"]),
        "peers": ratios(times, others, "sample"),
    }


def main(device: str, quick: bool) -> list[dict]:
    """B = 1 and 64 (and 512 on a GPU), flat rows at 64."""
    vocab, sizes = QUICK if quick else VOCAB, ROWS[device]
    usual, flat = CASES
    rounds = 5 if quick else 9
    rows = [run(usual, b, vocab, device, rounds=rounds) for b in sizes]
    return [*rows, run(flat, min(64, sizes[-1]), vocab, device, rounds=rounds)]
