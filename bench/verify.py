"""verify_draft on [B, 4, V] float32: three tokens a draft, drawn from logits near the target's.

Limit, measured in the same rounds: one copy of the target's logits into warm memory; the draft's
are read besides. Beside it the usual torch verifier: two softmaxes, the test, the residual
max(p − q, 0) of every row and a multinomial of it. No filters: torch would have to sort for them.
On a GPU `graph` is the same call replayed by a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import pyrlk

from .measure import captured, interleaved

VOCAB, QUICK = 151936, 32000
DEPTH = 3
ROWS = {"cpu": (16,), "cuda": (1, 128)}


def _torch_verifier(target: torch.Tensor, tokens: torch.Tensor, draft: torch.Tensor):
    p, q = target.softmax(-1), draft.softmax(-1)
    at = tokens[..., None]
    ratio = (p[:, :-1].gather(-1, at) / q.gather(-1, at))[..., 0]
    accepted = (torch.rand_like(ratio) < ratio).cumprod(-1).sum(-1)
    residual = (p[:, :-1] - q).clamp(min=0)
    left = torch.cat([residual, p[:, -1:]], 1)
    last = torch.multinomial(left[torch.arange(len(p), device=p.device), accepted], 1)
    out = torch.cat([tokens, tokens[:, :1]], 1).scatter(1, accepted[:, None], last)
    return out, target.log_softmax(-1).gather(-1, out[..., None])[..., 0]


def run(batch: int, vocab: int, device: str, *, rounds: int) -> dict:
    """One row of the table."""
    torch.manual_seed(0)
    target = 3 * torch.randn(batch, DEPTH + 1, vocab, device=device)
    draft = target[:, :-1] + 0.3 * torch.randn(batch, DEPTH, vocab, device=device)
    tokens = pyrlk.sample(draft, seed=1).token
    warm = torch.empty_like(target)

    def verify() -> pyrlk.Verified:
        return pyrlk.verify_draft(target, tokens, draft, seed=0)

    out = verify()
    scored = torch.where(out.tokens < 0, -100, out.tokens)
    truth = target.double().log_softmax(-1).gather(-1, scored.clamp(min=0)[..., None])[..., 0]
    error = (out.logprob - truth)[scored >= 0].abs().max().item()
    row = {
        "op": f"verify_draft, {DEPTH} tokens",
        "shape": [batch, DEPTH + 1, vocab],
        "dtype": "float32",
        "accepted": out.accepted.float().mean().item(),
        "logprob_error": error,
    }
    if error > 1e-5 or not torch.equal(out.logprob, pyrlk.token_logprobs(target, scored)):
        return row | {"failed": "correctness gate: no times are reported"}
    sides: dict[str, Callable[[], object]] = {
        "copy": lambda: warm.copy_(target),
        "verify": verify,
        "torch": lambda: _torch_verifier(target, tokens, draft),
    }
    if device == "cuda":
        sides["graph"] = captured(verify)
    times = interleaved(sides, rounds=rounds)
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "verify_over_copy": times["verify"].over(times["copy"]),
        "torch_over_verify": times["torch"].over(times["verify"]),
    }


def main(device: str, quick: bool) -> Iterator[dict]:
    """B = 16 on a CPU, 1 and 128 on a GPU."""
    vocab, rounds = QUICK if quick else VOCAB, 5 if quick else 9
    for batch in ROWS[device]:
        yield run(batch, vocab, device, rounds=rounds)
