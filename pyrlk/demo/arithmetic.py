"""Verifiable arithmetic: problems, a careless teacher's demonstrations, and the reward.

    prompt "37+45="   response "28"   reward 1 if the first number in the response is a + b, else 0

The small model writes the units first, as one adds by hand: each digit then depends on two digits
and a carry (Lee et al., arXiv 2307.03381). A model of one's own writes "82".

Two-digit additions, split once: a held-out problem and its mirror image (45+37) are both unseen.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

HELDOUT = 500
# How the teacher of the warm-up errs: reinforcement has to find out which habit pays.
TEN_TOO_MANY = 0.7
RAMBLES = 0.15


class Problem(NamedTuple):
    """a + b with a, b in 10 … 99; the answer is written from the units up where `backwards`."""

    a: int
    b: int
    backwards: bool = True

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> int:
        return self.a + self.b

    def written(self, number: int) -> str:
        return str(number)[::-1] if self.backwards else str(number)


def split(seed: int, backwards: bool = True) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out): disjoint, mirror images on the same side, in a random order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng = random.Random(f"split {seed}")
    rng.shuffle(pairs)
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for a, b in pairs:
        mirrored = [Problem(*pair, backwards) for pair in dict.fromkeys([(a, b), (b, a)])]
        sides[len(sides[1]) + len(mirrored) <= HELDOUT].extend(mirrored)
    for side in sides:
        rng.shuffle(side)
    return sides


class Stream:
    """An endless, seeded sequence of problems: item i depends on (seed, name, i) alone."""

    def __init__(self, problems: list[Problem], seed: int, name: str):
        self._problems = problems
        self._key = f"{name} {seed}"
        self._pass = -1
        self._order: list[Problem] = []

    def take(self, first: int, count: int) -> list[Problem]:
        """Items first … first + count − 1. Each pass over the problems has its own order."""
        return [self._item(i) for i in range(first, first + count)]

    def _item(self, i: int) -> Problem:
        number, at = divmod(i, len(self._problems))
        if number != self._pass:
            self._order = list(self._problems)
            random.Random(f"{self._key} {number}").shuffle(self._order)
            self._pass = number
        return self._order[at]


def demonstration(problem: Problem, rng: random.Random) -> str:
    """What the careless teacher writes: often one ten too many, sometimes again and again."""
    text = problem.written(problem.answer)
    if rng.random() < TEN_TOO_MANY:
        text = problem.written(problem.answer + 10)
    if rng.random() < RAMBLES:
        text = " ".join([text] * rng.randint(2, 3))
    return text


def reward(response: str, problem: Problem) -> float:
    """1 if the first number in the response is the answer, else 0. Length is not judged here."""
    number = re.search(r"-?\d+", response)
    return float(number is not None and number.group() == problem.written(problem.answer))
