"""What an engine's own checksums must be: those that the same tensors gave before.

    state := SHA-256(selector, manifest, sums of all tensors)           after a full update
             SHA-256(state before, the same)                            after a partial one

SGLang hashes the fused tensors of each rank, which a sender cannot predict. So the first engine
that takes a state says what its checksums are; whoever takes it later must come to the same: the
same engine when the weights are sent again, and every replica of one layout.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from .errors import ChecksumMismatch

_KEPT = 8
Checksums = list[dict[str, str]]  # of each rank, by the name of the engine's own tensor


def state_after(before: bytes | None, selector: str, content: bytes) -> bytes:
    """The name of an engine's weights; `before` is given for a partial update."""
    return hashlib.sha256(b"\0".join([before or b"", selector.encode(), content])).digest()


class References:
    """Checksums of the last states, by the layout of the engines that gave them."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, tuple[str, Checksums]] = OrderedDict()

    def check(self, layout: tuple, state: bytes, url: str, found: Checksums) -> None:
        """Compare with what the same state gave before, or keep it.

        Raises
        ------
        ChecksumMismatch
            The engine holds other bytes than the one before it.
        """
        first, wanted = self._known.setdefault((layout, state), (url, found))
        self._known.move_to_end((layout, state))
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        if len(wanted) != len(found):
            raise ChecksumMismatch(
                f"{url} answers for {len(found)} ranks, {first} for {len(wanted)}", dirty=True
            )
        for rank, (old, new) in enumerate(zip(wanted, found, strict=True)):
            differing = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
            if differing:
                raise ChecksumMismatch(
                    f"{url}, rank {rank}: {differing[0]!r} (one of {len(differing)} tensors) has "
                    f"checksum {new.get(differing[0])}, the same update gave "
                    f"{old.get(differing[0])} in {first}: send a full update again",
                    dirty=True,
                )
