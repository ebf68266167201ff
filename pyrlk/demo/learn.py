"""One batch of groups → optimizer steps on the clip-higher loss.

    reward + soft_overlong_penalty → group_advantages → policy_loss → AdamW

Every rank has the whole batch, and scores its share of each update's rows (ranks.py).
The old log-probs are the engine's own: it drew the tokens, and `logprob_gap` reports how far the
trainer's scores of the same tokens under the same weights are from them (rounding, about 1e-6).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyrlk

from .config import Config
from .model import Codec, pad_left, response_logits
from .ranks import ALONE, Ranks, whole


class Batch(NamedTuple):
    """N = groups · group_size responses, a group's side by side."""

    prompts: list[str]
    tokens: Tensor  # [N, L], −100 beyond the end
    logprobs: Tensor  # [N, L], of the engine
    rewards: Tensor  # [N]
    versions: Tensor  # [N], of the weights that drew it

    def take(self, rows: Tensor) -> Batch:
        prompts = [self.prompts[i] for i in rows.tolist()]
        return Batch(prompts, *(x[rows] for x in self[1:]))


def collate(groups: list[tuple[str, dict[str, Any], list[float]]]) -> Batch:
    """From the groups of a `DynamicSampler`."""
    size = len(groups[0][2])
    return Batch(
        [prompt for prompt, _, _ in groups for _ in range(size)],
        torch.cat([responses["tokens"] for _, responses, _ in groups]),
        torch.cat([responses["logprobs"] for _, responses, _ in groups]),
        torch.tensor([reward for _, _, rewards in groups for reward in rewards]),
        torch.tensor([responses["version"] for _, responses, _ in groups for _ in range(size)]),
    )


def learn(
    model: nn.Module,
    codec: Codec,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    version: int,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """The optimizer steps of one batch; returns its metrics, the same on every rank."""
    lengths = (batch.tokens != -100).sum(1)
    penalty = pyrlk.soft_overlong_penalty(lengths, config.max_length, config.cache_length)
    shaped = batch.rewards + penalty
    if config.algorithm == "reinforce":
        advantages = pyrlk.group_advantages(
            shaped, config.group_size, scale="none", leave_one_out=True
        )
    else:
        advantages = pyrlk.group_advantages(shaped, config.group_size)
    updates = [
        _update(model, codec, optimizer, batch, advantages, rows, config, version, ranks)
        for rows in _minibatches(len(batch.prompts), config)
    ]
    mean = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
    mean["ratio_max"] = max(u["ratio_max"] for u in updates)
    mean["logprob_gap"] = updates[0]["logprob_gap"]
    return {
        "reward_shaped": shaped.mean().item(),
        "overlong": penalty.mean().item(),
        "length": lengths.float().mean().item(),
        "stale": (batch.versions != version).float().mean().item(),
        **mean,
    }


def _minibatches(count: int, config: Config) -> list[Tensor]:
    """Whole groups, every k-th to the k-th minibatch."""
    rows = torch.arange(count).view(-1, config.group_size)
    number = min(config.updates_per_batch, len(rows))
    return [rows[k::number].flatten() for k in range(number)]


def _update(
    model: nn.Module,
    codec: Codec,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    advantages: Tensor,
    rows: Tensor,
    config: Config,
    version: int,
    ranks: Ranks,
) -> dict[str, float]:
    rows = ranks.share(rows)
    part = batch.take(rows)
    tokens, old = part.tokens.to(config.device), part.logprobs.to(config.device)
    prompt, mask = pad_left([codec.prompt(text) for text in part.prompts], codec.pad, config.device)
    logits = response_logits(model, prompt, mask, tokens, codec.pad)
    fresh = (part.versions == version).to(config.device)
    gap = _logprob_gap(logits, tokens, old, fresh)
    loss, stats = pyrlk.policy_loss(
        logits,
        tokens,
        None if config.algorithm == "reinforce" else old,
        advantages[rows].to(config.device),
        objective=config.objective,
        normalizer=ranks.normalizer(tokens != -100, config.objective),
        return_stats=True,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    of_tokens = {
        "entropy": stats.entropy.item(),
        "clip_low": stats.clip_low.item(),
        "clip_high": stats.clip_high.item(),
        "approx_kl": stats.approx_kl.item(),
    }
    return {
        **ranks.mean({"loss": loss.item()}),
        **ranks.mean(of_tokens, weight=stats.tokens.item()),
        **ranks.largest({"ratio_max": stats.ratio_max.item(), "logprob_gap": gap}),
        "grad_norm": norm.item(),
    }


@torch.no_grad()
def _logprob_gap(logits: Tensor, tokens: Tensor, old: Tensor, fresh: Tensor) -> float:
    """max |trainer − engine| over the tokens that the present weights drew."""
    gap = (pyrlk.token_logprobs(logits.detach(), tokens) - old).abs()
    return torch.where(fresh[:, None], gap, 0.0).max().item()
