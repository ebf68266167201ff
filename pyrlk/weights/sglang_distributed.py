"""Across nodes: SGLang takes each bucket from a broadcast of torch.distributed.

    group       rank 0: the trainer; then the tensor-parallel ranks of each engine
    a bucket    /update_weights_from_distributed on every engine, beside one broadcast from rank 0
    its bytes   tensors end to end in the order of their names, larger items first: all aligned

The group has a store of its own and shares nothing with the trainer's. An engine that falls out of
an update breaks it: the others are put into a new one and take the bucket again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import secrets
import socket
import urllib.parse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import layout as layouts
from . import memory, wire
from .errors import ApplyFailed, PeerLost, Timeout, Unsupported, UpdateError
from .packing import Plan
from .report import Clock
from .sglang_server import Info, Server
from .sglang_session import ServerSession, Settings

# Our own waits end before the requests do: then an engine that only waited for another one still
# answers, and is told apart from the one that is gone.
_SOONER = 0.75


class DistributedSession(ServerSession):
    """One engine of a group."""

    mode = "distributed"
    jointly = True

    def __init__(self, settings: Settings, server: Server, info: Info, timeout: float):
        super().__init__(settings, server, info)
        _check_stages(info)
        self.timeout = timeout
        self.group: Group | None = None
        self.result: wire.Applied | UpdateError | None = None

    @property
    def server(self) -> Server:
        return self._server

    @property
    def version(self) -> int:
        return self._version

    @property
    def ranks(self) -> int:
        return self._info.tp_size

    @property
    def device(self) -> str:
        return self._info.device

    @property
    def chosen(self) -> list[list[int]]:
        return self._chosen

    def stage(self, plan: Plan, buffers: int) -> None:
        """The memory belongs to the broadcast; see `send_all`."""

    def send(self, plan: Plan, verify: bool, clock: Clock) -> wire.Applied:
        (result,) = self.send_all([self], plan, verify, False, clock)
        if isinstance(result, UpdateError):
            raise result
        return result

    @staticmethod
    def send_all(
        sessions: list[DistributedSession], plan: Plan, verify: bool, isolate: bool, clock: Clock
    ) -> list[wire.Applied | UpdateError]:
        """Broadcast every bucket to all engines at once; what became of each."""
        return Broadcast(sessions, plan, isolate).run(verify, clock)

    def request(self, names: list[str], dtypes: list[str], shapes: list, last: bool) -> None:
        """Have the engine take one bucket; returns when it is loaded."""
        assert self.group is not None
        version = str(self._version) if last and not self._durable else None
        self._server.update_from_group(
            self.group.name, names, dtypes, shapes, self._selector, version
        )

    def finish(self, plan: Plan) -> None:
        self._finish(plan)

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
        super().close()

    def abandon(self) -> None:
        if self.group is not None:
            self.group.close(without=self)
        super().abandon()

    def _restarted(self, info: Info) -> None:
        super()._restarted(info)
        _check_stages(info)
        if self.group is not None:
            self.group.close(without=self)


def _check_stages(info: Info) -> None:
    if info.pp_size > 1:
        raise Unsupported(
            f"the server runs with --pp-size {info.pp_size}: SGLang gives its stages one rank in a "
            'group; use mode="bucket" or "plan"'
        )


class Broadcast:
    """One update of several engines."""

    def __init__(self, sessions: Sequence[DistributedSession], plan: Plan, isolate: bool):
        self._sessions, self._plan, self._isolate = sessions, plan, isolate
        self._active = list(sessions)
        self._order = _by_item_size(plan.layout, sessions[0].chosen)
        for session in sessions:
            session.result = None
            if session.chosen != sessions[0].chosen:
                self._fail(
                    session,
                    Unsupported(
                        f"{session.server.url} takes other names than {sessions[0].server.url}: "
                        "give it a Publisher of its own"
                    ),
                )

    def run(self, verify: bool, clock: Clock) -> list[wire.Applied | UpdateError]:
        flats: list[memory.Segment] = []
        try:
            self._run(verify, clock, flats)
        except UpdateError as error:
            for session in list(self._active):
                self._fail(session, error)
        except BaseException:
            for session in self._active:
                session.abandon()
            raise
        finally:
            for flat in flats:
                flat.close()
        results = [session.result for session in self._sessions]
        return [r if r is not None else PeerLost("not reached") for r in results]

    def _run(self, verify: bool, clock: Clock, flats: list[memory.Segment]) -> None:
        """Bucket b + 1 is filled while b is under way."""
        layout, device = self._plan.layout, self._plan.device
        count = layout.staged
        if count:
            largest = max(map(self._nbytes, range(count)))
            flats += [memory.create(device, largest) for _ in range(min(2, count))]
            flats.append(memory.create(device, layout.slot_bytes))
        with concurrent.futures.ThreadPoolExecutor(1, "pyrlk-broadcast") as thread:
            under_way: concurrent.futures.Future[None] | None = None
            for bucket in range(count):
                flat = flats[bucket % (len(flats) - 1)]
                if under_way is not None and len(flats) == 2:
                    under_way.result()
                self._fill(bucket, flats[-1], flat, verify)
                clock.lap("pack")
                if under_way is not None:
                    under_way.result()
                under_way = thread.submit(self._deliver, bucket, flat, bucket + 1 == count)
                clock.lap("hand-over")
            if under_way is not None:
                under_way.result()
        clock.lap("hand-over")
        for session in list(self._active):
            try:
                session.finish(self._plan)
                session.result = wire.Applied(session.version, 0.0, 0.0)
            except UpdateError as error:
                self._fail(session, error)
        clock.lap("finish")

    def _nbytes(self, bucket: int) -> int:
        return sum(self._plan.layout.entries[i].nbytes for i in self._order[bucket])

    def _fill(
        self, bucket: int, staging: memory.Segment, flat: memory.Segment, verify: bool
    ) -> None:
        """The bucket as everybody else gets it, then its tensors end to end."""
        timeout = self._sessions[0].timeout
        self._plan.start(bucket, staging, verify).wait(timeout)
        entries = [self._plan.layout.entries[i] for i in self._order[bucket]]
        placed, end = [], 0
        for e in entries:
            placed.append((staging.view(e.offset, e.shape, e.dtype), end))
            end += e.nbytes
        threads = torch.get_num_threads()
        flat.pack(memory.Copies(placed), checksum=False, threads=threads)
        flat.finish()

    def _deliver(self, bucket: int, flat: memory.Segment, last: bool) -> None:
        """One bucket into every engine that is left; again without those that fall out."""
        entries = [self._plan.layout.entries[i] for i in self._order[bucket]]
        names = [e.name for e in entries]
        dtypes = [str(e.dtype).removeprefix("torch.") for e in entries]
        shapes = [list(e.shape) for e in entries]
        data = flat.flat[: self._nbytes(bucket)]
        while self._active:
            group = self._formed()
            if group is None:
                continue
            for session in self._active:
                session.handed_over = True
            errors = group.broadcast(data, names, dtypes, shapes, last)
            if not errors:
                return
            group.close(without=[s for s, e in errors.items() if isinstance(e, PeerLost | Timeout)])
            self._drop(errors)

    def _formed(self) -> Group | None:
        """The group of the engines that are left; None if one could not join: try again."""
        group = self._active[0].group
        if group is not None and group.sessions == self._active:
            return group
        for session in self._active:
            if session.group is not None:
                session.group.close()
        cuda = self._plan.device.type == "cuda" and all(s.device == "cuda" for s in self._active)
        group = Group(list(self._active), "nccl" if cuda else "gloo")
        errors = group.form()
        if not errors:
            return group
        group.close(without=[s for s, e in errors.items() if isinstance(e, PeerLost | Timeout)])
        self._drop(errors)
        return None

    def _drop(self, errors: dict[DistributedSession, UpdateError]) -> None:
        """Go on without the engines at fault; without any, where that cannot be told."""
        at_fault = {s: e for s, e in errors.items() if not _only_waited(e)}
        if at_fault and self._isolate:
            for session, error in at_fault.items():
                self._fail(session, error)
            return
        cause = next(iter((at_fault or errors).values()))
        for session in list(self._active):
            self._fail(session, errors.get(session, cause))

    def _fail(self, session: DistributedSession, error: UpdateError) -> None:
        self._active.remove(session)
        session.result = session.give_up(error)


def _by_item_size(layout: layouts.Layout, chosen: list[list[int]]) -> list[list[int]]:
    """Entries of each bucket in the order of its bytes: an offset is a multiple of what follows."""
    return [sorted(part, key=lambda i: -layout.entries[i].dtype.itemsize) for part in chosen]


def _only_waited(error: UpdateError) -> bool:
    """Whether SGLang says that the group failed, and not its own load_weights."""
    return isinstance(error, ApplyFailed) and (
        "Failed to receive weights" in str(error) or "process group" in str(error)
    )


class Group:
    """A process group of the trainer and its engines."""

    def __init__(self, sessions: list[DistributedSession], backend: str):
        self.sessions = sessions
        self.name = f"pyrlk-{secrets.token_hex(8)}"
        self._backend = backend
        self._timeout = sessions[0].timeout
        self._patience = datetime.timedelta(seconds=_SOONER * self._timeout)
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = None

    def form(self) -> dict[DistributedSession, UpdateError]:
        """Rendezvous; errors of the engines, none where all have joined."""
        self._store = dist.TCPStore(
            "127.0.0.1", 0, None, True, self._patience, wait_for_workers=False
        )
        world = 1 + sum(session.ranks for session in self.sessions)
        with concurrent.futures.ThreadPoolExecutor(len(self.sessions)) as threads:
            posts, offset = {}, 1
            for session in self.sessions:
                session.group = self
                posts[session] = threads.submit(
                    session.server.init_group,
                    _address_towards(session.server.url),
                    self._store.port,
                    offset,
                    world,
                    self.name,
                    self._backend,
                )
                offset += session.ranks
            failure = self._join(world)
            if failure is not None:
                self._store = None  # lets go of those that still wait in it
            return _errors_of(posts, failure)

    def broadcast(
        self, data: torch.Tensor, names: list[str], dtypes: list[str], shapes: list, last: bool
    ) -> dict[DistributedSession, UpdateError]:
        """One bucket; errors of the engines, none where all have loaded it."""
        with concurrent.futures.ThreadPoolExecutor(len(self.sessions)) as threads:
            posts = {
                session: threads.submit(session.request, names, dtypes, shapes, last)
                for session in self.sessions
            }
            failure: UpdateError | None = None
            try:
                work = dist.broadcast(data, group_src=0, group=self._group, async_op=True)
                work.wait(self._patience)
                if data.device.type == "cuda":
                    torch.cuda.synchronize(data.device)
                del work
            except RuntimeError as error:
                failure = _typed(error, "broadcast")
                self._leave()  # lets go of those that still wait in it
            return _errors_of(posts, failure)

    def close(self, without: DistributedSession | Sequence[DistributedSession] = ()) -> None:
        """Leave, and have the engines leave; those in `without` are not asked."""
        silent = [without] if isinstance(without, DistributedSession) else list(without)
        self._leave()
        for session in self.sessions:
            if session.group is self:
                session.group = None
                if session not in silent:
                    with contextlib.suppress(UpdateError):
                        session.server.destroy_group(self.name)
        self.sessions = []

    def _join(self, world: int) -> UpdateError | None:
        assert self._store is not None
        try:
            group, _ = distributed_c10d._new_process_group_helper(
                world,
                0,
                [],
                dist.Backend(self._backend),
                dist.PrefixStore(self.name, self._store),
                group_name=distributed_c10d.GroupName(self.name),
                timeout=self._patience,
            )
            distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
            self._group = group
        except RuntimeError as error:
            return _typed(error, "rendezvous")
        return None

    def _leave(self) -> None:
        if self._group is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group(self._group)
            self._group = None
        self._store = None


def _errors_of(
    posts: dict[DistributedSession, concurrent.futures.Future[None]], failure: UpdateError | None
) -> dict[DistributedSession, UpdateError]:
    """What the engines say; `failure` is ours, and stands for theirs where they say nothing."""
    errors: dict[DistributedSession, UpdateError] = {}
    for session, post in posts.items():
        error = post.exception()
        if isinstance(error, UpdateError):
            errors[session] = error
        elif error is not None:
            raise error
    if failure is not None and not errors:
        return dict.fromkeys(posts, failure)
    return errors


def _typed(error: RuntimeError, what: str) -> UpdateError:
    text = str(error).splitlines()[0][:300]
    kind = Timeout if "imed out" in text or "imeout" in text else PeerLost
    return kind(f"{what} with the engines: {text}")


def _address_towards(url: str) -> str:
    """This machine's address as the engine sees it."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            parts.hostname, port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PeerLost(f"{url}: {error.strerror or error}") from None
