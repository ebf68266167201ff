"""A real SGLang server as a process, random models for it, and publishers that die when told to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import torch

HERE = Path(__file__).parent
PYTHON = os.environ.get("PYRLK_SGLANG_PYTHON", "")
SITE = os.environ.get("PYRLK_SGLANG_SITE", "")
LOADER = "pyrlk.weights.sglang_loader.load"
START = 600  # seconds for a server to answer: a busy machine is no failure
PROMPT = [5, 9, 100, 200, 17, 33, 44, 301, 8]


def make_model(kind: str, seed: int, dtype=torch.float32):
    """A random transformers model, off its constants so that a lost update shows.

    kind: "dense" | "tied" | "moe" | "moe-large", 128 experts in each of 8 layers | "moe-small".
    """
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    common = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": kind == "tied",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if kind.startswith("moe"):
        common.update(num_hidden_layers=4 if kind == "moe-small" else 8)
        inner = 32
        if kind == "moe-large":  # 200 MB in bfloat16
            common.update(hidden_size=256, head_dim=64)
            inner = 128
        experts = {
            "num_experts": 8 if kind == "moe-small" else 128,
            "num_experts_per_tok": 2 if kind == "moe-small" else 8,
            "moe_intermediate_size": inner,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        config = Qwen3MoeConfig(**common, **experts)
    else:
        config = Qwen3Config(**common)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Parent:
    """The process that has imported SGLang and forks servers (serve.py); one for all tests.

    It ends with its stdin, and every server with it: nothing survives these tests, however they
    end.
    """

    _only: Parent | None = None

    def __init__(self, folder: Path):
        self.log = folder / "parent.log"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{HERE / 'stubs'}:{SITE}",
            "PYRLK_TEST_FAULTS": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the next run imports faster
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [PYTHON, str(HERE / "serve.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
                text=True,
            )
        self._lock = threading.Lock()

    @classmethod
    def get(cls, folder: Path) -> Parent:
        if cls._only is None:
            cls._only = cls(folder)
        return cls._only

    def fork(self, flags: list[str], env: dict[str, str], log: Path) -> int:
        """The pid of a new server, which is also its process group."""
        job = {"flags": flags, "env": env, "log": str(log)}
        with self._lock:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"SGLang cannot be imported:\n{self.log.read_text()[-3000:]}")
        return int(answer)

    @classmethod
    def end(cls) -> None:
        """Every server still there is killed."""
        if cls._only is not None:
            cls._only._process.stdin.close()
            cls._only._process.wait(30)
            cls._only = None


class Server:
    """One SGLang server in a process group of its own; its output goes to a file."""

    def __init__(self, folder: Path, model: Path, dtype: str, *flags: str, env=None, port=None):
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.path = model
        self.log = folder / f"server-{self.port}.log"
        self.faults = folder / f"faults-{self.port}"
        self.faults.mkdir(exist_ok=True)
        arguments = {
            "--model-path": str(model),
            "--device": "cpu",
            "--dtype": dtype,
            "--load-format": "dummy",
            "--custom-weight-loader": LOADER,
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--grammar-backend": "none",
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--mem-fraction-static": "0.5",
            "--max-total-tokens": "4096",
            "--max-running-requests": "8",
            "--cuda-graph-backend-decode": "disabled",
            "--cuda-graph-backend-prefill": "disabled",
        }
        switches = (
            "--skip-tokenizer-init",
            "--skip-server-warmup",
            "--disable-overlap-schedule",
            "--disable-radix-cache",
            "--sleep-on-idle",
        )
        words = [word for pair in arguments.items() for word in pair]
        environment = {"PYRLK_TEST_FAULTS": str(self.faults), **(env or {})}
        parent = Parent.get(folder)
        self.pid = parent.fork([*words, *switches, *flags], environment, self.log)
        self._pidfd = os.pidfd_open(self.pid)

    def ended(self, timeout: float = 0.0) -> bool:
        return bool(select.select([self._pidfd], [], [], timeout)[0])

    def wait(self) -> Server:
        """Until it answers."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and not self.ended(0.1):
            with contextlib.suppress(OSError):
                if self.get("/model_info") is not None:
                    return self
        raise RuntimeError(f"no server:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-3000:]

    def alive(self) -> bool:
        return not self.ended() and self.get("/model_info") is not None

    def kill(self) -> None:
        """The whole group, at once."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            assert self.ended(30)

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return json.load(answer)

    def post(self, path: str, body=None):
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body or {}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return json.load(answer)

    def version(self) -> str:
        return self.get("/model_info")["weight_version"]

    def next_version(self) -> int:
        current = self.version().removeprefix("pyrlk-updating:")
        return int(current) + 1 if current.isdecimal() else 1

    def checksums(self) -> list[str]:
        return [rank["per_gpu_checksum"] for rank in self.post("/weights_checker")["ranks"]]

    def logprobs(self) -> torch.Tensor:
        """Of PROMPT[1:], given what comes before."""
        sampling = {"max_new_tokens": 1, "temperature": 0}
        body = {
            "input_ids": PROMPT,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        pairs = self.post("/generate", body)["meta_info"]["input_token_logprobs"]
        return torch.tensor([pair[0] for pair in pairs[1:]])

    def gap(self, model) -> float:
        """Largest difference to transformers' log-probs."""
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT])).logits[0, :-1].float()
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
        return (self.logprobs() - wanted).abs().max().item()


class Zygote:
    """A process that has imported everything and forks a publisher whenever it is told to."""

    def __init__(self, folder: Path):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "zygote.log").open("w"),
            text=True,
        )

    def run(self, **job) -> int:
        """The exit status of a publisher; negative: the signal that ended it."""
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
