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


KINDS = {
    "dense": Kind("dense"),
    "replica": Kind("dense"),
    "tied": Kind("tied"),
    "tp2": Kind("dense", flags=("--tp-size", "2"), env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}),
    "moe": Kind("moe", torch.bfloat16),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "server(*names): the servers that a test asks for")


def pytest_collection_modifyitems(config, items):
    wanted: dict[str, None] = {}
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.timeout(2 * START))
            for mark in item.iter_markers("server"):
                wanted |= dict.fromkeys(mark.args)
    config.stash[WANTED] = list(wanted)


WANTED = pytest.StashKey[list[str]]()


class Servers:
    """servers("dense") is that server, up. The first call starts all that the tests ask for.

    A server that has died is an error at the next call: none is started again unless `stop` was
    called.
    """

    def __init__(self, folder: Path, ahead: list[str]):
        self.folder = folder
        self._ahead = ahead
        self._running: dict[str, Server] = {}

    def __call__(self, name: str) -> Server:
        ahead, self._ahead = self._ahead, []
        for each in (name, *ahead):
            if each not in self._running:
                self._running[each] = self.start(each)
        server = self._running[name].wait()
        assert not server.ended(), server.tail()
        return server

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


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    process = Zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()
