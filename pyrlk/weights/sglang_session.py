"""An update of one SGLang server: the checks before it, the steps around it, and bucket mode.

    begin   look → check → pause → flush → mark → open the engine's session
    send    buckets → close the session → version → continue

Until a byte may have been copied, an error takes all of it back.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import layout as layouts
from . import manifest, memory, sglang_payload, wire
from .errors import EngineDirty, StagingError, StaleVersion, UpdateError
from .publisher import Clock, Outcome, Plan
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

    @property
    def boot(self) -> bytes:
        return self._info.boot

    def alive(self) -> bool:
        return True

    def begin(
        self, layout: layouts.Layout, version: int, partial: bool, verify: bool, selector: str
    ) -> None:
        """Check everything, then stop the engine and open its session."""
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
        self._selector, self._version = selector, version
        sent = self._select(layout, partial)
        self.settled = self.handed_over = self._begun = False
        with self._undoing(None if dirty else current):
            self._server.pause(self._settings.pause)
            if self._settings.pause != "in_place":
                self._server.flush()
            self._durable = self._server.set_version(f"{DIRTY}{version}")
            self._server.begin(selector, recover=dirty)
            self._begun = True
            self._opened(sent, version, partial, verify)
        self._previous = None if dirty else current

    def outcome(self, layout: layouts.Layout) -> Outcome:
        names = [layout.entries[i].name for part in self._chosen for i in part]
        return Outcome(
            mode=self.mode,
            names_from=self._names().source,
            tensors=len(names),
            planned=0,
            fallback=dict.fromkeys(names, "bucket mode: SGLang's load_weights"),
        )

    def release_staging(self) -> None:
        """Nothing is kept between updates, unless a mode says so."""

    def close(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Leave the server as it is: paused and marked, if an update was under way."""
        self._server.close()
        self._lock.close()

    def _finish(self) -> None:
        """Every rank has the new weights: make the version visible and go on."""
        self._server.end()
        if self._durable:
            self._server.set_version(str(self._version))
        self._server.resume()
        self.settled = True

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
                if self._begun:
                    self._server.end()
                if self._durable:
                    self._server.set_version(previous)
                self._server.resume()
                self.settled = True
            raise

    def _opened(self, layout: layouts.Layout, version: int, partial: bool, verify: bool) -> None:
        """The engine's session is open; nothing has been copied."""

    def _restarted(self, info: Info) -> None:
        self._info = info
        self._sent = None
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
    """Buckets through shared memory files, one request each."""

    mode = "bucket"

    def __init__(self, settings: Settings, server: Server, info: Info):
        super().__init__(settings, server, info)
        self._segment: memory.Segment | None = None

    def stage(self, layout: layouts.Layout, device: torch.device, buffers: int) -> None:
        """One buffer: a request returns when the server has read it."""
        if self._segment is not None and self._segment.nbytes >= layout.slot_bytes:
            return
        self._release()
        if not layout.slot_bytes:
            return
        with self._undoing(self._previous):
            self._segment = _shared_segment(layout.slot_bytes)

    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied:
        threads = torch.get_num_threads()
        layout = plan.layout
        last = len(plan.copies) - 1
        for bucket, copies in enumerate(plan.copies):
            assert self._segment is not None
            with self._undoing(self._previous):
                self._segment.pack(copies, checksum=False, threads=threads)
                entries = [layout.entries[i] for i in self._chosen[bucket]]
                flat = self._segment.flat[: layout.buckets[bucket]]
                payloads = [
                    sglang_payload.bucket_payload(flat, entries) for _ in range(self._info.tp_size)
                ]
            clock.lap("pack")
            self.handed_over = True
            late = str(self._version) if not self._durable and bucket == last else None
            with self._undoing(None):
                self._server.update(payloads, "flattened_bucket", self._selector, late)
            clock.lap("hand-over")
        with self._undoing(None):
            self._finish()
        clock.lap("finish")
        return wire.Applied(self._version, 0.0, 0.0)

    def release_staging(self) -> None:
        self._release()

    def abandon(self) -> None:
        super().abandon()
        self._release()

    def _restarted(self, info: Info) -> None:
        super()._restarted(info)
        self._release()  # an engine that died in the middle may have left its counts

    def _release(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None


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
