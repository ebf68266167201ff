"""What an update did, engine by engine, and where its time went."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import UpdateError, heard, said

if TYPE_CHECKING:
    from .session import Target


@dataclass(frozen=True)
class Outcome:
    """How an engine took the tensors of an update; see UpdateReport."""

    mode: str
    names_from: str
    tensors: int
    planned: int
    fallback: dict[str, str]


@dataclass
class UpdateReport:
    """What one update did; `str()` is a table.

    Attributes
    ----------
    version : of the engine now
    tensors : names sent, aliases included
    planned : tensors copied straight into the engine's own
    fallback : tensors that went through the engine's load_weights instead, with the reason
    bytes : handed over; an alias counts once
    buckets : staging buckets they took
    seconds : by stage; `verify` and `copy` were spent by the receiver, inside `wait`
    mode : "bucket": packed into staging buckets; "plan": and replayed by SGLang's loader;
        "direct": read from the trainer's own memory, nothing packed; "direct+bucket": some of it
    names_from : what names were checked against: "module", "expected", "expect", "checkpoint",
        "engine" or "unchecked"
    engines : with a list of targets, what became of each; the figures above are of the first that
        has the new version
    """

    version: int
    tensors: int
    planned: int
    fallback: dict[str, str]
    bytes: int
    buckets: int
    seconds: dict[str, float] = field(default_factory=dict)
    mode: str = "bucket"
    names_from: str = "module"
    engines: list[EngineReport] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.bytes / self.seconds["total"] / 1e9 if self.seconds.get("total") else 0.0
        rows = [
            ("version", str(self.version)),
            ("tensors", f"{self.tensors} ({self.planned} planned, {len(self.fallback)} fallback)"),
            ("names from", self.names_from),
            ("mode", self.mode),
            ("buckets", str(self.buckets)),
            ("bytes", f"{self.bytes:,} ({rate:.2f} GB/s)"),
            *((stage, f"{value * 1e3:.2f} ms") for stage, value in self.seconds.items()),
            *(
                (str(e.target), "updated" if e.error is None else repr(e.error))
                for e in self.engines
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def to_json(self) -> dict[str, Any]:
        """For the other ranks of a trainer; without targets, which they have."""
        return dataclasses.asdict(dataclasses.replace(self, engines=[])) | {
            "engines": [
                {
                    "target": entry.target.address,
                    "report": entry.report and entry.report.to_json(),
                    "error": entry.error and said(entry.error),
                }
                for entry in self.engines
            ]
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any], targets: Sequence[Target]) -> UpdateReport:
        engines = [
            EngineReport(
                next(target for target in targets if target.address == entry["target"]),
                entry["report"] and cls.from_json(entry["report"], targets),
                entry["error"] and _engine_error(entry["error"]),
            )
            for entry in raw["engines"]
        ]
        return cls(**(raw | {"engines": engines}))


@dataclass
class EngineReport:
    """One of several engines: `report` if it has the new version, else `error` says why not."""

    target: Target
    report: UpdateReport | None = None
    error: UpdateError | None = None


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start

    def copy(self) -> Clock:
        """With the same past: what follows is one engine's own."""
        other = Clock()
        other._start, other._last = self._start, self._last
        other.seconds = dict(self.seconds)
        return other


def _engine_error(raw: dict[str, Any]) -> UpdateError:
    error = heard(raw)
    assert isinstance(error, UpdateError)  # no other is noted of an engine
    return error
