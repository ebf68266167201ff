"""What the publisher asks of an engine: a target that opens, and a session that updates.

open → (begin → stage → send)*  → close            one session, many updates
"""

from __future__ import annotations

import abc
from typing import Protocol

import torch

from . import layout as layouts
from . import wire
from .packing import Plan
from .report import Clock, Outcome


class Session(Protocol):
    """A connection to an engine. In an update: begin, stage, send; each may raise."""

    settled: bool  # nothing of a transaction is under way
    handed_over: bool  # the engine may have begun to copy

    @property
    def boot(self) -> bytes: ...  # another one means a restarted engine
    def alive(self) -> bool: ...
    def begin(
        self, layout: layouts.Layout, version: int, partial: bool, verify: bool, selector: str
    ) -> None: ...
    def stage(self, layout: layouts.Layout, device: torch.device, buffers: int) -> None: ...
    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied: ...
    def outcome(self, layout: layouts.Layout) -> Outcome: ...
    def release_staging(self) -> None: ...  # between updates
    def close(self) -> None: ...  # politely
    def abandon(self) -> None: ...  # at once


class Target(abc.ABC):
    """Where weights go."""

    direct = False  # can read the trainer's own memory

    @abc.abstractmethod
    def open(self, patience: float, timeout: float) -> Session:
        """Connect, waiting up to `patience` seconds for an engine that is still starting."""
