"""Real servers, started once and shared; `make test-sglang` prepares what they need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from live import HERE, PYTHON, START, Parent, Server, Zygote, make_model


@dataclass(frozen=True)
class Kind:
    model: str
    dtype: torch.dtype = torch.float32
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


TP2 = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
KINDS = {
    "dense": Kind("dense"),
    "moe": Kind("moe", torch.bfloat16),
    "moe-small": Kind("moe-small", torch.bfloat16),
    "moe-small-tp2": Kind("moe-small", torch.bfloat16, ("--tp-size", "2"), TP2),
    "tied": Kind("tied"),
    "replica": Kind("dense"),
    "tp2": Kind("dense", flags=("--tp-size", "2"), env=TP2),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "server(*names): the servers that a test asks for")


WANTED = pytest.StashKey[list[list[str]]]()


def names_of(item) -> list[str]:
    return [name for mark in item.iter_markers("server") for name in mark.args]


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    """One server's tests after another's: few are there at once."""
    order = list(KINDS)
    items.sort(key=lambda item: max(map(order.index, names_of(item)), default=-1))
    ours = [item for item in items if HERE in Path(item.fspath).parents]
    for item in ours:
        item.add_marker(pytest.mark.sglang)
        item.add_marker(pytest.mark.timeout(2 * START))
    config.stash[WANTED] = [names_of(item) for item in ours]


class Servers:
    """servers("dense") is that server, up.

    The one that is needed next starts while this one is used, and a server ends with its last test.
    One that has died is an error at the next call: none is started again unless `stop` was called.
    """

    def __init__(self, folder: Path, wanted: list[list[str]]):
        self.folder = folder
        self._wanted = wanted  # of each test that is still to come
        self._running: dict[str, Server] = {}

    def __call__(self, name: str) -> Server:
        server = self._start(name).wait()
        assert not server.ended(), server.tail()
        for other in self._next(name):
            self._start(other)
        return server

    def one_test_less(self) -> None:
        del self._wanted[0]
        for name in list(self._running):
            if not any(name in names for names in self._wanted):
                self.stop(name)

    def _next(self, name: str) -> list[str]:
        """What the first test asks for that asks for another than this one."""
        return next((names for names in self._wanted if set(names) - {name}), [])

    def _start(self, name: str) -> Server:
        if name not in self._running:
            self._running[name] = self.start(name)
        return self._running[name]

    def start(self, name: str, port: int | None = None) -> Server:
        """One more server of that kind, not waited for and not kept."""
        kind = KINDS[name]
        path = self.folder / kind.model
        if not path.exists():
            make_model(kind.model, 0, kind.dtype).save_pretrained(path)
        dtype = str(kind.dtype).removeprefix("torch.")
        return Server(self.folder, path, dtype, *kind.flags, env=kind.env, port=port)

    def stop(self, name: str) -> None:
        if name in self._running:
            self._running.pop(name).kill()

    def items(self):
        return self._running.items()

    def close(self) -> None:
        for name in list(self._running):
            self.stop(name)


@pytest.fixture(scope="session")
def servers(request, tmp_path_factory):
    if not PYTHON:
        pytest.skip("run make test-sglang")
    running = Servers(tmp_path_factory.mktemp("sglang"), request.config.stash[WANTED])
    yield running
    running.close()
    Parent.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what the servers said last."""
    report = yield
    running = getattr(item, "funcargs", {}).get("servers")
    if report.failed and running is not None:
        report.sections += [(f"server {name}", s.tail()) for name, s in running.items()]
    return report


@pytest.fixture(autouse=True)
def _count(servers):
    yield
    servers.one_test_less()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    process = Zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()
