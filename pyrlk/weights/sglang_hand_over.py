"""Plan mode's buckets: each packed or gathered once, and read by the ranks of several engines.

    a free slot → pack, or gather → BUCKET to every rank of every engine → all ACKs free the slot

Engines take an update in step. One that fails is left behind; the others go on without it.
"""

from __future__ import annotations

import collections
import operator
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from . import memory, wire
from .errors import UpdateError
from .packing import Plan
from .report import Clock
from .staging import Need, Staging


class Engine(Protocol):
    """What is asked of an engine whose ranks have checked the update; each step may raise."""

    buffers: int
    timeout: float
    staging: Staging
    handed_over: bool

    @property
    def url(self) -> str: ...
    @property
    def gpus(self) -> set[bytes]: ...  # of its processes
    def retire(self) -> None: ...  # they close the ring
    def open(self, staging: Staging) -> None: ...
    def announce(self, message: wire.Bucket) -> None: ...
    def await_reads(self, slot: int, deadline: float) -> None: ...
    def await_applied(self) -> None: ...
    def finish(self, plan: Plan) -> wire.Applied: ...  # and go on under the new version
    def give_up(self, error: UpdateError) -> UpdateError: ...


class HandOver:
    """One update of several engines.

    Parameters
    ----------
    engines : sequence of Engine
    plan : Plan
    isolate : bool
        False: until a byte was handed over, an engine that fails stops all.
    """

    def __init__(self, engines: Sequence[Engine], plan: Plan, isolate: bool):
        self._engines, self._plan, self._isolate = list(engines), plan, isolate
        self._left = list(engines)
        self._results: dict[Engine, wire.Applied | UpdateError] = {}
        self._ring = memory.Ring([])
        self._busy: collections.deque[memory.Slot] = collections.deque()  # the oldest first

    def run(self, verify: bool, clock: Clock) -> list[wire.Applied | UpdateError]:
        """What became of each engine."""
        try:
            self._run(verify, clock)
        except UpdateError as error:
            for engine in self._left:
                self._results[engine] = engine.give_up(error)
        return [self._results[engine] for engine in self._engines]

    def _run(self, verify: bool, clock: Clock) -> None:
        self._stage()
        clock.lap("stage")
        for bucket in range(self._plan.layout.staged):
            slot = self._free_slot()
            clock.lap("load")
            if not self._left:
                return
            slot.fill()
            timeout = min(engine.timeout for engine in self._left)
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

    def _finish(self, engine: Engine) -> None:
        self._results[engine] = engine.finish(self._plan)
        self._left.remove(engine)

    def _stage(self) -> None:
        """One ring for all, open in every rank: that of any of the engines, if it will do."""
        need = self._need()
        staging = next((e.staging for e in self._left if e.staging.fits(need)), None)
        if staging is None:
            self._each(operator.methodcaller("retire"))
            staging = Staging()
            staging.build(self._need())
        self._each(operator.methodcaller("open", staging))
        self._ring = staging.ring

    def _need(self) -> Need:
        buffers = min((engine.buffers for engine in self._left), default=0)
        readers = (gpu for engine in self._left for gpu in engine.gpus)
        return self._plan.need(buffers, (engine.url for engine in self._left), readers)

    def _free_slot(self) -> memory.Slot:
        slot = self._ring.free_slot()
        if slot is None:
            patience = min((engine.timeout for engine in self._left), default=0.0)
            deadline = time.monotonic() + patience
            self._each(operator.methodcaller("await_reads", self._busy[0].index, deadline))
            slot = self._freed()
        return slot

    def _freed(self) -> memory.Slot:
        """The oldest slot, which everybody has read."""
        slot = self._busy.popleft()
        self._ring.ack(slot.index, slot.generation)
        return slot

    def _each(self, step: Callable[[Engine], object]) -> None:
        """A step on every engine that is left; without those on which it fails."""
        for engine in list(self._left):
            try:
                step(engine)
            except UpdateError as error:
                if not (self._isolate or any(one.handed_over for one in self._left)):
                    raise
                self._left.remove(engine)
                self._results[engine] = engine.give_up(error)
