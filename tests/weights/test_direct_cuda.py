"""Direct mode on a GPU, end to end between two processes, over the fake driver; its errors at each
call of either side.

Device memory of the fake driver is shared host memory: its addresses are wrapped as CPU tensors,
and the trainer's tensors say that they lie on a GPU.
"""

import multiprocessing
import os
from typing import Any, NamedTuple

import pytest
import torch
from child import use_fake_cuda
from torch import nn

from pyrlk import _C, weights
from pyrlk.weights import memory, publisher

pytestmark = pytest.mark.distributed
FORK = multiprocessing.get_context("fork")
SHAPES = {"a": (37,), "b": (5, 9), "c": (64,)}


class OnGpu:
    """A tensor as the exporter sees it."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


class Exports(memory.Exports):
    any_of_host = True  # else tensors of the CPU are not looked up

    def find(self, tensor: torch.Tensor) -> memory.Export | None:
        return super().find(OnGpu(tensor))


class Model(nn.Module):
    def __init__(self, seed: int, flat: torch.Tensor | None = None):
        super().__init__()
        at = 0
        for name, shape in SHAPES.items():
            tensor = torch.zeros(shape)
            if flat is not None:
                tensor = flat[at : at + tensor.nbytes].view(torch.float32).view(shape)
                at += tensor.nbytes
            self.register_parameter(name, nn.Parameter(tensor))
        self.fill(seed)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def values(self) -> list:
        return [parameter.tolist() for parameter in self.parameters()]


class Answer(NamedTuple):
    error: str
    dirty: bool
    mode: str


class Status(NamedTuple):
    version: int
    dirty: bool
    values: list
    error: str
    descriptors: int


def _train(path: str, pipe, driver: str) -> None:
    prepare(driver)
    memory.Exports = Exports
    nbytes = 4096
    address = _C.cuda_alloc(0, nbytes)
    model = Model(0, memory._cuda_tensor(address, nbytes, 0))
    sender = publisher.Publisher(weights.Local(path), timeout=10)
    while (order := pipe.recv()) is not None:
        version, fault = order
        os.environ["FAKE_CUDA_FAIL"] = fault
        model.fill(version)
        try:
            pipe.send(Answer("", False, sender.update(model, version=version).mode))
        except weights.UpdateError as error:
            pipe.send(Answer(type(error).__name__, error.dirty, ""))
    sender.close()
    _C.cuda_free(0, address)
    pipe.send("closed")


def _serve(path: str, pipe, driver: str) -> None:
    prepare(driver)
    model = Model(0)
    with weights.Receiver(model, path) as receiver:
        pipe.send("listening")
        while True:
            receiver.poll(0.005)
            if not pipe.poll():
                continue
            fault = pipe.recv()
            if fault is None:
                break
            os.environ["FAKE_CUDA_FAIL"] = fault
            error = "" if receiver.last_error is None else type(receiver.last_error).__name__
            receiver.last_error = None
            while receiver.poll():
                pass
            count = len(os.listdir("/proc/self/fd"))
            pipe.send(Status(receiver.version, receiver.dirty, model.values(), error, count))
    pipe.send("closed")


def prepare(driver: str) -> None:
    os.environ["PYRLK_LIBCUDA"] = driver
    torch.set_num_threads(1)
    use_fake_cuda()


class Pair:
    """A trainer and an engine."""

    def __init__(self, path: str, driver: str):
        self.version = 0
        self._pipes, self.processes = [], []
        for run in (_serve, _train):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=run, args=(path, theirs, driver), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
            if run is _serve:
                assert ours.recv() == "listening"
        self._engine, self._trainer = self._pipes

    def update(self, fault: str = "") -> Answer:
        self.version += 1
        return self._ask(self._trainer, (self.version, fault))

    def status(self, fault: str = "") -> Status:
        return self._ask(self._engine, fault)

    def close(self) -> None:
        assert self._ask(self._trainer, None) == "closed"
        assert self._ask(self._engine, None) == "closed"
        for process in self.processes:
            process.join(10)

    @staticmethod
    def _ask(pipe, what):
        pipe.send(what)
        assert pipe.poll(30), "it hangs"
        return pipe.recv()


def values(seed: int) -> list:
    return Model(seed).values()


@pytest.fixture
def pair(socket_path, driver, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_LOG", str(tmp_path / "log"))
    pair = Pair(socket_path, driver)
    yield pair
    for process in pair.processes:
        process.kill()
        process.join()


def calls(tmp_path, process) -> list[str]:
    entries = (line.split() for line in (tmp_path / "log").read_text().splitlines())
    return [call for pid, call in entries if int(pid) == process.pid and call != "sync"]


def left_by(process) -> list[str]:
    """Its device memory."""
    prefix = f"pyrlk-fake-{process.pid}-"
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def test_the_engine_copies_from_the_trainers_memory(pair, tmp_path):
    engine, trainer = pair.processes
    for _ in range(3):
        assert pair.update() == Answer("", False, "direct")
        status = pair.status()
        assert (status.version, status.dirty) == (pair.version, False)
        assert status.values == values(pair.version)
    pair.close()
    # Nothing is staged: the trainer allocates its own memory alone. The engine closes each time,
    # before the update returns: torch may free that memory next.
    assert calls(tmp_path, trainer) == ["alloc", *["export"] * 3, "free"]
    assert calls(tmp_path, engine) == ["open", "close"] * 3
    order = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    closed = [i for i, call in enumerate(order) if call in ("export", "close")]
    assert [order[i] for i in closed] == ["export", "close"] * 3
    assert not left_by(trainer)


# Of each call that an update makes: the update's error, whether bytes may have been copied, and the
# mode where there is none. What the trainer cannot export, asked again and again, is staged.
TRAINER = {
    "range": Answer("", False, "direct"),
    "range*2": Answer("", False, "bucket"),
    "export": Answer("", False, "direct"),
    "export*2": Answer("", False, "bucket"),
    "uuid*2": Answer("", False, "bucket"),
    "push*2": Answer("", False, "bucket"),
    "sync": Answer("StagingError", False, ""),
}
ENGINE = {
    "uuid": Answer("StagingError", False, ""),
    "open": Answer("StagingError", False, ""),
    "push": Answer("StagingError", False, ""),
    "sync": Answer("StagingError", True, ""),
    "close": Answer("StagingError", True, ""),
}


def test_an_error_of_the_driver_is_typed_and_leaves_nothing_behind(pair, tmp_path):
    engine, trainer = pair.processes
    assert pair.update().mode == "direct"
    for side, table in (("trainer", TRAINER), ("engine", ENGINE)):
        for call, wanted in table.items():
            good = pair.version
            fault = f"{call} of the {side}, {good}"
            if side == "engine":
                pair.status(fault)
            answer = pair.update(fault if side == "trainer" else "")
            assert answer == wanted, fault
            status = pair.status()
            if not answer.error:
                good = pair.version
            assert status.version == good, fault
            assert status.dirty is wanted.dirty, fault
            if not wanted.dirty:
                assert status.values == values(good), fault
            # The next one is direct again; what was staged meanwhile is gone with its session.
            assert pair.update() == Answer("", False, "direct"), fault
            status = pair.status()
            assert (status.version, status.dirty) == (pair.version, False), fault
            assert status.values == values(pair.version), fault
    pair.close()
    log = (tmp_path / "log").read_text()
    assert log.count("failed") == sum(2 if "*" in call else 1 for call in (*TRAINER, *ENGINE))
    took, sent = calls(tmp_path, engine), calls(tmp_path, trainer)
    assert took.count("open") == took.count("close")
    assert sent.count("alloc") == sent.count("free")
    assert not left_by(trainer)
