"""What the publisher asks of an engine: a target that opens, and a session that updates.

open → (begin → stage → send)*  → close            one session, many updates
"""

from __future__ import annotations

import abc
from typing import Any, Protocol

from . import layout as layouts
from . import wire
from .errors import UpdateError
from .packing import Plan
from .report import Clock, Outcome


class Session(Protocol):
    """A connection to an engine. In an update: begin, stage, send; each may raise."""

    jointly: bool  # sent to together with others of its kind; see JointSession
    settled: bool  # nothing of a transaction is under way
    handed_over: bool  # the engine may have begun to copy

    @property
    def boot(self) -> bytes: ...  # another one means a restarted engine
    def alive(self) -> bool: ...
    def holds(self, version: int) -> bool: ...  # of those that this session brought
    def begin(
        self,
        layout: layouts.Layout,
        version: int,
        partial: bool,
        verify: wire.Verify,
        selector: str,
    ) -> None: ...
    def stage(self, plan: Plan, buffers: int) -> None: ...
    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied: ...
    def outcome(self, layout: layouts.Layout) -> Outcome: ...
    def release_staging(self) -> None: ...  # between updates
    def cancel(self) -> None: ...  # begun and not sent: the engine goes on as it was
    def close(self) -> None: ...  # politely
    def abandon(self) -> None: ...  # at once


class JointSession(Session, Protocol):
    """A session whose engines take each bucket at the same time."""

    @staticmethod
    def send_all(
        sessions: list[Any], plan: Plan, verify: bool, isolate: bool, clock: Clock
    ) -> list[wire.Applied | UpdateError]: ...


class Target(abc.ABC):
    """Where weights go."""

    direct = False  # can read the trainer's own memory

    @property
    @abc.abstractmethod
    def address(self) -> str:
        """Of the engine; equal on every rank of a trainer."""

    @abc.abstractmethod
    def open(self, patience: float, timeout: float) -> Session:
        """Connect, waiting up to `patience` seconds for an engine that is still starting."""
