"""Both modes on real servers that were started with dummy weights."""

from __future__ import annotations

import concurrent.futures
import itertools
import signal
import threading
import time

import pytest
import torch
from live import PROMPT, make_model
from safetensors.torch import save_file

from pyrlk import weights

TOLERANCE = 1e-5  # float32 log-probs against transformers
ROUNDS = 10


def publisher(server, mode, **options):
    return weights.Publisher(weights.SGLang(server.url, mode=mode, **options), timeout=120)


@pytest.mark.parametrize("name", ["dense", "tied", "tp2"])
@pytest.mark.parametrize("mode", ["bucket", "plan"])
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


@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_requests_know_their_versions(servers, pause):
    """25 updates a mode while four clients generate."""
    server = servers("dense")
    first = server.next_version()
    models = [make_model("dense", seed) for seed in (1, 2)]
    running = threading.Event()
    running.set()
    seen: list[dict] = []

    def client():
        sampling = {"max_new_tokens": 48, "temperature": 1.0, "ignore_eos": True}
        while running.is_set():
            answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
            seen.append(answer["meta_info"])

    with (
        publisher(server, "plan", pause=pause) as p,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        clients = [pool.submit(client) for _ in range(4)]
        for step in range(25):
            p.update(models[step % 2], version=first + step)
            assert server.version() == str(first + step)
            time.sleep(0.05)
        running.clear()
        for done in clients:
            done.result(120)
    assert len(seen) >= 4
    spanning = 0
    for meta in seen:
        spans = meta["weight_versions"]
        assert [spans[0]["start"], spans[-1]["end"]] == [0, meta["completion_tokens"]]
        for left, right in itertools.pairwise(spans):
            assert left["end"] == right["start"]
            assert left["version"] == "default" or int(left["version"]) < int(right["version"])
        assert not any(span["version"].startswith("pyrlk-updating:") for span in spans)
        spanning += len(spans) > 1
    assert spanning, "no request lived through an update"
    assert server.gap(models[0]) <= TOLERANCE


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


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_nothing_kills_the_server(servers, mode):
    server = servers("dense")
    model = make_model("dense", 3)
    good = model.state_dict()
    with publisher(server, mode) as p:
        p.update(good, version=server.next_version())
        before = server.checksums()
        for _ in range(ROUNDS):
            for case, kind in CASES.items():
                with pytest.raises(kind):
                    p.update(broken(case, good), version=server.next_version())
            with pytest.raises(weights.UpdateError):
                p._holder[0]._server.update([], "flattened_bucket", "all")
        assert server.alive()
        assert server.checksums() == before
        p.update(make_model("dense", 4), version=server.next_version())
    assert server.gap(make_model("dense", 4)) <= TOLERANCE


@pytest.mark.parametrize(("name", "rank"), [("dense", 0), ("tp2", 1)])
def test_a_load_weights_that_raises(servers, name, rank):
    """On one rank alone: every rank keeps its weights."""
    server = servers(name)
    model = make_model("dense", 5)
    good = model.state_dict()
    with publisher(server, "plan") as p:
        p.update(good, version=server.next_version())
        before, version = server.checksums(), server.version()
        fault = server.faults / f"raise-{rank}"
        for step in range(ROUNDS):
            fault.touch()
            some = dict(list(good.items())[: 5 + step])  # a new manifest is recorded anew
            with pytest.raises(weights.ApplyFailed, match=rf"rank {rank}.*injected") as caught:
                p.update(some, version=server.next_version(), partial=True)
            fault.unlink()
            assert not caught.value.dirty
            assert server.checksums() == before
            assert server.version() == version
        assert server.gap(model) <= TOLERANCE
        p.update(make_model("dense", 6), version=server.next_version())
    assert server.gap(make_model("dense", 6)) <= TOLERANCE


BUCKET = ("paused", "flushed", "marked", "begun", "packed", "updated", "ended")
PLAN = ("paused", "marked", "begun", "checked", "packed", "handed over", "ended")


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_a_publisher_that_is_killed(servers, zygote, tmp_path, mode):
    """In each state three times; the next publisher finds what is left and mends it."""
    server = servers("dense")
    killed = make_model("dense", 7)
    save_file(killed.state_dict(), tmp_path / "model.safetensors")
    job = {"url": server.url, "mode": mode, "file": str(tmp_path / "model.safetensors")}
    assert zygote.run(**job, state="", version=server.next_version()) == 0
    assert server.gap(killed) <= TOLERANCE
    for state in BUCKET if mode == "bucket" else PLAN:
        for again in range(3):
            version = server.next_version()
            assert zygote.run(**job, state=state, version=version) == -signal.SIGKILL, state
            model = make_model("dense", 20 + again)
            with publisher(server, mode) as p:
                p.update(model, version=version + 1)
            assert server.version() == str(version + 1)
        assert server.gap(model) <= TOLERANCE, state


def test_a_mixture_of_experts_has_the_bytes_of_the_disk(servers):
    for name in ("dense", "tp2"):
        servers.stop(name)
    server = servers("moe")
    model = make_model("moe", 0, torch.bfloat16)
    sent = {}
    for mode in ("bucket", "plan"):
        before = server.checksums()
        with publisher(server, mode) as p:
            other = {n: t * 1.5 for n, t in weights.gather.hf(model)}
            for tensors in (other, weights.gather.hf(model), other, weights.gather.hf(model)):
                version = server.next_version()
                report = p.update(tensors, version=version)
                assert server.version() == str(version)
        sent[mode] = server.checksums()
        assert sent[mode] != before or mode == "plan"
        if mode == "plan":
            assert report.planned == report.tensors == 8 * (128 * 3 + 9) + 3
    disk = {"model_path": str(server.path), "load_format": "auto"}
    assert server.post("/update_weights_from_disk", disk)["success"]
    assert sent["bucket"] == sent["plan"] == server.checksums()


def test_a_server_that_is_killed(servers):
    server = servers("tied")
    model = make_model("tied", 0)
    with publisher(server, "plan") as p:
        p.update(model, version=server.next_version())
        timer = threading.Timer(0.01, server.kill)
        timer.start()
        version = server.next_version()
        last = [0.0]

        def update_for_ever():
            for step in itertools.count(version):
                last[0] = time.monotonic()
                p.update(model, version=step)

        with pytest.raises(weights.PeerLost):
            update_for_ever()
        assert time.monotonic() - last[0] < 30
        timer.join()
