import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pyrlk import weights

CHILD = Path(__file__).with_name("child.py")


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    folder = tmp_path / "pyrlk"
    folder.mkdir(mode=0o700)
    return str(folder / "weights.sock")


@pytest.fixture
def start(socket_path: str) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("receiver", "--stay") runs child.py; what still runs at the end is killed."""
    running: list[subprocess.Popen] = []

    def run(role: str, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        command = [sys.executable, str(CHILD), role, socket_path, *options]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        running.append(child)
        return child

    yield run
    for child in running:
        child.kill()
        child.wait()
        child.stdout.close()


@contextlib.contextmanager
def _serving(receiver: weights.Receiver) -> Iterator[weights.Receiver]:
    thread = threading.Thread(target=receiver.serve)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stop()
        thread.join(20)
        receiver.close()


@pytest.fixture
def serving() -> Callable[[weights.Receiver], contextlib.AbstractContextManager]:
    """`with serving(receiver):` serves in a thread and closes the receiver at the end."""
    return _serving


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors, several processes: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
