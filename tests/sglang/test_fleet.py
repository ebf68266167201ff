"""Many trainer ranks, several engines, and the broadcast across nodes, into real servers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live import HERE, make_model

import pyrlk
from pyrlk import weights
from pyrlk.weights import sglang_server

TOLERANCE = 1e-5  # float32 log-probs against transformers


def on(*names):
    """The test runs on each of these servers."""
    cases = [pytest.param(name, marks=pytest.mark.server(name)) for name in names]
    return pytest.mark.parametrize("name", cases)


def distributed(server, **options):
    target = weights.SGLang(server.url, mode="distributed")
    return weights.Publisher(target, **{"timeout": 120, "bucket_bytes": 1 << 17} | options)


@on("dense", "tp2")
def test_a_broadcast_brings_all_weights(servers, name):
    server = servers(name)
    version = server.next_version()
    with distributed(server) as p:
        for step in range(3):
            model = make_model("dense", 300 + step)
            assert server.gap(model) > 0.1
            report = p.update(model, version=version + step)
            assert server.version() == str(version + step)
            assert server.gap(model) <= TOLERANCE
            assert (report.mode, report.buckets > 1) == ("distributed", True)
    # Another publisher, another group: the one before has left nothing behind.
    with distributed(server, bucket_bytes=1 << 24) as p:
        p.update(make_model("dense", 310), version=version + 3)
    assert server.gap(make_model("dense", 310)) <= TOLERANCE


@on("dense")
def test_nothing_that_is_broadcast_kills_the_server(servers, name):
    server = servers(name)
    good = make_model("dense", 3).state_dict()
    norm = "model.norm.weight"
    cases = [
        (weights.UnknownName, {**good, "more": torch.zeros(3)}),
        (weights.MissingName, {n: t for n, t in good.items() if n != norm}),
        (weights.ShapeMismatch, {**good, norm: torch.zeros(65)}),
        (weights.DtypeMismatch, {**good, norm: good[norm].to(torch.int32)}),
    ]
    with distributed(server) as p:
        p.update(good, version=server.next_version())
        before = server.checksums()
        for kind, sent in cases:
            with pytest.raises(kind):
                p.update(sent, version=server.next_version())
        assert server.alive()
        assert server.checksums() == before


def ranks_publish(trainer, kind, dtype, updates, ranks=4):
    """The reports of each rank, one an update."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"trainer": trainer, "kind": kind, "dtype": dtype, "updates": updates}
    root = str(Path(pyrlk.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fleet_ranks.py")]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), port, json.dumps(job)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=400) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, said) in zip(children, outputs, strict=True):
        assert child.returncode == 0, said[-3000:]
    return [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]


@on("dense", "tp2")
def test_four_ranks_of_fsdp_publish_in_every_mode(servers, name):
    """A 2-D mesh; the log-probs of each update are those of the model before it was sharded."""
    server = servers(name)
    first = server.next_version()
    for step, mode in enumerate(("bucket", "plan", "distributed")):
        reports = ranks_publish(
            "fsdp", "dense", "float32", [[server.url, mode, 400 + step, first + step]]
        )
        assert server.version() == str(first + step)
        assert server.gap(make_model("dense", 400 + step)) <= TOLERANCE
        assert all(of == reports[0] for of in reports)
        assert (reports[0][0]["mode"], reports[0][0]["buckets"] > 1) == (mode, True)


@on("moe-small", "moe-small-tp2")
def test_tensor_pipeline_and_expert_parallel_ranks_publish(servers, name):
    """TP 2 × PP 2 × EP 2; bytes and log-probs are those that the server loads from a disk."""
    server = servers(name)
    version = server.next_version()
    updates = [
        [server.url, mode, seed, version + i]
        for i, (mode, seed) in enumerate((("bucket", 1), ("plan", 2), ("distributed", 0)))
    ]
    reports = ranks_publish("megatron", "moe-small", "bfloat16", updates)
    assert [report["mode"] for report in reports[0]] == ["bucket", "plan", "distributed"]
    sent, logprobs = server.checksums(), server.logprobs()
    # The checkpoint on the disk is that of seed 0.
    disk = {"model_path": str(server.path), "load_format": "auto"}
    assert server.post("/update_weights_from_disk", disk)["success"]
    assert server.checksums() == sent
    assert torch.equal(server.logprobs(), logprobs)


@pytest.mark.server("dense", "replica")
@pytest.mark.parametrize("mode", ["plan", "distributed"])
def test_one_of_two_engines_is_killed(servers, mode, monkeypatch):
    """The other is updated and serves; the restarted one is brought up by ensure()."""
    kept, lost = servers("dense"), servers("replica")
    version = max(kept.next_version(), lost.next_version())
    step = "update" if mode == "plan" else "update_from_group"
    request = getattr(sglang_server.Server, step)

    def killing(self, *arguments):
        if self.url == lost.url and lost_at == version + 1:
            lost.kill()
        return request(self, *arguments)

    monkeypatch.setattr(sglang_server.Server, step, killing)
    targets = [weights.SGLang(server.url, mode=mode) for server in (kept, lost)]
    with weights.Publisher(targets, timeout=60, bucket_bytes=1 << 17) as p:
        lost_at = version
        report = p.update(make_model("dense", 500), version=version)
        assert [entry.error for entry in report.engines] == [None, None]
        model = make_model("dense", 501)
        lost_at = version + 1
        report = p.update(model, version=version + 1)
        assert report.engines[0].error is None
        assert isinstance(report.engines[1].error, weights.PeerLost)
        assert kept.gap(model) <= TOLERANCE
        assert kept.version() == str(version + 1)
        lost_at = None
        servers.stop("replica")
        again = servers.start("replica", lost.port).wait()
        try:
            report = p.ensure(version + 1)
            assert [entry.target.url for entry in report.engines] == [lost.url]
            assert again.gap(model) <= TOLERANCE
            assert again.version() == str(version + 1)
            assert p.ensure(version + 1) is None
            model = make_model("dense", 502)
            p.update(model, version=version + 2)
            assert [kept.gap(model) <= TOLERANCE, again.gap(model) <= TOLERANCE] == [True, True]
        finally:
            again.kill()
