"""Both modes on real servers that were started with dummy weights.

PYRLK_LIVE_ROUNDS (10) is how often each fault is repeated.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from live import PROMPT, PYTHON, SITE, make_model
from safetensors.torch import save_file

from pyrlk import doctor, weights
from pyrlk.weights import sglang_server

TOLERANCE = 1e-5  # float32 log-probs against transformers
ROUNDS = int(os.environ.get("PYRLK_LIVE_ROUNDS", "10"))
UPDATES = 50  # while requests run
KILLS = 3  # in each state

BOTH_MODES = pytest.mark.parametrize("mode", ["bucket", "plan"])


def on(*names):
    """The test runs on each of these servers."""
    cases = [pytest.param(name, marks=pytest.mark.server(name)) for name in names]
    return pytest.mark.parametrize("name", cases)


def publisher(server, mode, **options):
    return weights.Publisher(weights.SGLang(server.url, mode=mode, **options), timeout=120)


@on("dense", "tied", "tp2")
@BOTH_MODES
def test_all_weights_arrive(servers, name, mode):
    server = servers(name)
    version = server.next_version()
    kind = "tied" if name == "tied" else "dense"
    with publisher(server, mode) as p:
        for step in range(4):
            model = make_model(kind, 100 + step + 10 * (mode == "plan"))
            assert server.gap(model) > 0.1
            report = p.update(model, version=version + step)
            assert server.version() == str(version + step)
            assert server.gap(model) <= TOLERANCE
            assert report.mode == mode
            if mode == "plan" and step:
                assert report.planned == report.tensors, report.fallback
            if step == 2:
                p.release_staging()
                assert server.version() == str(version + step)


@on("moe")
def test_a_mixture_of_experts_has_the_bytes_of_the_disk(servers, name):
    """Full updates with other weights each; the last are those that the server then reads."""
    server = servers(name)
    checkpoint = dict(weights.gather.hf(make_model("moe", 0, torch.bfloat16)))
    sent = {}
    for mode in ("bucket", "plan"):
        with publisher(server, mode) as p:
            seen = {tuple(server.checksums())}
            for step, factor in enumerate((0.5, 1.5, 2.0, 1.0)):
                tensors = {n: t * factor for n, t in checkpoint.items()}
                version = server.next_version()
                report = p.update(tensors, version=version)
                assert server.version() == str(version)
                sent[mode] = tuple(server.checksums())
                assert sent[mode] not in seen
                seen = {sent[mode]}
                assert report.tensors == 8 * (128 * 3 + 9) + 3
                if mode == "plan" and step:
                    assert report.planned == report.tensors, report.fallback
    disk = {"model_path": str(server.path), "load_format": "auto"}
    assert server.post("/update_weights_from_disk", disk)["success"]
    assert sent["bucket"] == sent["plan"] == tuple(server.checksums())


@on("dense")
@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_requests_know_their_versions(servers, name, pause):
    """Updates while four clients generate: each token's log-prob is that of its span's weights."""
    server = servers(name)
    first = server.next_version()
    models = [make_model("dense", seed) for seed in (1, 2)]
    running = threading.Event()
    running.set()
    answers: list[dict] = []

    def client():
        sampling = {"max_new_tokens": 48, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
        while running.is_set():
            answers.append(server.post("/generate", body)["meta_info"])

    with (
        publisher(server, "plan", pause=pause) as p,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        p.update(models[1], version=first)
        clients = [pool.submit(client) for _ in range(4)]
        for step in range(1, UPDATES + 1):
            p.update(models[(step + 1) % 2], version=first + step)
            assert server.version() == str(first + step)
            if step % 10 == 0:
                p.release_staging()
            time.sleep(0.05)
        running.clear()
        for done in clients:
            done.result(120)
    assert len(answers) >= 4
    spanning = 0
    for meta in answers:
        spans = meta["weight_versions"]
        assert [spans[0]["start"], spans[-1]["end"]] == [0, meta["completion_tokens"]]
        for left, right in itertools.pairwise(spans):
            assert left["end"] == right["start"]
            assert int(left["version"]) < int(right["version"])
        for span in spans:
            assert first <= int(span["version"]) <= first + UPDATES
        # In place, what follows an update attends to keys and values of the weights before it.
        certain = spans if pause == "retract" else spans[:1]
        got = torch.tensor([pair[0] for pair in meta["output_token_logprobs"]])
        tokens = [pair[1] for pair in meta["output_token_logprobs"]]
        for span in certain:
            model = models[(int(span["version"]) - first + 1) % 2]
            wanted = logprobs(model, [*PROMPT, *tokens])[len(PROMPT) - 1 :]
            part = slice(span["start"], span["end"])
            assert (got[part] - wanted[part]).abs().max() <= 1e-4
        spanning += len(spans) > 1
    assert spanning, "no request lived through an update"


@torch.no_grad()
def logprobs(model, tokens):
    logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def broken(case, good):
    sent = dict(good)
    norm = "model.norm.weight"
    if case == "unknown":
        sent["model.extra.weight"] = torch.zeros(3)
    elif case == "missing":
        del sent[norm]
    elif case == "shape":
        sent[norm] = torch.zeros(65)
    elif case == "dtype":
        sent[norm] = sent[norm].to(torch.int32)
    elif case == "twice":
        return [*sent.items(), (norm, sent[norm])]
    return sent


CASES = {
    "unknown": weights.UnknownName,
    "missing": weights.MissingName,
    "shape": weights.ShapeMismatch,
    "dtype": weights.DtypeMismatch,
    "twice": ValueError,
}


@on("dense")
@BOTH_MODES
def test_nothing_kills_the_server(servers, name, mode):
    server = servers(name)
    goods = [make_model("dense", seed).state_dict() for seed in (3, 4)]
    with publisher(server, mode) as p:

        def update(turn):
            p.update(goods[turn], version=server.next_version())
            return server.checksums()

        sums = [update(0), update(1)]
        assert sums[0] != sums[1]
        turn = 1
        for _ in range(ROUNDS):
            for case, kind in CASES.items():
                with pytest.raises(kind):
                    p.update(broken(case, goods[0]), version=server.next_version())
                assert server.checksums() == sums[turn], case
                turn = 1 - turn
                assert update(turn) == sums[turn], case
        assert server.alive()
    assert server.gap(make_model("dense", 3 + turn)) <= TOLERANCE


@on("tp2")
@BOTH_MODES
def test_a_wrong_number_of_payloads(servers, name, mode, monkeypatch):
    """As if a rank had been forgotten: SGLang itself would die of it."""
    server = servers(name)
    model = make_model("dense", 10)
    send = sglang_server.Server.update

    def short(self, payloads, *args):
        return send(self, payloads[:-1], *args)

    with publisher(server, mode) as p:
        p.update(model, version=server.next_version())
        before = server.checksums()
        for _ in range(ROUNDS):
            with monkeypatch.context() as patch:
                patch.setattr(sglang_server.Server, "update", short)
                with pytest.raises(weights.Unsupported, match="tp-size"):
                    p.update(make_model("dense", 11), version=server.next_version())
            assert server.checksums() == before
            p.update(model, version=server.next_version())
    assert server.gap(model) <= TOLERANCE


@on("tp2")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_weights_that_raises(servers, name, rank):
    """On one rank alone: every rank keeps its weights."""
    server = servers(name)
    goods = [make_model("dense", seed).state_dict() for seed in (5, 6)]
    fault = server.faults / f"raise-{rank}"
    with publisher(server, "plan") as p:
        for step in range(ROUNDS):
            p.update(goods[step % 2], version=server.next_version())
            before, version = server.checksums(), server.version()
            fault.touch()
            names = list(goods[0])[rank : 5 + step]  # a new manifest is recorded anew
            some = {name: goods[0][name] for name in names}
            with pytest.raises(weights.ApplyFailed, match=rf"rank {rank}.*injected") as caught:
                p.update(some, version=server.next_version(), partial=True)
            fault.unlink()
            assert not caught.value.dirty
            assert server.checksums() == before
            assert server.version() == version
        p.update(goods[0], version=server.next_version())
    assert server.gap(make_model("dense", 5)) <= TOLERANCE


@on("tp2")
def test_a_load_weights_that_raises_half_way(servers, name):
    """After the first copies: the engine stays paused and says so, until all weights came."""
    server = servers(name)
    model = make_model("dense", 8)
    fault = server.faults / "raise-1"
    with publisher(server, "plan") as p:
        for step in range(3):
            p.update(make_model("dense", 7), version=server.next_version())
            fault.write_bytes(b"1")  # the recording pass goes through
            some = dict(list(model.state_dict().items())[: 16 + step])
            version = server.next_version()
            with pytest.raises(weights.ApplyFailed, match=r"rank 1.*injected") as caught:
                p.update(some, version=version, partial=True)
            fault.unlink()
            assert caught.value.dirty
            assert server.version() == f"pyrlk-updating:{version}"
            with pytest.raises(weights.EngineDirty):
                p.update(some, version=version + 1, partial=True)
            p.update(model, version=version + 1)
            assert server.version() == str(version + 1)
            assert server.gap(model) <= TOLERANCE


BUCKET = ("paused", "flushed", "marked", "begun", "packed", "updated", "ended", "versioned")
PLAN = ("paused", "marked", "begun", "checked", "packed", "handed over", "ended", "versioned")


@on("dense")
@BOTH_MODES
def test_a_publisher_that_is_killed(servers, name, zygote, tmp_path, mode):
    """In each state; the next publisher finds what is left and mends it."""
    server = servers(name)
    killed = make_model("dense", 9)
    models = [make_model("dense", 20 + again) for again in range(KILLS)]
    save_file(killed.state_dict(), tmp_path / "model.safetensors")
    job = {"url": server.url, "mode": mode, "file": str(tmp_path / "model.safetensors")}
    assert zygote.run(**job, state="", version=server.next_version()) == 0
    assert server.gap(killed) <= TOLERANCE
    for state in BUCKET if mode == "bucket" else PLAN:
        for model in models:
            version = server.next_version()
            assert zygote.run(**job, state=state, version=version) == -signal.SIGKILL, state
            with publisher(server, mode) as p:
                p.update(model, version=version + 1)
            assert server.version() == str(version + 1)
            assert server.gap(model) <= TOLERANCE, state


@on("tied")
def test_a_server_that_is_killed(servers, name):
    """PeerLost at once; one that is started again at the same address is sent everything."""
    server = servers(name)
    model = make_model("tied", 0)
    with publisher(server, "plan") as p:
        p.update(model, version=server.next_version())
        timer = threading.Timer(0.05, server.kill)
        timer.start()
        begun = 0.0
        with pytest.raises(weights.PeerLost):  # noqa: PT012 (the kill falls into one of them)
            for version in itertools.count(server.next_version()):
                begun = time.monotonic()
                p.update(model, version=version)
        timer.join()
        assert time.monotonic() - begun < 10
        servers.stop(name)
        again = servers.start(name, server.port)
        try:
            again.wait()
            with pytest.raises(weights.EngineDirty, match="restarted"):
                p.update({"model.norm.weight": torch.ones(64)}, version=version, partial=True)
            assert p.update(model, version=version).planned == 0
            assert again.gap(model) <= TOLERANCE
        finally:
            again.kill()


@on("dense")
def test_doctor_sees_the_server_and_its_interpreter(servers, name):
    """Run with pyrlk as the server has it."""
    server = servers(name)
    command = [sys.executable, "-m", "pyrlk.cli", "doctor", "--json"]
    command += ["--engine-url", server.url, "--engine-python", PYTHON]
    environment = {**os.environ, "PYTHONPATH": SITE}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd="/", check=True
    )
    lines = {line["name"]: line["value"] for line in json.loads(done.stdout)["lines"]}
    assert lines["engine"].startswith("SGLang 0.5.23, tp 1, pp 1, float32")
    assert lines["engine dialect"] == "begin/end sessions"
    assert lines["engine loader"].startswith("yes")
    assert lines["engine python"].startswith("yes: loader imported")
    assert "sglang 0.5.23" in lines["engine python"]
    place = lines["engine python"].split("pyrlk in ")[1]
    assert os.path.realpath(place) == os.path.realpath(f"{SITE}/pyrlk")


@on("dense")
def test_doctor_sees_an_update_that_broke_off(servers, name):
    server = servers(name)
    version = server.next_version()
    server.post("/update_weight_version", {"new_version": f"pyrlk-updating:{version}"})
    lines = doctor.report(doctor.Engine(server.url))
    assert [line.cure for line in lines if line.name == "engine"] == ["", "send a full update"]
    with publisher(server, "auto") as p:
        with pytest.raises(weights.EngineDirty):
            p.update({"model.norm.weight": torch.ones(64)}, version=version + 1, partial=True)
        assert p.update(make_model("dense", 12), version=version + 1).mode == "plan"
    assert server.version() == str(version + 1)


def test_pyrlk_lies_in_a_folder_of_its_own():
    """On the server's path it hides none of its packages."""
    found = {path.name.split("-")[0] for path in Path(SITE).iterdir()}
    assert found - {"bin"} == {"pyrlk"}
