"""A real SGLang server as a process, random models for it, and publishers that die when told to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch

HERE = Path(__file__).parent
PYTHON = os.environ.get("PYRLK_SGLANG_PYTHON", "")
SITE = os.environ.get("PYRLK_SGLANG_SITE", "")
LOADER = "pyrlk.weights.sglang_loader.load"
PROMPT = [5, 9, 100, 200, 17, 33, 44, 301, 8]


def make_model(kind: str, seed: int, dtype=torch.float32):
    """A random transformers model, off its constants so that a lost update shows."""
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
    if kind == "moe":
        common.update(num_hidden_layers=8, hidden_size=256, head_dim=64)
        experts = {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 128,
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


class Server:
    """One SGLang server in a process group of its own; its output goes to a file."""

    def __init__(self, folder: Path, model: Path, dtype: str, *flags: str, env=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        self.faults = folder / f"faults-{self.port}"
        self.faults.mkdir()
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
        }
        command = [PYTHON, "-m", "sglang.launch_server"]
        command += [word for pair in arguments.items() for word in pair]
        command += [
            "--skip-tokenizer-init",
            "--disable-overlap-schedule",
            "--disable-radix-cache",
            "--sleep-on-idle",
            "--cuda-graph-backend-decode=disabled",
            "--cuda-graph-backend-prefill=disabled",
            *flags,
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{HERE / 'stubs'}:{SITE}",
            "PYRLK_TEST_FAULTS": str(self.faults),
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            **(env or {}),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait(self) -> Server:
        deadline = time.monotonic() + 280
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if "fired up and ready" in self.log.read_text(errors="replace"):
                return self
            time.sleep(0.5)
        raise RuntimeError(f"no server:\n{self.log.read_text(errors='replace')[-3000:]}")

    def alive(self) -> bool:
        return self.process.poll() is None and self.get("/model_info") is not None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

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
