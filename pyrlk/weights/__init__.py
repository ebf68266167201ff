"""Weight hand-over: trainer → shared staging memory → engine, by handle and proven by checksum.

    trainer process                                    engine process
    publisher = Publisher(Local(path))                 receiver = Receiver(model, path)
    publisher.update(model, version=1)   ── handle ──▶ receiver.poll()    # between two rollouts

layout (tensors → buckets) · memory (staging, handles) · wire (frames) · publisher · receiver
"""

from .errors import (
    ApplyFailed,
    Busy,
    ChecksumMismatch,
    DtypeMismatch,
    EngineDirty,
    MissingName,
    PeerLost,
    ProtocolError,
    ShapeMismatch,
    StagingError,
    StaleVersion,
    Timeout,
    UnknownName,
    Unsupported,
    UpdateError,
)
from .publisher import Local, Publisher, UpdateReport
from .receiver import Receiver

__all__ = [
    "ApplyFailed",
    "Busy",
    "ChecksumMismatch",
    "DtypeMismatch",
    "EngineDirty",
    "Local",
    "MissingName",
    "PeerLost",
    "ProtocolError",
    "Publisher",
    "Receiver",
    "ShapeMismatch",
    "StagingError",
    "StaleVersion",
    "Timeout",
    "UnknownName",
    "Unsupported",
    "UpdateError",
    "UpdateReport",
]
