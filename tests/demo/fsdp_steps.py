"""The updates of the demo on the ranks that torchrun started, beside those of one process.

    torchrun --standalone --nproc-per-node RANKS fsdp_steps.py RESULTS

Rank 0 writes, for each case, how far the two are apart; test_distributed.py judges it.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch

from pyrlk.demo.config import Config
from pyrlk.demo.learn import Batch, learn
from pyrlk.demo.model import build
from pyrlk.demo.ranks import Ranks, shard_state, whole
from pyrlk.demo.rollout import generate, response_seeds

CASES = {
    "tokens are the denominator": {"algorithm": "dapo"},
    "sequences are the denominator": {"algorithm": "grpo"},
    "rows that do not divide evenly": {"algorithm": "reinforce", "groups": 3, "group_size": 3},
}


def rollout(config: Config) -> Batch:
    """Responses of the untrained policy, of lengths 1 to 8, with arbitrary rewards."""
    model, codec = build(None, 0, "cpu")
    prompts = [
        f"{10 + 7 * i}+{31 + i}=" for i in range(config.groups) for _ in range(config.group_size)
    ]
    count = len(prompts)
    drawn = generate(
        model, codec, prompts, response_seeds(0, 0, count), temperature=1.0, max_length=8
    )
    rewards = torch.arange(count).mul(7).remainder(5).lt(2).float()
    tokens, logprobs = drawn.tokens, drawn.logprobs
    for i in range(count // 3):  # the first rank's rows are the shorter ones
        tokens[i, 1 + i % 3 :], logprobs[i, 1 + i % 3 :] = -100, 0.0
    return Batch(prompts, tokens, logprobs, rewards, torch.arange(count) % 2)


class Side:
    """A model and its optimizer, whole or in shards."""

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.model, self.codec = build(None, 0, "cpu")
        self.shard()

    def shard(self, state=None) -> None:
        self.ranks.shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0)
        if state is not None:
            self.optimizer.load_state_dict(state)
            shard_state(self.optimizer)

    def learn(self, batch: Batch, version: int) -> dict[str, float]:
        arguments = self.model, self.codec, self.optimizer, batch, self.config, version
        return learn(*arguments, self.ranks)

    def weights(self) -> torch.Tensor:
        return torch.cat([whole(p.detach()).flatten() for p in self.model.parameters()])

    def slopes(self) -> torch.Tensor:
        return torch.cat([whole(p.grad).flatten() for p in self.model.parameters()])

    def again(self) -> Side:
        """A new one from this one's checkpoint."""
        state = copy.deepcopy(whole([self.model.state_dict(), self.optimizer.state_dict()]))
        new = Side(self.config, Ranks())
        new.model.load_state_dict(state[0])
        new.ranks = self.ranks
        new.shard(state[1])
        return new


def distance(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    return ((got - wanted).norm() / scale.norm()).item()


def compare(options: dict, ranks: Ranks) -> dict[str, object]:
    config = Config(**{"groups": 6, "group_size": 4, "updates": 1, "threads": 1, **options})
    batch, alone, sharded = rollout(config), Side(config, Ranks()), Side(config, ranks)
    begin = alone.weights()
    said: dict[str, object] = {}
    for version in (0, 1):
        metrics = sharded.learn(batch, version), alone.learn(batch, version)
        said[f"metrics {version}"] = metrics
        said[f"gradient {version}"] = distance(sharded.slopes(), alone.slopes(), alone.slopes())
        moved = alone.weights() - begin
        said[f"weights {version}"] = distance(sharded.weights(), alone.weights(), moved)
        if version == 0:
            resumed = sharded.again()
    resumed.learn(batch, 1)
    said["resumed"] = bool(torch.equal(resumed.weights(), sharded.weights()))
    parts = [p.to_local().numel() for p in sharded.model.parameters()]
    said["share"] = sum(parts) / begin.numel()
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Ranks() as ranks:
        results = {name: compare(options, ranks) for name, options in CASES.items()}
        if ranks.leads:
            Path(sys.argv[1]).write_text(json.dumps(results))
