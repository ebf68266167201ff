"""Weight hand-over: trainer → shared staging memory → engine, by handle and proven by checksum.

    trainer process                                    engine process
    publisher = Publisher(Local(path))                 receiver = Receiver(model, path)
    publisher.update(model, version=1)   ── handle ──▶ receiver.poll()    # between two rollouts

gather (module → names) · layout (tensors → buckets) · memory (staging, handles) · wire (frames)
publisher · receiver · sglang
"""

from . import gather
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
    RanksDisagree,
    ShapeMismatch,
    StagingError,
    StaleVersion,
    Timeout,
    UnknownName,
    Unsupported,
    UpdateError,
)
from .local_session import Local
from .memory import share
from .publisher import Publisher
from .receiver import Receiver
from .report import EngineReport, UpdateReport
from .sglang import SGLang

__all__ = [
    "ApplyFailed",
    "Busy",
    "ChecksumMismatch",
    "DtypeMismatch",
    "EngineDirty",
    "EngineReport",
    "Local",
    "ManifestUnknown",
    "MissingName",
    "PeerLost",
    "ProtocolError",
    "Publisher",
    "RanksDisagree",
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
    "gather",
    "share",
]
