"""A device that is not there, so that no gpu test runs for the first time on a rented GPU.

`install()` makes tensors that say cuda:0 and live in the memory of the CPU. Torch operations run on
the CPU, kernels of pyrlk in Triton's interpreter (TRITON_INTERPRET=1). As on a device

    tensors of the two devices do not mix, and kernels take none of the CPU's
    an op of pyrlk runs its CUDA body
    what waits for the device raises under set_sync_debug_mode("error") and in a capture
    a captured graph replays its operations into the same memory
    where a driver is pretended too (PYRLK_LIBCUDA), tensors lie in memory that it can export

Timing, races, compiled code and the rounding of the hardware are not the device's.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.util
import os
import time
import types

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DRY = os.environ.get("PYRLK_DRY_GPU") == "1"
SHORT = os.environ.get("PYRLK_GPU_SHORT") == "1"  # under a sanitizer
_LONGEST = 40000  # three groups of a row
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

_WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
    aten._unique2.default,
}
# Take a tensor of the CPU beside those of the device.
_MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}


def size(device, dry):
    """A setting of a test: one that fills a device, or one that the interpreter can go through."""
    if SHORT and isinstance(device, int):
        device = min(device, _LONGEST)
    return dry if DRY else device


class _State:
    installed = False
    sync = "default"
    capture: list | None = None  # what the graph under capture has recorded


class Device(Tensor):
    """A tensor on cuda:0 whose values are in `host`.

    Only Python sees that device: torch itself, which may be built without CUDA, sees the CPU's.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def cpu(self) -> Tensor:
        _wait("cpu()")
        return _ToHost.apply(self)

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return _arrived, (self.cpu(),)  # torch's own way to another process copies here

    def numpy(self):
        raise TypeError("can't convert a tensor of the device to numpy; use .cpu() first")

    def __repr__(self, **_options) -> str:
        return f"on cuda:0: {self.host!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _arrived(host: Tensor) -> Tensor:
    return _to(host, CUDA)


class _Memory:
    """As torch's allocator: blocks of the driver, cut into tensors. Nothing is given back."""

    BLOCK, ALIGN = 8 << 20, 512

    def __init__(self):
        self.blocks: list[int] = []
        self.at = self.end = 0

    def like(self, x: Tensor) -> Tensor:
        """A tensor of the same form in memory of the driver; its values are not copied."""
        from pyrlk import _C

        nbytes = x.untyped_storage().nbytes()
        if self.at + nbytes > self.end:
            size = max(self.BLOCK, nbytes)
            self.at = _C.cuda_alloc(0, size)
            self.end = self.at + size
            if not self.blocks:
                multiprocessing.util.Finalize(None, self.free, exitpriority=0)
            self.blocks.append(self.at)
        address = self.at
        self.at += -(-nbytes // self.ALIGN) * self.ALIGN
        flat = _at(address, nbytes)
        return flat.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())

    def free(self) -> None:
        from pyrlk import _C

        for block in self.blocks:
            _C.cuda_free(0, block)


def _at(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


_memory = _Memory() if os.environ.get("PYRLK_LIBCUDA") else None
_ALLOCATES = {aten.empty.memory_format, aten.empty_strided.default, aten._to_copy.default}


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.host.clone()

    @staticmethod
    def backward(ctx, g):
        return _to(g, CUDA)


_plain_to = Tensor.to


def _to(self: Tensor, *args, device=None, **kwargs) -> Tensor:
    """Tensor.to, between the two devices."""
    devices = [x for x in (device, *args) if isinstance(x, str | torch.device)]
    # nn.Module.to gives (device, None, non_blocking).
    rest = [x for x in args if isinstance(x, torch.dtype | Tensor)]
    x = _plain_to(self, *rest, **kwargs) if rest or kwargs else self
    if not devices or _on_cuda(devices[0]) == isinstance(x, Device):
        return x
    return aten._to_copy(x, device=CUDA) if _on_cuda(devices[0]) else x.cpu()


def _made_there(make):
    """torch.tensor or as_tensor: made on the CPU and copied, as torch does."""

    def call(data, *args, device=None, **kwargs):
        if not _on_cuda(device):
            return make(data, *args, device=device, **kwargs)
        interface = getattr(data, "__cuda_array_interface__", None)
        if interface is not None and not isinstance(data, Tensor):
            return Device(_at(interface["data"][0], interface["shape"][0]))
        there = isinstance(data, Device)
        x = data if there else make(data, *args, device="cpu", **kwargs)
        return _to(x, *kwargs.values()) if there else _to(x, CUDA)

    return call


class _Mode(TorchDispatchMode):
    """Also sees the operations that make a tensor from none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_mode = _Mode()


def _hosts(x):
    """The same for the CPU."""
    x = tree_map_only(Device, lambda t: t.host, x)
    return tree_map_only(torch.device, lambda device: torch.device("cpu"), x)


def _on_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _run(func, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    here = any(isinstance(x, Device) for x in tensors)
    to_cuda = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
    if not here and not to_cuda:
        return func(*args, **kwargs)
    if func.namespace == "pyrlk":
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        with _mode:
            return func.redispatch(key, *args, **kwargs)
    strangers = [x for x in tensors if not isinstance(x, Device)]
    if here and func not in _MIXED and any(x.dim() > 0 for x in strangers):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if _waits(func, args, strangers, to_cuda):
        _wait(str(func))
    host_args, host_kwargs = _hosts((args, kwargs))
    out = _call(func, host_args, host_kwargs)
    if _memory and func in _ALLOCATES and out.numel() and not here:
        out = _memory.like(out).copy_(out)
    if _State.capture is not None:
        _State.capture.append((func, host_args, host_kwargs, out))
    if func is aten.copy_.default and not isinstance(args[0], Device):
        return out
    wrapped = tree_map_only(Tensor, Device, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if here else wrapped


def _call(func, args, kwargs):
    if func._schema.name in ("aten::mm", "aten::addmm") and "dtype" in func._overloadname:
        return _widening_product(func, args, kwargs)
    return func(*args, **kwargs)


def _widening_product(func, args, kwargs):
    """A product of 16-bit operands in float32, which torch has on CUDA alone."""
    *factors, dtype = args if "out_dtype" not in kwargs else (*args, kwargs["out_dtype"])
    plain = func._schema.name.removeprefix("aten::")
    rest = {k: v for k, v in kwargs.items() if k != "out_dtype"}
    return getattr(torch, plain)(*(x.to(dtype) for x in factors), **rest)


def _waits(func, args, strangers, to_cuda: bool) -> bool:
    if func in (aten.index.Tensor, aten.index_put_.default):
        masks = (torch.bool, torch.uint8)
        return any(
            x is not None and (x.dtype in masks or any(x is s for s in strangers)) for x in args[1]
        )
    across = func is aten.copy_.default or to_cuda  # from pageable memory
    return func in _WAITS or (across and bool(strangers))


def _wait(what: str) -> None:
    if _State.capture is not None:
        raise RuntimeError(f"{what} waits for the device, and a graph is being captured")
    if _State.sync == "error":
        raise RuntimeError(f"{what} waits for the device")


def _launch(run):
    """A launch of the interpreter on device tensors."""

    def call(self, *args, **kwargs):
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and not isinstance(x, Device):
                raise ValueError("a kernel was given a tensor of the CPU")
        host_args, host_kwargs = _hosts((args, kwargs))

        def again(*args, **kwargs):
            with torch.utils._python_dispatch._disable_current_modes():
                run(self, *args, **kwargs)

        again(*host_args, **host_kwargs)
        if _State.capture is not None:
            _State.capture.append((again, host_args, host_kwargs, None))

    return call


class Graph:
    """What torch.cuda.CUDAGraph is to a test: operations to run again, in the same memory."""

    def __init__(self):
        self.record: list = []

    def replay(self) -> None:
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, out in self.record:
                again = tree_leaves(
                    _call(func, args, kwargs) if out is not None else func(*args, **kwargs)
                )
                for old, new in zip(tree_leaves(out), again, strict=out is not None):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def _capture(graph: Graph, **_options):
    _State.capture = graph.record
    try:
        yield
    finally:
        _State.capture = None


class _Stream:
    def wait_stream(self, other) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, **_options):
        self.at = 0.0

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other) -> float:
        return (other.at - self.at) * 1e3

    def synchronize(self) -> None:
        pass


def _synchronize(device=None) -> None:
    if _State.capture is not None:
        raise RuntimeError("synchronize() in a capture")


def _set_sync_debug_mode(mode) -> None:
    _State.sync = mode


def install() -> None:
    """Put the device in place, for the rest of this process."""
    if _State.installed:
        return
    _State.installed = True
    from triton.runtime import interpreter

    properties = types.SimpleNamespace(
        name="dry run", multi_processor_count=4, major=9, minor=0, total_memory=1 << 33
    )
    fakes = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (1 << 33, 1 << 33),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": _synchronize,
        "is_current_stream_capturing": lambda: _State.capture is not None,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": _capture,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    executor = interpreter.GridExecutor
    executor.__call__ = _launch(executor.__call__)
    Tensor.to = _to
    # A parameter stays the object it was, and so does what is tied to it.
    torch.__future__.set_swap_module_params_on_conversion(True)
    Tensor.cuda = lambda self, device=None: _to(self, CUDA)
    torch.tensor, torch.as_tensor = _made_there(torch.tensor), _made_there(torch.as_tensor)
    _mode.__enter__()
