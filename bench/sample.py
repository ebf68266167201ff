"""sample with top-k 50 and top-p 0.95, log-probs and support, on [B, V] float32 logits.

Limit, measured in the same rounds: one copy of the logits into warm memory. Beside it the usual
torch sampler: sort, softmax, cumulative sum, mask, multinomial, log-softmax.
"""

from __future__ import annotations

import torch

import pyrlk
from pyrlk import reference

from .measure import interleaved

TOP_K, TOP_P = 50, 0.95


def _sorting_sampler(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ranked, ids = logits.sort(dim=-1, descending=True)
    ranked[:, TOP_K:] = -torch.inf
    probs = ranked.softmax(-1)
    ranked = ranked.masked_fill(probs.cumsum(-1) - probs > TOP_P, -torch.inf)
    logp = ranked.log_softmax(-1)
    pick = torch.multinomial(logp.exp(), 1)
    return ids.gather(1, pick)[:, 0], logp.gather(1, pick)[:, 0]


def _draw(logits: torch.Tensor) -> pyrlk.Sample:
    return pyrlk.sample(logits, seed=0, top_k=TOP_K, top_p=TOP_P, return_support=True)


def run(rows: int, vocab: int, device: str, *, rounds: int) -> dict:
    """One row of the table."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=g) * 3).to(device)
    warm = torch.empty_like(logits)
    draw = _draw(logits)
    assert draw.support is not None
    some = slice(0, min(rows, 8))
    truth = reference.sample(logits[some], seed=0, top_k=TOP_K, top_p=TOP_P)
    kept_equal = bool((draw.support.to_mask(vocab)[some].cpu() == truth.mask).all())
    error = (draw.logprob[some].cpu() - truth.logprob).abs().max().item()
    row = {
        "op": "sample top-k 50 + top-p 0.95",
        "shape": [rows, vocab],
        "dtype": "float32",
        "kept_sets_equal": kept_equal,
        "logprob_error": error,
    }
    if not kept_equal or error > 1e-6:
        return row | {"failed": "correctness gate: no times are reported"}
    times = interleaved(
        {
            "copy": lambda: warm.copy_(logits),
            "sample": lambda: _draw(logits),
            "sort": lambda: _sorting_sampler(logits),
        },
        rounds=rounds,
        warmup=2,
    )
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "sample_over_copy": times["sample"].over(times["copy"]),
        "sort_over_sample": times["sort"].over(times["sample"]),
    }


def main(device: str, quick: bool) -> list[dict]:
    """B = 1 and 64 (and 512 on a GPU)."""
    vocab = 32000 if quick else 151936
    sizes = [1, 64] if device == "cpu" else [1, 64, 512]
    return [run(b, vocab, device, rounds=5 if quick else 9) for b in sizes]
