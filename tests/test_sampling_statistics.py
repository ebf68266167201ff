"""Draws follow their distribution, and the statistic that says so catches a sampler that is wrong.

Of the full run (python -m pyrlk.bench.draws: 5 M draws a filter) this is a hundredth; the faults
below show what this many draws still catch.
"""

from __future__ import annotations

import math

import pytest
import torch

import pyrlk
from pyrlk import reference
from pyrlk.bench import draws

BOUND = 6.0


@pytest.mark.parametrize("name", draws.FILTERS)
def test_draws_of_twelve_distributions_follow_them(name):
    z, alone = draws.pooled(name, 12 << 14)
    assert abs(z) < BOUND
    assert len(alone) == 12
    assert max(map(abs, alone.values())) < BOUND, alone


def without_tail(row, share=0.01, **settings):
    """The row without its last tokens, in id order of the ranks, that weigh `share` together."""
    p = draws.probabilities(row, **settings)
    order = p.argsort(descending=True)
    tail = p[order].flip(0).cumsum(0).flip(0) <= share
    assert tail[p[order] > 0].any()
    return row.masked_fill(torch.zeros(row.numel(), dtype=torch.bool).scatter(0, order, tail),
                           -math.inf)  # fmt: skip


# The fault, the distribution that shows it, what the sampler does instead, how many draws.
FAULTS = {
    "1 % of the tail dropped": ("wide", {"top_k": 40}, {"row": without_tail}, 1 << 18),
    "temperature 1 % too high": ("wide", {"top_k": 20}, {"temperature": 1.01}, 1 << 19),
    "temperature 1 % too low": ("wide", {"top_p": 0.9}, {"temperature": 0.99}, 1 << 19),
    "k too small by one": ("normal", {"top_k": 20}, {"top_k": 19}, 1 << 14),
    "k too large by one": ("normal", {"top_k": 20}, {"top_k": 21}, 1 << 14),
    "p too small by 1 %": ("narrow", {"top_p": 0.9}, {"top_p": 0.89}, 1 << 16),
    "all ties kept": ("two values", {"top_k": 10}, {"ties": "keep"}, 1 << 14),
    "ties cut from the wrong end": ("two values", {"top_k": 10}, {"flip": True}, 1 << 14),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_the_sampler_without_it_is_not(name):
    distribution, settings, fault, number = FAULTS[name]
    row, fault = draws.DISTRIBUTIONS[distribution], dict(fault)
    truth = draws.probabilities(row, **settings)
    assert abs(draws.deviate(*draws.chi_square(draws.count(row, number, **settings), truth))) < 6
    change, flip = fault.pop("row", None), fault.pop("flip", False)
    wrong = row if change is None else change(row, **settings)
    wrong = wrong.flip(0) if flip else wrong
    counts = draws.count(wrong, number, **(settings | fault))
    counts = counts.flip(0) if flip else counts
    assert draws.deviate(*draws.chi_square(counts, truth)) > BOUND


def test_tokens_18_to_20_nats_below_the_top_are_drawn_as_often_as_they_should_be():
    """2.7e-5 of the mass on 4,096 tokens of 2e-9 to 1.5e-8: 24-bit uniforms never reach some."""
    row = torch.cat([-torch.linspace(18, 20, 2048), torch.zeros(1), -torch.linspace(18, 20, 2048)])
    tail = torch.ones(4097, dtype=torch.bool).index_fill(0, torch.tensor(2048), False)
    p = draws.probabilities(row)
    number = 1 << 20
    expected = float(p[tail].sum()) * number
    assert expected > 20
    seen = int(draws.count(row, number)[tail].sum())
    assert abs(seen - expected) < 4 * math.sqrt(expected)
    assert draws.count(row, 1 << 12, min_p=math.exp(-17.0))[tail].sum() == 0


def test_no_token_is_drawn_from_outside_its_kept_set():
    assert draws.illegal(48 << 14) == 0


def test_draws_at_neighbouring_positions_and_seeds_are_independent():
    """χ² of pairs: the token at (seed, position) against that one position or one seed further."""
    size = 1 << 17
    z = torch.zeros(8).expand(size, -1)
    position = torch.arange(size)
    seeds = torch.full((size,), 3)
    here = pyrlk.sample(z, seed=seeds, position=position).token
    for other in (
        {"seed": seeds, "position": position + 1},
        {"seed": seeds + 1, "position": position},
    ):
        there = pyrlk.sample(z, **other).token
        pairs = torch.bincount(8 * here + there, minlength=64)
        truth = torch.full((64,), 1 / 64, dtype=torch.float64)
        assert abs(draws.deviate(*draws.chi_square(pairs, truth))) < BOUND


def test_the_reference_draws_what_its_stream_says():
    """The first token whose running probability exceeds u, for u on both sides of an edge."""
    z = torch.zeros(200, 4)
    got = reference.sample(z, seed=torch.arange(200)).token
    u = torch.tensor([reference.uniform_bits(s, 0) / 2**64 for s in range(200)])
    assert torch.equal(got, (4 * u).floor().long())
