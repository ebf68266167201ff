"""dapo_loss, forward + backward, on [T, V] logits.

Limits, measured in the same rounds:
    copy    the logits into warm memory: 1 read, 1 write
    fresh   allocate a gradient and copy the logits into it: what a drop-in cannot avoid
    inplace / copy and drop-in / fresh are the figures; eager and torch.compile run beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import pyrlk
from pyrlk import reference

from .measure import interleaved, peak_bytes
from .peers import clipped, liger_grpo, quack_dapo, ratios, usable

GATE = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
ERROR_ROWS = 32
SHAPES = {"cpu": (512, 151936), "cuda": (8192, 151936)}
# What the targets are for comes first: a run may be cut off.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}
QUICK = 64, 32000


class Graph(torch.autograd.Function):
    """Logits that belong to a graph, at no cost: the in-place op refuses leaves."""

    @staticmethod
    def forward(ctx, handle, logits):
        return logits.data  # the same memory, and no view

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros(()), None


class Case:
    """One shape and dtype: inputs, the sides, and the error of the result."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: str, extras: bool):
        torch.manual_seed(0)
        self.shape = (rows, vocab)
        self.logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        for i in range(0, rows, 64):
            # Made there: the host takes ten seconds for a gigabyte.
            self.logits[i : i + 64] = torch.randn(min(64, rows - i), vocab, device=device) * 3
        self.tokens = torch.randint(vocab, (rows,), device=device)
        self.advantages = torch.randn(rows, device=device)
        own = pyrlk.token_logprobs(self.logits, self.tokens)
        self.old = own + 0.05 * torch.randn(rows, device=device)
        self.common: dict = {}
        if extras:
            reference_noise = 0.1 * torch.randn(rows, device=device)
            self.common = {
                "entropy_coef": 0.01, "kl_coef": 0.05, "ref_logprobs": own + reference_noise,
            }  # fmt: skip
        self.warm = torch.empty_like(self.logits)
        self.buffer = self.logits.clone()
        self.leaf = self.logits.clone().requires_grad_()
        self.handle = torch.zeros((), requires_grad=True)

    def loss(self, logits: torch.Tensor, **options) -> torch.Tensor:
        return pyrlk.dapo_loss(
            logits, self.tokens, self.old, self.advantages, **self.common, **options
        )

    def copy(self) -> None:
        self.warm.copy_(self.logits)

    def fresh(self) -> torch.Tensor:
        return torch.empty_like(self.logits).copy_(self.logits)

    def of_a_graph(self) -> torch.Tensor:
        return Graph.apply(self.handle, self.buffer)

    def inplace(self) -> None:
        self.loss(self.of_a_graph(), inplace=True).backward()

    def restore(self) -> None:
        self.buffer.copy_(self.logits)

    def drop_in(self) -> None:
        self.loss(self.leaf).backward()
        self.leaf.grad = None  # a side frees its own gradient, as `fresh` does: munmap takes time

    def eager_loss(self, logits: torch.Tensor) -> torch.Tensor:
        return _eager(logits, self.tokens, self.old, self.advantages, **self.common)

    def eager(self, loss: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        (loss or self.eager_loss)(self.leaf).backward()
        self.leaf.grad = None

    def error(self) -> tuple[float, float]:
        """(relative error of the gradient in norm, of the loss) against float64, on some rows."""
        rows = slice(0, min(ERROR_ROWS, self.shape[0]))
        exact = self.logits[rows].cpu().double().requires_grad_()
        cut = {
            k: v[rows].cpu().double() if isinstance(v, torch.Tensor) else v
            for k, v in self.common.items()
        }
        truth = reference.policy_loss(
            exact,
            self.tokens[rows].cpu(),
            self.old[rows].cpu().double(),
            self.advantages[rows].cpu().double(),
            **cut,
        )
        truth.backward()
        ours = self.logits[rows].clone().requires_grad_()
        kwargs: dict = {
            k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in self.common.items()
        }
        loss = pyrlk.dapo_loss(
            ours, self.tokens[rows], self.old[rows], self.advantages[rows], **kwargs
        )
        loss.backward()
        assert ours.grad is not None
        assert exact.grad is not None
        off = (ours.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
        scale = self.advantages[rows].abs().mean().item()
        return off.item(), abs(loss.item() - truth.item()) / scale


def _eager(logits, tokens, old, advantages, *, entropy_coef=0.0, kl_coef=0.0, ref_logprobs=None):
    """The same loss as framework code writes it, in float32."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    own = logp.gather(-1, tokens[:, None])[:, 0]
    per_token = clipped(own, old, advantages)
    if entropy_coef:
        per_token = per_token + entropy_coef * (logp.exp() * logp).sum(-1)
    if kl_coef:
        d = ref_logprobs - own
        per_token = per_token + kl_coef * (torch.exp(d) - d - 1)
    return per_token.mean()


def run(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    *,
    rounds: int,
    extras: bool,
    peers: bool,
) -> dict:
    """One row of the table."""
    case = Case(rows, vocab, dtype, device, extras)
    gradient, loss = case.error()
    name = str(dtype).removeprefix("torch.")
    row = {
        "op": "dapo_loss" + (" + entropy + k3" if extras else ""),
        "shape": [rows, vocab],
        "dtype": name,
        "gradient_error": gradient,
        "loss_error": loss,
    }
    if gradient > GATE[dtype] or loss > 1e-6:
        return row | {"failed": "correctness gate: no times are reported"}
    sides: dict[str, Callable[[], object]] = {
        "copy": case.copy,
        "inplace": case.inplace,
        "fresh": case.fresh,
        "drop_in": case.drop_in,
    }
    before = {"inplace": case.restore}
    others: dict[str, Callable[[], object]] = {}
    in_place: dict[str, Callable[[], object]] = {}
    if peers:
        compiled = torch.compile(case.eager_loss)
        sides["eager"] = case.eager
        sides["compile"] = lambda: case.eager(compiled)
        batch = case.tokens, case.old, case.advantages
        others = usable(
            {
                "Liger": lambda: liger_grpo(case.logits, case.tokens, case.old),
                "QuACK": lambda: quack_dapo(lambda: case.leaf, *batch),
            }
        )
        case.restore()
        in_place = usable(
            {"QuACK in place": lambda: quack_dapo(case.of_a_graph, *batch, inplace=True)}
        )
        before |= dict.fromkeys(in_place, case.restore)
        sides |= others | in_place
    times = interleaved(sides, before=before, rounds=rounds)
    size = case.logits.nbytes
    row |= {
        "times": {side: t.as_dict() for side, t in times.items()},
        "inplace_over_copy": times["inplace"].over(times["copy"]),
        "drop_in_over_fresh": times["drop_in"].over(times["fresh"]),
        "gb_per_s": 2 * size / times["inplace"].median / 1e6,
        "drop_in_peak_over_logits": peak_bytes(case.drop_in) / size,
    }
    case.restore()
    row["inplace_peak_over_logits"] = peak_bytes(case.inplace) / size
    if peers:
        row["compile_over_drop_in"] = times["compile"].over(times["drop_in"])
        row["eager_over_drop_in"] = times["eager"].over(times["drop_in"])
        row["peers"] = ratios(times, others, "drop_in") | ratios(times, in_place, "inplace")
    return row


def main(device: str, quick: bool) -> Iterator[dict]:
    """The rows of this op: the table's shape in float32 and bfloat16, plain and with all terms."""
    rows, vocab = QUICK if quick else SHAPES[device]
    for dtype in DTYPES[device]:
        for extras in (False, True):
            peers = not extras and not (device == "cuda" and dtype == torch.float32)
            yield run(
                rows, vocab, dtype, device,
                rounds=5 if quick else 9, extras=extras, peers=peers,
            )  # fmt: skip
