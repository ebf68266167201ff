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
    ManifestUnknown,
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
from .sglang import SGLang

__all__ = [
    "ApplyFailed",
    "Busy",
    "ChecksumMismatch",
    "DtypeMismatch",
    "EngineDirty",
    "Local",
    "ManifestUnknown",
    "MissingName",
    "PeerLost",
    "ProtocolError",
    "Publisher",
    "Receiver",
    "SGLang",
    "ShapeMismatch",
    "StagingError",
    "StaleVersion",
    "Timeout",
    "UnknownName",
    "Unsupported",
    "UpdateError",
    "UpdateReport",
]
