"""What tests in the interpreter share: half its time, and rows of many tiles in a few columns."""

import contextlib

import pytest
from triton.runtime import interpreter

from pyrlk.triton_kernels import kept, row, sample


@contextlib.contextmanager
def patching_the_language_once():
    """Halve the interpreter's time: it patches all of triton.language at every device call.

    A launch has patched what our own functions see; triton's library needs it once a function.
    """
    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton.") and self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


def make_tiles_small(patch: pytest.MonkeyPatch) -> None:
    """Tiles of 64: rows of a few hundred columns then cross tiles, at a fraction of the time."""
    patch.setattr(row, "TILE", 64)
    patch.setattr(kept, "TILE", 32)
    for name, size in (("SPAN", 8), ("CHUNK", 32), ("CAPACITY", 48), ("MAX_TILES", 16)):
        patch.setattr(sample, name, size)
