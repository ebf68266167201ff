"""The ranks of a trainer in step: what each wants, what rank 0 decides, and how an update ended.

    arrive   every rank → 0     what it is about to publish, or its error
    order    0 → every rank     gather bucket b, mirror a ring; or the end: the report, the error
    answer   every rank → 0     that is done, or its error
    heard    every rank → 0     of an end by an error, after which rank 0 may exit

Words go through the group's own store and never through a collective, so that none is left half
done. A wait polls: it has a deadline, and a process of this machine that dies is noticed at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import PeerLost, RanksDisagree, Timeout, UpdateError, heard, said

_NUMBERS: dict[str, Iterator[int]] = {}  # of the publishers of each group, in their order
_PAUSES = (0.0005, 0.02)  # between two looks: the first, and the longest, in seconds
_LINGER = 1.0  # seconds at most for the others to hear of an error: the store may end with rank 0


class Ranks:
    """One process of a group that publishes together.

    Parameters
    ----------
    group : ProcessGroup
        Its rank 0 leads.
    timeout : float
        Seconds that any single wait may take.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        number = next(_NUMBERS.setdefault(group.group_name, itertools.count()))
        store = distributed_c10d._get_process_group_store(group)
        self._store = dist.PrefixStore(f"pyrlk/{number}", store)
        self._timeout = timeout
        self._update = self._order = 0
        self._old: list[str] = []  # keys that every rank has read when all have come again
        self._new: list[str] = []
        self._peers: dict[int, int] = {}  # rank → pidfd, of those on this machine
        self._finalizer = weakref.finalize(self, _close_all, self._peers)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def run(
        self,
        wish: dict[str, Any] | Exception,
        lead: Callable[[], Any],
        serve: Callable[[dict[str, Any]], dict[str, Any] | None],
    ) -> Any:
        """One update of the whole group; the same on every rank, an exception too.

        Parameters
        ----------
        wish : dict or Exception
            What this rank is about to publish, equal on all ranks; or why it cannot.
        lead : callable
            Rank 0: does it, giving orders, and returns what every rank returns (made of JSON).
        serve : callable
            The others: carries one order out; what it returns goes into the answer.

        Raises
        ------
        RanksDisagree
            The wishes differ.
        PeerLost, Timeout
            A rank is gone, or did not come in time.
        """
        self._update += 1
        self._order = 0
        self._old, self._new = self._new, []
        if self.leads:
            return self._lead(wish, lead)
        known = {"error": said(wish)} if isinstance(wish, Exception) else wish
        self._post(f"arrive/{self.rank}", known | {"process": _process()})
        try:
            return self._follow(serve)
        except (PeerLost, Timeout) as error:
            # Nobody said how it ended; what is wrong here says more than that.
            raise (wish if isinstance(wish, Exception) else error) from None

    def order(self, what: dict[str, Any]) -> None:
        """Rank 0: have the others do something; `answers` waits for them."""
        self._post(f"order/{self._order}", what)
        self._order += 1

    def answers(self) -> dict[int, dict[str, Any]]:
        """Rank 0: what every rank answers to the last order; the first error is raised."""
        return self._collect(f"answer/{self._order - 1}")

    def blame(self) -> None:
        """Rank 0, whose own part has failed: raise the cause, if a rank has said one.

        A rank that only waited for another, as this one did, is no cause.
        """
        for rank in range(1, self.size):
            key = self._key(f"answer/{self._order - 1}/{rank}")
            with _talking():
                answer = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            with contextlib.suppress(PeerLost, Timeout):
                self._heard(rank, answer)

    def close(self) -> None:
        self._finalizer()

    def _lead(self, wish: dict[str, Any] | Exception, lead: Callable[[], Any]) -> Any:
        try:
            with self._beating():
                self._post("leader", _process())
                self._meet(wish)
                result = lead()
        except BaseException as error:
            with contextlib.suppress(UpdateError):
                self.order({"end": {"error": said(error)}})
                self._linger()
            raise
        self.order({"end": {"result": result}})
        return result

    def _meet(self, mine: dict[str, Any] | Exception) -> None:
        """Everybody is here and wants the same."""
        wishes = self._collect("arrive")
        # Every rank has come again: it has read all of the update before.
        for key in self._old:
            self._store.delete_key(key)
        if isinstance(mine, Exception):
            raise mine
        for rank, wish in wishes.items():
            self._watch(rank, wish.pop("process"))
            for what, wanted in mine.items():
                if wish.get(what) != wanted:
                    raise RanksDisagree(
                        f"{what}: {wanted!s:.200} on rank 0, {wish.get(what)!s:.200} on rank {rank}"
                    )

    def _linger(self) -> None:
        """Until every rank that came and lives has heard of the end."""
        deadline = time.monotonic() + min(_LINGER, self._timeout)
        for rank in range(1, self.size):
            self._new.append(self._key(f"heard/{rank}"))
            with _talking():
                came = self._store.check([self._key(f"arrive/{rank}")])
            while came and time.monotonic() < deadline and rank not in self._ended():
                with _talking():
                    if self._store.check([self._key(f"heard/{rank}")]):
                        break
                time.sleep(_PAUSES[0])

    def _collect(self, what: str) -> dict[int, dict[str, Any]]:
        deadline = time.monotonic() + self._timeout
        self._new += [self._key(f"{what}/{rank}") for rank in range(1, self.size)]
        found = {}
        for rank in range(1, self.size):
            answer = self._await(f"{what}/{rank}", f"rank {rank}", lambda: deadline)
            self._heard(rank, answer)
            found[rank] = answer
        return found

    def _heard(self, rank: int, answer: dict[str, Any]) -> None:
        if "error" in answer:
            error = heard(answer["error"])
            error.args = (f"rank {rank}: {error}",)
            raise error

    def _follow(self, serve: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Any:
        alive = _Alive(self._store, self._key("beat"), self._timeout)
        for number in itertools.count():
            key = f"order/{number}"
            what = self._await(key, "rank 0", alive.deadline)
            self._order = number
            if "end" in what:
                if "error" in what["end"]:
                    with contextlib.suppress(UpdateError):
                        self._post(f"heard/{self.rank}", {})
                    raise heard(what["end"]["error"])
                return what["end"]["result"]
            try:
                answer = serve(what) or {}
            except Exception as error:
                # Rank 0 decides what becomes of the update, and says so.
                answer = {"error": said(error)}
            self._post(f"answer/{number}/{self.rank}", answer)
            alive.seen()

    def _key(self, name: str) -> str:
        return f"{self._update}/{name}"

    def _post(self, name: str, what: dict[str, Any]) -> None:
        self._new.append(self._key(name))
        with _talking():
            self._store.set(self._key(name), json.dumps(what))

    def _await(self, name: str, who: str, deadline: Callable[[], float]) -> dict[str, Any]:
        key = self._key(name)
        pause, longest = _PAUSES
        while True:
            ended = self._ended()
            with _talking():
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
                if not self.leads and not self._peers and self._store.check([self._key("leader")]):
                    self._watch(0, json.loads(self._store.get(self._key("leader"))))
            if ended:
                raise PeerLost(f"rank {ended[0]} of the trainer has died")
            if time.monotonic() >= deadline():
                raise Timeout(f"{who} of the trainer was not heard of for {self._timeout:g} s")
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _watch(self, rank: int, process: dict[str, Any]) -> None:
        machine = _process()["machine"]
        if rank in self._peers or machine is None or process["machine"] != machine:
            return
        with contextlib.suppress(OSError, AttributeError):
            self._peers[rank] = os.pidfd_open(process["pid"])

    def _ended(self) -> list[int]:
        """Ranks of this machine whose process has ended."""
        poller = select.poll()
        for fd in self._peers.values():
            poller.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poller.poll(0)}
        return [rank for rank, fd in self._peers.items() if fd in ended]

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Tell the others that rank 0 lives: its own waits may add up to more than one deadline."""
        key, stop = self._key("beat"), threading.Event()
        self._new.append(key)

        def beat() -> None:
            with contextlib.suppress(RuntimeError):
                while not stop.wait(min(1.0, self._timeout / 4)):
                    self._store.add(key, 1)

        thread = threading.Thread(target=beat, name="pyrlk-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class _Alive:
    """When to give rank 0 up: `timeout` after it was last heard of."""

    def __init__(self, store: dist.Store, key: str, timeout: float):
        self._store, self._key, self._timeout = store, key, timeout
        self._beats = 0
        self.seen()

    def seen(self) -> None:
        self._last = self._looked = time.monotonic()

    def deadline(self) -> float:
        now = time.monotonic()
        if now - self._looked > min(0.25, self._timeout / 8):
            self._looked = now
            with _talking():
                beats = self._store.add(self._key, 0)
            if beats != self._beats:
                self._beats, self._last = beats, now
        return self._last + self._timeout


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except (dist.DistError, ConnectionError) as error:
        raise PeerLost(f"the store of the trainer's group is gone: {error!s:.200}") from None


def _process() -> dict[str, Any]:
    """This process, for others of the same machine and pid namespace."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = file.read().strip()
        return {"pid": os.getpid(), "machine": f"{machine} {os.readlink('/proc/self/ns/pid')}"}
    return {"pid": os.getpid(), "machine": None}


def _close_all(peers: dict[int, int]) -> None:
    while peers:
        os.close(peers.popitem()[1])
