"""The trainer's side: plan → pack into staging → hand over by handle → wait until it is applied.

check     version, names, shapes, dtypes: before a byte is packed
begin     each engine judges the update, or refuses it
send      its buckets, one after the other (local_session.py, sglang_session.py, sglang_plan.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import gather, wire
from .errors import EngineDirty, PeerLost, Timeout, UpdateError
from .packing import Plan, ShardedPlan, TensorPlan
from .ranks import Ranks
from .references import References
from .report import Clock, EngineReport, UpdateReport
from .session import Session, Target
from .source import ModuleState, NamedTensors, Sharded, Source, checked
from .staging import Mirrors

SELECTORS = ("all", "target", "draft")


class Publisher:
    """Hands the trainer's weights to its engines, one version at a time.

    Parameters
    ----------
    target : Local, SGLang, or a list of them
        The engine, or several.
    group : ProcessGroup, optional
        The ranks of the trainer: `update` and `ensure` are then collective over it, and end the
        same on each. Its rank 0 talks to the engines. Every rank makes the same Publisher.
    bucket_bytes : int
        Largest staging bucket; a larger tensor gets a bucket of its own.
    buffers : int
        Staging buckets in flight. An update of at most this many buckets is all or nothing.
    verify : {"copy", "off", "engine"}
        "copy": a 64-bit sum of every tensor is made while packing, checked by the receiver before
        it copies, and again over what it copied. "off": neither. "engine": "copy", and after the
        last copy the engine is asked what it holds. A `Receiver` on a module sums the module's own
        tensors. SGLang's /weights_checker hashes its fused tensors, which nobody can predict: they
        are compared with those of the engine that took the same tensors first, so that weights sent
        again (`ensure`) and all replicas of one layout must agree; the first is only remembered.
    timeout : float
        Seconds that any single wait may take.
    on_failure : {"isolate", "all"}
        Of several engines one fails. "isolate": the others are updated, `report.engines` tells, and
        only if all fail the first error is raised. "all": no engine is updated unless every one
        accepts, and the first error is raised; an engine that has the version by then keeps it.

    Notes
    -----
    A context manager; `close()` releases the staging memory. Not for use in a forked child.
    """

    def __init__(
        self,
        target: Target | Sequence[Target],
        *,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 512 << 20,
        buffers: int = 2,
        verify: str = "copy",
        timeout: float = 30.0,
        on_failure: str = "isolate",
    ):
        targets: list[Any] = list(target) if isinstance(target, list | tuple) else [target]
        for one in targets:
            if not isinstance(one, Target):
                raise TypeError(
                    "target must be weights.Local or weights.SGLang, or a list of them, got "
                    f"{type(one).__name__}"
                )
        if not targets or len(set(map(repr, targets))) != len(targets):
            raise ValueError("target: a list must not be empty and not name an engine twice")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup, got {type(group).__name__}")
        if on_failure not in ("isolate", "all"):
            raise ValueError(f'on_failure must be "isolate" or "all", got {on_failure!r}')
        _check_int("bucket_bytes", bucket_bytes, 1, 1 << 46)
        _check_int("buffers", buffers, 1, wire.MAX_SLOTS)
        if verify not in ("copy", "off", "engine"):
            raise ValueError(f'verify must be "copy", "off" or "engine", got {verify!r}')
        self._bucket_bytes = bucket_bytes
        self._buffers = buffers
        self._verify = wire.Verify[verify.upper()]
        self._references = References()
        self._timeout = wire.check_timeout(timeout)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._group = group
        self._ranks = None if group is None else Ranks(group, self._timeout)
        self._mirrors = None if self._ranks is None else Mirrors(self._ranks)
        self._plan: TensorPlan | ShardedPlan | None = None  # of the last update
        self._module: gather.Checkpoint | ModuleState | None = None
        self._last: _Last | None = None
        self._direct = all(one.direct for one in targets)
        self._several = isinstance(target, list | tuple)
        self._all_or_none = on_failure == "all"
        self._isolates = self._several and not self._all_or_none
        self._engines = [_Engine(one, self._timeout) for one in targets]
        self._finalizer = weakref.finalize(self, _close_sessions, self._engines, self._pid)

    @torch.no_grad()
    def update(
        self,
        named_tensors: NamedTensors | Sharded,
        *,
        version: int,
        partial: bool = False,
        selector: str = "all",
    ) -> UpdateReport:
        """Make the engine's weights equal to `named_tensors`, under the number `version`.

        Parameters
        ----------
        named_tensors : mapping, iterable of (name, tensor), nn.Module, or Sharded
            A module stands for its `state_dict()`, a transformers model for `gather.hf(module)`:
            the names of its checkpoint. Tensors that share memory are sent once. With `group=`:
            the same on every rank, of which rank 0's are sent; or a source of `weights.gather`
            whose tensors lie on the ranks in parts.
        version : int
            Must rise from update to update.
        partial : bool
            Allow names to be left out; the engine keeps those weights.
        selector : {"all", "target", "draft"}
            Which models of a speculating SGLang take the tensors.

        Raises
        ------
        UnknownName, MissingName, ShapeMismatch, DtypeMismatch, StaleVersion, EngineDirty
            Found before any byte was copied; the engine goes on with its old version.
        ChecksumMismatch, ApplyFailed, PeerLost, Timeout, ProtocolError, StagingError, Unsupported
            `error.dirty` says whether the engine may hold a mixture and needs a full update.
        RanksDisagree
            With `group=`: the ranks came with different versions or tensors. Nothing was touched.
        TypeError, ValueError
            An argument is not what it should be.
        """
        with self._lock:
            self._check_usable()
            clock = Clock()

            def prepare() -> tuple[Plan, _Last]:
                order = self._order(version, partial, selector)
                plan = self._plan_of(named_tensors, clock)
                return plan, _Last(order, self._remembered(named_tensors))

            def publish(plan: Plan, order: _Order) -> UpdateReport:
                return self._publish(self._engines, plan, order, clock)

            report, self._last = self._together("update", prepare, publish)
            return report

    @torch.no_grad()
    def ensure(self, version: int) -> UpdateReport | None:
        """Bring engines that missed the last update, or were restarted since, up to it.

        Parameters
        ----------
        version : int
            Of the last update; the weights must not have changed since. That update was a full one,
            and its module or tensors are still there.

        Returns
        -------
        UpdateReport or None
            None where every engine has the version.

        Raises
        ------
        ValueError
            Another version, or tensors that are gone.
        StaleVersion
            The weights have changed since `version`: send them under a new one. Found by the sums
            of the packed tensors, before they are handed over (not with verify="off").
        UpdateError
            As `update`.
        """
        with self._lock:
            self._check_usable()
            clock = Clock()

            def prepare() -> tuple[Plan, _Last]:
                _check_int("version", version, 0, 1 << 62)
                last = self._last
                if last is None or last.order.version != version:
                    known = "none" if last is None else str(last.order.version)
                    raise ValueError(
                        f"version must be that of the last update ({known}), got {version}"
                    )
                return self._plan_of(last.source(), clock), last

            def publish(plan: Plan, order: _Order) -> UpdateReport | None:
                late = self._late(order.version)
                if not late:
                    return None
                if order.partial:
                    raise EngineDirty(f"version {version} was partial: send a full update")
                plan.same_sums = True
                try:
                    return self._publish(late, plan, order, clock)
                finally:
                    plan.same_sums = False

            if self._ranks is None and self._last is not None and not self._late(version):
                return None
            return self._together("ensure", prepare, publish)[0]

    def release_staging(self) -> None:
        """Give the staging memory back until the next update, which allocates it anew.

        With `group=` collective. A `Receiver` unmaps its side when it polls next. SGLang in plan
        mode is stopped for a moment ("in_place"), so that its ranks do; that may raise as `update`
        does. After `close()` alone, what other ranks stage for their GPUs lives as long as they do.
        """
        with self._lock:
            self._check_usable()
            if self._ranks is None:
                self._release_staging()
                return
            mirrors, host = self._mirrors, torch.device("cpu")
            assert mirrors is not None
            self._ranks.run(
                {"call": "release_staging"},
                lead=self._release_staging,
                serve=lambda what: mirrors.serve(what, host),
            )

    def close(self) -> None:
        """End the session and free the staging memory; idempotent."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError("this Publisher is closed")
        if os.getpid() != self._pid:
            raise RuntimeError("a Publisher cannot be used in a forked child: make one there")

    def _order(self, version: int, partial: bool, selector: str) -> _Order:
        _check_int("version", version, 0, 1 << 62)
        if not isinstance(partial, bool):
            raise TypeError(f"partial must be a bool, got {type(partial).__name__}")
        if selector not in SELECTORS:
            raise ValueError(f"selector must be one of {SELECTORS}, got {selector!r}")
        return _Order(version, partial, self._verify, selector, self._buffers)

    def _release_staging(self) -> None:
        errors: list[UpdateError] = []
        released = []
        for engine in self._engines:
            try:
                if engine.session is not None and engine.session.alive():
                    engine.session.release_staging()
                    released.append(engine.target.address)
            except UpdateError as error:
                errors.append(error)
        if self._mirrors is not None:
            self._mirrors.free(released)
        if errors:
            raise errors[0]

    def _serve(self, plan: Plan, what: dict[str, Any]) -> dict[str, Any] | None:
        """Carry out an order of rank 0."""
        if "mirror" in what:
            assert self._mirrors is not None
            return self._mirrors.serve(what, plan.device)
        plan.serve(what, self._timeout)
        return None

    def _late(self, version: int) -> list[_Engine]:
        return [engine for engine in self._engines if not engine.has(version)]

    def _together(
        self,
        call: str,
        prepare: Callable[[], tuple[Plan, _Last]],
        publish: Callable[[Plan, _Order], Any],
    ) -> tuple[Any, _Last]:
        """Prepare on every rank, publish on rank 0; the same result or error on all of them."""
        if self._ranks is None:
            plan, last = prepare()
            try:
                return publish(plan, last.order), last
            finally:
                plan.forget_tensors()
        wish: dict[str, Any] | Exception
        try:
            plan, last = prepare()
            wish = self._wish(call, plan, last.order)
        except Exception as error:
            wish = error
        try:
            report = self._ranks.run(
                wish,
                lead=lambda: _as_json(publish(plan, last.order)),
                serve=lambda what: self._serve(plan, what),
            )
        finally:
            if not isinstance(wish, Exception):
                plan.forget_tensors()
        targets = [engine.target for engine in self._engines]
        return report and UpdateReport.from_json(report, targets), last

    def _wish(self, call: str, plan: Plan, order: _Order) -> dict[str, Any]:
        """What must be equal on every rank."""
        return {
            "call": call,
            "version": order.version,
            "partial": order.partial,
            "selector": order.selector,
            "verify": order.verify,
            "bucket_bytes": self._bucket_bytes,
            "engines": [engine.target.address for engine in self._engines],
            "named_tensors": plan.form(),
        }

    def _plan_of(self, named_tensors: NamedTensors | Sharded, clock: Clock) -> Plan:
        plan: Plan
        try:
            if isinstance(named_tensors, Sharded):
                plan = self._sharded_plan(named_tensors)
            else:
                plan = self._tensor_plan(named_tensors)
            plan.references = self._references
            return plan
        finally:
            clock.lap("plan")

    def _sharded_plan(self, source: Sharded) -> Plan:
        known = source.group
        if known is not None and dist.get_world_size(known) > 1:
            group = self._group
            if group is None or _members(known) != _members(group):
                raise ValueError(
                    "named_tensors lies on the ranks of a group: pass it as Publisher(…, group=)"
                )
        specs = source.specs()
        plan = self._plan
        if isinstance(plan, ShardedPlan) and plan.fits(source, specs):
            plan.take(source)
        else:
            self._plan = None  # an error below must not leave the old one
            self._plan = plan = ShardedPlan(source, specs, self._bucket_bytes, self._ranks)
            plan.mirrors = self._mirrors
        return plan

    def _tensor_plan(self, named_tensors: NamedTensors) -> Plan:
        if isinstance(named_tensors, nn.Module):
            if self._module is None or not self._module.of(named_tensors):
                known = gather.is_hf(named_tensors)
                self._module = (gather.Checkpoint if known else ModuleState)(named_tensors)
            source = Source(self._module.tensors())
        else:
            source = Source(checked(named_tensors))
        plan = self._plan
        if isinstance(plan, TensorPlan) and plan.fits(source, self._direct):
            plan.take(source)
        else:
            self._plan = None  # an error below must not leave the old one
            self._plan = plan = TensorPlan(source, self._bucket_bytes, self._direct)
        return plan

    def _publish(
        self, engines: list[_Engine], plan: Plan, order: _Order, clock: Clock
    ) -> UpdateReport:
        """Carry an order out on each engine."""
        entries = [EngineReport(engine.target) for engine in engines]
        try:
            if self._all_or_none:
                for engine in engines:
                    engine.begin(plan, order, clock)
            for batch in self._batches(zip(engines, entries, strict=True), plan):
                self._publish_to(batch, plan, order, clock.copy())
        except BaseException:
            for engine in engines:
                engine.cancel()
            raise
        done = [entry.report for entry in entries if entry.report is not None]
        if not done:
            raise next(entry.error for entry in entries if entry.error is not None)
        return dataclasses.replace(done[0], engines=entries) if self._several else done[0]

    def _batches(
        self, pairs: Iterable[tuple[_Engine, EngineReport]], plan: Plan
    ) -> Iterable[_Batch]:
        """Engines one by one, but those of one kind that are sent to jointly."""
        batches: dict[object, _Batch] = {}
        for engine, entry in pairs:
            with self._isolating(entry, plan):
                session = engine.connect()
                kind = type(session) if session.jointly else engine
                batches.setdefault(kind, []).append((engine, entry))
        return batches.values()

    def _publish_to(self, batch: _Batch, plan: Plan, order: _Order, clock: Clock) -> None:
        """One engine, or several that take each bucket at the same time."""
        ready: _Batch = []
        for engine, entry in batch:
            with self._isolating(entry, plan):
                if not self._all_or_none:
                    engine.begin(plan, order, clock)
                ready.append((engine, entry))
        if not ready:
            return
        sessions: list[Any] = [engine.session for engine, _ in ready]
        if not sessions[0].jointly:
            engine, entry = ready[0]
            with self._isolating(entry, plan):
                entry.report = engine.send(plan, order, clock)
            return
        verify = bool(order.verify)
        results = sessions[0].send_all(sessions, plan, verify, self._isolates, clock)
        for (engine, entry), result in zip(ready, results, strict=True):
            with self._isolating(entry, plan):
                entry.report = engine.take(result, plan, order, clock.copy())

    @contextlib.contextmanager
    def _isolating(self, entry: EngineReport, plan: Plan) -> Iterator[None]:
        """What goes wrong with one of several engines is noted, and the others go on."""
        try:
            yield
        except UpdateError as error:
            if not self._isolates or error is plan.failure:
                raise  # without weights nobody can be updated
            entry.error = error

    def _remembered(self, named_tensors: NamedTensors | Sharded) -> Callable[[], Any]:
        """Where `ensure` finds the tensors of an update; nothing is kept alive for it."""
        if isinstance(named_tensors, nn.Module | Sharded):
            source = weakref.ref(named_tensors)
            return lambda: _still_there(source())
        assert isinstance(self._plan, TensorPlan)
        names = self._plan.source.names
        references = list(map(weakref.ref, self._plan.source.tensors))
        return lambda: [(n, _still_there(r())) for n, r in zip(names, references, strict=True)]


@dataclass(frozen=True)
class _Order:
    """What an update asks of every engine."""

    version: int
    partial: bool
    verify: wire.Verify
    selector: str
    buffers: int


@dataclass(frozen=True)
class _Last:
    """The last update, for `ensure`."""

    order: _Order
    source: Callable[[], NamedTensors]


def _still_there(thing: Any) -> Any:
    if thing is None:
        raise ValueError("version: its tensors are gone; call update with the weights")
    return thing


class _Engine:
    """One target: its session, and what was last published to it."""

    def __init__(self, target: Target, timeout: float):
        self.target = target
        self.session: Session | None = None
        self._timeout = timeout
        self._boot: bytes | None = None  # of the engine that took our last update
        self._version = -1

    def begin(self, plan: Plan, order: _Order, clock: Clock) -> None:
        """Connect, let the engine judge the update, and have staging memory ready."""
        session = self.connect()
        clock.lap("connect")
        if order.partial and self._boot not in (None, session.boot):
            raise EngineDirty(
                "the engine was restarted and has lost its version: send a full update first"
            )
        with self._dropping(session):
            session.begin(plan.layout, order.version, order.partial, order.verify, order.selector)
            clock.lap("check")
            session.stage(plan, order.buffers)
            clock.lap("stage")

    def send(self, plan: Plan, order: _Order, clock: Clock) -> UpdateReport:
        session = self.session
        assert session is not None  # begin() comes first
        with self._dropping(session):
            applied = session.send(plan, bool(order.verify), clock)
        return self._updated(session, applied, plan, order, clock)

    def take(
        self, result: wire.Applied | UpdateError, plan: Plan, order: _Order, clock: Clock
    ) -> UpdateReport:
        """What sending to several engines at once has come to in this one."""
        session = self.session
        assert session is not None
        with self._dropping(session):
            if isinstance(result, UpdateError):
                raise result
        return self._updated(session, result, plan, order, clock)

    def _updated(
        self, session: Session, applied: wire.Applied, plan: Plan, order: _Order, clock: Clock
    ) -> UpdateReport:
        self._boot, self._version = session.boot, order.version
        outcome = session.outcome(plan.layout)
        clock.seconds["verify"] = applied.verify_seconds
        clock.seconds["copy"] = applied.copy_seconds
        clock.seconds["total"] = clock.total()
        return UpdateReport(
            version=order.version,
            tensors=outcome.tensors,
            planned=outcome.planned,
            fallback=outcome.fallback,
            bytes=plan.layout.nbytes,
            buckets=len(plan.layout.buckets),
            seconds=clock.seconds,
            mode=outcome.mode,
            names_from=outcome.names_from,
        )

    def cancel(self) -> None:
        """Leave an update that was begun and not sent: the engine goes on as it was."""
        session = self.session
        if session is not None and not session.settled:
            self.session = None
            session.cancel()

    def has(self, version: int) -> bool:
        """Whether the engine took that version from us and still runs."""
        if self.session is None or not self.session.alive() or self._version != version:
            return False
        return self.session.boot == self._boot and self.session.holds(version)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None

    @contextlib.contextmanager
    def _dropping(self, session: Session) -> Iterator[None]:
        """An error inside a transaction ends the session."""
        try:
            yield
        except BaseException as error:
            if not session.settled:
                self._drop(session)
            if isinstance(error, PeerLost | Timeout):
                error.dirty = session.handed_over  # nobody is left to ask
            raise

    def connect(self) -> Session:
        if self.session is not None and not self.session.alive():
            self._drop(self.session)
        if self.session is None:
            # A first engine may still be starting; one that was here and is gone is an error now.
            patience = self._timeout if self._boot is None else 0.0
            self.session = self.target.open(patience, self._timeout)
        return self.session

    def _drop(self, session: Session) -> None:
        self.session = None
        session.abandon()


_Batch = list[tuple[_Engine, EngineReport]]


def _members(group: dist.ProcessGroup) -> set[int]:
    return set(dist.get_process_group_ranks(group))


def _as_json(report: UpdateReport | None) -> dict[str, Any] | None:
    return None if report is None else report.to_json()


def _close_sessions(engines: list[_Engine], pid: int) -> None:
    if os.getpid() == pid:
        for engine in engines:
            engine.close()


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
