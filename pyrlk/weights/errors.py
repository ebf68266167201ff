"""What can go wrong in a weight update, one class a cause.

Both sides share this table: the receiver sends the code of a class, a name and a message; the
publisher raises that class. `UpdateError.dirty` is True where the engine may hold a mixture of two
versions and needs a full update.
"""

from __future__ import annotations

from typing import Any


class UpdateError(RuntimeError):
    """A weight update failed; the version of the receiver has not changed.

    Attributes
    ----------
    dirty : bool
        Bytes of the failed version were copied: the engine needs a full update before it serves.
    """

    code = 1

    def __init__(self, message: str, *, dirty: bool = False):
        super().__init__(message)
        self.dirty = dirty


class UnknownName(UpdateError):
    """A tensor that the engine does not have."""

    code = 2


class MissingName(UpdateError):
    """A full update that leaves out a tensor of the engine."""

    code = 3


class ShapeMismatch(UpdateError):
    """A tensor of another shape than the engine's."""

    code = 4


class DtypeMismatch(UpdateError):
    """A tensor of another dtype than the engine's; nothing is cast silently."""

    code = 5


class StaleVersion(UpdateError):
    """A version that is not above the one that the engine serves."""

    code = 6


class ChecksumMismatch(UpdateError):
    """The bytes that arrived are not the bytes that were packed."""

    code = 7


class EngineDirty(UpdateError):
    """A partial update onto an engine without a complete version under it."""

    code = 8


class Unsupported(UpdateError):
    """A tensor, a device or a combination that this target cannot take."""

    code = 9


class ApplyFailed(UpdateError):
    """The engine's own load_weights raised."""

    code = 10


class Busy(UpdateError):
    """Another publisher holds this receiver."""

    code = 11


class ProtocolError(UpdateError):
    """A malformed, forged or unexpected message; the connection is dropped."""

    code = 12


class PeerLost(UpdateError):
    """The other process is gone, or nobody listens."""

    code = 13


class Timeout(UpdateError, TimeoutError):
    """The other process lives but did not answer in time."""

    code = 14


class StagingError(UpdateError):
    """Staging memory cannot be had, or cannot be handed over."""

    code = 15


class ManifestUnknown(UpdateError):
    """The engine's names cannot be learnt, and it would swallow or die of a wrong one."""

    code = 16


class RanksDisagree(UpdateError):
    """The ranks of a trainer do not publish the same: another version, other names or shapes."""

    code = 17


_BY_CODE = {
    kind.code: kind
    for kind in (
        UpdateError,
        UnknownName,
        MissingName,
        ShapeMismatch,
        DtypeMismatch,
        StaleVersion,
        ChecksumMismatch,
        EngineDirty,
        Unsupported,
        ApplyFailed,
        Busy,
        ProtocolError,
        PeerLost,
        Timeout,
        StagingError,
        ManifestUnknown,
        RanksDisagree,
    )
}
_BY_NAME = {kind.__name__: kind for kind in _BY_CODE.values()}
_BUILTIN: dict[str, type[Exception]] = {kind.__name__: kind for kind in (TypeError, ValueError)}


def from_code(code: int, message: str, *, dirty: bool) -> UpdateError:
    """The error that the other side reported."""
    return _BY_CODE.get(code, UpdateError)(message, dirty=dirty)


def said(error: BaseException) -> dict[str, Any]:
    """An error as JSON, for the other ranks of a trainer."""
    dirty = error.dirty if isinstance(error, UpdateError) else False
    return {"kind": type(error).__name__, "message": str(error), "dirty": dirty}


def heard(error: dict[str, Any]) -> Exception:
    """The error that another rank has said, of the same class where that is one of ours."""
    kind, message, dirty = error["kind"], error["message"], error["dirty"]
    if kind in _BY_NAME:
        return _BY_NAME[kind](message, dirty=dirty)
    if kind in _BUILTIN:
        return _BUILTIN[kind](message)
    return UpdateError(f"{kind}: {message}", dirty=dirty)
