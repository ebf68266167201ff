"""Responses drawn by `pyrlk.sample`, with the log-prob of every token under what it was drawn from.

    token t of response i = draw(logits, temperature; seed = seeds[i], position = t)

so the tokens depend on the weights and the seeds alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import pyrlk

from .model import Codec, pad_left


class Rollout(NamedTuple):
    """tokens int64 [N, L], −100 beyond the end; logprobs float32 [N, L], 0 there."""

    tokens: Tensor
    logprobs: Tensor

    def lengths(self) -> Tensor:
        """Tokens of each response, its end token included; L where it was cut off."""
        return (self.tokens != -100).sum(1)

    def texts(self, codec: Codec) -> list[str]:
        return [codec.decode([t for t in row if t != -100]) for row in self.tokens.tolist()]


def response_seeds(run_seed: int, first: int, count: int) -> Tensor:
    """int64 [count]: the draw seeds of responses number first … of a run."""
    return (run_seed << 40) + torch.arange(first, first + count, dtype=torch.int64)


@torch.no_grad()
def generate(
    model: nn.Module,
    codec: Codec,
    prompts: list[str],
    seeds: Tensor,
    *,
    temperature: float,
    max_length: int,
) -> Rollout:
    """One response a prompt, of at most `max_length` tokens; temperature 0 is greedy."""
    device = seeds.device
    ids, mask = pad_left([codec.prompt(text) for text in prompts], codec.pad, str(device))
    tokens = torch.full((len(prompts), max_length), -100, device=device)
    logprobs = torch.zeros(len(prompts), max_length, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    inputs, cache = ids, None
    for t in range(max_length):
        positions = {}
        if mask is not None:
            where = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            positions = {"attention_mask": mask, "position_ids": where}
        out = model(
            input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions
        )
        drawn = pyrlk.sample(out.logits[:, -1], temperature=temperature, seed=seeds, position=t)
        tokens[:, t] = torch.where(running, drawn.token, -100)
        logprobs[:, t] = torch.where(running, drawn.logprob, 0.0)
        running &= drawn.token != codec.end
        if not running.any():
            break
        inputs, cache = drawn.token[:, None], out.past_key_values
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return Rollout(tokens, logprobs)
