"""An SGLang target against a double of the server: order of the steps, refusals, both modes."""

import gc
import json
import os
import struct
import weakref

import pytest
import torch
from engines import Derived, Forgetful, Fused, Raising, Rebinding, Scaled
from fake_sglang import NO_SESSIONS, FakeSGLang

from pyrlk import weights
from pyrlk.weights.sglang_server import LOADER, Lock

META = {n: t.to("meta") for n, t in Fused.checkpoint(0).items()}


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def target(fake, mode="auto", **options):
    return weights.SGLang(fake.url, mode=mode, expect=options.pop("expect", META), **options)


def publisher(fake, mode="auto", *, verify="copy", bucket_bytes=1 << 20, **options):
    engine = target(fake, mode, **options)
    return weights.Publisher(engine, timeout=10, verify=verify, bucket_bytes=bucket_bytes)


def same(model, sent):
    return all(torch.equal(t, model.wanted(sent)[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("mode", ["bucket", "plan"])
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1 << 10])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_ends_with_what_load_weights_makes(mode, bucket_bytes, ranks):
    workers = [Fused(rank, ranks) for rank in range(ranks)]
    with (
        FakeSGLang(*workers) as fake,
        publisher(fake, mode, bucket_bytes=bucket_bytes) as p,
    ):
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert all(same(worker, sent) for worker in workers)
            assert (fake.version, fake.paused, fake.open) == (str(version), False, False)
            assert (report.mode, report.tensors, report.names_from) == (mode, 9, "expect")
            if mode == "plan" and version > 1:
                assert report.planned == report.tensors, report.fallback
                assert not report.fallback


def test_the_order_is_durable():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket") as p:
        fake.flushes_refused = 2
        p.update(Fused.checkpoint(0), version=7)
        assert fake.calls == [
            "pause_generation",
            "flush_cache",
            "flush_cache",
            "flush_cache",
            "update_weight_version pyrlk-updating:7",
            "begin_weight_update",
            "update_weights_from_tensor",
            "end_weight_update",
            "update_weight_version 7",
            "continue_generation",
        ]
        fake.calls.clear()
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket", pause="in_place") as p:
        p.update(Fused.checkpoint(0), version=7)
        assert "flush_cache" not in fake.calls


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_casting_is_planned_too(mode):
    worker = Fused(dtype=torch.bfloat16)
    with FakeSGLang(worker, dtype="bfloat16") as fake, publisher(fake, mode) as p:
        for version in range(1, 4):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert same(worker, sent)
        assert report.planned == (9 if mode == "plan" else 0)


def broken(case):
    sent = Fused.checkpoint(1)
    if case == "unknown":
        sent["extra.weight"] = torch.zeros(3)
    elif case == "missing":
        del sent["q.weight"]
    elif case == "shape":
        sent["q.weight"] = torch.zeros(9, 12)
    elif case == "dtype":
        sent["q.weight"] = sent["q.weight"].to(torch.int8)
    elif case == "twice":
        return [*sent.items(), ("q.weight", sent["q.weight"])]
    return sent


CASES = {
    "unknown": weights.UnknownName,
    "missing": weights.MissingName,
    "shape": weights.ShapeMismatch,
    "dtype": weights.DtypeMismatch,
    "twice": ValueError,
}


@pytest.mark.parametrize("mode", ["bucket", "plan"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_found_before_the_engine_is_touched(mode, case):
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, mode) as p:
        p.update(Fused.checkpoint(0), version=1)
        fake.calls.clear()
        with pytest.raises(CASES[case]):
            p.update(broken(case), version=2)
        assert fake.calls == []
        assert same(worker, Fused.checkpoint(0))
        p.update(Fused.checkpoint(2), version=2)
        assert same(worker, Fused.checkpoint(2))


def test_plan_mode_learns_the_names_from_the_engine():
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, "plan", expect=None) as p:
        report = p.update(Fused.checkpoint(0), version=1)
        assert report.names_from == "engine"
        with pytest.raises(weights.UnknownName, match=r"extra\.weight"):
            p.update(broken("unknown"), version=2)
        with pytest.raises(weights.MissingName, match="qk"):
            p.update(broken("missing"), version=2)
        with pytest.raises(weights.ApplyFailed, match=r"AssertionError at 'q\.weight'"):
            p.update(broken("shape"), version=2)
        assert same(worker, Fused.checkpoint(0))
        assert (fake.version, fake.paused, fake.open) == ("1", False, False)
        p.update(Fused.checkpoint(2), version=2)
        assert same(worker, Fused.checkpoint(2))


def test_bucket_mode_does_not_guess_names(tmp_path):
    with FakeSGLang(Fused()) as fake:
        with (
            publisher(fake, "bucket", expect=None) as p,
            pytest.raises(weights.ManifestUnknown, match="expect"),
        ):
            p.update(Fused.checkpoint(0), version=1)
        assert fake.calls == []
        with publisher(fake, "bucket", expect=None, unchecked_names=True) as p:
            assert p.update(Fused.checkpoint(0), version=1).names_from == "unchecked"
    header = {
        n: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [0, 0]} for n, t in META.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with (
        FakeSGLang(Fused(), model_path=str(tmp_path)) as fake,
        publisher(fake, "bucket", expect=None) as p,
    ):
        assert p.update(Fused.checkpoint(0), version=1).names_from == "checkpoint"
        with pytest.raises(weights.ShapeMismatch):
            p.update(broken("shape"), version=2)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_load_leaves_all_ranks_as_they_were(failing):
    workers = [Raising(rank, 2) for rank in range(2)]
    for worker in workers:
        worker.armed = False
    with FakeSGLang(*workers) as fake, publisher(fake, "plan") as p:
        p.update(Fused.checkpoint(0), version=1)
        for version in range(2, 6):
            workers[failing].armed = True
            sent = Fused.checkpoint(version)
            sent.pop("norm.weight")  # another manifest: it is recorded anew
            with pytest.raises(weights.ApplyFailed, match=rf"rank {failing}.*no more") as caught:
                p.update(sent, version=version, partial=True)
            assert not caught.value.dirty
            workers[failing].armed = False
            assert (fake.version, fake.paused, fake.open) == ("1", False, False)
            assert all(same(worker, Fused.checkpoint(0)) for worker in workers)
        p.update(Fused.checkpoint(9), version=9)
        assert all(same(worker, Fused.checkpoint(9)) for worker in workers)


STEPS = [
    "/pause_generation",
    "/update_weight_version",
    "/begin_weight_update",
    "/update_weights_from_tensor",
    "/end_weight_update",
    "/continue_generation",
]


@pytest.mark.parametrize("mode", ["bucket", "plan"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_taken_back_or_marked(mode, step):
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, mode) as p:
        p.update(Fused.checkpoint(0), version=1)
        fake.fail[step] = 400
        with pytest.raises(weights.ApplyFailed) as caught:
            p.update(Fused.checkpoint(1), version=2)
        del fake.fail[step]
        if not caught.value.dirty:
            assert same(worker, Fused.checkpoint(0))
            assert (fake.version, fake.open) == ("1", False)
        else:
            assert fake.paused
        # Whatever is left behind, a full update mends it.
        p.update(Fused.checkpoint(2), version=3)
        assert same(worker, Fused.checkpoint(2))
        assert (fake.version, fake.paused, fake.open) == ("3", False, False)


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_a_dead_publishers_update_is_taken_up_by_the_next(mode):
    worker = Fused()
    with FakeSGLang(worker) as fake:
        fake.version, fake.paused, fake.open = "pyrlk-updating:5", True, True
        with publisher(fake, mode) as p:
            with pytest.raises(weights.EngineDirty):
                p.update({"norm.weight": torch.ones(12)}, version=6, partial=True)
            assert fake.paused
            p.update(Fused.checkpoint(0), version=5)
        assert same(worker, Fused.checkpoint(0))
        assert (fake.version, fake.paused, fake.open) == ("5", False, False)


def test_another_ones_session_is_left_alone():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket") as p:
        fake.open = True
        with pytest.raises(weights.Busy, match="somebody else"):
            p.update(Fused.checkpoint(0), version=1)
        assert fake.open
        assert (fake.version, fake.paused) == ("default", False)


def test_one_publisher_an_engine():
    with FakeSGLang(Fused()) as fake, publisher(fake) as p:
        p.update(Fused.checkpoint(0), version=1)
        with publisher(fake) as other, pytest.raises(weights.Busy, match="another publisher"):
            other.update(Fused.checkpoint(1), version=2)
        p.close()
        with publisher(fake) as other:
            other.update(Fused.checkpoint(1), version=2)


def test_a_forked_child_does_not_keep_the_lock():
    with FakeSGLang(Fused()) as fake:
        lock = Lock(fake.url)
        ready, done = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b".")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        lock.close()
        Lock(fake.url).close()
        os.write(done[1], b".")
        os.waitpid(child, 0)


def test_versions_rise():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket") as p:
        p.update(Fused.checkpoint(0), version=5)
        with pytest.raises(weights.StaleVersion):
            p.update(Fused.checkpoint(0), version=5)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"dp_size": 2}, "--dp-size"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"enable_eplb": True}, "--enable-eplb"),
    ],
)
def test_engines_that_would_break_are_refused(info, said):
    with (
        FakeSGLang(Fused(), **info) as fake,
        publisher(fake) as p,
        pytest.raises(weights.Unsupported, match=said),
    ):
        p.update(Fused.checkpoint(0), version=1)


def test_modes_follow_the_server():
    with FakeSGLang(Fused(), custom_weight_loader=[]) as fake:
        with publisher(fake, "auto") as p:
            assert p.update(Fused.checkpoint(0), version=1).mode == "bucket"
        with publisher(fake, "plan") as p, pytest.raises(weights.Unsupported, match=LOADER):
            p.update(Fused.checkpoint(0), version=2)
    with FakeSGLang(Fused()) as fake, publisher(fake, "auto") as p:
        assert p.update(Fused.checkpoint(0), version=1).mode == "plan"


def test_the_api_key_is_sent():
    with FakeSGLang(Fused(), api_key="secret") as fake:
        with publisher(fake) as p, pytest.raises(weights.Unsupported, match="api_key"):
            p.update(Fused.checkpoint(0), version=1)
        with publisher(fake, api_key="secret") as p:
            p.update(Fused.checkpoint(0), version=1)


OLDER = {
    "slime's": NO_SESSIONS,
    "without post-processing": NO_SESSIONS | {"post_process_weights"},
    "oldest": NO_SESSIONS | {"post_process_weights", "update_weight_version"},
}


@pytest.mark.parametrize("dialect", OLDER)
def test_the_older_dialect(dialect):
    """No session, no selector; what the server lacks is left out, the rest keeps its order."""
    worker = Fused()
    with FakeSGLang(worker, lacks=OLDER[dialect]) as fake:
        with publisher(fake, "auto", bucket_bytes=1 << 10) as p:
            report = p.update(Fused.checkpoint(0), version=3)
        assert report.mode == "bucket"  # although the server names our loader
        assert same(worker, Fused.checkpoint(0))
        assert (fake.version, fake.paused) == ("3", False)
        updates = ["update_weights_from_tensor"] * report.buckets
        calls = [
            "pause_generation",
            "flush_cache",
            "update_weight_version pyrlk-updating:3",
            "post_process_weights restore",
            *updates,
            "post_process_weights process",
            "update_weight_version 3",
            "continue_generation",
        ]
        assert fake.calls == [c for c in calls if c.split()[0] not in OLDER[dialect]]
        with publisher(fake, "plan") as p, pytest.raises(weights.Unsupported, match="bucket"):
            p.update(Fused.checkpoint(1), version=4)


def test_the_oldest_dialect_shows_a_version_with_the_last_bucket():
    worker = Fused()
    with FakeSGLang(worker, lacks=OLDER["oldest"]) as fake, publisher(fake, "bucket") as p:
        p.update(Fused.checkpoint(0), version=3)
        update = fake.update_weights_from_tensor
        seen = []

        def watched(body):
            answer = update(body)
            seen.append(fake.version)
            return answer

        fake.update_weights_from_tensor = watched
        p.close()
        with publisher(fake, "bucket", bucket_bytes=1 << 10) as small:
            small.update(Fused.checkpoint(1), version=4)
        assert seen == ["3"] * (len(seen) - 1) + ["4"]
        assert len(seen) > 1


def test_a_restarted_server_is_planned_anew():
    first, second = Fused(), Fused()
    with FakeSGLang(first) as fake, publisher(fake, "plan") as p:
        p.update(Fused.checkpoint(0), version=1)
        p.update(Fused.checkpoint(1), version=2)
        fake.workers = (second,)
        fake.info["startup_time"] = {"load_weight": 0.5}
        fake.version = "default"
        with pytest.raises(weights.EngineDirty, match="restarted"):
            p.update({"norm.weight": torch.ones(12)}, version=3, partial=True)
        report = p.update(Fused.checkpoint(2), version=3)
        assert same(second, Fused.checkpoint(2))
        assert report.planned == 0


def test_nobody_there():
    engine = weights.SGLang("http://127.0.0.1:9")
    with weights.Publisher(engine, timeout=0.3) as p, pytest.raises(weights.PeerLost):
        p.update(Fused.checkpoint(0), version=1)


def test_what_cannot_be_planned_says_why():
    worker = Scaled()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            doubled = {**sent, "norm.weight": sent["norm.weight"] * 2}
            assert same(worker, doubled)
        assert report.planned == 8
        assert list(report.fallback) == ["norm.weight"]
        assert "computes with it" in report.fallback["norm.weight"]


def test_a_replay_that_differs_is_never_trusted():
    worker = Forgetful()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
        assert report.planned == 0
        assert torch.equal(worker.norm, sent["norm.weight"] + 1)


def test_derived_tensors_are_made_again():
    worker = Derived()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 5):
            report = p.update(Fused.checkpoint(version), version=version)
            assert torch.equal(worker.w_kc, worker.qk * 3)
        assert report.planned == report.tensors
        before = worker.calls
        p.update(Fused.checkpoint(9), version=9)
        assert worker.calls == before  # load_weights is not needed any more
        assert torch.equal(worker.w_kc, worker.qk * 3)


def test_a_loader_that_rebinds_is_not_planned():
    worker = Rebinding()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 4):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert same(worker, sent)
        assert report.planned == 0
        assert "rebinds" in report.fallback["norm.weight"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_byte_that_changes_on_the_way_is_seen(ranks, monkeypatch):
    workers = [Fused(rank, ranks) for rank in range(ranks)]
    with FakeSGLang(*workers) as fake, publisher(fake, "plan") as p:
        for version in range(1, 4):
            p.update(Fused.checkpoint(version), version=version)
        pack = weights.memory.Segment.pack

        def torn(self, sources, **options):
            sums = pack(self, sources, **options)
            self.flat[100] += 1
            return sums

        monkeypatch.setattr(weights.memory.Host, "pack", torn)
        with pytest.raises(weights.ChecksumMismatch):
            p.update(Fused.checkpoint(5), version=5)
        assert fake.paused
        assert fake.version == "pyrlk-updating:5"
        monkeypatch.setattr(weights.memory.Host, "pack", pack)
        p.update(Fused.checkpoint(6), version=6)
        assert all(same(worker, Fused.checkpoint(6)) for worker in workers)


def test_a_model_that_is_gone_leaves_nothing_behind():
    worker = Fused()
    gone = weakref.ref(worker)
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 4):
            p.update(Fused.checkpoint(version), version=version)
        fake.workers = ()
    del worker
    gc.collect()
    assert gone() is None
