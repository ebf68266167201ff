"""One SGLang server over HTTP: what it is, and the steps of a weight update.

    pause → flush → version "pyrlk-updating:<n>" → begin → updates → end → version "<n>" → continue

The state of an update lives in the server: a version that starts with `pyrlk-updating:` means that
its weights may be a mixture. Whoever finds it ends the open session and sends everything.
A lock file makes one publisher an engine; the kernel releases it with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import tempfile
import time
import urllib.parse
import weakref
from dataclasses import dataclass
from typing import Any

from .errors import ApplyFailed, Busy, PeerLost, Timeout, Unsupported, UpdateError

DIRTY = "pyrlk-updating:"
LOADER = "pyrlk.weights.sglang_loader.load"
_FLUSH_PAUSE = 0.02
# uvicorn closes an idle connection after five seconds; one that is about to close loses a request.
_KEEP_ALIVE = 2.0


class Http:
    """JSON requests on one kept connection, each with a deadline; not thread-safe."""

    def __init__(self, url: str, api_key: str | None, timeout: float):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http://host:port, got {url!r}")
        self.url = url.rstrip("/")
        self.api_key = api_key
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        self._used = 0.0

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and decoded body (text where it is no JSON).

        Raises
        ------
        PeerLost
            Nobody listens, or the server closed the connection.
        Timeout
            No answer within the timeout.
        """
        data = None if body is None else json.dumps(body)
        if time.monotonic() - self._used > _KEEP_ALIVE:
            self.close()
        if self._connection is None:
            kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
            self._connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            self._connection.request(method, self._path + path, data, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except TimeoutError:
            self.close()
            raise Timeout(
                f"{self.url}{path} did not answer within {self._timeout:g} s; raise timeout="
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise PeerLost(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        self._used = time.monotonic()
        if answer.status in (401, 403):
            raise Unsupported(
                f"{self.url}{path} answered {answer.status}: pass SGLang(url, api_key=…), the "
                "server's --admin-api-key or --api-key"
            )
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, content.decode(errors="replace")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True)
class Info:
    """What /server_info says that an update depends on."""

    boot: bytes  # another one means a restarted server
    tp_size: int
    pp_size: int
    model_path: str
    draft_path: str  # of a speculating server's draft; "" if that is in the model's own files
    drafts: bool
    dtype: str
    device: str
    loader: bool
    watchdog: float
    release: str
    layout: tuple[str, ...]  # equal for two servers whose tensors are cut and fused alike

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Info:
        """Raises Unsupported on an engine that would die of an update, or lose half of it."""
        _refuse(raw)
        stamp = json.dumps([raw.get("startup_time"), raw.get("launch_command")], sort_keys=True)
        loaders = raw.get("custom_weight_loader") or []
        return cls(
            boot=hashlib.sha256(stamp.encode()).digest()[:16],
            tp_size=_size(raw, "tp_size"),
            pp_size=_size(raw, "pp_size"),
            model_path=str(raw.get("model_path") or ""),
            draft_path=str(raw.get("speculative_draft_model_path") or ""),
            drafts=bool(raw.get("speculative_algorithm")),
            dtype=str(raw.get("dtype") or ""),
            device=str(raw.get("device") or "cuda"),
            loader=LOADER in ([loaders] if isinstance(loaders, str) else loaders),
            watchdog=float(raw.get("watchdog_timeout") or 300.0),
            release=str(raw.get("version") or "unknown"),
            layout=tuple(str(raw.get(name)) for name in _LAYOUT),
        )


_LAYOUT = (
    "version",
    "device",
    "dtype",
    "tp_size",
    "pp_size",
    "ep_size",
    "attention_backend",
    "moe_runner_backend",
    "speculative_algorithm",
)


def _size(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
        raise Unsupported(f"the server's {name} is {value!r}")
    return value


def _refuse(raw: dict[str, Any]) -> None:
    if _size(raw, "dp_size") > 1:
        raise Unsupported(
            f"the server runs with --dp-size {raw['dp_size']}, which SGLang does not update from "
            "tensors: start one server a replica and give each its own SGLang(url)"
        )
    if raw.get("enable_lora") or raw.get("lora_paths"):
        raise Unsupported("the server runs with --enable-lora: its base weights cannot be updated")
    if raw.get("quantization"):
        raise Unsupported(
            f"the server runs with --quantization {raw['quantization']}: only unquantised weights "
            "are supported"
        )
    for flag in ("cpu_offload_gb", "ep_num_redundant_experts"):
        if raw.get(flag):
            raise Unsupported(f"the server runs with --{flag.replace('_', '-')}: not supported")
    for flag in ("enable_eplb", "enable_elastic_expert_backup"):
        if raw.get(flag):
            raise Unsupported(
                f"the server runs with --{flag.replace('_', '-')}: experts move between updates"
            )
    if raw.get("weight_cache_mode") not in (None, "off"):
        raise Unsupported("the server runs with --weight-cache-mode: its weights are shared")


class Server:
    """The steps of an update, each checked.

    A server without /begin_weight_update (404) speaks the older dialect: /post_process_weights
    before and after the weights where it has that, else neither; no selector.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float):
        self.http = Http(url, api_key, timeout)
        self.url = self.http.url
        self._timeout = timeout
        self.sessions = True  # False: the older dialect
        self.ranks = 0  # payloads a request, once /server_info was read

    def wait(self, patience: float) -> Info:
        """/server_info, waiting for a server that is still starting."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return self.info()
            except PeerLost:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    def info(self) -> Info:
        info = Info.read(self._json("GET", "/server_info"))
        self.ranks = info.tp_size
        return info

    def look(self) -> bool:
        """Whether it has begin and end; the GET changes nothing (405 there, 404 elsewhere)."""
        self.sessions = self.http.request("GET", "/begin_weight_update")[0] != 404
        return self.sessions

    def version(self) -> str:
        """The weight version that the server answers under."""
        return str(self._json("GET", "/model_info").get("weight_version") or "")

    def pause(self, mode: str) -> None:
        self._ok("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._ok("/continue_generation", {})

    def flush(self) -> None:
        """Drop the cache that the old weights filled; retried until nothing runs any more."""
        deadline = time.monotonic() + self._timeout
        while True:
            status, answer = self.http.request("POST", "/flush_cache")
            if status == 200:
                return
            if time.monotonic() >= deadline:
                raise Timeout(f"{self.url}: the cache could not be flushed: {_text(answer)}")
            time.sleep(_FLUSH_PAUSE)

    def set_version(self, version: str) -> bool:
        """False: an older server, which takes a version with the last bucket alone."""
        body = {"new_version": version, "abort_all_requests": False}
        return self._ok("/update_weight_version", body, missing=True)

    def begin(self, selector: str, recover: bool) -> None:
        """Open a session. One that a dead publisher left open is ended first, if `recover`.

        Raises
        ------
        Busy
            Somebody else's session is open.
        """
        for attempt in range(2):
            status, answer = self.http.request(
                "POST", "/begin_weight_update", {"selector": selector}
            )
            if status == 404:
                self.sessions = False
                self._post_process(before=True)
                return
            if status == 200:
                return
            if attempt or not recover or "already open" not in _text(answer):
                break
            self.end()
        if "already open" in _text(answer):
            raise Busy(
                f"{self.url} has an open weight update of somebody else: end it there "
                "(/end_weight_update), or wait until it has ended"
            )
        raise ApplyFailed(f"{self.url}/begin_weight_update: {status} {_text(answer)}")

    def end(self) -> None:
        if self.sessions:
            self._ok("/end_weight_update", {})
        else:
            self._post_process(before=False)

    def _post_process(self, *, before: bool) -> None:
        """The older dialect: weights as load_weights wants them, and back as kernels want them."""
        body = {"restore_weights_before_load": before, "post_process_quantization": not before}
        self._ok("/post_process_weights", body, missing=True)

    def update(
        self, payloads: list[str], load_format: str, selector: str, version: str | None = None
    ) -> None:
        """One /update_weights_from_tensor; `payloads` holds one a tensor-parallel rank.

        Raises
        ------
        Unsupported
            Another number of payloads: the server would die of it.
        """
        if len(payloads) != self.ranks:
            raise Unsupported(
                f"{self.url} has --tp-size {self.ranks}, got {len(payloads)} payloads: one a rank"
            )
        body = {
            "serialized_named_tensors": payloads,
            "load_format": load_format,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        if self.sessions:
            body["selector"] = selector
        if version is not None:
            body["weight_version"] = version
        self._ok("/update_weights_from_tensor", body)

    def init_group(
        self, address: str, port: int, offset: int, world: int, name: str, backend: str
    ) -> None:
        """Have the server's ranks join a process group as `offset`, `offset` + 1, …"""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": offset,
            "world_size": world,
            "group_name": name,
            "backend": backend,
        }
        self._ok("/init_weights_update_group", body)

    def update_from_group(
        self,
        group: str,
        names: list[str],
        dtypes: list[str],
        shapes: list,
        selector: str,
        version: str | None = None,
    ) -> None:
        """One /update_weights_from_distributed; returns when the bucket is received and loaded."""
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "abort_all_requests": False,
        }
        if self.sessions:
            body["selector"] = selector
        if version is not None:
            body["weight_version"] = version
        self._ok("/update_weights_from_distributed", body)

    def destroy_group(self, name: str) -> None:
        self._ok("/destroy_weights_update_group", {"group_name": name})

    def require_checker(self) -> None:
        """Raises Unsupported where the server cannot hash its weights; hashes nothing."""
        status, _ = self.http.request("OPTIONS", "/weights_checker")
        if status == 404:
            raise Unsupported(
                f'verify="engine": {self.url} has no /weights_checker; use verify="copy", or a '
                "newer SGLang"
            )

    def checksums(self, selector: str) -> list[dict[str, str]]:
        """Of each rank, the hash of each of its tensors."""
        body = {"action": "checksum", "selector": selector}
        status, answer = self.http.request("POST", "/weights_checker", body)
        if status != 200 or not isinstance(answer, dict) or not answer.get("success", True):
            raise ApplyFailed(f"{self.url}/weights_checker: {status} {_text(answer)}")
        try:
            return [dict(rank["checksums"]) for rank in answer["ranks"]]
        except (KeyError, TypeError, ValueError):
            raise ApplyFailed(f"{self.url}/weights_checker names no checksums") from None

    def close(self) -> None:
        self.http.close()

    def _json(self, method: str, path: str) -> dict[str, Any]:
        status, answer = self.http.request(method, path)
        if status != 200 or not isinstance(answer, dict):
            raise Unsupported(f"{self.url}{path}: {status} {_text(answer)}: is this SGLang?")
        return answer

    def _ok(self, path: str, body: dict[str, Any], *, missing: bool = False) -> bool:
        status, answer = self.http.request("POST", path, body)
        if status == 404 and missing:
            return False
        said = answer.get("success", True) if isinstance(answer, dict) else True
        if status != 200 or not said:
            raise ApplyFailed(f"{self.url}{path}: {status} {_text(answer)}")
        return True


def _text(answer: object) -> str:
    if isinstance(answer, dict):
        answer = answer.get("message") or answer.get("error") or answer
    return str(answer).strip()[:500]


class Lock:
    """This process is the engine's publisher.

    Raises
    ------
    Busy
        Another one is.
    """

    def __init__(self, url: str):
        folder = _runtime_folder()
        name = hashlib.sha256(_canonical(url).encode()).hexdigest()[:32]
        path = os.path.join(folder, f"{name}.lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd: int | None = os.open(path, flags, 0o600)
        _LOCKS.add(self)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Busy(
                f"another publisher is connected to {url} (lock {path}): close it first"
            ) from None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_locks() -> None:
    """A forked child shares the lock: it would hold it after its parent has died."""
    for lock in list(_LOCKS):
        lock.close()


os.register_at_fork(after_in_child=_leave_locks)


def _canonical(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").lower()
    host = "127.0.0.1" if host in ("localhost", "::1") else host
    return f"{host}:{parts.port}{parts.path.rstrip('/')}"


def _runtime_folder() -> str:
    """$XDG_RUNTIME_DIR/pyrlk, else a folder of this user's own in the temporary one."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        folder = os.path.join(base, "pyrlk")
    else:
        folder = os.path.join(tempfile.gettempdir(), f"pyrlk-{os.geteuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.stat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UpdateError(f"{folder} belongs to or is writable by others: remove it")
    return folder
