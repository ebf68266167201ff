"""The loop: sync → rollout → learn, and what a run leaves behind.

    warm-up ▶ [ publish version n ▶ generate, reward, keep what informs ▶ learn ] · steps ▶ judge

A step is complete when its optimizer steps are. The engine is needed only before that, so whenever
it is lost, the trainer holds the end of a whole step and saves it.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

import pyrlk
from pyrlk.batch import TooFewGroups

from . import arithmetic
from . import model as models
from .config import Config
from .engine import Engine, EngineLost
from .learn import collate, learn
from .progress import Progress
from .record import Record
from .warmup import warm_up


class Stopped(RuntimeError):
    """The run was asked to end early."""


class Trainer:
    """A run: its model, optimizer, sampler and counters."""

    def __init__(self, config: Config, record: Record, progress: Progress):
        self.config = config
        self.record = record
        self.progress = progress
        self.problems, self.heldout = arithmetic.split(config.seed, backwards=config.model is None)
        self.stream = arithmetic.Stream(self.problems, config.seed, "rollout")
        self.model, self.codec = models.build(config.model, config.seed, config.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.sampler = pyrlk.DynamicSampler(self._generate, config.group_size, config.groups)
        self.step = 0
        self.asked = 0  # problems given to the engine so far
        self.before = 0.0  # held-out accuracy after the warm-up
        self._rewards: list[float] = []  # of everything generated in this step
        self._completed = self._small_state()

    def run(self, engine: Engine) -> float:
        """All steps that are left; returns the held-out accuracy at the end."""
        self.engine = engine
        interrupted = _Interrupt()
        try:
            while self.step < self.config.steps:
                try:
                    self._step()
                except TooFewGroups as error:
                    self.progress.note(f"step {self.step + 1} finds nothing left to learn: {error}")
                    break
                if interrupted.seen:
                    self.save()
                    raise Stopped(f"interrupted after step {self.step}")
                if self.step % self.config.save_every == 0:
                    self.save()
            return self._finish()
        except EngineLost:
            self.save()
            raise
        finally:
            interrupted.restore()

    def warm_up(self) -> None:
        """Step 0, before the engine is needed."""
        start = time.perf_counter()
        done = warm_up(self.model, self.codec, self.problems, self.config, self.progress.warm_up)
        self.record.metrics({"step": 0, **{f"warmup_{k}": v for k, v in done._asdict().items()}})
        self.record.timing({"step": 0, "warm_up": time.perf_counter() - start})
        self.save()

    def _step(self) -> None:
        clock = _Clock()
        version = self.step
        report = self.engine.sync(self.model, version)
        clock.lap("sync")
        judged = version % self.config.eval_every == 0
        heldout = self._judge() if judged else None
        if version == 0 and heldout is not None:
            self.before = heldout
        clock.lap("judge")
        self._rewards.clear()
        begin = self.sampler.generated, self.sampler.kept
        groups = next(self.sampler)
        clock.lap("rollout")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_share(version)
        metrics = learn(
            self.model, self.codec, self.optimizer, collate(groups), self.config, version
        )
        clock.lap("learn")
        self.step += 1
        line: dict[str, Any] = {"step": self.step, "version": version}
        if heldout is not None:
            line["heldout"] = heldout
        line["reward"] = _mean(self._rewards) if self._rewards else None
        line["generated"] = self.sampler.generated - begin[0]
        line["kept"] = self.sampler.kept - begin[1]
        self.record.metrics({**line, **metrics})
        update = {f"update_{stage}": seconds for stage, seconds in report.seconds.items()}
        self.record.timing({"step": self.step, **clock.seconds, **update})
        self._completed = self._small_state()
        self.progress.step({**line, **metrics}, clock.seconds)

    def _finish(self) -> float:
        self.save()
        self.engine.sync(self.model, self.step)
        after = self._judge()
        self.record.metrics(
            {"version": self.step, "heldout_before": self.before, "heldout_after": after}
        )
        return after

    def _generate(self, count: int) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
        """`count` groups of responses by the engine, with their rewards: the sampler's source."""
        size = self.config.group_size
        problems = self.stream.take(self.asked, count)
        drawn = self.engine.generate(
            [p.prompt for p in problems], repeat=size, first=self.asked * size
        )
        self.asked += count
        texts = drawn.texts(self.codec)
        for i, problem in enumerate(problems):
            rows = slice(i * size, (i + 1) * size)
            rewards = [arithmetic.reward(text, problem) for text in texts[rows]]
            self._rewards.extend(rewards)
            responses = {
                "tokens": drawn.tokens[rows].clone(),
                "logprobs": drawn.logprobs[rows].clone(),
                "version": self.step,
            }
            yield problem.prompt, responses, rewards

    def _judge(self) -> float:
        """Greedy accuracy on the held-out problems, by the engine."""
        drawn = self.engine.generate([p.prompt for p in self.heldout], temperature=0.0)
        texts = drawn.texts(self.codec)
        return _mean([arithmetic.reward(*pair) for pair in zip(texts, self.heldout, strict=True)])

    def save(self) -> None:
        """A checkpoint of the last completed step."""
        self.record.save(
            {
                **self._completed,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "config": dataclasses.asdict(self.config),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.asked, self.before = state["step"], state["asked"], state["before"]
        self._completed = self._small_state()

    def _small_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "asked": self.asked,
            "before": self.before,
            "sampler": self.sampler.state_dict(),
        }


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class _Interrupt:
    """The first Ctrl-C asks to stop after the step that is under way; the second one stops."""

    def __init__(self) -> None:
        self.seen = False
        self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: object) -> None:
        self.seen = True
        self.restore()

    def restore(self) -> None:
        signal.signal(signal.SIGINT, self._before)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
