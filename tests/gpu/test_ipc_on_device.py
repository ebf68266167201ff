"""Device memory between two processes by cudaIpcMemHandle, and updates of weights that lie in it.

In a dry run both halves meet the fake driver of tests/weights.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dry_device import DRY

from pyrlk import _C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HERE = Path(__file__).parent
FAKE = HERE.parent / "weights/fake_cuda.c"
# The extension alone starts twenty times faster than torch.
ALONE = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(_C.__file__).parent)!r})
import _C
def read(at, count):
    room = ctypes.create_string_buffer(count)
    _C.cuda_copy_to_host(0, ctypes.addressof(room), at, count)
    return room.raw.hex()
"""
EXPORT = """
at = _C.cuda_alloc(0, 4096)
data = bytes(range(256)) * 16
source = ctypes.create_string_buffer(data, len(data))
_C.cuda_copy_to_device(0, at, ctypes.addressof(source), len(data))
handle, offset, size = _C.cuda_ipc_export(0, at + 500)
print(handle.hex(), offset, size, flush=True)
input()
_C.cuda_free(0, at)
print("freed", flush=True)
"""
WANTED = (bytes(range(256)) * 16)[500:600].hex()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of the child processes: the driver of the device, or the fake one."""
    if not DRY:
        return dict(os.environ)
    library = tmp_path_factory.mktemp("driver") / "libcuda_fake.so"
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", str(FAKE), "-o", str(library)], check=True)
    return {**os.environ, "PYRLK_LIBCUDA": str(library)}


@pytest.fixture
def start(environment):
    """start(code) runs it in a process of its own; what still runs at the end is killed."""
    running = []

    def run(code, **extra):
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | extra,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        return child

    yield run
    for child in running:
        child.kill()
        child.communicate()
        for left in Path("/dev/shm").glob(f"pyrlk-fake-{child.pid}-*"):  # of the fake driver
            left.unlink()


def finish(child, text="\n"):
    """The last lines of a child that is let go on."""
    out, errors = child.communicate(text, timeout=120)
    assert child.returncode == 0, errors
    return out.split()


def exported(child):
    handle, offset, size = child.stdout.readline().split()
    return handle, int(offset), int(size)


def test_an_address_inside_an_allocation_crosses_as_handle_and_offset(start):
    exporter = start(ALONE + EXPORT)
    handle, offset, size = exported(exporter)
    assert offset >= 500
    assert size >= offset + 100
    importer = start(
        ALONE
        + f"""
base = _C.cuda_ipc_open(0, bytes.fromhex({handle!r}))
print(read(base + {offset}, 100))
_C.cuda_ipc_close(0, base)
"""
    )
    assert finish(importer) == [WANTED]
    assert finish(exporter) == ["freed"]


def test_a_handle_that_is_opened_twice_is_closed_twice(start):
    exporter = start(ALONE + EXPORT)
    handle, offset, _ = exported(exporter)
    importer = start(
        ALONE
        + f"""
handle = bytes.fromhex({handle!r})
first, second = _C.cuda_ipc_open(0, handle), _C.cuda_ipc_open(0, handle)
_C.cuda_ipc_close(0, first)
print(read(second + {offset}, 100))
_C.cuda_ipc_close(0, second)
try: _C.cuda_ipc_close(0, second)
except _C.CudaError: print("refused")
"""
    )
    assert finish(importer) == [WANTED, "refused"]
    assert finish(exporter) == ["freed"]


def test_the_exporter_cannot_open_its_own_handle(start):
    code = """
at = _C.cuda_alloc(0, 4096)
handle, _, _ = _C.cuda_ipc_export(0, at)
try: _C.cuda_ipc_open(0, handle)
except _C.CudaError as error: print("two processes" in str(error))
_C.cuda_free(0, at)
"""
    assert finish(start(ALONE + code)) == ["True"]


def test_a_peer_that_dies_leaves_the_importer_alive(start):
    exporter = start(ALONE + EXPORT)
    handle, *_ = exported(exporter)
    importer = start(
        ALONE
        + f"""
base = _C.cuda_ipc_open(0, bytes.fromhex({handle!r}))
print("open", flush=True)
input()
try: _C.cuda_ipc_close(0, base)
except _C.CudaError: pass
again = _C.cuda_alloc(0, 4096)  # the driver still works for this process
print(len(read(again, 100)))
_C.cuda_free(0, again)
"""
    )
    assert importer.stdout.readline() == "open\n"
    exporter.send_signal(signal.SIGKILL)
    exporter.wait(60)
    assert finish(importer) == ["200"]


# From here on torch's own memory; in a dry run the children have the device too.
THERE = {"PYTHONPATH": f"{HERE / 'dry'}:{os.environ.get('PYTHONPATH', '')}"} if DRY else {}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
EXPANDABLE |= {"PYTORCH_ALLOC_CONF": EXPANDABLE["PYTORCH_CUDA_ALLOC_CONF"]}  # its newer name
MODEL = """
import sys, torch
from torch import nn
from pyrlk import _C, weights
from pyrlk.weights import memory
def model(seed):
    torch.manual_seed(seed)
    layers = nn.Linear(64, 3000), nn.LayerNorm(3000), nn.Linear(3000, 64)
    return nn.Sequential(*layers).bfloat16().cuda()
def total(module):
    return sum(p.detach().double().sum().item() for p in module.parameters())
"""
ENGINE = """
engine = model(1)
with weights.Receiver(engine, sys.argv[1]) as receiver:
    print("listening", flush=True)
    receiver.serve(until=lambda: receiver.version >= 3)
    receiver.poll(1.0)
print(receiver.version, receiver.dirty, repr(total(engine)))
"""
TRAINER = """
trainer = model(2)
if SHARE: weights.share(trainer)
found = memory.Exports()
handles = {found.find(p).handle.id for p in trainer.parameters() if found.find(p)}
with weights.Publisher(weights.Local(sys.argv[1]), bucket_bytes=100000) as publisher:
    for version in (1, 2, 3):
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.add_(version)
        report = publisher.update(trainer, version=version)
print(report.mode, len(handles), repr(total(trainer)))
"""


def with_argument(code, path):
    return f"import sys; sys.argv = ['-', {str(path)!r}]\n" + code


@pytest.mark.parametrize(
    ("settings", "share", "mode"),
    [
        pytest.param({}, False, "direct", id="direct"),
        pytest.param({}, True, "direct", id="shared"),
        pytest.param(
            EXPANDABLE,
            False,
            "bucket",
            id="staged",
            marks=pytest.mark.skipif(DRY, reason="needs torch's CUDA allocator"),
        ),
    ],
)
def test_an_update_brings_every_bit(start, socket_path, settings, share, mode):
    engine = start(with_argument(MODEL + ENGINE, socket_path), **THERE)
    assert engine.stdout.readline() == "listening\n"
    trainer = MODEL + f"SHARE = {share}" + TRAINER
    used, handles, sent = finish(start(with_argument(trainer, socket_path), **THERE | settings))
    assert used == mode
    if share:
        assert handles == "1"
    assert finish(engine) == ["3", "False", sent]


@pytest.mark.skipif(DRY, reason="needs torch's CUDA allocator")
def test_expandable_segments_are_refused_with_the_cure(start):
    code = """
x = torch.ones(1 << 20, device="cuda")
try: _C.cuda_ipc_export(0, x.data_ptr())
except _C.CudaError as error:
    print("expandable_segments" in str(error), "copy it into a buffer" in str(error))
print(memory.Exports().find(x))
"""
    assert finish(start(MODEL + code, **EXPANDABLE)) == ["True", "True", "None"]
    (found,) = finish(start(MODEL + code.replace("find(x)", "find(x) is not None")))
    assert found == "True"


def test_an_engine_that_dies_is_an_error_and_the_next_one_is_served(start, socket_path):
    code = """
trainer = model(2)
with weights.Publisher(weights.Local(sys.argv[1]), timeout=10.0) as publisher:
    publisher.update(trainer, version=1)
    print("sent", flush=True)
    input()
    try: publisher.update(trainer, version=2)
    except weights.UpdateError as error: print(type(error).__name__, flush=True)
    input()
    publisher.update(trainer, version=3)
print(repr(total(trainer)))
"""
    engine = start(with_argument(MODEL + ENGINE, socket_path), **THERE)
    assert engine.stdout.readline() == "listening\n"
    trainer = start(with_argument(MODEL + code, socket_path), **THERE)
    assert trainer.stdout.readline() == "sent\n"
    engine.kill()
    engine.wait(60)
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "PeerLost\n"
    again = start(with_argument(MODEL + ENGINE, socket_path), **THERE)
    assert again.stdout.readline() == "listening\n"
    (sent,) = finish(trainer)
    assert finish(again) == ["3", "False", sent]


@pytest.fixture
def socket_path(tmp_path):
    folder = tmp_path / "pyrlk"
    folder.mkdir(mode=0o700)
    return folder / "weights.sock"
