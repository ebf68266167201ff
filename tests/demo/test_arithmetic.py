"""The task of the demo: what is held out, what the teacher does, what a reward is."""

from __future__ import annotations

import random

import pytest
import torch

from pyrlk.batch import group_advantages, soft_overlong_penalty
from pyrlk.demo import arithmetic
from pyrlk.demo.arithmetic import Problem, Stream, demonstration, reward, split
from pyrlk.demo.config import Config
from pyrlk.demo.model import CharCodec
from pyrlk.demo.rollout import Rollout


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heldout_problems_and_their_mirror_images_are_unseen(seed):
    training, heldout = split(seed)
    assert len(heldout) == arithmetic.HELDOUT
    assert len(training) + len(heldout) == 90 * 90 == len({*training, *heldout})
    seen = {frozenset(problem) for problem in training}
    assert not any(frozenset(problem) in seen for problem in heldout)


def test_split_and_stream_depend_on_the_seed_alone():
    assert split(3) == split(3)
    assert split(3) != split(4)
    training, _ = split(0)
    assert Stream(training, 0, "a").take(7, 50) == Stream(training, 0, "a").take(0, 57)[7:]
    assert Stream(training, 0, "a").take(0, 50) != Stream(training, 0, "b").take(0, 50)


def test_a_stream_passes_through_all_problems_before_it_repeats_one():
    problems = [Problem(10, 10 + i) for i in range(7)]
    stream = Stream(problems, 0, "x")
    for first in (0, 7, 14):
        assert sorted(stream.take(first, 7)) == problems
    assert stream.take(5, 4) == stream.take(0, 14)[5:9]


def test_the_teacher_is_right_at_the_share_that_his_habits_leave():
    rng = random.Random(0)
    texts = [demonstration(Problem(37, 45), rng) for _ in range(4000)]
    firsts = [text.split()[0] for text in texts]
    assert set(firsts) == {"28", "29"}
    assert firsts.count("29") / 4000 == pytest.approx(arithmetic.TEN_TOO_MANY, abs=0.03)
    rambling = sum(" " in text for text in texts) / 4000
    assert rambling == pytest.approx(arithmetic.RAMBLES, abs=0.03)


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("28", 1.0),
        ("28 28 28", 1.0),
        (" 28.", 1.0),
        ("028", 0.0),
        ("2", 0.0),
        ("280", 0.0),
        ("-28", 0.0),
        ("82 28", 0.0),
        ("", 0.0),
        ("=", 0.0),
    ],
)
def test_reward_judges_the_first_number(response, wanted):
    assert reward(response, Problem(37, 45)) == wanted


def test_a_model_of_ones_own_writes_the_tens_first():
    assert reward("82", Problem(37, 45, backwards=False)) == 1.0
    assert reward("28", Problem(37, 45, backwards=False)) == 0.0
    assert Problem(15, 85).written(100) == "001"


def test_a_rambling_right_answer_is_worth_less_than_a_short_one():
    codec, config = CharCodec(), Config()
    rows = [[*codec.response("28"), codec.end], codec.response("28 28 28")]
    length = config.max_length
    tokens = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    rollout = Rollout(tokens, torch.zeros(tokens.shape))
    lengths = rollout.lengths()
    assert rollout.texts(codec) == ["28", "28 28 28"]
    assert lengths.tolist() == [3, 8]
    rewards = torch.tensor([reward(text, Problem(37, 45)) for text in rollout.texts(codec)])
    shaped = rewards + soft_overlong_penalty(lengths, length, config.cache_length)
    assert shaped.tolist() == [1.0, 0.0]
    short, long = group_advantages(shaped, 2).tolist()
    assert short > 0 > long


def test_the_longest_answer_with_its_end_is_not_overlong():
    config = Config()
    longest = torch.tensor([len("198") + 1])
    assert soft_overlong_penalty(longest, config.max_length, config.cache_length).tolist() == [0.0]
