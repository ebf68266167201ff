"""SGLang's own payloads, which its endpoint unpickles: the one file of the package that pickles.

    bucket   {"flattened_tensor": uint8 tensor, "metadata": [name, shape, dtype, start, end, numel]}
    control  [("pyrlk", uint8 tensor)]

Encoding only: nothing that arrives is ever unpickled here. SGLang takes an exact list of globals;
all that these payloads name is torch's own rebuilding of a tensor, and types.SimpleNamespace.

A bucket's bytes travel by name of a shared memory file ("file_system" sharing): SGLang refuses
descriptors of a foreign process, and inline bytes are a hundred times slower.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from .layout import Entry


class SharedBuffer:
    """`nbytes` of memory that another process maps by file name; reused from update to update."""

    def __init__(self, nbytes: int):
        with _silent_children():
            storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
        self._storage: torch.UntypedStorage | None = storage
        self.nbytes = nbytes

    @property
    def flat(self) -> Tensor:
        if self._storage is None:
            raise ValueError("this SharedBuffer is closed")
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(self._storage)

    def close(self) -> None:
        """Drop the memory; the file goes with its last user."""
        self._storage = None


@contextlib.contextmanager
def _silent_children() -> Iterator[None]:
    """Start processes without our standard error.

    torch starts a torch_shm_manager at the first shared file. It lives as long as the server that
    reads from it; with an inherited pipe, `python train.py 2>&1 | tee log` would never end.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Pickler(pickle.Pickler):
    """Tensors by the file of their storage, without touching torch's global sharing strategy."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return reductions.reduce_tensor(obj)
        if isinstance(obj, torch.storage.TypedStorage):
            return reductions.reduce_typed_storage(obj)
        if isinstance(obj, torch.UntypedStorage):
            manager, handle, size = obj._share_filename_cpu_()
            # The reader gives this reference back; it must read each payload exactly once.
            obj._shared_incref()
            return reductions.rebuild_storage_filename, (type(obj), manager, handle, size)
        return NotImplemented


def bucket_payload(flat: Tensor, entries: Sequence[Entry]) -> str:
    """One rank's payload of load_format="flattened_bucket"; `flat` lies in a SharedBuffer."""
    metadata = [
        SimpleNamespace(
            name=e.name,
            shape=e.shape,
            dtype=e.dtype,
            start_idx=e.offset,
            end_idx=e.offset + e.nbytes,
            numel=e.nbytes,
        )
        for e in entries
    ]
    return _encode({"flattened_tensor": flat, "metadata": metadata})


def control_payload(data: bytes) -> str:
    """A few bytes for a custom loader, inline: a tensor of at most 256 bytes."""
    if not 0 < len(data) <= 256:
        raise ValueError(f"a control payload has 1 to 256 bytes, got {len(data)}")
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return base64.b64encode(pickle.dumps([("pyrlk", tensor)])).decode()


def _encode(obj: object) -> str:
    out = io.BytesIO()
    _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(obj)
    return base64.b64encode(out.getvalue()).decode()
