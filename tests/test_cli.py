"""`pyrlk`: what a wrong command line says; doctor tells the truth; the plan of an update."""

from __future__ import annotations

import builtins
import http.server
import json
import os
import sys
import threading
from typing import ClassVar

import pytest
import transformers

from pyrlk import cli, demo, doctor


def refused(capsys, *argv: str) -> str:
    """The last line on stderr of a command that ends with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sed", "1"], "pyrlk: error: unrecognized arguments: --sed 1"),
        (
            ["--seed", "-1"],
            "pyrlk demo: error: argument --seed: an integer in [0, 1048576], got '-1'",
        ),
        (
            ["--steps", "many"],
            "pyrlk demo: error: argument --steps: an integer in [1, 1000000], got 'many'",
        ),
        (["--lr", "nan"], "pyrlk demo: error: argument --lr: a number above 0, got 'nan'"),
        (
            ["--model", "/nowhere"],
            "pyrlk demo: error: argument --model: /nowhere holds no config.json",
        ),
        (
            ["--device", "tpu"],
            "pyrlk demo: error: argument --device: 'tpu' is no device; cpu, cuda or cuda:N",
        ),
        (
            ["--device", "cuda:99"],
            "pyrlk demo: error: argument --device: cuda:99 is not there; `pyrlk doctor` says more",
        ),
        (
            ["--resume", "--name", "none"],
            "pyrlk demo: error: argument --resume: runs/none/checkpoint.safetensors does not exist",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "demo", *argv) == message
    assert not any(tmp_path.iterdir())


def test_an_unknown_algorithm_lists_those_there_are(capsys):
    message = refused(capsys, "demo", "--algorithm", "trpo")
    assert "--algorithm" in message
    assert all(name in message for name in ("trpo", "dapo", "grpo", "ppo", "reinforce"))


def test_an_unfinished_run_is_not_overwritten_by_accident(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "dapo-seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    assert refused(capsys, "demo") == (
        "pyrlk demo: error: runs/dapo-seed0 holds an unfinished run: --resume continues it, "
        "--overwrite starts anew"
    )


@pytest.mark.parametrize("steps", [0, 3])
def test_a_picture_is_named_where_there_is_one(capsys, monkeypatch, tmp_path, steps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_, **__: demo.Result(0.1, 0.2, steps))
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert f"0.200 after {steps} steps of dapo" in out
    assert ("picture: runs/" in out) == (steps > 0)


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["transformers", "rich", "matplotlib"])
def test_a_missing_package_is_one_line_with_its_cure(capsys, monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        f'pyrlk: {package} is not installed: pip install "pyrlk[demo]"\n'
    )


def test_doctor_reports_what_works_here(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "extension", "cpu handles", "cuda handles", "/dev/shm"):
        assert f"\n{name}" in f"\n{text}"
    assert text.endswith("pyrlk is usable here\n")


def test_doctor_json_says_the_same(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["usable"] is True
    handles = next(line for line in answer["lines"] if line["name"] == "cpu handles")
    assert handles["value"].startswith("yes")


def test_doctor_says_why_handles_cannot_be_exported(capsys, monkeypatch):
    def forbidden(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("pyrlk.weights.memory.create", forbidden)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "cpu handles" in text
    assert "no: OSError: Operation not permitted" in text
    assert text.endswith("pyrlk is not usable here\n")


def test_doctor_survives_without_the_extension(capsys, monkeypatch):
    import pyrlk

    monkeypatch.delattr(pyrlk, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "pyrlk._C", None)
    for name in [name for name in sys.modules if name.startswith("pyrlk.weights")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pyrlk, "weights", raising=False)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "extension" in text
    assert "not built" in text
    assert "→ pip install" in text


def test_doctor_warns_of_expandable_segments(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    line = next(line for line in doctor.report() if line.name == "allocator")
    assert line.cure


@pytest.mark.parametrize(
    ("variable", "value", "cure"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments: True", "expandable_segments:False"),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync", "backend:native"),
        ("LD_PRELOAD", "/x/torch_memory_saver_hook.so", "outside its regions"),
    ],
)
def test_doctor_names_what_keeps_memory_from_being_exported(monkeypatch, variable, value, cure):
    monkeypatch.setenv(variable, value)
    (line,) = doctor._allocators()
    assert "no cudaIpcMemHandle" in line.value
    assert cure in line.cure


def test_doctor_shows_the_namespaces():
    (line,) = doctor._namespaces()
    assert os.readlink("/proc/self/ns/pid") in line.value
    assert os.readlink("/proc/self/ns/ipc") in line.value


class _Server(http.server.BaseHTTPRequestHandler):
    """A little of SGLang."""

    info: ClassVar[dict] = {"tp_size": 2, "pp_size": 1, "version": "0.5.23", "dtype": "bfloat16"}
    sessions = True

    def do_GET(self):
        answers = {"/server_info": self.info, "/model_info": {"weight_version": "7"}}
        status = 200 if self.path in answers else 404
        if self.path == "/begin_weight_update" and self.sessions:
            status = 405  # it is there, for POST
        body = json.dumps(answers.get(self.path, {})).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_doctor_looks_at_a_server(server, capsys, monkeypatch):
    assert cli.main(["doctor", "--engine-url", server]) == 0
    text = capsys.readouterr().out
    assert "SGLang 0.5.23, tp 2, pp 1, bfloat16, weight version 7" in text
    assert "begin/end sessions" in text
    assert "→ start it with --custom-weight-loader pyrlk.weights.sglang_loader.load" in text
    loader = {"custom_weight_loader": ["pyrlk.weights.sglang_loader.load"]}
    monkeypatch.setattr(_Server, "info", _Server.info | loader)
    monkeypatch.setattr(_Server, "sessions", False)
    assert cli.main(["doctor", "--engine-url", server]) == 0
    text = capsys.readouterr().out
    assert "no sessions" in text
    assert "yes: pyrlk.weights.sglang_loader.load" in text
    monkeypatch.setattr(_Server, "info", {"dp_size": 2})
    assert cli.main(["doctor", "--engine-url", server]) == 1
    assert "one server a replica" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "code", "text"),
    [
        ("echo torch 9", 0, "yes: loader imported; torch 9"),
        ("echo No module named pyrlk >&2; exit 1", 1, "no: No module named pyrlk"),
        (None, 1, "--engine-python names the engine's interpreter"),
    ],
)
def test_doctor_imports_the_loader_with_the_engines_python(tmp_path, capsys, script, code, text):
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o700)
    assert cli.main(["doctor", "--engine-python", str(python)]) == code
    assert text in capsys.readouterr().out


def _tiny(folder, *, weights):
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24,
    )  # fmt: skip
    if weights:
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    else:
        config.architectures = ["Qwen3MoeForCausalLM"]
        config.save_pretrained(folder)


def test_the_plan_of_a_model_needs_its_headers_or_its_config_alone(tmp_path, capsys):
    said = []
    for weights in (True, False):
        folder = tmp_path / str(weights)
        _tiny(folder, weights=weights)
        options = ["--bucket-bytes", "20000", "--buffers", "3"]
        assert cli.main(["weights", "plan", str(folder), *options]) == 0
        said.append(capsys.readouterr().out)
    assert "(from safetensors headers)" in said[0]
    assert "(from config.json)" in said[1]
    # The same tensors; their order, and so the buckets, may differ.
    assert said[0].split(" (")[0] == said[1].split(" (")[0]
    assert "model.layers.0.mlp.experts." in said[1]
    assert "peak staging memory: " in said[0]


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    assert cli.main(["weights", "plan", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no safetensors files and no config.json" in capsys.readouterr().err
