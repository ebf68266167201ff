"""The cooperative schedule of the fused loss on a GPU; see schedules.py."""

from __future__ import annotations

from collections.abc import Iterator

from . import schedules


def main(device: str, quick: bool) -> Iterator[dict]:
    """One row a shape and number of programs; nothing without a GPU."""
    if device != "cuda":
        return
    from pyrlk.triton_kernels.schedule import Schedule

    kinds = {f"cooperative, {n} an SM": Schedule("cooperative", n) for n in (1, 2)}
    yield from schedules.compare(kinds, quick)
