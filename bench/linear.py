"""linear_policy_loss, forward + backward, and linear_token_logprobs, forward alone.

Limit, measured in the same rounds: the three matrix products (or the first alone) at the same
chunk, in warm buffers, dweight summed in float32. Beside it the unfused way: all logits, then the
loss or the log-probs, autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import pyrlk
from pyrlk import _head, reference

from .measure import interleaved, peak_bytes
from .peers import cce_linear, cce_scores, quack_linear, ratios, usable

GATE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
ERROR_ROWS = 32
SHAPES = {"cpu": (512, 1024, 32000), "cuda": (8192, 4096, 151936)}  # T, H, V
QUICK = 64, 256, 8000


class Case:
    """One shape and dtype: inputs and the sides."""

    def __init__(self, rows: int, width: int, vocab: int, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.rows, self.vocab = rows, vocab
        self.hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
        weight = torch.randn(vocab, width, device=device) * (2 / width**0.5)
        self.weight = weight.to(dtype).requires_grad_()
        self.tokens = torch.randint(vocab, (rows,), device=device)
        self.advantages = torch.randn(rows, device=device)
        with torch.no_grad():
            own = pyrlk.linear_token_logprobs(self.hidden, self.weight, self.tokens)
        self.old = own + 0.05 * torch.randn(rows, device=device)
        size = dtype.itemsize * vocab
        self.chunk = _head.chunk_rows(0, rows, size, device == "cuda")
        self.logits = torch.empty(self.chunk, vocab, dtype=dtype, device=device)
        self.dhidden = torch.empty_like(self.hidden)
        total = torch.float32
        self.dweight = torch.zeros(vocab, width, dtype=total, device=device)
        mixed = device == "cpu" and dtype != total
        self.wide = torch.empty(self.chunk, vocab, device=device) if mixed else None

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def ours(self) -> None:
        self.clear()
        loss = pyrlk.linear_policy_loss(
            self.hidden, self.weight, self.tokens, self.old, self.advantages
        )
        loss.backward()

    @torch.no_grad()
    def products(self) -> None:
        for start in range(0, self.rows, self.chunk):
            x = self.hidden[start : start + self.chunk]
            z = self.logits[: x.shape[0]]
            torch.mm(x, self.weight.t(), out=z)
            torch.mm(z, self.weight, out=self.dhidden[start : start + self.chunk])
            if self.wide is not None:
                z, x = self.wide[: x.shape[0]].copy_(z), x.float()
            _head.accumulate(self.dweight, z.t(), x, first=start == 0)

    @torch.no_grad()
    def product(self) -> None:
        for start in range(0, self.rows, self.chunk):
            x = self.hidden[start : start + self.chunk]
            torch.mm(x, self.weight.t(), out=self.logits[: x.shape[0]])

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        return pyrlk.linear_token_logprobs(self.hidden, self.weight, self.tokens)

    @torch.no_grad()
    def unfused_scores(self) -> torch.Tensor:
        return pyrlk.token_logprobs(self.hidden @ self.weight.t(), self.tokens)

    def score_error(self) -> float:
        """Relative error of the log-probs in norm against float64, on some rows."""
        rows = slice(0, min(ERROR_ROWS, self.rows))
        hidden, weight = (x.detach().cpu().double() for x in (self.hidden[rows], self.weight))
        truth = reference.linear_token_logprobs(hidden, weight, self.tokens[rows].cpu())
        return ((self.scores()[rows].cpu() - truth).norm() / truth.norm()).item()

    def unfused(self) -> None:
        self.clear()
        logits = self.hidden @ self.weight.t()
        pyrlk.dapo_loss(logits, self.tokens, self.old, self.advantages).backward()

    def error(self) -> float:
        """Relative error of both gradients in norm against float64, on some rows."""
        rows = slice(0, min(ERROR_ROWS, self.rows))
        tokens, old, advantages = self.tokens[rows], self.old[rows], self.advantages[rows]
        ours = [self.hidden[rows].detach(), self.weight.detach()]
        exact = [x.cpu().double().requires_grad_() for x in ours]
        ours = [x.requires_grad_() for x in ours]
        loss = pyrlk.linear_policy_loss(ours[0], ours[1], tokens, old, advantages)
        got = torch.autograd.grad(loss, ours)
        truth = reference.linear_policy_loss(
            exact[0], exact[1], tokens.cpu(), old.cpu().double(), advantages.cpu().double()
        )
        want = torch.autograd.grad(truth, exact)
        pairs = zip(got, want, strict=True)
        return max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs)


def _on_gpu(case: Case, candidates: dict) -> dict:
    """Their kernels are a GPU's; what CCE does on a CPU is torch."""
    return usable(candidates) if case.hidden.is_cuda else {}


def learn(case: Case, *, rounds: int) -> dict:
    """The row of the loss."""
    rows, vocab, dtype = case.rows, case.vocab, case.hidden.dtype
    width = case.hidden.shape[1]
    error = case.error()
    row: dict = {
        "op": f"linear_policy_loss, H={width}",
        "shape": [rows, vocab],
        "dtype": str(dtype).removeprefix("torch."),
        "gradient_error": error,
    }
    if error > GATE[dtype]:
        return row | {"failed": "correctness gate: no times are reported"}
    sides: dict[str, Callable[[], object]] = {
        "products": case.products,
        "linear": case.ours,
        "unfused": case.unfused,
    }
    head = case.hidden, case.weight, case.tokens
    others = _on_gpu(
        case,
        {
            "QuACK": lambda: quack_linear(*head),
            "CCE": lambda: cce_linear(*head, case.old, case.advantages),
            "CCE unfiltered": lambda: cce_linear(*head, case.old, case.advantages, filtered=False),
        },
    )
    times = interleaved(sides | others, rounds=rounds)
    row |= {
        "times": {side: t.as_dict() for side, t in times.items()},
        "chunk": case.chunk,
        "linear_over_products": times["linear"].over(times["products"]),
        "unfused_over_linear": times["unfused"].over(times["linear"]),
        "peers": ratios(times, others, "linear"),
        "tflop_per_s": 6 * rows * width * vocab / times["linear"].median / 1e9,
    }
    for side in ("linear", "unfused"):
        case.clear()
        row[f"{side}_peak_bytes"] = peak_bytes(sides[side])
    return row


def score(case: Case, *, rounds: int) -> dict:
    """The row of the log-probs."""
    dtype = case.hidden.dtype
    row: dict = {
        "op": f"linear_token_logprobs, H={case.hidden.shape[1]}",
        "shape": [case.rows, case.vocab],
        "dtype": str(dtype).removeprefix("torch."),
        "score_error": case.score_error(),
    }
    if not row["score_error"] <= GATE[dtype]:
        return row | {"failed": "correctness gate: no times are reported"}
    peer = {"CCE": lambda: cce_scores(case.hidden, case.weight, case.tokens)}
    others = _on_gpu(case, peer)
    times = interleaved(
        {"product": case.product, "scores": case.scores, "unfused": case.unfused_scores} | others,
        rounds=rounds,
    )
    return row | {
        "times": {side: t.as_dict() for side, t in times.items()},
        "chunk": case.chunk,
        "scores_over_product": times["scores"].over(times["product"]),
        "unfused_over_scores": times["unfused"].over(times["scores"]),
        "peers": ratios(times, others, "scores"),
    }


def main(device: str, quick: bool) -> Iterator[dict]:
    """A small head on CPU, Qwen3's on a GPU."""
    shape = QUICK if quick else SHAPES[device]
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        case = Case(*shape, dtype, device)
        yield learn(case, rounds=3 if quick else 5)
        yield score(case, rounds=3 if quick else 5)
