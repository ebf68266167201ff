"""The loop: sync → rollout → learn, and what a run leaves behind.

    warm-up ▶ [ publish version n ▶ generate, reward, keep what informs ▶ learn ] · steps ▶ judge

A step is complete when its optimizer steps are. The engine is needed only before that, so whenever
it is lost, the trainer holds the end of a whole step and saves it.

With several ranks each has a Trainer: all take the same steps, and what only rank 0 can know, from
the engine or from a signal, it tells the others (ranks.py).
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

import pyrlk
from pyrlk import weights
from pyrlk.batch import TooFewGroups

from . import arithmetic
from . import model as models
from .config import Config
from .determinism import fix
from .engine import SYNC_SECONDS, Engine, EngineLost
from .learn import Batch, collate, learn
from .progress import Progress
from .ranks import ALONE, Ranks, Silent, shard_state, whole
from .record import Record
from .warmup import warm_up


class Stopped(RuntimeError):
    """The run was asked to end early."""


class Trainer:
    """A run: its model, optimizer, sampler and counters."""

    def __init__(self, config: Config, record: Record, progress: Progress, ranks: Ranks = ALONE):
        self.config = config
        self.ranks = ranks
        self.record: Any = record if ranks.leads else Silent()
        self.progress: Any = progress if ranks.leads else Silent()
        self.problems, self.heldout = arithmetic.split(config.seed, backwards=config.model is None)
        self.stream = arithmetic.Stream(self.problems, config.seed, "rollout")
        self.model, self.codec = models.build(config.model, config.seed, config.device)
        self.sampler = pyrlk.DynamicSampler(self._generate, config.group_size, config.groups)
        self.step = 0
        self.asked = 0  # problems given to the engine so far
        self.before = 0.0  # held-out accuracy after the warm-up
        self._published = -1  # the version that the engine has
        self._rewards: list[float] = []  # of everything generated in this step
        self._completed = self._small_state()

    def begin(self) -> None:
        """Step 0, before the engine is needed: rank 0 warms up on all threads, alone."""
        if self.ranks.leads:
            start = time.perf_counter()
            done = warm_up(
                self.model, self.codec, self.problems, self.config, self.progress.warm_up
            )
            seconds = time.perf_counter() - start
            self.record.metrics(
                {"step": 0, **{f"warmup_{k}": v for k, v in done._asdict().items()}}
            )
            self.record.timing({"step": 0, "warm_up": seconds})
        self._prepare()
        self.save()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, which any number of ranks may have written."""
        self.model.load_state_dict(state["model"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.asked, self.before = state["step"], state["asked"], state["before"]
        self._completed = self._small_state()
        self._prepare(state["optimizer"])

    def _prepare(self, state: dict[str, Any] | None = None) -> None:
        """Share the model out; the optimizer is of the shards, and so is its state."""
        if self.ranks.size > 1:
            fix(self.ranks.threads(self.config.threads))
        self.ranks.shard(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.config.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        if state is not None:
            self.optimizer.load_state_dict(state)
            shard_state(self.optimizer)

    def run(self, engine: Engine | None) -> float:
        """All steps that are left, on rank 0 with the engine; the held-out accuracy at the end."""
        self._engine = engine
        socket = self.ranks.told(lambda: self.engine.socket)
        self._source = self.model if self.ranks.size == 1 else weights.gather.dtensor(self.model)
        self._publisher = weights.Publisher(
            weights.Local(socket), group=self.ranks.group, timeout=SYNC_SECONDS
        )
        interrupted = _Interrupt()
        try:
            while self.step < self.config.steps:
                try:
                    self._step()
                except TooFewGroups as error:
                    self.progress.note(f"step {self.step + 1} finds nothing left to learn: {error}")
                    break
                if self.ranks.told(lambda: interrupted.seen):
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
            self._publisher.close()

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "rank 0 alone has the engine"
        return self._engine

    def _step(self) -> None:
        clock = _Clock()
        version = self.step
        update = self._sync(version)
        clock.lap("sync")
        heldout = None
        if version % self.config.eval_every == 0:
            heldout = self.ranks.told(self._judge)
        if version == 0 and heldout is not None:
            self.before = heldout
        clock.lap("judge")
        batch, line = self.ranks.told(self._collect)
        clock.lap("rollout")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_share(version)
        learned = learn(
            self.model, self.codec, self.optimizer, batch, self.config, version, self.ranks
        )
        clock.lap("learn")
        self.step += 1
        judged = {} if heldout is None else {"heldout": heldout}
        metrics = {"step": self.step, "version": version, **judged, **line, **learned}
        self.record.metrics(metrics)
        self.record.timing({"step": self.step, **clock.seconds, **update})
        self._completed = self._small_state()
        self.progress.step(metrics, clock.seconds)

    def _sync(self, version: int) -> dict[str, float]:
        """Give the engine the weights, of all ranks; seconds by stage."""
        self.ranks.told(lambda: self.engine.expect(version))
        try:
            report = self._publisher.update(self._source, version=version)
        except weights.UpdateError as error:
            said = f"{type(error).__name__}: {error}"
            raise self.ranks.told(lambda: self.engine.lost(said)) from error
        self.ranks.told(lambda: self.engine.taken())
        self._published = version
        return {f"update_{stage}": seconds for stage, seconds in report.seconds.items()}

    def _collect(self) -> tuple[Batch, dict[str, Any]]:
        """The batch of a step, and what is said of its making."""
        self._rewards.clear()
        generated, kept = self.sampler.generated, self.sampler.kept
        groups = next(self.sampler)
        return collate(groups), {
            "reward": _mean(self._rewards) if self._rewards else None,
            "generated": self.sampler.generated - generated,
            "kept": self.sampler.kept - kept,
        }

    def _finish(self) -> float:
        self.save()
        if self._published != self.step:  # a step that found nothing to learn has done so
            self._sync(self.step)
        after = self.ranks.told(self._judge)
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
        """A checkpoint of the last completed step: whole tensors, by rank 0."""
        self.record.save(
            {
                **self._completed,
                "model": whole(self.model.state_dict()),
                "optimizer": whole(self.optimizer.state_dict()),
                "config": dataclasses.asdict(self.config),
            }
        )

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
