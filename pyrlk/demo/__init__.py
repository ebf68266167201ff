"""`pyrlk demo`: DAPO post-training of a small language model, every part of pyrlk in one run.

    warm-up        cross-entropy on a careless teacher, to a policy that is sometimes right
    rollout        a second process draws with pyrlk.sample
    reward         verified arithmetic, soft overlong penalty, informative groups, group advantages
    learn          pyrlk.policy_loss, AdamW
    weights        pyrlk.weights, by handle, with a version; and again

engine (second process) · trainer (the loop) · learn · warmup · rollout · arithmetic · record
ranks (under torchrun: FSDP2 over the processes of a run)
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .ranks import ALONE, Ranks

if TYPE_CHECKING:
    from .config import Config


class Failed(Exception):
    """The run ended early; the message is one line for the user."""


class Result(NamedTuple):
    before: float
    after: float
    steps: int


def run(config: Config, folder: Path, *, resume: bool = False, ranks: Ranks = ALONE) -> Result:
    """Train as `config` says, with all files in `folder`. With `resume`, go on from its checkpoint.

    Every one of `ranks` calls this; rank 0 has the engine, the files and the screen.

    Raises
    ------
    Failed
        The engine or a rank was lost, or the user interrupted; the checkpoint holds the last step
        that was saved.
    """
    from .determinism import fix, usable_cores
    from .engine import Engine, EngineLost
    from .plot import picture
    from .progress import Progress
    from .record import Record
    from .trainer import Stopped, Trainer

    # A sum's rounding depends on the number of threads: a resumed run keeps its own.
    config = dataclasses.replace(config, threads=config.threads or usable_cores())
    fix(config.threads)
    record = Record(folder)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config))
        engine = stack.enter_context(Engine(config)) if ranks.leads else None
        if engine is not None:
            progress.note(f"engine: process {engine.pid}; files: {folder}")
        trainer = Trainer(config, record, progress, ranks)
        try:
            if resume:
                trainer.resume(record.load())
                trainer.record.rewind(trainer.step)
                trainer.progress.note(f"resumed after step {trainer.step}")
            else:
                trainer.record.begin()
                trainer.begin()
            after = trainer.run(engine)
        except (EngineLost, Stopped) as error:
            raise Failed(
                f"{error}; step {trainer.step} is saved in {record.checkpoint_path}: "
                "the same command with --resume continues"
            ) from error
        if ranks.leads:
            picture(record)
    return Result(trainer.before, after, trainer.step)
