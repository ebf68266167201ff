import contextlib
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from child import build_fake_cuda

from pyrlk import weights

CHILD = Path(__file__).with_name("child.py")
_SECONDS: dict[str, list[float]] = {}  # of the cases of each kind of fault


@pytest.fixture
def record_cases() -> Callable[[str, list[float]], None]:
    """record_cases(kind, seconds): printed at the end of the session."""
    return lambda kind, seconds: _SECONDS.setdefault(kind, []).extend(seconds)


def pytest_terminal_summary(terminalreporter) -> None:
    if not _SECONDS:
        return
    terminalreporter.section("faults: milliseconds a case")
    terminalreporter.write_line(f"{'median':>8} {'p95':>8} {'worst':>8} {'cases':>7}  kind")
    for kind, seconds in ((k, s) for k, s in _SECONDS.items() if s):
        ordered = sorted(1e3 * s for s in seconds)
        middle, late = statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))]
        terminalreporter.write_line(
            f"{middle:8.1f} {late:8.1f} {ordered[-1]:8.1f} {len(ordered):7}  {kind}"
        )


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


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> str:
    """A CUDA driver for PYRLK_LIBCUDA; see fake_cuda.c."""
    library = build_fake_cuda(tmp_path_factory.mktemp("driver"))
    if library is None:
        pytest.skip("needs a C compiler")
    return library


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
