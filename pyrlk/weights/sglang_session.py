"""An update of one SGLang server: the checks before it, the steps around it, and bucket mode.

    begin   look → check → pause → flush → mark → open the engine's session
    send    buckets → close the session → version → continue

Until a byte may have been copied, an error takes all of it back.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import layout as layouts
from . import manifest, memory, sglang_payload, wire
from .errors import EngineDirty, StagingError, StaleVersion, UpdateError
from .packing import Plan
from .references import state_after
from .report import Clock, Outcome
from .sglang_server import DIRTY, Info, Lock, Server


@dataclass(frozen=True)
class Settings:
    """Those of `SGLang` that hold for every update."""

    pause: str
    expect: Any
    unchecked_names: bool


class ServerSession:
    """What both modes share: the checks before, and the steps around, the hand-over."""

    mode = ""
    jointly = False
    engine_checks = False  # names, by the engine itself

    def __init__(self, settings: Settings, server: Server, info: Info):
        self.settled = True
        self.handed_over = False
        self._settings = settings
        self._server = server
        self._info = info
        self._lock = Lock(server.url)
        self._manifests: dict[str, manifest.Manifest] = {}  # by selector
        self._chosen: list[list[int]] = []
        self._sent: tuple[tuple, layouts.Layout] | None = None
        self._selector = "all"
        self._version = -1
        self._begun = False
        self._durable = True
        self._asks = self._partial = False
        self._state: bytes | None = None  # of the engine's weights, with verify="engine"
        self._applied = ""  # the version that this session left
        self._previous: str | None = None  # the version before this update; None: dirty

    @property
    def boot(self) -> bytes:
        return self._info.boot

    def alive(self) -> bool:
        return True

    def holds(self, version: int) -> bool:
        """A restarted server answers under another version, and has another boot."""
        try:
            same = self._server.info().boot == self._info.boot
            return same and self._server.version() == str(version)
        except UpdateError:
            return False

    def begin(
        self,
        layout: layouts.Layout,
        version: int,
        partial: bool,
        verify: wire.Verify,
        selector: str,
    ) -> None:
        """Check everything, then stop the engine and open its session."""
        self._asks = verify is wire.Verify.ENGINE
        if self._asks:
            self._server.require_checker()
        info = self._server.info()
        if info.boot != self._info.boot:
            self._restarted(info)
            if partial:
                raise EngineDirty(
                    "the server was restarted and has lost its version: send a full update first"
                )
        current = self._server.version()
        dirty = current.startswith(DIRTY)
        if dirty and partial:
            raise EngineDirty(
                f"an update broke off in {self._server.url} (version {current}): send a full "
                "update before a partial one"
            )
        if not dirty and current.isdecimal() and version <= int(current):
            raise StaleVersion(f"version {version} is not above {current}, which the server has")
        if selector != self._selector or current != self._applied:
            self._state = None  # what it was is not known, or of other models
        self._selector, self._version, self._partial = selector, version, partial
        sent = self._select(layout, partial)
        self.settled = self.handed_over = self._begun = False
        self._previous = None if dirty else current
        with self._undoing(self._previous):
            self._enter(self._settings.pause, recover=dirty)
            self._opened(sent, version, partial, verify)

    def outcome(self, layout: layouts.Layout) -> Outcome:
        names = [layout.entries[i].name for part in self._chosen for i in part]
        return Outcome(
            mode=self.mode,
            names_from=self._names().source,
            tensors=len(names),
            planned=0,
            fallback=dict.fromkeys(names, "bucket mode: SGLang's load_weights"),
        )

    def give_up(self, error: UpdateError) -> UpdateError:
        """Take the update back where nothing was handed over; `error` then says if it was."""
        try:
            with self._undoing(self._previous):
                raise error
        except UpdateError as known:
            return known

    def release_staging(self) -> None:
        """Nothing is kept between updates, unless a mode says so."""

    def cancel(self) -> None:
        with contextlib.suppress(UpdateError), self._undoing(self._previous):
            raise UpdateError("cancelled")
        self.abandon()

    def close(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Leave the server as it is: paused and marked, if an update was under way."""
        self._server.close()
        self._lock.close()

    def _enter(self, pause: str, *, recover: bool) -> None:
        """Stop the engine, mark it, and open its session."""
        self._server.pause(pause)
        if pause != "in_place":
            self._server.flush()
        self._durable = self._server.set_version(f"{DIRTY}{self._version}")
        self._server.begin(self._selector, recover)
        self._begun = True

    def _leave(self, version: str) -> None:
        """Close the session, and let the engine go on under a version."""
        if self._begun:
            self._server.end()
            self._begun = False
        if self._durable:
            self._server.set_version(version)
        self._server.resume()
        self.settled = True

    def _finish(self, plan: Plan) -> None:
        """Every rank has the new weights: make the version visible and go on."""
        if self._asks:
            self._server.end()
            self._begun = False
            self._ask(plan)
        self._leave(str(self._version))
        self._applied = str(self._version)

    def _ask(self, plan: Plan) -> None:
        """Whether the engine holds what the same tensors made of another one, or of itself."""
        before, self._state = self._state, None
        if self._partial and before is None:
            return  # onto weights that we did not bring: nothing to compare with
        before = before if self._partial else None
        state = state_after(before, self._selector, plan.content())
        layout = *self._info.layout, self._selector
        found = self._server.checksums(self._selector)
        plan.references.check(layout, state, self._server.url, found)
        self._state = state

    @contextlib.contextmanager
    def _undoing(self, previous: str | None) -> Iterator[None]:
        """Nothing was copied: on an error end the session and go on under the old version."""
        try:
            yield
        except UpdateError as error:
            if previous is None or self.handed_over:
                # The engine was dirty before: it stays paused, and says so.
                error.dirty = True
                raise
            with contextlib.suppress(UpdateError):
                self._leave(previous)
            raise

    def _opened(
        self, layout: layouts.Layout, version: int, partial: bool, verify: wire.Verify
    ) -> None:
        """The engine's session is open; nothing has been copied."""

    def _restarted(self, info: Info) -> None:
        self._info = info
        self._sent = self._state = None
        self._manifests.clear()

    def _select(self, layout: layouts.Layout, partial: bool) -> layouts.Layout:
        """The layout without the names that the engine need not hear of."""
        key = layout.digest, partial, self._selector
        if self._sent is None or self._sent[0] != key:
            dtype = manifest.engine_dtype(self._info.dtype)
            self._chosen = self._names().select(layout, partial, dtype)
            keep = {i for part in self._chosen for i in part}
            entries = tuple(e for i, e in enumerate(layout.entries) if i in keep or not e.nbytes)
            self._sent = key, layouts.Layout(entries, layout.buckets, layout.segments)
        return self._sent[1]

    def _names(self) -> manifest.Manifest:
        if self._selector not in self._manifests:
            info = self._info
            draft = info.draft_path or info.model_path
            paths = {"target": [info.model_path], "draft": [draft]}
            self._manifests[self._selector] = manifest.learn(
                self._settings.expect,
                paths.get(self._selector, [info.model_path, *([draft] if info.drafts else [])]),
                unchecked=self._settings.unchecked_names,
                engine_checks=self.engine_checks,
            )
        return self._manifests[self._selector]


class BucketSession(ServerSession):
    """Buckets through shared memory files, one request each.

    A request returns when the server has read its bucket; meanwhile the next one is filled.
    """

    mode = "bucket"

    def __init__(self, settings: Settings, server: Server, info: Info, timeout: float):
        super().__init__(settings, server, info)
        self._timeout = timeout
        self._segments: list[memory.Segment] = []

    def stage(self, plan: Plan, buffers: int) -> None:
        layout = plan.layout
        wanted = min(buffers, layout.staged, 2)
        large = all(s.nbytes >= layout.slot_bytes for s in self._segments)
        if len(self._segments) >= wanted and large:
            return
        self._release()
        with self._undoing(self._previous):
            for _ in range(wanted):
                self._segments.append(_shared_segment(layout.slot_bytes))

    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied:
        count = plan.layout.staged
        with self._undoing(self._previous):
            with concurrent.futures.ThreadPoolExecutor(1, "pyrlk-post") as thread:
                request: concurrent.futures.Future[None] | None = None
                for bucket in range(count):
                    segment = self._segments[bucket % len(self._segments)]
                    if request is not None and len(self._segments) == 1:
                        request.result()
                    plan.start(bucket, segment, verify).wait(self._timeout)
                    clock.lap("pack")
                    if request is not None:
                        request.result()
                    # Made now: what a payload counts, somebody must read.
                    payloads = self._payloads(plan.layout, bucket, segment)
                    late = str(self._version) if not self._durable and bucket + 1 == count else None
                    self.handed_over = True
                    request = thread.submit(
                        self._server.update, payloads, "flattened_bucket", self._selector, late
                    )
                    clock.lap("hand-over")
                if request is not None:
                    request.result()
            clock.lap("hand-over")
            self._finish(plan)
        clock.lap("finish")
        return wire.Applied(self._version, 0.0, 0.0)

    def release_staging(self) -> None:
        self._release()

    def abandon(self) -> None:
        super().abandon()
        self._release()

    def _payloads(self, layout: layouts.Layout, bucket: int, segment: memory.Segment) -> list[str]:
        """One a tensor-parallel rank; what is in them is counted, so each must be read."""
        entries = [layout.entries[i] for i in self._chosen[bucket]]
        flat = segment.flat[: layout.buckets[bucket]]
        return [sglang_payload.bucket_payload(flat, entries) for _ in range(self._info.tp_size)]

    def _restarted(self, info: Info) -> None:
        super()._restarted(info)
        self._release()  # an engine that died in the middle may have left its counts

    def _release(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments = []


def _shared_segment(nbytes: int) -> memory.Segment:
    try:
        buffer = sglang_payload.SharedBuffer(nbytes)
    except RuntimeError as error:
        raise StagingError(
            f"shared memory (/dev/shm): {error}; lower bucket_bytes, or give the container more "
            "(docker run --shm-size)"
        ) from None
    handle = memory.Handle(memory.Kind.HOST, nbytes, secrets.token_bytes(16))
    return memory.Segment(handle, buffer.flat, buffer.close)
