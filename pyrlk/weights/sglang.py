"""An SGLang server as the target of a Publisher.

    bucket   any server: each bucket is one /update_weights_from_tensor (flattened_bucket), whose
             bytes the server maps from shared memory
    plan     started with --custom-weight-loader pyrlk.weights.sglang_loader.load: one request for
             all; bytes and answers go over our own socket, copies are replayed from a plan
    distributed  any server, on any machine: each bucket is one broadcast of torch.distributed

All follow the order of sglang_server.py. What goes wrong before the engine's first copy is taken
back: the engine goes on with its old weights. Later, it stays paused under a version that says so,
until a full update succeeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import manifest
from .errors import Unsupported
from .session import Session, Target
from .sglang_distributed import DistributedSession
from .sglang_plan import PlanSession
from .sglang_server import LOADER, Server
from .sglang_session import BucketSession, Settings

_MODES = ("auto", "bucket", "plan", "distributed")
_PAUSES = ("retract", "abort", "in_place")


@dataclass(frozen=True)
class SGLang(Target):
    """An SGLang server (0.5.23 is tested) by its URL, on this machine unless `mode` says other.

    Parameters
    ----------
    url : str
        `http://host:port`; one server a replica (`--dp-size 1`).
    mode : {"auto", "bucket", "plan", "distributed"}
        "plan" needs a server started with
        `--custom-weight-loader pyrlk.weights.sglang_loader.load`; "auto" takes it where it can.
        "distributed" is for a server on another machine: a broadcast of torch.distributed.
    pause : {"retract", "abort", "in_place"}
        What becomes of running requests: put back and prefilled anew under the new weights, ended,
        or kept with the key-value cache of the old weights.
    api_key : str, optional
        The server's admin key.
    expect : module or mapping of name to tensor, optional
        The names, shapes and dtypes of the engine's checkpoint, where the files at its
        `model_path` cannot be read from here. Meta tensors will do.
    unchecked_names : bool
        Send even where neither is known: a wrong name is then ignored by the server, a wrong shape
        ends it.
    """

    url: str
    mode: str = "auto"
    pause: str = "retract"
    api_key: str | None = None
    expect: Any = None
    unchecked_names: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise TypeError(f"url must be a str, got {type(self.url).__name__}")
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {_MODES}, got {self.mode!r}")
        if self.pause not in _PAUSES:
            raise ValueError(f"pause must be one of {_PAUSES}, got {self.pause!r}")
        if self.api_key is not None and not isinstance(self.api_key, str):
            raise TypeError(f"api_key must be a str, got {type(self.api_key).__name__}")
        if not isinstance(self.unchecked_names, bool):
            raise TypeError(
                f"unchecked_names must be a bool, got {type(self.unchecked_names).__name__}"
            )
        if self.expect is not None:
            manifest.learn(self.expect, (), unchecked=False, engine_checks=False)
        Server(self.url, self.api_key, 1.0)

    @property
    def address(self) -> str:
        return self.url

    def open(self, patience: float, timeout: float) -> Session:
        server = Server(self.url, self.api_key, timeout)
        info = server.wait(patience)
        sessions = server.look()
        if self.mode == "plan" and not info.loader:
            raise Unsupported(
                f"{server.url} does not know our loader: start it with --custom-weight-loader "
                f'{LOADER} and pyrlk on its PYTHONPATH, or use mode="bucket"'
            )
        if self.mode == "plan" and not sessions:
            raise Unsupported(
                f"{server.url} (SGLang {info.release}) has no /begin_weight_update: such an older "
                'server takes mode="bucket" alone'
            )
        settings = Settings(self.pause, self.expect, self.unchecked_names)
        if self.mode == "distributed":
            return DistributedSession(settings, server, info, timeout)
        if self.mode == "bucket" or not (info.loader and sessions):
            return BucketSession(settings, server, info, timeout)
        return PlanSession(settings, server, info, timeout)
