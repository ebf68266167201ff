"""SGLang's side of plan mode: python -m sglang.launch_server … --custom-weight-loader
pyrlk.weights.sglang_loader.load

    payload (through SGLang)   "PRLP"  u16 protocol, rank, runners  f64 timeout  nonce  socket path
    the rest (our own socket)  ATTACH → HELLO, BEGIN → record or find the plan → CHECKED
                               → buckets, replayed → APPLIED

`load` runs on the scheduler's thread of each rank. It never raises: an exception there ends the
server. What goes wrong travels to the publisher, over the socket.

A speculating server calls it for each model runner in turn, the target's first. Nothing is copied
before all have checked, so the call for the last one of `runners` does the work of all; `runners`
0 asks how many there are: each call then only attaches.
"""

from __future__ import annotations

import logging
import secrets
import struct
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import layout as layouts
from . import load_plan, memory, wire
from .engine import mismatch
from .errors import ApplyFailed, EngineDirty, ProtocolError, Unsupported, UpdateError
from .receiver import Receiver, _Session, verify
from .wire import Type

_LOG = logging.getLogger("pyrlk")
_FORM = struct.Struct("<4sHHHd16s")
_MAGIC = b"PRLP"
_KEPT_PLANS = 4
_REASONS = 250


@dataclass(frozen=True)
class Payload:
    """What reaches the loader through SGLang."""

    rank: int
    runners: int
    timeout: float
    nonce: bytes
    path: str

    def encode(self) -> bytes:
        numbers = self.rank, self.runners, self.timeout
        return _FORM.pack(_MAGIC, wire.PROTOCOL, *numbers, self.nonce) + self.path.encode()

    @classmethod
    def decode(cls, data: bytes) -> Payload:
        if not _FORM.size < len(data) <= 256:
            raise ProtocolError(f"payload: {len(data)} bytes")
        magic, protocol, rank, runners, timeout, nonce = _FORM.unpack_from(data)
        if magic != _MAGIC or protocol != wire.PROTOCOL or not 0 < timeout < 1e6:
            raise ProtocolError(f"payload: magic {magic!r}, protocol {protocol}")
        return cls(rank, runners, timeout, nonce, data[_FORM.size :].decode())


def load(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take one update from a Publisher into `model`; called by SGLang. Never raises."""
    try:
        ((_, tensor),) = named_tensors
        payload = Payload.decode(bytes(tensor.cpu().tolist()))
        if not payload.runners:
            _attach(payload)
            return
        models = _CALLS.models(payload.nonce, model)
        if len(models) == payload.runners:
            loader = _LOADERS.get(models[0])
            if loader is None:
                loader = _LOADERS[models[0]] = _Loader()
            loader.take(payload, models)
    except Exception as error:
        _LOG.warning("pyrlk: weight update: %s: %s", type(error).__name__, error)


_BOOT = secrets.token_bytes(16)


def _attach(payload: Payload) -> None:
    """Be counted."""
    deadline = time.monotonic() + payload.timeout
    channel = wire.connect(payload.path, deadline)
    attach = wire.Attach(payload.nonce, _BOOT, payload.rank)
    channel.send(wire.Frame(Type.ATTACH, 0, attach.encode()), deadline)
    channel.close()


class _Calls(threading.local):
    """The models that load() was called for in this update, in this thread; not kept alive."""

    def __init__(self) -> None:
        self._nonce = b""
        self._called: list[weakref.ref[nn.Module]] = []

    def models(self, nonce: bytes, model: nn.Module) -> list[nn.Module]:
        if nonce != self._nonce:
            self._nonce, self._called = nonce, []
        self._called.append(weakref.ref(model))
        return [one for one in (r() for r in self._called) if one is not None]


_CALLS = _Calls()


class _Loader(Receiver):
    """A Receiver that connects to the publisher whenever SGLang says that an update has begun."""

    def __init__(self) -> None:
        self._start(30.0)
        self._boot = _BOOT
        self._reached = ""  # the socket path of the kept connection

    def take(self, payload: Payload, models: Sequence[nn.Module]) -> None:
        """One update of all models of this process."""
        self._engine = self._plans = Models([_engine_of(model) for model in models])
        try:
            self._take(payload)
        finally:
            self._engine = self._plans = Models([])  # who is kept by a model must not keep another

    def _take(self, payload: Payload) -> None:
        self._timeout = payload.timeout
        session = self._session
        if session is not None and not (self._reached == payload.path and session.channel.alive()):
            self._drop(None)
        if self._session is None:
            channel = wire.connect(payload.path, time.monotonic() + payload.timeout)
            self._session = _Session(channel)
            self._reached = payload.path
        attach = wire.Attach(payload.nonce, _BOOT, payload.rank)
        self._send(Type.ATTACH, 0, attach.encode())
        self.last_error = None
        # One update, or the publisher's word that there is none.
        if not self.poll(self._timeout) and self.last_error is not None:
            _LOG.warning("pyrlk: weight update: %s", self.last_error)

    def _check(self, begin: wire.Begin, layout: layouts.Layout) -> None:
        if begin.verify is wire.Verify.ENGINE:
            raise Unsupported("the publisher asks the server what it holds")
        # Which version may follow which is judged by the publisher, from the server's own.
        if begin.partial and self.dirty:
            raise EngineDirty("an update broke off in this engine: send a full one first")
        self._plans.check(layout, begin.partial)

    def _verify(
        self, segment: memory.Segment, layout: layouts.Layout, bucket: wire.Bucket, threads: int
    ) -> None:
        # What a replay sums while it copies needs no reading of its own.
        summed = self._plans.summed(bucket.bucket)
        rest = [i for i in layout.pieces[bucket.bucket] if i not in summed]
        verify(segment, layout, bucket, rest, threads)

    def _send(self, kind: Type, transaction: int, body: bytes = b"") -> None:
        if kind in (Type.CHECKED, Type.APPLIED):
            for report, text in self._plans.report():
                super()._send(report, transaction, text)
        super()._send(kind, transaction, body)


_LOADERS: weakref.WeakKeyDictionary[nn.Module, _Loader] = weakref.WeakKeyDictionary()
_ENGINES: weakref.WeakKeyDictionary[nn.Module, PlanEngine] = weakref.WeakKeyDictionary()


def _engine_of(model: nn.Module) -> PlanEngine:
    engine = _ENGINES.get(model)
    if engine is None:
        engine = _ENGINES[model] = PlanEngine(model)
    return engine


class Models:
    """The models of one process: a target and its drafts. Each takes what its load_weights reads.

    A tensor is unknown only if none of them reads it; a parameter that two share need be written
    through one.
    """

    names_from = "module"
    sums_copies = True
    reads_back = False

    def __init__(self, engines: Sequence[PlanEngine]):
        self._engines = engines

    def gpu(self) -> bytes:
        return memory.gpu_of(p for engine in self._engines for p in engine.parameters())

    def check(self, layout: layouts.Layout, partial: bool) -> None:
        for engine in self._engines:
            engine.check(layout, partial)

    def summed(self, bucket: int) -> set[int]:
        """The entries of a bucket whose sums a replay itself compares."""
        return {i for engine in self._engines for i in engine.summed(bucket)}

    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None:
        for engine in self._engines:
            engine.apply(segment, bucket, sums, threads)

    def read_back(self, sums: Sequence[tuple[int, ...]], threads: int) -> None:
        raise Unsupported("the publisher asks the server what it holds")

    def release(self) -> None:
        """After the update, or its failure."""

    def report(self) -> list[tuple[Type, bytes]]:
        """REASON and STATUS frames: how each tensor is taken."""
        reasons: dict[str, int] = {}
        codes = bytearray()
        for ways in zip(*(engine.ways() for engine in self._engines), strict=True):
            taken = [way for way in ways if way is not None]
            reason = next((way for way in taken if way), "")
            if not taken:
                codes.append(wire.Status.UNREAD)
            elif not reason:
                codes.append(wire.Status.PLANNED)
            else:
                number = reasons.setdefault(reason, min(len(reasons), _REASONS))
                codes.append(wire.Status.FALLBACK + number)
        frames = []
        uncovered = self._uncovered()
        if uncovered:
            some = ", ".join(repr(name) for name in uncovered[:5])
            text = f"{some}{', …' if len(uncovered) > 5 else ''} ({len(uncovered)})"
            frames.append((Type.REASON, wire.Reason(0, text).encode()))
        for reason, number in reasons.items():
            body = wire.Reason(wire.Status.FALLBACK + number, reason).encode()
            frames.append((Type.REASON, body))
        step = wire.MAX_BODY // 2
        for first in range(0, len(codes), step):
            body = wire.Status(first, bytes(codes[first : first + step])).encode()
            frames.append((Type.STATUS, body))
        return frames

    def _uncovered(self) -> list[str]:
        """Parameters that nothing is written to, in none of the models that have them."""
        tables = [engine.uncovered() for engine in self._engines]
        written = {place for _, others in tables for place in others}
        return [name for left, _ in tables for name, place in left.items() if place not in written]


@dataclass
class _Known:
    """A plan and how far it is to be trusted."""

    plan: load_plan.Plan
    signature: tuple
    loads: int = 0  # full passes through load_weights under this plan
    trusted: bool = False
    replay: load_plan.Replay | None = None


class PlanEngine:
    """load_weights of one model, replaced by its replay once the two were seen to do the same.

    first update    recorded, then load_weights itself
    second update   poison, replay, hash, load_weights, hash: equal → trusted
    from then on    replay; what is not planned goes through load_weights
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._now: _Known | None = None
        self._layout = layouts.Layout((), (), ())

    def check(self, layout: layouts.Layout, partial: bool) -> None:
        """Find or record the plan; load_weights is tried without data, and nothing is written."""
        model = self._module()
        tensors = load_plan.Tensors(model)
        signature = tensors.signature()
        known = self._known.get(layout.digest)
        if known is None or known.signature != signature:
            plan = load_plan.record(model, self._load_weights, layout)
            known = _Known(plan, signature)
            self._known[layout.digest] = known
            while len(self._known) > _KEPT_PLANS:
                self._known.popitem(last=False)
        self._known.move_to_end(layout.digest)
        if not known.plan.disabled and (known.replay is None or not known.replay.fits(tensors)):
            known.replay = load_plan.Replay(known.plan, tensors, layout)
        self._now, self._layout = known, layout

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._module().parameters()

    def summed(self, bucket: int) -> set[int]:
        """The entries of a bucket whose sums the replay itself compares."""
        known = self._current()
        if not known.trusted or known.replay is None:
            return set()
        return set(known.replay.summed[bucket])

    def apply(
        self, segment: memory.Segment, bucket: int, sums: tuple[int, ...], threads: int
    ) -> None:
        known = self._current()
        plan, replay = known.plan, known.replay
        try:
            if replay is None:
                self._load(segment, bucket, None)
            elif known.trusted:
                copied = replay.run(bucket, segment.flat, self._layout, bool(sums), threads)
                self._compare(bucket, sums, copied)
                self._load(segment, bucket, plan.fallback.keys() - plan.unread)
            elif known.loads == 0:
                self._load(segment, bucket, None)
            else:
                self._try(known, replay, segment, bucket, threads)
            if bucket == len(self._layout.buckets) - 1:
                self._finish(known)
        except UpdateError:
            raise
        except (Exception, SystemExit) as error:
            raise ApplyFailed(
                f"load_weights raised {type(error).__name__}: {error}", dirty=True
            ) from error
        segment.finish()

    def ways(self) -> list[str | None]:
        """Of each tensor: "" if it is planned, why it is not, or None if it is not read."""
        known = self._current()
        plan = known.plan
        young = "" if known.trusted else "recorded; the next update compares it with load_weights"
        return [
            None if i in plan.unread else plan.disabled or plan.fallback.get(i) or young
            for i in range(len(self._layout.entries))
        ]

    def uncovered(self) -> tuple[dict[str, tuple], set[tuple]]:
        """Parameters that nothing is written to, and the places of those that something is."""
        left = set(self._current().plan.uncovered)
        places = {
            name: (str(p.device), p.data_ptr(), p.nbytes)
            for name, p in self._module().named_parameters()
        }
        written = {place for name, place in places.items() if name not in left}
        return {name: place for name, place in places.items() if name in left}, written

    def _try(
        self,
        known: _Known,
        replay: load_plan.Replay,
        segment: memory.Segment,
        bucket: int,
        threads: int,
    ) -> None:
        """Replay over poisoned memory, then load_weights: both must leave the same bytes."""
        replay.poison(bucket)
        replay.run(bucket, segment.flat, self._layout, False, threads)
        touched = replay.touched(bucket)
        replayed = _hashes(touched, threads)
        self._load(segment, bucket, None)
        if _hashes(touched, threads) != replayed and not known.plan.disabled:
            known.plan.disabled = "a replay and load_weights left different bytes"

    def _finish(self, known: _Known) -> None:
        if known.replay is None:
            return
        if known.trusted:
            known.replay.finish(self._module())
            return
        known.loads += 1
        if known.plan.disabled:
            known.replay = None
        elif known.loads > 1:
            known.trusted = True

    def _compare(self, bucket: int, sums: tuple[int, ...], copied: list[int]) -> None:
        if not sums:
            return
        known = self._current()
        assert known.replay is not None
        sent = {
            i: total
            for sharing, total in zip(self._layout.members[bucket], sums, strict=True)
            for i in sharing
        }
        for index, got in zip(known.replay.summed[bucket], copied, strict=False):
            if sent[index] != got:
                raise mismatch(
                    self._layout.entries[index], sent[index], got, "was copied", dirty=True
                )

    def _load(self, segment: memory.Segment, bucket: int, only: set[int] | None) -> None:
        """load_weights, one call for a bucket. The tensors are its own: it may change them."""
        entries = [
            self._layout.entries[i]
            for sharing in self._layout.members[bucket]
            for i in sharing
            if only is None or i in only
        ]
        if not entries:
            return
        with torch.no_grad():
            self._load_weights(
                (e.name, segment.view(e.offset, e.shape, e.dtype).clone()) for e in entries
            )

    def _load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._module().load_weights(named)  # type: ignore[operator]

    def _module(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ApplyFailed("the model is gone")
        return model

    def _current(self) -> _Known:
        if self._now is None:
            raise ApplyFailed("no manifest was checked")
        return self._now


def _hashes(tensors: list[Tensor], threads: int) -> list[object]:
    return [memory.tensor_sum(tensor, threads=threads) for tensor in tensors]
