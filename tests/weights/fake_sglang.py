"""What a publisher sees of SGLang, in this process: its endpoints, its rules, and its workers.

A worker is a model with load_weights, or a list of a target and its drafts; in plan mode each rank
calls our loader, in its own thread, for one after the other. Pipeline stages come one after another
and share the payloads.
`calls` holds the steps in their order. `fail[path] = status` makes an endpoint fail.
`lacks` names endpoints that an older server does not have.
"""

from __future__ import annotations

import base64
import concurrent.futures
import datetime
import hashlib
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
from torch import nn

from pyrlk.weights import sglang_loader
from pyrlk.weights.sglang_server import LOADER

# Since sessions came, /post_process_weights is gone.
CURRENT = frozenset({"post_process_weights"})
NO_SESSIONS = frozenset({"begin_weight_update", "end_weight_update"})


class FakeSGLang:
    def __init__(self, *workers: nn.Module | list, lacks=CURRENT, api_key=None, **info):
        self.workers = workers
        self.lacks = lacks
        self.sessions = "begin_weight_update" not in lacks
        self.api_key = api_key
        self.info = {
            "tp_size": len(workers) // info.get("pp_size", 1),
            "pp_size": 1,
            "dp_size": 1,
            "model_path": "",
            "dtype": "float32",
            "custom_weight_loader": [LOADER],
            "startup_time": {"load_weight": 0.25},
            "watchdog_timeout": 60,
            **info,
        }
        self.version = "default"
        self.paused = False
        self.open = False
        self.flushes_refused = 0
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.groups: dict[str, list[dist.ProcessGroupGloo]] = {}
        self.before_broadcast = lambda rank: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method, path, body):
        """(status, body) of a request."""
        if path == "/server_info":
            return 200, self.info
        if path == "/model_info":
            return 200, {"weight_version": self.version}
        name = path.strip("/")
        if name in self.lacks:
            return 404, {"detail": "Not Found"}
        if method != "POST":
            return 405, {"detail": "Method Not Allowed"}
        self.calls.append(name)
        if path in self.fail:
            return self.fail[path], {"success": False, "message": "made to fail"}
        return getattr(self, name)(body)

    def pause_generation(self, body):
        assert body["mode"] in ("abort", "retract", "in_place")
        self.paused = True
        return 200, {"status": "ok"}

    def continue_generation(self, body):
        self.paused = False
        return 200, {"status": "ok"}

    def flush_cache(self, body):
        self.flushes_refused -= 1
        return (400, "busy") if self.flushes_refused >= 0 else (200, "Cache flushed.")

    def update_weight_version(self, body):
        assert body["abort_all_requests"] is False
        self.version = body["new_version"]
        self.calls[-1] += f" {self.version}"
        return 200, {"success": True}

    def weights_checker(self, body):
        assert body["action"] == "checksum"
        ranks = []
        for worker in self.workers:
            runners = enumerate(self.runners(worker, body["selector"]))
            tensors = [(f"{i}.{n}", t) for i, r in runners for n, t in r.named_parameters()]
            hashes = {n: hashlib.sha256(repr(t.tolist()).encode()).hexdigest() for n, t in tensors}
            ranks.append({"checksums": hashes})
        return 200, {"success": True, "message": "Success.", "ranks": ranks}

    def begin_weight_update(self, body):
        if self.open:
            return 400, {"success": False, "message": "a session is already open; end it first"}
        self.open = True
        return 200, {"success": True}

    def end_weight_update(self, body):
        if not self.open:
            return 400, {"success": False, "message": "no weight-update session is open"}
        self.open = False
        return 200, {"success": True}

    def post_process_weights(self, body):
        restore, process = body["restore_weights_before_load"], body["post_process_quantization"]
        assert restore is not process
        self.calls[-1] += " restore" if restore else " process"
        return 200, {"success": True}

    def update_weights_from_tensor(self, body):
        payloads = body["serialized_named_tensors"]
        # The real one dies of this.
        assert len(payloads) == self.info["tp_size"], "wrong number of payloads"
        if not self.open and self.sessions:
            return 400, {"success": False, "message": "must run between begin and end"}
        assert body["flush_cache"] is False
        assert self.sessions or "selector" not in body
        threads = [
            threading.Thread(target=self._work, args=(worker, payload, body))
            for worker, payload in zip(self.workers, itertools.cycle(payloads), strict=False)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if body.get("weight_version") is not None:
            self.version = body["weight_version"]
        return 200, {"success": True, "message": "Success"}

    def init_weights_update_group(self, body):
        address, port, name = (body[k] for k in ("master_address", "master_port", "group_name"))

        def join(rank):
            patience = datetime.timedelta(seconds=10)
            store = dist.TCPStore(address, port, None, False, patience)
            (device, *_) = dist.distributed_c10d.BackendConfig(
                dist.Backend("gloo")
            ).get_device_backend_map()
            for prefix in (name, f"{name}/", f"{device}/"):
                store = dist.PrefixStore(prefix, store)
            rank += body["rank_offset"]
            return dist.ProcessGroupGloo(store, rank, body["world_size"], patience)

        assert body["backend"] == "gloo"
        try:
            self.groups[name] = self._on_each_rank(join)
        except RuntimeError as error:
            return 400, {
                "success": False,
                "message": f"Failed to initialize custom process group: {error}.",
            }
        return 200, {"success": True, "message": "Succeeded to initialize custom process group."}

    def destroy_weights_update_group(self, body):
        if self.groups.pop(body["group_name"], None) is None:
            return 400, {"success": False, "message": "The group to be destroyed does not exist."}
        return 200, {"success": True, "message": "Succeeded to destroy custom process group."}

    def update_weights_from_distributed(self, body):
        if not self.open and self.sessions:
            return 400, {"success": False, "message": "must run between begin and end"}
        assert body["load_format"] == "flattened_bucket"
        assert body["flush_cache"] is False
        groups = self.groups[body["group_name"]]
        forms = list(zip(body["names"], body["dtypes"], body["shapes"], strict=True))

        def take(rank):
            self.before_broadcast(rank)
            places, end = [], 0
            for name, dtype, shape in forms:
                dtype = getattr(torch, dtype)
                assert end % dtype.itemsize == 0, "Unaligned received tensor"
                nbytes = torch.Size(shape).numel() * dtype.itemsize
                places.append((name, dtype, shape, end, end + nbytes))
                end += nbytes
            flat = torch.empty(end, dtype=torch.uint8)
            try:
                groups[rank].broadcast([flat], dist.BroadcastOptions()).wait()
            except RuntimeError as error:
                return f"Failed to receive weights: {error}"
            try:
                self.workers[rank].load_weights(
                    [(n, flat[a:b].view(dtype).reshape(shape)) for n, dtype, shape, a, b in places]
                )
            except Exception as error:
                return f"Failed to update parameter online: {error}."
            return ""

        failed = [message for message in self._on_each_rank(take) if message]
        if failed:
            return 400, {"success": False, "message": failed[0]}
        if body.get("weight_version") is not None:
            self.version = body["weight_version"]
        return 200, {"success": True, "message": "Succeeded to update parameter online."}

    def _on_each_rank(self, step):
        with concurrent.futures.ThreadPoolExecutor(len(self.workers)) as threads:
            return list(threads.map(step, range(len(self.workers))))

    def _work(self, worker, payload, body):
        value = ForkingPickler.loads(base64.b64decode(payload))
        for runner in self.runners(worker, body.get("selector", "all")):
            if body["load_format"] == "flattened_bucket":
                flat = value["flattened_tensor"]
                runner.load_weights(
                    [
                        (m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape))
                        for m in value["metadata"]
                    ]
                )
            else:
                assert body["load_format"] == LOADER
                sglang_loader.load(runner, value)

    @staticmethod
    def runners(worker, selector):
        """The models of a worker that a selector means."""
        models = worker if isinstance(worker, list) else [worker]
        return models[selector == "draft" : 1 if selector == "target" else None]

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # an answer is two writes

            def handle_any(self):
                length = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(length)
                wanted = fake.api_key and f"Bearer {fake.api_key}"
                if wanted and self.headers.get("Authorization") != wanted:
                    status, body = 401, {"error": "Unauthorized"}
                else:
                    status, body = fake.answer(
                        self.command, self.path, json.loads(raw) if raw else {}
                    )
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_OPTIONS = handle_any

            def log_message(self, *args):
                pass

        return Handler
