"""token_logprobs with entropy, forward alone, on [T, V]: one read of the logits.

Limit: half of a copy of the logits into warm memory, measured in the same rounds. Beside it what
frameworks write (log-softmax in float32, gather, entropy), eager and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyrlk
from pyrlk import reference

from .measure import interleaved
from .peers import ratios, trl_scores, usable
from .policy_loss import DTYPES, QUICK, SHAPES

ERROR_ROWS = 16


def _eager(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def run(rows: int, vocab: int, dtype: torch.dtype, device: str, *, rounds: int) -> dict:
    """One row of the table."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, vocab, device=device)).to(dtype)
    tokens = torch.randint(vocab, (rows,), device=device)
    warm = torch.empty_like(logits)
    some = slice(0, min(rows, ERROR_ROWS))
    ours = pyrlk.token_logprobs(logits[some], tokens[some], return_entropy=True)
    truth = reference.token_logprobs(
        logits[some].cpu().double(), tokens[some].cpu(), return_entropy=True
    )
    error = max((a.cpu() - b).abs().max().item() for a, b in zip(ours, truth, strict=True))
    row = {
        "op": "token_logprobs + entropy",
        "shape": [rows, vocab],
        "dtype": str(dtype).removeprefix("torch."),
        "score_error": error,
    }
    if error > 1e-5:
        return row | {"failed": "correctness gate: no times are reported"}
    compiled = torch.compile(_eager)
    others = usable({"TRL": lambda: trl_scores(logits, tokens)})
    times = interleaved(
        {
            "copy": lambda: warm.copy_(logits),
            "score": lambda: pyrlk.token_logprobs(logits, tokens, return_entropy=True),
            "eager": lambda: _eager(logits, tokens),
            "compile": lambda: compiled(logits, tokens),
        }
        | others,
        rounds=rounds,
    )
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "score_over_copy": times["score"].over(times["copy"]),
        "eager_over_score": times["eager"].over(times["score"]),
        "compile_over_score": times["compile"].over(times["score"]),
        "peers": ratios(times, others, "score"),
        "gb_per_s": logits.nbytes / times["score"].median / 1e6,
    }


def main(device: str, quick: bool) -> Iterator[dict]:
    """The shape of the losses, in float32 and bfloat16."""
    shape = QUICK if quick else SHAPES[device]
    for dtype in DTYPES[device]:
        yield run(*shape, dtype, device, rounds=5 if quick else 9)
