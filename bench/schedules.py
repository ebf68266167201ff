"""Schedules of the fused loss on a GPU, dapo in place in bfloat16: which one for which shape.

    pyrlk bench --device cuda --op schedules --op cooperative

`schedules` has those whose programs work alone, `cooperative` the one whose programs wait for each
other: should they wait for ever on some device, the others have been measured.

Every schedule of triton_kernels/schedule.py beside a copy of the logits, the limit of one read and
one write, in the same rounds. `auto` is what `schedule.choose` takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from pyrlk import objective, reference

from .measure import interleaved

TOKENS = (1, 16, 128, 1024, 8192)
VOCABULARIES = (32000, 128256, 151936, 262144)
GATE = 8e-3  # of bfloat16


class Case:
    """Inputs of one shape; small ones are rotated through more memory than L2 holds."""

    def __init__(self, tokens: int, vocab: int):
        self.shape = (tokens, vocab)
        self.logits = torch.empty(tokens, vocab, dtype=torch.bfloat16, device="cuda")
        for part in self.logits.split(256):
            part.copy_(torch.randn(part.shape, device="cuda") * 3)
        copies = max(1, min(32, (256 << 20) // self.logits.nbytes))
        self.buffers = [self.logits.clone() for _ in range(copies)]
        self.turn = 0
        self.warm = torch.empty_like(self.logits)
        self.tokens = torch.randint(vocab, (tokens,), device="cuda")
        self.advantages = torch.randn(tokens, device="cuda")
        self.ones = torch.ones(tokens, device="cuda")
        self.out = torch.empty(2, tokens, device="cuda")
        self.terms = objective.terms(objective.DAPO())

    def restore(self) -> None:
        self.turn = (self.turn + 1) % len(self.buffers)
        self.buffers[self.turn].copy_(self.logits)

    def copy(self) -> None:
        self.warm.copy_(self.buffers[self.turn])

    def run(self, schedule) -> torch.Tensor:
        from pyrlk.triton_kernels import policy_loss

        z = self.buffers[self.turn]
        policy_loss.policy_loss_fwd(
            z,
            self.tokens,
            None,
            None,  # on-policy: the gradient is that of REINFORCE
            self.advantages,
            self.ones,
            None,
            1.0,
            self.shape[1],
            self.terms,
            self.out[0],
            self.out[1],
            None,
            z,
            schedule,
        )
        return z

    def error(self, schedule) -> float:
        """Relative error of the gradient in norm, on some rows, against float64."""
        self.restore()
        rows = slice(0, min(32, self.shape[0]))
        grad = self.run(schedule)[rows].double()
        exact = self.logits[rows].double()
        truth = reference.reinforce_grad(exact, self.tokens[rows], self.advantages[rows].double())
        return ((grad - truth).norm() / truth.norm()).item()


def main(device: str, quick: bool) -> Iterator[dict]:
    """One row a shape and schedule; nothing without a GPU."""
    if device != "cuda":
        return
    from pyrlk.triton_kernels.schedule import Schedule

    schedules = {"auto": None, "split": Schedule("split"), "rows, all": Schedule("rows", 0)}
    schedules |= {f"rows, {n} an SM": Schedule("rows", n) for n in (1, 2, 3)}
    schedules |= {f"rows, {n} stages": Schedule("rows", 2, n) for n in (2, 3)}
    yield from compare(schedules, quick)


def compare(schedules: dict, quick: bool) -> Iterator[dict]:
    """Rows of some schedules by name, shape after shape."""
    for vocab in VOCABULARIES[:1] if quick else VOCABULARIES:
        for tokens in TOKENS[:3] if quick else TOKENS:
            case = Case(tokens, vocab)
            errors = {name: case.error(schedule) for name, schedule in schedules.items()}
            sides: dict[str, Callable[[], object]] = {"copy": case.copy}
            for name, schedule in schedules.items():
                sides[name] = functools.partial(case.run, schedule)
            before = dict.fromkeys(sides, case.restore)
            times = interleaved(sides, before=before, rounds=5 if quick else 15)
            for name, gradient in errors.items():
                row = {
                    "op": f"dapo_loss kernel, {name}",
                    "shape": [tokens, vocab],
                    "dtype": "bfloat16",
                    "gradient_error": gradient,
                }
                if not gradient <= GATE:
                    row["failed"] = "correctness gate: no times are reported"
                else:
                    row["times"] = {
                        "copy": times["copy"].as_dict(),
                        "kernel": times[name].as_dict(),
                    }
                    row["over_copy"] = times[name].over(times["copy"])
                yield row
