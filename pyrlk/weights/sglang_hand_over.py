"""Plan mode's buckets: each packed or gathered once, and read by the ranks of several engines.

    a free slot → pack, or gather → BUCKET to every rank of every engine → all ACKs free the slot

Engines take an update in step. One that fails is left behind; the others go on without it.
"""

from __future__ import annotations

import collections
import operator
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import memory, wire
from .errors import UpdateError
from .packing import Plan
from .report import Clock
from .staging import Staging

if TYPE_CHECKING:
    from .sglang_plan import PlanSession


class HandOver:
    """One update of several engines whose ranks have checked it.

    Parameters
    ----------
    sessions : sequence of PlanSession
    plan : Plan
    isolate : bool
        False: until a byte was handed over, an engine that fails stops all.
    """

    def __init__(self, sessions: Sequence[PlanSession], plan: Plan, isolate: bool):
        self._sessions, self._plan, self._isolate = list(sessions), plan, isolate
        self._left = list(sessions)
        self._results: dict[PlanSession, wire.Applied | UpdateError] = {}
        self._ring = memory.Ring([])
        self._busy: collections.deque[memory.Slot] = collections.deque()  # the oldest first

    def run(self, verify: bool, clock: Clock) -> list[wire.Applied | UpdateError]:
        """What became of each engine."""
        try:
            self._run(verify, clock)
        except UpdateError as error:
            for session in self._left:
                self._results[session] = session.give_up(error)
        return [self._results[session] for session in self._sessions]

    def _run(self, verify: bool, clock: Clock) -> None:
        self._stage()
        clock.lap("stage")
        for bucket in range(self._plan.layout.staged):
            slot = self._free_slot()
            clock.lap("load")
            if not self._left:
                return
            slot.fill()
            timeout = min(session.timeout for session in self._left)
            sums = self._plan.start(bucket, slot.segment, verify).wait(timeout)
            slot.ready()
            self._busy.append(slot)
            clock.lap("pack")
            message = wire.Bucket(bucket, slot.index, slot.generation, tuple(sums or ()))
            self._each(operator.methodcaller("announce", message))
            clock.lap("hand-over")
        self._each(operator.methodcaller("await_applied"))
        while self._busy:
            self._freed()
        clock.lap("load")
        self._each(self._finish)
        clock.lap("finish")

    def _finish(self, session: PlanSession) -> None:
        self._results[session] = session.finish(self._plan)
        self._left.remove(session)

    def _stage(self) -> None:
        """One ring for all, open in every rank: that of any of the engines, if it will do."""
        staging = self._fitting()
        if staging is None:
            self._each(operator.methodcaller("retire"))
            staging = Staging()
            staging.build(
                self._plan,
                min((session.buffers for session in self._left), default=0),
                [session.url for session in self._left],
                self._readers(),
            )
        self._each(operator.methodcaller("open", staging))
        self._ring = staging.ring

    def _fitting(self) -> Staging | None:
        engines = [session.url for session in self._left]
        for session in self._left:
            staging = session.staging
            if staging.fits(self._plan, session.buffers, engines, self._readers()):
                return staging
        return None

    def _readers(self) -> set[bytes]:
        return {gpu for session in self._left for gpu in session.gpus}

    def _free_slot(self) -> memory.Slot:
        slot = self._ring.free_slot()
        if slot is None:
            deadline = time.monotonic() + min((s.timeout for s in self._left), default=0.0)
            self._each(operator.methodcaller("await_reads", self._busy[0].index, deadline))
            slot = self._freed()
        return slot

    def _freed(self) -> memory.Slot:
        """The oldest slot, which everybody has read."""
        slot = self._busy.popleft()
        self._ring.ack(slot.index, slot.generation)
        return slot

    def _each(self, step: Callable[[PlanSession], object]) -> None:
        """A step on every engine that is left; without those on which it fails."""
        for session in list(self._left):
            try:
                step(session)
            except UpdateError as error:
                if not (self._isolate or any(one.handed_over for one in self._left)):
                    raise
                self._left.remove(session)
                self._results[session] = session.give_up(error)
