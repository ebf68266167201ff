"""Group advantages, informative groups, overlong shaping, dynamic sampling, by plain Python."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from pyrlk.batch import (
    DynamicSampler,
    TooFewGroups,
    group_advantages,
    informative_groups,
    soft_overlong_penalty,
)

# Rewards: 0/1, graded, equal numbers whose mean rounds (0.1), large offsets, tiny differences.
REWARD = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.5, 1e6, 1e6 + 1, 1e-9]),
    st.floats(-100, 100, allow_nan=False, width=32),
)


def advantages_of(group: list[float], scale: str, eps: float, leave_one_out: bool) -> list[float]:
    """One group, in Python floats and exact sums."""
    if all(r == group[0] for r in group):
        return [0.0] * len(group)
    mean = math.fsum(group) / len(group)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
    out = []
    for i, r in enumerate(group):
        others = group[:i] + group[i + 1 :]
        baseline = math.fsum(others) / len(others) if leave_one_out else mean
        out.append((r - baseline) / (std + eps if scale == "std" else 1.0))
    return out


@given(
    data=st.data(),
    size=st.integers(1, 7),
    count=st.integers(0, 5),
    scale=st.sampled_from(["std", "none"]),
    eps=st.sampled_from([0.0, 1e-6, 0.5]),
    leave_one_out=st.booleans(),
)
def test_advantages_are_those_of_plain_python(data, size, count, scale, eps, leave_one_out):
    groups = data.draw(st.lists(st.lists(REWARD, min_size=size, max_size=size), min_size=count))
    flat = [r for group in groups for r in group]
    rewards = torch.tensor(flat, dtype=torch.float64)
    options = {"scale": scale, "eps": eps, "leave_one_out": leave_one_out}
    got = group_advantages(rewards, size, **options)
    wanted = [a for group in groups for a in advantages_of(group, **options)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    informative = [any(r != group[0] for r in group) for group in groups]
    assert informative_groups(rewards, size).tolist() == informative


@given(data=st.data(), rewards=st.lists(REWARD, max_size=24))
def test_group_ids_mean_the_same_groups_in_any_order(data, rewards):
    ids = data.draw(
        st.lists(st.integers(-3, 3), min_size=len(rewards), max_size=len(rewards)), label="ids"
    )
    values = torch.tensor(rewards, dtype=torch.float64)
    got = group_advantages(values, group_ids=torch.tensor(ids, dtype=torch.int64))
    kept = informative_groups(values, group_ids=torch.tensor(ids, dtype=torch.int64))
    ascending = sorted(set(ids))
    assert len(kept) == len(ascending)
    for number, name in enumerate(ascending):
        rows = [i for i, other in enumerate(ids) if other == name]
        alone = values[rows]
        torch.testing.assert_close(got[rows], group_advantages(alone, len(rows)))
        assert bool(kept[number]) == bool(informative_groups(alone, len(rows)))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1e30, -7.7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_equal_rewards_give_exactly_zero_though_their_mean_rounds(reward, size):
    rewards = torch.full((size,), reward, dtype=torch.float64)
    for options in ({}, {"leave_one_out": True}, {"eps": 0.0}, {"scale": "none"}):
        assert group_advantages(rewards, size, **options).tolist() == [0.0] * size
        ids = torch.zeros(size, dtype=torch.int32)
        assert group_advantages(rewards, group_ids=ids, **options).tolist() == [0.0] * size


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 0.0, 0.0, 4.0])
    got = group_advantages(rewards, 4, scale="none", leave_one_out=True)
    torch.testing.assert_close(got, torch.tensor([1 - 4 / 3, -5 / 3, -5 / 3, 4 - 1 / 3]))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_result_dtype(dtype, wanted):
    got = group_advantages(torch.tensor([1, 0, 1, 1], dtype=dtype), 2)
    assert got.dtype == wanted
    assert got[2:].tolist() == [0.0, 0.0]


def test_float32_result_is_the_rounded_float64_result():
    rewards = torch.randn(32, generator=torch.Generator().manual_seed(0))
    exact = group_advantages(rewards.double(), 8)
    assert torch.equal(group_advantages(rewards, 8), exact.float())


@given(length=st.integers(0, 300), limit=st.integers(1, 200), data=st.data())
def test_overlong_penalty_is_the_paper_s_formula(length, limit, data):
    cache = data.draw(st.integers(1, limit))
    got = soft_overlong_penalty(torch.tensor([length]), limit, cache)
    if length <= limit - cache:
        wanted = 0.0
    elif length <= limit:
        wanted = ((limit - cache) - length) / cache
    else:
        wanted = -1.0
    assert got.dtype == torch.float32
    assert got.tolist() == torch.tensor([wanted]).tolist()


def test_overlong_penalty_at_its_limits():
    lengths = torch.tensor([[0, 4, 5], [7, 8, 9]], dtype=torch.int32)
    got = soft_overlong_penalty(lengths, 8, 4)
    assert got.tolist() == [[0.0, 0.0, -0.25], [-0.75, -1.0, -1.0]]
    assert not torch.signbit(got[0, :2]).any()


BAD = {
    "rewards no tensor": (
        lambda: group_advantages([1.0], 1),
        TypeError,
        "rewards must be a tensor, got list",
    ),
    "rewards complex": (
        lambda: group_advantages(torch.zeros(2, dtype=torch.complex64), 2),
        TypeError,
        "rewards must be real, got complex64",
    ),
    "rewards 2-d": (
        lambda: group_advantages(torch.zeros(2, 2), 2),
        ValueError,
        "rewards must have shape [N], got (2, 2)",
    ),
    "rewards NaN": (
        lambda: group_advantages(torch.tensor([0.0, math.nan, math.nan]), 3),
        ValueError,
        "rewards must be finite, rewards[1] is nan",
    ),
    "rewards infinite": (
        lambda: informative_groups(torch.tensor([math.inf]), 1),
        ValueError,
        "rewards must be finite, rewards[0] is inf",
    ),
    "neither": (
        lambda: group_advantages(torch.zeros(2)),
        ValueError,
        "group_size or group_ids must be given, exactly one; got neither",
    ),
    "both": (
        lambda: informative_groups(torch.zeros(2), 2, group_ids=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        "group_size or group_ids must be given, exactly one; got both",
    ),
    "group_size 0": (
        lambda: group_advantages(torch.zeros(2), 0),
        ValueError,
        "group_size must be ≥ 1, got 0",
    ),
    "group_size float": (
        lambda: group_advantages(torch.zeros(2), 2.0),
        TypeError,
        "group_size must be an integer, got float",
    ),
    "group_size does not divide": (
        lambda: group_advantages(torch.zeros(7), 2),
        ValueError,
        "group_size must divide the number of rewards, got 2 for 7 rewards",
    ),
    "group_ids shape": (
        lambda: group_advantages(torch.zeros(2), group_ids=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "group_ids must have the shape and device of rewards, (2,) on cpu, got (3,) on cpu",
    ),
    "group_ids float": (
        lambda: group_advantages(torch.zeros(2), group_ids=torch.zeros(2)),
        TypeError,
        "group_ids must be an integer tensor, got float32",
    ),
    "scale": (
        lambda: group_advantages(torch.zeros(2), 2, scale="mad"),
        ValueError,
        "scale must be one of 'std', 'none', got 'mad'",
    ),
    "eps": (
        lambda: group_advantages(torch.zeros(2), 2, eps=-1.0),
        ValueError,
        "eps must lie in [0, inf), got -1.0",
    ),
    "leave_one_out": (
        lambda: group_advantages(torch.zeros(2), 2, leave_one_out=1),
        TypeError,
        "leave_one_out must be True or False, got int",
    ),
    "lengths float": (
        lambda: soft_overlong_penalty(torch.zeros(2), 8, 4),
        TypeError,
        "lengths must be an integer tensor, got float32",
    ),
    "lengths negative": (
        lambda: soft_overlong_penalty(torch.tensor([[1], [-2]]), 8, 4),
        ValueError,
        "lengths must be ≥ 0, lengths[1, 0] is -2",
    ),
    "max_length float": (
        lambda: soft_overlong_penalty(torch.tensor([1]), 8.0, 4),
        TypeError,
        "max_length must be an integer, got float",
    ),
    "cache_length 0": (
        lambda: soft_overlong_penalty(torch.tensor([1]), 8, 0),
        ValueError,
        "cache_length must lie in [1, max_length = 8], got 0",
    ),
    "cache_length above": (
        lambda: soft_overlong_penalty(torch.tensor([1]), 8, 9),
        ValueError,
        "cache_length must lie in [1, max_length = 8], got 9",
    ),
    "generate": (
        lambda: DynamicSampler(None, 2, 1),
        TypeError,
        "generate must be callable, got NoneType",
    ),
    "sampler group_size": (
        lambda: DynamicSampler(iter, 1, 1),
        ValueError,
        "group_size must be ≥ 2, got 1",
    ),
    "target_groups": (
        lambda: DynamicSampler(iter, 2, 0),
        ValueError,
        "target_groups must be ≥ 1, got 0",
    ),
    "max_rounds": (
        lambda: DynamicSampler(iter, 2, 1, max_rounds=0),
        ValueError,
        "max_rounds must be ≥ 1, got 0",
    ),
    "a group of another size": (
        lambda: next(DynamicSampler(lambda n: [("p", "r", [1.0])], 2, 1)),
        ValueError,
        "rewards of a group must be group_size = 2 numbers, got 1",
    ),
    "a group with NaN": (
        lambda: next(DynamicSampler(lambda n: [("p", "r", [1.0, math.nan])], 2, 1)),
        ValueError,
        "rewards must be finite, rewards[1] of a group is nan",
    ),
    "no group": (
        lambda: next(DynamicSampler(lambda n: [1.0], 2, 1)),
        TypeError,
        "generate must yield (prompt, responses, rewards) tuples, got float",
    ),
    "half a group": (
        lambda: next(DynamicSampler(lambda n: [("p", "r")], 2, 1)),
        TypeError,
        "generate must yield (prompt, responses, rewards) tuples, got tuple of 2",
    ),
    "no groups": (
        lambda: next(DynamicSampler(lambda n: None, 2, 1)),
        TypeError,
        "generate must return an iterable of groups, got NoneType",
    ),
    "a group with words": (
        lambda: next(DynamicSampler(lambda n: [("p", "r", ["good", "bad"])], 2, 1)),
        TypeError,
        "rewards of a group must be numbers: could not convert string to float: 'good'",
    ),
    "a group with one reward for all": (
        lambda: next(DynamicSampler(lambda n: [("p", "r", 1.0)], 2, 1)),
        TypeError,
        "rewards of a group must be numbers: 'float' object is not iterable",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


class Source:
    """Numbered groups; every `period`-th one is informative."""

    def __init__(self, period: int):
        self.period = period
        self.number = 0
        self.asked: list[int] = []

    def __call__(self, count: int):
        self.asked.append(count)
        for _ in range(count):
            informative = self.number % self.period == 0
            yield self.number, None, [0.0, 1.0 if informative else 0.0]
            self.number += 1


@given(period=st.integers(1, 5), target=st.integers(1, 9), batches=st.integers(1, 6))
def test_batches_hold_every_informative_group_once_and_in_order(period, target, batches):
    sampler = DynamicSampler(Source(period), 2, target, max_rounds=50)
    drawn = list(itertools.islice(sampler, batches))
    assert [len(batch) for batch in drawn] == [target] * batches
    numbers = [number for batch in drawn for number, _, _ in batch]
    assert numbers == [period * i for i in range(target * batches)]
    assert sampler.kept == len(numbers) + len(sampler.surplus)


def test_a_round_asks_by_the_kept_share_within_its_bounds():
    source = Source(2)
    sampler = DynamicSampler(source, 2, 8)
    next(sampler)
    assert source.asked == [8, 8]
    next(sampler)
    assert source.asked == [8, 8, 16]
    rare = Source(50)
    with pytest.raises(TooFewGroups):
        next(DynamicSampler(rare, 2, 8, max_rounds=3))
    assert rare.asked == [8, 32, 32]


def test_too_few_groups_says_the_kept_share_and_loses_nothing():
    sampler = DynamicSampler(Source(4), 2, 8, max_rounds=1)
    with pytest.raises(RuntimeError) as caught:
        next(sampler)
    assert str(caught.value) == (
        "max_rounds = 1 rounds brought 2 informative groups out of 8 (kept share 25.0%); with the "
        "surplus that makes 2 of target_groups = 8"
    )
    assert caught.value.kept_share == 0.25
    assert [number for number, _, _ in sampler.surplus] == [0, 4]
    assert [number for number, _, _ in next(sampler)] == [0, 4, 8, 12, 16, 20, 24, 28]


def test_an_empty_source_ends():
    with pytest.raises(TooFewGroups, match=r"0 informative groups out of 0 \(kept share 0\.0%\)"):
        next(DynamicSampler(lambda n: [], 2, 1))


@given(period=st.integers(1, 4), before=st.integers(0, 3))
def test_a_saved_sampler_goes_on_as_if_nothing_had_happened(period, before):
    source, other = Source(period), Source(period)
    sampler = DynamicSampler(source, 2, 5, max_rounds=50)
    for _ in range(before):
        next(sampler)
    copy = DynamicSampler(other, 2, 5, max_rounds=50)
    copy.load_state_dict(sampler.state_dict())
    other.number = source.number
    for _ in range(3):
        assert next(copy) == next(sampler)
    assert copy.state_dict() == sampler.state_dict()


def test_rewards_may_be_a_tensor():
    sampler = DynamicSampler(lambda n: [("p", "r", torch.tensor([1, 0]))] * n, 2, 3)
    assert len(next(sampler)) == 3
