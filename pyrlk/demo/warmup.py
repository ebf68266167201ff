"""Supervised warm-up: cross-entropy on a careless teacher, to a policy that is sometimes right.

A fixed number of steps. What it reports on the way is pass@16 on training problems: reinforcement
can find what one of 16 samples finds. The greedy answer is then the teacher's favourite mistake.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arithmetic import Problem, Stream, demonstration, reward
from .config import Config
from .model import Codec, pad_left, response_logits
from .rollout import generate, response_seeds

CHECK_EVERY = 50
CHECK_PROBLEMS = 64
CHECK_SAMPLES = 16
# Response numbers of the checks: far from those of the training rollouts.
CHECK_FIRST = 1 << 39


class WarmUp(NamedTuple):
    steps: int
    pass_at_16: float
    pass_at_1: float


def warm_up(
    model: nn.Module,
    codec: Codec,
    problems: list[Problem],
    config: Config,
    progress: Callable[[int, float], None],
) -> WarmUp:
    """Train `model` in place; the learning rate falls linearly to its twentieth."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.warmup_lr, betas=(0.9, 0.99), weight_decay=0.0
    )
    stream = Stream(problems, config.seed, "warm-up")
    rng = random.Random(f"teacher {config.seed}")
    step, check = 0, WarmUp(0, 0.0, 0.0)
    while step < config.warmup_steps:
        for group in optimizer.param_groups:
            group["lr"] = config.warmup_lr * _schedule(step, config.warmup_steps)
        batch = stream.take(step * config.warmup_batch, config.warmup_batch)
        texts = [demonstration(problem, rng) for problem in batch]
        loss = _cross_entropy(model, codec, batch, texts, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % CHECK_EVERY == 0 or step == config.warmup_steps:
            check = _pass_at(model, codec, problems, config, step)
        progress(step, check.pass_at_16)
    return check


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * max(0.05, 1 - step / steps)


def _cross_entropy(
    model: nn.Module, codec: Codec, batch: list[Problem], texts: list[str], config: Config
) -> Tensor:
    """Mean negative log-prob of the demonstrations' tokens; a long one is cut, without an end."""
    prompt, mask = pad_left([codec.prompt(p.prompt) for p in batch], codec.pad, config.device)
    rows = [[*codec.response(text), codec.end][: config.max_length] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [-100] * (width - len(row)) for row in rows], device=config.device)
    logits = response_logits(model, prompt, mask, tokens, codec.pad)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=-100)


def _pass_at(
    model: nn.Module, codec: Codec, problems: list[Problem], config: Config, step: int
) -> WarmUp:
    asked = Stream(problems, config.seed, "check").take(step * CHECK_PROBLEMS, CHECK_PROBLEMS)
    repeated = [problem for problem in asked for _ in range(CHECK_SAMPLES)]
    seeds = response_seeds(config.seed, CHECK_FIRST + step * len(repeated), len(repeated))
    drawn = generate(
        model,
        codec,
        [problem.prompt for problem in repeated],
        seeds.to(config.device),
        temperature=1.0,
        max_length=config.max_length,
    )
    texts = drawn.texts(codec)
    rewards = torch.tensor([reward(*pair) for pair in zip(texts, repeated, strict=True)])
    rewards = rewards.view(CHECK_PROBLEMS, CHECK_SAMPLES)
    return WarmUp(step, rewards.amax(1).mean().item(), rewards.mean().item())
