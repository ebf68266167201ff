"""Many trainer ranks, several engines, and the broadcast across nodes, into real servers."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def publishing(folder, trainer, kind, dtype, updates, ranks=4):
    """Yields a function that waits for the next update and returns its report."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"trainer": trainer, "kind": kind, "dtype": dtype, "updates": updates}
    root = str(Path(pyrlk.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fleet_ranks.py")]
    logs = [(folder / f"rank-{rank}.log") for rank in range(ranks)]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), port, json.dumps(job)],
            env=environment, text=True, stderr=log.open("w"), stdin=subprocess.PIPE,
            stdout=log.with_suffix(".out").open("w") if rank else subprocess.PIPE,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    reports = []

    def report():
        if reports:
            children[0].stdin.write("\n")
            children[0].stdin.flush()
        line = children[0].stdout.readline()
        assert line, "\n".join(log.read_text()[-2000:] for log in logs)
        reports.append(json.loads(line))
        return reports[-1]

    try:
        yield report
        for child in children:
            child.stdin.close()
        for child, log in zip(children, logs, strict=True):
            assert child.wait(120) == 0, log.read_text()[-3000:]
        for log in logs[1:]:
            lines = log.with_suffix(".out").read_text().splitlines()
            assert [json.loads(line) for line in lines] == reports
    finally:
        for child in children:
            child.kill()
            child.wait()
        children[0].stdout.close()


MODES = ("bucket", "plan", "distributed")


@on("dense", "tp2")
def test_four_ranks_of_fsdp_publish_in_every_mode(servers, name, tmp_path):
    """A 2-D mesh; the log-probs of each update are those of the model before it was sharded."""
    server = servers(name)
    first = server.next_version()
    updates = [[server.url, mode, 400 + i, first + i] for i, mode in enumerate(MODES)]
    with publishing(tmp_path, "fsdp", "dense", "float32", updates) as report:
        for _, mode, seed, version in updates:
            now = report()
            assert (now["mode"], now["buckets"] > 1) == (mode, True)
            assert server.version() == str(version)
            assert server.gap(make_model("dense", seed)) <= TOLERANCE


@on("moe-small", "moe-small-tp2")
def test_tensor_pipeline_and_expert_parallel_ranks_publish(servers, name, tmp_path):
    """TP 2 × PP 2 × EP 2; bytes and log-probs are those that the server loads from a disk."""
    server = servers(name)
    first = server.next_version()
    seeds = (1, 2, 0)  # the checkpoint on the disk is that of seed 0
    cases = zip(MODES, seeds, strict=True)
    updates = [[server.url, *case, first + i] for i, case in enumerate(cases)]
    with publishing(tmp_path, "megatron", "moe-small", "bfloat16", updates) as report:
        for _, mode, _, version in updates:
            assert report()["mode"] == mode
            assert server.version() == str(version)
    sent, logprobs = server.checksums(), server.logprobs()
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
