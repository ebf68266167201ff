"""The settings of a demo run; its checkpoint holds them, and `--resume` takes them from there."""

from __future__ import annotations

import dataclasses

from ..objective import DAPO, GRPO, PPO, REINFORCE, Objective

ALGORITHMS = ("dapo", "grpo", "ppo", "reinforce")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 40
    algorithm: str = "dapo"
    model: str | None = None  # a transformers folder; None builds the small model
    device: str = "cpu"
    threads: int = 0  # of each process; 0 means all usable cores, which take turns
    groups: int = 64  # informative groups a step
    group_size: int = 8
    max_length: int = 8  # tokens of a response, its end included
    cache_length: int = 4  # of which so many are on the slope of the overlong penalty
    warmup_steps: int = 250
    warmup_batch: int = 128
    warmup_lr: float = 4e-3
    lr: float = 3e-4
    lr_ramp: int = 5  # steps until it is reached: AdamW's first steps are its boldest
    updates: int = 4  # optimizer steps a batch: from the second on the ratio is not 1
    eval_every: int = 10
    save_every: int = 10

    def lr_share(self, version: int) -> float:
        """Share of `lr` at a version: a ramp, then a fall to a tenth at the last step."""
        return min((version + 1) / self.lr_ramp, 1.0, max(0.1, 1 - version / self.steps))

    @property
    def objective(self) -> Objective:
        return {"dapo": DAPO, "grpo": GRPO, "ppo": PPO, "reinforce": REINFORCE}[self.algorithm]()

    @property
    def updates_per_batch(self) -> int:
        """REINFORCE has no ratio to correct a second update on the same batch."""
        return 1 if self.algorithm == "reinforce" else self.updates
