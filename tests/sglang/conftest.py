"""Real servers, started once and shared; `make test-sglang` prepares what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live import HERE, PYTHON, Server, Zygote, make_model


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """servers("dense" | "tp2" | "tied" | "moe"): started at the first use, one machine for all."""
    if not PYTHON:
        pytest.skip("run make test-sglang")
    folder = tmp_path_factory.mktemp("sglang")
    running: dict[str, Server] = {}

    def start(name: str) -> Server:
        if name not in running:
            kind = {"dense": "dense", "tp2": "dense"}.get(name, name)
            dtype = torch.bfloat16 if name == "moe" else torch.float32
            path = folder / kind
            if not path.exists():
                make_model(kind, 0, dtype).save_pretrained(path)
            flags = ("--tp-size", "2") if name == "tp2" else ()
            env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if name == "tp2" else {}
            text = str(dtype).removeprefix("torch.")
            running[name] = Server(folder, path, text, *flags, env=env)
            running[name].path = path
            running[name].wait()
        return running[name]

    def stop(name: str) -> None:
        if name in running:
            running.pop(name).kill()

    start.stop = stop
    yield start
    for server in running.values():
        server.kill()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    process = Zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()
