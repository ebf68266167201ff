"""The CUDA path without a GPU: a fake driver (fake_cuda.c) whose device memory is a shared file.

What it proves is the order of calls, offsets, errors and the way over the socket; not the hardware.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pyrlk import _C


def run(code: str, **env: str) -> str:
    """Run code in a process of its own: the driver is loaded once a process."""
    if "memory" in code:
        code = "from pyrlk.weights import memory, StagingError\n" + code
    else:  # the extension alone starts twenty times faster than torch
        code = (
            f"import sys; sys.path.insert(0, {str(Path(_C.__file__).parent)!r}); import _C\n{code}"
        )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


FUNCTIONS = (
    "_C.cuda_device_count()",
    "_C.cuda_device_uuid(0)",
    "_C.cuda_device_by_uuid(bytes(16))",
    "_C.cuda_alloc(0, 16)",
    "_C.cuda_free(0, 16)",
    "_C.cuda_ipc_export(0, 16)",
    "_C.cuda_ipc_open(0, bytes(64))",
    "_C.cuda_ipc_close(0, 16)",
    "_C.cuda_copy_to_host(0, 0, 0, 0)",
    "_C.cuda_copy_to_device(0, 0, 0, 0)",
    "_C.cuda_synchronize(0)",
)


def test_without_a_driver_every_function_says_so():
    calls = "\n".join(
        f"try: {call}; print('no error')\nexcept _C.CudaError as error: print(error)"
        for call in FUNCTIONS
    )
    out = run("print(_C.cuda_unavailable())\n" + calls, PYRLK_LIBCUDA="/nowhere/libcuda.so.1")
    lines = out.splitlines()
    assert len(lines) == 1 + len(FUNCTIONS)
    assert len(set(lines)) == 1
    assert lines[0].startswith("no CUDA driver: /nowhere/libcuda.so.1: cannot open")
    out = run(
        "try: memory.Cuda(0, 16)\nexcept StagingError as error: print(error)",
        PYRLK_LIBCUDA="/nowhere/libcuda.so.1",
    )
    assert out.startswith("CUDA staging memory: no CUDA driver: ")


def test_a_driver_that_is_broken_or_foreign_says_so(driver):
    out = run("print(_C.cuda_unavailable())", PYRLK_LIBCUDA=driver, FAKE_CUDA_BROKEN="1")
    assert out == "cuInit: CUDA_ERROR_FAKE (fake)\n"
    out = run("print(_C.cuda_unavailable())", PYRLK_LIBCUDA="libm.so.6")
    assert "lacks a function of the CUDA driver API" in out


def test_export_names_the_whole_allocation_and_the_offset(driver):
    code = """
at = _C.cuda_alloc(1, 4096)
handle, offset, size = _C.cuda_ipc_export(1, at)
deeper = _C.cuda_ipc_export(1, at + 512)
assert deeper == (handle, offset + 512, size)
print(len(handle), offset, size)
try: _C.cuda_ipc_open(1, handle)
except _C.CudaError as error: print("two processes" in str(error))
_C.cuda_free(1, at)
for call in (lambda: _C.cuda_free(1, at), lambda: _C.cuda_ipc_close(1, at)):
    try: call()
    except _C.CudaError as error: print(error)
try: _C.cuda_ipc_open(0, b"short")
except ValueError as error: print(error)
"""
    assert run(code, PYRLK_LIBCUDA=driver).splitlines() == [
        "64 2048 6144",
        "True",
        "cuMemFree: CUDA_ERROR_INVALID_VALUE (fake)",
        "cuIpcCloseMemHandle: CUDA_ERROR_INVALID_VALUE (fake)",
        "handle must have 64 bytes, got 5",
    ]


def test_what_cannot_be_exported_names_the_allocator_and_frees(driver, tmp_path):
    log = tmp_path / "log"
    code = "try: memory.Cuda(0, 4096)\nexcept StagingError as error: print(error)"
    env = {"PYRLK_LIBCUDA": driver, "FAKE_CUDA_LOG": str(log)}
    out = run(code, **env, FAKE_CUDA_NO_EXPORT="1")
    assert "expandable_segments cannot be exported" in out
    assert [entry.split()[1] for entry in log.read_text().splitlines()] == ["alloc", "free"]
    out = run(code.replace("4096", "1 << 40"), **env)
    assert "cuMemAlloc of 1099511627776 bytes: CUDA_ERROR_OUT_OF_MEMORY" in out


def test_a_gpu_is_found_by_its_uuid(driver):
    code = "print(_C.cuda_device_by_uuid(bytes([0xa1] * 16)))"
    assert run(code, PYRLK_LIBCUDA=driver) == "1\n"
    assert run(code, PYRLK_LIBCUDA=driver, FAKE_CUDA_SWAP="1") == "0\n"
    code = "try: _C.cuda_device_by_uuid(bytes(range(16)))\nexcept _C.CudaError as e: print(e)"
    assert run(code, PYRLK_LIBCUDA=driver) == (
        "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f is not among the 2 GPUs that this process "
        "sees: check CUDA_VISIBLE_DEVICES\n"
    )


TENSOR = """
import torch
class Tensor:  # what Exports asks of one, at an address of the fake driver
    device = torch.device("cuda", 1)
    def __init__(self, at, size=64): self.at, self.size = at, size
    def is_contiguous(self): return True
    def numel(self): return self.size // 4
    def element_size(self): return 4
    def data_ptr(self): return self.at
    def untyped_storage(self): return Storage(self)
    nbytes = property(lambda self: self.size)
class Storage:
    def __init__(self, tensor): self.tensor = tensor
    def data_ptr(self): return self.tensor.at
    def nbytes(self): return self.tensor.size
"""
FIND = """
from pyrlk import _C
at = _C.cuda_alloc(1, 4096)
exports = memory.Exports()
found = [exports.find(Tensor(at + k)) for k in (0, 512, 1024, 1026)]
"""


def test_a_trainers_tensor_is_found_in_its_allocation_by_one_handle(driver, tmp_path):
    log = tmp_path / "log"
    code = (
        TENSOR
        + FIND
        + """
first, second, third, odd = found
assert odd is None  # misaligned: staged
assert first.handle is second.handle is third.handle
assert (first.offset, second.offset, third.offset) == (2048, 2560, 3072)
assert first.handle.kind is memory.Kind.CUDA
print(first.handle.uuid.hex(), first.handle.nbytes, first.handle.offset)
assert exports.find(Tensor(at + 4000, 200)) is None  # leaves the allocation
_C.cuda_free(1, at)
"""
    )
    out = run(code, PYRLK_LIBCUDA=driver, FAKE_CUDA_LOG=str(log))
    assert out == f"{'a1' * 16} 6144 0\n"
    calls = [entry.split()[1] for entry in log.read_text().splitlines()]
    assert calls.count("export") == 1


def test_a_tensor_of_another_allocator_is_staged(driver):
    code = TENSOR + FIND + "print(found); _C.cuda_free(1, at)"
    assert run(code, PYRLK_LIBCUDA=driver, FAKE_CUDA_NO_EXPORT="1") == "[None, None, None, None]\n"


@pytest.mark.distributed
def test_the_importer_closes_before_the_exporter_frees(driver, start, tmp_path):
    log = tmp_path / "log"
    env = {**os.environ, "PYRLK_LIBCUDA": driver, "FAKE_CUDA_LOG": str(log)}
    receiver = start("receiver", "--version", "2", "--fake-cuda", env=env)
    options = ("--fake-cuda", "--bucket-bytes", "20000", "--version")
    sender = start("publisher", *options, "2", env={**env, "FAKE_CUDA_SWAP": "1"})
    assert sender.wait(60) == 0
    assert receiver.stdout.readline() == "listening\n"
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 300), nn.LayerNorm(300), nn.Linear(300, 64))
    total = sum(p.detach().double().sum().item() for p in model.bfloat16().parameters())
    assert receiver.stdout.readline() == f"version 2 dirty False sum {total!r}\n"
    calls = [entry.split() for entry in log.read_text().splitlines()]
    sent = [call for pid, call in calls if pid == str(sender.pid) and call != "sync"]
    took = [call for pid, call in calls if pid == str(receiver.pid) and call != "sync"]
    # Handles are opened once a slot, not once a bucket.
    assert sent == ["alloc", "export"] * 2 + ["free"] * 2
    assert took == ["open"] * 2 + ["close"] * 2
    order = [call for _, call in calls]
    assert max(k for k, c in enumerate(order) if c == "close") < order.index("free")
    # Every bucket is complete before its handle is announced, and read before it is acknowledged.
    assert order.count("sync") >= 8
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("pyrlk-fake-")]


def doctor(**env: str) -> list[str]:
    code = (
        "from pyrlk import doctor, _C\nprint(*(l.value for l in doctor._cuda_handles()), sep='\\n')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()


def test_doctor_opens_a_handle_in_another_process(driver, tmp_path):
    log = tmp_path / "calls"
    lines = doctor(PYRLK_LIBCUDA=driver, FAKE_CUDA_LOG=str(log))
    assert lines == ["yes: cudaIpcMemHandle exported, and opened by another process"] * 2
    calls = [line.split() for line in log.read_text().splitlines()]
    assert [call for _, call in calls] == ["alloc", "export", "open", "close", "free"] * 2
    assert len({pid for pid, _ in calls}) == 3


def test_doctor_tells_a_handle_that_cannot_be_opened(driver):
    lines = doctor(PYRLK_LIBCUDA=driver, FAKE_CUDA_FAIL="open once")
    assert all(
        "exported, but not opened by another process: cuIpcOpenMemHandle" in x for x in lines
    )
    lines = doctor(PYRLK_LIBCUDA=driver, FAKE_CUDA_NO_EXPORT="1")
    assert all(line.startswith("no: cuIpcGetMemHandle") for line in lines)
